//! A learned bias between the class token and the patches of an image (BEiT, Bao et al., arXiv
//! 2106.08254).

use tch::{Device, Tensor};

use super::stored::widened;
use super::window::{num_offsets, offsets};
use crate::error::Result;

/// The row of a bias table for each pair of tokens, which are the class token and the patches of a
/// grid. `Clone` shares the rows, so that all blocks of a model have the same ones.
#[derive(Debug)]
pub(crate) struct GridPairs {
    grid: (i64, i64),
    /// `[1 + N, 1 + N]`, the first token of a pair before the second.
    rows: Tensor,
}

impl GridPairs {
    /// Creates the pairs of `grid` on `device`.
    pub(crate) fn new(grid: (i64, i64), device: Device) -> Result<Self> {
        let patches = offsets(grid)?;
        let (count, last) = (patches.size()[0], num_offsets(grid));
        // The last three rows of the table: from the class token to a patch, from a patch to the
        // class token, and from the class token to itself.
        let row = |shape: [i64; 2], number: i64| {
            Tensor::f_full(shape, last + number, (patches.kind(), Device::Cpu))
        };
        let class = Tensor::f_cat(&[row([1, 1], 2)?, row([1, count], 0)?], 1)?;
        let rest = Tensor::f_cat(&[row([count, 1], 1)?, patches], 1)?;
        Ok(GridPairs { grid, rows: Tensor::f_cat(&[class, rest], 0)?.f_to_device(device)? })
    }

    /// Returns the number of rows of the table of a grid: one for each offset between two patches,
    /// and three for the pairs with the class token.
    pub(crate) fn table_rows(grid: (i64, i64)) -> i64 {
        num_offsets(grid) + 3
    }

    /// Returns the number of rows of the table.
    pub(crate) fn num_rows(&self) -> i64 {
        Self::table_rows(self.grid)
    }
}

impl Clone for GridPairs {
    fn clone(&self) -> Self {
        GridPairs { grid: self.grid, rows: self.rows.shallow_clone() }
    }
}

/// The bias that a block adds to the scores between all tokens of an image.
#[derive(Debug)]
pub(crate) struct GridBias {
    pub(crate) pairs: GridPairs,
    /// `[GridPairs::table_rows, heads]`.
    pub(crate) table: Tensor,
}

impl GridBias {
    /// Returns the bias for the scores of the first `queries` tokens, `[1, heads, queries, T]`. The
    /// T tokens are `prefix` prefix tokens, the class token first, and the patches. A prefix token
    /// other than the class token, such as a prompt, has no place and therefore no bias.
    pub(crate) fn for_queries(&self, queries: i64, prefix: i64, x: &Tensor) -> Result<Tensor> {
        let own = self.pairs.rows.size()[0];
        // The patches are only among the queries if all tokens are.
        let of_own = if queries > prefix { own } else { 1 };
        let rows = self.pairs.rows.f_narrow(0, 0, of_own)?;
        let table = widened(&self.table, x)?;
        let bias = table.f_index_select(0, &rows.f_flatten(0, -1)?)?;
        // [queries, T, heads] -> [heads, queries, T]
        let bias = bias.f_unflatten(0, [of_own, own])?.f_permute([2, 0, 1])?;
        let bias = without_place(&bias, 2, prefix - 1)?;
        let bias = without_place(&bias, 1, queries - of_own)?;
        Ok(bias.f_unsqueeze(0)?.f_contiguous()?)
    }
}

impl Clone for GridBias {
    fn clone(&self) -> Self {
        GridBias { pairs: self.pairs.clone(), table: self.table.shallow_clone() }
    }
}

/// Inserts `count` zeros after the first place of the dimension `dim` of `bias`.
fn without_place(bias: &Tensor, dim: i64, count: i64) -> Result<Tensor> {
    if count == 0 {
        return Ok(bias.shallow_clone());
    }
    let mut shape = bias.size();
    shape[dim as usize] = count;
    let zeros = Tensor::f_zeros(&shape, (bias.kind(), bias.device()))?;
    let rest = bias.size()[dim as usize] - 1;
    Ok(Tensor::f_cat(&[bias.f_narrow(dim, 0, 1)?, zeros, bias.f_narrow(dim, 1, rest)?], dim)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    /// Compares with a loop over the pairs of tokens.
    #[test]
    fn the_bias_is_that_of_a_loop() {
        let (grid, heads) = ((2, 3), 2);
        let rows = GridPairs::table_rows(grid);
        let table = Tensor::arange(rows * heads, (Kind::Float, Device::Cpu)) + 1;
        let pairs = GridPairs::new(grid, Device::Cpu).unwrap();
        let bias = GridBias { pairs, table: table.view([rows, heads]) };
        for (prefix, queries) in [(1, 7), (1, 1), (3, 9), (3, 1), (3, 2), (3, 3)] {
            let tokens = prefix + 6;
            let found = bias.for_queries(queries, prefix, &bias.table).unwrap();
            assert_eq!(found.size(), [1, heads, queries, tokens]);
            let row = |a: i64, b: i64| match (a, b) {
                (0, 0) => Some(rows - 1),
                (0, b) if b >= prefix => Some(rows - 3),
                (a, 0) if a >= prefix => Some(rows - 2),
                (a, b) if a >= prefix && b >= prefix => {
                    let (a, b) = (a - prefix, b - prefix);
                    Some((a / 3 - b / 3 + 1) * 5 + a % 3 - b % 3 + 2)
                }
                _ => None,
            };
            for (a, b) in (0..queries).flat_map(|a| (0..tokens).map(move |b| (a, b))) {
                for head in 0..heads {
                    let expected = row(a, b).map_or(0, |row| row * heads + head + 1);
                    let found = found.double_value(&[0, head, a, b]);
                    assert_eq!(found, expected as f64, "{prefix} {queries}: {a} {b}");
                }
            }
        }
    }
}
