//! [`Method`]: every method as data, and the one match that builds it.

use serde::{Deserialize, Serialize};
use tch::nn;

use super::bypasses::Bypasses;
use super::compose::Composed;
use super::params::{Params, Sketch};
use super::unfreeze::Unfrozen;
use super::{
    AdaptFormerConfig, AdapterConfig, ConvBypassConfig, ConvBypassVariant, FactConfig, LoraConfig,
    LowBitConfig, RepAdapterConfig, Source, SsfConfig, VptConfig, adapter, adaptformer, fact, lora,
    rep_adapter, ssf, vpt,
};
use crate::backbone::Backbone;
use crate::error::{Error, Result};
use crate::seam::{BackboneShape, NoMethod, Place, Seam};

/// Lists of methods are at most this deep within each other: a config that is much deeper could be
/// written to a file and not read again.
const MAX_NESTING: usize = 16;

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
    /// Another method at 1, 2, 4 or 8 bits a weight.
    LowBit(LowBitConfig),
    /// Several methods, called in order at each place: with Adapter, LoRA and VPT and a width for
    /// each block, a point of NOAH's search space.
    Compose {
        /// The methods; no two may name a variable alike. Lists are at most 16 deep within each
        /// other.
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
            Method::LowBit(_) => "low_bit",
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
            Method::LowBit(config) => config.validate(),
            Method::Compose { methods } if methods.is_empty() => {
                Err(Error::config("methods", "at least one", 0))
            }
            Method::Compose { methods } => {
                let nesting = self.nesting();
                if nesting > MAX_NESTING {
                    let expected = format!("at most {MAX_NESTING} lists within each other");
                    return Err(Error::config("methods", expected, nesting));
                }
                methods.iter().try_for_each(Method::validate)
            }
        }
    }

    /// How many lists of methods are within each other, itself counted.
    fn nesting(&self) -> usize {
        match self {
            Method::Compose { methods } => {
                1 + methods.iter().map(Method::nesting).max().unwrap_or_default()
            }
            Method::LowBit(config) => config.method.nesting(),
            _ => 0,
        }
    }

    /// Whether the untrained model has the frozen backbone's features, in evaluation.
    pub fn starts_as_identity(&self) -> bool {
        match self {
            Method::Vpt(_) => false,
            Method::Ssf(config) => config.init_std == 0.0,
            Method::LowBit(config) => config.method.starts_as_identity(),
            Method::Compose { methods } => methods.iter().all(Method::starts_as_identity),
            _ => true,
        }
    }

    /// What it acts on that not every backbone has.
    fn needs(&self) -> &'static [Place] {
        match self {
            Method::LinearProbe | Method::Full | Method::LowBit(_) | Method::Compose { .. } => &[],
            Method::Vpt(_) => &[Place::Blocks, Place::Prefix],
            _ => &[Place::Blocks],
        }
    }

    /// Refuses a backbone that lacks what the method acts on; what a method is made of checks for
    /// itself.
    fn check(&self, shape: &BackboneShape) -> Result<()> {
        let lack = shape.lacks.iter().find(|(place, _)| self.needs().contains(place));
        match lack {
            None => Ok(()),
            Some((_, reason)) => {
                let (method, backbone) = (self.name(), shape.family);
                Err(Error::Unsupported { method, backbone, reason })
            }
        }
    }

    /// Weights it trains beside a backbone.
    pub(crate) fn num_params(&self, shape: &BackboneShape) -> Result<i64> {
        self.check(shape)?;
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
            Method::LowBit(config) => config.method.num_params(shape)?,
            Method::Compose { methods } => {
                let each = methods.iter().map(|method| method.num_params(shape));
                each.collect::<Result<Vec<_>>>()?.into_iter().fold(0, i64::saturating_add)
            }
        })
    }

    /// Bytes that a file needs for those weights; `None` as soon as they are more than `most`,
    /// however long the rest of the method is.
    pub(crate) fn stored_bytes(&self, shape: &BackboneShape, most: i64) -> Result<Option<i64>> {
        let mut beside = Sketch { params: 0, bytes: 0, most };
        let built = self.build(&mut beside, shape);
        if beside.bytes > most {
            return Ok(None);
        }
        built?;
        // The backbone's own weights are kept in f32.
        let own = self.num_params(shape)?.saturating_sub(beside.params);
        Ok(Some(beside.bytes.saturating_add(own.saturating_mul(4))))
    }

    /// Builds the method for a backbone of this shape over the weights that `source` gives.
    pub(crate) fn build(
        &self,
        source: &mut dyn Source,
        shape: &BackboneShape,
    ) -> Result<Box<dyn Seam>> {
        self.build_over(&mut Params::new(source), shape)
    }

    fn build_over(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        self.check(shape)?;
        Ok(match self {
            Method::LinearProbe | Method::Full | Method::BitFit | Method::LayerNorm => {
                Box::new(NoMethod)
            }
            Method::ConvBypass(config) => {
                Box::new(Bypasses::new(params, shape, &config.clone().into())?)
            }
            Method::ConvBypassVariant(config) => Box::new(Bypasses::new(params, shape, config)?),
            Method::Adapter(config) => Box::new(adapter::Adapters::new(params, shape, config)?),
            Method::AdaptFormer(config) => {
                Box::new(adaptformer::AdaptMlps::new(params, shape, config)?)
            }
            Method::Lora(config) => Box::new(lora::Lora::new(params, shape, config)?),
            Method::Vpt(config) => Box::new(vpt::Prompts::new(params, shape, config)?),
            Method::Ssf(config) => Box::new(ssf::Ssf::new(params, shape, config)?),
            Method::RepAdapter(config) => {
                Box::new(rep_adapter::RepAdapters::new(params, shape, config)?)
            }
            Method::Fact(config) => Box::new(fact::Fact::new(params, shape, config)?),
            Method::LowBit(LowBitConfig { bits, method }) => {
                method.build_over(&mut params.quantized(*bits), shape)?
            }
            Method::Compose { methods } => {
                let built = methods.iter().map(|method| method.build_over(params, shape));
                let built = built.collect::<Result<Vec<_>>>()?;
                // A RepAdapter folds into the layer behind its place, and what another method
                // does in between would be lost.
                let alone = methods.len() == 1 || !methods.iter().any(Method::has_rep_adapter);
                let can_merge = alone && built.iter().all(|method| method.can_merge());
                Box::new(Composed { methods: built, can_merge })
            }
        })
    }

    /// The bypasses over the weights that `source` gives, if the method is bypasses and nothing
    /// else.
    #[cfg(feature = "report")]
    pub(crate) fn bypasses(
        &self,
        source: &mut dyn Source,
        shape: &BackboneShape,
    ) -> Result<Option<Bypasses>> {
        let config = match self {
            Method::ConvBypass(config) => config.clone().into(),
            Method::ConvBypassVariant(config) => config.clone(),
            _ => return Ok(None),
        };
        self.check(shape)?;
        Bypasses::new(&mut Params::new(source), shape, &config).map(Some)
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
            Method::LowBit(config) => config.method.has_rep_adapter(),
            Method::Compose { methods } => methods.iter().any(Method::has_rep_adapter),
            _ => false,
        }
    }

    /// Whether its weights may be of few bits: they are its own, and of full precision until then.
    pub(super) fn can_be_low_bit(&self) -> bool {
        match self {
            Method::Compose { methods } => methods.iter().all(Method::can_be_low_bit),
            Method::LowBit(_) => false,
            method => method.unfrozen().is_none(),
        }
    }
}
