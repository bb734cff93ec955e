//! `RandAugment` with timm's operations and levels.

use std::str::FromStr;

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::Interpolation;
use super::affine::Sampling;
use super::op::{Canvas, ImageOp};
use crate::error::{Error, Result};

/// The magnitude at which the argument of an operation reaches the end of its range.
const FULL: f64 = 10.0;
/// A standard deviation above this value selects a uniform magnitude that starts at 0, as in timm.
const UNIFORM_STD: f64 = 100.0;
/// The fill of timm: the mean of ImageNet.
const IMAGENET_FILL: [u8; 3] = [124, 116, 104];

/// RandAugment (Cubuk et al., arXiv 1909.13719) as timm 1.0.31 implements it. For each image,
/// `num_ops` of 15 operations are drawn, and each is applied with probability `prob`.
///
/// The default is timm's `rand-m9-mstd0.5-inc1`. Such a text can be parsed. The operations are
/// [`ImageOp::AutoContrast`], `Equalize`, `Invert`, `Rotate`, `Posterize`, `Solarize`,
/// `SolarizeAdd`, `Color`, `Contrast`, `Brightness`, `Sharpness`, `ShearX`, `ShearY`, `TranslateX`
/// and `TranslateY`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandAugment {
    /// The mean magnitude of an operation. 10 is the full range.
    pub magnitude: f64,
    /// The standard deviation of the magnitude. If it is above 100, the magnitude is uniform from 0
    /// to `magnitude`.
    pub magnitude_std: f64,
    /// The largest magnitude. A larger one that is drawn is reduced to it.
    pub magnitude_max: f64,
    /// The number of operations for each image, drawn with replacement.
    pub num_ops: usize,
    /// The probability that a drawn operation is applied.
    pub prob: f64,
    /// Whether every operation changes the image more at a higher magnitude. If `false`, posterize
    /// and solarize change the image less at a higher magnitude, and an enhancement factor grows
    /// from 0.1 to 1.9.
    pub increasing: bool,
    /// The value of pixels that come from outside the image. The default is 255 times ImageNet's
    /// mean, as in timm's `create_transform`.
    pub fill: [u8; 3],
    /// The interpolation of operations that move pixels.
    pub interpolation: Interpolation,
}

impl Default for RandAugment {
    fn default() -> Self {
        RandAugment {
            magnitude: 9.0,
            magnitude_std: 0.5,
            magnitude_max: FULL,
            num_ops: 2,
            prob: 0.5,
            increasing: true,
            fill: IMAGENET_FILL,
            interpolation: Interpolation::Random,
        }
    }
}

/// The strength of an operation.
#[derive(Clone, Copy)]
struct Level {
    /// The magnitude divided by 10.
    share: f64,
    sign: f64,
    increasing: bool,
}

impl Level {
    /// Returns an argument from `-full` to `full`.
    fn signed(self, full: f64) -> f64 {
        self.sign * self.share * full
    }

    /// Returns an enhancement factor.
    fn factor(self) -> f64 {
        if self.increasing { (1.0 + self.signed(0.9)).max(0.1) } else { self.share * 1.8 + 0.1 }
    }

    /// Returns an integer that grows from 0 to `full` with the magnitude; if `increasing`, one that
    /// falls from `full` to 0.
    fn steps(self, full: u16) -> u16 {
        let steps = (self.share * f64::from(full)) as u16;
        if self.increasing { full.saturating_sub(steps) } else { steps }
    }
}

/// The operations as functions of the level, in timm's order.
const OPS: [fn(Level) -> ImageOp; 15] = [
    |_| ImageOp::AutoContrast,
    |_| ImageOp::Equalize,
    |_| ImageOp::Invert,
    |level| ImageOp::Rotate(level.signed(30.0)),
    |level| ImageOp::Posterize(level.steps(4).into()),
    |level| ImageOp::Solarize(level.steps(256)),
    |level| ImageOp::SolarizeAdd((level.share * 110.0).min(128.0) as u8),
    |level| ImageOp::Color(level.factor()),
    |level| ImageOp::Contrast(level.factor()),
    |level| ImageOp::Brightness(level.factor()),
    |level| ImageOp::Sharpness(level.factor()),
    |level| ImageOp::ShearX(level.signed(0.3)),
    |level| ImageOp::ShearY(level.signed(0.3)),
    |level| ImageOp::TranslateX(level.signed(0.45)),
    |level| ImageOp::TranslateY(level.signed(0.45)),
];

impl RandAugment {
    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Config`] if a value is out of its range.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("RandAugment"))
    }

    fn check(&self) -> Result<()> {
        let positive = |name: &str, value: f64| {
            if value.is_finite() && value >= 0.0 {
                Ok(())
            } else {
                Err(Error::config(format!("rand_augment.{name}"), "0 or more", value))
            }
        };
        positive("magnitude", self.magnitude)?;
        positive("magnitude_std", self.magnitude_std)?;
        positive("magnitude_max", self.magnitude_max)?;
        super::check_probability("rand_augment.prob", self.prob)?;
        if self.num_ops > 100 {
            return Err(Error::config("rand_augment.num_ops", "at most 100", self.num_ops));
        }
        Ok(())
    }

    /// Draws the operations for one image.
    pub(super) fn draw(&self, rng: &mut impl Rng) -> Vec<(ImageOp, Canvas)> {
        (0..self.num_ops).filter_map(|_| self.draw_one(rng)).collect()
    }

    fn draw_one(&self, rng: &mut impl Rng) -> Option<(ImageOp, Canvas)> {
        let op = OPS[rng.random_range(0..OPS.len())];
        if rng.random::<f64>() >= self.prob {
            return None;
        }
        let magnitude = match self.magnitude_std {
            0.0 => self.magnitude,
            std if std > UNIFORM_STD => self.magnitude * rng.random::<f64>(),
            std => self.magnitude + std * gaussian(rng),
        };
        let share = magnitude.clamp(0.0, self.magnitude_max) / FULL;
        let sign = if rng.random::<f64>() < 0.5 { -1.0 } else { 1.0 };
        let sampling = if self.interpolation.draw_bicubic(rng) {
            Sampling::Bicubic
        } else {
            Sampling::Bilinear
        };
        let op = op(Level { share, sign, increasing: self.increasing });
        Some((op, Canvas { sampling, fill: self.fill }))
    }
}

/// Draws a number from the standard normal distribution with the Box-Muller transform.
fn gaussian(rng: &mut impl Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

impl FromStr for RandAugment {
    type Err = Error;

    /// Parses timm's format: `rand`, then settings separated by hyphens, such as
    /// `rand-m9-mstd0.5-inc1`.
    ///
    /// The settings, with their defaults in parentheses, are: `m` magnitude (10), `n` number of
    /// operations (2), `p` probability (0.5), `mstd` standard deviation of the magnitude (0),
    /// `mmax` largest magnitude (10), `inc` increasing, 0 or 1 (0).
    fn from_str(text: &str) -> Result<Self> {
        let refuse = || Error::config("rand_augment", "like rand-m9-mstd0.5-inc1", text);
        let mut parts = text.split('-');
        if parts.next() != Some("rand") {
            return Err(refuse());
        }
        let mut parsed =
            Self { magnitude: FULL, magnitude_std: 0.0, increasing: false, ..Self::default() };
        for part in parts {
            let (key, value) = part.split_at(part.find(|c: char| c.is_ascii_digit()).unwrap_or(0));
            let number: f64 = value.parse().map_err(|_| refuse())?;
            match key {
                "m" => parsed.magnitude = number,
                "n" => parsed.num_ops = value.parse().map_err(|_| refuse())?,
                "p" => parsed.prob = number,
                "mstd" => parsed.magnitude_std = number,
                "mmax" => parsed.magnitude_max = number,
                "inc" => parsed.increasing = number != 0.0,
                _ => return Err(refuse()),
            }
        }
        parsed.validate()?;
        Ok(parsed)
    }
}
