//! Reads the config of a Swin and its tables of relative position bias from a checkpoint.

use std::path::Path;

use tch::Tensor;

use super::load::{Checkpoint, infer};
use super::plan::Plan;
use super::{settings, square_root};
use crate::backbone::SwinConfig;
use crate::error::{Error, Result};
use crate::nn::resize_bias_table;

/// One stage more than a valid config has, so that validation sees if a file has too many.
const MAX_STAGES: usize = 17;

impl SwinConfig {
    /// Infers the config of the model in a checkpoint.
    ///
    /// The tensors do not show every value; the table gives the rules for the others. If a rule
    /// does not hold for your model, correct the value and use
    /// [`FrozenSwin::open_with`](crate::FrozenSwin::open_with).
    ///
    /// | value | rule |
    /// |---|---|
    /// | heads | the number of columns of each stage's bias table |
    /// | windows | square if the number of rows of a stage's table is that of a square window; otherwise `(0, 0)`, which is no valid value: the file does not tell them, and no image size either |
    /// | image size | If the first stage has a mask, `attn_mask`, for a square number of windows, the grid of the first stage has that many windows. Otherwise one stage has exactly one window: the first stage whose window is smaller than the window of stage 0, or the last stage if there is none. This gives 224 pixels for windows of 7 and 384 for windows of 12. |
    /// | eps | 1e-5 |
    ///
    /// # Errors
    /// The errors of [`ViTConfig::infer`](crate::ViTConfig::infer), with Swin in place of ViT.
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
            // A width is `dim * mlp_ratio` rounded down, so the largest quotient is the closest
            // one.
            config.mlp_ratio = config.mlp_ratio.max(mlp[0] as f64 / mlp[1].max(1) as f64);
        }
        // A pooling other than the average is refused.
        settings::told_of_timm(plan)?;
        config.image_size = image_size(plan, &config);
        Ok(config)
    }

    /// Accepts windows that the file does not tell.
    fn check_inferred(&self) -> Result<()> {
        let known = |told: (i64, i64)| if told == UNTOLD { (1, 1) } else { told };
        let mut config = self.clone();
        if self.window_sizes.contains(&UNTOLD) {
            config.window_sizes.iter_mut().for_each(|window| *window = known(*window));
            config.image_size = (self.patch_size, self.patch_size);
        }
        config.validate()
    }

    fn check_told(&self, plan: &Plan) -> Result<()> {
        let Some(stage) = self.window_sizes.iter().position(|&window| window == UNTOLD) else {
            return Ok(());
        };
        let rows = plan.shape(&format!("layers.{stage}.blocks.0.{TABLE}"), 2)?[0];
        let candidates = windows_of(rows);
        let sides = candidates.iter().map(|(rows, cols)| format!("{rows}x{cols}"));
        let expected = format!(
            "given with image_size, because the file does not tell them: its table of {rows} rows \
             fits windows of {}",
            sides.collect::<Vec<_>>().join(", ")
        );
        Err(Error::config("window_sizes", expected, "none").in_config("SwinConfig"))
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

/// Returns the side of the square window whose table has this number of rows.
fn square_window(rows: i64) -> Option<i64> {
    square_root(rows).filter(|offsets| offsets % 2 == 1).map(|offsets| offsets / 2 + 1)
}

/// Stands for a window that the file does not tell.
const UNTOLD: (i64, i64) = (0, 0);

/// Returns the square window whose table has this number of rows, or [`UNTOLD`].
fn window(rows: i64) -> (i64, i64) {
    square_window(rows).map_or(UNTOLD, |side| (side, side))
}

/// Returns the windows whose tables have this number of rows, at most sixteen.
fn windows_of(rows: i64) -> Vec<(i64, i64)> {
    let window = |down: i64| {
        let across = rows / down;
        (rows % down == 0 && across % 2 == 1).then_some((down / 2 + 1, across / 2 + 1))
    };
    (1..=rows.clamp(1, 1 << 20)).step_by(2).filter_map(window).take(16).collect()
}

fn image_size(plan: &Plan, config: &SwinConfig) -> (i64, i64) {
    let windows = &config.window_sizes;
    if windows.contains(&UNTOLD) {
        return (0, 0);
    }
    let rows: Vec<i64> = windows.iter().map(|window| window.0).collect();
    let cols: Vec<i64> = windows.iter().map(|window| window.1).collect();
    let count = plan.file.shape("layers.0.blocks.1.attn_mask").and_then(|mask| mask.first());
    let grid = match count.and_then(|&count| square_root(count)).zip(windows.first()) {
        Some((side, window)) => (side.saturating_mul(window.0), side.saturating_mul(window.1)),
        None => (first_grid(&rows), first_grid(&cols)),
    };
    (grid.0.saturating_mul(config.patch_size), grid.1.saturating_mul(config.patch_size))
}

/// Returns a side of the grid of the first stage by the rule of [`SwinConfig::infer`]. `windows`
/// are the same sides of the windows of all stages. The result is larger if a grid by that rule
/// would be smaller than one of the windows.
fn first_grid(windows: &[i64]) -> i64 {
    let before = |stage: usize| windows[stage].saturating_mul(1 << stage);
    let smaller = windows.iter().position(|&window| window < windows[0]);
    let Some(stage) = smaller.or(windows.len().checked_sub(1)) else { return 0 };
    let grid = before(stage);
    let holds = (0..windows.len()).all(|stage| {
        // Each stage halves the grid and rounds up.
        windows[stage] <= (grid.saturating_add((1 << stage) - 1)) >> stage
    });
    if holds { grid } else { (0..windows.len()).map(before).max().unwrap_or(grid) }
}

/// Reads a table with the rows that its window needs. The table of another square window is
/// resized.
fn read_table(plan: &Plan, name: &str, shape: &[i64], config: &SwinConfig) -> Result<Tensor> {
    let rows = plan.shape(name, shape.len())?[0];
    let stage = name.split('.').nth(1).and_then(|stage| stage.parse::<usize>().ok());
    match (square_window(rows), stage) {
        // A table with the same number of rows is used unchanged, whatever the shape of its window.
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
        assert_eq!([169, 77, 1, 3].map(window), [(7, 7), UNTOLD, (1, 1), UNTOLD]);
        assert_eq!(windows_of(77), [(1, 39), (4, 6), (6, 4), (39, 1)]);
        assert!(windows_of(-1).is_empty() && windows_of(8).is_empty());
    }
}
