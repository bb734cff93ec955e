//! The plain ViT: patch embedding, position table, blocks, pooling.

mod config;
mod pooling;
mod presets;
mod shape;

use tch::Tensor;

use super::block::{Block, BlockShape, Queries};
use super::weights::Weights;
use super::{BlockPass, Frozen, Hooks, ImageSize, Network, Stream};
use crate::error::{Error, Result};
use crate::nn::{
    AttentionPool, Frequencies, GridPairs, Linear, Mlp, MlpActivation, Norm, NormKind, PatchEmbed,
    RotaryTable, Weight, widened,
};
use crate::seam::{Layer, TokenLayout};

pub use config::ViTConfig;
pub use pooling::{AttentionPooling, Pooling};

/// A Vision Transformer with frozen pretrained weights: ViT, CLIP's image tower, DINOv2.
pub type FrozenViT = Frozen<ViTConfig>;

/// The layers of a [`FrozenViT`].
#[derive(Clone, Debug)]
pub struct Layers {
    patch_embed: PatchEmbed,
    patch_norm: Option<Norm>,
    class_token: Option<Weight>,
    registers: Option<Weight>,
    pos_embed: Option<Weight>,
    pre_norm: Option<Norm>,
    blocks: Vec<Block>,
    norm: Option<Norm>,
    attention_pool: Option<AttentionPool>,
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
        layers.pool(self, &stream.tokens, &stream.layout, hooks)
    }

    fn patch_map(&self, layers: &Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        let tokens = layers.final_norm(&stream.tokens, hooks)?;
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
        self.proj_bias |= matches!(layer, Layer::Proj(_) | Layer::Fc1(_) | Layer::Fc2(_));
        self.norm_bias |= layer.is_norm();
    }

    fn is_read(&self, name: &str) -> bool {
        let pools = self.pooling == Pooling::Attention;
        !name.starts_with("projection.") && (pools || !name.starts_with("attn_pool."))
    }

    fn choices(&self) -> String {
        // The settings of later versions are appended where they are used, so that the digests of
        // older backbones stay as they are.
        let rotary = self.rotary.map(|rotary| format!(" {}", rotary.describe()));
        let pool = self.attention_pool.map(|pool| {
            let heads = pool.num_heads.unwrap_or(self.num_heads);
            format!(" pool_heads={heads} pool_prefix={}", pool.reads_prefix)
        });
        let norm = (!self.final_norm).then(|| " no final norm".to_owned());
        let placement = (!self.norm_placement.is_before()).then(|| " norms after".to_owned());
        let rms = self.rms_norm.then(|| " rms norms".to_owned());
        let later = [rotary, pool, norm, placement, rms].into_iter().flatten().collect::<String>();
        format!(
            "vit heads={} eps={:e} {:?} {:?} image={:?} prefix={}/{}{later}",
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
        let (c, patch, norms) = (config.embed_dim, config.patch_size, config.norms());
        let registers = config.num_registers;
        let norm = match config.pooling {
            Pooling::AverageThenNorm => "fc_norm",
            _ => "norm",
        };
        let class_token = weights.get_if(config.class_token, "cls_token", &[1, 1, c])?;
        let registers = weights.get_if(registers > 0, "reg_token", &[1, registers, c])?;
        let table = [1, config.positions(), c];
        let pos_embed = weights.get_if(config.pos_embed, "pos_embed", &table)?;
        let patch_embed = weights.patch_embed("patch_embed.proj", c, patch, config.patch_bias)?;
        let norm_if = |present: bool, name: &str, weights: &mut Weights| {
            present.then(|| weights.norm_of(name, c, norms)).transpose()
        };
        Ok(Layers {
            class_token,
            registers,
            pos_embed,
            patch_norm: norm_if(config.patch_norm, "patch_embed.norm", weights)?,
            pre_norm: norm_if(config.pre_norm, "norm_pre", weights)?,
            blocks: blocks(config, &patch_embed.weight, weights)?,
            patch_embed,
            norm: norm_if(config.final_norm, norm, weights)?,
            attention_pool: match &config.attention_pool {
                Some(pool) => Some(attention_pool(config, pool, weights)?),
                None => None,
            },
            projection: match config.projection {
                Some(dim) => Some(weights.linear("projection", c, dim, false)?),
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
        let patches = match &self.patch_norm {
            Some(norm) => norm.forward(&patches)?,
            None => patches,
        };
        parts.push(placed(&patches, covered)?);
        let tokens = Tensor::f_cat(&parts, 1)?;
        match &self.pre_norm {
            Some(norm) => hooks.norm(Layer::PreNorm, norm, &tokens),
            None => Ok(tokens),
        }
    }

    /// Runs the last norm, if there is one.
    fn final_norm(&self, x: &Tensor, hooks: &Hooks) -> Result<Tensor> {
        match &self.norm {
            Some(norm) => hooks.norm(Layer::FinalNorm, norm, x),
            None => Ok(x.shallow_clone()),
        }
    }

    /// Computes `[B, T, C] -> [B, C]`, or `[B, 2C]` for the class token beside the mean. Pooling of
    /// the first tokens reads only these.
    fn pool(
        &self,
        config: &ViTConfig,
        tokens: &Tensor,
        layout: &TokenLayout,
        hooks: &Hooks,
    ) -> Result<Tensor> {
        let norm = |x: &Tensor| self.final_norm(x, hooks);
        let mean = |x: &Tensor, start: i64, count: i64| -> Result<Tensor> {
            Ok(x.f_narrow(1, start, count)?.f_mean_dim(1i64, false, x.kind())?)
        };
        let patches = |x: &Tensor| mean(x, layout.prefix, layout.num_patches());
        match config.pooling {
            Pooling::ClassToken => norm(&tokens.f_select(1, 0)?),
            Pooling::Average => patches(&norm(tokens)?),
            Pooling::AverageThenNorm => norm(&patches(tokens)?),
            Pooling::ClassTokenAndAverage => {
                let tokens = norm(tokens)?;
                Ok(Tensor::f_cat(&[tokens.f_select(1, 0)?, patches(&tokens)?], 1)?)
            }
            Pooling::ClassAndDistillation => mean(&norm(&tokens.f_narrow(1, 0, 2)?)?, 0, 2),
            Pooling::Attention => {
                let Some(pool) = &self.attention_pool else {
                    return Err(Error::config("attention_pool", "present", "none"));
                };
                let reads_prefix = config.attention_pool.is_some_and(|pool| pool.reads_prefix);
                let patches = tokens.f_narrow(1, layout.prefix, layout.num_patches())?;
                if !reads_prefix {
                    return pool.forward(&norm(&patches)?);
                }
                // Prompts are the last prefix tokens.
                let own = tokens.f_narrow(1, 0, config.num_prefix_tokens())?;
                pool.forward(&norm(&Tensor::f_cat(&[own, patches], 1)?)?)
            }
        }
    }
}

/// Builds the blocks. `like` is a weight of the model beside which positions are computed.
fn blocks(config: &ViTConfig, like: &Tensor, weights: &mut Weights) -> Result<Vec<Block>> {
    let (c, heads, grid) = (config.embed_dim, config.num_heads, config.grid());
    let rotary = match &config.rotary {
        Some(rotary) => Some(RotaryTable::new(rotary, grid, c / heads, like)?),
        None => None,
    };
    let frequencies = [2, config.depth, heads, c / heads / 2];
    let frequencies = weights.get_if(config.mixed_rotary, "rope.freqs", &frequencies)?;
    let grid_pairs =
        config.relative_bias.then(|| GridPairs::new(grid, like.device())).transpose()?;
    let build = |block: i64| {
        let rotary = match &frequencies {
            Some(weight) => {
                let weight = weight.shallow_clone();
                Some(RotaryTable::learned(Frequencies { weight, block, grid })?)
            }
            None => rotary.clone(),
        };
        let shape = BlockShape {
            name: format!("blocks.{block}"),
            dim: c,
            hidden: config.mlp_dim,
            num_heads: heads,
            activation: config.activation,
            causal: false,
            qkv_bias: config.qkv_bias,
            proj_bias: config.proj_bias,
            layer_scale: config.layer_scale,
            norm_placement: config.norm_placement,
            norms: config.norms(),
            attention_norm: config.attention_norm,
            mlp_norm: config.mlp_norm,
            rotary,
            grid_pairs: grid_pairs.clone(),
        };
        Block::build(&shape, None, weights)
    };
    (0..config.depth).map(build).collect()
}

impl ViTConfig {
    /// Returns what the norms have in common.
    fn norms(&self) -> NormKind {
        NormKind { eps: self.norm_eps, rms: self.rms_norm, bias: self.norm_bias }
    }
}

/// Builds the attention pooling with timm's names.
fn attention_pool(
    config: &ViTConfig,
    pool: &AttentionPooling,
    weights: &mut Weights,
) -> Result<AttentionPool> {
    let (c, hidden) = (config.embed_dim, pool.mlp_dim);
    let activation = match config.activation {
        // The pooling beside gated MLPs has a plain one.
        MlpActivation::SwiGlu => MlpActivation::Gelu,
        activation => activation,
    };
    let latent = weights.get("attn_pool.latent", &[1, 1, c])?;
    let qkv = if pool.is_bare() {
        weights.linear("attn_pool.key_value", c, 2 * c, config.qkv_bias)?
    } else {
        weights.linear("attn_pool.qkv", c, 3 * c, true)?
    };
    let proj = weights.linear("attn_pool.proj", c, c, true)?;
    let mut mlp = None;
    if !pool.is_bare() {
        let norm = weights.norm("attn_pool.norm", c, config.norm_eps)?;
        let fc1 = weights.linear("attn_pool.mlp.fc1", c, hidden, true)?;
        let fc2 = weights.linear("attn_pool.mlp.fc2", hidden, c, true)?;
        mlp = Some((norm, Mlp { fc1, fc2, activation }));
    }
    let num_heads = pool.num_heads.unwrap_or(config.num_heads);
    Ok(AttentionPool { latent, qkv, proj, mlp, num_heads })
}
