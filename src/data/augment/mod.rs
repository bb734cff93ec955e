//! Random changes of training images, as timm 1.0.31 defines them and as Pillow computes them.
//!
//! Chance and arithmetic are apart: what is drawn for an image is an [`ImageOp`], a part to cut
//! out, or a flip, and each of them is a function of the image alone.

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

/// How values between pixels are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Pillow's `BILINEAR`.
    Bilinear,
    /// Pillow's `BICUBIC`.
    #[default]
    Bicubic,
    /// One or the other, as likely.
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

/// Brightness, contrast, saturation and hue, each by a factor of its own and in random order:
/// torchvision's `ColorJitter`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ColorJitter {
    /// The factor is uniform from 1 minus this (at least 0) to 1 plus this.
    pub brightness: f64,
    /// As of brightness.
    pub contrast: f64,
    /// As of brightness.
    pub saturation: f64,
    /// Turns of the hue circle, uniform either way; at most 0.5.
    pub hue: f64,
}

impl Default for ColorJitter {
    /// timm's `color_jitter = 0.4`, which leaves the hue.
    fn default() -> Self {
        ColorJitter { brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.0 }
    }
}

impl ColorJitter {
    /// # Errors
    /// [`Error::Config`] for a value that is negative or no number, or a hue above 0.5.
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

    /// The operations for one image.
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

/// What is done to each training image, in this order; by default nothing.
///
/// What an image becomes is settled by (seed, epoch, index of the image) alone: it is the same on
/// any number of threads and in a run that is taken up again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// A random part in place of the whole image. It is cut out of what the dataset holds: of the
    /// file's image where images are decoded at each pass, of the resized one where they are kept.
    pub crop: Option<RandomResizedCrop>,
    /// Probability of a flip from left to right.
    pub flip: f64,
    /// Operations drawn from a table.
    pub rand_augment: Option<RandAugment>,
    /// Colours.
    pub color_jitter: Option<ColorJitter>,
}

impl Augment {
    /// The paper's for few-shot learning: RandAugment and colour jitter. (timm's
    /// `create_transform` leaves out the second where the first is asked for, unless forced.)
    pub fn few_shot() -> Self {
        Augment {
            rand_augment: Some(RandAugment::default()),
            color_jitter: Some(ColorJitter::default()),
            ..Augment::default()
        }
    }

    /// The paper's for domain generalization: a random resized crop and a flip of every second
    /// image.
    pub fn domain_generalization() -> Self {
        Augment { crop: Some(RandomResizedCrop::default()), flip: 0.5, ..Augment::default() }
    }

    /// # Errors
    /// [`Error::Config`] for a value that is out of its range.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("Augment"))
    }

    fn check(&self) -> Result<()> {
        check_probability("flip", self.flip)?;
        self.crop.as_ref().map_or(Ok(()), RandomResizedCrop::validate)?;
        self.rand_augment.as_ref().map_or(Ok(()), RandAugment::validate)?;
        self.color_jitter.as_ref().map_or(Ok(()), ColorJitter::validate)
    }

    /// What image `index` of a dataset becomes in `epoch` of the run of `seed`: `[H, W, 3]` RGB u8
    /// to the size that `resize` has, with its resize where there is no crop.
    ///
    /// # Errors
    /// Those of [`Augment::validate`] and [`Resize::apply`].
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
        // Moves nothing.
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

/// A generator of its own for each image of each epoch.
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
