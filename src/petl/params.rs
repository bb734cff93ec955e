//! The weights of a method, as its constructor asks for them: by name, shape and initial value.

use std::collections::BTreeMap;
use std::fmt::Display;

use tch::{Device, Kind, Tensor, nn};

use super::low_bit::Coding;
use crate::error::{Error, Result};
use crate::nn::{Init, InitRng, Linear, variable};

/// A weight that a constructor asks for.
pub(crate) struct Param<'a> {
    name: &'a str,
    shape: &'a [i64],
    init: Init,
    /// Bits a weight, where it is quantized.
    bits: Option<i64>,
}

impl Param<'_> {
    fn coding(&self) -> Option<Coding> {
        let around_identity = self.init == Init::IdentityKernel;
        self.bits.map(|bits| Coding { bits, around_identity })
    }
}

/// Where the weights come from.
pub(crate) trait Source {
    fn get(&mut self, param: &Param) -> Result<Tensor>;
}

/// Asks a [`Source`] for weights below a path of names.
pub(crate) struct Params<'a> {
    source: &'a mut dyn Source,
    path: String,
    bits: Option<i64>,
}

impl<'a> Params<'a> {
    pub(super) fn new(source: &'a mut dyn Source) -> Self {
        Params { source, path: String::new(), bits: None }
    }

    /// The weights below `path`.
    pub(super) fn at(&mut self, path: impl Display) -> Params<'_> {
        let path = format!("{}{path}.", self.path);
        Params { source: self.source, path, bits: self.bits }
    }

    /// The same weights at `bits` each.
    pub(super) fn quantized(&mut self, bits: i64) -> Params<'_> {
        Params { source: self.source, path: self.path.clone(), bits: Some(bits) }
    }

    pub(super) fn get(&mut self, name: impl Display, shape: &[i64], init: Init) -> Result<Tensor> {
        let name = &format!("{}{name}", self.path);
        self.source.get(&Param { name, shape, init, bits: self.bits })
    }

    /// `{name}.weight [out, in]` and a bias `[out]` of zeros.
    pub(super) fn linear(
        &mut self,
        name: &str,
        [out, inner]: [i64; 2],
        init: Init,
    ) -> Result<Linear> {
        let weight = self.get(format_args!("{name}.weight"), &[out, inner], init)?;
        let bias = self.get(format_args!("{name}.bias"), &[out], Init::Constant(0.0))?;
        Ok(Linear::plain(weight, Some(bias)))
    }
}

/// New variables below `vs`.
pub(crate) struct NewVariables<'a, 'b> {
    pub(crate) vs: &'a nn::Path<'b>,
    pub(crate) rng: &'a mut InitRng,
    /// How each variable of few bits is coded.
    pub(crate) low_bit: BTreeMap<String, Coding>,
}

impl Source for NewVariables<'_, '_> {
    fn get(&mut self, param: &Param) -> Result<Tensor> {
        if let Some(coding) = param.coding() {
            self.low_bit.insert(param.name.to_owned(), coding);
        }
        variable(self.vs, param.name, &self.rng.draw(param.init, param.shape)?)
    }
}

/// The values of variables that exist, as one pass computes with them.
pub(crate) struct PassValues<'a> {
    pub(crate) variables: &'a BTreeMap<String, Tensor>,
    /// Whether a variable holds a value of its codebook already.
    pub(crate) is_coded: &'a dyn Fn(&str, &Tensor) -> Result<bool>,
    /// The kind that the pass computes in.
    pub(crate) kind: Kind,
}

impl Source for PassValues<'_> {
    fn get(&mut self, param: &Param) -> Result<Tensor> {
        let Some(variable) = self.variables.get(param.name) else {
            return Err(Error::Input {
                argument: "variables",
                expected: format!("one named {}", param.name),
                found: "none".to_owned(),
            });
        };
        let value = match param.coding() {
            Some(coding) if !(self.is_coded)(param.name, variable)? => {
                coding.straight_through(variable)?
            }
            // The result of an operation, as the other is: libtorch picks its kernels by that.
            _ => variable.f_mul_scalar(1.0)?,
        };
        Ok(value.f_to_kind(self.kind)?)
    }
}

/// Shapes alone: what a method would make, without making it.
pub(super) struct Sketch {
    /// Number of weights.
    pub(super) params: i64,
    /// Bytes that a file needs for them.
    pub(super) bytes: i64,
    /// No more bytes than this are asked for.
    pub(super) most: i64,
}

impl Source for Sketch {
    fn get(&mut self, param: &Param) -> Result<Tensor> {
        let count = param.shape.iter().fold(1, |count: i64, &side| count.saturating_mul(side));
        let bytes = match param.coding() {
            Some(coding) => coding.stored_bytes(count),
            None => count.saturating_mul(4),
        };
        self.params = self.params.saturating_add(count);
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.most {
            let expected = format!("of at most {} bytes of weights", self.most);
            return Err(Error::config("method", expected, format!("{} and more", self.bytes)));
        }
        // One zero in memory, whatever the shape.
        let zero = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?;
        Ok(zero.f_expand(param.shape, false)?)
    }
}
