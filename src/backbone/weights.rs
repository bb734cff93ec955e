//! Weights as layers ask for them: by name and shape, in one order.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::nn::{Conv, Init, InitRng, LayerNorm, Linear, PatchEmbed, Weight, quantize};

/// Where weights come from: a name and the shape that the model needs under it.
pub type WeightSource<'a> = dyn FnMut(&str, &[i64]) -> Result<Tensor> + 'a;

/// Random weights: matrices and tables normal with deviation 0.02, biases zero, norms and layer
/// scales one.
pub(super) fn random(seed: i64, device: Device) -> impl FnMut(&str, &[i64]) -> Result<Tensor> {
    let mut rng = InitRng::from_seed(seed);
    move |name, shape| {
        let value = match name.rsplit('.').next() {
            Some("bias") => Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?,
            _ if shape.len() == 1 => Tensor::f_ones(shape, (Kind::Float, Device::Cpu))?,
            _ => rng.draw(Init::Normal { mean: 0.0, std: 0.02 }, shape)?,
        };
        Ok(value.f_to_device(device)?)
    }
}

/// Hands weights to the layers of a [`Network`](super::Network) and keeps them under their names.
///
/// Each function is an error where the source has no such weight, or one of another shape or with
/// other elements than f32, bf16, f16 or f64.
pub struct Weights<'a, 'b> {
    source: &'a mut WeightSource<'b>,
    /// Whether the weights of linear layers are rounded to int8 as they come.
    int8: bool,
    named: Vec<(String, Tensor)>,
    /// How many weights the layers have, the scales of int8 not counted.
    count: usize,
}

impl<'a, 'b> Weights<'a, 'b> {
    pub(super) fn new(source: &'a mut WeightSource<'b>, int8: bool) -> Self {
        Weights { source, int8, named: Vec::new(), count: 0 }
    }

    /// How many weights were asked for, the scales of int8 not counted.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Every weight that was asked for, in order.
    pub(super) fn into_named(self) -> Vec<(String, Tensor)> {
        self.named
    }
}

impl Weights<'_, '_> {
    /// A weight that is no part of a layer below: a token, a table, a factor.
    ///
    /// # Errors
    /// [`Error::Input`] if the weight does not fit, and what the source returns.
    pub fn get(&mut self, name: &str, shape: &[i64]) -> Result<Weight> {
        Ok(Weight(self.ask(name, shape, false)?))
    }

    /// [`Weights::get`] of a weight that only some configs have.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn get_if(&mut self, present: bool, name: &str, shape: &[i64]) -> Result<Option<Weight>> {
        present.then(|| self.get(name, shape)).transpose()
    }

    /// A linear layer of `NAME.weight [out, inner]` and, with `bias`, `NAME.bias [out]`. In a
    /// backbone in int8 the weight is int8, and `NAME.scale [out]` beside it.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn linear(&mut self, name: &str, out: i64, inner: i64, bias: bool) -> Result<Linear> {
        let weight_name = format!("{name}.weight");
        let mut weight = self.ask(&weight_name, &[out, inner], true)?;
        let mut scale = None;
        if self.int8 && weight.kind() != Kind::Int8 {
            let (quantized, row_scale) = quantize(&weight)?;
            self.named.pop();
            self.named.push((weight_name, quantized.shallow_clone()));
            self.named.push((format!("{name}.scale"), row_scale.shallow_clone()));
            (weight, scale) = (quantized, Some(row_scale));
        } else if weight.kind() == Kind::Int8 {
            let of_rows = self.ask(&format!("{name}.scale"), &[out], false)?;
            self.count -= of_rows.numel();
            scale = Some(of_rows);
        }
        let bias =
            if bias { Some(self.ask(&format!("{name}.bias"), &[out], false)?) } else { None };
        Ok(Linear { weight, bias, scale })
    }

    /// A convolution of `NAME.weight`, whose shape is `[out, in / groups, k, k]`, and
    /// `NAME.bias [out]`.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn conv(
        &mut self,
        name: &str,
        shape: &[i64; 4],
        stride: i64,
        padding: i64,
    ) -> Result<Conv> {
        let weight = self.ask(&format!("{name}.weight"), shape, false)?;
        let bias = self.ask(&format!("{name}.bias"), &shape[..1], false)?;
        Ok(Conv { weight, bias, stride, padding })
    }

    /// A layer norm of `NAME.weight [dim]` and `NAME.bias [dim]`.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn norm(&mut self, name: &str, dim: i64, eps: f64) -> Result<LayerNorm> {
        let weight = self.ask(&format!("{name}.weight"), &[dim], false)?;
        let bias = self.ask(&format!("{name}.bias"), &[dim], false)?;
        Ok(LayerNorm { weight, bias, eps })
    }

    /// A patch embedding of `NAME.weight [dim, 3, patch, patch]` and, with `bias`,
    /// `NAME.bias [dim]`.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn patch_embed(
        &mut self,
        name: &str,
        dim: i64,
        patch: i64,
        bias: bool,
    ) -> Result<PatchEmbed> {
        let weight = self.ask(&format!("{name}.weight"), &[dim, 3, patch, patch], false)?;
        let bias =
            if bias { Some(self.ask(&format!("{name}.bias"), &[dim], false)?) } else { None };
        Ok(PatchEmbed { weight, bias })
    }

    fn ask(&mut self, name: &str, shape: &[i64], may_be_int8: bool) -> Result<Tensor> {
        let weight = (self.source)(name, shape)?;
        let fits = weight.defined()
            && weight.size() == shape
            && (weight.is_floating_point() || may_be_int8 && weight.kind() == Kind::Int8);
        if !fits {
            let found = if weight.defined() {
                format!("{:?} {:?}", weight.size(), weight.kind())
            } else {
                "no tensor".to_owned()
            };
            let expected = format!("{name} {shape:?} in f32, bf16, f16 or f64");
            return Err(Error::Input { argument: "weights", expected, found });
        }
        self.count += weight.numel();
        self.named.push((name.to_owned(), weight.shallow_clone()));
        Ok(weight)
    }
}
