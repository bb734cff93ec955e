//! Flags of the input and the output.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use convpass::data::{ImageDataset, Normalization};

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

/// The number of images in a batch.
#[derive(Args, Clone, Copy, Default)]
pub struct BatchFlag {
    /// Images in a batch [default: 64].
    #[arg(long, value_name = "N", help_heading = "Data")]
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
    /// Threads that compute, and as many that decode images [default: one for each core].
    #[arg(long, value_name = "N")]
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
