//! [`Weights`]: gives layers their weights by name and shape, in a fixed order.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::nn::{Conv, Init, InitRng, Linear, Norm, NormKind, PatchEmbed, Weight, quantize};

/// A function that returns the weight with a name and a shape.
pub type WeightSource<'a> = dyn FnMut(&str, &[i64]) -> Result<Tensor> + 'a;

/// Returns a source of random weights: matrices and tables are normal with standard deviation 0.02,
/// biases are zero, and norms and layer scales are one.
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

/// Gives the layers of a [`Network`](super::Network) their weights and records them with their
/// names.
///
/// Each function returns an error if the source does not have the weight, or if the weight has
/// another shape or a dtype other than f32, bf16, f16 or f64.
pub struct Weights<'a, 'b> {
    source: &'a mut WeightSource<'b>,
    /// Whether the weights of linear layers are converted to int8 when they are requested.
    int8: bool,
    named: Vec<(String, Tensor)>,
    /// Number of weights of the layers, without the scales of int8.
    count: usize,
}

impl<'a, 'b> Weights<'a, 'b> {
    pub(super) fn new(source: &'a mut WeightSource<'b>, int8: bool) -> Self {
        Weights { source, int8, named: Vec::new(), count: 0 }
    }

    /// Returns the number of requested weights, without the scales of int8.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Returns all requested weights in order.
    pub(super) fn into_named(self) -> Vec<(String, Tensor)> {
        self.named
    }
}

impl Weights<'_, '_> {
    /// Returns a weight that belongs to none of the layer types below, such as a token or a table.
    ///
    /// # Errors
    /// [`Error::Input`] if the weight does not fit; the errors of the source.
    pub fn get(&mut self, name: &str, shape: &[i64]) -> Result<Weight> {
        Ok(Weight(self.ask(name, shape, false)?))
    }

    /// Does the same as [`Weights::get`] if `present` is true, and returns `None` otherwise.
    ///
    /// # Errors
    /// The errors of [`Weights::get`].
    pub fn get_if(&mut self, present: bool, name: &str, shape: &[i64]) -> Result<Option<Weight>> {
        present.then(|| self.get(name, shape)).transpose()
    }

    /// Returns a linear layer with `NAME.weight [outputs, inputs]` and, if `bias` is true,
    /// `NAME.bias [outputs]`. In an int8 backbone the weight is int8 and comes with `NAME.scale
    /// [outputs]`.
    ///
    /// # Errors
    /// The errors of [`Weights::get`].
    pub fn linear(&mut self, name: &str, inputs: i64, outputs: i64, bias: bool) -> Result<Linear> {
        let weight_name = format!("{name}.weight");
        let mut weight = self.ask(&weight_name, &[outputs, inputs], true)?;
        let mut scale = None;
        if self.int8 && weight.kind() != Kind::Int8 {
            let (quantized, row_scale) = quantize(&weight)?;
            self.named.pop();
            self.named.push((weight_name, quantized.shallow_clone()));
            self.named.push((format!("{name}.scale"), row_scale.shallow_clone()));
            (weight, scale) = (quantized, Some(row_scale));
        } else if weight.kind() == Kind::Int8 {
            let of_rows = self.ask(&format!("{name}.scale"), &[outputs], false)?;
            self.count -= of_rows.numel();
            scale = Some(of_rows);
        }
        let bias =
            if bias { Some(self.ask(&format!("{name}.bias"), &[outputs], false)?) } else { None };
        Ok(Linear::new(weight, bias, scale))
    }

    /// Returns a convolution with `NAME.weight`, whose shape is `[out, in / groups, k, k]`, and
    /// `NAME.bias [out]`.
    ///
    /// # Errors
    /// The errors of [`Weights::get`].
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

    /// Returns a layer norm with `NAME.weight [dim]` and `NAME.bias [dim]`.
    ///
    /// # Errors
    /// The errors of [`Weights::get`].
    pub fn norm(&mut self, name: &str, dim: i64, eps: f64) -> Result<Norm> {
        self.norm_of(name, dim, NormKind::layer_norm(eps))
    }

    /// Returns an RMS norm with `NAME.weight [dim]`.
    ///
    /// # Errors
    /// The errors of [`Weights::get`].
    pub fn rms_norm(&mut self, name: &str, dim: i64, eps: f64) -> Result<Norm> {
        self.norm_of(name, dim, NormKind { eps, rms: true, bias: false })
    }

    /// Returns a norm of the kind `kind` with `NAME.weight [dim]` and, if the kind has a bias,
    /// `NAME.bias [dim]`.
    pub(super) fn norm_of(&mut self, name: &str, dim: i64, kind: NormKind) -> Result<Norm> {
        let NormKind { eps, rms, bias } = kind;
        let weight = self.ask(&format!("{name}.weight"), &[dim], false)?;
        let bias =
            if bias { Some(self.ask(&format!("{name}.bias"), &[dim], false)?) } else { None };
        Ok(Norm { weight, bias, eps, rms })
    }

    /// Returns a patch embedding with `NAME.weight [dim, 3, patch, patch]` and, if `bias` is true,
    /// `NAME.bias [dim]`.
    ///
    /// # Errors
    /// The errors of [`Weights::get`].
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
