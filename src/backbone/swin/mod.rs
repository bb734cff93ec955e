//! Swin and Swin V2: blocks with attention within windows, on a grid that is halved from stage to
//! stage.

mod config;
mod presets;

use tch::Tensor;

use super::block::{Block, BlockShape, Queries, WindowShape};
use super::weights::Weights;
use super::{BlockPass, Frozen, Hooks, ImageSize, Network, Stream, locate, total};
use crate::error::{Error, Result};
use crate::nn::{Linear, MlpActivation, Norm, NormKind, NormPlacement, PatchEmbed, side_by_side};
use crate::seam::{Layer, TokenLayout};

pub(crate) use config::MASK_SCORE;
pub use config::{ContinuousBiasConfig, SwinConfig};

/// A Swin Transformer (Liu et al., arXiv 2103.14030) or Swin V2 (arXiv 2111.09883) with frozen
/// pretrained weights.
///
/// The blocks are numbered through all stages. Each has the width and the grid of its stage and no
/// prefix token. A method's branch beside attention reads the input of attention before it is
/// shifted and divided into windows: the normed tokens, or in a Swin V2, whose norms come after the
/// sub-layers, the tokens themselves.
pub type FrozenSwin = Frozen<SwinConfig>;

/// The layers of a [`FrozenSwin`].
#[derive(Clone, Debug)]
pub struct Layers {
    patch_embed: PatchEmbed,
    patch_norm: Option<Norm>,
    stages: Vec<Stage>,
    norm: Norm,
}

#[derive(Clone, Debug)]
struct Stage {
    merging: Option<Merging>,
    blocks: Vec<Block>,
    layout: TokenLayout,
}

/// The patch merging into a stage.
#[derive(Clone, Debug)]
struct Merging {
    norm_placement: NormPlacement,
    norm: Norm,
    reduction: Linear,
}

impl Network for SwinConfig {
    const FAMILY: &'static str = "Swin";

    type Layers = Layers;

    fn layers(&self, weights: &mut Weights) -> Result<Layers> {
        self.validate()?;
        let (c, patch, eps) = (self.embed_dim, self.patch_size, self.norm_eps);
        Ok(Layers {
            patch_embed: weights.patch_embed("patch_embed.proj", c, patch, true)?,
            patch_norm: if self.patch_norm {
                Some(weights.norm("patch_embed.norm", c, eps)?)
            } else {
                None
            },
            stages: (0..self.depths.len())
                .map(|stage| Stage::build(self, stage, weights))
                .collect::<Result<_>>()?,
            norm: weights.norm("norm", self.last_dim(), eps)?,
        })
    }

    fn num_blocks(&self) -> usize {
        total(&self.depths)
    }

    fn embed(&self, layers: &Layers, images: &Tensor, hooks: &Hooks) -> Result<Stream> {
        let layout = TokenLayout { prefix: 0, grid: self.grid(0) };
        Ok(Stream { tokens: layers.embed(images, hooks)?, layout })
    }

    fn block(&self, layers: &Layers, stream: Stream, pass: &BlockPass) -> Result<Stream> {
        let (stage, within) = locate(&self.depths, pass.block)?;
        let Stage { merging, blocks, layout } = &layers.stages[stage];
        let tokens = match merging {
            Some(merging) if within == 0 => {
                merging.forward(stage, &stream.tokens, stream.layout.grid, &pass.hooks)?
            }
            _ => stream.tokens,
        };
        let entered = pass.enter(Stream { tokens, layout: *layout })?;
        if entered.layout != *layout {
            let (expected, found) = (format!("{layout:?} within windows"), entered.layout);
            return Err(Error::config("layout", expected, format!("{found:?}")));
        }
        let tokens = blocks[within].forward(entered, Queries::All, pass)?;
        Ok(Stream { tokens, layout: *layout })
    }

    fn pool(&self, layers: &Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        let tokens = hooks.norm(Layer::FinalNorm, &layers.norm, &stream.tokens)?;
        Ok(tokens.f_mean_dim(1i64, false, tokens.kind())?)
    }

    fn patch_map(&self, layers: &Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        let tokens = hooks.norm(Layer::FinalNorm, &layers.norm, &stream.tokens)?;
        Stream { tokens, layout: stream.layout }.patches()
    }

    fn feature_dim(&self) -> i64 {
        self.last_dim()
    }

    fn image_size(&self) -> ImageSize {
        ImageSize::Fixed(self.image_size.0, self.image_size.1)
    }

    fn layer_name(&self, layer: Layer) -> Option<String> {
        Some(self.name_of(layer))
    }

    fn add_bias(&mut self, layer: Layer) {
        self.qkv_bias |= matches!(layer, Layer::Qkv(_));
        self.merge_bias |= matches!(layer, Layer::Merge(_));
    }

    fn choices(&self) -> String {
        // The settings of later versions are appended where they are used, so that the digests of
        // older backbones stay as they are.
        let after = (!self.norm_placement.is_before()).then(|| " norms after".to_owned());
        let cosine = self.cosine_attention.then(|| " cosine".to_owned());
        let bias = self.continuous_bias.as_ref();
        let bias = bias.map(|bias| format!(" pretrained={:?}", bias.pretrained_window_sizes));
        let mask = self.mask_score;
        let mask = (mask != MASK_SCORE).then(|| format!(" mask={mask:e}"));
        let padding = self.pad_before_shift.then(|| " pads first".to_owned());
        let later = [after, cosine, bias, mask, padding].into_iter().flatten().collect::<String>();
        format!(
            "swin heads={:?} windows={:?} eps={:e} image={:?}{later}",
            self.num_heads, self.window_sizes, self.norm_eps, self.image_size,
        )
    }
}

impl Layers {
    /// Computes `[B, 3, H, W] -> [B, N, C]`.
    fn embed(&self, images: &Tensor, hooks: &Hooks) -> Result<Tensor> {
        let patches = hooks.patch_embed(&self.patch_embed, images)?;
        match &self.patch_norm {
            Some(norm) => hooks.norm(Layer::PreNorm, norm, &patches),
            None => Ok(patches),
        }
    }
}

impl Stage {
    fn build(config: &SwinConfig, stage: usize, weights: &mut Weights) -> Result<Self> {
        let merging = match stage {
            0 => None,
            _ => Some(Merging::build(config, stage, weights)?),
        };
        let dim = config.dim(stage);
        let block = |index: i64| {
            let shape = BlockShape {
                name: format!("layers.{stage}.blocks.{index}"),
                dim,
                hidden: config.hidden(stage),
                num_heads: config.num_heads[stage],
                activation: MlpActivation::Gelu,
                causal: false,
                qkv_bias: config.qkv_bias,
                layer_scale: false,
                norm_placement: config.norm_placement,
                norms: NormKind::layer_norm(config.norm_eps),
                proj_bias: true,
                attention_norm: false,
                mlp_norm: false,
                rotary: None,
                grid_pairs: None,
            };
            let bias = config.continuous_bias.as_ref();
            let windows = WindowShape {
                windows: config.windows(stage, index % 2 == 1),
                continuous_bias: bias
                    .map(|bias| (bias.hidden_dim, bias.pretrained_window_sizes[stage])),
                cosine: config.cosine_attention,
                apart: config.mask_score,
            };
            Block::build(&shape, Some(&windows), weights)
        };
        let blocks = (0..config.depths[stage]).map(block).collect::<Result<_>>()?;
        let layout = TokenLayout { prefix: 0, grid: config.grid(stage) };
        Ok(Stage { merging, blocks, layout })
    }
}

impl Merging {
    fn build(config: &SwinConfig, stage: usize, weights: &mut Weights) -> Result<Self> {
        let (inputs, outputs) = (4 * config.dim(stage - 1), config.dim(stage));
        let name = |part: &str| format!("layers.{stage}.downsample.{part}");
        Ok(Merging {
            norm_placement: config.norm_placement,
            norm: weights.norm(&name("norm"), config.merge_norm_dim(stage), config.norm_eps)?,
            reduction: weights.linear(&name("reduction"), inputs, outputs, config.merge_bias)?,
        })
    }

    /// Computes `[B, N / 4, 2C]` from `[B, N, C]` on `grid`.
    fn forward(
        &self,
        stage: usize,
        tokens: &Tensor,
        grid: (i64, i64),
        hooks: &Hooks,
    ) -> Result<Tensor> {
        let fours = side_by_side(tokens, grid)?;
        let norm = |x: &Tensor| hooks.norm(Layer::MergeNorm(stage), &self.norm, x);
        let reduce = |x: &Tensor| hooks.linear(Layer::Merge(stage), &self.reduction, x);
        match self.norm_placement {
            NormPlacement::Before => reduce(&norm(&fours)?),
            NormPlacement::After => norm(&reduce(&fours)?),
        }
    }
}
