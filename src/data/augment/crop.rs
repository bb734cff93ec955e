//! The random resized crop.

use ndarray::{Array3, ArrayView3, s};
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::Interpolation;
use crate::data::resize::Resize;
use crate::error::{Error, Result};

/// The number of random sizes that are tried before the central crop is used.
const ATTEMPTS: usize = 10;

/// A crop of random area, aspect ratio and position, resized to the size of the model's input. It
/// is timm's `RandomResizedCropAndInterpolation`, which draws the crop as torchvision does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandomResizedCrop {
    /// The bounds of the crop's share of the image's area. The share is uniform.
    pub scale: (f64, f64),
    /// The bounds of the crop's width divided by its height. The logarithm of the ratio is uniform.
    pub ratio: (f64, f64),
    /// The interpolation of the resize.
    pub interpolation: Interpolation,
}

impl Default for RandomResizedCrop {
    fn default() -> Self {
        RandomResizedCrop {
            scale: (0.08, 1.0),
            ratio: (3.0 / 4.0, 4.0 / 3.0),
            interpolation: Interpolation::Bicubic,
        }
    }
}

/// A rectangular part of an image, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) top: usize,
    pub(super) left: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl RandomResizedCrop {
    /// Checks the bounds.
    ///
    /// # Errors
    /// [`Error::Config`] if a lower bound is above its upper bound, or if an area or a ratio is out
    /// of its range.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("RandomResizedCrop"))
    }

    fn check(&self) -> Result<()> {
        let (scale, ratio) = (self.scale, self.ratio);
        if !(0.0 < scale.0 && scale.0 <= scale.1 && scale.1 <= 1.0) {
            return Err(Error::config("crop.scale", "0 < from <= to <= 1", format!("{scale:?}")));
        }
        if !(0.0 < ratio.0 && ratio.0 <= ratio.1 && ratio.1.is_finite()) {
            return Err(Error::config("crop.ratio", "0 < from <= to", format!("{ratio:?}")));
        }
        Ok(())
    }

    /// Draws a crop of an image of (rows, columns) = `size`.
    pub(super) fn draw(&self, size: (usize, usize), rng: &mut impl Rng) -> Window {
        let (rows, columns) = size;
        let area = rows as f64 * columns as f64;
        let mut between = |(from, to): (f64, f64)| from + (to - from) * rng.random::<f64>();
        let log_ratio = (self.ratio.0.ln(), self.ratio.1.ln());
        let tried: [_; ATTEMPTS] = std::array::from_fn(|_| {
            let (area, ratio) = (area * between(self.scale), between(log_ratio).exp());
            (pixels((area / ratio).sqrt()), pixels((area * ratio).sqrt()))
        });
        let fits = |&(r, c): &(usize, usize)| (1..=rows).contains(&r) && (1..=columns).contains(&c);
        if let Some((r, c)) = tried.into_iter().find(fits) {
            let (top, left) = (rng.random_range(0..=rows - r), rng.random_range(0..=columns - c));
            return Window { top, left, rows: r, columns: c };
        }
        self.central(size)
    }

    /// Returns the largest crop in the centre whose aspect ratio is within the bounds.
    fn central(&self, (rows, columns): (usize, usize)) -> Window {
        let ratio = columns as f64 / rows as f64;
        let (r, c) = if ratio < self.ratio.0 {
            (pixels(columns as f64 / self.ratio.0).clamp(1, rows), columns)
        } else if ratio > self.ratio.1 {
            (rows, pixels(rows as f64 * self.ratio.1).clamp(1, columns))
        } else {
            (rows, columns)
        };
        Window { top: (rows - r) / 2, left: (columns - c) / 2, rows: r, columns: c }
    }

    /// Draws a crop of `image` and resizes it to `image_size`.
    pub(super) fn apply(
        &self,
        image: ArrayView3<u8>,
        image_size: (i64, i64),
        rng: &mut impl Rng,
    ) -> Result<Array3<u8>> {
        let (rows, columns, _) = image.dim();
        let Window { top, left, rows, columns } = self.draw((rows, columns), rng);
        let resize = if self.interpolation.draw_bicubic(rng) {
            Resize::bicubic(image_size)?
        } else {
            Resize::bilinear(image_size)?
        };
        resize.apply(image.slice(s![top..top + rows, left..left + columns, ..]))
    }
}

/// Rounds to the nearest integer, and halves to even, as Python does.
fn pixels(length: f64) -> usize {
    length.round_ties_even() as usize
}
