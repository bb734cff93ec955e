//! Loss and accuracy over the training batches of an epoch.

use serde::{Deserialize, Deserializer, Serialize};

/// The summed loss and the hits of training batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct BatchSum {
    pub(super) images: usize,
    pub(super) correct: usize,
    #[serde(deserialize_with = "number")]
    loss: f64,
}

impl BatchSum {
    /// Adds a step over `images` images with the mean loss `loss`, of which `correct` were right.
    pub(super) fn add(&mut self, images: usize, correct: usize, loss: f64) {
        self.loss += loss * images as f64;
        self.correct += correct;
        self.images += images;
    }

    /// Returns the top-1 accuracy in percent.
    pub(super) fn top1(&self) -> f64 {
        100.0 * self.correct as f64 / self.images.max(1) as f64
    }

    /// Returns the mean loss.
    pub(super) fn loss(&self) -> f64 {
        self.loss / self.images.max(1) as f64
    }
}

/// Deserializes a number and reads `null` as NaN. Records of earlier versions may have such a loss,
/// because JSON has no NaN.
pub(super) fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}
