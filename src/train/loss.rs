//! The loss of a training batch.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::config::TrainConfig;
use crate::data::ImageDataset;
use crate::error::{Error, Result};
use crate::eval::cross_entropy_with;

/// The weight of each class in the loss.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ClassWeights {
    /// Every image has the same weight.
    #[default]
    Equal,
    /// Every class has the same weight in sum: an image of a class with n of N training images has
    /// the weight N / (K n), where K is the number of classes with images.
    Balanced,
    /// A weight for each class, in the order of the labels: finite and not negative, and at least
    /// one of them positive.
    Given(Vec<f64>),
}

impl ClassWeights {
    pub(super) fn is_equal(&self) -> bool {
        *self == ClassWeights::Equal
    }

    /// Checks given weights for `classes` classes.
    pub(super) fn check(&self, classes: i64) -> Result<()> {
        let ClassWeights::Given(weights) = self else { return Ok(()) };
        let refuse = |found: String| {
            let expected = format!("{classes} numbers, finite and not negative, not all zero");
            Err(Error::config("class_weights", expected, found))
        };
        if weights.len() as i64 != classes {
            return refuse(format!("{} numbers", weights.len()));
        }
        match weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
            Some(wrong) => refuse(wrong.to_string()),
            None if weights.iter().all(|&weight| weight == 0.0) => refuse("zeros".to_owned()),
            None => Ok(()),
        }
    }

    /// Returns the weights `[classes]`, or `None` if all are equal.
    fn of(&self, set: &ImageDataset, classes: i64) -> Option<Vec<f64>> {
        match self {
            ClassWeights::Equal => None,
            ClassWeights::Given(weights) => Some(weights.clone()),
            ClassWeights::Balanced => {
                let mut counts = vec![0usize; usize::try_from(classes).unwrap_or_default()];
                for &label in set.labels() {
                    counts[label as usize] += 1;
                }
                let present = counts.iter().filter(|&&count| count > 0).count();
                let weight = |&count: &usize| match count {
                    0 => 0.0,
                    count => set.len() as f64 / (present * count) as f64,
                };
                Some(counts.iter().map(weight).collect())
            }
        }
    }
}

/// The loss of a run: cross entropy with the class weights and the label smoothing of its config.
#[derive(Debug)]
pub(super) struct Loss {
    /// `[K]`.
    weights: Option<Tensor>,
    smoothing: f64,
}

impl Loss {
    /// Creates the loss for training on `set`, for a model with `classes` classes on `device`.
    pub(super) fn new(
        config: &TrainConfig,
        set: &ImageDataset,
        classes: i64,
        device: Device,
    ) -> Result<Self> {
        let weights = config.class_weights.of(set, classes).map(|weights| -> Result<Tensor> {
            let weights = Tensor::f_from_slice(&weights)?.f_to_kind(Kind::Float)?;
            Ok(weights.f_to_device(device)?)
        });
        Ok(Loss { weights: weights.transpose()?, smoothing: config.label_smoothing })
    }

    /// Returns the mean loss of logits `[B, K]` and labels `[B]`.
    pub(super) fn mean(&self, logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let weights = self.weights.as_ref().map(|weights| weights.f_to_kind(logits.kind()));
        cross_entropy_with(logits, labels, weights.transpose()?.as_ref(), self.smoothing)
    }

    /// Returns the share of the mean loss of images with the labels `part` in that of a batch with
    /// the labels `batch`: the sum of the means times their shares is the mean of the batch.
    pub(super) fn share(&self, part: &Tensor, batch: &Tensor) -> Result<Tensor> {
        let sum = |labels: &Tensor| -> Result<Tensor> {
            match &self.weights {
                Some(weights) => Ok(weights.f_index_select(0, labels)?.f_sum(Kind::Float)?),
                None => Ok(labels.f_ones_like()?.f_sum(Kind::Float)?),
            }
        };
        Ok(sum(part)?.f_div(&sum(batch)?)?)
    }
}
