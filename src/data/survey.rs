//! Looks at all images of a list before they are used.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use sha2::{Digest, Sha256};

use super::file_list::FileList;
use super::image::{check_header, with_image};
use super::source::of_entry;
use crate::error::{Error, Result};
use crate::preprocessing::Orientation;

/// How closely a [`Survey`] looks at an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SurveyDepth {
    /// The headers are read, and of a JPEG the end-of-image marker is checked. An image that is
    /// damaged elsewhere is not noticed.
    Headers,
    /// The whole image is decoded.
    Pixels,
}

/// An image that cannot be read.
#[derive(Debug)]
#[non_exhaustive]
pub struct Unreadable {
    /// The position of the image in [`FileList::entries`].
    pub index: usize,
    /// An [`Error::Image`] with the path, the reason, and the list and line that name the image.
    pub error: Error,
}

/// What was found when all images of a list were looked at.
#[derive(Debug)]
#[non_exhaustive]
pub struct Survey {
    /// The number of images in the list.
    pub images: usize,
    /// The images that cannot be read, in the order of the list.
    pub unreadable: Vec<Unreadable>,
}

impl Survey {
    /// Looks at every image of `list` on `threads` threads.
    ///
    /// # Errors
    /// [`Error::Io`] if the system cannot start a thread. An image that cannot be read is no error.
    pub fn of(list: &FileList, depth: SurveyDepth, threads: NonZeroUsize) -> Result<Self> {
        let entries = list.entries();
        let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(entry) = entries.get(index) else { break };
                let path = list.root().join(&entry.path);
                let checked = match depth {
                    SurveyDepth::Headers => check_header(&path),
                    SurveyDepth::Pixels => with_image(&path, Orientation::Stored, |_| Ok(())),
                };
                if let Err(error) = checked {
                    let error = of_entry(error, list, entry);
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.push(Unreadable { index, error });
                }
            }
        };
        let started = thread::scope(|scope| -> std::io::Result<()> {
            for _ in 0..threads.get().min(entries.len()).min(super::dataset::MAX_THREADS) {
                thread::Builder::new().name("survey".into()).spawn_scoped(scope, work)?;
            }
            Ok(())
        });
        started.map_err(Error::io(list.file()))?;
        let mut unreadable = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        unreadable.sort_by_key(|image| image.index);
        Ok(Self { images: entries.len(), unreadable })
    }
}

impl FileList {
    /// Returns the list without the images that `survey`, a survey of this list, could not read. A
    /// class may be left without images.
    ///
    /// # Errors
    /// [`Error::CorruptFile`] if no image is left.
    pub fn without_unreadable(&self, survey: &Survey) -> Result<Self> {
        let bad: HashSet<usize> = survey.unreadable.iter().map(|image| image.index).collect();
        let entries = self.entries().iter().enumerate();
        let readable = entries.filter(|(index, _)| !bad.contains(index));
        let readable: Vec<_> = readable.map(|(_, entry)| entry.clone()).collect();
        if readable.is_empty() {
            return Err(Error::corrupt(self.file(), "none of its images can be read"));
        }
        Ok(self.with_entries(readable))
    }
}

/// Two images with the same content, in two lists.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Overlap {
    /// The path of the image in the first list.
    pub first: PathBuf,
    /// The path of the image in the second list, which may be the same.
    pub second: PathBuf,
}

/// Returns the images of `second` whose bytes are also those of an image of `first`, in the order
/// of `second`. Files are read only where both lists have a file of that size. Files that cannot be
/// read are passed over.
pub fn overlap(first: &FileList, second: &FileList) -> Vec<Overlap> {
    let sizes = |list: &FileList| {
        let paths = list.entries().iter().map(|entry| list.root().join(&entry.path));
        let sized = paths.filter_map(|path| {
            let known = std::fs::metadata(&path).ok().filter(|known| known.is_file())?;
            Some((known.len(), path))
        });
        sized.collect::<Vec<_>>()
    };
    let (first, second) = (sizes(first), sizes(second));
    let in_second: HashSet<u64> = second.iter().map(|(size, _)| *size).collect();
    let mut contents: HashMap<[u8; 32], &PathBuf> = HashMap::new();
    let mut in_first = HashSet::new();
    for (size, path) in first.iter().filter(|(size, _)| in_second.contains(size)) {
        in_first.insert(*size);
        if let Some(digest) = digest(path) {
            contents.entry(digest).or_insert(path);
        }
    }
    let candidates = second.iter().filter(|(size, _)| in_first.contains(size));
    let found = candidates.filter_map(|(_, path)| {
        let first = contents.get(&digest(path)?)?;
        Some(Overlap { first: first.to_path_buf(), second: path.clone() })
    });
    found.collect()
}

fn digest(path: &PathBuf) -> Option<[u8; 32]> {
    let mut hash = Sha256::new();
    std::io::copy(&mut File::open(path).ok()?, &mut hash).ok()?;
    Some(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_that_cannot_be_read_is_found() {
        let folder = tempfile::tempdir().unwrap();
        for (at, class) in ["a", "a", "a", "b", "b"].iter().enumerate() {
            std::fs::create_dir_all(folder.path().join(class)).unwrap();
            let photo = image::RgbImage::from_pixel(9, 9, image::Rgb([at as u8 * 9, 7, 1]));
            photo.save(folder.path().join(format!("{class}/{at}.png"))).unwrap();
        }
        let list = FileList::from_folders(folder.path()).unwrap();
        let survey = |depth| Survey::of(&list, depth, NonZeroUsize::new(3).unwrap()).unwrap();
        assert!(survey(SurveyDepth::Pixels).unreadable.is_empty());
        let damage = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = std::fs::read(folder.path().join(name)).unwrap();
            change(&mut bytes);
            std::fs::write(folder.path().join(name), bytes).unwrap();
        };
        damage("a/0.png", &|bytes| bytes.truncate(20));
        // The header is whole.
        damage("a/2.png", &|bytes| bytes.truncate(bytes.len() / 2 + 4));
        std::fs::remove_file(folder.path().join("b/3.png")).unwrap();
        let found =
            |survey: &Survey| survey.unreadable.iter().map(|image| image.index).collect::<Vec<_>>();
        let (headers, pixels) = (survey(SurveyDepth::Headers), survey(SurveyDepth::Pixels));
        assert_eq!((found(&headers), found(&pixels)), (vec![0, 3], vec![0, 2, 3]));
        assert!(matches!(pixels.unreadable[2].error, Error::Image { .. }));
        let readable = list.without_unreadable(&pixels).unwrap();
        assert_eq!((readable.entries().len(), readable.class_counts()), (2, vec![1, 1]));
        for name in ["a/1.png", "a/2.png", "b/4.png"] {
            std::fs::remove_file(folder.path().join(name)).unwrap();
        }
        let refused = list.without_unreadable(&survey(SurveyDepth::Headers));
        assert!(matches!(refused, Err(Error::CorruptFile { .. })));
    }

    #[test]
    fn the_same_bytes_in_two_lists_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let files = ["same", "other", "longer text", "same"];
        for (at, text) in files.iter().enumerate() {
            std::fs::write(folder.path().join(at.to_string()), text).unwrap();
        }
        let list = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).unwrap();
            FileList::read(folder.path(), folder.path().join(name), None).unwrap()
        };
        let train = list("train.txt", "0 0\n1 1\nmissing 0\n");
        let test = list("test.txt", "1 1\n2 0\n3 0\nmissing 0\n");
        let found = overlap(&train, &test);
        let names = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        let pairs: Vec<_> = found.iter().map(|o| (names(&o.first), names(&o.second))).collect();
        let expected = [("1", "1"), ("0", "3")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(pairs, expected);
    }
}
