//! A random part of an image, resized.

use ndarray::{Array3, ArrayView3, s};
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::Interpolation;
use crate::data::resize::Resize;
use crate::error::{Error, Result};

/// Sizes that are tried before the centre is taken.
const ATTEMPTS: usize = 10;

/// A part of random area, shape and place, resized to the input's size: timm's
/// `RandomResizedCropAndInterpolation`, whose sampling is torchvision's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandomResizedCrop {
    /// Bounds of its share of the image's area, uniform.
    pub scale: (f64, f64),
    /// Bounds of width through height, uniform in the logarithm.
    pub ratio: (f64, f64),
    /// How it is resized.
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

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) top: usize,
    pub(super) left: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl RandomResizedCrop {
    /// # Errors
    /// [`Error::Config`] for bounds out of order, an area of 0 or above 1, or a ratio of 0.
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

    /// A part of an image of (rows, columns) = `size`.
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

    /// The largest part in the centre whose shape is within the bounds.
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

    /// A part of `image`, resized to `image_size`.
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

/// As Python rounds: of two that are as near, the even one.
fn pixels(length: f64) -> usize {
    length.round_ties_even() as usize
}
