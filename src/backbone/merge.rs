//! Folds a method into the weights of a backbone.

use std::collections::HashMap;

use tch::Tensor;

use super::network::Network;
use crate::error::{Error, Result};
use crate::seam::{LayerShape, LayerWeights, Seam};

/// Folds `method` into `named`, the weights of the layers in `layers`. If the method adds a shift
/// to a layer without a bias, the layer gets a bias, in `config` too. Layers that the method does
/// not change share their weights with `named`.
pub(super) fn merge<C: Network>(
    config: &mut C,
    layers: &[LayerShape],
    named: &[(String, Tensor)],
    method: &dyn Seam,
) -> Result<HashMap<String, Tensor>> {
    let mut weights: HashMap<String, Tensor> =
        named.iter().map(|(name, weight)| (name.clone(), weight.detach())).collect();
    for layer in layers.iter().map(|shape| shape.layer) {
        let unnamed = || {
            let expected = format!("one that names the weight of {layer:?}, to fold a method in");
            Error::config("backbone", expected, C::FAMILY)
        };
        let name = config.layer_name(layer).ok_or_else(unnamed)?;
        let (weight_name, bias_name) = (format!("{name}.weight"), format!("{name}.bias"));
        let weight = weights.get(&weight_name).ok_or_else(unnamed)?.shallow_clone();
        let bias = weights.get(&bias_name).map(Tensor::shallow_clone);
        let merged = tch::no_grad(|| method.merge(layer, LayerWeights { weight, bias }))?;
        weights.insert(weight_name, merged.weight);
        if let Some(bias) = merged.bias {
            config.add_bias(layer);
            weights.insert(bias_name, bias);
        }
    }
    Ok(weights)
}
