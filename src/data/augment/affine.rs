//! Affine transforms of an image, in the arithmetic of Pillow.

use ndarray::Array3;

use super::op::Canvas;

/// The interpolation between pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sampling {
    Bilinear,
    /// The cubic kernel with a = -1.
    Bicubic,
}

/// An affine map [a, b, c, d, e, f]: the output at (x, y) is the input at (a x + b y + c, d x + e y
/// + f). Pixel centres have half-integer coordinates.
type Matrix = [f64; 6];

/// Returns the matrix that rotates an image of (rows, columns) = `size` around its centre,
/// counter-clockwise.
pub(super) fn rotation(degrees: f64, size: (usize, usize)) -> Matrix {
    // Sine and cosine are rounded to 15 decimals, so that right angles are exact.
    let round = |x: f64| format!("{x:.15}").parse().unwrap_or(x);
    let angle = -degrees.rem_euclid(360.0).to_radians();
    let (cos, sin) = (round(angle.cos()), round(angle.sin()));
    let (x, y) = (size.1 as f64 / 2.0, size.0 as f64 / 2.0);
    [cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y]
}

/// Transforms an image by `matrix`, which maps output coordinates to input coordinates. The output
/// has the same size.
pub(super) fn affine(image: &Array3<u8>, matrix: Matrix, canvas: Canvas) -> Array3<u8> {
    let (rows, columns, _) = image.dim();
    let [a, b, c, d, e, f] = matrix;
    let mut output = Array3::zeros(image.dim());
    let Some(pixels) = image.as_slice().map(|slice| slice.as_chunks().0) else { return output };
    let source = Sampled { pixels, rows, columns };
    let outputs = output.as_slice_mut().unwrap_or_default().as_chunks_mut::<3>().0;
    for (index, output) in outputs.iter_mut().enumerate() {
        let (x, y) = ((index % columns) as f64 + 0.5, (index / columns) as f64 + 0.5);
        let (x, y) = (a * x + b * y + c, d * x + e * y + f);
        let inside = (0.0..columns as f64).contains(&x) && (0.0..rows as f64).contains(&y);
        *output = match canvas.sampling {
            _ if !inside => canvas.fill,
            Sampling::Bilinear => source.bilinear(x - 0.5, y - 0.5),
            Sampling::Bicubic => source.bicubic(x - 0.5, y - 0.5),
        };
    }
    output
}

/// The input image.
struct Sampled<'a> {
    pixels: &'a [[u8; 3]],
    rows: usize,
    columns: usize,
}

impl Sampled<'_> {
    fn bilinear(&self, x: f64, y: f64) -> [u8; 3] {
        self.sample(x, y, 0, |[a, b]: [f64; 2], at| a + (b - a) * at)
    }

    fn bicubic(&self, x: f64, y: f64) -> [u8; 3] {
        self.sample(x, y, 1, |[a, b, c, d]: [f64; 4], at| {
            let slope = c - a;
            let square = 2.0 * (a - b) + c - d;
            let cube = -a + b - c + d;
            b + at * (slope + at * (square + at * cube))
        })
    }

    /// Interpolates at (x, y) with `curve` between N by N pixels. In each direction the window
    /// starts `before` pixels before the one at or below (x, y). The border pixels are repeated
    /// outside the image.
    #[inline(always)]
    fn sample<const N: usize>(
        &self,
        x: f64,
        y: f64,
        before: i64,
        curve: impl Fn([f64; N], f64) -> f64,
    ) -> [u8; 3] {
        let (left, top) = (x.floor(), y.floor());
        let place = |first: f64, index: usize, count: usize| {
            (first as i64 - before + index as i64).clamp(0, count as i64 - 1) as usize
        };
        let columns: [usize; N] = std::array::from_fn(|i| place(left, i, self.columns));
        let rows: [usize; N] = std::array::from_fn(|i| place(top, i, self.rows) * self.columns);
        std::array::from_fn(|channel| {
            let across = rows.map(|row| {
                let line = columns.map(|column| f64::from(self.pixels[row + column][channel]));
                curve(line, x - left)
            });
            curve(across, y - top) as u8
        })
    }
}
