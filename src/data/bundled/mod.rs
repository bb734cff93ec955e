//! A small backbone and four small tasks that are part of the crate (feature `bundled`).
//!
//! [`write`](fn@write) writes a task in the VTAB layout. Three tasks have rendered images, similar
//! to VTAB's structured group; one has real images. [`write_backbone`] writes a ViT that was
//! pretrained on Fashion-MNIST. The data is compiled into the crate, so a program still has it
//! after it was moved or installed.

mod backbone;
mod digits;
mod scene;

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ndarray::ArrayView3;
use serde::{Deserialize, Serialize};

use super::resize::Resize;
use super::vtab::VtabSplit;
use crate::error::{Error, Result};

pub use backbone::write_backbone;

/// The name of the file that records the parameters of a task's folder.
const RECORD: &str = "task.json";
/// The version of the tasks. Increase it when the images of a task change.
const VERSION: u32 = 1;

/// A task that is part of the crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BundledTask {
    /// The number of shapes in the image, 1 to 8. Their forms, colours and sizes vary.
    Count,
    /// The cell of a 4x4 grid that contains the only shape, counted row by row. The grid is not
    /// drawn.
    Location,
    /// The direction that a shape points in, one of 16 at steps of 22.5 degrees. Direction 0 is
    /// right and direction 4 is down.
    Orientation,
    /// Real images: 1,797 digits from UCI's *Optical Recognition of Handwritten Digits*, CC BY 4.0.
    Digits,
}

impl BundledTask {
    /// Every task.
    pub const ALL: [Self; 4] = [Self::Count, Self::Location, Self::Orientation, Self::Digits];

    /// Returns the name of the task and of its folder.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Location => "location",
            Self::Orientation => "orientation",
            Self::Digits => "digits",
        }
    }

    /// Returns the number of classes.
    pub const fn num_classes(self) -> i64 {
        match self {
            Self::Count => 8,
            Self::Location | Self::Orientation => 16,
            Self::Digits => 10,
        }
    }

    /// Returns the number of training, validation and test images.
    pub const fn split_sizes(self) -> [usize; 3] {
        match self {
            Self::Digits => [800, 200, 797],
            _ => [800, 200, 2000],
        }
    }
}

impl fmt::Display for BundledTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for BundledTask {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let tasks = Self::ALL.into_iter();
        tasks.clone().find(|task| task.name() == name).ok_or_else(|| {
            let names: Vec<_> = tasks.map(Self::name).collect();
            Error::config("task", format!("one of {}", names.join(", ")), name)
        })
    }
}

/// The parameters that determine every byte of a task's folder.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    version: u32,
    task: BundledTask,
    side: u32,
    seed: i64,
}

/// Writes `task` into the folder `<root>/<task>` in the VTAB layout, with PNG files of `side` x
/// `side` pixels. Returns the folder, which [`VtabFolder::open`](super::vtab::VtabFolder::open)
/// reads. A folder that was written earlier with the same parameters is not changed.
///
/// `seed` determines the rendered images and, for digits, the split of each image. The folder gets
/// its name only when it is complete, so an interrupted run does not leave an incomplete task.
///
/// # Errors
/// [`Error::Config`] unless `side` is from 16 to 1,024; [`Error::Io`] if the folder cannot be
/// written or exists and was written with other parameters.
pub fn write(root: impl AsRef<Path>, task: BundledTask, side: i64, seed: i64) -> Result<PathBuf> {
    let root = root.as_ref();
    let folder = root.join(task.name());
    let side = match u32::try_from(side) {
        Ok(pixels @ 16..=1024) => pixels,
        _ => return Err(Error::config("side", "from 16 to 1024", side)),
    };
    let record = Record { version: VERSION, task, side, seed };
    if folder.exists() {
        return check_record(&folder, &record).map(|()| folder);
    }
    fs::create_dir_all(root).map_err(Error::io(root))?;
    // The draft is in the same folder, because a rename is atomic only within one file system.
    let draft = tempfile::Builder::new().prefix(".draft-").tempdir_in(root);
    let draft = draft.map_err(Error::io(root))?;
    let contents = draft.path().join(task.name());
    write_contents(&contents, &record)?;
    match fs::rename(&contents, &folder) {
        Ok(()) => Ok(folder),
        // Another process was faster. Its folder is the same or is refused.
        Err(_) if folder.exists() => check_record(&folder, &record).map(|()| folder),
        Err(source) => Err(Error::io(&folder)(source)),
    }
}

fn check_record(folder: &Path, wanted: &Record) -> Result<()> {
    let path = folder.join(RECORD);
    let found = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Record>(&text).ok());
    if found.as_ref() == Some(wanted) {
        return Ok(());
    }
    let found = match found {
        Some(found) => format!("was written with {found:?} instead of {wanted:?}"),
        None => format!("has no readable {RECORD}, so this program did not write it"),
    };
    let reason = format!("the folder exists and {found}; remove it or choose another root");
    Err(Error::io(folder)(io::Error::new(io::ErrorKind::AlreadyExists, reason)))
}

fn write_contents(folder: &Path, record: &Record) -> Result<()> {
    let images = folder.join("images");
    fs::create_dir_all(&images).map_err(Error::io(&images))?;
    let labels = write_images(&images, record)?;
    let lines: Vec<String> = labels
        .iter()
        .enumerate()
        .map(|(i, label)| format!("images/{i:05}.png {label}\n"))
        .collect();
    let [train, val, _] = record.task.split_sizes();
    for split in VtabSplit::ALL {
        let range = match split {
            VtabSplit::Train800 => 0..train,
            VtabSplit::Val200 => train..train + val,
            VtabSplit::Train800Val200 => 0..train + val,
            VtabSplit::Test => train + val..lines.len(),
        };
        write_file(&folder.join(split.file_name()), lines[range].concat().as_bytes())?;
    }
    let text = serde_json::to_vec_pretty(record)
        .map_err(|e| Error::io(folder.join(RECORD))(io::Error::other(e)))?;
    write_file(&folder.join(RECORD), &text)
}

/// Writes the images as `00000.png`, `00001.png` and so on, and returns their labels.
fn write_images(folder: &Path, record: &Record) -> Result<Vec<i64>> {
    let path = |index: usize| folder.join(format!("{index:05}.png"));
    let side = record.side;
    if record.task == BundledTask::Digits {
        let resize = Resize::bicubic((i64::from(side), i64::from(side)))?;
        let digits = digits::all(record.seed)?;
        for (index, (image, _)) in digits.iter().enumerate() {
            write_png(&path(index), resize.apply(image.view())?.view())?;
        }
        return Ok(digits.into_iter().map(|(_, label)| label).collect());
    }
    let total: usize = record.task.split_sizes().iter().sum();
    let labels = scene::labels(record.task, total, record.seed);
    for (index, &label) in labels.iter().enumerate() {
        let image = scene::draw(record.task, label, index, side, record.seed)?;
        write_png(&path(index), image.view())?;
    }
    Ok(labels)
}

/// Writes an RGB u8 image `[H, W, 3]` as a PNG file.
fn write_png(path: &Path, pixels: ArrayView3<u8>) -> Result<()> {
    let (height, width, _) = pixels.dim();
    let pixels: Vec<u8> = pixels.iter().copied().collect();
    let mut bytes = io::Cursor::new(Vec::new());
    image::RgbImage::from_raw(width as u32, height as u32, pixels)
        .ok_or_else(|| io::Error::other("not an RGB image"))
        .and_then(|image| {
            image.write_to(&mut bytes, image::ImageFormat::Png).map_err(io::Error::other)
        })
        .map_err(Error::io(path))?;
    write_file(path, bytes.get_ref())
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::File::create(path).and_then(|mut file| file.write_all(bytes)).map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ImageDataset;
    use crate::data::vtab::VtabFolder;

    #[test]
    fn every_task_is_written_and_read_back() {
        let root = tempfile::tempdir().unwrap();
        for task in BundledTask::ALL {
            assert_eq!(task.to_string().parse::<BundledTask>().unwrap(), task);
            let path = write(root.path(), task, 32, 0).unwrap();
            assert_eq!(write(root.path(), task, 32, 0).unwrap(), path);
            let folder = VtabFolder::open(root.path(), task.name()).unwrap();
            assert_eq!(folder.num_classes(), task.num_classes());
            let [train, val, test] = task.split_sizes();
            let sizes = VtabSplit::ALL.map(|split| folder.split(split).entries().len());
            assert_eq!(sizes, [train, val, train + val, test]);
            let data = ImageDataset::load(folder.split(VtabSplit::Val200), (32, 32)).unwrap();
            let mut counts = vec![0; task.num_classes() as usize];
            data.labels().iter().for_each(|&label| counts[label as usize] += 1);
            assert!(counts.iter().all(|&n| n > 0), "{task}: {counts:?}");
        }
        let left = fs::read_dir(root.path()).unwrap().count();
        assert_eq!(left, BundledTask::ALL.len(), "no draft is left behind");
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes() {
        let roots = [0, 0, 1].map(|seed| {
            let root = tempfile::tempdir().unwrap();
            write(root.path(), BundledTask::Count, 16, seed).unwrap();
            root
        });
        let read = |root: &tempfile::TempDir, file| {
            fs::read(root.path().join("count").join(file)).unwrap()
        };
        for file in ["test.txt", "images/00000.png", "images/02999.png"] {
            assert_eq!(read(&roots[0], file), read(&roots[1], file));
            assert_ne!(read(&roots[0], file), read(&roots[2], file));
        }
    }

    #[test]
    fn a_folder_made_otherwise_is_refused() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), BundledTask::Location, 16, 0).unwrap();
        for (side, seed) in [(17, 0), (16, 1)] {
            let error = write(root.path(), BundledTask::Location, side, seed).unwrap_err();
            let Error::Io { source, .. } = &error else { panic!("{error}") };
            assert!(source.to_string().contains("the folder exists"), "{source}");
        }
        fs::create_dir(root.path().join("count")).unwrap();
        assert!(matches!(write(root.path(), BundledTask::Count, 16, 0), Err(Error::Io { .. })));
        for side in [15, 1025, -1] {
            let refused = write(root.path(), BundledTask::Digits, side, 0);
            assert!(matches!(refused, Err(Error::Config { .. })));
        }
    }
}
