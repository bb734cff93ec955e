//! AdaptFormer: a scaled bottleneck parallel to the MLP (Chen et al., arXiv 2205.13535).

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::bottleneck::{Bottleneck, BottleneckActivation, Options};
use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, json};
use super::{checks, widths};
use crate::error::Result;
use crate::nn::Init;
use crate::seam::{BackboneShape, Beside, Place, Seam, Site, SubLayer};

/// The input of AdaptFormer's branch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdaptFormerInput {
    /// The residual stream before the sub-layer, as in the published code, whose runs set
    /// `ffn_adapter_layernorm_option` to none.
    #[default]
    Raw,
    /// The layer norm of the residual stream, which the MLP reads too, as in the equations of the
    /// paper.
    Normed,
}

/// Config of AdaptFormer: `X + MLP(LN(X)) + s * (relu(X W_down) W_up)`.
///
/// The default follows the published code: raw input, s = 0.1, dropout 0.1. The first matrix starts
/// Kaiming uniform (a = sqrt(5), like LoRA's) and the second at zero. h is 8, as in the comparison
/// of the Convpass paper. One difference remains: drop path applies to this branch as to every
/// branch of this crate, but not to the branch of the published code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdaptFormerConfig {
    /// h, the bottleneck dim.
    pub bottleneck_dim: i64,
    /// s, the factor of the branch.
    pub scale: f64,
    /// Whether s is trained, with one value per channel that starts at `scale` (Adapter+).
    pub channel_scale: bool,
    /// Dropout rate before the second matrix, in training.
    pub dropout: f64,
    /// The input of the branch.
    pub input: AdaptFormerInput,
    /// h of each block in place of `bottleneck_dim`; 0 leaves the block without a branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Vec<i64>>,
}

impl Default for AdaptFormerConfig {
    fn default() -> Self {
        AdaptFormerConfig {
            bottleneck_dim: 8,
            scale: 0.1,
            channel_scale: false,
            dropout: 0.1,
            input: AdaptFormerInput::Raw,
            blocks: None,
        }
    }
}

impl AdaptFormerConfig {
    /// Checks that the branches can be created.
    ///
    /// # Errors
    /// Returns [`Error::Config`](crate::Error::Config) for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("AdaptFormerConfig"))
    }

    fn check(&self) -> Result<()> {
        widths::validate("bottleneck_dim", self.bottleneck_dim, &self.blocks)?;
        checks::scale(self.scale)?;
        checks::dropout(self.dropout)
    }
}

impl PetlMethod for AdaptFormerConfig {
    fn name(&self) -> &'static str {
        "adapt_former"
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
        Ok(Box::new(AdaptMlps::new(params, shape, self)?))
    }
}

/// The branches of a whole backbone.
#[derive(Debug)]
pub(super) struct AdaptMlps {
    blocks: Vec<Option<Bottleneck>>,
    input: AdaptFormerInput,
}

impl AdaptMlps {
    /// Creates the weights `blocks.N.adaptmlp.{down,up}_proj.{weight,bias}`, which are the
    /// published names, and `blocks.N.adaptmlp.scale` if `channel_scale` is set.
    pub(super) fn new(
        params: &mut Params,
        shape: &BackboneShape,
        config: &AdaptFormerConfig,
    ) -> Result<Self> {
        let options = Options {
            names: ("down_proj", "up_proj"),
            down_init: Init::KaimingUniform,
            activation: BottleneckActivation::Relu,
            dropout: config.dropout,
            scale: config.scale,
            channel_scale: config.channel_scale,
        };
        let dims = &shape.block_dims;
        let widths = widths::resolve(config.bottleneck_dim, &config.blocks, dims.len())?;
        let mut blocks = Vec::with_capacity(dims.len());
        for (index, (&c, h)) in dims.iter().zip(widths).enumerate() {
            let mut params = params.at(format_args!("blocks.{index}.adaptmlp"));
            let mut new = || Bottleneck::new(&mut params, (c, h), &options);
            blocks.push((h > 0).then(&mut new).transpose()?);
        }
        Ok(AdaptMlps { blocks, input: config.input })
    }

    fn at(&self, site: Site) -> Option<&Bottleneck> {
        let block = self.blocks.get(site.block).filter(|_| site.sub_layer == SubLayer::Mlp);
        block?.as_ref()
    }
}

impl Seam for AdaptMlps {
    fn is_beside(&self, site: Site) -> bool {
        self.at(site).is_some()
    }

    fn beside(&self, at: &Beside, residual: Tensor) -> Result<Tensor> {
        let input = match self.input {
            AdaptFormerInput::Raw => at.raw,
            AdaptFormerInput::Normed => at.normed,
        };
        match self.at(at.site) {
            Some(branch) => branch.add_into(&residual, input, at.branch, at.train),
            None => Ok(residual),
        }
    }
}
