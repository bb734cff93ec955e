//! What a checkpoint of a Swin tells, and its tables of relative position bias.

use std::path::Path;

use tch::Tensor;

use super::load::{Checkpoint, infer};
use super::plan::Plan;
use super::square_root;
use crate::backbone::SwinConfig;
use crate::error::Result;
use crate::nn::resize_bias_table;

/// One more than a valid config has, so that too many are seen.
const MAX_STAGES: usize = 17;

impl SwinConfig {
    /// All that a checkpoint tells about its model. What it does not tell follows these rules;
    /// correct them where they do not hold, then use
    /// [`FrozenSwin::open_with`](crate::FrozenSwin::open_with).
    ///
    /// | what | rule |
    /// |---|---|
    /// | heads | the columns of each stage's bias table |
    /// | windows | a square one where a stage's table has the rows of one; else one row of tokens |
    /// | image size | as many windows of the first stage as its mask, `attn_mask`, has, in a square, where the file has one. Else such that the first stage whose window is smaller than that of the first of all is one window, or the last stage where none is: 224 for windows of 7, 384 for 12 |
    /// | eps | 1e-5 |
    ///
    /// # Errors
    /// As [`ViTConfig::infer`](crate::ViTConfig::infer), with Swin in place of ViT.
    pub fn infer(path: impl AsRef<Path>) -> Result<Self> {
        infer(path)
    }
}

impl Checkpoint for SwinConfig {
    fn from_plan(plan: &Plan) -> Result<Self> {
        let dims = plan.shape("patch_embed.proj.weight", 4)?;
        let (embed_dim, patch_size) = (dims[0], dims[2]);
        let block = |stage: usize, block: usize, part: &str| {
            format!("layers.{stage}.blocks.{block}.{part}")
        };
        let has = |stage, index| plan.has(&block(stage, index, "norm1.weight"));
        let stages = (0..MAX_STAGES).take_while(|&stage| has(stage, 0)).count();
        let mut config = SwinConfig {
            image_size: (0, 0),
            patch_size,
            embed_dim,
            depths: Vec::new(),
            num_heads: Vec::new(),
            window_sizes: Vec::new(),
            mlp_ratio: 0.0,
            qkv_bias: plan.has(&block(0, 0, "attn.qkv.bias")),
            merge_bias: plan.has("layers.1.downsample.reduction.bias"),
            patch_norm: plan.has("patch_embed.norm.weight"),
            norm_eps: plan.family.norm_eps,
        };
        for stage in 0..stages {
            let table = plan.shape(&block(stage, 0, TABLE), 2)?;
            let mlp = plan.shape(&block(stage, 0, "mlp.fc1.weight"), 2)?;
            config.depths.push((0..).take_while(|&index| has(stage, index)).count() as i64);
            config.num_heads.push(table[1]);
            config.window_sizes.push(window(table[0]));
            // The greatest, as widths that are not whole are cut off.
            config.mlp_ratio = config.mlp_ratio.max(mlp[0] as f64 / mlp[1].max(1) as f64);
        }
        config.image_size = image_size(plan, &config);
        Ok(config)
    }

    fn read(&self, plan: &Plan, name: &str, shape: &[i64]) -> Result<Tensor> {
        if name.ends_with(TABLE) {
            read_table(plan, name, shape, self)
        } else {
            plan.read(name, shape, 1)
        }
    }
}

const TABLE: &str = "attn.relative_position_bias_table";

/// The side of a square window whose table has as many rows.
fn square_window(rows: i64) -> Option<i64> {
    square_root(rows).filter(|offsets| offsets % 2 == 1).map(|offsets| offsets / 2 + 1)
}

/// A window whose table has as many rows.
fn window(rows: i64) -> (i64, i64) {
    square_window(rows).map_or((1, rows / 2 + 1), |side| (side, side))
}

fn image_size(plan: &Plan, config: &SwinConfig) -> (i64, i64) {
    let windows = &config.window_sizes;
    let rows: Vec<i64> = windows.iter().map(|window| window.0).collect();
    let cols: Vec<i64> = windows.iter().map(|window| window.1).collect();
    let count = plan.file.shape("layers.0.blocks.1.attn_mask").and_then(|mask| mask.first());
    let grid = match count.and_then(|&count| square_root(count)).zip(windows.first()) {
        Some((side, window)) => (side.saturating_mul(window.0), side.saturating_mul(window.1)),
        None => (first_grid(&rows), first_grid(&cols)),
    };
    (grid.0.saturating_mul(config.patch_size), grid.1.saturating_mul(config.patch_size))
}

/// A side of the first stage's grid, by the rule of [`SwinConfig::infer`], from the sides of the
/// stages' windows; larger where it would not hold one of them.
fn first_grid(windows: &[i64]) -> i64 {
    let before = |stage: usize| windows[stage].saturating_mul(1 << stage);
    let smaller = windows.iter().position(|&window| window < windows[0]);
    let Some(stage) = smaller.or(windows.len().checked_sub(1)) else { return 0 };
    let grid = before(stage);
    let holds = (0..windows.len()).all(|stage| {
        // Halved and rounded up at each stage.
        windows[stage] <= (grid.saturating_add((1 << stage) - 1)) >> stage
    });
    if holds { grid } else { (0..windows.len()).map(before).max().unwrap_or(grid) }
}

/// A table of the rows that its window needs, resized where the file's is for another square one.
fn read_table(plan: &Plan, name: &str, shape: &[i64], config: &SwinConfig) -> Result<Tensor> {
    let rows = plan.shape(name, shape.len())?[0];
    let stage = name.split('.').nth(1).and_then(|stage| stage.parse::<usize>().ok());
    match (square_window(rows), stage) {
        // The same number of rows is the same table, whatever its window.
        (Some(side), Some(stage)) if rows != shape[0] => {
            let stored = plan.read(name, &[rows, shape[1]], 1)?;
            resize_bias_table(&stored, (side, side), config.windows(stage, false).size())
        }
        _ => plan.read(name, shape, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_grid_holds_the_windows() {
        for (windows, grid) in [
            (&[7, 7, 7, 7][..], 56),
            (&[12, 12, 12, 12], 96),
            (&[7, 7, 14, 7], 56),
            (&[7, 7, 4, 2], 16),
            (&[12, 6, 3, 2], 12),
            (&[6, 3, 2, 1], 6),
            (&[5, 3], 6),
            (&[20, 3], 20),
            (&[3], 3),
            (&[], 0),
        ] {
            assert_eq!(first_grid(windows), grid, "{windows:?}");
        }
        assert_eq!([169, 77, 1].map(window), [(7, 7), (1, 39), (1, 1)]);
    }
}
