//! RepAdapter: a linear adapter before a sub-layer, which can be merged into the next layer (Luo et
//! al., arXiv 2302.08106).

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, json};
use super::up_projection::{Scale, add_product};
use super::{SubLayers, checks, widths};
use crate::error::{Error, Result};
use crate::nn::{Branch, Init, Linear, dropout};
use crate::seam::{BackboneShape, Layer, LayerWeights, Place, Seam, Site, SubLayer};

/// Config of RepAdapter: `Y + s * (Y A + a) B + b`. Y is the normed input of a sub-layer, B
/// consists of groups, and there is no activation. The adapters are placed before attention and
/// MLP, like `repblock` in the published code.
///
/// On Swin, the adapter acts after the tokens are cut into windows and before the projection of
/// queries, keys and values. It can therefore be merged into that projection even if a window is
/// padded.
///
/// A starts Xavier uniform; everything else starts at zero. The published code chooses s for each
/// task. The paper's count of 0.22 M weights for ViT-B does not include the biases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RepAdapterConfig {
    /// h, the bottleneck dim.
    pub bottleneck_dim: i64,
    /// Number of groups of the second matrix; it has to divide h and C.
    pub groups: i64,
    /// s, the factor of the branch.
    pub scale: f64,
    /// Dropout rate between the matrices, in training.
    pub dropout: f64,
    /// The sub-layers before which there is an adapter.
    pub sub_layers: SubLayers,
    /// h of each block in place of `bottleneck_dim`; 0 leaves the block without an adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Vec<i64>>,
}

impl Default for RepAdapterConfig {
    fn default() -> Self {
        RepAdapterConfig {
            bottleneck_dim: 8,
            groups: 2,
            scale: 1.0,
            dropout: 0.1,
            sub_layers: SubLayers::Both,
            blocks: None,
        }
    }
}

impl RepAdapterConfig {
    /// Checks that the adapters can be created.
    ///
    /// # Errors
    /// Returns [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("RepAdapterConfig"))
    }

    fn check(&self) -> Result<()> {
        widths::validate("bottleneck_dim", self.bottleneck_dim, &self.blocks)?;
        if self.groups < 1 {
            return Err(Error::config("groups", "positive", self.groups));
        }
        let widths = self.blocks.clone().unwrap_or_else(|| vec![self.bottleneck_dim]);
        if let Some(h) = widths.into_iter().find(|h| h % self.groups != 0) {
            return Err(Error::config("groups", format!("a divisor of h = {h}"), self.groups));
        }
        checks::scale(self.scale)?;
        checks::dropout(self.dropout)
    }

    fn widths(&self, shape: &BackboneShape) -> Result<Vec<i64>> {
        let dims = &shape.block_dims;
        if let Some(c) = dims.iter().find(|&c| c % self.groups != 0) {
            return Err(Error::config("groups", format!("a divisor of C = {c}"), self.groups));
        }
        widths::resolve(self.bottleneck_dim, &self.blocks, dims.len())
    }
}

impl PetlMethod for RepAdapterConfig {
    fn name(&self) -> &'static str {
        "rep_adapter"
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
        true
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        widths::acts_from(self.bottleneck_dim, &self.blocks)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(RepAdapters::new(params, shape, self)?))
    }
}

/// The adapters of a whole backbone, `[attention, MLP]` in each block.
#[derive(Debug)]
pub(super) struct RepAdapters(Vec<[Option<RepAdapter>; 2]>);

#[derive(Debug)]
struct RepAdapter {
    a: Linear,
    /// `[C, h / groups]`.
    b_weight: Tensor,
    b_bias: Tensor,
    groups: i64,
    scale: f64,
    dropout: f64,
}

impl RepAdapters {
    /// Creates the weights `blocks.N.adapter_{attn,mlp}.conv_{A,B}.{weight,bias}`, which are the
    /// published names.
    pub(super) fn new(
        params: &mut Params,
        shape: &BackboneShape,
        config: &RepAdapterConfig,
    ) -> Result<Self> {
        let mut adapter = |block: usize, name: &str, c: i64, h: i64| {
            let mut params = params.at(format_args!("blocks.{block}.{name}"));
            let zero = Init::Constant(0.0);
            Ok::<_, Error>(RepAdapter {
                a: params.linear("conv_A", [h, c], Init::XavierUniform)?,
                b_weight: params.get("conv_B.weight", &[c, h / config.groups], zero)?,
                b_bias: params.get("conv_B.bias", &[c], zero)?,
                groups: config.groups,
                scale: config.scale,
                dropout: config.dropout,
            })
        };
        let mut blocks = Vec::with_capacity(shape.block_dims.len());
        for (block, (&c, h)) in shape.block_dims.iter().zip(config.widths(shape)?).enumerate() {
            let has = |sub_layer| h > 0 && config.sub_layers.contains(sub_layer);
            let attention = has(SubLayer::Attention)
                .then(|| adapter(block, "adapter_attn", c, h))
                .transpose()?;
            let mlp =
                has(SubLayer::Mlp).then(|| adapter(block, "adapter_mlp", c, h)).transpose()?;
            blocks.push([attention, mlp]);
        }
        Ok(RepAdapters(blocks))
    }
}

impl RepAdapter {
    /// `[B, T, C] -> [B, T, C]`.
    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let hidden = self.a.forward(x)?;
        let drop = train && self.dropout > 0.0;
        let hidden = if drop { dropout(&hidden, self.dropout)? } else { hidden };
        let dense = match self.groups {
            1 => self.b_weight.shallow_clone(),
            // The outputs of each group read only their own part of the bottleneck, which is a
            // block-diagonal matrix.
            groups => Tensor::f_block_diag(&self.b_weight.f_chunk(groups, 0)?)?,
        };
        add_product(x, &hidden, &dense, &self.b_bias, &Scale::Fixed(self.scale), &Branch::All)
    }

    /// Converts the weights of a linear layer that reads the output of this adapter into weights of
    /// a layer that reads the input of the adapter.
    fn merge(&self, weights: LayerWeights) -> Result<LayerWeights> {
        let LayerWeights { weight, bias } = weights;
        let (kind, c) = (weight.kind(), weight.size()[1]);
        let weight = weight.f_to_kind(Kind::Float)?;
        let identity = Tensor::f_eye(c, (Kind::Float, weight.device()))?;
        let offset =
            self.forward(&identity.f_zeros_like()?.f_narrow(0, 0, 1)?.f_unsqueeze(0)?, false)?;
        let offset = offset.f_reshape([c])?;
        // Row j is the output of the adapter for input j, which gives the transposed matrix.
        let matrix = self.forward(&identity.f_unsqueeze(0)?, false)?.f_squeeze_dim(0)?;
        let matrix = matrix.f_sub(&offset)?;
        let shift = weight.f_mv(&offset)?;
        let bias = match bias {
            Some(bias) => bias.f_add(&shift)?,
            None => shift,
        };
        let weight = weight.f_matmul(&matrix.f_transpose(0, 1)?)?;
        Ok(LayerWeights { weight: weight.f_to_kind(kind)?, bias: Some(bias.f_to_kind(kind)?) })
    }
}

impl Seam for RepAdapters {
    fn before_sub_layer(&self, site: Site, input: Tensor, train: bool) -> Result<Tensor> {
        let index = usize::from(site.sub_layer == SubLayer::Mlp);
        match self.0.get(site.block).and_then(|adapters| adapters[index].as_ref()) {
            Some(adapter) => adapter.forward(&input, train),
            None => Ok(input),
        }
    }

    fn can_merge(&self) -> bool {
        true
    }

    fn merge(&self, layer: Layer, weights: LayerWeights) -> Result<LayerWeights> {
        let (block, index) = match layer {
            Layer::Qkv(block) => (block, 0),
            Layer::Fc1(block) => (block, 1),
            _ => return Ok(weights),
        };
        match self.0.get(block).and_then(|adapters| adapters[index].as_ref()) {
            Some(adapter) => adapter.merge(weights),
            None => Ok(weights),
        }
    }
}
