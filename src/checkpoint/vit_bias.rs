//! The bias table of a ViT and its learned frequencies in a checkpoint.

use tch::Tensor;

use super::names::SHARED_BIAS_TABLE;
use super::plan::Plan;
use crate::backbone::ViTConfig;
use crate::error::Result;
use crate::nn::resize_bias_table;

/// The model's name of the frequencies of learned rotary positions, `[2, depth, heads, d / 2]`.
pub(super) const FREQUENCIES: &str = "rope.freqs";

/// The end of the model's name of a bias table.
pub(super) const TABLE: &str = "attn.relative_position_bias_table";

/// The rows of a bias table for pairs with the class token, which are its last ones.
const CLASS_ROWS: i64 = 3;

/// Returns the name of the first block's bias table, if the file has one.
pub(super) fn bias_table(plan: &Plan) -> Option<&'static str> {
    let names = ["blocks.0.attn.relative_position_bias_table", SHARED_BIAS_TABLE];
    names.into_iter().find(|name| plan.has(name))
}

/// Returns the grid of patches whose bias table has `rows` rows: a square one or, if there is none,
/// the one that is most like a square, with fewer rows than columns. Returns `(0, 0)` if no grid has
/// such a table.
pub(super) fn bias_grid(rows: i64) -> (i64, i64) {
    let offsets = rows.saturating_sub(CLASS_ROWS).max(0);
    let sides = |down: i64| {
        let is_odd = |side: i64| side % 2 == 1;
        let across = offsets / down;
        (offsets % down == 0 && is_odd(down) && is_odd(across))
            .then_some((down / 2 + 1, across / 2 + 1))
    };
    let root = (offsets as f64).sqrt() as i64 + 1;
    (1..=root)
        .rev()
        .find_map(|down| sides(down).filter(|(rows, cols)| rows <= cols))
        .unwrap_or((0, 0))
}

/// Returns whether a bias table with `rows` rows is that of a square grid, which is then the only
/// grid that models with such a table have.
pub(super) fn is_of_square(rows: i64) -> bool {
    let (rows, cols) = bias_grid(rows);
    rows == cols && rows > 0
}

/// Reads a bias table with the rows that the grid of the config needs. The table of another grid is
/// resized as the library of its names does it.
pub(super) fn read_bias(
    plan: &Plan,
    name: &str,
    shape: &[i64],
    config: &ViTConfig,
) -> Result<Tensor> {
    let (rows, grid) = (plan.shape(name, shape.len())?[0], config.grid());
    let is_hugging_face = plan.family.name.starts_with("Hugging Face");
    // A table with the same number of rows is that of the same grid, whatever the shape of the grid.
    let from = if rows == shape[0] || !is_of_square(rows) { grid } else { bias_grid(rows) };
    let stored_rows = if from == grid { shape[0] } else { rows };
    let stored = plan.read(name, &[stored_rows, shape[1]], config.num_heads)?;
    if from == grid && (!is_hugging_face || grid.0 == grid.1) {
        return Ok(stored);
    }
    let patches = stored.f_narrow(0, 0, rows - CLASS_ROWS)?;
    let resized = if is_hugging_face {
        resize_bilinear(&patches, from, grid)?
    } else {
        resize_bias_table(&patches, from, grid)?
    };
    Ok(Tensor::f_cat(&[resized, stored.f_narrow(0, rows - CLASS_ROWS, CLASS_ROWS)?], 0)?)
}

/// Resamples a table as `BeitRelativePositionBias` of transformers does it: bilinearly, and reading
/// the table of a grid with the sides exchanged.
fn resize_bilinear(table: &Tensor, from: (i64, i64), to: (i64, i64)) -> Result<Tensor> {
    let offsets = |side: i64| 2 * side - 1;
    let map = table.f_reshape([1, offsets(from.1), offsets(from.0), -1])?;
    // [1, rows, cols, heads] -> [1, heads, rows, cols]
    let map = map.f_permute([0, 3, 1, 2])?;
    let size = [offsets(to.0), offsets(to.1)];
    let map = map.f_upsample_bilinear2d(size, false, None::<f64>, None::<f64>)?;
    Ok(map.f_permute([0, 2, 3, 1])?.f_reshape([offsets(to.0) * offsets(to.1), -1])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_of_a_table_is_as_square_as_it_can_be() {
        for (rows, grid) in [
            (27 * 27 + 3, (14, 14)),
            (5 * 9 + 3, (3, 5)),
            (7 + 3, (1, 4)),
            (1 + 3, (1, 1)),
            (8 + 3, (0, 0)),
            (3, (0, 0)),
            (-1, (0, 0)),
        ] {
            assert_eq!(bias_grid(rows), grid, "{rows}");
            assert_eq!(is_of_square(rows), grid.0 == grid.1 && grid.0 > 0, "{rows}");
        }
    }
}
