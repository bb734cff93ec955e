//! The plain ViT: patch embedding, position table, pre-norm blocks, pooling.

mod config;
mod presets;
mod shape;

use tch::Tensor;

use super::block::{Block, BlockShape, Queries};
use super::weights::Weights;
use super::{BlockPass, Frozen, Hooks, ImageSize, Network, Stream};
use crate::error::{Error, Result};
use crate::nn::{LayerNorm, Linear, PatchEmbed, Weight, widened};
use crate::seam::{Layer, TokenLayout};

pub use config::{Pooling, ViTConfig};

/// A Vision Transformer with frozen pretrained weights: ViT, CLIP's image tower, DINOv2.
pub type FrozenViT = Frozen<ViTConfig>;

/// The layers of a [`FrozenViT`].
#[derive(Clone, Debug)]
pub struct Layers {
    patch_embed: PatchEmbed,
    class_token: Option<Weight>,
    registers: Option<Weight>,
    pos_embed: Option<Weight>,
    pre_norm: Option<LayerNorm>,
    blocks: Vec<Block>,
    norm: LayerNorm,
    projection: Option<Linear>,
}

impl FrozenViT {
    /// Computes CLIP's image embedding `[B, projection]` from features `[B, C]`, not normalized.
    ///
    /// # Errors
    /// [`Error::Config`] if this backbone has no projection; [`Error::Input`] if the features have
    /// another width.
    pub fn project(&self, features: &Tensor) -> Result<Tensor> {
        let projection = self.projection()?;
        if features.size().last() != Some(&self.config().embed_dim) {
            return Err(Error::Input {
                argument: "features",
                expected: format!("[.., {}]", self.config().embed_dim),
                found: format!("{:?}", features.size()),
            });
        }
        projection.forward(features)
    }

    /// Returns CLIP's projection `[projection, C]`, which has no bias.
    pub(crate) fn projection(&self) -> Result<&Linear> {
        let projection = self.layers().projection.as_ref();
        projection.ok_or_else(|| Error::config("projection", "present in the checkpoint", "none"))
    }
}

impl Network for ViTConfig {
    const FAMILY: &'static str = "ViT";

    type Layers = Layers;

    fn layers(&self, weights: &mut Weights) -> Result<Layers> {
        self.validate()?;
        Layers::build(self, weights)
    }

    fn num_blocks(&self) -> usize {
        usize::try_from(self.depth).unwrap_or_default()
    }

    fn embed(&self, layers: &Layers, images: &Tensor, hooks: &Hooks) -> Result<Stream> {
        let tokens = layers.embed(self, images, hooks)?;
        Ok(Stream { tokens, layout: self.layout() })
    }

    fn block(&self, layers: &Layers, stream: Stream, pass: &BlockPass) -> Result<Stream> {
        let Some(block) = layers.blocks.get(pass.block) else {
            let expected = format!("below {}", layers.blocks.len());
            return Err(Error::config("block", expected, pass.block));
        };
        let entered = pass.enter(stream)?;
        let layout = entered.layout;
        let queries = if pass.pooled_only { self.pooling.queries() } else { Queries::All };
        Ok(Stream { tokens: block.forward(entered, queries, pass)?, layout })
    }

    fn pool(&self, layers: &Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        layers.pool(self.pooling, &stream.tokens, &stream.layout, hooks)
    }

    fn patch_map(&self, layers: &Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        let tokens = hooks.norm(Layer::FinalNorm, &layers.norm, &stream.tokens)?;
        Stream { tokens, layout: stream.layout }.patches()
    }

    fn feature_dim(&self) -> i64 {
        self.pooling.feature_dim(self.embed_dim)
    }

    fn image_size(&self) -> ImageSize {
        ImageSize::Fixed(self.image_size.0, self.image_size.1)
    }

    fn layer_name(&self, layer: Layer) -> Option<String> {
        Some(self.name_of(layer))
    }

    fn add_bias(&mut self, layer: Layer) {
        self.patch_bias |= layer == Layer::PatchEmbed;
        self.qkv_bias |= matches!(layer, Layer::Qkv(_));
    }

    fn is_read(&self, name: &str) -> bool {
        !name.starts_with("projection.")
    }

    fn choices(&self) -> String {
        format!(
            "vit heads={} eps={:e} {:?} {:?} image={:?} prefix={}/{}",
            self.num_heads,
            self.norm_eps,
            self.activation,
            self.pooling,
            self.image_size,
            self.pos_embed_prefix,
            self.num_prefix_tokens(),
        )
    }
}

impl Layers {
    fn build(config: &ViTConfig, weights: &mut Weights) -> Result<Self> {
        let (c, patch, eps) = (config.embed_dim, config.patch_size, config.norm_eps);
        let registers = config.num_registers;
        let norm = match config.pooling {
            Pooling::AverageThenNorm => "fc_norm",
            _ => "norm",
        };
        let block = |index| BlockShape {
            name: format!("blocks.{index}"),
            dim: c,
            hidden: config.mlp_dim,
            num_heads: config.num_heads,
            activation: config.activation,
            causal: false,
            qkv_bias: config.qkv_bias,
            layer_scale: config.layer_scale,
            norm_eps: eps,
        };
        Ok(Layers {
            class_token: weights.get_if(config.class_token, "cls_token", &[1, 1, c])?,
            registers: weights.get_if(registers > 0, "reg_token", &[1, registers, c])?,
            pos_embed: weights.get_if(
                config.pos_embed,
                "pos_embed",
                &[1, config.positions(), c],
            )?,
            patch_embed: weights.patch_embed("patch_embed.proj", c, patch, config.patch_bias)?,
            pre_norm: if config.pre_norm { Some(weights.norm("norm_pre", c, eps)?) } else { None },
            blocks: (0..config.depth)
                .map(|index| Block::build(&block(index), None, weights))
                .collect::<Result<_>>()?,
            norm: weights.norm(norm, c, eps)?,
            projection: match config.projection {
                Some(dim) => Some(weights.linear("projection", dim, c, false)?),
                None => None,
            },
        })
    }

    /// Computes `[B, 3, H, W] -> [B, P + N, C]`. The first rows of the position table belong to the
    /// prefix tokens that it covers, the others to the patches.
    fn embed(&self, config: &ViTConfig, images: &Tensor, hooks: &Hooks) -> Result<Tensor> {
        let covered = config.pos_embed_prefix;
        // Adds to `part` its rows of the position table, which begin at `start`.
        let placed = |part: &Tensor, start: i64| match &self.pos_embed {
            Some(table) => {
                let rows = table.f_narrow(1, start, part.size()[1])?;
                Ok(part.f_add(&widened(&rows, images)?)?)
            }
            None => widened(part, images),
        };
        let mut parts = Vec::new();
        let mut start = 0;
        for part in [&self.class_token, &self.registers].into_iter().flatten() {
            let len = part.size()[1];
            let is_covered = start + len <= covered;
            let part = if is_covered { placed(part, start)? } else { widened(part, images)? };
            parts.push(part.f_expand([images.size()[0], -1, -1], false)?);
            start += len;
        }
        let patches = hooks.patch_embed(&self.patch_embed, images)?;
        parts.push(placed(&patches, covered)?);
        let tokens = Tensor::f_cat(&parts, 1)?;
        match &self.pre_norm {
            Some(norm) => hooks.norm(Layer::PreNorm, norm, &tokens),
            None => Ok(tokens),
        }
    }

    /// Computes `[B, T, C] -> [B, C]`, or `[B, 2C]` for the class token beside the mean. Class-token
    /// pooling reads only the first token.
    fn pool(
        &self,
        pooling: Pooling,
        tokens: &Tensor,
        layout: &TokenLayout,
        hooks: &Hooks,
    ) -> Result<Tensor> {
        let norm = |x: &Tensor| hooks.norm(Layer::FinalNorm, &self.norm, x);
        let patches = |x: &Tensor| -> Result<Tensor> {
            let x = x.f_narrow(1, layout.prefix, layout.num_patches())?;
            Ok(x.f_mean_dim(1i64, false, x.kind())?)
        };
        match pooling {
            Pooling::ClassToken => norm(&tokens.f_select(1, 0)?),
            Pooling::Average => patches(&norm(tokens)?),
            Pooling::AverageThenNorm => norm(&patches(tokens)?),
            Pooling::ClassTokenAndAverage => {
                let tokens = norm(tokens)?;
                Ok(Tensor::f_cat(&[tokens.f_select(1, 0)?, patches(&tokens)?], 1)?)
            }
        }
    }
}
