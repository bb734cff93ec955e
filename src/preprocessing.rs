//! The image preprocessing that a backbone expects.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How to turn an image into the input of a backbone.
///
/// An image is resized to [`Preprocessing::image_size`] by [`Preprocessing::resize`] with the
/// filter [`Preprocessing::interpolation`]. A pixel x in `[0, 1]` then becomes `(x - mean) / std`
/// in each channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocessing {
    /// Height and width in pixels.
    pub image_size: (i64, i64),
    /// How to resize an image of another size.
    pub resize: ResizeMode,
    /// The filter of the resize, with antialiasing as in Pillow.
    pub interpolation: Resampling,
    /// Mean of red, green and blue.
    pub mean: [f32; 3],
    /// Standard deviation of red, green and blue.
    pub std: [f32; 3],
    /// Whether an image is turned as its EXIF orientation says before it is resized. Files of
    /// versions that had no such field were made by programs that never turned images, and are read
    /// as [`Orientation::Stored`].
    #[serde(default = "Orientation::stored", skip_serializing_if = "Orientation::is_stored")]
    pub orientation: Orientation,
    /// Origin of these values.
    pub source: PreprocessingSource,
}

/// How to resize an image to the size of the backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ResizeMode {
    /// Resizes both sides, which changes the aspect ratio. The published Convpass protocol does
    /// this.
    Squash,
    /// Resizes the shorter side to `shorter_side` pixels, then crops the center.
    CenterCrop {
        /// Length of the shorter side in pixels before the crop.
        shorter_side: i64,
    },
}

/// The interpolation filter of a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Resampling {
    /// Pillow's `BILINEAR`.
    Bilinear,
    /// Pillow's `BICUBIC`.
    Bicubic,
}

/// What is done with the EXIF orientation of an image file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Orientation {
    /// The image is turned or mirrored as the file says, so that it stands as people see it. This
    /// is Pillow's `ImageOps.exif_transpose`.
    #[default]
    Exif,
    /// The image is used as its pixels are stored, as `Image.open` of Pillow and torchvision do.
    Stored,
}

impl Orientation {
    /// Returns [`Orientation::Stored`], which is the value of a file that does not say it.
    pub(crate) fn stored() -> Self {
        Self::Stored
    }

    /// Returns whether images are used as they are stored.
    pub fn is_stored(&self) -> bool {
        *self == Self::Stored
    }
}

/// The origin of a [`Preprocessing`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PreprocessingSource {
    /// A file with this name beside the weights, such as `preprocessor_config.json`.
    File(String),
    /// The usual values of the backbone's family.
    Family(String),
    /// The caller, who changed a field.
    Caller,
}

impl Preprocessing {
    /// Returns this preprocessing for images of another size. The shorter side before a crop is
    /// scaled with the longest side of the image.
    pub fn for_size(mut self, image_size: (i64, i64)) -> Self {
        let longest = |(rows, columns): (i64, i64)| rows.max(columns).max(1) as f64;
        if let ResizeMode::CenterCrop { shorter_side } = &mut self.resize {
            let grown = longest(image_size) / longest(self.image_size);
            *shorter_side = (*shorter_side as f64 * grown).round() as i64;
        }
        self.image_size = image_size;
        self
    }
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

/// The mean and the standard deviation that map `0..=1` to `-1..=1`, as SigLIP uses them.
pub(crate) const HALF: ([f32; 3], [f32; 3]) = ([0.5; 3], [0.5; 3]);

/// The mean and the standard deviation of CLIP's training images.
pub(crate) const CLIP: ([f32; 3], [f32; 3]) =
    ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]);
