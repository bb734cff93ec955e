//! One change of an image, without chance: the operations of `RandAugment` and `ColorJitter`.

use ndarray::{Array3, ArrayView3};

use super::affine::{Sampling, affine, rotation};
use super::color::{blend, grey, shift_hue, smooth};
use crate::error::{Error, Result};

/// A change of a u8 image, with its argument: what Pillow 13 makes of it, bit for bit on one
/// machine and the same libm.
///
/// Factors are of Pillow's `ImageEnhance`: 1 leaves the image as it is, 0 gives what the operation
/// takes away from. Angles turn counter-clockwise.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum ImageOp {
    /// Stretches each channel's values to 0..=255.
    AutoContrast,
    /// Makes each channel's histogram flat.
    Equalize,
    /// 255 minus each value.
    Invert,
    /// Degrees about the centre.
    Rotate(f64),
    /// Keeps the high bits of each value. At 0 all is black, as in Pillow before its version 13,
    /// which refuses it; 8 and more change nothing.
    Posterize(u32),
    /// Inverts the values from the threshold on.
    Solarize(u16),
    /// Adds to the values below 128, up to 255.
    SolarizeAdd(u8),
    /// Towards (0) and away from (above 1) grey.
    Color(f64),
    /// Towards and away from the mean grey of the image.
    Contrast(f64),
    /// Towards and away from black.
    Brightness(f64),
    /// Towards and away from the image smoothed by a 3x3 kernel.
    Sharpness(f64),
    /// Columns an output row moves by per row.
    ShearX(f64),
    /// Rows an output column moves by per column.
    ShearY(f64),
    /// Share of the width; what is outside comes from the right for a positive one.
    TranslateX(f64),
    /// Share of the height.
    TranslateY(f64),
    /// Turns of the hue circle, from -0.5 to 0.5.
    Hue(f64),
}

/// How an [`ImageOp`] that moves pixels fills the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Canvas {
    pub(super) sampling: Sampling,
    /// Of pixels from outside.
    pub(super) fill: [u8; 3],
}

impl ImageOp {
    /// `[H, W, 3]` RGB u8 to the same shape. Where pixels move, those between the source's are
    /// bicubic (a = -1, Pillow's of `transform`) or else bilinear, and `fill` comes from outside.
    ///
    /// # Errors
    /// [`Error::Input`] if the image has no pixel or another number of channels.
    pub fn apply(self, image: ArrayView3<u8>, bicubic: bool, fill: [u8; 3]) -> Result<Array3<u8>> {
        let (rows, columns, channels) = image.dim();
        if rows == 0 || columns == 0 || channels != 3 {
            return Err(Error::Input {
                argument: "image",
                expected: "[H, W, 3], H and W not 0".into(),
                found: format!("{:?}", image.shape()),
            });
        }
        let sampling = if bicubic { Sampling::Bicubic } else { Sampling::Bilinear };
        Ok(self.of(image.as_standard_layout().into_owned(), Canvas { sampling, fill }))
    }

    /// Of an image in standard layout that has pixels.
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

/// The mean of the grey values, rounded.
fn mean_grey(image: &Array3<u8>) -> u8 {
    let pixels = image.as_slice().unwrap_or_default().as_chunks().0;
    let sum: u64 = pixels.iter().map(|&pixel| u64::from(grey(pixel))).sum();
    (sum as f64 / pixels.len() as f64 + 0.5) as u8
}

/// Maps each channel by the table that is made of its histogram.
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
