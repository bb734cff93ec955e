//! Flags of what goes in and what comes out.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use convpass::data::Normalization;

use crate::targets::{Target, parse_target};

/// Where the tasks are.
#[derive(Args, Clone, Default)]
pub struct DataFlag {
    /// Folder that holds one folder for each task [default: data].
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    pub data: Option<PathBuf>,
}

impl DataFlag {
    /// The folder, `data` by default.
    pub fn folder(&self) -> &Path {
        self.data.as_deref().unwrap_or(Path::new("data"))
    }
}

/// How many images are computed at a time.
#[derive(Args, Clone, Copy, Default)]
pub struct BatchFlag {
    /// Images in a batch [default: 64].
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub batch_size: Option<NonZeroUsize>,
}

impl BatchFlag {
    /// The batch size, 64 by default.
    pub fn batch_size(&self) -> usize {
        self.or(64)
    }

    /// The batch size, or `default`.
    pub fn or(&self, default: usize) -> usize {
        self.batch_size.map_or(default, NonZeroUsize::get)
    }
}

/// How images become batches.
#[derive(Args, Clone, Default)]
pub struct InputFlags {
    #[command(flatten)]
    pub batches: BatchFlag,
    /// Mean and standard deviation that pixels are normalized with: imagenet, half, unit or clip
    /// [default: those of the backbone].
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    pub normalization: Option<Normalization>,
}

impl InputFlags {
    /// The batch size, 64 by default.
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

/// Other sets of the same classes.
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

/// Where results go.
#[derive(Args, Clone, Default)]
pub struct OutFlag {
    /// Folder that the results are written to.
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub out: Option<PathBuf>,
}

impl OutFlag {
    /// The folder, or `default`.
    pub fn folder(&self, default: impl FnOnce() -> PathBuf) -> PathBuf {
        self.out.clone().unwrap_or_else(default)
    }
}

/// How results are printed.
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

/// Threads of the computation.
#[derive(Args, Clone, Copy, Default)]
pub struct ThreadFlags {
    /// Threads that compute, and as many that decode images [default: one for each core].
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
}

impl ThreadFlags {
    /// Applies the flag to the computation of this process.
    pub fn apply(self) -> Result<()> {
        if let Some(threads) = self.threads {
            tch::set_num_threads(i32::try_from(threads.get()).context("--threads")?);
        }
        Ok(())
    }
}
