//! [`Precision`]: the dtypes of a frozen backbone's weights and of its computations.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use super::Backbone;
use crate::error::{Error, Result};
use crate::ffi::autocast::Autocast;
use crate::nn::DynamicInt8;

/// The dtype of a frozen backbone's weights and of the products with them. Trained weights, the
/// head and the logits are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Precision {
    /// Weights and activations in f32.
    #[default]
    F32,
    /// Weights and activations in bf16.
    Bf16,
    /// Weights and activations in f16. On a CPU the activations are in f32.
    F16,
    /// Weights of linear layers in int8, everything else in f32.
    Int8,
    /// Weights in f32, products in bf16 by libtorch's autocast.
    AutocastBf16,
    /// Weights of linear layers in int8, and their products in int8: each token is divided by its
    /// largest absolute value and rounded to 256 values. It is for evaluation on a CPU with
    /// AVX512-VNNI. The features of an image depend a little on the other images of its batch.
    Int8Dynamic,
}

impl Precision {
    /// All precisions.
    pub const ALL: [Self; 6] =
        [Self::F32, Self::Bf16, Self::F16, Self::Int8, Self::AutocastBf16, Self::Int8Dynamic];

    /// Returns the name in files and on the command line: `f32`, `bf16`, `f16`, `int8`,
    /// `autocast-bf16`, `int8-dynamic`.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
            Precision::Int8 => "int8",
            Precision::AutocastBf16 => "autocast-bf16",
            Precision::Int8Dynamic => "int8-dynamic",
        }
    }

    /// Converts the weights of the backbone to this precision. [`Precision::F32`] and
    /// [`Precision::AutocastBf16`] leave the weights unchanged.
    ///
    /// # Errors
    /// The errors of [`Backbone::to_kind`] and [`Backbone::to_int8`].
    pub fn convert<B: Backbone>(self, backbone: B) -> Result<B> {
        match self {
            Precision::F32 | Precision::AutocastBf16 => Ok(backbone),
            Precision::Bf16 => backbone.to_kind(Kind::BFloat16),
            Precision::F16 => backbone.to_kind(Kind::Half),
            Precision::Int8 | Precision::Int8Dynamic => backbone.to_int8(),
        }
    }

    /// Returns a guard. While it is alive, products of this thread are computed in this precision, so
    /// passes must run while it is alive. Only [`Precision::AutocastBf16`] and
    /// [`Precision::Int8Dynamic`] need it, and for the others it does nothing.
    ///
    /// # Errors
    /// The errors of [`Autocast::enter`]; [`Error::Config`] for [`Precision::Int8Dynamic`] if
    /// `device` is not a CPU with AVX512-VNNI.
    pub fn guard(self, device: Device) -> Result<PrecisionGuard> {
        let is = |precision| self == precision;
        let autocast = is(Precision::AutocastBf16)
            .then(|| Autocast::enter(device, Kind::BFloat16))
            .transpose()?;
        let int8 = is(Precision::Int8Dynamic).then(|| DynamicInt8::enter(device)).transpose()?;
        Ok(PrecisionGuard { _autocast: autocast, _int8: int8 })
    }

    /// Returns whether passes must run under [`Precision::guard`].
    pub(crate) fn needs_guard(self) -> bool {
        matches!(self, Precision::AutocastBf16 | Precision::Int8Dynamic)
    }

    /// Returns the precision of the weights of `backbone`, if their dtype has one.
    pub(crate) fn of_weights(backbone: &impl Backbone) -> Option<Self> {
        match backbone.kind() {
            _ if backbone.is_int8() => Some(Precision::Int8),
            Kind::Float => Some(Precision::F32),
            Kind::BFloat16 => Some(Precision::Bf16),
            Kind::Half => Some(Precision::F16),
            _ => None,
        }
    }
}

/// A guard of [`Precision::guard`].
#[derive(Debug)]
#[must_use = "the precision ends as the guard is dropped"]
pub struct PrecisionGuard {
    _autocast: Option<Autocast>,
    _int8: Option<DynamicInt8>,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|precision| precision.name() == name).ok_or_else(|| {
            let expected = "one of f32, bf16, f16, int8, autocast-bf16 and int8-dynamic";
            Error::config("precision", expected, name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_text_and_in_json() {
        for precision in Precision::ALL {
            assert_eq!(precision.to_string().parse::<Precision>().unwrap(), precision);
            assert_eq!(serde_json::to_string(&precision).unwrap(), format!("\"{precision}\""));
        }
        assert!(matches!("float32".parse::<Precision>(), Err(Error::Config { .. })));
    }
}
