//! How a backbone expects its images.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How an image becomes pixels of the size that a backbone accepts, and the numbers that the
/// backbone was trained on.
///
/// An image is resized as [`Preprocessing::resize`] says with the filter
/// [`Preprocessing::interpolation`]; a pixel x in `[0, 1]` then becomes `(x - mean) / std`, channel
/// by channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocessing {
    /// Height and width in pixels.
    pub image_size: (i64, i64),
    /// How an image of another size becomes one of this size.
    pub resize: ResizeMode,
    /// The filter of the resize, with antialiasing, as in Pillow.
    pub interpolation: Resampling,
    /// Mean of red, green and blue.
    pub mean: [f32; 3],
    /// Standard deviation of red, green and blue.
    pub std: [f32; 3],
    /// Where these values come from.
    pub source: PreprocessingSource,
}

/// How an image of another size becomes one of the backbone's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ResizeMode {
    /// Both sides are resized; the aspect ratio changes. The published Convpass protocol.
    Squash,
    /// The shorter side becomes `shorter_side` pixels, and the centre is cut out.
    CenterCrop {
        /// Pixels of the shorter side before the crop.
        shorter_side: i64,
    },
}

/// The filter of a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Resampling {
    /// Pillow's `BILINEAR`.
    Bilinear,
    /// Pillow's `BICUBIC`.
    Bicubic,
}

/// Where a [`Preprocessing`] comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PreprocessingSource {
    /// A file of this name beside the weights, such as `preprocessor_config.json`.
    File(String),
    /// The usual values of the backbone's family.
    Family(String),
    /// The caller, who set a field.
    Caller,
}

impl fmt::Display for PreprocessingSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PreprocessingSource::File(name) => f.write_str(name),
            PreprocessingSource::Family(family) => write!(f, "the usual values of a {family}"),
            PreprocessingSource::Caller => f.write_str("the caller"),
        }
    }
}

impl fmt::Display for Preprocessing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (height, width) = self.image_size;
        let resize = match self.resize {
            ResizeMode::Squash => "squashed".to_owned(),
            ResizeMode::CenterCrop { shorter_side } => {
                format!("shorter side {shorter_side}, centre crop")
            }
        };
        let filter = match self.interpolation {
            Resampling::Bilinear => "bilinear",
            Resampling::Bicubic => "bicubic",
        };
        let (mean, std) = (self.mean, self.std);
        write!(
            f,
            "{height}x{width} {resize}, {filter}, mean {mean:?}, std {std:?} ({})",
            self.source
        )
    }
}

/// The mean and the standard deviation of ImageNet-1k.
pub(crate) const IMAGENET: ([f32; 3], [f32; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);

/// The mean and the standard deviation of CLIP's training images.
pub(crate) const CLIP: ([f32; 3], [f32; 3]) =
    ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]);
