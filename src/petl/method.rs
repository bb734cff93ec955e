//! [`Method`]: every method as data, and the one match that builds it.

use serde::{Deserialize, Serialize};
use tch::nn;

use super::bypasses::Bypasses;
use super::compose::Composed;
use super::unfreeze::Unfrozen;
use super::{
    AdaptFormerConfig, AdapterConfig, ConvBypassConfig, ConvBypassVariant, FactConfig, LoraConfig,
    RepAdapterConfig, SsfConfig, VptConfig, adapter, adaptformer, fact, lora, rep_adapter, ssf,
    vpt,
};
use crate::backbone::Backbone;
use crate::error::{Error, Result};
use crate::nn::InitRng;
use crate::seam::{BackboneShape, NoMethod, Seam};

/// What is trained beside, or of, a backbone; the head always is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Method {
    /// Nothing but the head.
    LinearProbe,
    /// Every weight of a copy of the backbone.
    Full,
    /// BitFit: every bias of a copy of the backbone.
    BitFit,
    /// Scale and shift of every layer norm of a copy of the backbone.
    LayerNorm,
    /// Convolutional bypasses.
    ConvBypass(ConvBypassConfig),
    /// Convolutional bypasses with choices beyond the paper's main method.
    ConvBypassVariant(ConvBypassVariant),
    /// Adapters after the sub-layers.
    Adapter(AdapterConfig),
    /// AdaptFormer: bottlenecks beside the MLP.
    AdaptFormer(AdaptFormerConfig),
    /// LoRA: low-rank products beside linear layers.
    Lora(LoraConfig),
    /// VPT: prompt tokens.
    Vpt(VptConfig),
    /// SSF: scales and shifts after every layer.
    Ssf(SsfConfig),
    /// RepAdapter: linear adapters in front of the sub-layers.
    RepAdapter(RepAdapterConfig),
    /// FacT: one factored tensor for the updates of all linear layers.
    Fact(FactConfig),
    /// Several methods, called in order at each place: with Adapter, LoRA and VPT and a width for
    /// each block, a point of NOAH's search space.
    Compose {
        /// The methods; no two may name a variable alike.
        methods: Vec<Method>,
    },
}

impl Method {
    /// The method's name in configs, files and tables.
    pub fn name(&self) -> &'static str {
        match self {
            Method::LinearProbe => "linear_probe",
            Method::Full => "full",
            Method::BitFit => "bit_fit",
            Method::LayerNorm => "layer_norm",
            Method::ConvBypass(_) => "conv_bypass",
            Method::ConvBypassVariant(_) => "conv_bypass_variant",
            Method::Adapter(_) => "adapter",
            Method::AdaptFormer(_) => "adapt_former",
            Method::Lora(_) => "lora",
            Method::Vpt(_) => "vpt",
            Method::Ssf(_) => "ssf",
            Method::RepAdapter(_) => "rep_adapter",
            Method::Fact(_) => "fact",
            Method::Compose { .. } => "compose",
        }
    }

    /// Checks the method's own config.
    ///
    /// # Errors
    /// [`Error::Config`] with the first field that is wrong.
    pub fn validate(&self) -> Result<()> {
        match self {
            Method::LinearProbe | Method::Full | Method::BitFit | Method::LayerNorm => Ok(()),
            Method::ConvBypass(config) => config.validate(),
            Method::ConvBypassVariant(config) => config.validate(),
            Method::Adapter(config) => config.validate(),
            Method::AdaptFormer(config) => config.validate(),
            Method::Lora(config) => config.validate(),
            Method::Vpt(config) => config.validate(),
            Method::Ssf(config) => config.validate(),
            Method::RepAdapter(config) => config.validate(),
            Method::Fact(config) => config.validate(),
            Method::Compose { methods } if methods.is_empty() => {
                Err(Error::config("methods", "at least one", 0))
            }
            Method::Compose { methods } => methods.iter().try_for_each(Method::validate),
        }
    }

    /// Whether the untrained model has the frozen backbone's features, in evaluation.
    pub fn starts_as_identity(&self) -> bool {
        match self {
            Method::Vpt(_) => false,
            Method::Ssf(config) => config.init_std == 0.0,
            Method::Compose { methods } => methods.iter().all(Method::starts_as_identity),
            _ => true,
        }
    }

    /// Weights it trains beside a backbone.
    pub(crate) fn num_params(&self, shape: &BackboneShape) -> Result<i64> {
        Ok(match self {
            Method::LinearProbe => 0,
            Method::Full | Method::BitFit | Method::LayerNorm => {
                self.unfrozen().map_or(0, |unfrozen| unfrozen.num_params(shape))
            }
            Method::ConvBypass(config) => {
                ConvBypassVariant::from(config.clone()).num_params(shape)?
            }
            Method::ConvBypassVariant(config) => config.num_params(shape)?,
            Method::Adapter(config) => config.num_params(shape)?,
            Method::AdaptFormer(config) => config.num_params(shape)?,
            Method::Lora(config) => config.num_params(shape)?,
            Method::Vpt(config) => config.num_params(shape)?,
            Method::Ssf(config) => config.num_params(shape),
            Method::RepAdapter(config) => config.num_params(shape)?,
            Method::Fact(config) => config.num_params(shape)?,
            Method::Compose { methods } => {
                let each = methods.iter().map(|method| method.num_params(shape));
                each.collect::<Result<Vec<_>>>()?.into_iter().fold(0, i64::saturating_add)
            }
        })
    }

    /// Creates the method's variables under `vs`, for a backbone of this shape.
    pub(crate) fn build(
        &self,
        vs: &nn::Path,
        shape: &BackboneShape,
        rng: &mut InitRng,
    ) -> Result<Box<dyn Seam>> {
        Ok(match self {
            Method::LinearProbe | Method::Full | Method::BitFit | Method::LayerNorm => {
                Box::new(NoMethod)
            }
            Method::ConvBypass(config) => {
                Box::new(Bypasses::new(vs, shape, &config.clone().into(), rng)?)
            }
            Method::ConvBypassVariant(config) => Box::new(Bypasses::new(vs, shape, config, rng)?),
            Method::Adapter(config) => Box::new(adapter::Adapters::new(vs, shape, config, rng)?),
            Method::AdaptFormer(config) => {
                Box::new(adaptformer::AdaptMlps::new(vs, shape, config, rng)?)
            }
            Method::Lora(config) => Box::new(lora::Lora::new(vs, shape, config, rng)?),
            Method::Vpt(config) => Box::new(vpt::Prompts::new(vs, shape, config, rng)?),
            Method::Ssf(config) => Box::new(ssf::Ssf::new(vs, shape, config, rng)?),
            Method::RepAdapter(config) => {
                Box::new(rep_adapter::RepAdapters::new(vs, shape, config, rng)?)
            }
            Method::Fact(config) => Box::new(fact::Fact::new(vs, shape, config, rng)?),
            Method::Compose { methods } => {
                let built = methods.iter().map(|method| method.build(vs, shape, rng));
                let built = built.collect::<Result<Vec<_>>>()?;
                // A RepAdapter folds into the layer behind its place, and what another method
                // does in between would be lost.
                let alone = methods.len() == 1 || !methods.iter().any(Method::has_rep_adapter);
                let can_merge = alone && built.iter().all(|method| method.can_merge());
                Box::new(Composed { methods: built, can_merge })
            }
        })
    }

    /// The backbone that the forward pass runs on, if the method trains the backbone itself: the
    /// trained weights are variables under `vs`, and `backbone` keeps its own.
    pub(crate) fn unfreeze<B: Backbone>(&self, vs: &nn::Path, backbone: &B) -> Result<Option<B>> {
        if let Method::Compose { methods } = self {
            return methods.iter().try_fold(None, |unfrozen: Option<B>, method| {
                let next = method.unfreeze(vs, unfrozen.as_ref().unwrap_or(backbone))?;
                Ok(next.or(unfrozen))
            });
        }
        self.unfrozen().map(|unfrozen| unfrozen.apply(vs, backbone)).transpose()
    }

    fn unfrozen(&self) -> Option<Unfrozen> {
        match self {
            Method::Full => Some(Unfrozen::All),
            Method::BitFit => Some(Unfrozen::Biases),
            Method::LayerNorm => Some(Unfrozen::Norms),
            _ => None,
        }
    }

    fn has_rep_adapter(&self) -> bool {
        match self {
            Method::RepAdapter(_) => true,
            Method::Compose { methods } => methods.iter().any(Method::has_rep_adapter),
            _ => false,
        }
    }
}
