//! The windows and the image size of a Swin, which its tensors show only in part.

use super::choice::{Choice, Unsettled};
use super::plan::Plan;
use super::report::{Setting, SettingSource};
use super::settings::{self, ToldSwin};
use super::square_root;
use crate::backbone::{MASK_SCORE, SwinConfig};
use crate::error::Result;

/// Stands for a window or an image size that nothing tells.
pub(super) const UNTOLD: (i64, i64) = (0, 0);

/// The mask of Hugging Face's Swin V2, which adds the usual mask twice.
const DOUBLE_MASK_SCORE: f64 = 2.0 * MASK_SCORE;

const TABLE: &str = "attn.relative_position_bias_table";

/// Rows and columns of the windows of each stage.
type StageWindows = Vec<(i64, i64)>;

/// The sizes of a Swin, which its tensors show.
#[derive(Clone, Copy, Debug)]
pub(super) struct SwinSizes {
    pub(super) stages: usize,
    pub(super) patch_size: i64,
    /// Whether an MLP computes the position bias, so that no weight shows the windows.
    pub(super) continuous_bias: bool,
}

/// The settings of a Swin that its weights do not show.
#[derive(Debug)]
pub(super) struct SwinSettings {
    pub(super) window_sizes: Choice<StageWindows>,
    pub(super) image_size: Choice<(i64, i64)>,
    /// The windows of the pretraining of each stage, for a Swin V2.
    pub(super) pretrained: Choice<StageWindows>,
    pub(super) mask_score: f64,
    /// The settings that nothing tells.
    pub(super) unsettled: Vec<Unsettled>,
}

impl SwinSettings {
    /// Chooses each setting: what the tensors show, else what a file beside the checkpoint tells,
    /// else, for the image size, the rule of [`SwinConfig::infer`].
    ///
    /// # Errors
    /// The errors of [`settings::told_of_swin`]; the errors of reading a tensor.
    pub(super) fn of(plan: &Plan, sizes: SwinSizes) -> Result<Self> {
        let told = settings::told_of_swin(plan, sizes.patch_size, sizes.stages)?;
        if sizes.continuous_bias {
            Self::second(plan, sizes, told)
        } else {
            first(plan, sizes, told)
        }
    }

    /// Chooses the settings of a Swin V2. Some files hold the offsets of its windows, from which
    /// the windows and those of the pretraining follow.
    fn second(plan: &Plan, sizes: SwinSizes, told: ToldSwin) -> Result<Self> {
        let names = || SettingSource::Names(plan.family.name.to_owned());
        let mut unsettled = Vec::new();
        let (window_sizes, pretrained) = match stored_windows(plan, sizes.stages)? {
            Some((windows, pretrained)) => {
                let of_tensors = |windows| Choice::new(windows, SettingSource::Tensors);
                (of_tensors(windows), of_tensors(pretrained))
            }
            None => {
                if told.window_sizes.is_none() {
                    unsettled.push(WINDOWS);
                }
                if told.pretrained_window_sizes.is_none() {
                    unsettled.push(PRETRAINED);
                }
                let none = || Choice::new(vec![UNTOLD; sizes.stages], names());
                let told_windows = told.pretrained_window_sizes;
                (
                    Choice::told(told.window_sizes, &told.source, none),
                    Choice::told(told_windows, &told.source, none),
                )
            }
        };
        let is_shown = window_sizes.source == SettingSource::Tensors;
        let image_size = Choice::told(told.image_size, &told.source, || {
            if is_shown {
                let size = image_size(plan, &window_sizes.value, sizes.patch_size);
                return Choice::new(size, SettingSource::Tensors);
            }
            unsettled.push(IMAGES);
            Choice::new(UNTOLD, names())
        });
        let is_double = plan.family.name == "Hugging Face Swin V2";
        let mask_score = if is_double { DOUBLE_MASK_SCORE } else { MASK_SCORE };
        Ok(SwinSettings { window_sizes, image_size, pretrained, mask_score, unsettled })
    }

    /// Returns the settings that the model of `config` was opened with.
    pub(super) fn used(self, config: &SwinConfig) -> Vec<Setting> {
        let size = |(height, width): &(i64, i64)| format!("{height}x{width}");
        let list = |sizes: &StageWindows| sizes.iter().map(size).collect::<Vec<_>>().join(", ");
        let mut used = vec![
            self.window_sizes.setting("window_size", &config.window_sizes, list),
            self.image_size.setting("image_size", &config.image_size, size),
        ];
        if let Some(bias) = &config.continuous_bias {
            let windows = &bias.pretrained_window_sizes;
            used.push(self.pretrained.setting("pretrained_window_sizes", windows, list));
        }
        used
    }
}

const WINDOWS: Unsettled = Unsettled {
    field: "window_size",
    candidates: "8 or 16 (256 pixels), 12 (192 pixels), 24 (384 pixels) in the published Swin V2",
    flag: "--window-size",
};

const IMAGES: Unsettled = Unsettled {
    field: "image_size",
    candidates: "192, 256, 384 in the published Swin V2",
    flag: "--image-size",
};

const PRETRAINED: Unsettled = Unsettled {
    field: "pretrained_window_sizes",
    candidates: "0 (the windows themselves), or 12,12,12,6 (the published Swin V2 whose names have \
                 `12to16` or `12to24`)",
    flag: "--pretrained-windows",
};

/// Chooses the settings of a first Swin, whose tables show its windows.
fn first(plan: &Plan, sizes: SwinSizes, told: ToldSwin) -> Result<SwinSettings> {
    let window = |stage: usize| {
        let table = plan.shape(&format!("layers.{stage}.blocks.0.{TABLE}"), 2)?;
        Ok(window(table[0]))
    };
    let windows = (0..sizes.stages).map(window).collect::<Result<Vec<_>>>()?;
    let image_size = Choice::told(told.image_size, &told.source, || {
        let size = image_size(plan, &windows, sizes.patch_size);
        Choice::new(size, SettingSource::Tensors)
    });
    Ok(SwinSettings {
        window_sizes: Choice::new(windows, SettingSource::Tensors),
        image_size,
        pretrained: Choice::new(Vec::new(), SettingSource::Tensors),
        mask_score: MASK_SCORE,
        unsettled: Vec::new(),
    })
}

/// Returns the windows of each stage and those of the pretraining that the file's tables of offsets
/// show, or `None` if it has no such tables.
fn stored_windows(plan: &Plan, stages: usize) -> Result<Option<(StageWindows, StageWindows)>> {
    let (mut windows, mut pretrained) = (Vec::new(), Vec::new());
    for stage in 0..stages {
        let torchvision = 2 * stage + 1;
        let names = [format!("layers.{stage}.blocks.0"), format!("features.{torchvision}.0")];
        let names = names.map(|block| format!("{block}.attn.relative_coords_table"));
        let found = names.iter().find_map(|name| Some((name, plan.file.shape(name)?)));
        let Some((name, &[1, rows, cols, 2])) = found else { return Ok(None) };
        if rows < 1 || cols < 1 || rows % 2 == 0 || cols % 2 == 0 {
            return Ok(None);
        }
        let last = plan.file.finite_tensor(name)?.f_select(1, rows - 1)?.f_select(1, cols - 1)?;
        let last = [last.f_double_value(&[0, 0])?, last.f_double_value(&[0, 1])?];
        let window = (rows / 2 + 1, cols / 2 + 1);
        windows.push(window);
        pretrained.push((pretrained_side(window.0, last[0]), pretrained_side(window.1, last[1])));
    }
    Ok(Some((windows, pretrained)))
}

/// Returns the side of the window of the pretraining by which the largest offset `last` of a window
/// of side `side` was divided; 0 if it is the side itself.
fn pretrained_side(side: i64, last: f64) -> i64 {
    let relative = (8f64.powf(last) - 1.0) / 8.0;
    // A number that is no window makes the config invalid.
    let pretrained = (((side - 1) as f64 / relative).round() as i64).saturating_add(1);
    if side == 1 || pretrained == side { 0 } else { pretrained }
}

/// Returns the side of the square window whose table has this number of rows.
pub(super) fn square_window(rows: i64) -> Option<i64> {
    square_root(rows).filter(|offsets| offsets % 2 == 1).map(|offsets| offsets / 2 + 1)
}

/// Returns the square window whose table has this number of rows, or [`UNTOLD`].
fn window(rows: i64) -> (i64, i64) {
    square_window(rows).map_or(UNTOLD, |side| (side, side))
}

/// Returns the image size by the rule of [`SwinConfig::infer`].
fn image_size(plan: &Plan, windows: &[(i64, i64)], patch_size: i64) -> (i64, i64) {
    if windows.contains(&UNTOLD) {
        return UNTOLD;
    }
    let rows: Vec<i64> = windows.iter().map(|window| window.0).collect();
    let cols: Vec<i64> = windows.iter().map(|window| window.1).collect();
    let count = plan.file.shape("layers.0.blocks.1.attn_mask").and_then(|mask| mask.first());
    let grid = match count.and_then(|&count| square_root(count)).zip(windows.first()) {
        Some((side, window)) => (side.saturating_mul(window.0), side.saturating_mul(window.1)),
        None => (first_grid(&rows), first_grid(&cols)),
    };
    (grid.0.saturating_mul(patch_size), grid.1.saturating_mul(patch_size))
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
    }

    #[test]
    fn the_largest_offset_shows_the_window_of_the_pretraining() {
        let last = |side: i64, pretrained: i64| {
            (8.0 * (side - 1) as f64 / (pretrained - 1) as f64 + 1.0).log2() / 3.0
        };
        for (side, pretrained) in [(16, 12), (24, 12), (8, 6), (12, 16), (2, 47)] {
            let stored = f64::from(last(side, pretrained) as f32);
            assert_eq!(pretrained_side(side, stored), pretrained, "{side}");
        }
        assert_eq!((pretrained_side(16, last(16, 16)), pretrained_side(1, 0.0)), (0, 0));
        assert_eq!(pretrained_side(16, 0.0), i64::MAX);
        assert_eq!(pretrained_side(16, f64::NAN), 1);
    }
}
