//! The config of ConvNeXt and ConvNeXt V2.

use serde::{Deserialize, Serialize};

use super::ConvNeXtNorm;
use crate::backbone::{BackboneConfig, Network, hidden, total};
use crate::error::{Error, Result};
use crate::nn::MlpActivation;
use crate::seam::{BackboneShape, Place};

/// The shape and the settings of a [`FrozenConvNeXt`](crate::FrozenConvNeXt).
///
/// The default is ConvNeXt-T. A ConvNeXt V2 (Woo et al., arXiv 2301.00808) has a global response norm
/// and no layer scale. The backbone accepts images of any size whose sides have at least `patch_size *
/// 2^(stages - 1)` pixels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConvNeXtConfig {
    /// Side of the stem's patches in pixels.
    pub patch_size: i64,
    /// The layers between the images and the first stage.
    #[serde(skip_serializing_if = "ConvNeXtStem::is_patch")]
    pub stem: ConvNeXtStem,
    /// C of each stage.
    pub dims: Vec<i64>,
    /// Number of blocks of each stage.
    pub depths: Vec<i64>,
    /// Side of the depthwise convolution's kernel, an odd number.
    pub kernel_size: i64,
    /// The same for each stage, if it is not that of all stages; otherwise empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kernel_sizes: Vec<i64>,
    /// Width between the two linear layers of the MLP divided by C. The width is rounded down.
    pub mlp_ratio: f64,
    /// Whether each block is followed by a learned factor for each channel.
    pub layer_scale: bool,
    /// Whether there is a global response norm between the activation and the second layer of the
    /// MLP (ConvNeXt V2): `x + bias + weight * x * g / (mean(g) + 1e-6)`, where `g` is the length of
    /// a channel over all positions.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub response_norm: bool,
    /// Every norm of the backbone.
    #[serde(skip_serializing_if = "ConvNeXtNorm::is_layer")]
    pub norm: ConvNeXtNorm,
    /// Whether the last norm is before the pooling instead of after it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub norm_before_pooling: bool,
    /// Width of a linear layer after the last norm, which is followed by exact GELU and gives the
    /// features; `None` if there is no such layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<i64>,
    /// The epsilon of every norm.
    pub norm_eps: f64,
    /// The epsilon of the layer norm after the pooling; `norm_eps` if `None`. Hugging Face's models
    /// have another one there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_norm_eps: Option<f64>,
    /// The activation of the MLP, which is not packed.
    pub activation: MlpActivation,
}

impl Default for ConvNeXtConfig {
    fn default() -> Self {
        ConvNeXtConfig {
            patch_size: 4,
            stem: ConvNeXtStem::Patch,
            dims: vec![96, 192, 384, 768],
            depths: vec![3, 3, 9, 3],
            kernel_size: 7,
            kernel_sizes: Vec::new(),
            mlp_ratio: 4.0,
            layer_scale: true,
            response_norm: false,
            norm: ConvNeXtNorm::Layer,
            norm_before_pooling: false,
            head_dim: None,
            norm_eps: 1e-6,
            final_norm_eps: None,
            activation: MlpActivation::Gelu,
        }
    }
}

/// The layers of a [`ConvNeXtConfig`] between the images and the first stage, before a norm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConvNeXtStem {
    /// A convolution over patches that do not overlap.
    #[default]
    Patch,
    /// Two convolutions over 3x3 pixels with a stride of 2. The `patch_size` of the config is then 4.
    Overlapping {
        /// Channels between the two convolutions.
        hidden_dim: i64,
        /// Whether the activation of the config is between them.
        activation: bool,
    },
}

impl ConvNeXtStem {
    fn is_patch(&self) -> bool {
        *self == ConvNeXtStem::Patch
    }
}

/// The maximum of every dimension. It keeps products of dimensions within `i64`.
const MAX_DIM: i64 = 1 << 16;

impl ConvNeXtConfig {
    /// Returns the width between the layers of the MLP of a stage.
    pub(super) fn hidden(&self, stage: usize) -> i64 {
        hidden(self.dims[stage], self.mlp_ratio)
    }

    /// Returns the side of the depthwise convolution's kernel in a stage.
    pub(super) fn kernel(&self, stage: usize) -> i64 {
        self.kernel_sizes.get(stage).copied().unwrap_or(self.kernel_size)
    }

    /// Returns the width of the last stage.
    pub(super) fn last_dim(&self) -> i64 {
        self.dims.last().copied().unwrap_or_default()
    }

    /// Checks that the config is valid.
    ///
    /// # Errors
    /// [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("ConvNeXtConfig"))
    }

    fn check(&self) -> Result<()> {
        let within = |field: String, value: i64| {
            if (1..=MAX_DIM).contains(&value) {
                return Ok(());
            }
            Err(Error::config(field, format!("within 1..={MAX_DIM}"), value))
        };
        within("patch_size".to_owned(), self.patch_size)?;
        let stages = self.dims.len();
        if !(1..=16).contains(&stages) {
            return Err(Error::config("dims", "of 1..=16 stages", stages));
        }
        if self.depths.len() != stages {
            return Err(Error::config("depths", format!("of {stages} stages"), self.depths.len()));
        }
        let blocks = i64::try_from(total(&self.depths)).unwrap_or(i64::MAX);
        within("number of blocks".to_owned(), blocks)?;
        self.check_kernels()?;
        within("head_dim".to_owned(), self.head_dim.unwrap_or(1))?;
        if let ConvNeXtStem::Overlapping { hidden_dim, .. } = self.stem {
            within("stem.hidden_dim".to_owned(), hidden_dim)?;
            if self.patch_size != 4 {
                let expected = "4 for an overlapping stem";
                return Err(Error::config("patch_size", expected, self.patch_size));
            }
        }
        for (stage, (&dim, &depth)) in self.dims.iter().zip(&self.depths).enumerate() {
            within(format!("dims.{stage}"), dim)?;
            within(format!("depths.{stage}"), depth)?;
            if !(1..=MAX_DIM).contains(&self.hidden(stage)) {
                let expected = format!("such that widths are within 1..={MAX_DIM}");
                return Err(Error::config("mlp_ratio", expected, self.mlp_ratio));
            }
        }
        let final_eps = self.final_norm_eps.map(|eps| ("final_norm_eps", eps));
        for (field, eps) in [("norm_eps", self.norm_eps)].into_iter().chain(final_eps) {
            if !(eps.is_finite() && eps > 0.0) {
                return Err(Error::config(field, "a positive number", eps));
            }
        }
        if self.activation == MlpActivation::SwiGlu {
            let expected = "an activation without a gate";
            return Err(Error::config("activation", expected, format!("{:?}", self.activation)));
        }
        Ok(())
    }

    /// Checks the sides of the depthwise convolutions' kernels.
    fn check_kernels(&self) -> Result<()> {
        let stages = self.dims.len();
        if ![0, stages].contains(&self.kernel_sizes.len()) {
            let expected = format!("empty or of {stages} stages");
            return Err(Error::config("kernel_sizes", expected, self.kernel_sizes.len()));
        }
        for &kernel in [self.kernel_size].iter().chain(&self.kernel_sizes) {
            if !(1..=63).contains(&kernel) || kernel % 2 == 0 {
                return Err(Error::config("kernel_size", "odd and within 1..=63", kernel));
            }
        }
        Ok(())
    }

    /// Returns the number of weights of a block.
    fn block_params(&self, stage: usize) -> i64 {
        let (c, hidden, k) = (self.dims[stage], self.hidden(stage), self.kernel(stage));
        let scale = if self.layer_scale { c } else { 0 };
        let response = if self.response_norm { 2 * hidden } else { 0 };
        let norm = self.norm.num_params(c);
        (k * k + 1) * c + norm + 2 * c * hidden + hidden + c + scale + response
    }

    /// Returns the number of weights of the stem.
    fn stem_params(&self) -> i64 {
        let first = self.dims[0];
        let convolutions = match self.stem {
            ConvNeXtStem::Patch => (3 * self.patch_size * self.patch_size + 1) * first,
            ConvNeXtStem::Overlapping { hidden_dim, .. } => {
                (3 * 9 + 1) * hidden_dim + (hidden_dim * 9 + 1) * first
            }
        };
        convolutions + self.norm.num_params(first)
    }

    fn num_params(&self) -> i64 {
        let last = self.last_dim();
        let downsample = |pair: &[i64]| self.norm.num_params(pair[0]) + (4 * pair[0] + 1) * pair[1];
        let downsamples: i64 = self.dims.windows(2).map(downsample).sum();
        let depths = self.depths.iter().enumerate();
        let blocks: i64 = depths.map(|(stage, &depth)| depth * self.block_params(stage)).sum();
        let head = self.norm.num_params(last) + self.head_dim.map_or(0, |dim| (last + 1) * dim);
        self.stem_params() + downsamples + blocks + head
    }
}

impl BackboneConfig for ConvNeXtConfig {
    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn shape(&self) -> Result<BackboneShape> {
        self.validate()?;
        Ok(BackboneShape {
            family: Self::FAMILY,
            lacks: &[(Place::Blocks, "its blocks are convolutions, without attention")],
            block_dims: Vec::new(),
            layers: Vec::new(),
            other_biases: 0,
            other_norms: 0,
            num_params: self.num_params(),
            num_feature_params: self.num_params(),
        })
    }
}
