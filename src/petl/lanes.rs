//! Loops over f32 with the vectors of the processor.
//!
//! The length of every slice is a multiple of [`GROUP`], which is a multiple of every vector
//! length.

use pulp::{Simd, WithSimd};

/// The number of rows that [`Lanes::dots`] and [`Lanes::combine`] process side by side.
pub(super) const GROUP: usize = 8;
/// The number of rows that [`Lanes::add_products`] processes at once.
const ROWS: usize = 4;

/// Runs `op` with the widest vectors of the processor that a [`GROUP`] is a multiple of.
///
/// On x86 these are the vectors of AVX2. `pulp::Arch` would select AVX-512 if any crate of the
/// program enables the feature `x86-v4` of pulp, and such a vector is longer than a group.
pub(super) fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    return match pulp::x86::V3::try_new() {
        Some(simd) => Simd::vectorize(simd, op),
        None => Simd::vectorize(pulp::Scalar, op),
    };
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
    return pulp::Arch::new().dispatch(op);
}

/// The vector instructions of a processor.
#[derive(Clone, Copy)]
pub(super) struct Lanes<S>(pub(super) S);

// Everything is inlined into the one function that is compiled for the processor. A closure or a
// function that is not inlined would be compiled for the oldest supported processor.
impl<S: Simd> Lanes<S> {
    /// A longer vector would leave the end of a slice out without an error.
    const FITS: () = assert!(GROUP.is_multiple_of(S::F32_LANES), "vectors longer than a group");

    #[inline(always)]
    fn of(values: &[f32]) -> &[S::f32s] {
        let () = Self::FITS;
        S::as_simd_f32s(values).0
    }

    #[inline(always)]
    fn of_mut(values: &mut [f32]) -> &mut [S::f32s] {
        let () = Self::FITS;
        S::as_mut_simd_f32s(values).0
    }

    /// Computes `sums += values`.
    #[inline(always)]
    pub(super) fn add(self, sums: &mut [f32], values: &[f32]) {
        for (sum, value) in Self::of_mut(sums).iter_mut().zip(Self::of(values)) {
            *sum = self.0.add_f32s(*sum, *value);
        }
    }

    /// Computes `sum += factor * values`.
    #[inline(always)]
    pub(super) fn add_scaled(self, sum: &mut [f32], factor: f32, values: &[f32]) {
        let factor = self.0.splat_f32s(factor);
        for (sum, value) in Self::of_mut(sum).iter_mut().zip(Self::of(values)) {
            *sum = self.0.mul_add_e_f32s(factor, *value, *sum);
        }
    }

    /// Computes the dot products of `row [C]` with each row of `matrix [w, C]` into `products [w]`.
    #[inline(always)]
    pub(super) fn dots(self, row: &[f32], matrix: &[f32], products: &mut [f32]) {
        let c = row.len();
        let row = Self::of(row);
        for (products, matrix) in
            products.chunks_exact_mut(GROUP).zip(matrix.chunks_exact(GROUP * c))
        {
            let columns = Self::rows::<GROUP>(matrix, c, row.len());
            let mut sums = [self.0.splat_f32s(0.0); GROUP];
            for (i, &x) in row.iter().enumerate() {
                for j in 0..GROUP {
                    sums[j] = self.0.mul_add_e_f32s(x, columns[j][i], sums[j]);
                }
            }
            for j in 0..GROUP {
                products[j] = self.0.reduce_sum_f32s(sums[j]);
            }
        }
    }

    /// Computes `row [C] += factors [w] x matrix [w, C]`.
    #[inline(always)]
    pub(super) fn combine(self, factors: &[f32], matrix: &[f32], row: &mut [f32]) {
        let c = row.len();
        let row = Self::of_mut(row);
        for (factors, matrix) in factors.chunks_exact(GROUP).zip(matrix.chunks_exact(GROUP * c)) {
            let columns = Self::rows::<GROUP>(matrix, c, row.len());
            let mut splats = [self.0.splat_f32s(0.0); GROUP];
            for j in 0..GROUP {
                splats[j] = self.0.splat_f32s(factors[j]);
            }
            for (i, slot) in row.iter_mut().enumerate() {
                let mut sum = *slot;
                for j in 0..GROUP {
                    sum = self.0.mul_add_e_f32s(splats[j], columns[j][i], sum);
                }
                *slot = sum;
            }
        }
    }

    /// Computes `sums [w, C] += left^T x right` from `left [T, w]` and `right [T, C]`.
    #[inline(always)]
    pub(super) fn add_products(self, c: usize, left: &[f32], right: &[f32], sums: &mut [f32]) {
        let w = sums.len() / c;
        for (left, right) in left.chunks(ROWS * w).zip(right.chunks(ROWS * c)) {
            if right.len() == ROWS * c {
                self.add_product_of_rows(c, left, right, sums);
                continue;
            }
            for (left, right) in left.chunks_exact(w).zip(right.chunks_exact(c)) {
                for (&factor, sum) in left.iter().zip(sums.chunks_exact_mut(c)) {
                    self.add_scaled(sum, factor, right);
                }
            }
        }
    }

    /// Computes [`Lanes::add_products`] for [`ROWS`] rows, two sums at a time, so that each loaded
    /// value is used more than once.
    #[inline(always)]
    fn add_product_of_rows(self, c: usize, left: &[f32], right: &[f32], sums: &mut [f32]) {
        let w = sums.len() / c;
        for (pair, sums) in sums.chunks_exact_mut(2 * c).enumerate() {
            let (first, second) = sums.split_at_mut(c);
            let (first, second) = (Self::of_mut(first), Self::of_mut(second));
            let rows = Self::rows::<ROWS>(right, c, first.len());
            let mut factors = [[self.0.splat_f32s(0.0); 2]; ROWS];
            for r in 0..ROWS {
                for j in 0..2 {
                    factors[r][j] = self.0.splat_f32s(left[r * w + 2 * pair + j]);
                }
            }
            for (i, (first, second)) in first.iter_mut().zip(second).enumerate() {
                let (mut a, mut b) = (*first, *second);
                for r in 0..ROWS {
                    a = self.0.mul_add_e_f32s(factors[r][0], rows[r][i], a);
                    b = self.0.mul_add_e_f32s(factors[r][1], rows[r][i], b);
                }
                (*first, *second) = (a, b);
            }
        }
    }

    /// Returns the first N rows of a matrix of width C, each with `length` vectors. This way the
    /// compiler knows the length.
    #[inline(always)]
    fn rows<const N: usize>(matrix: &[f32], c: usize, length: usize) -> [&[S::f32s]; N] {
        let mut rows: [&[S::f32s]; N] = [&[]; N];
        for (row, values) in rows.iter_mut().zip(matrix.chunks_exact(c)) {
            *row = &Self::of(values)[..length];
        }
        rows
    }

    /// Computes the layer norm of one token.
    #[inline(always)]
    pub(super) fn norm(
        self,
        (weight, bias, eps): (&[f32], &[f32], f32),
        row: &[f32],
        normed: &mut [f32],
    ) {
        let simd = self.0;
        let count = row.len() as f32;
        let mut sum = simd.splat_f32s(0.0);
        for x in Self::of(row) {
            sum = simd.add_f32s(sum, *x);
        }
        let mean = simd.splat_f32s(simd.reduce_sum_f32s(sum) / count);
        let mut squares = simd.splat_f32s(0.0);
        for x in Self::of(row) {
            let x = simd.sub_f32s(*x, mean);
            squares = simd.mul_add_e_f32s(x, x, squares);
        }
        let variance = simd.reduce_sum_f32s(squares) / count;
        let scale = simd.splat_f32s((variance + eps).sqrt().recip());
        let weights = Self::of(weight).iter().zip(Self::of(bias));
        let rows = Self::of_mut(normed).iter_mut().zip(Self::of(row));
        for ((y, x), (weight, bias)) in rows.zip(weights) {
            let x = simd.mul_f32s(simd.sub_f32s(*x, mean), scale);
            *y = simd.mul_add_e_f32s(x, *weight, *bias);
        }
    }

    /// Computes `x * sigmoid(1.702 x)` in place.
    #[inline(always)]
    pub(super) fn quick_gelu(self, values: &mut [f32]) {
        let steepness = self.0.splat_f32s(1.702);
        for x in Self::of_mut(values) {
            let gate = self.sigmoid(self.0.mul_f32s(steepness, *x));
            *x = self.0.mul_f32s(*x, gate);
        }
    }

    /// Multiplies each gradient by the derivative of QuickGELU at its input.
    #[inline(always)]
    pub(super) fn scale_by_slope(self, inputs: &[f32], gradients: &mut [f32]) {
        let simd = self.0;
        let (one, steepness) = (simd.splat_f32s(1.0), simd.splat_f32s(1.702));
        for (gradient, &x) in Self::of_mut(gradients).iter_mut().zip(Self::of(inputs)) {
            let x = simd.mul_f32s(steepness, x);
            let gate = self.sigmoid(x);
            let slope = simd.mul_add_e_f32s(x, simd.sub_f32s(one, gate), one);
            *gradient = simd.mul_f32s(*gradient, simd.mul_f32s(gate, slope));
        }
    }

    #[inline(always)]
    fn sigmoid(self, x: S::f32s) -> S::f32s {
        let one = self.0.splat_f32s(1.0);
        self.0.div_f32s(one, self.0.add_f32s(one, self.exp(self.0.neg_f32s(x))))
    }

    /// Computes the exponential within 2 units in the last place, as `2^n * e^r` with `|r| <= ln 2
    /// / 2` and a Taylor polynomial for `e^r`. Inputs are clamped to `-87..=88`, so that the result
    /// stays within the range of f32.
    ///
    /// NaN stays NaN or is clamped to 88, depending on the instructions. The callers multiply by
    /// their own input afterwards, which is then NaN.
    #[inline(always)]
    fn exp(self, x: S::f32s) -> S::f32s {
        /// Adding this number rounds to an integer, which is then in the low bits of the sum.
        const ROUND: f32 = 12_582_912.0;
        /// ln 2 as a sum of two parts. The first part has few bits.
        const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
        const POLYNOMIAL: [f32; 7] =
            [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
        let simd = self.0;
        let x = simd.max_f32s(simd.splat_f32s(-87.0), simd.min_f32s(simd.splat_f32s(88.0), x));
        let shifted = simd.mul_add_e_f32s(
            x,
            simd.splat_f32s(std::f32::consts::LOG2_E),
            simd.splat_f32s(ROUND),
        );
        let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
        let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN_2[0]), x);
        let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN_2[1]), r);
        let mut sum = simd.splat_f32s(1.0 / 5040.0);
        for coefficient in POLYNOMIAL {
            sum = simd.mul_add_e_f32s(sum, r, simd.splat_f32s(coefficient));
        }
        let shift = simd.splat_u32s(23);
        let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), shift);
        let power = simd.add_u32s(exponent, simd.splat_u32s(1.0f32.to_bits()));
        simd.mul_f32s(sum, simd.transmute_f32s_u32s(power))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Runs `op` once on each path that the crate may take on some processor and that this one
    /// supports, and on pulp's plain twins of vectors of 128 bits (the length of Arm's) and 256
    /// bits. Returns the results with their names.
    ///
    /// On x86 the paths are scalars and AVX2 with FMA. There is no path with AVX-512.
    pub(crate) fn on_each_path<Op: WithSimd + Copy>(op: Op) -> Vec<(&'static str, Op::Output)> {
        let mut results = vec![
            ("scalars", pulp::Scalar.vectorize(op)),
            ("128 bits", pulp::Scalar128b.vectorize(op)),
            ("256 bits", pulp::Scalar256b.vectorize(op)),
        ];
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        results.extend(pulp::x86::V3::try_new().map(|simd| ("AVX2", Simd::vectorize(simd, op))));
        #[cfg(target_arch = "aarch64")]
        results
            .extend(pulp::aarch64::Neon::try_new().map(|simd| ("Neon", Simd::vectorize(simd, op))));
        results.push(("the dispatched path", dispatch(op)));
        results
    }

    #[derive(Clone, Copy)]
    struct VectorLength;

    impl WithSimd for VectorLength {
        type Output = usize;

        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }

    #[test]
    fn the_dispatched_path_is_the_widest_that_fits_a_group() {
        let lengths = on_each_path(VectorLength);
        assert!(lengths.iter().all(|(_, length)| GROUP.is_multiple_of(*length)), "{lengths:?}");
        let length = |path| lengths.iter().find(|(name, _)| *name == path).map(|(_, n)| *n);
        let native = length("AVX2").or(length("Neon")).or(length("scalars"));
        if cfg!(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")) {
            assert_eq!(length("the dispatched path"), native, "{lengths:?}");
        }
    }

    #[derive(Clone, Copy)]
    struct Exp<'a>(&'a [f32]);

    impl WithSimd for Exp<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut values = self.0.to_vec();
            for x in Lanes::<S>::of_mut(&mut values) {
                *x = Lanes(simd).exp(*x);
            }
            values
        }
    }

    #[test]
    fn exp_is_that_of_f64() {
        let inputs: Vec<f32> = (-8696..=8799).map(|i| i as f32 * 0.01).collect();
        for (path, found) in on_each_path(Exp(&inputs)) {
            for (&x, found) in inputs.iter().zip(found) {
                let expected = f64::from(x).exp();
                let gap = (f64::from(found) - expected).abs() / expected;
                assert!(gap < 2.5e-7, "{path}, {x}: {found} {expected} {gap}");
            }
        }
        let odd = [f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e30, -1e30, 1e-40, -1e-40];
        for (path, odd) in on_each_path(Exp(&odd)) {
            let [most, least, ones @ .., huge, tiny, one, another] = &odd[..] else { panic!() };
            assert!([most, huge].iter().all(|&&x| x > 1e38 && x.is_finite()), "{path}: {odd:?}");
            assert!([least, tiny].iter().all(|&&x| x > 0.0 && x < 1e-37), "{path}: {odd:?}");
            assert!(ones.iter().chain([one, another]).all(|&x| x == 1.0), "{path}: {odd:?}");
        }
    }

    /// QuickGELU of the values, then its slope at them.
    #[derive(Clone, Copy)]
    struct QuickGelu<'a>(&'a [f32]);

    impl WithSimd for QuickGelu<'_> {
        type Output = [Vec<f32>; 2];

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
            let (mut values, mut slopes) = (self.0.to_vec(), vec![1.0; self.0.len()]);
            Lanes(simd).quick_gelu(&mut values);
            Lanes(simd).scale_by_slope(self.0, &mut slopes);
            [values, slopes]
        }
    }

    /// A run that diverges has to be seen, whatever the processor does with NaN in a minimum.
    #[test]
    fn nan_stays_nan_and_changes_nothing_beside_it() {
        let values = [0.5, f32::NAN, -1.0, 2.0, 0.0, 3.0, -4.0, -f32::NAN];
        for (path, parts) in on_each_path(QuickGelu(&values)) {
            for part in parts {
                let same = part.iter().zip(values).all(|(y, x)| y.is_nan() == x.is_nan());
                assert!(same, "{path}: {part:?}");
            }
        }
    }
}
