//! Convpass for a whole backbone, and its variants.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::conv_bypass::{ConvBypass, ConvBypassConfig, Placement, check_kernel};
use super::params::Params;
use super::pass_values::PassValues;
use super::petl_method::{ActsFrom, PetlMethod, json};
use super::widths;
use crate::backbone::Backbone;
use crate::error::Result;
use crate::nn::Branch;
use crate::seam::{BackboneShape, Beside, Place, Seam, Site, SubLayer, TokenLayout};

/// Config of Convpass with options beyond the paper's main method.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConvBypassVariant {
    /// The config of each bypass. A kernel of side 1 does not mix neighbours; this is the
    /// language-oriented bypass of the paper's ablation.
    pub base: ConvBypassConfig,
    /// Side of the kernel of the bypasses for the MLP, if it differs from `base.kernel_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mlp_kernel_size: Option<i64>,
    /// Whether s is trained, with one value per channel that starts at `base.scale` (Adapter+). One
    /// config then fits all tasks.
    pub channel_scale: bool,
    /// h of each block in place of `base.bottleneck_dim`; 0 leaves the block without bypasses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Vec<i64>>,
}

impl From<ConvBypassConfig> for ConvBypassVariant {
    fn from(base: ConvBypassConfig) -> Self {
        ConvBypassVariant { base, ..ConvBypassVariant::default() }
    }
}

impl ConvBypassVariant {
    /// Checks that the bypasses can be created.
    ///
    /// # Errors
    /// Returns [`Error::Config`](crate::Error::Config) for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("ConvBypassVariant"))
    }

    fn check(&self) -> Result<()> {
        self.base.validate()?;
        widths::validate("bottleneck_dim", self.base.bottleneck_dim, &self.blocks)?;
        check_kernel("mlp_kernel_size", self.mlp_kernel_size.unwrap_or(1))
    }

    /// Returns the config of the bypass for one sub-layer, with bottleneck dim `h`, or `None` if
    /// there is no bypass.
    fn at(&self, sub_layer: SubLayer, h: i64) -> Option<ConvBypassConfig> {
        let kernel_size = match sub_layer {
            SubLayer::Attention => self.base.kernel_size,
            SubLayer::Mlp => self.mlp_kernel_size.unwrap_or(self.base.kernel_size),
        };
        let present = h > 0 && self.base.sub_layers.contains(sub_layer);
        present.then(|| ConvBypassConfig { bottleneck_dim: h, kernel_size, ..self.base.clone() })
    }
}

impl PetlMethod for ConvBypassConfig {
    fn name(&self) -> &'static str {
        "conv_bypass"
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
        ActsFrom::Block(0)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(Bypasses::new(params, shape, &self.clone().into())?))
    }
}

impl PetlMethod for ConvBypassVariant {
    fn name(&self) -> &'static str {
        "conv_bypass_variant"
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
        widths::acts_from(self.base.bottleneck_dim, &self.blocks)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(Bypasses::new(params, shape, self)?))
    }
}

/// The bypasses of a whole backbone, as returned by
/// [`PetlModel::bypasses`](crate::PetlModel::bypasses).
#[derive(Debug)]
pub struct Bypasses {
    blocks: Vec<BlockBypasses>,
    placement: Placement,
}

#[derive(Debug)]
struct BlockBypasses {
    attention: Option<ConvBypass>,
    mlp: Option<ConvBypass>,
}

impl Bypasses {
    /// Creates the weights `blocks.N.adapter_attn.*` and `blocks.N.adapter_mlp.*`, which are the
    /// published names.
    fn new(params: &mut Params, shape: &BackboneShape, config: &ConvBypassVariant) -> Result<Self> {
        let dims = &shape.block_dims;
        let widths = widths::resolve(config.base.bottleneck_dim, &config.blocks, dims.len())?;
        let mut blocks = Vec::with_capacity(dims.len());
        for (index, (&dim, h)) in dims.iter().zip(widths).enumerate() {
            let mut bypass = |sub_layer, name| -> Result<Option<ConvBypass>> {
                let Some(bypass) = config.at(sub_layer, h) else { return Ok(None) };
                let mut params = params.at(format_args!("blocks.{index}.{name}"));
                ConvBypass::build(&mut params, dim, &bypass, config.channel_scale).map(Some)
            };
            let attention = bypass(SubLayer::Attention, "adapter_attn")?;
            let mlp = bypass(SubLayer::Mlp, "adapter_mlp")?;
            blocks.push(BlockBypasses { attention, mlp });
        }
        Ok(Bypasses { blocks, placement: config.base.placement })
    }

    /// Creates bypasses over the current values of `variables`, in the dtype in which `backbone`
    /// computes.
    pub(crate) fn of_variables<B: Backbone>(
        variables: &BTreeMap<String, Tensor>,
        backbone: &B,
        config: &ConvBypassVariant,
    ) -> Result<Self> {
        let mut values = PassValues::new(backbone.compute_kind());
        let mut source = values.of(variables);
        let bypasses = Bypasses::new(&mut Params::new(&mut source), &backbone.shape(), config)?;
        drop(source);
        values.refresh(|_, _| Ok(false))?;
        Ok(bypasses)
    }

    /// Returns the bypass of the sub-layer at `site`, whether it is parallel or sequential.
    pub fn bypass(&self, site: Site) -> Option<&ConvBypass> {
        self.at(site, self.placement)
    }

    fn at(&self, site: Site, placement: Placement) -> Option<&ConvBypass> {
        let block = self.blocks.get(site.block).filter(|_| self.placement == placement)?;
        match site.sub_layer {
            SubLayer::Attention => block.attention.as_ref(),
            SubLayer::Mlp => block.mlp.as_ref(),
        }
    }
}

impl Seam for Bypasses {
    fn is_beside(&self, site: Site) -> bool {
        self.at(site, Placement::Parallel).is_some()
    }

    fn beside(&self, at: &Beside, residual: Tensor) -> Result<Tensor> {
        match self.at(at.site, Placement::Parallel) {
            Some(bypass) => bypass.add_into(&residual, at),
            None => Ok(residual),
        }
    }

    fn after_sub_layer(
        &self,
        site: Site,
        output: Tensor,
        layout: &TokenLayout,
        train: bool,
    ) -> Result<Tensor> {
        match self.at(site, Placement::Sequential) {
            Some(bypass) => {
                let (raw, normed, norm, branch) = (&output, &output, None, &Branch::All);
                let at = Beside { site, raw, normed, norm, layout, branch, train };
                bypass.add_into(&output, &at)
            }
            None => Ok(output),
        }
    }
}
