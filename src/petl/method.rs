//! [`Method`]: every method as data.

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

/// The method that trains a model, with its config. The head is always trained in addition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Method {
    /// Trains only the head.
    LinearProbe,
    /// Trains every weight of a copy of the backbone.
    Full,
    /// BitFit: trains every bias of a copy of the backbone.
    BitFit,
    /// Trains scale and shift of every layer norm in a copy of the backbone.
    LayerNorm,
    /// Convolutional bypasses.
    ConvBypass(ConvBypassConfig),
    /// Convolutional bypasses with options beyond the paper's main method.
    ConvBypassVariant(ConvBypassVariant),
    /// Adapters after the sub-layers.
    Adapter(AdapterConfig),
    /// AdaptFormer: bottlenecks parallel to the MLP.
    AdaptFormer(AdaptFormerConfig),
    /// LoRA: low-rank products parallel to linear layers.
    Lora(LoraConfig),
    /// VPT: prompt tokens.
    Vpt(VptConfig),
    /// SSF: scales and shifts after every layer.
    Ssf(SsfConfig),
    /// RepAdapter: linear adapters before the sub-layers.
    RepAdapter(RepAdapterConfig),
    /// FacT: one factored tensor for the updates of all linear layers.
    Fact(FactConfig),
    /// Another method, stored at 1, 2, 4 or 8 bits per weight.
    LowBit(LowBitConfig),
    /// Several methods, called in order at each place. Adapter, LoRA and VPT with a width for each
    /// block are a point of NOAH's search space.
    Compose {
        /// The methods. No two of them may use the same variable name. At most 16 lists may be
        /// nested within each other.
        methods: Vec<Method>,
    },
    /// A method of another crate, created by [`Method::custom`].
    Custom(CustomMethod),
}

impl Method {
    /// Creates a method from an implementation of your own.
    pub fn custom(method: impl PetlMethod + 'static) -> Self {
        Method::Custom(CustomMethod::new(Arc::new(method)))
    }

    /// Returns the implementation of the method. A method of your own can use it to build a
    /// built-in method.
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

    /// Returns the name of the method in configs, files and tables.
    pub fn name(&self) -> &str {
        match self {
            // `inner` may not know the name: the code may be missing.
            Method::Custom(custom) => custom.name(),
            method => method.inner().name(),
        }
    }

    /// Checks the config of the method.
    ///
    /// # Errors
    /// Returns [`Error::Config`](crate::Error::Config) for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.inner().validate()
    }

    /// Returns whether the untrained model computes the features of the frozen backbone in
    /// evaluation.
    pub fn starts_as_identity(&self) -> bool {
        self.inner().starts_as_identity()
    }

    /// Returns how many lists of methods are nested within each other, including this one.
    pub(super) fn nesting(&self) -> usize {
        match self {
            Method::Compose { methods } => nesting(methods),
            Method::LowBit(config) => config.method.nesting(),
            _ => 0,
        }
    }

    /// Returns how many methods in this one have prompts. Two cannot be composed: each would take the
    /// other's prompts for its own when it replaces those of the block before.
    pub(super) fn prompts(&self) -> usize {
        match self {
            Method::Vpt(_) => 1,
            Method::Compose { methods } => methods.iter().map(Method::prompts).sum(),
            Method::LowBit(config) => config.method.prompts(),
            _ => 0,
        }
    }

    /// Returns the number of weights that the method trains, including weights of the backbone.
    pub(crate) fn num_params(&self, shape: &BackboneShape) -> Result<i64> {
        let mut beside = Sketch { params: 0, bytes: 0, most: i64::MAX };
        self.build(&mut beside, shape)?;
        Ok(beside.params.saturating_add(self.unfrozen_params(shape)))
    }

    /// Returns the number of weights of the backbone itself that the method trains.
    fn unfrozen_params(&self, shape: &BackboneShape) -> i64 {
        let own = self.inner().unfreezes().into_iter().map(|part| part.num_params(shape));
        own.fold(0, i64::saturating_add)
    }

    /// Returns the bytes that a file needs for the trained weights, or `None` if they exceed
    /// `most`. The count stops at the limit, however large the rest of the method is.
    pub(crate) fn stored_bytes(&self, shape: &BackboneShape, most: i64) -> Result<Option<i64>> {
        let mut beside = Sketch { params: 0, bytes: 0, most };
        let built = self.build(&mut beside, shape);
        if beside.bytes > most {
            return Ok(None);
        }
        built?;
        // The backbone's own weights are stored in f32.
        let own = self.unfrozen_params(shape).saturating_mul(4);
        Ok(Some(beside.bytes.saturating_add(own)))
    }

    /// Builds the method for a backbone of shape `shape` from the weights of `source`.
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

    /// Returns the config of the bypasses if the method consists only of bypasses.
    pub(crate) fn bypasses(&self) -> Option<ConvBypassVariant> {
        match self {
            Method::ConvBypass(config) => Some(config.clone().into()),
            Method::ConvBypassVariant(config) => Some(config.clone()),
            _ => None,
        }
    }

    /// Returns the backbone for the forward pass if the method trains weights of the backbone
    /// itself. Its trained weights are variables under `vs`; `backbone` does not change.
    pub(crate) fn unfreeze<B: Backbone>(&self, vs: &nn::Path, backbone: &B) -> Result<Option<B>> {
        self.inner().unfreezes().into_iter().try_fold(None, |unfrozen: Option<B>, part| {
            part.apply(vs, unfrozen.as_ref().unwrap_or(backbone)).map(Some)
        })
    }

    /// Creates every contained method of another crate that serde deserialized. The error holds the
    /// name of the method that could not be created, and the reason.
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
