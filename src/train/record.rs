//! What a run was and what came of it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::TrainConfig;
use super::fit::Fit;
use crate::backbone::Backbone;
use crate::data::{ImageDataset, Orientation, Resize};
use crate::error::{Error, Result};
use crate::files::{read_json, write_atomically};
use crate::model::{PetlConfig, PetlModel, TrainableParams};

/// A run's record: enough to say what a number means and to run it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Version of this crate.
    pub version: String,
    /// The task's name.
    pub task: String,
    /// Method, classes, drop path and seed of the initial values.
    pub model: PetlConfig,
    /// The hyper-parameters, normalization among them.
    pub train: TrainConfig,
    /// The backbone's file or name.
    pub backbone: String,
    /// The backbone's digest.
    pub backbone_digest: String,
    /// How the backbone was kept and computed with, where not in f32: `bf16`, `f16`, `int8`,
    /// `autocast-bf16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// (rows, columns) of the images.
    #[serde(default)]
    pub image_size: Option<(i64, i64)>,
    /// What the shorter side of a test image became before its centre was cut out; `None` where
    /// its aspect ratio was not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_shorter_side: Option<i64>,
    /// How many images of each class were drawn, by the run's seed, to train on; `None` where
    /// there was no draw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shots: Option<usize>,
    /// Hash of the training images' list.
    pub train_split: String,
    /// Hash of the validation images' list, where there were any.
    pub val_split: Option<String>,
    /// Hash of the test images' list, where they were reached.
    pub test_split: Option<String>,
    /// SHA-256 of the adapter file whose head the run started from, where it did.
    #[serde(default)]
    pub head_digest: Option<String>,
    /// Trained weights: of the method, of the head, and those of the backbone.
    pub trainable_params: TrainableParams,
    /// Epoch by epoch.
    pub fit: Fit,
    /// Top-1 in percent on the test images, with the weights that the run ended with.
    pub test_top1: Option<f64>,
    /// The best epoch on the test images, if the run looked at them on its way. No weights are of
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_on_test: Option<BestOnTest>,
    /// Seconds of the evaluation on the test images.
    pub test_seconds: Option<f64>,
    /// The highest resident memory of the process in MB, where the system tells.
    pub peak_rss_mb: Option<f64>,
    /// How the images were read, what their classes are called, and how many were skipped.
    #[serde(default, skip_serializing_if = "ImagesRecord::is_default")]
    pub images: ImagesRecord,
}

/// What a run's record says about its images beside their lists. The default is that of records of
/// versions that had no such field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesRecord {
    /// Whether images were turned as their EXIF orientation says.
    pub orientation: Orientation,
    /// The names of the classes in the order of the labels; empty if they have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub class_names: Vec<String>,
    /// The number of images that could not be read and were skipped.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped: usize,
}

impl Default for ImagesRecord {
    /// Images as they are stored, of classes without names.
    fn default() -> Self {
        Self { orientation: Orientation::Stored, class_names: Vec::new(), skipped: 0 }
    }
}

impl ImagesRecord {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// A figure that was chosen on the test images, as published ones often are: an upper bound, not to
/// be held against one that was not.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestOnTest {
    /// Top-1 in percent on the test images.
    pub top1: f64,
    /// The first epoch that had it, from 0.
    pub epoch: usize,
    /// Epochs from one look to the next.
    pub every: usize,
}

impl RunRecord {
    /// The record of a run that trained `model` on `images`: what the model and the images tell.
    /// Precision and the heads, shots and test images of a run are the caller's to add.
    ///
    /// # Errors
    /// What libtorch reports while the backbone's digest is computed.
    pub fn new<B: Backbone>(
        task: &str,
        backbone: impl Into<String>,
        model: &PetlModel<B>,
        train: &TrainConfig,
        images: &ImageDataset,
        fit: Fit,
    ) -> Result<Self> {
        Ok(RunRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            task: task.to_owned(),
            model: model.config().clone(),
            train: train.clone(),
            backbone: backbone.into(),
            backbone_digest: model.backbone().digest()?,
            precision: None,
            image_size: Some(images.image_size()),
            test_shorter_side: None,
            shots: None,
            train_split: images.split_hash().to_owned(),
            val_split: None,
            test_split: None,
            head_digest: None,
            trainable_params: model.trainable_params(),
            fit,
            test_top1: None,
            best_on_test: None,
            test_seconds: None,
            peak_rss_mb: peak_rss_mb(),
            images: ImagesRecord {
                orientation: images.orientation(),
                class_names: model.class_names().unwrap_or_default().to_vec(),
                skipped: 0,
            },
        })
    }

    /// How test images become `image_size` = (rows, columns) pixels. Where that is not the run's
    /// size, as much is cut off in proportion.
    ///
    /// # Errors
    /// As [`Resize::center_crop`].
    pub fn test_resize(&self, image_size: (i64, i64)) -> Result<Resize> {
        let longest = |(rows, columns): (i64, i64)| rows.max(columns).max(1) as f64;
        let grown = longest(image_size) / longest(self.image_size.unwrap_or(image_size));
        let resize = match self.test_shorter_side {
            Some(side) => Resize::center_crop((side as f64 * grown).round() as i64, image_size),
            None => Resize::bicubic(image_size),
        };
        Ok(resize?.with_orientation(self.images.orientation))
    }

    /// Writes the record as JSON; the file appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| Error::io(path)(e.into()))?;
        text.push(b'\n');
        write_atomically(path, &text)
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::CorruptFile`] if it is no record.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        read_json(path.as_ref())
    }
}

/// The highest resident memory of this process so far in MB (10^6 bytes), on Linux.
pub fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0 / 1e6)
}
