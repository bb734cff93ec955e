//! Bicubic and bilinear resize in the integer arithmetic of Pillow.
//!
//! The crate has its own resize because published results depend on the exact pixels that Pillow
//! computes. The SIMD library that was tried starts with the other axis, which changes pixels of
//! noise by up to 30/255, and rounds its weights to 14 bits, which changes them by up to 2/255.

use std::path::Path;

use multiversion::multiversion;
use ndarray::{Array3, ArrayView3, s};

use super::image::with_image;
use crate::error::{Error, Result};
use crate::preprocessing::{Orientation, Preprocessing, Resampling, ResizeMode};

/// The number of fractional bits of the integer weights. A weighted sum of u8 samples fits in 32
/// bits.
const WEIGHT_BITS: u32 = 22;
/// The largest number of pixels of an output: 512 MiB at 3 bytes a pixel, the limit for decoded
/// images.
const MAX_PIXELS: usize = (512 << 20) / 3;

/// An antialiased resize to a fixed size, and how an image file is turned before it. The result
/// equals that of Pillow 13's `Image.resize(size, ...)` bit for bit.
///
/// When the image shrinks, the kernel widens with the scale. Rows and columns are resized in two
/// passes. Each pass rounds and clips to u8, so the order of the passes matters where the kernel
/// overshoots. Like Pillow 13, this resize changes the height first if the height shrinks by more
/// than twice as many pixels as the width. Pillow before 13 always changed the width first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resize {
    rows: usize,
    columns: usize,
    filter: Resampling,
    /// The length of the shorter side before the centre crop. The aspect ratio is kept. `None` if
    /// there is no crop.
    shorter: Option<usize>,
    orientation: Orientation,
}

impl Resize {
    /// Creates a bicubic resize to `image_size` = (rows, columns) pixels. The aspect ratio is not
    /// kept.
    ///
    /// # Errors
    /// [`Error::Config`] unless both numbers are from 1 to 65,535 and their product is at most
    /// 178,956,970.
    pub fn bicubic(image_size: (i64, i64)) -> Result<Self> {
        Self::new(image_size, Resampling::Bicubic)
    }

    /// Creates a bilinear resize (triangle kernel, `BILINEAR` in Pillow) to `image_size` = (rows,
    /// columns) pixels. The aspect ratio is not kept.
    ///
    /// # Errors
    /// The errors of [`Resize::bicubic`].
    pub fn bilinear(image_size: (i64, i64)) -> Result<Self> {
        Self::new(image_size, Resampling::Bilinear)
    }

    /// Creates a bicubic resize of the shorter side to `shorter` pixels, followed by a crop of the
    /// `image_size` = (rows, columns) pixels in the centre. The aspect ratio is kept.
    ///
    /// This is torchvision's `Resize(shorter)` and `CenterCrop(image_size)`. The usual test
    /// transform is 256 and (224, 224).
    ///
    /// # Errors
    /// The errors of [`Resize::bicubic`]; [`Error::Config`] if the crop is larger than `shorter`.
    pub fn center_crop(shorter: i64, image_size: (i64, i64)) -> Result<Self> {
        let resize = Self::bicubic(image_size)?;
        let largest = resize.rows.max(resize.columns);
        match u16::try_from(shorter).map(usize::from) {
            Ok(side) if side >= largest => Ok(Self { shorter: Some(side), ..resize }),
            _ => Err(Error::config("shorter", format!("from {largest} to 65535"), shorter)),
        }
    }

    /// Creates the resize that a [`Preprocessing`] describes.
    ///
    /// # Errors
    /// The errors of [`Resize::center_crop`].
    pub fn of(preprocessing: &Preprocessing) -> Result<Self> {
        let size = preprocessing.image_size;
        let resize = match preprocessing.resize {
            ResizeMode::Squash => Self::bicubic(size)?,
            ResizeMode::CenterCrop { shorter_side } => Self::center_crop(shorter_side, size)?,
        };
        let resize = resize.with_interpolation(preprocessing.interpolation);
        Ok(resize.with_orientation(preprocessing.orientation))
    }

    /// Sets the filter.
    #[must_use]
    pub fn with_interpolation(self, filter: Resampling) -> Self {
        Self { filter, ..self }
    }

    /// Returns the filter.
    pub fn interpolation(&self) -> Resampling {
        self.filter
    }

    /// Sets what is done with the EXIF orientation of image files. Without this call it is
    /// [`Orientation::Exif`].
    #[must_use]
    pub fn with_orientation(self, orientation: Orientation) -> Self {
        Self { orientation, ..self }
    }

    /// Returns what is done with the EXIF orientation of image files.
    pub fn orientation(&self) -> Orientation {
        self.orientation
    }

    fn new(image_size: (i64, i64), filter: Resampling) -> Result<Self> {
        let side = |name, pixels: i64| match u16::try_from(pixels) {
            Ok(pixels @ 1..) => Ok(usize::from(pixels)),
            _ => Err(Error::config(name, "from 1 to 65535", pixels)),
        };
        let (rows, columns) =
            (side("image_size.0", image_size.0)?, side("image_size.1", image_size.1)?);
        if rows.saturating_mul(columns) > MAX_PIXELS {
            let expected = format!("at most {MAX_PIXELS} pixels");
            return Err(Error::config("image_size", expected, format!("{rows} x {columns}")));
        }
        let orientation = Orientation::default();
        Ok(Self { rows, columns, filter, shorter: None, orientation })
    }

    /// Returns (rows, columns) of the images that [`Resize::apply`] returns.
    pub fn image_size(&self) -> (i64, i64) {
        (self.rows as i64, self.columns as i64)
    }

    /// Decodes the image at `path`, turns it as [`Resize::orientation`] says and resizes it to
    /// `[rows, columns, 3]` RGB u8.
    ///
    /// # Errors
    /// The errors of [`decode_image_with`](super::decode_image_with) and [`Resize::apply`].
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Array3<u8>> {
        with_image(path.as_ref(), self.orientation, |image| self.apply(image.view()))
    }

    /// Resizes an RGB u8 image `[H, W, 3]` to `[rows, columns, 3]`.
    ///
    /// # Errors
    /// [`Error::Input`] if the image has no pixels or not 3 channels, or if it is so elongated that
    /// it would have more than 178,956,970 pixels before the centre crop.
    pub fn apply(&self, image: ArrayView3<u8>) -> Result<Array3<u8>> {
        let (rows, columns, channels) = image.dim();
        let refuse = |expected: &str| Error::Input {
            argument: "image",
            expected: expected.into(),
            found: format!("{:?}", image.shape()),
        };
        if rows == 0 || columns == 0 || channels != 3 {
            return Err(refuse("[H, W, 3] with H, W >= 1"));
        }
        let Some(shorter) = self.shorter else {
            return self.resize(image, (self.rows, self.columns));
        };
        let scaled = |side: usize| shorter.saturating_mul(side) / rows.min(columns);
        let (scaled_rows, scaled_columns) = (scaled(rows), scaled(columns));
        if scaled_rows.saturating_mul(scaled_columns) > MAX_PIXELS {
            return Err(refuse("a less elongated image"));
        }
        let scaled = self.resize(image, (scaled_rows, scaled_columns))?;
        // Python rounds halves to even.
        let margin = |from: usize, to: usize| ((from - to) as f64 / 2.0).round_ties_even() as usize;
        let (top, left) = (margin(scaled_rows, self.rows), margin(scaled_columns, self.columns));
        Ok(scaled.slice(s![top..top + self.rows, left..left + self.columns, ..]).to_owned())
    }

    fn resize(&self, image: ArrayView3<u8>, to: (usize, usize)) -> Result<Array3<u8>> {
        let (rows, columns, _) = image.dim();
        let refuse = || Error::Input {
            argument: "image",
            expected: "[H, W, 3]".into(),
            found: format!("{:?}", image.shape()),
        };
        let image = image.as_standard_layout();
        let pixels = image.as_slice().ok_or_else(refuse)?;
        // In this order, the intermediate image is never larger than both the input and the output.
        let resized = if rows_first((rows, columns), to) {
            let between = resize_rows(self.filter, pixels, (rows, columns), to.0);
            resize_columns(self.filter, &between, columns, to.1)
        } else {
            let between = resize_columns(self.filter, pixels, columns, to.1);
            resize_rows(self.filter, &between, (rows, to.1), to.0)
        };
        Array3::from_shape_vec((to.0, to.1, 3), resized).map_err(|_| refuse())
    }
}

/// Returns whether the height is resized before the width. Sizes are (rows, columns).
fn rows_first(from: (usize, usize), to: (usize, usize)) -> bool {
    let shrinks_by = |from: usize, to: usize| from as i64 - to as i64;
    let rows = shrinks_by(from.0, to.0);
    rows > 0 && rows > 2 * shrinks_by(from.1, to.1)
}

/// Resizes the width: `[H, from, 3]` to `[H, columns, 3]`.
fn resize_columns(filter: Resampling, pixels: &[u8], from: usize, columns: usize) -> Vec<u8> {
    if from == columns {
        return pixels.to_vec();
    }
    let windows = Windows::new(filter, from, columns);
    let mut resized = vec![0; pixels.len() / from * columns];
    sum_columns(&windows, pixels, from, &mut resized);
    resized
}

/// Resizes the height: `[H, W, 3]` with (H, W) = `from` to `[rows, W, 3]`.
fn resize_rows(filter: Resampling, pixels: &[u8], from: (usize, usize), rows: usize) -> Vec<u8> {
    if from.0 == rows {
        return pixels.to_vec();
    }
    let windows = Windows::new(filter, from.0, rows);
    let mut resized = vec![0; from.1 * 3 * rows];
    sum_rows(&windows, pixels, from.1 * 3, &mut resized);
    resized
}

/// The number of rows whose width is resized together.
const STRIP: usize = 16;

/// Resizes rows of `from` pixels to rows with one pixel for each window.
///
/// A strip of rows is transposed first. The samples of one column are then adjacent in memory, as
/// the samples of one row are in [`sum_rows`], and both passes use the same loop.
#[multiversion(targets("x86_64+avx2"))]
fn sum_columns(windows: &Windows, pixels: &[u8], from: usize, resized: &mut [u8]) {
    sum_columns_on_any(windows, pixels, from, resized);
}

/// [`sum_columns`] with the instructions of the function that it is inlined into.
#[inline(always)]
fn sum_columns_on_any(windows: &Windows, pixels: &[u8], from: usize, resized: &mut [u8]) {
    let columns = windows.starts.len();
    let strips = pixels.chunks_exact(from * 3 * STRIP);
    let mut outputs = resized.chunks_exact_mut(columns * 3 * STRIP);
    let rest = strips.remainder();
    let mut side = vec![[0; STRIP * 3]; if strips.len() > 0 { from } else { 0 }];
    for (strip, output) in strips.zip(&mut outputs) {
        for (index, row) in strip.chunks_exact(from * 3).enumerate() {
            for (column, pixel) in side.iter_mut().zip(row.as_chunks::<3>().0) {
                column.as_chunks_mut::<3>().0[index] = *pixel;
            }
        }
        for (x, (start, weights)) in windows.iter().enumerate() {
            let sums: [_; STRIP * 3] = weighted_sum(weights, side[start..].iter());
            for (row, pixel) in output.chunks_exact_mut(columns * 3).zip(sums.as_chunks::<3>().0) {
                row.as_chunks_mut::<3>().0[x] = *pixel;
            }
        }
    }
    let output = outputs.into_remainder().chunks_exact_mut(columns * 3);
    for (row, output) in rest.chunks_exact(from * 3).zip(output) {
        for ((start, weights), pixel) in windows.iter().zip(output.as_chunks_mut::<3>().0) {
            *pixel = weighted_sum(weights, row.as_chunks::<3>().0[start..].iter());
        }
    }
}

/// Resizes rows of `stride` samples to one row for each window.
#[multiversion(targets("x86_64+avx2"))]
fn sum_rows(windows: &Windows, pixels: &[u8], stride: usize, resized: &mut [u8]) {
    sum_rows_on_any(windows, pixels, stride, resized);
}

/// [`sum_rows`] with the instructions of the function that it is inlined into.
#[inline(always)]
fn sum_rows_on_any(windows: &Windows, pixels: &[u8], stride: usize, resized: &mut [u8]) {
    for ((start, weights), output) in windows.iter().zip(resized.chunks_exact_mut(stride)) {
        let rows = pixels[start * stride..].chunks_exact(stride);
        // The compiler knows the block length, so the sums stay in registers.
        let (blocks, rest) = output.as_chunks_mut::<32>();
        let offset = blocks.len() * 32;
        for (index, block) in blocks.iter_mut().enumerate() {
            let lines = rows.clone().filter_map(|row| row[index * 32..].first_chunk());
            *block = weighted_sum(weights, lines);
        }
        for (index, sample) in rest.iter_mut().enumerate() {
            let lines = rows.clone().filter_map(|row| row[offset + index..].first_chunk());
            [*sample] = weighted_sum(weights, lines);
        }
    }
}

/// Returns the weighted sum of the lines, each with N samples.
#[inline(always)]
fn weighted_sum<'a, const N: usize>(
    weights: &[i32],
    lines: impl Iterator<Item = &'a [u8; N]>,
) -> [u8; N] {
    let mut sums = [HALF; N];
    for (weight, line) in weights.iter().zip(lines) {
        for (sum, &sample) in sums.iter_mut().zip(line) {
            // The sum never overflows. With checked arithmetic the loop is not vectorized.
            *sum = sum.wrapping_add(weight.wrapping_mul(i32::from(sample)));
        }
    }
    let mut samples = [0; N];
    for (sample, sum) in samples.iter_mut().zip(sums) {
        *sample = (sum >> WEIGHT_BITS).clamp(0, 255) as u8;
    }
    samples
}

/// One half in units of the weights. Sums start from it, so that truncation rounds to nearest.
const HALF: i32 = 1 << (WEIGHT_BITS - 1);

/// The input window of each output sample: its start and its weights.
struct Windows {
    starts: Vec<usize>,
    /// The end of each window's weights in `weights`.
    ends: Vec<usize>,
    weights: Vec<i32>,
}

impl Windows {
    fn new(filter: Resampling, from: usize, to: usize) -> Self {
        let (support, weight): (f64, fn(f64) -> f64) = match filter {
            Resampling::Bicubic => (2.0, cubic),
            Resampling::Bilinear => (1.0, |x| (1.0 - x.abs()).max(0.0)),
        };
        let scale = from as f64 / to as f64;
        let widening = scale.max(1.0);
        let radius = support * widening;
        let mut windows = Self { starts: Vec::new(), ends: Vec::new(), weights: Vec::new() };
        for index in 0..to {
            let center = (index as f64 + 0.5) * scale;
            // The cast turns a negative number into 0.
            let start = (center - radius + 0.5) as usize;
            let end = ((center + radius + 0.5) as usize).min(from);
            let at = |sample: usize| (sample as f64 - center + 0.5) * (1.0 / widening);
            let weights: Vec<f64> = (start..end).map(|sample| weight(at(sample))).collect();
            let sum: f64 = weights.iter().sum();
            let unit = f64::from(1 << WEIGHT_BITS);
            windows.weights.extend(weights.iter().map(|w| (w / sum * unit).round() as i32));
            windows.starts.push(start);
            windows.ends.push(windows.weights.len());
        }
        windows
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let mut begin = 0;
        self.starts.iter().zip(&self.ends).map(move |(&start, &end)| {
            (start, &self.weights[std::mem::replace(&mut begin, end)..end])
        })
    }
}

/// The cubic convolution kernel with a = -0.5 (Keys 1981).
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The resize by its definition in floating point, without rounding between the passes.
    fn naive(image: &Array3<u8>, to: (usize, usize)) -> Array3<f64> {
        let weights = |from: usize, to: usize| {
            let scale = from as f64 / to as f64;
            let widening = scale.max(1.0);
            ndarray::Array2::from_shape_fn((to, from), |(i, j)| {
                let center = (i as f64 + 0.5) * scale;
                cubic((j as f64 + 0.5 - center) / widening)
            })
        };
        let normalized = |mut w: ndarray::Array2<f64>| {
            w.rows_mut().into_iter().for_each(|mut row| row /= row.sum());
            w
        };
        let (rows, columns, _) = image.dim();
        let down = normalized(weights(rows, to.0));
        let across = normalized(weights(columns, to.1));
        Array3::from_shape_fn((to.0, to.1, 3), |(y, x, c)| {
            let channel = image.index_axis(ndarray::Axis(2), c).mapv(f64::from);
            down.row(y).dot(&channel).dot(&across.row(x))
        })
    }

    /// One pass in the same integer arithmetic, one sum at a time: `from` samples to `to` samples.
    fn plain_pass(from: usize, to: usize, sample: impl Fn(usize) -> u8) -> Vec<u8> {
        let sum = |(start, weights): (usize, &[i32])| {
            let terms = weights.iter().zip(start..).map(|(w, at)| w * i32::from(sample(at)));
            ((HALF + terms.sum::<i32>()) >> WEIGHT_BITS).clamp(0, 255) as u8
        };
        Windows::new(Resampling::Bicubic, from, to).iter().map(sum).collect()
    }

    #[test]
    fn the_passes_are_the_plain_ones_at_any_size() {
        for (rows, columns, to) in [(15, 40, 9), (16, 1, 3), (33, 37, 61), (48, 11, 11), (1, 50, 7)]
        {
            let image =
                Array3::from_shape_fn((rows, columns, 3), |(y, x, c)| (y * x * 37 + c * 91) as u8);
            let pixels = image.as_slice().unwrap();
            let across = resize_columns(Resampling::Bicubic, pixels, columns, to);
            let down = resize_rows(Resampling::Bicubic, pixels, (rows, columns), to);
            for c in 0..3 {
                for y in 0..rows {
                    let expected = plain_pass(columns, to, |x| image[(y, x, c)]);
                    let found = (0..to).map(|x| across[(y * to + x) * 3 + c]);
                    assert!(found.eq(expected), "across, {rows}x{columns} to {to}");
                }
                for x in 0..columns {
                    let expected = plain_pass(rows, to, |y| image[(y, x, c)]);
                    let found = (0..to).map(|y| down[(y * columns + x) * 3 + c]);
                    assert!(found.eq(expected), "down, {rows}x{columns} to {to}");
                }
            }
        }
    }

    /// The arithmetic is of integers, so that every version of a pass has to give the same bytes:
    /// the one that the processor selects (AVX2 where it exists), and the one for the oldest
    /// supported processor, which a machine with AVX2 never selects.
    #[test]
    fn every_version_of_a_pass_gives_the_same_bytes() {
        let mut state = 1u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for filter in [Resampling::Bicubic, Resampling::Bilinear] {
            for (rows, columns, to) in
                [(1, 1, 5), (1, 43, 7), (45, 1, 3), (15, 11, 33), (17, 22, 1), (49, 21, 20)]
            {
                let pixels: Vec<u8> = (0..rows * columns * 3).map(|_| noise()).collect();
                let case = format!("{filter:?}, {rows}x{columns} to {to}");

                let windows = Windows::new(filter, columns, to);
                let [mut selected, mut oldest] = [0, 1].map(|fill| vec![fill; rows * to * 3]);
                sum_columns(&windows, &pixels, columns, &mut selected);
                sum_columns_on_any(&windows, &pixels, columns, &mut oldest);
                assert!(selected == oldest, "across, {case}");

                let windows = Windows::new(filter, rows, to);
                let [mut selected, mut oldest] = [0, 1].map(|fill| vec![fill; to * columns * 3]);
                sum_rows(&windows, &pixels, columns * 3, &mut selected);
                sum_rows_on_any(&windows, &pixels, columns * 3, &mut oldest);
                assert!(selected == oldest, "down, {case}");
            }
        }
    }

    #[test]
    fn agrees_with_the_definition_where_nothing_is_clipped() {
        for (from, to) in
            [((7, 9), (5, 20)), ((16, 3), (4, 5)), ((30, 30), (31, 7)), ((1, 5), (6, 1))]
        {
            let image = Array3::from_shape_fn((from.0, from.1, 3), |(y, x, c)| {
                (80 + (y * 13 + x * 29 + c * 41) % 90) as u8
            });
            let size = (to.0 as i64, to.1 as i64);
            let resized = Resize::bicubic(size).unwrap().apply(image.view()).unwrap();
            let expected = naive(&image, to);
            for (&found, &expected) in resized.iter().zip(&expected) {
                assert!((f64::from(found) - expected).abs() < 1.2, "{from:?} {to:?}");
            }
        }
    }

    #[test]
    fn a_constant_image_stays_constant_and_the_same_size_is_a_copy() {
        for value in [0, 1, 127, 254, 255] {
            let image = Array3::from_elem((13, 8, 3), value);
            for size in [(1, 1), (5, 31), (40, 3), (13, 8)] {
                let resized = Resize::bicubic(size).unwrap().apply(image.view()).unwrap();
                assert!(resized.iter().all(|&v| v == value), "{value} {size:?}");
            }
        }
        let noise = Array3::from_shape_fn((6, 7, 3), |(y, x, c)| (y * 91 + x * 57 + c * 33) as u8);
        assert_eq!(Resize::bicubic((6, 7)).unwrap().apply(noise.view()).unwrap(), noise);
    }

    #[test]
    fn a_strided_view_is_read_by_its_indices() {
        let image = Array3::from_shape_fn((3, 9, 6), |(c, x, y)| (y * 40 + x * 9 + c * 70) as u8);
        let view = image.view().permuted_axes([2, 1, 0]);
        let resize = Resize::bicubic((4, 5)).unwrap();
        let copy = view.as_standard_layout().into_owned();
        assert_eq!(resize.apply(view).unwrap(), resize.apply(copy.view()).unwrap());
    }

    #[test]
    fn impossible_sizes_and_images_are_errors() {
        for size in [(0, 4), (4, 0), (-1, 4), (65_536, 4), (65_535, 65_535), (i64::MIN, i64::MAX)] {
            assert!(matches!(Resize::bicubic(size), Err(Error::Config { .. })), "{size:?}");
        }
        let resize = Resize::bicubic((3, 3)).unwrap();
        for shape in [(0, 4, 3), (4, 0, 3), (4, 4, 1), (4, 4, 4)] {
            let refused = resize.apply(Array3::zeros(shape).view());
            assert!(matches!(refused, Err(Error::Input { .. })), "{shape:?}");
        }
    }

    #[test]
    fn elongated_images_take_no_more_room_than_they_have() {
        for (shape, size) in [((300_000, 1, 3), (20, 9_000)), ((1, 300_000, 3), (9_000, 20))] {
            let image = Array3::from_elem(shape, 9);
            let resized = Resize::bicubic(size).unwrap().apply(image.view()).unwrap();
            assert!(resized.iter().all(|&v| v == 9));
        }
    }
}
