//! Weights as layers ask for them: by name and shape, in one order.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::nn::{Conv, Init, InitRng, LayerNorm, Linear, quantize};

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

/// Asks a [`WeightSource`] for weights and keeps them under their names.
pub struct Weights<'a, 'b> {
    pub(super) source: &'a mut WeightSource<'b>,
    /// Whether the weights of linear layers are rounded to int8 as they come.
    pub(super) int8: bool,
    pub(super) named: Vec<(String, Tensor)>,
}

impl Weights<'_, '_> {
    pub(super) fn get(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let weight = (self.source)(name, shape)?;
        self.named.push((name.to_owned(), weight.shallow_clone()));
        Ok(weight)
    }

    pub(super) fn get_if(
        &mut self,
        present: bool,
        name: &str,
        shape: &[i64],
    ) -> Result<Option<Tensor>> {
        present.then(|| self.get(name, shape)).transpose()
    }

    pub(super) fn linear(
        &mut self,
        name: &str,
        out: i64,
        inner: i64,
        bias: bool,
    ) -> Result<Linear> {
        let weight_name = format!("{name}.weight");
        let mut weight = self.get(&weight_name, &[out, inner])?;
        let mut scale = None;
        if self.int8 && weight.kind() != Kind::Int8 {
            let (quantized, row_scale) = quantize(&weight)?;
            self.named.pop();
            self.named.push((weight_name, quantized.shallow_clone()));
            self.named.push((format!("{name}.scale"), row_scale.shallow_clone()));
            (weight, scale) = (quantized, Some(row_scale));
        } else if weight.kind() == Kind::Int8 {
            scale = Some(self.get(&format!("{name}.scale"), &[out])?);
        }
        let bias = self.get_if(bias, &format!("{name}.bias"), &[out])?;
        Ok(Linear { weight, bias, scale })
    }

    pub(super) fn conv(
        &mut self,
        name: &str,
        shape: &[i64; 4],
        stride: i64,
        padding: i64,
    ) -> Result<Conv> {
        let weight = self.get(&format!("{name}.weight"), shape)?;
        let bias = self.get(&format!("{name}.bias"), &shape[..1])?;
        Ok(Conv { weight, bias, stride, padding })
    }

    pub(super) fn norm(&mut self, name: &str, dim: i64, eps: f64) -> Result<LayerNorm> {
        let weight = self.get(&format!("{name}.weight"), &[dim])?;
        let bias = self.get(&format!("{name}.bias"), &[dim])?;
        Ok(LayerNorm { weight, bias, eps })
    }
}
