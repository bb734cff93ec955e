//! The plain ViT: patches, position table, pre-norm blocks, pooling.

use tch::{Device, Kind, Tensor};

use super::digest::digest;
use super::{Backbone, MlpActivation, Pass, Pooling, ViTConfig};
use crate::error::{Error, Result};
use crate::nn::{
    Attention, Branch, DropPath, InitRng, LayerNorm, Linear, Mlp, MlpKind, PatchEmbed,
};
use crate::seam::{NoMethod, Seam, Site, SubLayer, TokenLayout};

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

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attention: Attention,
    scale1: Option<Tensor>,
    norm2: LayerNorm,
    mlp: Mlp,
    scale2: Option<Tensor>,
}

/// Where weights come from: a name and the shape that the model needs under it.
pub(crate) type WeightSource<'a> = dyn FnMut(&str, &[i64]) -> Result<Tensor> + 'a;

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
    fn embed(&self, images: &Tensor) -> Result<Tensor> {
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
        parts.push(patches.f_add(&positions(covered, self.config.layout().num_patches())?)?);
        let tokens = Tensor::f_cat(&parts, 1)?;
        match &layers.pre_norm {
            Some(norm) => norm.forward(&tokens),
            None => Ok(tokens),
        }
    }

    /// `[B, T, C] -> [B, C]`. With class-token pooling only the first token is read.
    fn pool(&self, tokens: &Tensor) -> Result<Tensor> {
        let norm = &self.layers.norm;
        let patches = |x: &Tensor| -> Result<Tensor> {
            let layout = self.config.layout();
            let x = x.f_narrow(1, layout.prefix, layout.num_patches())?;
            Ok(x.f_mean_dim(1i64, false, x.kind())?)
        };
        match self.config.pooling {
            Pooling::ClassToken => norm.forward(&tokens.f_select(1, 0)?),
            Pooling::Average => patches(&norm.forward(tokens)?),
            Pooling::AverageThenNorm => norm.forward(&patches(tokens)?),
        }
    }
}

impl Backbone for FrozenViT {
    fn forward(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        self.check_images(images)?;
        let mut tokens = self.embed(images)?;
        let (layout, depth) = (self.config.layout(), self.layers.blocks.len());
        for (index, block) in self.layers.blocks.iter().enumerate() {
            // Nothing after the last block reads more than the class token.
            let class_only = index + 1 == depth && self.config.pooling == Pooling::ClassToken;
            let drop_path = DropPath::linear(pass.drop_path, index, depth);
            let run = Run { index, layout, class_only, drop_path, method, train: pass.train };
            tokens = block.forward(tokens, &run)?;
        }
        self.pool(&tokens)
    }

    fn feature_dim(&self) -> i64 {
        self.config.embed_dim
    }

    fn block_dims(&self) -> Vec<i64> {
        vec![self.config.embed_dim; self.layers.blocks.len()]
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

/// What a block needs to know of the pass it is in.
struct Run<'a> {
    index: usize,
    layout: TokenLayout,
    class_only: bool,
    drop_path: DropPath,
    method: &'a dyn Seam,
    train: bool,
}

impl Block {
    /// `[B, T, C] -> [B, T, C]`, or `[B, 1, C]` where the class token alone is read later.
    fn forward(&self, tokens: Tensor, run: &Run) -> Result<Tensor> {
        let (mut tokens, mut layout) = (tokens, run.layout);
        let normed = self.norm1.forward(&tokens)?;
        let mut beside = normed.shallow_clone();
        if run.class_only {
            layout = TokenLayout { prefix: 1, grid: (0, 0) };
            tokens = tokens.f_narrow(1, 0, 1)?;
            beside = normed.f_narrow(1, 0, 1)?;
        }
        let tokens =
            self.sub_layer(SubLayer::Attention, tokens, &beside, &layout, run, |branch| {
                let normed = branch.select(&normed)?;
                match run.class_only {
                    true => self.attention.forward_first(&normed, 1),
                    false => self.attention.forward(&normed),
                }
            })?;
        let normed = self.norm2.forward(&tokens)?;
        self.sub_layer(SubLayer::Mlp, tokens, &normed, &layout, run, |branch| {
            self.mlp.forward(&branch.select(&normed)?)
        })
    }

    /// Adds the sub-layer `f` and what the method has beside it into the residual stream; each
    /// draws drop path for itself.
    fn sub_layer(
        &self,
        sub_layer: SubLayer,
        tokens: Tensor,
        normed: &Tensor,
        layout: &TokenLayout,
        run: &Run,
        f: impl FnOnce(&Branch) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let site = Site { block: run.index, sub_layer };
        let layer_scale = match sub_layer {
            SubLayer::Attention => &self.scale1,
            SubLayer::Mlp => &self.scale2,
        };
        let branch = run.drop_path.draw(&tokens, run.train)?;
        let mut sum = tokens;
        if !branch.is_empty() {
            let mut output = f(&branch)?;
            if let Some(gamma) = layer_scale {
                output = output.f_mul(gamma)?;
            }
            let output = run.method.after_sub_layer(site, output, layout, run.train)?;
            sum = branch.add(&sum, &output)?;
        }
        if run.method.is_beside(site) {
            let branch = run.drop_path.draw(&sum, run.train)?;
            if !branch.is_empty() {
                sum = run.method.beside(site, normed, sum, layout, &branch, run.train)?;
            }
        }
        Ok(sum)
    }
}

/// Asks a [`WeightSource`] for weights and keeps them under their names.
struct Weights<'a, 'b> {
    source: &'a mut WeightSource<'b>,
    named: Vec<(String, Tensor)>,
}

impl Weights<'_, '_> {
    fn get(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let weight = (self.source)(name, shape)?;
        self.named.push((name.to_owned(), weight.shallow_clone()));
        Ok(weight)
    }

    fn get_if(&mut self, present: bool, name: &str, shape: &[i64]) -> Result<Option<Tensor>> {
        present.then(|| self.get(name, shape)).transpose()
    }

    fn linear(&mut self, name: &str, out: i64, inner: i64, bias: bool) -> Result<Linear> {
        let weight = self.get(&format!("{name}.weight"), &[out, inner])?;
        let bias = self.get_if(bias, &format!("{name}.bias"), &[out])?;
        Ok(Linear { weight, bias })
    }

    fn norm(&mut self, name: &str, dim: i64, eps: f64) -> Result<LayerNorm> {
        let weight = self.get(&format!("{name}.weight"), &[dim])?;
        let bias = self.get(&format!("{name}.bias"), &[dim])?;
        Ok(LayerNorm { weight, bias, eps })
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

impl Block {
    fn build(config: &ViTConfig, index: i64, weights: &mut Weights) -> Result<Self> {
        let (c, hidden, eps) = (config.embed_dim, config.mlp_dim, config.norm_eps);
        let name = |part: &str| format!("blocks.{index}.{part}");
        let (kind, halves) = match config.activation {
            MlpActivation::Gelu => (MlpKind::Gelu, 1),
            MlpActivation::QuickGelu => (MlpKind::QuickGelu, 1),
            MlpActivation::SwiGlu => (MlpKind::SwiGlu, 2),
        };
        Ok(Block {
            norm1: weights.norm(&name("norm1"), c, eps)?,
            attention: Attention {
                qkv: weights.linear(&name("attn.qkv"), 3 * c, c, config.qkv_bias)?,
                proj: weights.linear(&name("attn.proj"), c, c, true)?,
                num_heads: config.num_heads,
            },
            scale1: weights.get_if(config.layer_scale, &name("ls1.gamma"), &[c])?,
            norm2: weights.norm(&name("norm2"), c, eps)?,
            mlp: Mlp {
                fc1: weights.linear(&name("mlp.fc1"), halves * hidden, c, true)?,
                fc2: weights.linear(&name("mlp.fc2"), c, hidden, true)?,
                kind,
            },
            scale2: weights.get_if(config.layer_scale, &name("ls2.gamma"), &[c])?,
        })
    }
}
