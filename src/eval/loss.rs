//! Cross entropy.

use tch::{Reduction, Tensor};

use crate::error::Result;

/// Returns the mean cross entropy of logits `[B, K]` and labels `[B]`.
pub(crate) fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    cross_entropy_with(logits, labels, None, 0.0)
}

/// Returns the mean cross entropy of logits `[B, K]` and labels `[B]`, as PyTorch's `cross_entropy`
/// computes it: each image has the weight of its class, `[K]`, and the sum is divided by the sum of
/// these weights; `smoothing` is the part of the target that is spread over all classes.
pub(crate) fn cross_entropy_with(
    logits: &Tensor,
    labels: &Tensor,
    weights: Option<&Tensor>,
    smoothing: f64,
) -> Result<Tensor> {
    let ignored = -100;
    Ok(logits.f_cross_entropy_loss(labels, weights, Reduction::Mean, ignored, smoothing)?)
}

/// Returns the sum of the weighted cross entropies of which [`cross_entropy_with`] returns the mean.
#[cfg(feature = "train")]
pub(crate) fn cross_entropy_sum(
    logits: &Tensor,
    labels: &Tensor,
    weights: &Tensor,
    smoothing: f64,
) -> Result<Tensor> {
    let ignored = -100;
    Ok(logits.f_cross_entropy_loss(labels, Some(weights), Reduction::Sum, ignored, smoothing)?)
}
