//! A dataset of images with labels. The images are decoded once and kept in memory as u8, or
//! decoded in each pass.

use std::borrow::Cow;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;

use ndarray::{Array3, Array4, ArrayView4};
use sha2::{Digest, Sha256};

use super::file_list::{FileEntry, FileList};
use super::resize::Resize;
use super::source::{Source, read_entry};
use crate::error::{Error, Result};
use crate::preprocessing::Orientation;

/// The largest number of threads. More threads would only wait for each other.
pub(super) const MAX_THREADS: usize = 256;

/// A dataset of N images of one size with their labels. Clones share the pixels.
///
/// Images in memory take 3 bytes a pixel: 150 MB for 1,000 images of 224x224. Stream a large test
/// set instead ([`ImageDataset::stream`]): a pass then holds the pixels of three batches, for any
/// N.
#[derive(Debug, Clone)]
pub struct ImageDataset {
    source: Arc<Source>,
    labels: Vec<i64>,
    num_classes: i64,
    split_hash: String,
    /// Computed when it is asked for.
    pixel_hash: Arc<OnceLock<Option<String>>>,
    threads: NonZeroUsize,
    orientation: Orientation,
}

impl ImageDataset {
    /// Decodes every image of `list` and resizes it to `image_size` = (rows, columns) with
    /// [`Resize::bicubic`]. The work runs on as many threads as the machine has cores.
    ///
    /// # Errors
    /// [`Error::Image`] for the first image in the list that is missing or cannot be decoded, with
    /// its path, the list and the line; [`Error::Config`] if the size is invalid or the images do
    /// not fit in memory.
    pub fn load(list: &FileList, image_size: (i64, i64)) -> Result<Self> {
        Self::load_with(list, image_size, cores(), |_| {})
    }

    /// Does the same as [`ImageDataset::load`] on `threads` threads. `progress` is called on the
    /// calling thread with the number of decoded images, from 1 to N.
    ///
    /// # Errors
    /// The errors of [`ImageDataset::load`].
    pub fn load_with(
        list: &FileList,
        image_size: (i64, i64),
        threads: NonZeroUsize,
        progress: impl FnMut(usize),
    ) -> Result<Self> {
        Self::decode(list, Resize::bicubic(image_size)?, threads, progress)
    }

    /// Does the same as [`ImageDataset::load`] with the given resize.
    ///
    /// # Errors
    /// The errors of [`ImageDataset::load`].
    pub fn load_resized(list: &FileList, resize: Resize) -> Result<Self> {
        Self::decode(list, resize, cores(), |_| {})
    }

    fn decode(
        list: &FileList,
        resize: Resize,
        threads: NonZeroUsize,
        progress: impl FnMut(usize),
    ) -> Result<Self> {
        // Both sides are at most 65,535.
        let (rows, columns) = resize.image_size();
        let (rows, columns) = (rows as usize, columns as usize);
        let count = list.entries().len();
        let mut pixels = zeroed(count, rows * columns * 3)?;
        decode_all(list, resize, &mut pixels, threads, progress)?;
        let images = Array4::from_shape_vec((count, rows, columns, 3), pixels)
            .map_err(|e| Error::config("image_size", "a size that fits the list", e))?;
        Ok(Self::of_list(list, Source::Memory(images), resize.orientation()))
    }

    /// Creates a dataset whose images are decoded and resized in each pass, two batches ahead of
    /// their use, on as many threads as the machine has cores. This function opens no file.
    pub fn stream(list: &FileList, resize: Resize) -> Self {
        Self::of_list(list, Source::Files { list: list.clone(), resize }, resize.orientation())
    }

    fn of_list(list: &FileList, source: Source, orientation: Orientation) -> Self {
        ImageDataset {
            source: Arc::new(source),
            labels: list.entries().iter().map(|entry| entry.label).collect(),
            num_classes: list.num_classes(),
            split_hash: list.split_hash(),
            pixel_hash: Arc::default(),
            threads: cores(),
            orientation,
        }
    }

    /// Creates a dataset from RGB u8 images `[N, H, W, 3]` and their labels.
    ///
    /// # Errors
    /// [`Error::Input`] if there are no pixels, not 3 channels, or not one label for each image, or
    /// if a label is not in `0..num_classes`.
    pub fn from_arrays(images: Array4<u8>, labels: Vec<i64>, num_classes: i64) -> Result<Self> {
        let (count, rows, columns, channels) = images.dim();
        if count == 0 || rows == 0 || columns == 0 || channels != 3 {
            return Err(input("images", "[N, H, W, 3] with N, H, W >= 1", images.shape()));
        }
        if labels.len() != count {
            return Err(input("labels", format!("{count}, one per image"), labels.len()));
        }
        if let Some(at) = labels.iter().position(|label| !(0..num_classes).contains(label)) {
            let found = format!("{} at index {at}", labels[at]);
            return Err(input("labels", format!("each in 0..{num_classes}"), found));
        }
        let images = if images.is_standard_layout() {
            images
        } else {
            images.as_standard_layout().into_owned()
        };
        let split_hash = hash_arrays(&images, &labels);
        let source = Arc::new(Source::Memory(images));
        let (threads, orientation) = (cores(), Orientation::Stored);
        let pixel_hash = Arc::default();
        Ok(Self { source, labels, num_classes, split_hash, pixel_hash, threads, orientation })
    }

    /// Sets the number of threads that decode or augment images in a pass, at most 256.
    pub fn with_threads(self, threads: NonZeroUsize) -> Self {
        Self { threads, ..self }
    }

    /// Returns the number of images, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a dataset is never empty")]
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Returns (rows, columns) of each image.
    pub fn image_size(&self) -> (i64, i64) {
        self.source.image_size()
    }

    /// Returns the pixels, `[N, H, W, 3]` RGB u8, or `None` if they are not kept in memory.
    pub fn images(&self) -> Option<ArrayView4<'_, u8>> {
        match &*self.source {
            Source::Memory(images) => Some(images.view()),
            Source::Files { .. } => None,
        }
    }

    /// Returns what was done with the EXIF orientation of the images' files. Images of arrays are
    /// as they are stored.
    pub fn orientation(&self) -> Orientation {
        self.orientation
    }

    /// Returns one image, `[H, W, 3]` RGB u8, from memory or decoded from its file.
    ///
    /// # Errors
    /// [`Error::Input`] if `index` is not below the number of images; [`Error::Image`] if the image
    /// cannot be decoded.
    pub fn image(&self, index: usize) -> Result<Array3<u8>> {
        let (rows, columns) = self.image_size();
        let pixels = self.pixels(index)?.into_owned();
        Array3::from_shape_vec((rows as usize, columns as usize, 3), pixels)
            .map_err(|e| input("index", "an image", e))
    }

    /// Returns the labels, one for each image, each in `0..num_classes`.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// Returns the number of classes.
    pub fn num_classes(&self) -> i64 {
        self.num_classes
    }

    /// Returns a SHA-256 hash in hex that identifies the dataset in the record of a run.
    ///
    /// For images of a list, the relative paths and labels are hashed, so the hash does not depend
    /// on the location of the data. For images of arrays, the shape, pixels and labels are hashed.
    pub fn split_hash(&self) -> &str {
        &self.split_hash
    }

    /// Returns the SHA-256 hash of all pixels in hex, or `None` if they are not kept in memory. It
    /// changes if a file, the resize or the orientation changes.
    pub fn pixel_hash(&self) -> Option<&str> {
        let hash = || {
            let images = self.images()?;
            Some(format!("{:x}", Sha256::digest(images.as_slice()?)))
        };
        self.pixel_hash.get_or_init(hash).as_deref()
    }

    /// Returns the pixels of one image, row by row.
    pub(crate) fn pixels(&self, index: usize) -> Result<Cow<'_, [u8]>> {
        self.source.pixels(index)
    }

    pub(super) fn source(&self) -> &Arc<Source> {
        &self.source
    }

    /// Returns the number of threads of a pass over `images` images.
    pub(super) fn threads(&self, images: usize) -> NonZeroUsize {
        let most = NonZeroUsize::new(images.min(MAX_THREADS)).unwrap_or(NonZeroUsize::MIN);
        self.threads.min(most)
    }
}

fn cores() -> NonZeroUsize {
    thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

fn input(
    argument: &'static str,
    expected: impl Into<String>,
    found: impl std::fmt::Debug,
) -> Error {
    Error::Input { argument, expected: expected.into(), found: format!("{found:?}") }
}

/// Allocates zeroed memory for every image, or returns an error if there is not enough.
fn zeroed(count: usize, image_bytes: usize) -> Result<Vec<u8>> {
    let refuse = |found: String| Error::config("image_size", "a size that fits in memory", found);
    let bytes = count
        .checked_mul(image_bytes)
        .ok_or_else(|| refuse(format!("{count} images of {image_bytes} bytes")))?;
    let mut pixels = Vec::new();
    pixels.try_reserve_exact(bytes).map_err(|e| refuse(format!("{bytes} bytes: {e}")))?;
    pixels.resize(bytes, 0);
    Ok(pixels)
}

/// The images that no thread has taken yet, with their places in the output.
type Queue<'a> = Box<dyn Iterator<Item = Job<'a>> + Send + 'a>;
/// The index of an image in the list, its entry, and its place in the output.
type Job<'a> = ((usize, &'a FileEntry), &'a mut [u8]);

/// Fills `pixels` with every image of the list.
///
/// Threads take the images in the order of the list, and after an error they finish the images that
/// they have taken. The first error in the list is therefore the same on any number of threads.
fn decode_all(
    list: &FileList,
    resize: Resize,
    pixels: &mut [u8],
    threads: NonZeroUsize,
    mut progress: impl FnMut(usize),
) -> Result<()> {
    let entries = list.entries();
    let threads = threads.get().min(entries.len()).min(MAX_THREADS);
    let places = pixels.chunks_exact_mut((pixels.len() / entries.len()).max(1));
    let queue: Mutex<Queue> = Mutex::new(Box::new(entries.iter().enumerate().zip(places)));
    let (sender, results) = mpsc::channel();
    let mut first_error: Option<(usize, Error)> = None;
    thread::scope(|scope| {
        for _ in 0..threads {
            let (queue, sender) = (&queue, sender.clone());
            let worker = move || {
                while let Some(((index, entry), place)) = next(queue) {
                    let result = read_entry(list, entry, resize)
                        .map(|image| place.copy_from_slice(image.as_slice().unwrap_or_default()));
                    if sender.send((index, result)).is_err() {
                        break;
                    }
                }
            };
            let spawned = thread::Builder::new().name("decode".into()).spawn_scoped(scope, worker);
            if let Err(source) = spawned {
                clear(queue);
                return Err(Error::io(list.file())(source));
            }
        }
        drop(sender);
        let mut done = 0;
        for (index, result) in results {
            match result {
                Ok(()) => {
                    done += 1;
                    progress(done);
                }
                Err(error) => {
                    clear(&queue);
                    if first_error.as_ref().is_none_or(|(first, _)| index < *first) {
                        first_error = Some((index, error));
                    }
                }
            }
        }
        Ok(())
    })?;
    first_error.map_or(Ok(()), |(_, error)| Err(error))
}

fn lock<'q, 'a>(queue: &'q Mutex<Queue<'a>>) -> MutexGuard<'q, Queue<'a>> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

fn next<'a>(queue: &Mutex<Queue<'a>>) -> Option<Job<'a>> {
    lock(queue).next()
}

fn clear(queue: &Mutex<Queue>) {
    *lock(queue) = Box::new(std::iter::empty());
}

/// Hashes the shape, the pixels and the labels. Sizes and labels are little-endian 64-bit integers.
fn hash_arrays(images: &Array4<u8>, labels: &[i64]) -> String {
    let mut hash = Sha256::new();
    for &size in images.shape() {
        hash.update((size as u64).to_le_bytes());
    }
    hash.update(images.as_slice().unwrap_or_default());
    for label in labels {
        hash.update(label.to_le_bytes());
    }
    format!("{:x}", hash.finalize())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Creates a folder of `count` small PNG files, each of the grey value 10 * index, and their
    /// list.
    fn folder_of(count: usize) -> (tempfile::TempDir, FileList) {
        let folder = tempfile::tempdir().unwrap();
        let mut text = String::new();
        for i in 0..count {
            let image = image::RgbImage::from_pixel(5, 4, image::Rgb([10 * i as u8; 3]));
            image.save(folder.path().join(format!("{i}.png"))).unwrap();
            text += &format!("{i}.png {}\n", i % 3);
        }
        std::fs::write(folder.path().join("list.txt"), text).unwrap();
        let list = read(folder.path());
        (folder, list)
    }

    fn read(folder: &Path) -> FileList {
        FileList::read(folder, folder.join("list.txt"), Some(3)).unwrap()
    }

    #[test]
    fn loads_in_the_order_of_the_list_on_any_number_of_threads() {
        let (_folder, list) = folder_of(9);
        for threads in [1, 2, 7, 1000] {
            let mut calls = Vec::new();
            let threads = NonZeroUsize::new(threads).unwrap();
            let data = ImageDataset::load_with(&list, (6, 3), threads, |n| calls.push(n)).unwrap();
            assert_eq!(data.images().unwrap().shape(), [9, 6, 3, 3]);
            assert_eq!(data.labels(), [0, 1, 2, 0, 1, 2, 0, 1, 2]);
            assert_eq!((data.len(), data.num_classes(), data.image_size()), (9, 3, (6, 3)));
            assert_eq!(calls, (1..=9).collect::<Vec<_>>());
            for (i, image) in data.images().unwrap().outer_iter().enumerate() {
                assert!(image.iter().all(|&v| v == 10 * i as u8));
            }
        }
    }

    #[test]
    fn the_first_bad_image_is_named_with_its_list_and_line() {
        let (folder, list) = folder_of(9);
        std::fs::remove_file(folder.path().join("3.png")).unwrap();
        std::fs::write(folder.path().join("6.png"), b"no image").unwrap();
        for threads in [1, 4] {
            let threads = NonZeroUsize::new(threads).unwrap();
            let error = ImageDataset::load_with(&list, (4, 4), threads, |_| {}).unwrap_err();
            let Error::Image { path, list: Some((file, 4)), .. } = error else {
                panic!("{error:?}")
            };
            assert!(path.ends_with("3.png") && file.ends_with("list.txt"));
        }
        let image = image::RgbImage::new(1, 1);
        image.save(folder.path().join("3.png")).unwrap();
        let error = ImageDataset::load(&list, (4, 4)).unwrap_err().to_string();
        assert!(
            error.contains("not an image in one of the formats JPEG")
                && error.contains("list.txt:7"),
            "{error}"
        );
    }

    #[test]
    fn a_size_that_cannot_be_is_an_error() {
        let (_folder, list) = folder_of(1);
        for size in [(0, 4), (4, -1), (i64::MAX, 4), (65_536, 1)] {
            let refused = ImageDataset::load(&list, size);
            assert!(matches!(refused, Err(Error::Config { .. })), "{size:?}");
        }
    }

    #[test]
    fn a_streamed_image_is_the_loaded_one() {
        let (folder, list) = folder_of(4);
        for resize in [Resize::bicubic((3, 7)).unwrap(), Resize::center_crop(9, (8, 8)).unwrap()] {
            let loaded = ImageDataset::load_resized(&list, resize).unwrap();
            let streamed = ImageDataset::stream(&list, resize);
            assert_eq!(streamed.split_hash(), loaded.split_hash());
            assert_eq!((streamed.len(), streamed.num_classes()), (4, 3));
            assert_eq!(
                (streamed.labels(), streamed.image_size()),
                (loaded.labels(), loaded.image_size())
            );
            assert!(streamed.images().is_none());
            for index in 0..4 {
                assert_eq!(streamed.image(index).unwrap(), loaded.image(index).unwrap());
            }
            assert!(matches!(streamed.image(4), Err(Error::Input { .. })));
        }
        std::fs::remove_file(folder.path().join("2.png")).unwrap();
        let streamed = ImageDataset::stream(&list, Resize::bicubic((2, 2)).unwrap());
        let Err(Error::Image { list: Some((_, 3)), .. }) = streamed.image(2) else { panic!() };
    }

    #[test]
    fn arrays_are_checked() {
        let make = |shape: [usize; 4], labels: Vec<i64>| {
            ImageDataset::from_arrays(Array4::zeros(shape), labels, 2)
        };
        assert_eq!(make([2, 3, 4, 3], vec![0, 1]).unwrap().image_size(), (3, 4));
        for (shape, labels) in [
            ([0, 3, 4, 3], vec![]),
            ([1, 0, 4, 3], vec![0]),
            ([1, 3, 4, 1], vec![0]),
            ([2, 3, 4, 3], vec![0]),
            ([2, 3, 4, 3], vec![0, 2]),
            ([2, 3, 4, 3], vec![0, -1]),
        ] {
            let refused = make(shape, labels);
            assert!(matches!(refused, Err(Error::Input { .. })), "{shape:?}");
        }
    }

    #[test]
    fn strided_arrays_are_read_by_their_indices() {
        let images =
            Array4::from_shape_fn((3, 4, 5, 2), |(c, x, y, n)| (n * 60 + c * 20 + x * 5 + y) as u8);
        let images = images.permuted_axes([3, 2, 1, 0]);
        let data = ImageDataset::from_arrays(images.clone(), vec![0, 1], 2).unwrap();
        assert_eq!(data.images().unwrap(), images.view());
        let expected: Vec<u8> = images.index_axis(ndarray::Axis(0), 1).iter().copied().collect();
        assert_eq!(data.pixels(1).unwrap(), expected);
        assert_eq!(data.image(1).unwrap(), images.index_axis(ndarray::Axis(0), 1));
        for index in [2, usize::MAX] {
            assert!(matches!(data.image(index), Err(Error::Input { argument: "index", .. })));
        }
    }

    #[test]
    fn the_hash_tells_splits_apart_and_nothing_else() {
        let (a, list_a) = folder_of(3);
        let (_b, list_b) = folder_of(3);
        let hash = |list: &FileList, size| {
            ImageDataset::load(list, size).unwrap().split_hash().to_string()
        };
        assert_eq!(hash(&list_a, (4, 4)), hash(&list_b, (2, 2)));
        std::fs::write(a.path().join("list.txt"), "0.png 0\n1.png 1\n2.png 1\n").unwrap();
        assert_ne!(hash(&read(a.path()), (4, 4)), hash(&list_b, (4, 4)));
        let arrays = |value| {
            let images = Array4::from_elem((1, 2, 2, 3), value);
            ImageDataset::from_arrays(images, vec![0], 1).unwrap().split_hash().to_string()
        };
        assert_eq!(arrays(1), arrays(1));
        assert_ne!(arrays(1), arrays(2));
        assert_eq!(arrays(1).len(), 64);
    }
}
