//! [`Frozen`]: what all backbones have in common, whatever their layers.

use tch::{Device, Kind, Tensor};

use super::hooks::{BlockPass, Hooks};
use super::merge::merge;
use super::network::{ImageSize, Network};
use super::weights::{WeightSource, Weights, random};
use super::{Backbone, Forward, Pass, Stream};
use crate::error::{Error, Result};
use crate::seam::{BackboneShape, NoMethod, Seam};

/// A pretrained backbone whose weights never change: what its config says, over named weights.
///
/// `Clone` shares the weights, so that many models hold one backbone in memory.
#[derive(Debug)]
pub struct Frozen<C: Network> {
    config: C,
    shape: BackboneShape,
    named: Vec<(String, Tensor)>,
    layers: C::Layers,
}

impl<C: Network> Frozen<C> {
    /// A backbone with random weights, for tests, benches and audits.
    ///
    /// Matrices and tables are normal with deviation 0.02, biases zero, norms and layer scales
    /// one.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is no model.
    pub fn random(config: &C, seed: i64, device: Device) -> Result<Self> {
        Self::from_source(config, &mut random(seed, device))
    }

    /// A backbone on the CPU whose weights are all zero and take no memory: each is one number seen
    /// at every place. It serves for counting what a method would train beside a backbone of any
    /// size.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is no model.
    pub fn blank(config: &C) -> Result<Self> {
        let zero = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?;
        Self::from_source(config, &mut |_, shape| Ok(zero.f_expand(shape, false)?))
    }

    /// A backbone over the weights that `source` gives for each name and shape, in the order in
    /// which [`Network::layers`] asks for them. Weights are on one device.
    ///
    /// It opens the files of a family that this crate has no reader for: write
    /// [`Backbone::named_weights`] with `Tensor::write_safetensors`, and hand the tensors of
    /// [`TensorFile`](crate::checkpoint::TensorFile) in here.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is no model; [`Error::Input`] for a weight that does not fit;
    /// what `source` returns.
    pub fn from_source(config: &C, source: &mut WeightSource) -> Result<Self> {
        Self::build(config, source, false)
    }

    fn build(config: &C, source: &mut WeightSource, int8: bool) -> Result<Self> {
        config.validate()?;
        let shape = config.shape()?;
        let mut weights = Weights::new(source, int8);
        let layers = config.layers(&mut weights)?;
        if weights.count() as i64 != shape.num_params {
            let expected = format!("{}, the weights that the layers ask for", weights.count());
            return Err(Error::config("num_params of the shape", expected, shape.num_params));
        }
        let named = weights.into_named();
        let device = |weight: &Tensor| weight.device();
        let first = named.first().map(|(_, weight)| device(weight));
        if let Some((name, other)) = named.iter().find(|(_, w)| Some(device(w)) != first) {
            let expected = format!("all weights on one device, {:?}", first.unwrap_or(Device::Cpu));
            let found = format!("{name} on {:?}", other.device());
            return Err(Error::Input { argument: "weights", expected, found });
        }
        Ok(Frozen { config: config.clone(), shape, named, layers })
    }

    /// The shape and the choices of this backbone.
    pub fn config(&self) -> &C {
        &self.config
    }

    /// Images `[B, 3, H, W]` to features `[B, C]`: pooled and normed, before any head.
    ///
    /// # Errors
    /// [`Error::Input`] if the images are not `[B, 3, H, W]` of a size that the config accepts, f32
    /// or of the weights' kind, and on their device.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        self.forward(images, &NoMethod, Pass::default())
    }

    /// Images `[B, 3, H, W]` to dense features `[B, C, rows, cols]`: the patch tokens after the
    /// last block and the final norm, without prefix tokens; the last map of a ConvNeXt.
    ///
    /// # Errors
    /// As [`Frozen::features`].
    pub fn patch_features(&self, images: &Tensor) -> Result<Tensor> {
        Backbone::patch_features(self, images)
    }

    /// What leaves each of the chosen blocks, which count from 0, for images `[B, 3, H, W]`: all
    /// tokens, before the final norm, in the order of `blocks`.
    ///
    /// # Errors
    /// [`Error::Config`] for a number that no block has; otherwise as [`Frozen::features`].
    pub fn intermediate(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Stream>> {
        Backbone::intermediate(self, images, blocks)
    }

    /// SHA-256 over every frozen byte and over the choices of the forward pass (heads, eps,
    /// activation, pooling, image size and the like), in hex: equal digests give equal features.
    ///
    /// # Panics
    /// Never in practice: only if libtorch cannot copy a weight to the CPU.
    pub fn digest(&self) -> String {
        Backbone::digest(self).expect("weights can be read")
    }

    pub(super) fn layers(&self) -> &C::Layers {
        &self.layers
    }
}

impl<C: Network> Backbone for Frozen<C> {
    fn num_blocks(&self) -> usize {
        self.config.num_blocks()
    }

    fn embed(&self, images: &Tensor, hooks: &Hooks) -> Result<Stream> {
        self.config.embed(&self.layers, images, hooks)
    }

    fn block(&self, stream: Stream, pass: &BlockPass) -> Result<Stream> {
        self.config.block(&self.layers, stream, pass)
    }

    fn pool(&self, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        self.config.pool(&self.layers, stream, hooks)
    }

    fn patch_map(&self, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        self.config.patch_map(&self.layers, stream, hooks)
    }

    fn feature_dim(&self) -> i64 {
        self.config.feature_dim()
    }

    fn image_size(&self) -> ImageSize {
        self.config.image_size()
    }

    fn shape(&self) -> BackboneShape {
        self.shape.clone()
    }

    fn named_weights(&self) -> &[(String, Tensor)] {
        &self.named
    }

    fn map_weights(
        &self,
        replace: &mut dyn FnMut(&str, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut named = self.named.iter();
        // In one order; the scale of a weight that is int8 no longer is passed over.
        Self::from_source(&self.config, &mut |name, _| match named.find(|(own, _)| own == name) {
            Some((_, weight)) => replace(name, weight),
            None => {
                let expected = format!("a weight that needs no {name} beside it");
                let found = "int8 in place of another kind".to_owned();
                Err(Error::Input { argument: "weights", expected, found })
            }
        })
    }

    fn to_int8(&self) -> Result<Self> {
        if self.is_int8() {
            return Ok(self.clone());
        }
        let mut named = self.named.iter();
        let source = &mut |name: &str, _: &[i64]| match named.find(|(own, _)| own == name) {
            Some((_, weight)) => Ok(weight.shallow_clone()),
            None => Err(Error::config("layers", "the same names each time", name)),
        };
        Self::build(&self.config, source, true)
    }

    fn is_read(&self, name: &str) -> bool {
        self.config.is_read(name)
    }

    fn merge(&self, method: &dyn Seam) -> Result<Self> {
        if self.is_int8() {
            let expected = "f32, bf16, f16 or f64, to fold a method in";
            return Err(Error::config("kind", expected, "int8"));
        }
        let mut config = self.config.clone();
        let weights = merge(&mut config, &self.shape.layers, &self.named, method)?;
        let like = (self.kind(), self.device());
        Self::from_source(&config, &mut |name, shape| match weights.get(name) {
            Some(weight) => Ok(weight.shallow_clone()),
            // One that another block's layer got.
            None if name.ends_with(".bias") => Ok(Tensor::f_zeros(shape, like)?),
            None => Err(Error::config("layers", "the same names each time", name)),
        })
    }

    fn choices(&self) -> String {
        self.config.choices()
    }
}

impl<C: Network> Clone for Frozen<C> {
    fn clone(&self) -> Self {
        let shared = |(name, weight): &(String, Tensor)| (name.clone(), weight.shallow_clone());
        Frozen {
            config: self.config.clone(),
            shape: self.shape.clone(),
            named: self.named.iter().map(shared).collect(),
            layers: self.layers.clone(),
        }
    }
}
