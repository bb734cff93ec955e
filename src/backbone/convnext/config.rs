//! The config of ConvNeXt.

use serde::{Deserialize, Serialize};

use crate::backbone::{BackboneConfig, Network, hidden, total};
use crate::error::{Error, Result};
use crate::nn::MlpActivation;
use crate::seam::{BackboneShape, Place};

/// The shape and the settings of a [`FrozenConvNeXt`](crate::FrozenConvNeXt).
///
/// The default is ConvNeXt-T. It accepts images of any size whose sides have at least `patch_size *
/// 2^(stages - 1)` pixels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConvNeXtConfig {
    /// Side of the stem's patches in pixels.
    pub patch_size: i64,
    /// C of each stage.
    pub dims: Vec<i64>,
    /// Number of blocks of each stage.
    pub depths: Vec<i64>,
    /// Side of the depthwise convolution's kernel, an odd number.
    pub kernel_size: i64,
    /// Width between the two linear layers of the MLP divided by C. The width is rounded down.
    pub mlp_ratio: f64,
    /// Whether each block is followed by a learned factor for each channel.
    pub layer_scale: bool,
    /// The epsilon of every layer norm.
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
            dims: vec![96, 192, 384, 768],
            depths: vec![3, 3, 9, 3],
            kernel_size: 7,
            mlp_ratio: 4.0,
            layer_scale: true,
            norm_eps: 1e-6,
            final_norm_eps: None,
            activation: MlpActivation::Gelu,
        }
    }
}

/// The maximum of every dimension. It keeps products of dimensions within `i64`.
const MAX_DIM: i64 = 1 << 16;

impl ConvNeXtConfig {
    /// Returns the width between the layers of the MLP of a stage.
    pub(super) fn hidden(&self, stage: usize) -> i64 {
        hidden(self.dims[stage], self.mlp_ratio)
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
        if !(1..=63).contains(&self.kernel_size) || self.kernel_size % 2 == 0 {
            return Err(Error::config("kernel_size", "odd and within 1..=63", self.kernel_size));
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

    /// Returns the number of weights of a block.
    fn block_params(&self, stage: usize) -> i64 {
        let (c, hidden, k) = (self.dims[stage], self.hidden(stage), self.kernel_size);
        let scale = if self.layer_scale { c } else { 0 };
        (k * k + 1) * c + 2 * c + 2 * c * hidden + hidden + c + scale
    }

    fn num_params(&self) -> i64 {
        let (first, last) = (self.dims[0], self.feature_dim());
        let stem = (3 * self.patch_size * self.patch_size + 1) * first + 2 * first;
        let downsample = |pair: &[i64]| 2 * pair[0] + (4 * pair[0] + 1) * pair[1];
        let downsamples: i64 = self.dims.windows(2).map(downsample).sum();
        let depths = self.depths.iter().enumerate();
        let blocks: i64 = depths.map(|(stage, &depth)| depth * self.block_params(stage)).sum();
        stem + downsamples + blocks + 2 * last
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
