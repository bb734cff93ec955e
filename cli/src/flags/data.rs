//! Flags of the input and the output.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use convpass::data::{ImageDataset, Normalization, Orientation, SplitFractions};

use crate::targets::{Target, parse_target};

/// The folder of the tasks.
#[derive(Args, Clone, Default)]
pub struct DataFlag {
    /// Folder that holds one folder for each task [default: data].
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    pub data: Option<PathBuf>,
}

impl DataFlag {
    /// Returns the folder, `data` by default.
    pub fn folder(&self) -> &Path {
        self.data.as_deref().unwrap_or(Path::new("data"))
    }
}

/// A person's own images in place of a task.
#[derive(Args, Clone, Default)]
pub struct ImagesFlags {
    /// Train on your own images instead of a task: a folder with one folder for each class, a
    /// folder that holds train and val or test in this layout, or a list (CSV, TSV, JSON, or lines
    /// `path label`).
    #[arg(
        long,
        value_name = "FOLDER|LIST",
        conflicts_with_all = ["data", "task"],
        help_heading = "Data"
    )]
    pub images: Option<PathBuf>,
    /// Folder that the paths in lists are relative to [default: the folder of each list].
    #[arg(long, value_name = "DIR", requires = "images", help_heading = "Data")]
    pub root: Option<PathBuf>,
    /// Fraction of the images of each class that is drawn for validation, if --images has no
    /// validation images [default: 0.1].
    #[arg(long, value_name = "X", requires = "images", help_heading = "Data")]
    pub val_fraction: Option<f64>,
    /// Fraction of the images of each class that is drawn for the test, if --images has no test
    /// images [default: 0.2].
    #[arg(long, value_name = "X", requires = "images", help_heading = "Data")]
    pub test_fraction: Option<f64>,
    /// Seed of the draw of validation and test images. It is not --seed, so that runs with
    /// different seeds have the same images [default: 0].
    #[arg(
        long,
        value_name = "N",
        requires = "images",
        allow_negative_numbers = true,
        help_heading = "Data"
    )]
    pub split_seed: Option<i64>,
}

impl ImagesFlags {
    /// Returns the fractions that are drawn.
    pub fn fractions(&self) -> SplitFractions {
        let SplitFractions { val, test } = SplitFractions::default();
        SplitFractions {
            val: self.val_fraction.unwrap_or(val),
            test: self.test_fraction.unwrap_or(test),
        }
    }
}

/// What is done with images that cannot be read.
#[derive(Args, Clone, Copy, Default)]
pub struct SurveyFlags {
    /// Go on without the images that cannot be read. Without this flag they end the run before it
    /// starts.
    #[arg(long, help_heading = "Data")]
    pub skip_unreadable: bool,
    /// Decode every image before the run starts. Without this flag only the headers are read.
    #[arg(long, help_heading = "Data")]
    pub verify_images: bool,
}

/// Whether photos are turned as their EXIF orientation says.
#[derive(Args, Clone, Copy, Default)]
pub struct OrientationFlag {
    /// Use photos as their pixels are stored, not turned as their EXIF orientation says.
    #[arg(long, help_heading = "Data")]
    pub ignore_exif: bool,
}

impl OrientationFlag {
    pub fn orientation(self) -> Orientation {
        if self.ignore_exif { Orientation::Stored } else { Orientation::Exif }
    }
}

/// The number of images in a batch.
#[derive(Args, Clone, Copy, Default)]
pub struct BatchFlag {
    /// Images in a batch, at most 65536 [default: 64].
    #[arg(long, value_name = "N", value_parser = at_most::<65_536>, help_heading = "Data")]
    pub batch_size: Option<NonZeroUsize>,
}

impl BatchFlag {
    /// Returns the batch size, 64 by default.
    pub fn batch_size(&self) -> usize {
        self.or(64)
    }

    /// Returns the batch size, or `default` without the flag.
    pub fn or(&self, default: usize) -> usize {
        self.batch_size.map_or(default, NonZeroUsize::get)
    }
}

/// The normalization of images.
#[derive(Args, Clone, Default)]
pub struct NormalizationFlag {
    /// Mean and standard deviation that pixels are normalized with: imagenet, half, unit or clip
    /// [default: those of the backbone].
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    pub normalization: Option<Normalization>,
}

/// The size and the normalization of batches.
#[derive(Args, Clone, Default)]
pub struct InputFlags {
    #[command(flatten)]
    pub batches: BatchFlag,
    #[command(flatten)]
    pub images: NormalizationFlag,
}

impl InputFlags {
    /// Returns the batch size, 64 by default.
    pub fn batch_size(&self) -> usize {
        self.batches.batch_size()
    }
}

/// The names of the classes.
#[derive(Args, Clone, Default)]
pub struct ClassFlag {
    /// Text file with the name of one class on each line, in the order of the labels.
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub classes: Option<PathBuf>,
}

/// Other sets of images that the model is measured on.
#[derive(Args, Clone, Default)]
pub struct TargetFlags {
    /// Measure on another set of images too: its name, its folder or list, and the file of its
    /// classes if it has only some of them. May be repeated.
    #[arg(
        long = "target",
        value_name = "NAME=IMAGES[:CLASSES]",
        value_parser = parse_target,
        help_heading = "Data"
    )]
    pub targets: Vec<Target>,
}

/// The folder of the results.
#[derive(Args, Clone, Default)]
pub struct OutFlag {
    /// Folder that the results are written to.
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub out: Option<PathBuf>,
}

impl OutFlag {
    /// Returns the folder, or `default` without the flag.
    pub fn folder(&self, default: impl FnOnce() -> PathBuf) -> PathBuf {
        self.out.clone().unwrap_or_else(default)
    }
}

/// Whether an earlier run is replaced.
#[derive(Args, Clone, Copy, Default)]
pub struct ForceFlag {
    /// Replace what an earlier run left in the folder of the results; without this flag a finished
    /// run is never overwritten.
    #[arg(long, help_heading = "Output")]
    pub force: bool,
}

/// The format of the printed results.
#[derive(Args, Clone, Copy)]
pub struct FormatFlag {
    /// Format of the printed results.
    #[arg(long, value_enum, default_value_t = OutputFormat::Text, help_heading = "Output")]
    pub format: OutputFormat,
}

/// A format of printed results.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum OutputFormat {
    /// Columns for a person.
    Text,
    /// JSON.
    Json,
    /// Comma-separated values with a header.
    Csv,
}

/// The number of threads.
#[derive(Args, Clone, Copy, Default)]
pub struct ThreadFlags {
    /// Threads that compute, and as many that decode images, at most 256 [default: one for each
    /// core].
    #[arg(long, value_name = "N", value_parser = at_most::<256>)]
    pub threads: Option<NonZeroUsize>,
}

impl ThreadFlags {
    /// Makes `images` decode on the number of threads of the flag, if it is given.
    pub fn decoding(&self, images: ImageDataset) -> ImageDataset {
        match self.threads {
            Some(threads) => images.with_threads(threads),
            None => images,
        }
    }

    /// Sets the number of libtorch's threads in this process, if the flag is given.
    pub fn apply(self) -> Result<()> {
        if let Some(threads) = self.threads {
            tch::set_num_threads(i32::try_from(threads.get()).context("--threads")?);
        }
        Ok(())
    }
}

/// Parses a number from 1 to `MAX`.
fn at_most<const MAX: usize>(text: &str) -> Result<NonZeroUsize, String> {
    let number = text.parse().map_err(|e| format!("{e}"))?;
    let fits = Some(number).filter(|number: &NonZeroUsize| number.get() <= MAX);
    fits.ok_or_else(|| format!("expected a number from 1 to {MAX}"))
}

/// Returns the name of a folder of images or of the folder that holds a list. If that name is
/// `train`, it is the name of the parent folder.
pub fn data_name(data: &Path) -> String {
    let name = || {
        let data = data.canonicalize().ok()?;
        let mut folder = if data.is_dir() { data.as_path() } else { data.parent()? };
        if folder.ends_with("train") {
            folder = folder.parent()?;
        }
        folder.file_name()?.to_str().map(str::to_owned)
    };
    name().unwrap_or_else(|| data.display().to_string())
}
