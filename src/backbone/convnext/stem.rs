//! The layers of a ConvNeXt between the images and the first stage.

use tch::Tensor;

use super::norm::ChannelNorm;
use super::{ConvNeXtConfig, ConvNeXtStem};
use crate::backbone::Weights;
use crate::error::Result;
use crate::nn::{Conv, MlpActivation};

/// The stem: one convolution or two, and a norm.
#[derive(Clone, Debug)]
pub(super) struct StemLayers {
    convolutions: Vec<Conv>,
    /// Applied between the convolutions.
    activation: Option<MlpActivation>,
    norm: ChannelNorm,
}

impl StemLayers {
    /// Builds the stem with timm's names, which count the activation.
    pub(super) fn build(config: &ConvNeXtConfig, weights: &mut Weights) -> Result<Self> {
        let (first, patch) = (config.dims[0], config.patch_size);
        let mut activation = None;
        let (convolutions, norm) = match config.stem {
            ConvNeXtStem::Patch => {
                (vec![weights.conv("stem.0", &[first, 3, patch, patch], patch, 0)?], "stem.1")
            }
            ConvNeXtStem::Overlapping { hidden_dim, activation: has_activation } => {
                activation = has_activation.then_some(config.activation);
                let (second, norm) =
                    if has_activation { ("stem.2", "stem.3") } else { ("stem.1", "stem.2") };
                let convolutions = vec![
                    weights.conv("stem.0", &[hidden_dim, 3, 3, 3], 2, 1)?,
                    weights.conv(second, &[first, hidden_dim, 3, 3], 2, 1)?,
                ];
                (convolutions, norm)
            }
        };
        let norm = ChannelNorm::build(config, norm, first, config.norm_eps, weights)?;
        Ok(StemLayers { convolutions, activation, norm })
    }

    /// Computes `[B, 3, H, W] -> [B, C, H / patch_size, W / patch_size]`. Two convolutions round the
    /// sides up, one rounds them down.
    pub(super) fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let mut x = images.shallow_clone();
        for (index, convolution) in self.convolutions.iter().enumerate() {
            if let (true, Some(activation)) = (index > 0, self.activation) {
                x = activation.apply(&x)?;
            }
            x = convolution.forward(&x)?;
        }
        self.norm.forward_map(&x)
    }
}
