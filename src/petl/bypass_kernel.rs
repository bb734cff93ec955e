//! One sample through a bypass on a CPU, forward and backward, over plain slices.
//!
//! Each pass reads the tokens once, while they are in the cache: as separate operations the same
//! arithmetic is bound by memory, by products with 8 columns, and by the start of each.

use pulp::{Simd, WithSimd};

use super::lanes::{GROUP, Lanes};

/// The sizes of a bypass and of the tokens beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// P.
    pub(super) prefix: usize,
    /// Rows and columns of the patch grid.
    pub(super) grid: (usize, usize),
    /// C, a multiple of [`GROUP`].
    pub(super) c: usize,
    /// h.
    pub(super) h: usize,
    /// Side of the kernel.
    pub(super) k: usize,
}

impl Sizes {
    /// P + N.
    pub(super) fn tokens(&self) -> usize {
        self.prefix + self.grid.0 * self.grid.1
    }

    /// h in whole groups: what is above h stays zero.
    pub(super) fn width(&self) -> usize {
        self.h.next_multiple_of(GROUP)
    }

    /// Numbers of each part of [`Gradients`], in its order.
    pub(super) fn gradient_parts(&self) -> [usize; 6] {
        let (w, c) = (self.width(), self.c);
        [w * c, w, self.k * self.k * w * w, w, w * c, c]
    }

    /// Numbers that [`Gradients::split`] wants.
    pub(super) fn num_gradients(&self) -> usize {
        self.gradient_parts().iter().sum()
    }
}

/// The weights of a bypass as the kernels read them; w is [`Sizes::width`].
#[derive(Debug)]
pub(super) struct Packed {
    /// `[w, C]`.
    down: Vec<f32>,
    down_bias: Vec<f32>,
    /// `[k * k, w inputs, w outputs]`.
    taps: Vec<f32>,
    /// The same for the way back: mirrored, `[k * k, w outputs, w inputs]`.
    taps_back: Vec<f32>,
    conv_bias: Vec<f32>,
    /// `[w, C]`, times s.
    up: Vec<f32>,
    /// `[C]`, times s.
    up_bias: Vec<f32>,
    reach: Vec<Tap>,
}

/// The weights of a bypass as they are stored: `[h, C]`, `[h]`, `[h, h, k, k]`, `[h]`, `[C, h]` and
/// `[C]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored<'a> {
    pub(super) down: &'a [f32],
    pub(super) down_bias: &'a [f32],
    pub(super) conv: &'a [f32],
    pub(super) conv_bias: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) up_bias: &'a [f32],
}

impl Packed {
    /// `scale` is what the output is multiplied by.
    pub(super) fn new(sizes: &Sizes, stored: &Stored, scale: f32) -> Self {
        let Sizes { c, h, k, .. } = *sizes;
        let w = sizes.width();
        let padded = |values: &[f32], length| {
            let mut padded = values.to_vec();
            padded.resize(length, 0.0);
            padded
        };
        let (mut taps, mut taps_back) = (vec![0.0; k * k * w * w], vec![0.0; k * k * w * w]);
        for (output, kernels) in stored.conv.chunks_exact(h * k * k).enumerate() {
            for (input, kernel) in kernels.chunks_exact(k * k).enumerate() {
                for (tap, &weight) in kernel.iter().enumerate() {
                    taps[(tap * w + input) * w + output] = weight;
                    taps_back[((k * k - 1 - tap) * w + output) * w + input] = weight;
                }
            }
        }
        let mut up = vec![0.0; w * c];
        for (channel, row) in stored.up.chunks_exact(h).enumerate() {
            for (j, weight) in row.iter().enumerate() {
                up[j * c + channel] = weight * scale;
            }
        }
        Packed {
            down: padded(stored.down, w * c),
            down_bias: padded(stored.down_bias, w),
            taps,
            taps_back,
            conv_bias: padded(stored.conv_bias, w),
            up,
            up_bias: stored.up_bias.iter().map(|bias| bias * scale).collect(),
            reach: sizes.taps(),
        }
    }
}

/// Gradients of the weights, in the layout of [`Packed`]; those of `up` are without s.
#[derive(Debug)]
pub(super) struct Gradients<'a> {
    pub(super) down: &'a mut [f32],
    pub(super) down_bias: &'a mut [f32],
    pub(super) taps: &'a mut [f32],
    pub(super) conv_bias: &'a mut [f32],
    pub(super) up: &'a mut [f32],
    pub(super) up_bias: &'a mut [f32],
}

impl<'a> Gradients<'a> {
    /// The parts of `all`, which is [`Sizes::num_gradients`] long.
    pub(super) fn split(sizes: &Sizes, all: &'a mut [f32]) -> Self {
        let [down, down_bias, taps, conv_bias, up, _] = sizes.gradient_parts();
        let (down, rest) = all.split_at_mut(down);
        let (down_bias, rest) = rest.split_at_mut(down_bias);
        let (taps, rest) = rest.split_at_mut(taps);
        let (conv_bias, rest) = rest.split_at_mut(conv_bias);
        let (up, up_bias) = rest.split_at_mut(up);
        Gradients { down, down_bias, taps, conv_bias, up, up_bias }
    }
}

/// The layer norm that the tokens came out of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm<'a> {
    pub(super) weight: &'a [f32],
    pub(super) bias: &'a [f32],
    pub(super) eps: f32,
}

/// What the forward pass keeps of a sample, `[T, w]` each: the inputs of the two activations.
#[derive(Debug)]
pub(super) struct Kept<T> {
    pub(super) down: T,
    pub(super) conv: T,
}

/// `output = residual + s * Convpass(tokens)`, `[T, C]`; without a residual, without the sum.
#[derive(Debug)]
pub(super) struct Forward<'a> {
    pub(super) sizes: &'a Sizes,
    pub(super) weights: &'a Packed,
    pub(super) tokens: &'a [f32],
    pub(super) residual: Option<&'a [f32]>,
    /// What dropout multiplies by, `[T, h]`.
    pub(super) mask: Option<&'a [f32]>,
    pub(super) output: &'a mut [f32],
    pub(super) kept: Kept<&'a mut [f32]>,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { sizes, weights, tokens, residual, mask, output, kept } = self;
        let (lanes, c, w) = (Lanes(simd), sizes.c, sizes.width());
        for (row, down) in tokens.chunks_exact(c).zip(kept.down.chunks_exact_mut(w)) {
            lanes.dots(row, &weights.down, down);
            lanes.add(down, &weights.down_bias);
        }
        let mut hidden: Vec<f32> = kept.down.to_vec();
        lanes.quick_gelu(&mut hidden);
        let bias = Some(&weights.conv_bias[..]);
        convolve(lanes, &weights.reach, w, &weights.taps, bias, &hidden, kept.conv);
        hidden.copy_from_slice(kept.conv);
        lanes.quick_gelu(&mut hidden);
        drop_out(sizes, mask, &mut hidden);
        for (t, (row, hidden)) in output.chunks_exact_mut(c).zip(hidden.chunks_exact(w)).enumerate()
        {
            row.copy_from_slice(&weights.up_bias);
            if let Some(residual) = residual {
                lanes.add(row, &residual[t * c..][..c]);
            }
            lanes.combine(hidden, &weights.up, row);
        }
    }
}

/// Adds the gradients of the weights to `gradients`, and writes that of the tokens.
#[derive(Debug)]
pub(super) struct Backward<'a> {
    pub(super) sizes: &'a Sizes,
    pub(super) weights: &'a Packed,
    /// The layer norm that makes what the bypass read of `tokens`, where one does.
    pub(super) norm: Option<Norm<'a>>,
    pub(super) tokens: &'a [f32],
    /// As in [`Forward`].
    pub(super) mask: Option<&'a [f32]>,
    pub(super) kept: Kept<&'a [f32]>,
    /// That of the output, `[T, C]`.
    pub(super) gradient: &'a [f32],
    /// That of what the bypass read, `[T, C]`, where it is wanted.
    pub(super) token_gradient: Option<&'a mut [f32]>,
    pub(super) gradients: Gradients<'a>,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { sizes, weights, norm, tokens, mask, kept, gradient, .. } = self;
        let (lanes, gradients, c, w) = (Lanes(simd), self.gradients, sizes.c, sizes.width());
        // Up.
        let mut hidden = kept.conv.to_vec();
        lanes.quick_gelu(&mut hidden);
        drop_out(sizes, mask, &mut hidden);
        let mut inner = vec![0.0; hidden.len()];
        for (row, inner) in gradient.chunks_exact(c).zip(inner.chunks_exact_mut(w)) {
            lanes.dots(row, &weights.up, inner);
            lanes.add(gradients.up_bias, row);
        }
        lanes.add_products(c, &hidden, gradient, gradients.up);
        // Convolution.
        drop_out(sizes, mask, &mut inner);
        lanes.scale_by_slope(kept.conv, &mut inner);
        for row in inner.chunks_exact(w) {
            lanes.add(gradients.conv_bias, row);
        }
        hidden.copy_from_slice(kept.down);
        lanes.quick_gelu(&mut hidden);
        add_taps(lanes, &weights.reach, w, &hidden, &inner, gradients.taps);
        convolve(lanes, &weights.reach, w, &weights.taps_back, None, &inner, &mut hidden);
        // Down.
        lanes.scale_by_slope(kept.down, &mut hidden);
        for row in hidden.chunks_exact(w) {
            lanes.add(gradients.down_bias, row);
        }
        match norm {
            None => lanes.add_products(c, &hidden, tokens, gradients.down),
            Some(Norm { weight, bias, eps }) => {
                let mut normed = vec![0.0; NORMED * c];
                for (hidden, rows) in hidden.chunks(NORMED * w).zip(tokens.chunks(NORMED * c)) {
                    let normed = &mut normed[..rows.len()];
                    for (row, normed) in rows.chunks_exact(c).zip(normed.chunks_exact_mut(c)) {
                        lanes.norm((weight, bias, eps), row, normed);
                    }
                    lanes.add_products(c, hidden, normed, gradients.down);
                }
            }
        }
        let Some(token_gradient) = self.token_gradient else { return };
        token_gradient.fill(0.0);
        for (row, hidden) in token_gradient.chunks_exact_mut(c).zip(hidden.chunks_exact(w)) {
            lanes.combine(hidden, &weights.down, row);
        }
    }
}

/// Rows that are normed at a time, so that they are used while they are in the cache.
const NORMED: usize = 4;

/// A token, one that is within the kernel's reach from it, and the number of the tap between them.
type Tap = [u32; 3];

/// A range of the tokens that lies on a grid of its own.
struct Grid {
    start: usize,
    rows: usize,
    cols: usize,
}

impl Sizes {
    /// Each prefix token is a grid of its own, and so are the patches.
    fn grids(&self) -> impl Iterator<Item = Grid> {
        let prefix = (0..self.prefix).map(|start| Grid { start, rows: 1, cols: 1 });
        let patches = Grid { start: self.prefix, rows: self.grid.0, cols: self.grid.1 };
        prefix.chain(std::iter::once(patches))
    }

    /// Every tap at every token, token by token.
    fn taps(&self) -> Vec<Tap> {
        let mut taps = Vec::new();
        for grid in self.grids() {
            let at = |row: usize, col: usize| grid.start + row * grid.cols + col;
            for (row, col) in (0..grid.rows).flat_map(|row| (0..grid.cols).map(move |c| (row, c))) {
                let (vertical, first_row) = self.reach(row, grid.rows);
                let (horizontal, first_col) = self.reach(col, grid.cols);
                for (dy, y) in vertical.zip(first_row..) {
                    for (dx, x) in horizontal.clone().zip(first_col..) {
                        let tap = dy * self.k + dx;
                        taps.push([at(row, col), at(y, x), tap].map(|index| index as u32));
                    }
                }
            }
        }
        taps
    }

    /// The taps that reach within a grid's `length` from `at`, and where the first one is.
    fn reach(&self, at: usize, length: usize) -> (std::ops::Range<usize>, usize) {
        let half = self.k / 2;
        let first = half.saturating_sub(at);
        let end = self.k.min(length + half - at);
        (first..end, (at + first) - half)
    }
}

/// The kxk convolution of `input [T, w]` into `output [T, w]`.
#[inline(always)]
fn convolve<S: Simd>(
    lanes: Lanes<S>,
    reach: &[Tap],
    w: usize,
    taps: &[f32],
    bias: Option<&[f32]>,
    input: &[f32],
    output: &mut [f32],
) {
    for row in output.chunks_exact_mut(w) {
        match bias {
            Some(bias) => row.copy_from_slice(bias),
            None => row.fill(0.0),
        }
    }
    for [at, from, tap] in reach.iter().map(|tap| tap.map(|index| index as usize)) {
        let (output, input) = (&mut output[at * w..][..w], &input[from * w..][..w]);
        lanes.combine(input, &taps[tap * w * w..][..w * w], output);
    }
}

/// Adds the gradient of the taps, from the input of the convolution and the gradient of its
/// output.
#[inline(always)]
fn add_taps<S: Simd>(
    lanes: Lanes<S>,
    reach: &[Tap],
    w: usize,
    input: &[f32],
    gradient: &[f32],
    taps: &mut [f32],
) {
    for [at, from, tap] in reach.iter().map(|tap| tap.map(|index| index as usize)) {
        let (gradient, input) = (&gradient[at * w..][..w], &input[from * w..][..w]);
        let taps = &mut taps[tap * w * w..][..w * w];
        for (&value, sums) in input.iter().zip(taps.chunks_exact_mut(w)) {
            lanes.add_scaled(sums, value, gradient);
        }
    }
}

/// Multiplies `hidden [T, w]` by the mask `[T, h]`.
fn drop_out(sizes: &Sizes, mask: Option<&[f32]>, hidden: &mut [f32]) {
    let Some(mask) = mask else { return };
    for (hidden, mask) in hidden.chunks_exact_mut(sizes.width()).zip(mask.chunks_exact(sizes.h)) {
        hidden.iter_mut().zip(mask).for_each(|(x, m)| *x *= m);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reach_stays_within_the_grid() {
        let sizes = Sizes { prefix: 0, grid: (3, 3), c: 8, h: 8, k: 5 };
        assert_eq!(sizes.reach(0, 3), (2..5, 0));
        assert_eq!(sizes.reach(2, 3), (0..3, 0));
        assert_eq!(sizes.reach(0, 1), (2..3, 0));
        assert_eq!(sizes.reach(3, 7), (0..5, 1));
    }
}
