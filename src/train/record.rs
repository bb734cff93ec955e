//! The record of a run: its settings and its results.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::TrainConfig;
use super::fit::Fit;
use crate::backbone::Backbone;
use crate::data::{ImageDataset, Orientation, Resize};
use crate::error::{Error, Result};
use crate::eval::Scores;
use crate::files::{read_json, write_atomically};
use crate::model::{PetlConfig, PetlModel, TrainableParams};
use crate::preprocessing::Preprocessing;

/// The record of a run: the settings that are needed to repeat it, and the results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Version of this crate.
    pub version: String,
    /// Name of the task.
    pub task: String,
    /// The method, the number of classes, the drop path rate and the seed of the initial values.
    pub model: PetlConfig,
    /// The hyper-parameters, including the normalization.
    pub train: TrainConfig,
    /// File or name of the backbone.
    pub backbone: String,
    /// Digest of the backbone ([`Backbone::digest`]).
    pub backbone_digest: String,
    /// Precision of the backbone: `bf16`, `f16`, `int8` or `autocast-bf16`; `None` for f32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// Height and width of the images in pixels.
    #[serde(default)]
    pub image_size: Option<(i64, i64)>,
    /// Length in pixels of the shorter side of a resized test image before the center crop; `None`
    /// if test images were squashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_shorter_side: Option<i64>,
    /// Number of training images of each class in a few-shot run; `None` for another run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shots: Option<usize>,
    /// Hash of the list of training images.
    pub train_split: String,
    /// Hash of the list of validation images, if there were any.
    pub val_split: Option<String>,
    /// Hash of the list of test images, if they were evaluated.
    pub test_split: Option<String>,
    /// SHA-256 of the adapter file whose head the run started from, if there was one.
    #[serde(default)]
    pub head_digest: Option<String>,
    /// SHA-256 of the adapter file that the run wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_digest: Option<String>,
    /// The cross-validation that chose the learning rates; `None` if they were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cross_validation: Option<CrossValidation>,
    /// Numbers of weights of the method, the head and the backbone.
    pub trainable_params: TrainableParams,
    /// The reports of the epochs.
    pub fit: Fit,
    /// Top-1 accuracy in percent on the test images with the final weights.
    pub test_top1: Option<f64>,
    /// All metrics on the test images with the final weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<Scores>,
    /// The best result on the test images during the run, if they were evaluated then. Its weights
    /// were not saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_on_test: Option<BestOnTest>,
    /// Seconds of the evaluation on the test images.
    pub test_seconds: Option<f64>,
    /// The highest resident memory of the process in MB, if the system reports it.
    pub peak_rss_mb: Option<f64>,
    /// How the images were read, what their classes are called, and how many were skipped.
    #[serde(default, skip_serializing_if = "ImagesRecord::is_default")]
    pub images: ImagesRecord,
}

/// A choice of learning rates by cross-validation over the training images: the rates that
/// classify most of the held-out images right, and of several such rates the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CrossValidation {
    /// Number of folds ([`FileList::folds`](crate::data::FileList::folds)).
    pub folds: usize,
    /// The rates in the order in which they were tried.
    pub tried: Vec<TriedRates>,
}

/// Learning rates that a cross-validation tried, and their result.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TriedRates {
    /// Peak learning rate of the method.
    pub lr: f64,
    /// Peak learning rate of the head.
    pub head_lr: f64,
    /// Number of images that were classified right when they were held out; `None` if numbers
    /// became NaN or infinite in the training without one of the folds.
    pub correct: Option<usize>,
    /// Number of images, each of which is held out once.
    pub images: usize,
}

impl CrossValidation {
    /// Returns the rates that are chosen; `None` if no rates have a result.
    pub fn best(&self) -> Option<&TriedRates> {
        let tried = self.tried.iter().filter(|tried| tried.correct.is_some());
        tried.reduce(|best, tried| if tried.correct > best.correct { tried } else { best })
    }
}

/// What a run's record says about its images beside their lists. The default is that of records of
/// versions that had no such field.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImagesRecord {
    /// Whether images were turned as their EXIF orientation says.
    pub orientation: Orientation,
    /// The names of the classes in the order of the labels; empty if they have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub class_names: Vec<String>,
    /// The preprocessing of training and test images; `None` if they were squashed with a bicubic
    /// filter, as in the published protocol, or cropped according to
    /// [`RunRecord::test_shorter_side`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preprocessing: Option<Preprocessing>,
    /// SHA-256 of the pixels of the training images
    /// ([`ImageDataset::pixel_hash`]), if they were in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_pixels: Option<String>,
    /// The number of images that could not be read and were skipped.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped: usize,
}

impl Default for ImagesRecord {
    /// Images as they are stored, of classes without names.
    fn default() -> Self {
        Self {
            orientation: Orientation::Stored,
            class_names: Vec::new(),
            preprocessing: None,
            train_pixels: None,
            skipped: 0,
        }
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

/// A result that was selected on the test images, as published ones often are. It is an upper
/// bound and cannot be compared with a result that was not selected on them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestOnTest {
    /// Top-1 accuracy in percent on the test images.
    pub top1: f64,
    /// The first epoch with this result, counted from 0.
    pub epoch: usize,
    /// Number of epochs between two evaluations.
    pub every: usize,
}

impl RunRecord {
    /// Creates the record of a run that trained `model` on `images`. The caller sets the fields
    /// that neither of them knows: precision, shots, head and the results on test images.
    ///
    /// # Errors
    /// The errors of [`Backbone::digest`].
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
            adapter_digest: None,
            cross_validation: None,
            trainable_params: model.trainable_params(),
            fit,
            test_top1: None,
            test: None,
            best_on_test: None,
            test_seconds: None,
            peak_rss_mb: peak_rss_mb(),
            images: ImagesRecord {
                orientation: images.orientation(),
                class_names: model.class_names().unwrap_or_default().to_vec(),
                preprocessing: None,
                train_pixels: images.pixel_hash().map(str::to_owned),
                skipped: 0,
            },
        })
    }

    /// Returns the resize of test images to `image_size` = (height, width). If it is not the size of
    /// the run, the crop is scaled in proportion.
    ///
    /// # Errors
    /// The errors of [`Resize::center_crop`].
    pub fn test_resize(&self, image_size: (i64, i64)) -> Result<Resize> {
        if let Some(preprocessing) = &self.images.preprocessing {
            return Resize::of(&preprocessing.clone().for_size(image_size));
        }
        let longest = |(rows, columns): (i64, i64)| rows.max(columns).max(1) as f64;
        let grown = longest(image_size) / longest(self.image_size.unwrap_or(image_size));
        let resize = match self.test_shorter_side {
            Some(side) => Resize::center_crop((side as f64 * grown).round() as i64, image_size),
            None => Resize::bicubic(image_size),
        };
        Ok(resize?.with_orientation(self.images.orientation))
    }

    /// Writes the record as JSON. The file is written atomically.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| Error::io(path)(e.into()))?;
        text.push(b'\n');
        write_atomically(path, &text)
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::CorruptFile`] if it is not a record.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        read_json(path.as_ref())
    }
}

/// Returns the highest resident memory of this process so far in MB (10^6 bytes). Only Linux
/// reports it.
pub fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_best_rates_is_chosen() {
        let tried = |correct: &[Option<usize>]| {
            let rates = correct.iter().enumerate().map(|(at, &correct)| TriedRates {
                lr: at as f64,
                head_lr: 1.0,
                correct,
                images: 9,
            });
            CrossValidation { folds: 3, tried: rates.collect() }
        };
        let best = |correct| tried(correct).best().map(|best| best.lr);
        assert_eq!(best(&[Some(4), None, Some(7), Some(7), Some(6)]), Some(2.0));
        assert_eq!(best(&[None, Some(0), Some(0)]), Some(1.0));
        assert_eq!(best(&[None, None]), None);
        assert_eq!(best(&[]), None);
    }
}
