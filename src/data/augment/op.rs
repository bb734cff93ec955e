//! The deterministic image operations of `RandAugment` and `ColorJitter`.

use ndarray::{Array3, ArrayView3};

use super::affine::{Sampling, affine, rotation};
use super::color::{blend, grey, shift_hue, smooth};
use crate::error::{Error, Result};

/// An operation on a u8 image, with its argument. On one machine with the same libm, the result
/// equals that of Pillow 13 bit for bit.
///
/// Factors are those of Pillow's `ImageEnhance`, which blends two images. A factor of 1 returns the
/// image, and 0 returns the other image (for example the grey one). A factor above 1 moves away
/// from the other image. Rotations are counter-clockwise.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum ImageOp {
    /// Stretches each channel's values to 0..=255.
    AutoContrast,
    /// Equalizes each channel's histogram.
    Equalize,
    /// Replaces each value by 255 minus the value.
    Invert,
    /// Rotates around the centre by degrees.
    Rotate(f64),
    /// Keeps this number of high bits of each value. With 0 the image is black, as in Pillow before
    /// 13; Pillow 13 rejects 0. With 8 or more the image does not change.
    Posterize(u32),
    /// Inverts the values at or above the threshold.
    Solarize(u16),
    /// Adds the argument to the values below 128. The sum is at most 255.
    SolarizeAdd(u8),
    /// Blends with the grey image by a factor, which changes the saturation.
    Color(f64),
    /// Blends with the mean grey of the image by a factor.
    Contrast(f64),
    /// Blends with black by a factor.
    Brightness(f64),
    /// Blends with the image smoothed by a 3x3 kernel by a factor.
    Sharpness(f64),
    /// Shears horizontally: each row is shifted left by this number of columns more than the row
    /// above.
    ShearX(f64),
    /// Shears vertically: each column is shifted up by this number of rows more than the column to
    /// its left.
    ShearY(f64),
    /// Translates horizontally by a share of the width. A positive share shifts the image to the
    /// left, so that the fill appears on the right.
    TranslateX(f64),
    /// Translates vertically by a share of the height. A positive share shifts the image up.
    TranslateY(f64),
    /// Shifts the hue by turns of the hue circle, from -0.5 to 0.5.
    Hue(f64),
}

/// The interpolation and the fill of an [`ImageOp`] that moves pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Canvas {
    pub(super) sampling: Sampling,
    /// The value of pixels that come from outside the image.
    pub(super) fill: [u8; 3],
}

impl ImageOp {
    /// Applies the operation to an RGB u8 image `[H, W, 3]` and returns an image of the same shape.
    ///
    /// An operation that moves pixels interpolates between them: with the bicubic kernel of
    /// Pillow's `transform` (a = -1) if `bicubic` is `true`, otherwise bilinearly. Pixels from
    /// outside the image get the value `fill`.
    ///
    /// # Errors
    /// [`Error::Input`] if the image has no pixels or not 3 channels.
    pub fn apply(self, image: ArrayView3<u8>, bicubic: bool, fill: [u8; 3]) -> Result<Array3<u8>> {
        let (rows, columns, channels) = image.dim();
        if rows == 0 || columns == 0 || channels != 3 {
            return Err(Error::Input {
                argument: "image",
                expected: "[H, W, 3] with H, W >= 1".into(),
                found: format!("{:?}", image.shape()),
            });
        }
        let sampling = if bicubic { Sampling::Bicubic } else { Sampling::Bilinear };
        Ok(self.of(image.as_standard_layout().into_owned(), Canvas { sampling, fill }))
    }

    /// Applies the operation to an image that has pixels and is in standard layout.
    pub(super) fn of(self, mut image: Array3<u8>, canvas: Canvas) -> Array3<u8> {
        let (rows, columns, _) = image.dim();
        let moved = |matrix| affine(&image, matrix, canvas);
        match self {
            Self::Rotate(degrees) => return moved(rotation(degrees, (rows, columns))),
            Self::ShearX(factor) => return moved([1.0, factor, 0.0, 0.0, 1.0, 0.0]),
            Self::ShearY(factor) => return moved([1.0, 0.0, 0.0, factor, 1.0, 0.0]),
            Self::TranslateX(share) => {
                return moved([1.0, 0.0, share * columns as f64, 0.0, 1.0, 0.0]);
            }
            Self::TranslateY(share) => {
                return moved([1.0, 0.0, 0.0, 0.0, 1.0, share * rows as f64]);
            }
            Self::AutoContrast => map_channels(&mut image, |histogram| stretched(&histogram)),
            Self::Equalize => map_channels(&mut image, |histogram| equalized(&histogram)),
            Self::Invert => image.mapv_inplace(|value| 255 - value),
            Self::Posterize(bits) => {
                let mask = 0xFF_u8.checked_shl(8_u32.saturating_sub(bits)).unwrap_or(0);
                image.mapv_inplace(|value| value & mask);
            }
            Self::Solarize(threshold) => {
                image.mapv_inplace(
                    |value| if u16::from(value) < threshold { value } else { 255 - value },
                )
            }
            Self::SolarizeAdd(add) => image
                .mapv_inplace(|value| if value < 128 { value.saturating_add(add) } else { value }),
            Self::Brightness(factor) => {
                image.mapv_inplace(|value| blend(0, value, factor as f32));
            }
            Self::Contrast(factor) => {
                let mean = mean_grey(&image);
                image.mapv_inplace(|value| blend(mean, value, factor as f32));
            }
            Self::Color(factor) => pixels(&mut image).for_each(|pixel| {
                let grey = grey(*pixel);
                *pixel = pixel.map(|value| blend(grey, value, factor as f32));
            }),
            Self::Sharpness(factor) => {
                let smooth = smooth(&image);
                image.zip_mut_with(&smooth, |value, &from| {
                    *value = blend(from, *value, factor as f32);
                });
            }
            Self::Hue(turns) => pixels(&mut image).for_each(|pixel| {
                *pixel = shift_hue(*pixel, turns);
            }),
        }
        image
    }
}

fn pixels(image: &mut Array3<u8>) -> impl Iterator<Item = &mut [u8; 3]> {
    image.as_slice_mut().unwrap_or_default().as_chunks_mut().0.iter_mut()
}

/// Returns the rounded mean of the grey values.
fn mean_grey(image: &Array3<u8>) -> u8 {
    let pixels = image.as_slice().unwrap_or_default().as_chunks().0;
    let sum: u64 = pixels.iter().map(|&pixel| u64::from(grey(pixel))).sum();
    (sum as f64 / pixels.len() as f64 + 0.5) as u8
}

/// Maps each channel by a table that `table` computes from the channel's histogram.
fn map_channels(image: &mut Array3<u8>, table: impl Fn([u64; 256]) -> [u8; 256]) {
    for mut channel in image.axis_iter_mut(ndarray::Axis(2)) {
        let mut histogram = [0; 256];
        channel.iter().for_each(|&value| histogram[usize::from(value)] += 1);
        let table = table(histogram);
        channel.mapv_inplace(|value| table[usize::from(value)]);
    }
}

fn identity() -> [u8; 256] {
    std::array::from_fn(|value| value as u8)
}

fn stretched(histogram: &[u64; 256]) -> [u8; 256] {
    let low = histogram.iter().position(|&count| count > 0).unwrap_or_default();
    let high = histogram.iter().rposition(|&count| count > 0).unwrap_or_default();
    if high <= low {
        return identity();
    }
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    std::array::from_fn(|value| (value as f64 * scale + offset) as u8)
}

fn equalized(histogram: &[u64; 256]) -> [u8; 256] {
    let highest = histogram.iter().rposition(|&count| count > 0).unwrap_or_default();
    let others: u64 = histogram[..highest].iter().sum();
    let step = others / 255;
    if step == 0 {
        return identity();
    }
    let mut below = step / 2;
    std::array::from_fn(|value| {
        let level = below / step;
        below += histogram[value];
        level.min(255) as u8
    })
}
