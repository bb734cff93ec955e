//! ConvNeXt and ConvNeXt V2: blocks of a depthwise convolution and an MLP, on a grid that is halved from stage to
//! stage.

mod config;
mod norm;
mod presets;
mod stem;

use tch::Tensor;

use super::weights::Weights;
use super::{BlockPass, Frozen, Hooks, ImageSize, Network, Stream, locate, total};
use crate::error::Result;
use crate::nn::{Conv, Linear, Mlp, MlpActivation, Weight};
use crate::seam::TokenLayout;

pub use config::{ConvNeXtConfig, ConvNeXtStem};
use norm::ChannelNorm;
pub use norm::ConvNeXtNorm;
use stem::StemLayers;

/// A ConvNeXt (Liu et al., arXiv 2201.03545) or ConvNeXt V2 (arXiv 2301.00808) with frozen pretrained weights, the backbone without
/// attention for comparisons. No method can act inside it; only `LinearProbe` and `Full` are
/// possible.
pub type FrozenConvNeXt = Frozen<ConvNeXtConfig>;

/// The layers of a [`FrozenConvNeXt`].
#[derive(Clone, Debug)]
pub struct Layers {
    stem: StemLayers,
    stages: Vec<Stage>,
    norm: ChannelNorm,
    head: Option<Linear>,
}

#[derive(Clone, Debug)]
struct Stage {
    downsample: Option<(ChannelNorm, Conv)>,
    blocks: Vec<Block>,
}

#[derive(Clone, Debug)]
struct Block {
    conv: Conv,
    norm: ChannelNorm,
    mlp: Mlp,
    response: Option<ResponseNorm>,
    gamma: Option<Weight>,
}

impl Network for ConvNeXtConfig {
    const FAMILY: &'static str = "ConvNeXt";

    type Layers = Layers;

    fn layers(&self, weights: &mut Weights) -> Result<Layers> {
        self.validate()?;
        let (last, eps) = (self.last_dim(), self.final_norm_eps.unwrap_or(self.norm_eps));
        let norm = if self.norm_before_pooling { "norm_pre" } else { "head.norm" };
        Ok(Layers {
            stem: StemLayers::build(self, weights)?,
            stages: (0..self.dims.len())
                .map(|stage| Stage::build(self, stage, weights))
                .collect::<Result<_>>()?,
            norm: ChannelNorm::build(self, norm, last, eps, weights)?,
            head: match self.head_dim {
                Some(dim) => Some(weights.linear("head.pre_logits.fc", last, dim, true)?),
                None => None,
            },
        })
    }

    fn num_blocks(&self) -> usize {
        total(&self.depths)
    }

    fn embed(&self, layers: &Layers, images: &Tensor, _: &Hooks) -> Result<Stream> {
        let tokens = layers.stem.forward(images)?;
        Ok(Stream { tokens, layout: NO_TOKENS })
    }

    fn block(&self, layers: &Layers, stream: Stream, pass: &BlockPass) -> Result<Stream> {
        let (stage, within) = locate(&self.depths, pass.block)?;
        let stage = &layers.stages[stage];
        let mut x = stream.tokens;
        if let Some((norm, conv)) = stage.downsample.as_ref().filter(|_| within == 0) {
            x = conv.forward(&norm.forward_map(&x)?)?;
        }
        let branch = pass.drop_path.draw(&x, pass.hooks.train())?;
        if !branch.is_empty() {
            x = branch.add(&x, &stage.blocks[within].forward(&branch.select(&x)?)?)?;
        }
        Ok(Stream { tokens: x, layout: NO_TOKENS })
    }

    fn pool(&self, layers: &Layers, stream: Stream, _: &Hooks) -> Result<Tensor> {
        let mean = |x: &Tensor| x.f_mean_dim([2i64, 3].as_slice(), false, x.kind());
        let x = if self.norm_before_pooling {
            mean(&layers.norm.forward_map(&stream.tokens)?)?
        } else {
            layers.norm.forward(&mean(&stream.tokens)?)?
        };
        match &layers.head {
            Some(head) => Ok(head.forward(&x)?.f_gelu("none")?),
            None => Ok(x),
        }
    }

    /// Applies the norm at every position of the last map.
    fn patch_map(&self, layers: &Layers, stream: Stream, _: &Hooks) -> Result<Tensor> {
        layers.norm.forward_map(&stream.tokens)
    }

    fn feature_dim(&self) -> i64 {
        self.head_dim.unwrap_or(self.last_dim())
    }

    fn image_size(&self) -> ImageSize {
        let halvings = self.dims.len().saturating_sub(1).min(32);
        ImageSize::From(self.patch_size.saturating_mul(1 << halvings))
    }

    fn choices(&self) -> String {
        let eps = self.norm_eps;
        let last = self.final_norm_eps.filter(|&last| last != eps);
        let last = last.map(|last| format!(" final_eps={last:e}")).unwrap_or_default();
        let activation = match self.activation {
            // The text of earlier versions, which the digest covers.
            MlpActivation::Gelu => String::new(),
            activation => format!(" {activation:?}"),
        };
        // What the names and shapes of the weights do not show.
        let norm = match self.norm {
            ConvNeXtNorm::Deviation => " norm by deviation",
            ConvNeXtNorm::Layer | ConvNeXtNorm::Rms => "",
        };
        format!("convnext eps={eps:e}{last}{activation}{norm}")
    }
}

/// The layout of a map, which has no token sequence.
const NO_TOKENS: TokenLayout = TokenLayout { prefix: 0, grid: (0, 0) };

impl Stage {
    fn build(config: &ConvNeXtConfig, stage: usize, weights: &mut Weights) -> Result<Self> {
        let (c, k, hidden) = (config.dims[stage], config.kernel(stage), config.hidden(stage));
        let eps = config.norm_eps;
        let downsample = match stage.checked_sub(1) {
            None => None,
            Some(before) => {
                let (before, name) = (config.dims[before], format!("stages.{stage}.downsample"));
                Some((
                    ChannelNorm::build(config, &format!("{name}.0"), before, eps, weights)?,
                    weights.conv(&format!("{name}.1"), &[c, before, 2, 2], 2, 0)?,
                ))
            }
        };
        let block = |index: i64| {
            let name = |part: &str| format!("stages.{stage}.blocks.{index}.{part}");
            Ok(Block {
                conv: weights.conv(&name("conv_dw"), &[c, 1, k, k], 1, k / 2)?,
                norm: ChannelNorm::build(config, &name("norm"), c, eps, weights)?,
                mlp: Mlp {
                    fc1: weights.linear(&name("mlp.fc1"), c, hidden, true)?,
                    fc2: weights.linear(&name("mlp.fc2"), hidden, c, true)?,
                    activation: config.activation,
                },
                response: if config.response_norm {
                    Some(ResponseNorm::build(&name("mlp.grn"), hidden, weights)?)
                } else {
                    None
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
        let x = self.mlp.activate(&self.mlp.fc1.forward(&x)?)?;
        let x = match &self.response {
            Some(response) => response.forward(&x)?,
            None => x,
        };
        let x = self.mlp.fc2.forward(&x)?;
        let x = match &self.gamma {
            Some(gamma) => x.f_mul(gamma)?,
            None => x,
        };
        Ok(x.f_permute([0, 3, 1, 2])?)
    }
}

/// The global response norm of ConvNeXt V2.
#[derive(Clone, Debug)]
struct ResponseNorm {
    weight: Weight,
    bias: Weight,
}

/// Added to the mean of the lengths of all channels.
const RESPONSE_EPS: f64 = 1e-6;

impl ResponseNorm {
    fn build(name: &str, dim: i64, weights: &mut Weights) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"), &[dim])?;
        Ok(ResponseNorm { weight, bias: weights.get(&format!("{name}.bias"), &[dim])? })
    }

    /// Computes `[B, H, W, C] -> [B, H, W, C]`. Each channel is weighted by its length over all
    /// positions, divided by the mean length of all channels.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let lengths = x.f_norm_scalaropt_dim(2.0, [1i64, 2].as_slice(), true)?;
        let mean = lengths.f_mean_dim(-1i64, true, lengths.kind())?;
        let share = lengths.f_div(&mean.f_add_scalar(RESPONSE_EPS)?)?;
        let scaled = x.f_mul(&share)?.f_mul(&self.weight.beside(x)?)?;
        Ok(x.f_add(&scaled)?.f_add(&self.bias.beside(x)?)?)
    }
}
