//! The plain ViT: patches, position table, pre-norm blocks, pooling.

use tch::{Device, Kind, Tensor};

use super::block::{Block, Hooks, Run};
use super::digest::digest;
use super::merge::merge;
use super::weights::{WeightSource, Weights};
use super::{Backbone, Pass, Pooling, ViTConfig};
use crate::error::{Error, Result};
use crate::nn::{DropPath, InitRng, LayerNorm, Linear, PatchEmbed};
use crate::seam::{BackboneShape, Layer, NoMethod, Seam, TokenLayout};

/// A pretrained Vision Transformer whose weights never change: ViT, CLIP's image tower, DINOv2.
///
/// `Clone` shares the weights, so that many models hold one backbone in memory.
#[derive(Debug)]
pub struct FrozenViT {
    config: ViTConfig,
    named: Vec<(String, Tensor)>,
    layers: Layers,
}

#[derive(Debug)]
struct Layers {
    patch_embed: PatchEmbed,
    class_token: Option<Tensor>,
    registers: Option<Tensor>,
    pos_embed: Tensor,
    pre_norm: Option<LayerNorm>,
    blocks: Vec<Block>,
    norm: LayerNorm,
    projection: Option<Linear>,
}

impl FrozenViT {
    /// A backbone with random weights, for tests, benches and audits.
    ///
    /// Matrices and tables are normal with deviation 0.02, biases zero, norms and layer scales
    /// one.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is no model.
    pub fn random(config: &ViTConfig, seed: i64, device: Device) -> Result<Self> {
        let mut rng = InitRng::from_seed(seed);
        Self::from_source(config, &mut |name, shape| {
            let value = match name.rsplit('.').next() {
                Some("bias") => Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?,
                Some("gamma") => Tensor::f_ones(shape, (Kind::Float, Device::Cpu))?,
                _ if shape.len() == 1 => Tensor::f_ones(shape, (Kind::Float, Device::Cpu))?,
                _ => rng.normal(shape, 0.02)?,
            };
            Ok(value.f_to_device(device)?)
        })
    }

    /// A backbone on the CPU whose weights are all zero and take no memory: each is one number seen at
    /// every place. It serves for counting what a method would train beside a backbone of any
    /// size.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is no model.
    pub fn blank(config: &ViTConfig) -> Result<Self> {
        let zero = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?;
        Self::from_source(config, &mut |_, shape| Ok(zero.f_expand(shape, false)?))
    }

    /// Builds the layers from whatever `source` gives for each weight, under timm's names.
    pub(crate) fn from_source(config: &ViTConfig, source: &mut WeightSource) -> Result<Self> {
        config.validate()?;
        let mut weights = Weights { source, named: Vec::new() };
        let layers = Layers::build(config, &mut weights)?;
        Ok(FrozenViT { config: config.clone(), named: weights.named, layers })
    }

    /// The shape and the choices of this backbone.
    pub fn config(&self) -> &ViTConfig {
        &self.config
    }

    /// Images `[B, 3, H, W]` to features `[B, C]`: pooled and normed, before any head and before
    /// CLIP's projection (for that, [`FrozenViT::project`]).
    ///
    /// # Errors
    /// [`Error::Input`] if the images are not `[B, 3, H, W]` of the config's size, of the
    /// weights' kind and on their device.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        self.forward(images, &NoMethod, Pass::default())
    }

    /// CLIP's image embedding: features `[B, C]` to `[B, projection]`, not normalized.
    ///
    /// # Errors
    /// [`Error::Config`] if this backbone has no projection; [`Error::Input`] on another width.
    pub fn project(&self, features: &Tensor) -> Result<Tensor> {
        let Some(projection) = &self.layers.projection else {
            return Err(Error::config("projection", "present in the checkpoint", "none"));
        };
        if features.size().last() != Some(&self.config.embed_dim) {
            return Err(Error::Input {
                argument: "features",
                expected: format!("[.., {}]", self.config.embed_dim),
                found: format!("{:?}", features.size()),
            });
        }
        projection.forward(features)
    }

    /// SHA-256 over every frozen byte and over the choices of the forward pass (heads, eps,
    /// activation, pooling, image size), in hex: equal digests give equal features.
    ///
    /// # Panics
    /// Never in practice: only if libtorch cannot copy a weight to the CPU.
    pub fn digest(&self) -> String {
        Backbone::digest(self).expect("weights can be read")
    }

    fn check_images(&self, images: &Tensor) -> Result<()> {
        let (height, width) = self.config.image_size;
        let weight = &self.layers.patch_embed.weight;
        if !images.defined() {
            let (expected, found) = (format!("[B, 3, {height}, {width}]"), "no tensor".to_owned());
            return Err(Error::Input { argument: "images", expected, found });
        }
        let shape_fits = matches!(images.size()[..], [_, 3, h, w] if (h, w) == (height, width));
        if shape_fits && images.kind() == weight.kind() && images.device() == weight.device() {
            return Ok(());
        }
        let describe =
            |shape: String, t: &Tensor| format!("{shape} {:?} on {:?}", t.kind(), t.device());
        Err(Error::Input {
            argument: "images",
            expected: describe(format!("[B, 3, {height}, {width}]"), weight),
            found: describe(format!("{:?}", images.size()), images),
        })
    }

    /// `[B, 3, H, W] -> [B, P + N, C]`. The first rows of the position table belong to the prefix
    /// tokens that it covers, the rest to the patches.
    fn embed(&self, images: &Tensor, hooks: &Hooks) -> Result<Tensor> {
        let layers = &self.layers;
        let covered = self.config.pos_embed_prefix;
        let positions = |start, len| layers.pos_embed.f_narrow(1, start, len);
        let mut parts = Vec::new();
        let mut start = 0;
        for part in [&layers.class_token, &layers.registers].into_iter().flatten() {
            let len = part.size()[1];
            let part = match start + len <= covered {
                true => part.f_add(&positions(start, len)?)?,
                false => part.shallow_clone(),
            };
            parts.push(part.f_expand([images.size()[0], -1, -1], false)?);
            start += len;
        }
        let patches = layers.patch_embed.forward(images)?;
        let patches = hooks.after(Layer::PatchEmbed, images, patches)?;
        parts.push(patches.f_add(&positions(covered, self.config.layout().num_patches())?)?);
        let tokens = Tensor::f_cat(&parts, 1)?;
        match &layers.pre_norm {
            Some(norm) => hooks.norm(Layer::PreNorm, norm, &tokens),
            None => Ok(tokens),
        }
    }

    /// `[B, T, C] -> [B, C]`. With class-token pooling only the first token is read.
    fn pool(&self, tokens: &Tensor, layout: &TokenLayout, hooks: &Hooks) -> Result<Tensor> {
        let norm = |x: &Tensor| hooks.norm(Layer::FinalNorm, &self.layers.norm, x);
        let patches = |x: &Tensor| -> Result<Tensor> {
            let x = x.f_narrow(1, layout.prefix, layout.num_patches())?;
            Ok(x.f_mean_dim(1i64, false, x.kind())?)
        };
        match self.config.pooling {
            Pooling::ClassToken => norm(&tokens.f_select(1, 0)?),
            Pooling::Average => patches(&norm(tokens)?),
            Pooling::AverageThenNorm => norm(&patches(tokens)?),
        }
    }
}

impl Backbone for FrozenViT {
    fn forward(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        self.check_images(images)?;
        let hooks = Hooks { method, train: pass.train };
        let mut tokens = self.embed(images, &hooks)?;
        let (mut layout, depth) = (self.config.layout(), self.layers.blocks.len());
        for (index, block) in self.layers.blocks.iter().enumerate() {
            (tokens, layout) = method.entering(index, tokens, layout, pass.train)?;
            // Nothing after the last block reads more than the class token.
            let class_only = index + 1 == depth && self.config.pooling == Pooling::ClassToken;
            let drop_path = DropPath::linear(pass.drop_path, index, depth);
            let run = Run { index, layout, class_only, drop_path, hooks };
            tokens = block.forward(tokens, &run)?;
        }
        self.pool(&tokens, &layout, &hooks)
    }

    fn feature_dim(&self) -> i64 {
        self.config.embed_dim
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

    fn merge(&self, method: &dyn Seam) -> Result<Self> {
        merge(self, method)
    }

    fn digest(&self) -> Result<String> {
        let c = &self.config;
        let choices = format!(
            "vit heads={} eps={:e} {:?} {:?} image={:?} prefix={}/{}",
            c.num_heads,
            c.norm_eps,
            c.activation,
            c.pooling,
            c.image_size,
            c.pos_embed_prefix,
            c.num_prefix_tokens(),
        );
        digest(&choices, &self.named)
    }

    fn device(&self) -> Device {
        self.layers.pos_embed.device()
    }
}

impl Clone for FrozenViT {
    fn clone(&self) -> Self {
        self.map_weights(&mut |_, weight| Ok(weight.shallow_clone()))
            .expect("a built backbone can be built again from its own weights")
    }
}

impl Layers {
    fn build(config: &ViTConfig, weights: &mut Weights) -> Result<Self> {
        let (c, patch, eps) = (config.embed_dim, config.patch_size, config.norm_eps);
        let registers = config.num_registers;
        let positions = config.pos_embed_prefix + config.layout().num_patches();
        let norm = match config.pooling {
            Pooling::AverageThenNorm => "fc_norm",
            Pooling::ClassToken | Pooling::Average => "norm",
        };
        Ok(Layers {
            class_token: weights.get_if(config.class_token, "cls_token", &[1, 1, c])?,
            registers: weights.get_if(registers > 0, "reg_token", &[1, registers, c])?,
            pos_embed: weights.get("pos_embed", &[1, positions, c])?,
            patch_embed: PatchEmbed {
                weight: weights.get("patch_embed.proj.weight", &[c, 3, patch, patch])?,
                bias: weights.get_if(config.patch_bias, "patch_embed.proj.bias", &[c])?,
            },
            pre_norm: match config.pre_norm {
                true => Some(weights.norm("norm_pre", c, eps)?),
                false => None,
            },
            blocks: (0..config.depth)
                .map(|index| Block::build(config, index, weights))
                .collect::<Result<_>>()?,
            norm: weights.norm(norm, c, eps)?,
            projection: match config.projection {
                Some(dim) => Some(weights.linear("projection", dim, c, false)?),
                None => None,
            },
        })
    }
}
