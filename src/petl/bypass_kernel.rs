//! The forward and backward pass of one sample through a bypass on a CPU, over plain slices.
//!
//! Each pass reads the tokens once, while they are in the cache. As separate operations, the same
//! arithmetic is limited by memory bandwidth, by matrix products with only 8 columns, and by the
//! start of each operation.

use pulp::{Simd, WithSimd};

use super::lanes::{GROUP, Lanes};

/// The sizes of a bypass and of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// P, the number of prefix tokens.
    pub(super) prefix: usize,
    /// Rows and columns of the patch grid.
    pub(super) grid: (usize, usize),
    /// C, the embedding dim, a multiple of [`GROUP`].
    pub(super) c: usize,
    /// h, the bottleneck dim.
    pub(super) h: usize,
    /// Side of the convolution kernel.
    pub(super) k: usize,
}

impl Sizes {
    /// Returns P + N, the number of tokens.
    pub(super) fn tokens(&self) -> usize {
        self.prefix + self.grid.0 * self.grid.1
    }

    /// Returns h rounded up to whole groups. The values above h stay zero.
    pub(super) fn width(&self) -> usize {
        self.h.next_multiple_of(GROUP)
    }

    /// Returns the length of each part of [`Gradients`], in the order of its fields.
    pub(super) fn gradient_parts(&self) -> [usize; 6] {
        let (w, c) = (self.width(), self.c);
        [w * c, w, self.k * self.k * w * w, w, w * c, c]
    }

    /// Returns the length of the slice for [`Gradients::split`].
    pub(super) fn num_gradients(&self) -> usize {
        self.gradient_parts().iter().sum()
    }
}

/// The weights of a bypass in the layout that the kernels read; w is [`Sizes::width`].
#[derive(Debug)]
pub(super) struct Packed {
    /// `[w, C]`.
    down: Vec<f32>,
    down_bias: Vec<f32>,
    /// `[k * k, w inputs, w outputs]`.
    taps: Vec<f32>,
    /// The taps for backward: mirrored, `[k * k, w outputs, w inputs]`.
    taps_back: Vec<f32>,
    conv_bias: Vec<f32>,
    /// `[w, C]`, times s.
    up: Vec<f32>,
    /// `[C]`, times s.
    up_bias: Vec<f32>,
    reach: Vec<Tap>,
}

/// The weights of a bypass in the layout of their tensors: `[h, C]`, `[h]`, `[h, h, k, k]`, `[h]`,
/// `[C, h]` and `[C]`.
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
    /// Packs the weights. The output is multiplied by `scale`.
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

/// Gradients of the weights, in the layout of [`Packed`]. The gradients of `up` and `up_bias` do
/// not contain the factor s.
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
    /// Splits `all`, which has the length [`Sizes::num_gradients`], into the parts.
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

/// The layer norm whose output is the input of the bypass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm<'a> {
    pub(super) weight: &'a [f32],
    pub(super) bias: &'a [f32],
    pub(super) eps: f32,
}

/// The tensors that the forward pass keeps of a sample, `[T, w]` each: the inputs of the two
/// activations.
#[derive(Debug)]
pub(super) struct Kept<T> {
    pub(super) down: T,
    pub(super) conv: T,
}

/// Computes `output = residual + s * Convpass(tokens)`, `[T, C]`. Without a residual, computes only
/// the second term.
#[derive(Debug)]
pub(super) struct Forward<'a> {
    pub(super) sizes: &'a Sizes,
    pub(super) weights: &'a Packed,
    pub(super) tokens: &'a [f32],
    pub(super) residual: Option<&'a [f32]>,
    /// Dropout mask, `[T, h]`.
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

/// Adds the gradients of the weights to `gradients` and writes the gradient of the tokens.
#[derive(Debug)]
pub(super) struct Backward<'a> {
    pub(super) sizes: &'a Sizes,
    pub(super) weights: &'a Packed,
    /// The layer norm to apply to `tokens`, if the bypass reads normed tokens.
    pub(super) norm: Option<Norm<'a>>,
    pub(super) tokens: &'a [f32],
    /// Dropout mask, `[T, h]`, as in [`Forward`].
    pub(super) mask: Option<&'a [f32]>,
    pub(super) kept: Kept<&'a [f32]>,
    /// Gradient of the output, `[T, C]`.
    pub(super) gradient: &'a [f32],
    /// Receives the gradient of the input of the bypass, `[T, C]`; `None` if it is not needed.
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

/// The number of rows that are normed at once, so that they are still in the cache when they are
/// used.
const NORMED: usize = 4;

/// A token, a token within the kernel's reach of it, and the index of the tap between them.
type Tap = [u32; 3];

/// A range of tokens that forms its own grid.
struct Grid {
    start: usize,
    rows: usize,
    cols: usize,
}

impl Sizes {
    /// Returns the grids that the convolution treats as separate images. Each prefix token is one
    /// grid, and the patches are one grid if there are any.
    fn grids(&self) -> impl Iterator<Item = Grid> {
        let prefix = (0..self.prefix).map(|start| Grid { start, rows: 1, cols: 1 });
        let (rows, cols) = self.grid;
        let patches = Grid { start: self.prefix, rows, cols };
        prefix.chain((rows > 0 && cols > 0).then_some(patches))
    }

    /// Returns every tap of every token, ordered by token.
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

    /// Returns the range of taps that stay within a side of `length` from position `at`, and the
    /// position that the first of them reads.
    fn reach(&self, at: usize, length: usize) -> (std::ops::Range<usize>, usize) {
        let half = self.k / 2;
        let first = half.saturating_sub(at);
        let end = self.k.min(length + half - at);
        (first..end, (at + first) - half)
    }
}

/// Computes the kxk convolution of `input [T, w]` into `output [T, w]`.
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

/// Adds the gradient of the taps, computed from the input of the convolution and the gradient of
/// its output.
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
    use super::super::lanes::tests::on_each_path;
    use super::*;

    /// A sample and weights with fixed random values.
    struct Case {
        sizes: Sizes,
        /// The parts of [`Stored`], in the order of its fields.
        weights: [Vec<f32>; 6],
        scale: f32,
        /// Weight and bias of the layer norm that computes the tokens, if there is one.
        norm: Option<[Vec<f32>; 2]>,
        raw: Vec<f32>,
        residual: Option<Vec<f32>>,
        mask: Option<Vec<f32>>,
        /// The gradient of the output.
        probe: Vec<f32>,
    }

    const EPS: f32 = 1e-6;

    impl Case {
        fn new(sizes: Sizes, has_norm: bool, has_mask: bool, has_residual: bool) -> Self {
            let Sizes { c, h, k, .. } = sizes;
            let t = sizes.tokens();
            let mut state = 1u64;
            let mut draw = |count: usize| -> Vec<f32> {
                let mut next = || {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 40) as f32 / 2f32.powi(23) - 1.0
                };
                (0..count).map(|_| next()).collect()
            };
            let weights = [h * c, h, h * h * k * k, h, c * h, c].map(&mut draw);
            let mut mask = draw(t * h);
            mask.iter_mut().for_each(|m| *m = if *m > -0.4 { 1.0 / 0.7 } else { 0.0 });
            Case {
                weights,
                scale: 0.7,
                norm: has_norm.then(|| [draw(c), draw(c)]),
                raw: draw(t * c),
                residual: has_residual.then(|| draw(t * c)),
                mask: has_mask.then_some(mask),
                probe: draw(t * c),
                sizes,
            }
        }

        /// Returns the input of the bypass: the tokens or their layer norm.
        fn tokens(&self) -> Vec<f64> {
            let c = self.sizes.c;
            let raw = self.raw.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let Some([weight, bias]) = &self.norm else { return raw };
            let mut normed = Vec::new();
            for row in raw.chunks(c) {
                let mean = row.iter().sum::<f64>() / c as f64;
                let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
                let scale = (variance + f64::from(EPS)).sqrt().recip();
                let weights = weight.iter().zip(bias).map(|(w, b)| (f64::from(*w), f64::from(*b)));
                normed
                    .extend(row.iter().zip(weights).map(|(x, (w, b))| (x - mean) * scale * w + b));
            }
            normed
        }

        /// Returns the six weights and the tokens in f64.
        fn leaves(&self) -> [Vec<f64>; 7] {
            let wide = |values: &Vec<f32>| values.iter().map(|&x| f64::from(x)).collect();
            let [down, down_bias, conv, conv_bias, up, up_bias] = self.weights.each_ref().map(wide);
            [down, down_bias, conv, conv_bias, up, up_bias, self.tokens()]
        }
    }

    /// The naive twin: the equations in f64, one value at a time.
    fn naive(case: &Case, leaves: &[Vec<f64>; 7]) -> Vec<f64> {
        let Sizes { prefix, grid: (rows, cols), c, h, k } = case.sizes;
        let [down, down_bias, conv, conv_bias, up, up_bias, tokens] = leaves;
        let act = |x: f64| x / (1.0 + (-1.702 * x).exp());
        let dot =
            |row: &[f64], weights: &[f64]| row.iter().zip(weights).map(|(x, w)| x * w).sum::<f64>();
        let hidden: Vec<Vec<f64>> = tokens
            .chunks(c)
            .map(|row| (0..h).map(|j| act(dot(row, &down[j * c..][..c]) + down_bias[j])).collect())
            .collect();
        let mut output = Vec::new();
        for token in 0..tokens.len() / c {
            let (start, rows, cols) =
                if token < prefix { (token, 1, 1) } else { (prefix, rows, cols) };
            let (row, col) = ((token - start) / cols, (token - start) % cols);
            let mut sums = conv_bias.clone();
            for (dy, dx) in (0..k).flat_map(|dy| (0..k).map(move |dx| (dy, dx))) {
                let (y, x) = ((row + dy).wrapping_sub(k / 2), (col + dx).wrapping_sub(k / 2));
                if y >= rows || x >= cols {
                    continue;
                }
                let from = &hidden[start + y * cols + x];
                for (o, i) in (0..h).flat_map(|o| (0..h).map(move |i| (o, i))) {
                    sums[o] += conv[((o * h + i) * k + dy) * k + dx] * from[i];
                }
            }
            let mask = |j: usize| case.mask.as_ref().map_or(1.0, |mask| mask[token * h + j].into());
            let sums: Vec<f64> = sums.iter().enumerate().map(|(j, &x)| act(x) * mask(j)).collect();
            for channel in 0..c {
                let residual = case.residual.as_ref().map_or(0.0, |all| all[token * c + channel]);
                let sum = dot(&sums, &up[channel * h..][..h]) + up_bias[channel];
                output.push(f64::from(residual) + f64::from(case.scale) * sum);
            }
        }
        output
    }

    /// Returns the output of the twin, and the gradients of its seven leaves by central
    /// differences.
    fn expected(case: &Case) -> Vec<Vec<f64>> {
        let mut leaves = case.leaves();
        let loss = |leaves: &[Vec<f64>; 7]| {
            let output = naive(case, leaves);
            output.iter().zip(&case.probe).map(|(y, &p)| y * f64::from(p)).sum::<f64>()
        };
        let mut all = vec![naive(case, &leaves)];
        for leaf in 0..leaves.len() {
            let mut gradient = Vec::new();
            for i in 0..leaves[leaf].len() {
                let (centre, step) = (leaves[leaf][i], 1e-5);
                let mut at = |value: f64| {
                    leaves[leaf][i] = value;
                    loss(&leaves)
                };
                gradient.push((at(centre + step) - at(centre - step)) / (2.0 * step));
                at(centre);
            }
            all.push(gradient);
        }
        all
    }

    /// Runs both kernels on a case with the instructions of `simd`. Returns the output and the
    /// gradients in the order of [`expected`].
    #[derive(Clone, Copy)]
    struct BothWays<'a>(&'a Case);

    impl WithSimd for BothWays<'_> {
        type Output = Vec<Vec<f32>>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
            let BothWays(case) = self;
            let (sizes, t) = (&case.sizes, case.sizes.tokens());
            let (c, h, k, w) = (sizes.c, sizes.h, sizes.k, sizes.width());
            let [down, down_bias, conv, conv_bias, up, up_bias] = &case.weights;
            let stored = Stored { down, down_bias, conv, conv_bias, up, up_bias };
            let packed = Packed::new(sizes, &stored, case.scale);
            let read: Vec<f32> = case.tokens().iter().map(|&x| x as f32).collect();
            // The buffers hold NaN, because the kernels must not depend on their previous content.
            let mut output = vec![f32::NAN; t * c];
            let [mut kept_down, mut kept_conv] = [vec![f32::NAN; t * w], vec![f32::NAN; t * w]];
            let mut token_gradient = vec![f32::NAN; t * c];
            let mut parts = vec![0.0; sizes.num_gradients()];
            Forward {
                sizes,
                weights: &packed,
                tokens: &read,
                residual: case.residual.as_deref(),
                mask: case.mask.as_deref(),
                output: &mut output,
                kept: Kept { down: &mut kept_down, conv: &mut kept_conv },
            }
            .with_simd(simd);
            let norm = case.norm.as_ref();
            Backward {
                sizes,
                weights: &packed,
                norm: norm.map(|[weight, bias]| Norm { weight, bias, eps: EPS }),
                tokens: &case.raw,
                mask: case.mask.as_deref(),
                kept: Kept { down: &kept_down, conv: &kept_conv },
                gradient: &case.probe,
                token_gradient: Some(&mut token_gradient),
                gradients: Gradients::split(sizes, &mut parts),
            }
            .with_simd(simd);
            let parts = Gradients::split(sizes, &mut parts);
            let each = |count: usize, at: &dyn Fn(usize) -> f32| (0..count).map(at).collect();
            vec![
                output,
                parts.down[..h * c].to_vec(),
                parts.down_bias[..h].to_vec(),
                each(h * h * k * k, &|i| {
                    let (output, input, tap) = (i / (h * k * k), i / (k * k) % h, i % (k * k));
                    parts.taps[(tap * w + input) * w + output]
                }),
                parts.conv_bias[..h].to_vec(),
                each(c * h, &|i| case.scale * parts.up[i % h * c + i / h]),
                each(c, &|i| case.scale * parts.up_bias[i]),
                token_gradient,
            ]
        }
    }

    fn sizes(prefix: usize, grid: (usize, usize), c: usize, h: usize, k: usize) -> Sizes {
        Sizes { prefix, grid, c, h, k }
    }

    /// The gap between a value in f32 and its twin, relative to the largest value of its tensor or
    /// to one.
    const TOLERANCE: f64 = 3e-6;

    /// C is a multiple of 8, as [`Sizes`] demands, and mostly not of 16; h is mostly not a multiple
    /// of 8.
    #[test]
    fn every_path_agrees_with_the_plain_twin() {
        let cases = [
            Case::new(sizes(0, (1, 1), 8, 1, 1), false, false, false),
            Case::new(sizes(1, (0, 0), 8, 1, 5), true, false, true),
            Case::new(sizes(0, (1, 1), 8, 8, 5), true, true, true),
            Case::new(sizes(1, (3, 2), 24, 9, 3), true, true, true),
            Case::new(sizes(0, (3, 3), 16, 3, 3), false, true, false),
            Case::new(sizes(2, (0, 0), 16, 3, 3), true, false, true),
            Case::new(sizes(2, (usize::MAX, 0), 8, 2, 3), false, false, true),
            Case::new(sizes(3, (1, 5), 16, 7, 3), true, false, true),
            Case::new(sizes(1, (2, 7), 8, 16, 1), false, true, true),
            Case::new(sizes(5, (7, 1), 24, 5, 5), true, true, true),
            Case::new(sizes(5, (1, 6), 40, 2, 5), false, false, false),
            Case::new(sizes(0, (4, 4), 8, 17, 1), true, true, false),
        ];
        for case in &cases {
            let expected = expected(case);
            for (path, found) in on_each_path(BothWays(case)) {
                assert_eq!(found.len(), expected.len());
                for (part, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert_eq!(found.len(), expected.len(), "part {part} of {:?}", case.sizes);
                    let size = expected.iter().fold(1.0f64, |size, x| size.max(x.abs()));
                    for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
                        let gap = (f64::from(found) - expected).abs() / size;
                        let at = (path, case.sizes, part, i);
                        assert!(gap < TOLERANCE, "{at:?}: {found} is not {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn reach_stays_within_the_grid() {
        let sizes = sizes(0, (3, 3), 8, 8, 5);
        assert_eq!(sizes.reach(0, 3), (2..5, 0));
        assert_eq!(sizes.reach(2, 3), (0..3, 0));
        assert_eq!(sizes.reach(0, 1), (2..3, 0));
        assert_eq!(sizes.reach(3, 7), (0..5, 1));
    }

    #[test]
    fn a_grid_without_patches_has_no_taps() {
        for grid in [(0, 0), (0, 7), (usize::MAX, 0), (0, usize::MAX)] {
            assert!(sizes(0, grid, 8, 8, 3).taps().is_empty());
            assert_eq!(sizes(2, grid, 8, 8, 3).taps(), [[0, 0, 4], [1, 1, 4]]);
        }
    }
}
