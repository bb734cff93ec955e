//! Augmentation: random changes of training images, as timm 1.0.31 defines them and Pillow computes
//! them.
//!
//! Drawing and computing are separate. First a crop, a flip or an [`ImageOp`] is drawn for an
//! image. Each of them is then a deterministic function of the image.

mod affine;
mod color;
mod crop;
mod op;
mod rand_augment;

use ndarray::{Array3, ArrayView3, Axis};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::resize::Resize;
use crate::error::{Error, Result};

pub use crop::RandomResizedCrop;
pub use op::ImageOp;
pub use rand_augment::RandAugment;

use affine::Sampling;
use op::Canvas;

/// The interpolation between pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Pillow's `BILINEAR`.
    Bilinear,
    /// Pillow's `BICUBIC`.
    #[default]
    Bicubic,
    /// Bilinear or bicubic, each with probability 0.5.
    Random,
}

impl Interpolation {
    fn draw_bicubic(self, rng: &mut impl Rng) -> bool {
        match self {
            Self::Bilinear => false,
            Self::Bicubic => true,
            Self::Random => rng.random::<f64>() < 0.5,
        }
    }
}

/// Random changes of brightness, contrast, saturation and hue, in random order: torchvision's
/// `ColorJitter`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ColorJitter {
    /// The range of the brightness factor, which is uniform from `1 - brightness` (at least 0) to
    /// `1 + brightness`.
    pub brightness: f64,
    /// The range of the contrast factor, as for brightness.
    pub contrast: f64,
    /// The range of the saturation factor, as for brightness.
    pub saturation: f64,
    /// The range of the hue shift, which is uniform from `-hue` to `hue` turns of the hue circle.
    /// At most 0.5.
    pub hue: f64,
}

impl Default for ColorJitter {
    /// Returns timm's `color_jitter = 0.4`, which does not change the hue.
    fn default() -> Self {
        ColorJitter { brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.0 }
    }
}

impl ColorJitter {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] if a value is negative, infinite or NaN, or if `hue` is above 0.5.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("ColorJitter"))
    }

    fn check(&self) -> Result<()> {
        let fields = [
            ("brightness", self.brightness, f64::MAX),
            ("contrast", self.contrast, f64::MAX),
            ("saturation", self.saturation, f64::MAX),
            ("hue", self.hue, 0.5),
        ];
        for (name, value, most) in fields {
            if !(0.0..=most).contains(&value) {
                let expected = if most < 1.0 { "from 0 to 0.5" } else { "0 or more" };
                return Err(Error::config(format!("color_jitter.{name}"), expected, value));
            }
        }
        Ok(())
    }

    /// Draws the operations for one image.
    fn draw(&self, rng: &mut impl Rng) -> Vec<ImageOp> {
        let mut between = |from: f64, to: f64| from + (to - from) * rng.random::<f64>();
        let mut factor = |range: f64| between((1.0 - range).max(0.0), 1.0 + range);
        let mut ops = Vec::new();
        if self.brightness > 0.0 {
            ops.push(ImageOp::Brightness(factor(self.brightness)));
        }
        if self.contrast > 0.0 {
            ops.push(ImageOp::Contrast(factor(self.contrast)));
        }
        if self.saturation > 0.0 {
            ops.push(ImageOp::Color(factor(self.saturation)));
        }
        if self.hue > 0.0 {
            ops.push(ImageOp::Hue(between(-self.hue, self.hue)));
        }
        ops.shuffle(rng);
        ops
    }
}

/// The augmentation of training images. Its steps are applied in the order of the fields; by
/// default there are none.
///
/// The result depends only on the image and on (seed, epoch, index of the image). It is the same on
/// any number of threads and in a resumed run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// A random crop in place of the whole image. A streamed dataset crops the image of the file. A
    /// dataset in memory crops the resized image.
    pub crop: Option<RandomResizedCrop>,
    /// The probability of a horizontal flip.
    pub flip: f64,
    /// Operations that are drawn at random.
    pub rand_augment: Option<RandAugment>,
    /// Random changes of the colours.
    pub color_jitter: Option<ColorJitter>,
}

impl Augment {
    /// Returns the paper's augmentation for few-shot learning: RandAugment and colour jitter.
    /// timm's `create_transform` leaves out colour jitter if RandAugment is set, unless it is
    /// forced.
    pub fn few_shot() -> Self {
        Augment {
            rand_augment: Some(RandAugment::default()),
            color_jitter: Some(ColorJitter::default()),
            ..Augment::default()
        }
    }

    /// Returns the paper's augmentation for domain generalization: a random resized crop, and a
    /// horizontal flip with probability 0.5.
    pub fn domain_generalization() -> Self {
        Augment { crop: Some(RandomResizedCrop::default()), flip: 0.5, ..Augment::default() }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Config`] if a value is out of its range.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("Augment"))
    }

    fn check(&self) -> Result<()> {
        check_probability("flip", self.flip)?;
        self.crop.as_ref().map_or(Ok(()), RandomResizedCrop::validate)?;
        self.rand_augment.as_ref().map_or(Ok(()), RandAugment::validate)?;
        self.color_jitter.as_ref().map_or(Ok(()), ColorJitter::validate)
    }

    /// Augments an RGB u8 image `[H, W, 3]`, which is image `index` of a dataset in `epoch` of a
    /// run with `seed`.
    ///
    /// The output has the size of `resize`. Without a crop, the image is resized with `resize`.
    ///
    /// # Errors
    /// The errors of [`Augment::validate`] and [`Resize::apply`].
    pub fn apply(
        &self,
        image: ArrayView3<u8>,
        resize: Resize,
        (seed, epoch, index): (i64, i64, usize),
    ) -> Result<Array3<u8>> {
        self.validate()?;
        let mut rng = generator(seed, epoch, index);
        let mut image = match &self.crop {
            Some(crop) if !image.is_empty() => crop.apply(image, resize.image_size(), &mut rng)?,
            _ => resize.apply(image)?,
        };
        if rng.random::<f64>() < self.flip {
            image.invert_axis(Axis(1));
            image = image.as_standard_layout().into_owned();
        }
        for (op, canvas) in self.rand_augment.iter().flat_map(|ops| ops.draw(&mut rng)) {
            image = op.of(image, canvas);
        }
        // Colour operations do not move pixels, so they do not use the canvas.
        let canvas = Canvas { sampling: Sampling::Bilinear, fill: [0; 3] };
        for op in self.color_jitter.iter().flat_map(|jitter| jitter.draw(&mut rng)) {
            image = op.of(image, canvas);
        }
        Ok(image)
    }
}

fn check_probability(field: &str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        Ok(())
    } else {
        Err(Error::config(field, "from 0 to 1", value))
    }
}

/// Creates the random generator of one image in one epoch.
fn generator(seed: i64, epoch: i64, index: usize) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    key[16..24].copy_from_slice(&(index as u64).to_le_bytes());
    key[24..].copy_from_slice(b"augment\0");
    ChaCha8Rng::from_seed(key)
}

#[cfg(test)]
mod tests;
