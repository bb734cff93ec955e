//! Merging of two by two patches.

use tch::Tensor;

use crate::error::Result;

/// Concatenates the channels of each two by two patches of a grid: `[B, N, C] -> [B, N / 4, 4C]`,
/// in the order upper left, lower left, upper right, lower right. A side with an odd number of
/// patches is padded with one row or column of zeros.
pub(crate) fn side_by_side(tokens: &Tensor, grid: (i64, i64)) -> Result<Tensor> {
    let (rows, cols) = grid;
    let mut x = tokens.f_unflatten(1, [rows, cols])?;
    if rows % 2 + cols % 2 > 0 {
        x = x.f_constant_pad_nd([0, 0, 0, cols % 2, 0, rows % 2])?;
    }
    // [B, rows / 2, down, cols / 2, across, C] -> [B, rows / 2, cols / 2, across, down, C]
    let x = x.f_unflatten(2, [-1, 2])?.f_unflatten(1, [-1, 2])?;
    Ok(x.f_permute([0, 1, 3, 4, 2, 5])?.f_flatten(3, 5)?.f_flatten(1, 2)?)
}
