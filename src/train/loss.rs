//! The loss of a training batch.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::config::TrainConfig;
use crate::data::ImageDataset;
use crate::error::{Error, Result};
use crate::eval::{cross_entropy_sum, cross_entropy_with};

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
        if self.weights.is_some() && self.smoothing > 0.0 {
            // In libtorch's own mean of these a shape depends on the labels, for which the CPU would
            // wait for a GPU.
            return self.part(logits, labels, labels);
        }
        let weights = self.weights.as_ref().map(|weights| weights.f_to_kind(logits.kind()));
        cross_entropy_with(logits, labels, weights.transpose()?.as_ref(), self.smoothing)
    }

    /// Returns what the images of logits `[B, K]` and labels `[B]` add to the mean loss of a batch
    /// with the labels `batch`: the sum over the parts of the batch is its mean.
    pub(super) fn part(&self, logits: &Tensor, labels: &Tensor, batch: &Tensor) -> Result<Tensor> {
        let Some(weights) = &self.weights else {
            let share = labels.size1()? as f64 / batch.size1()? as f64;
            return Ok(self.mean(logits, labels)?.f_mul_scalar(share)?);
        };
        // All images of a part may have the weight 0, and no mean of their own.
        let all = weights.f_index_select(0, batch)?.f_sum(Kind::Float)?;
        let weights = weights.f_to_kind(logits.kind())?;
        let sum = cross_entropy_sum(logits, labels, &weights, self.smoothing)?;
        Ok(sum.f_div(&all.f_to_kind(sum.kind())?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Reduction;

    #[test]
    fn weights_and_smoothing_together_are_those_of_libtorch() {
        let logits = Tensor::linspace(-2.0, 3.0, 12, (Kind::Float, Device::Cpu)).view([4, 3]);
        let (labels, weights) =
            (Tensor::from_slice(&[0i64, 2, 1, 1]), Tensor::from_slice(&[0.5f32, 2.0, 1.5]));
        let loss = Loss { weights: Some(weights.shallow_clone()), smoothing: 0.1 };
        let found = loss.mean(&logits, &labels).unwrap();
        let expected =
            logits.cross_entropy_loss(&labels, Some(&weights), Reduction::Mean, -100, 0.1);
        assert!((found - expected).abs().double_value(&[]) < 1e-6);
    }

    #[test]
    fn the_parts_of_a_batch_add_up_to_its_mean_also_where_a_part_has_no_weight() {
        tch::manual_seed(3);
        let logits = Tensor::randn([6, 3], (Kind::Float, Device::Cpu));
        let labels = Tensor::from_slice(&[0i64, 2, 1, 1, 1, 0]);
        for (weights, smoothing) in
            [(None, 0.1), (Some([2f32, 0.0, 0.5]), 0.0), (Some([1.0, 0.5, 3.0]), 0.1)]
        {
            let weights = weights.map(|weights| Tensor::from_slice(&weights));
            let loss = Loss { weights, smoothing };
            let mean = loss.mean(&logits, &labels).unwrap().double_value(&[]);
            let part = |first, length| {
                let (logits, own) =
                    (logits.narrow(0, first, length), labels.narrow(0, first, length));
                loss.part(&logits, &own, &labels).unwrap().double_value(&[])
            };
            let sum = part(0, 2) + part(2, 3) + part(5, 1);
            assert!((sum - mean).abs() < 1e-6, "{sum}, {mean}");
        }
    }
}
