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
    if let (Some(weights), true) = (weights, smoothing > 0.0) {
        // libtorch's own mean of these has a shape that depends on the labels, for which the CPU
        // would wait for a GPU.
        let all = weights.f_index_select(0, labels)?.f_sum(weights.kind())?;
        return Ok(cross_entropy_sum(logits, labels, weights, smoothing)?.f_div(&all)?);
    }
    let ignored = -100;
    Ok(logits.f_cross_entropy_loss(labels, weights, Reduction::Mean, ignored, smoothing)?)
}

/// Returns the sum of the weighted cross entropies of which [`cross_entropy_with`] returns the mean.
pub(crate) fn cross_entropy_sum(
    logits: &Tensor,
    labels: &Tensor,
    weights: &Tensor,
    smoothing: f64,
) -> Result<Tensor> {
    let ignored = -100;
    Ok(logits.f_cross_entropy_loss(labels, Some(weights), Reduction::Sum, ignored, smoothing)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn weights_and_smoothing_together_are_those_of_libtorch() {
        let logits = Tensor::linspace(-2.0, 3.0, 12, (Kind::Float, Device::Cpu)).view([4, 3]);
        let (labels, weights) =
            (Tensor::from_slice(&[0i64, 2, 1, 1]), Tensor::from_slice(&[0.5f32, 2.0, 1.5]));
        let found = cross_entropy_with(&logits, &labels, Some(&weights), 0.1).unwrap();
        let expected =
            logits.cross_entropy_loss(&labels, Some(&weights), Reduction::Mean, -100, 0.1);
        assert!((found - expected).abs().double_value(&[]) < 1e-6);
    }
}
