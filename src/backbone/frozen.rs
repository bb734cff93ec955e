//! [`Frozen`]: what all backbones have in common, whatever their layers.

use tch::{Device, Kind, Tensor};

use super::block::Hooks;
use super::digest::digest;
use super::merge::merge;
use super::weights::{WeightSource, Weights, random};
use super::{Backbone, BackboneConfig, Description, Pass, Precision, Stream};
use crate::error::{Error, Result};
use crate::nn::DropPath;
use crate::seam::{BackboneShape, Layer, NoMethod, Seam};

/// A pretrained backbone whose weights never change: what its config says, over named weights.
///
/// `Clone` shares the weights, so that many models hold one backbone in memory.
#[derive(Debug)]
pub struct Frozen<C: Network> {
    config: C,
    named: Vec<(String, Tensor)>,
    layers: C::Layers,
}

/// Which heights and widths of images a backbone takes, in pixels.
#[derive(Clone, Copy, Debug)]
pub enum ImageSize {
    /// These alone.
    Fixed(i64, i64),
    /// All from this side on.
    From(i64),
}

impl ImageSize {
    fn takes(self, size: (i64, i64)) -> bool {
        match self {
            ImageSize::Fixed(height, width) => size == (height, width),
            ImageSize::From(side) => size.0 >= side && size.1 >= side,
        }
    }

    /// The shape of a batch.
    fn describe(self) -> String {
        match self {
            ImageSize::Fixed(height, width) => format!("[B, 3, {height}, {width}]"),
            ImageSize::From(side) => format!("[B, 3, H, W] with H and W from {side} on"),
        }
    }
}

/// A config that layers can be made from: one implementation for each family of backbones.
pub trait Network: BackboneConfig + Clone + Send {
    /// What people call the family; its files are recognized as of it.
    const FAMILY: &'static str;

    /// The layers over their weights.
    type Layers: std::fmt::Debug + Send;

    /// Makes the layers of a valid config from the weights under their names, asked for in one
    /// order.
    fn layers(&self, weights: &mut Weights) -> Result<Self::Layers>;

    /// Number of blocks.
    fn num_blocks(&self) -> usize;

    /// Images `[B, 3, H, W]` that the config takes to what enters block 0.
    fn embed(&self, layers: &Self::Layers, images: &Tensor, hooks: &Hooks) -> Result<Stream>;

    /// A block, and what stands between that and the one before.
    fn run_block(
        &self,
        layers: &Self::Layers,
        block: usize,
        stream: Stream,
        hooks: &Hooks,
        drop_path: DropPath,
    ) -> Result<Stream>;

    /// What leaves the last block to features `[B, C]`.
    fn pool(&self, layers: &Self::Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor>;

    /// Width of the features.
    fn feature_dim(&self) -> i64;

    /// The images that it takes.
    fn image_size(&self) -> ImageSize;

    /// The name in front of `.weight` and `.bias` of a layer, if the shape lists it.
    fn layer_name(&self, _layer: Layer) -> Option<String> {
        None
    }

    /// Says that `layer`, and those like it, has a bias.
    fn add_bias(&mut self, _layer: Layer) {}

    /// Whether the features depend on the weight of that name.
    fn is_read(&self, _name: &str) -> bool {
        true
    }

    /// What the forward pass does with the weights, as far as their shapes do not tell, in words
    /// that never change: it goes into the digest.
    fn choices(&self) -> String;
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

    /// Builds the layers from whatever `source` gives for each weight, under timm's names.
    pub(crate) fn from_source(config: &C, source: &mut WeightSource) -> Result<Self> {
        Self::build(config, source, false)
    }

    fn build(config: &C, source: &mut WeightSource, int8: bool) -> Result<Self> {
        config.validate()?;
        let mut weights = Weights { source, int8, named: Vec::new() };
        let layers = config.layers(&mut weights)?;
        Ok(Frozen { config: config.clone(), named: weights.named, layers })
    }

    /// The shape and the choices of this backbone.
    pub fn config(&self) -> &C {
        &self.config
    }

    /// Images `[B, 3, H, W]` to features `[B, C]`: pooled and normed, before any head.
    ///
    /// # Errors
    /// [`Error::Input`] if the images are not `[B, 3, H, W]` of a size that the config takes, f32 or
    /// of the weights' kind, and on their device.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        self.forward(images, &NoMethod, Pass::default())
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

    /// Any of the weights: all are of one kind and on one device.
    fn sample(&self) -> &Tensor {
        &self.named[0].1
    }

    fn check_images(&self, images: &Tensor) -> Result<()> {
        let (size, weight) = (self.config.image_size(), self.sample());
        if !images.defined() {
            let (expected, found) = (size.describe(), "no tensor".to_owned());
            return Err(Error::Input { argument: "images", expected, found });
        }
        let shape_fits = matches!(images.size()[..], [_, 3, h, w] if size.takes((h, w)));
        let kind_fits = [weight.kind(), Kind::Float].contains(&images.kind());
        if shape_fits && kind_fits && images.device() == weight.device() {
            return Ok(());
        }
        let describe =
            |shape: String, t: &Tensor| format!("{shape} {:?} on {:?}", t.kind(), t.device());
        Err(Error::Input {
            argument: "images",
            expected: describe(size.describe(), weight),
            found: describe(format!("{:?}", images.size()), images),
        })
    }
}

impl<C: Network> Backbone for Frozen<C> {
    fn num_blocks(&self) -> usize {
        self.config.num_blocks()
    }

    fn embed(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Stream> {
        self.check_images(images)?;
        let images = images.f_to_kind(self.compute_kind())?;
        self.config.embed(&self.layers, &images, &Hooks { method, train: pass.train })
    }

    fn run_block(
        &self,
        block: usize,
        stream: Stream,
        method: &dyn Seam,
        pass: Pass,
    ) -> Result<Stream> {
        let count = self.num_blocks();
        if block >= count {
            return Err(Error::config("block", format!("below {count}"), block));
        }
        if pass.train {
            pass.noise.enter(block);
        }
        let hooks = Hooks { method, train: pass.train };
        let drop_path = DropPath::linear(pass.drop_path, block, count);
        self.config.run_block(&self.layers, block, stream, &hooks, drop_path)
    }

    fn pool(&self, stream: Stream, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        self.config.pool(&self.layers, stream, &Hooks { method, train: pass.train })
    }

    fn feature_dim(&self) -> i64 {
        self.config.feature_dim()
    }

    fn shape(&self) -> BackboneShape {
        self.config.shape()
    }

    fn named_weights(&self) -> &[(String, Tensor)] {
        &self.named
    }

    fn map_weights(
        &self,
        replace: &mut dyn FnMut(&str, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        // `from_source` asks for the weights in the order in which they are named.
        let mut named = self.named.iter();
        Self::from_source(&self.config, &mut |name, _| match named.next() {
            Some((own, weight)) if own == name => replace(name, weight),
            _ => unreachable!("a config names its weights in one order"),
        })
    }

    fn to_int8(&self) -> Result<Self> {
        if self.is_int8() {
            return Ok(self.clone());
        }
        let mut named = self.named.iter();
        let weight = &mut |_: &str, _: &[i64]| match named.next() {
            Some((_, weight)) => Ok(weight.shallow_clone()),
            None => unreachable!("a config names its weights in one order"),
        };
        Self::build(&self.config, weight, true)
    }

    fn is_read(&self, name: &str) -> bool {
        self.config.is_read(name)
    }

    fn merge(&self, method: &dyn Seam) -> Result<Self> {
        merge(self, method)
    }

    fn digest(&self) -> Result<String> {
        digest(&self.config.choices(), &self.named)
    }

    fn device(&self) -> Device {
        self.sample().device()
    }

    fn describe(&self) -> Description {
        let image_size = match self.config.image_size() {
            ImageSize::Fixed(height, width) => Some((height, width)),
            ImageSize::From(_) => None,
        };
        Description {
            family: C::FAMILY.to_owned(),
            num_params: self.num_params(),
            image_size,
            precision: Precision::of_weights(self),
            ..Description::default()
        }
    }
}

impl<C: Network> Clone for Frozen<C> {
    fn clone(&self) -> Self {
        self.map_weights(&mut |_, weight| Ok(weight.shallow_clone()))
            .expect("a built backbone can be built again from its own weights")
    }
}
