//! ConvNeXt: blocks of a depthwise convolution and an MLP, on a grid that is halved from stage to
//! stage.

mod config;
mod presets;

use tch::Tensor;

use super::weights::Weights;
use super::{BlockPass, Frozen, Hooks, ImageSize, Network, Stream, locate, total};
use crate::error::Result;
use crate::nn::{Conv, Mlp, MlpActivation, Norm, Weight};
use crate::seam::TokenLayout;

pub use config::ConvNeXtConfig;

/// A ConvNeXt (Liu et al., arXiv 2201.03545) with frozen pretrained weights, the backbone without
/// attention for comparisons. No method can act inside it; only `LinearProbe` and `Full` are
/// possible.
pub type FrozenConvNeXt = Frozen<ConvNeXtConfig>;

/// The layers of a [`FrozenConvNeXt`].
#[derive(Clone, Debug)]
pub struct Layers {
    stem: Conv,
    stem_norm: Norm,
    stages: Vec<Stage>,
    norm: Norm,
}

#[derive(Clone, Debug)]
struct Stage {
    downsample: Option<(Norm, Conv)>,
    blocks: Vec<Block>,
}

#[derive(Clone, Debug)]
struct Block {
    conv: Conv,
    norm: Norm,
    mlp: Mlp,
    gamma: Option<Weight>,
}

impl Network for ConvNeXtConfig {
    const FAMILY: &'static str = "ConvNeXt";

    type Layers = Layers;

    fn layers(&self, weights: &mut Weights) -> Result<Layers> {
        self.validate()?;
        let (first, patch) = (self.dims[0], self.patch_size);
        Ok(Layers {
            stem: weights.conv("stem.0", &[first, 3, patch, patch], patch, 0)?,
            stem_norm: weights.norm("stem.1", first, self.norm_eps)?,
            stages: (0..self.dims.len())
                .map(|stage| Stage::build(self, stage, weights))
                .collect::<Result<_>>()?,
            norm: weights.norm(
                "head.norm",
                self.feature_dim(),
                self.final_norm_eps.unwrap_or(self.norm_eps),
            )?,
        })
    }

    fn num_blocks(&self) -> usize {
        total(&self.depths)
    }

    fn embed(&self, layers: &Layers, images: &Tensor, _: &Hooks) -> Result<Stream> {
        let tokens = norm_channels(&layers.stem_norm, &layers.stem.forward(images)?)?;
        Ok(Stream { tokens, layout: NO_TOKENS })
    }

    fn block(&self, layers: &Layers, stream: Stream, pass: &BlockPass) -> Result<Stream> {
        let (stage, within) = locate(&self.depths, pass.block)?;
        let stage = &layers.stages[stage];
        let mut x = stream.tokens;
        if let Some((norm, conv)) = stage.downsample.as_ref().filter(|_| within == 0) {
            x = conv.forward(&norm_channels(norm, &x)?)?;
        }
        let branch = pass.drop_path.draw(&x, pass.hooks.train())?;
        if !branch.is_empty() {
            x = branch.add(&x, &stage.blocks[within].forward(&branch.select(&x)?)?)?;
        }
        Ok(Stream { tokens: x, layout: NO_TOKENS })
    }

    fn pool(&self, layers: &Layers, stream: Stream, _: &Hooks) -> Result<Tensor> {
        let x = stream.tokens;
        layers.norm.forward(&x.f_mean_dim([2i64, 3].as_slice(), false, x.kind())?)
    }

    /// Applies the norm at every position of the last map.
    fn patch_map(&self, layers: &Layers, stream: Stream, _: &Hooks) -> Result<Tensor> {
        norm_channels(&layers.norm, &stream.tokens)
    }

    fn feature_dim(&self) -> i64 {
        self.dims.last().copied().unwrap_or_default()
    }

    fn image_size(&self) -> ImageSize {
        let halvings = self.dims.len().saturating_sub(1).min(32);
        ImageSize::From(self.patch_size.saturating_mul(1 << halvings))
    }

    fn choices(&self) -> String {
        let eps = self.norm_eps;
        let last = self.final_norm_eps.filter(|&last| last != eps);
        let last = last.map(|last| format!(" final_eps={last:e}")).unwrap_or_default();
        match self.activation {
            // The text of earlier versions, which the digest covers.
            MlpActivation::Gelu => format!("convnext eps={eps:e}{last}"),
            activation => format!("convnext eps={eps:e}{last} {activation:?}"),
        }
    }
}

/// The layout of a map, which has no token sequence.
const NO_TOKENS: TokenLayout = TokenLayout { prefix: 0, grid: (0, 0) };

/// Applies a layer norm over the channels of `[B, C, H, W]`.
fn norm_channels(norm: &Norm, x: &Tensor) -> Result<Tensor> {
    Ok(norm.forward(&x.f_permute([0, 2, 3, 1])?)?.f_permute([0, 3, 1, 2])?)
}

impl Stage {
    fn build(config: &ConvNeXtConfig, stage: usize, weights: &mut Weights) -> Result<Self> {
        let (c, k, hidden) = (config.dims[stage], config.kernel_size, config.hidden(stage));
        let downsample = match stage.checked_sub(1) {
            None => None,
            Some(before) => {
                let (before, name) = (config.dims[before], format!("stages.{stage}.downsample"));
                Some((
                    weights.norm(&format!("{name}.0"), before, config.norm_eps)?,
                    weights.conv(&format!("{name}.1"), &[c, before, 2, 2], 2, 0)?,
                ))
            }
        };
        let block = |index: i64| {
            let name = |part: &str| format!("stages.{stage}.blocks.{index}.{part}");
            Ok(Block {
                conv: weights.conv(&name("conv_dw"), &[c, 1, k, k], 1, k / 2)?,
                norm: weights.norm(&name("norm"), c, config.norm_eps)?,
                mlp: Mlp {
                    fc1: weights.linear(&name("mlp.fc1"), c, hidden, true)?,
                    fc2: weights.linear(&name("mlp.fc2"), hidden, c, true)?,
                    activation: config.activation,
                },
                gamma: weights.get_if(config.layer_scale, &name("gamma"), &[c])?,
            })
        };
        Ok(Stage {
            downsample,
            blocks: (0..config.depths[stage]).map(block).collect::<Result<_>>()?,
        })
    }
}

impl Block {
    /// Computes `[B, C, H, W] -> [B, C, H, W]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // [B, C, H, W] -> [B, H, W, C]
        let x = self.norm.forward(&self.conv.forward(x)?.f_permute([0, 2, 3, 1])?)?;
        let x = self.mlp.fc2.forward(&self.mlp.activate(&self.mlp.fc1.forward(&x)?)?)?;
        let x = match &self.gamma {
            Some(gamma) => x.f_mul(gamma)?,
            None => x,
        };
        Ok(x.f_permute([0, 3, 1, 2])?)
    }
}
