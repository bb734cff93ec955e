//! The weights of a method. The constructor of the method requests each by name, shape and initial
//! value.

use std::collections::BTreeMap;
use std::fmt::Display;

use tch::{Device, Kind, Tensor, nn};

use super::low_bit::Coding;
use crate::error::{Error, Result};
use crate::nn::{Init, InitRng, Linear, variable};

/// A weight that a constructor requests.
pub(crate) struct Param<'a> {
    pub(super) name: &'a str,
    pub(super) shape: &'a [i64],
    init: Init,
    /// Bits per weight, if the weight is quantized.
    bits: Option<i64>,
}

impl Param<'_> {
    pub(super) fn coding(&self) -> Option<Coding> {
        let around_identity = self.init == Init::IdentityKernel;
        self.bits.map(|bits| Coding { bits, around_identity })
    }
}

/// A source of weights.
pub(crate) trait ParamSource {
    fn get(&mut self, param: &Param) -> Result<Tensor>;
}

/// Declares the weights of a method below a path of names. [`PetlMethod::build`] receives one.
///
/// The same declaration counts the weights, creates them as variables, and reads them from an
/// adapter file, so the three always agree. Only this crate can create a `Params`.
///
/// ```
/// use convpass::petl::{Init, Params};
/// use tch::Tensor;
///
/// # #[allow(dead_code)]
/// fn declare(params: &mut Params, block: usize, c: i64) -> convpass::Result<(Tensor, Tensor)> {
///     let mut params = params.at(format_args!("blocks.{block}.gate"));
///     let weight = params.get("weight", &[c, c], Init::XavierUniform)?; // blocks.N.gate.weight
///     let bias = params.get("bias", &[c], Init::Constant(0.0))?; // blocks.N.gate.bias
///     Ok((weight, bias))
/// }
/// ```
///
/// [`PetlMethod::build`]: super::PetlMethod::build
pub struct Params<'a> {
    source: &'a mut dyn ParamSource,
    path: String,
    bits: Option<i64>,
}

impl<'a> Params<'a> {
    pub(super) fn new(source: &'a mut dyn ParamSource) -> Self {
        Params { source, path: String::new(), bits: None }
    }

    /// Returns a `Params` for the weights whose names begin with `path` and a dot, below the path
    /// of `self`.
    pub fn at(&mut self, path: impl Display) -> Params<'_> {
        let path = format!("{}{path}.", self.path);
        Params { source: self.source, path, bits: self.bits }
    }

    /// Returns a `Params` for the same weights, each stored at `bits` bits.
    pub(super) fn quantized(&mut self, bits: i64) -> Params<'_> {
        Params { source: self.source, path: self.path.clone(), bits: Some(bits) }
    }

    /// Declares the weight `name` of shape `shape` with the initial values `init`, and returns it.
    ///
    /// Keep the returned tensor in the [`Seam`](crate::Seam) without changes, and compute
    /// everything from it within the methods of the seam: its values change in place after each
    /// optimizer step. Its dtype is the one in which the backbone computes. Gradients reach the f32
    /// variable from which its values come.
    ///
    /// Dots separate the parts of a name. Initial values are drawn in the order of the calls from a
    /// generator that [`PetlConfig::seed`](crate::PetlConfig::seed) seeds.
    ///
    /// # Errors
    /// Returns [`Error::DuplicateVariable`] if the name is taken. Returns [`Error::Config`] for an
    /// invalid shape or a shape that does not fit `init`. Pass the error on to your caller.
    pub fn get(&mut self, name: impl Display, shape: &[i64], init: Init) -> Result<Tensor> {
        let name = &format!("{}{name}", self.path);
        if shape.iter().any(|&side| side < 0) {
            let expected = "a shape without negative sizes";
            return Err(Error::config(format!("shape of {name}"), expected, format!("{shape:?}")));
        }
        self.source.get(&Param { name, shape, init, bits: self.bits })
    }

    /// Declares `{name}.weight [out, in]`, and a bias `[out]` that starts at zero.
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

/// Creates new variables below `vs`.
pub(crate) struct NewVariables<'a, 'b> {
    pub(crate) vs: &'a nn::Path<'b>,
    pub(crate) rng: &'a mut InitRng,
    /// The coding of each variable that is stored at few bits.
    pub(crate) low_bit: BTreeMap<String, Coding>,
}

impl ParamSource for NewVariables<'_, '_> {
    fn get(&mut self, param: &Param) -> Result<Tensor> {
        if let Some(coding) = param.coding() {
            self.low_bit.insert(param.name.to_owned(), coding);
        }
        variable(self.vs, param.name, &self.rng.draw(param.init, param.shape)?)
    }
}

/// Counts weights from their shapes, without creating them.
pub(super) struct Sketch {
    /// Number of weights.
    pub(super) params: i64,
    /// Bytes that a file needs for the weights.
    pub(super) bytes: i64,
    /// The largest permitted number of bytes; a weight beyond it is an error.
    pub(super) most: i64,
}

impl ParamSource for Sketch {
    fn get(&mut self, param: &Param) -> Result<Tensor> {
        let count = param.shape.iter().fold(1, |count: i64, &side| count.saturating_mul(side));
        let bytes = match param.coding() {
            Some(coding) => coding.stored_bytes(count),
            None => count.saturating_mul(4),
        };
        self.params = self.params.saturating_add(count);
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.most {
            let expected = format!("a method with at most {} bytes of weights", self.most);
            return Err(Error::config("method", expected, format!("at least {}", self.bytes)));
        }
        // The tensor is one zero in memory, whatever its shape.
        let zero = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?;
        Ok(zero.f_expand(param.shape, false)?)
    }
}
