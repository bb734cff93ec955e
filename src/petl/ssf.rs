//! SSF: a scale and a shift per channel after every layer (Lian et al., arXiv 2210.08823).

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, json};
use crate::error::{Error, Result};
use crate::nn::Init;
use crate::seam::{BackboneShape, Layer, LayerShape, LayerWeights, Place, Seam};

/// Config of SSF: `x * scale + shift` after the patch embedding, every linear layer and every norm,
/// as in the published code.
///
/// - Patches are scaled before the position embedding is added.
/// - CLIP's norm before the first block, which the published code does not have, is treated like
///   the other norms.
/// - In Swin's patch merging, SSF acts after the norm but not after the reduction.
///
/// Scales start normal around 1 and shifts start normal around 0. The untrained model is therefore
/// close to the frozen one, but not equal to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SsfConfig {
    /// Standard deviation of the initial values; 0.02 in the published code. With 0 the method
    /// starts as the identity.
    pub init_std: f64,
}

impl Default for SsfConfig {
    fn default() -> Self {
        SsfConfig { init_std: 0.02 }
    }
}

impl SsfConfig {
    /// Checks the field.
    ///
    /// # Errors
    /// Returns [`Error::Config`] if the standard deviation is negative or not finite.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("SsfConfig"))
    }

    fn check(&self) -> Result<()> {
        if self.init_std.is_finite() && self.init_std >= 0.0 {
            Ok(())
        } else {
            Err(Error::config("init_std", "finite and not negative", self.init_std))
        }
    }
}

impl PetlMethod for SsfConfig {
    fn name(&self) -> &'static str {
        "ssf"
    }

    fn config(&self) -> Value {
        json(self)
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn needs(&self) -> &[Place] {
        &[Place::Blocks]
    }

    fn starts_as_identity(&self) -> bool {
        self.init_std == 0.0
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        ActsFrom::Embedding
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(Ssf::new(params, shape, self)?))
    }

    fn folds_beside_others(&self) -> bool {
        true
    }
}

/// The scales and shifts of a whole backbone.
#[derive(Debug)]
pub(super) struct Ssf(HashMap<Layer, Factors>);

/// Scale and shift after one layer, each `[out]`.
#[derive(Debug)]
struct Factors {
    scale: Tensor,
    shift: Tensor,
}

impl Ssf {
    /// Creates the weights under the published names: `blocks.N.attn.ssf_scale_1` and so on.
    pub(super) fn new(
        params: &mut Params,
        shape: &BackboneShape,
        config: &SsfConfig,
    ) -> Result<Self> {
        let mut factors = HashMap::new();
        for layer in layers(shape) {
            let (place, number) = place(layer.layer);
            let mut factor = |kind: &str, mean| {
                let init = Init::Normal { mean, std: config.init_std };
                params.get(format_args!("{place}ssf_{kind}_{number}"), &[layer.outputs], init)
            };
            let (scale, shift) = (factor("scale", 1.0)?, factor("shift", 0.0)?);
            factors.insert(layer.layer, Factors { scale, shift });
        }
        Ok(Ssf(factors))
    }
}

/// Returns the layers with factors after them: all except the reduction of a patch merging.
fn layers(shape: &BackboneShape) -> impl Iterator<Item = &LayerShape> {
    shape.layers.iter().filter(|shape| !matches!(shape.layer, Layer::Merge(_)))
}

/// Returns the path below which the published code keeps the factors of a layer, and their number
/// there.
fn place(layer: Layer) -> (String, u8) {
    let block = |i: usize, part: &str| format!("blocks.{i}.{part}");
    match layer {
        Layer::PatchEmbed => ("patch_embed.".to_owned(), 1),
        Layer::PreNorm => ("norm_pre.".to_owned(), 1),
        Layer::MergeNorm(i) | Layer::Merge(i) => (format!("layers.{i}.downsample."), 1),
        Layer::Norm1(i) => (block(i, ""), 1),
        Layer::Norm2(i) => (block(i, ""), 2),
        Layer::Qkv(i) | Layer::Q(i) | Layer::Kv(i) => (block(i, "attn."), 1),
        Layer::Proj(i) => (block(i, "attn."), 2),
        Layer::Fc1(i) => (block(i, "mlp."), 1),
        Layer::Fc2(i) => (block(i, "mlp."), 2),
        Layer::FinalNorm => (String::new(), 1),
    }
}

impl Seam for Ssf {
    fn after_layer(&self, layer: Layer, _: &Tensor, output: Tensor, _: bool) -> Result<Tensor> {
        // A part of the fused projection uses its part of the factors.
        let (whole, part) = match layer {
            Layer::Q(block) => (Layer::Qkv(block), Some((0, 1))),
            Layer::Kv(block) => (Layer::Qkv(block), Some((1, 2))),
            _ => (layer, None),
        };
        let Some(Factors { scale, shift }) = self.0.get(&whole) else { return Ok(output) };
        let take = |factor: &Tensor| match part {
            Some((start, len)) => {
                let third = factor.size()[0] / 3;
                factor.f_narrow(0, start * third, len * third)
            }
            None => Ok(factor.shallow_clone()),
        };
        Ok(take(shift)?.f_addcmul(&output, &take(scale)?)?)
    }

    fn can_merge(&self) -> bool {
        true
    }

    fn merge(&self, layer: Layer, weights: LayerWeights) -> Result<LayerWeights> {
        let Some(Factors { scale, shift }) = self.0.get(&layer) else { return Ok(weights) };
        let LayerWeights { weight, bias } = weights;
        let kind = weight.kind();
        // One factor for each row, for any number of dimensions of the weight.
        let mut rows = vec![1; weight.dim()];
        rows[0] = -1;
        let bias = bias.map_or_else(|| shift.f_zeros_like(), Ok)?;
        let bias = shift.f_addcmul(&bias, scale)?;
        let weight = weight.f_mul(&scale.f_reshape(rows)?)?;
        Ok(LayerWeights { weight: weight.f_to_kind(kind)?, bias: Some(bias.f_to_kind(kind)?) })
    }
}
