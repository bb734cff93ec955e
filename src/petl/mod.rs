//! Methods, one a file, and the one match that builds them.

mod conv_bypass;

use serde::{Deserialize, Serialize};
use tch::nn;

pub use conv_bypass::{ConvBypass, ConvBypassConfig, ConvInit, FixedLayout, Placement, SubLayers};

use crate::backbone::Backbone;
use crate::error::Result;
use crate::nn::InitRng;
use crate::seam::{NoMethod, Seam};

/// What is trained beside, or of, a backbone; the head always is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Method {
    /// Nothing but the head.
    LinearProbe,
    /// Every weight of a copy of the backbone.
    Full,
    /// Convolutional bypasses.
    ConvBypass(ConvBypassConfig),
}

impl Method {
    /// The method's name in configs, files and tables.
    pub fn name(&self) -> &'static str {
        match self {
            Method::LinearProbe => "linear_probe",
            Method::Full => "full",
            Method::ConvBypass(_) => "conv_bypass",
        }
    }

    /// Checks the method's own config.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) with the first field that is wrong.
    pub fn validate(&self) -> Result<()> {
        match self {
            Method::LinearProbe | Method::Full => Ok(()),
            Method::ConvBypass(config) => config.validate(),
        }
    }

    /// Weights it trains beside a backbone of these block widths and `backbone` weights.
    pub(crate) fn num_params(&self, block_dims: &[i64], backbone: i64) -> i64 {
        match self {
            Method::LinearProbe => 0,
            Method::Full => backbone,
            Method::ConvBypass(config) => {
                let modules = if config.sub_layers == SubLayers::Both { 2 } else { 1 };
                block_dims
                    .iter()
                    .map(|&dim| config.num_params(dim).saturating_mul(modules))
                    .fold(0, i64::saturating_add)
            }
        }
    }

    /// Creates the method's variables under `vs`, for a backbone of these block widths.
    pub(crate) fn build(
        &self,
        vs: &nn::Path,
        block_dims: &[i64],
        rng: &mut InitRng,
    ) -> Result<Box<dyn Seam>> {
        Ok(match self {
            Method::LinearProbe | Method::Full => Box::new(NoMethod),
            Method::ConvBypass(config) => {
                Box::new(conv_bypass::Bypasses::new(vs, block_dims, config, rng)?)
            }
        })
    }

    /// The backbone that the forward pass runs on, if the method trains the backbone itself: the
    /// trained weights are variables under `vs`, and `backbone` keeps its own.
    pub(crate) fn unfreeze<B: Backbone>(&self, vs: &nn::Path, backbone: &B) -> Result<Option<B>> {
        match self {
            Method::Full => {
                let train =
                    &mut |name: &str, weight: &tch::Tensor| crate::nn::variable(vs, name, weight);
                Ok(Some(backbone.map_weights(train)?))
            }
            Method::LinearProbe | Method::ConvBypass(_) => Ok(None),
        }
    }
}
