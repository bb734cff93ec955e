//! A backbone whose weights do what a method did beside it.

use std::collections::HashMap;

use tch::Tensor;

use super::frozen::Network;
use super::{Backbone, Frozen};
use crate::error::{Error, Result};
use crate::seam::{LayerWeights, Seam};

/// A copy of `backbone` with `method` folded in. Layers that the method leaves alone share their
/// weights with it; a layer without a bias gets one where the method adds a shift.
pub(super) fn merge<C: Network>(backbone: &Frozen<C>, method: &dyn Seam) -> Result<Frozen<C>> {
    if backbone.is_int8() {
        return Err(Error::config("kind", "f32, bf16, f16 or f64, to fold a method in", "int8"));
    }
    let mut config = backbone.config().clone();
    let own = backbone.named_weights().iter();
    let mut weights: HashMap<String, Tensor> =
        own.map(|(name, weight)| (name.clone(), weight.detach())).collect();
    let like = backbone.named_weights()[0].1.shallow_clone();
    for layer in config.shape().layers.into_iter().map(|shape| shape.layer) {
        let Some(name) = config.layer_name(layer) else { continue };
        let (weight_name, bias_name) = (format!("{name}.weight"), format!("{name}.bias"));
        let Some(weight) = weights.get(&weight_name).map(Tensor::shallow_clone) else { continue };
        let bias = weights.get(&bias_name).map(Tensor::shallow_clone);
        let merged = tch::no_grad(|| method.merge(layer, LayerWeights { weight, bias }))?;
        weights.insert(weight_name, merged.weight);
        if let Some(bias) = merged.bias {
            config.add_bias(layer);
            weights.insert(bias_name, bias);
        }
    }
    // Only a bias can be missing: one that another block's projection got.
    Frozen::from_source(&config, &mut |name, shape| match weights.remove(name) {
        Some(weight) => Ok(weight),
        None => Ok(Tensor::f_zeros(shape, (like.kind(), like.device()))?),
    })
}
