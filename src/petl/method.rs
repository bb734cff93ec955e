//! [`Method`]: every method as data; each variant answers for itself.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::nn;

use super::compose::nesting;
use super::linear_probe::LinearProbe;
use super::params::{ParamSource, Params, Sketch};
use super::petl_method::{PetlMethod, check_places};
use super::unfreeze::Unfrozen;
use super::{
    AdaptFormerConfig, AdapterConfig, ConvBypassConfig, ConvBypassVariant, CustomMethod,
    FactConfig, LoraConfig, LowBitConfig, MethodReader, RepAdapterConfig, SsfConfig, VptConfig,
};
use crate::backbone::Backbone;
use crate::error::Result;
use crate::seam::{BackboneShape, Seam};

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
    /// A method of another crate: [`Method::custom`].
    Custom(CustomMethod),
}

impl Method {
    /// A method of your own.
    pub fn custom(method: impl PetlMethod + 'static) -> Self {
        Method::Custom(CustomMethod::new(Arc::new(method)))
    }

    /// What answers every question about the method. Use it to build a built-in method from within
    /// one of your own, too.
    pub fn inner(&self) -> &dyn PetlMethod {
        match self {
            Method::LinearProbe => &LinearProbe,
            Method::Full => &Unfrozen::All,
            Method::BitFit => &Unfrozen::Biases,
            Method::LayerNorm => &Unfrozen::Norms,
            Method::ConvBypass(config) => config,
            Method::ConvBypassVariant(config) => config,
            Method::Adapter(config) => config,
            Method::AdaptFormer(config) => config,
            Method::Lora(config) => config,
            Method::Vpt(config) => config,
            Method::Ssf(config) => config,
            Method::RepAdapter(config) => config,
            Method::Fact(config) => config,
            Method::LowBit(config) => config,
            Method::Compose { methods } => methods,
            Method::Custom(custom) => custom,
        }
    }

    /// The method's name in configs, files and tables.
    pub fn name(&self) -> &str {
        match self {
            // Its code may be missing.
            Method::Custom(custom) => custom.name(),
            method => method.inner().name(),
        }
    }

    /// Checks the method's own config.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) with the first field that is wrong.
    pub fn validate(&self) -> Result<()> {
        self.inner().validate()
    }

    /// Whether the untrained model has the frozen backbone's features, in evaluation.
    pub fn starts_as_identity(&self) -> bool {
        self.inner().starts_as_identity()
    }

    /// How many lists of methods are within each other, itself counted.
    pub(super) fn nesting(&self) -> usize {
        match self {
            Method::Compose { methods } => nesting(methods),
            Method::LowBit(config) => config.method.nesting(),
            _ => 0,
        }
    }

    /// Weights it trains beside a backbone.
    pub(crate) fn num_params(&self, shape: &BackboneShape) -> Result<i64> {
        let mut beside = Sketch { params: 0, bytes: 0, most: i64::MAX };
        self.build(&mut beside, shape)?;
        Ok(beside.params.saturating_add(self.unfrozen_params(shape)))
    }

    /// Weights of the backbone itself that it trains.
    fn unfrozen_params(&self, shape: &BackboneShape) -> i64 {
        let own = self.inner().unfreezes().into_iter().map(|part| part.num_params(shape));
        own.fold(0, i64::saturating_add)
    }

    /// Bytes that a file needs for the weights that it trains; `None` as soon as they are more than
    /// `most`, however long the rest of the method is.
    pub(crate) fn stored_bytes(&self, shape: &BackboneShape, most: i64) -> Result<Option<i64>> {
        let mut beside = Sketch { params: 0, bytes: 0, most };
        let built = self.build(&mut beside, shape);
        if beside.bytes > most {
            return Ok(None);
        }
        built?;
        // The backbone's own weights are kept in f32.
        let own = self.unfrozen_params(shape).saturating_mul(4);
        Ok(Some(beside.bytes.saturating_add(own)))
    }

    /// Builds the method for a backbone of this shape over the weights that `source` gives.
    pub(crate) fn build(
        &self,
        source: &mut dyn ParamSource,
        shape: &BackboneShape,
    ) -> Result<Box<dyn Seam>> {
        self.build_over(&mut Params::new(source), shape)
    }

    pub(super) fn build_over(
        &self,
        params: &mut Params,
        shape: &BackboneShape,
    ) -> Result<Box<dyn Seam>> {
        check_places(self.inner(), shape)?;
        self.inner().build(params, shape)
    }

    /// The config of the bypasses, if the method is bypasses and nothing else.
    pub(crate) fn bypasses(&self) -> Option<ConvBypassVariant> {
        match self {
            Method::ConvBypass(config) => Some(config.clone().into()),
            Method::ConvBypassVariant(config) => Some(config.clone()),
            _ => None,
        }
    }

    /// The backbone that the forward pass runs on, if the method trains the backbone itself: the
    /// trained weights are variables under `vs`, and `backbone` keeps its own.
    pub(crate) fn unfreeze<B: Backbone>(&self, vs: &nn::Path, backbone: &B) -> Result<Option<B>> {
        self.inner().unfreezes().into_iter().try_fold(None, |unfrozen: Option<B>, part| {
            part.apply(vs, unfrozen.as_ref().unwrap_or(backbone)).map(Some)
        })
    }

    /// Makes every method of another crate in it that serde read. An error is the name of the one
    /// that could not be made, and why.
    pub(crate) fn read_custom(&mut self, reader: &MethodReader) -> Result<(), (String, String)> {
        match self {
            Method::Custom(custom) => {
                custom.read(reader).map_err(|reason| (custom.name().to_owned(), reason))
            }
            Method::LowBit(config) => config.method.read_custom(reader),
            Method::Compose { methods } => {
                methods.iter_mut().try_for_each(|method| method.read_custom(reader))
            }
            _ => Ok(()),
        }
    }
}
