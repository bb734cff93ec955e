//! [`Frozen`]: a backbone made of a config and its weights.

use tch::{Device, Kind, Tensor};

use super::hooks::{BlockPass, Hooks};
use super::merge::merge;
use super::network::{ImageSize, Network};
use super::weights::{WeightSource, Weights, random};
use super::{Backbone, Forward, Pass, Stream};
use crate::error::{Error, Result};
use crate::seam::{BackboneShape, NoMethod, Seam};

/// A pretrained backbone whose weights never change: the layers of a config over named weights.
///
/// `Clone` shares the weights, so that many models can use one backbone in memory.
#[derive(Debug)]
pub struct Frozen<C: Network> {
    config: C,
    shape: BackboneShape,
    named: Vec<(String, Tensor)>,
    layers: C::Layers,
}

impl<C: Network> Frozen<C> {
    /// Creates a backbone with random weights for tests, benchmarks and audits.
    ///
    /// Matrices and tables are normal with standard deviation 0.02, biases are zero, and norms and
    /// layer scales are one.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is invalid.
    pub fn random(config: &C, seed: i64, device: Device) -> Result<Self> {
        Self::from_source(config, &mut random(seed, device))
    }

    /// Creates a backbone on the CPU whose weights are all zero and use no memory, because each is
    /// one expanded number. It serves to count what a method trains on a backbone of any size.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is invalid.
    pub fn blank(config: &C) -> Result<Self> {
        let zero = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?;
        Self::from_source(config, &mut |_, shape| Ok(zero.f_expand(shape, false)?))
    }

    /// Creates a backbone from the weights that `source` returns for each name and shape.
    /// [`Network::layers`] requests them in a fixed order. All weights must be on one device.
    ///
    /// Use it to open a file of a family that this crate does not read: write
    /// [`Backbone::named_weights`] with `Tensor::write_safetensors`, and return the tensors of
    /// [`TensorFile`](crate::checkpoint::TensorFile) from `source`.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is invalid; [`Error::Input`] if a weight does not fit; the
    /// errors of `source`.
    pub fn from_source(config: &C, source: &mut WeightSource) -> Result<Self> {
        Self::build(config, source, false)
    }

    fn build(config: &C, source: &mut WeightSource, int8: bool) -> Result<Self> {
        config.validate()?;
        let shape = config.shape()?;
        let mut weights = Weights::new(source, int8);
        let layers = config.layers(&mut weights)?;
        if weights.count() as i64 != shape.num_params {
            let expected =
                format!("{}, the number of weights that the layers request", weights.count());
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

    /// Returns the config of this backbone.
    pub fn config(&self) -> &C {
        &self.config
    }

    /// Computes features `[B, C]` of images `[B, 3, H, W]`: pooled and normed, before any head.
    ///
    /// # Errors
    /// [`Error::Input`] if the images are not `[B, 3, H, W]` of a size that the config accepts, in
    /// f32 or the dtype of the weights, and on the device of the weights.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        self.forward(images, &NoMethod, Pass::default())
    }

    /// Computes dense features `[B, C, rows, cols]` of images `[B, 3, H, W]`: the patch tokens
    /// after the last block and the final norm, without prefix tokens. For a ConvNeXt it is the
    /// last map.
    ///
    /// # Errors
    /// The errors of [`Frozen::features`].
    pub fn patch_features(&self, images: &Tensor) -> Result<Tensor> {
        Backbone::patch_features(self, images)
    }

    /// Returns the outputs of the blocks `blocks` for images `[B, 3, H, W]`: all tokens, before the
    /// final norm, in the order of `blocks`. Blocks count from 0.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no block with one of these numbers; the errors of
    /// [`Frozen::features`].
    pub fn intermediate(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Stream>> {
        Backbone::intermediate(self, images, blocks)
    }

    /// Returns the SHA-256, in hex, of all frozen weights and of the settings of the forward pass
    /// (heads, eps, activation, pooling, image size and the like). Equal digests give equal
    /// features.
    ///
    /// # Panics
    /// Panics if libtorch cannot copy a weight to the CPU, which does not happen in practice.
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
        // Both run in one order. If a weight is no longer int8, the search passes over its old
        // scale.
        Self::from_source(&self.config, &mut |name, _| match named.find(|(own, _)| own == name) {
            Some((_, weight)) => replace(name, weight),
            None => {
                let expected = format!("a weight that needs no {name}");
                let found = "an int8 weight in place of another dtype".to_owned();
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
            // This layer got a bias because a similar layer of another block got one.
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
