//! Reads the config of a Swin and its tables of relative position bias from a checkpoint.

use std::path::Path;

use tch::Tensor;

use super::choice::Unsettled;
use super::load::{Checkpoint, infer};
use super::plan::Plan;
use super::report::Setting;
use super::swin_settings::{SwinSettings, SwinSizes, UNTOLD, square_window};
use crate::backbone::{ContinuousBiasConfig, NormPlacement, SwinConfig};
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
    /// | heads | the number of columns of each stage's bias table; in a Swin V2, the number of factors of its scores |
    /// | windows | of a Swin V2: those of the offsets that the files of Microsoft and torchvision hold, else those of the `config.json` beside the file, else `(0, 0)`. Of other models: square if the number of rows of a stage's table is that of a square window; otherwise `(0, 0)`, which is no valid value: the file does not tell them, and no image size either |
    /// | image size | The `config.json` of Hugging Face or timm beside the file tells it. A Swin V2 whose windows no tensor shows has `(0, 0)` without it. Otherwise: If the first stage has a mask, `attn_mask`, for a square number of windows, the grid of the first stage has that many windows. Otherwise one stage has exactly one window: the first stage whose window is smaller than the window of stage 0, or the last stage if there is none. This gives 224 pixels for windows of 7 and 384 for windows of 12. |
    /// | windows of the pretraining | as the windows of a Swin V2 |
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
        let sizes = sizes(plan)?;
        let settings = SwinSettings::of(plan, sizes)?;
        let second = sizes.continuous_bias;
        let mut config = SwinConfig {
            image_size: settings.image_size.value,
            patch_size: sizes.patch_size,
            embed_dim: plan.shape("patch_embed.proj.weight", 4)?[0],
            depths: Vec::new(),
            num_heads: Vec::new(),
            window_sizes: settings.window_sizes.value,
            mlp_ratio: 0.0,
            qkv_bias: plan.has(&block(0, 0, "attn.qkv.bias")),
            merge_bias: plan.has("layers.1.downsample.reduction.bias"),
            patch_norm: plan.has("patch_embed.norm.weight"),
            norm_placement: if second { NormPlacement::After } else { NormPlacement::Before },
            cosine_attention: second,
            continuous_bias: None,
            mask_score: settings.mask_score,
            pad_before_shift: false,
            norm_eps: plan.family.norm_eps,
        };
        if second {
            config.continuous_bias = Some(ContinuousBiasConfig {
                hidden_dim: plan.shape(&block(0, 0, "attn.cpb_mlp.0.weight"), 2)?[0],
                pretrained_window_sizes: settings.pretrained.value,
            });
        }
        for stage in 0..sizes.stages {
            let heads = if second {
                plan.shape(&block(stage, 0, "attn.logit_scale"), 3)?[0]
            } else {
                plan.shape(&block(stage, 0, TABLE), 2)?[1]
            };
            let mlp = plan.shape(&block(stage, 0, "mlp.fc1.weight"), 2)?;
            let is_block = |index: &usize| has_block(plan, stage, *index);
            config.depths.push((0..).take_while(is_block).count() as i64);
            config.num_heads.push(heads);
            // A width is `dim * mlp_ratio` rounded down, so the largest quotient is the closest
            // one.
            config.mlp_ratio = config.mlp_ratio.max(mlp[0] as f64 / mlp[1].max(1) as f64);
        }
        if config.validate().is_ok() {
            config.pad_before_shift = pads_before_shift(plan, &config);
        }
        Ok(config)
    }

    /// Sets the order of padding and shifting, and checks that the library of the names has the same
    /// windows.
    fn fit(&self, plan: &Plan) -> Result<Self> {
        let is_smaller = |stage: &usize| {
            let (grid, window) = (self.grid(*stage), self.window_sizes[*stage]);
            grid.0 < window.0 || grid.1 < window.1
        };
        let mut smaller = (0..self.window_sizes.len()).filter(is_smaller);
        if plan.family.name.starts_with("torchvision")
            && let Some(stage) = smaller.next()
        {
            let expected = format!(
                "of at least {:?} patches in stage {stage}, because torchvision pads a grid that is \
                 smaller than a window",
                self.window_sizes[stage]
            );
            let found = format!("{:?} patches", self.grid(stage));
            return Err(Error::config("image_size", expected, found).in_config("SwinConfig"));
        }
        let pad_before_shift = self.pad_before_shift || pads_before_shift(plan, self);
        Ok(SwinConfig { pad_before_shift, ..self.clone() })
    }

    /// Accepts windows and an image size that the file does not tell.
    fn check_inferred(&self) -> Result<()> {
        let mut config = self.clone();
        if self.window_sizes.contains(&UNTOLD) || self.image_size == UNTOLD {
            let known = |told: (i64, i64)| if told == UNTOLD { (1, 1) } else { told };
            config.window_sizes.iter_mut().for_each(|window| *window = known(*window));
            config.image_size = (self.patch_size, self.patch_size);
        }
        config.validate()
    }

    fn unsettled(plan: &Plan) -> Result<Vec<Unsettled>> {
        Ok(SwinSettings::of(plan, sizes(plan)?)?.unsettled)
    }

    fn settings(&self, plan: &Plan) -> Result<Vec<Setting>> {
        Ok(SwinSettings::of(plan, sizes(plan)?)?.used(self))
    }

    fn check_told(&self, plan: &Plan) -> Result<()> {
        let Some(stage) = self.window_sizes.iter().position(|&window| window == UNTOLD) else {
            return Ok(());
        };
        let rows = plan.shape(&format!("layers.{stage}.blocks.0.{TABLE}"), 2)?[0];
        let candidates = windows_of(rows);
        let sides = candidates.iter().map(|(rows, cols)| format!("{rows}x{cols}"));
        let expected = format!(
            "given with image_size, as --window-size, as OpenOptions::window_size or in the \
             SwinConfig, because the file does not tell it: its table of {rows} rows fits windows of {}",
            sides.collect::<Vec<_>>().join(", ")
        );
        Err(Error::FileField {
            file: plan.file.path().to_path_buf(),
            field: "window_sizes".to_owned(),
            expected,
            found: "none".to_owned(),
        })
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

/// Returns the name of a part of a block.
fn block(stage: usize, block: usize, part: &str) -> String {
    format!("layers.{stage}.blocks.{block}.{part}")
}

fn has_block(plan: &Plan, stage: usize, index: usize) -> bool {
    plan.has(&block(stage, index, "norm1.weight"))
}

/// Returns whether the library of the file's names pads a grid of `config` before it shifts it, so
/// that another order would give other features.
fn pads_before_shift(plan: &Plan, config: &SwinConfig) -> bool {
    let libraries = ["Hugging Face", "torchvision"];
    libraries.iter().any(|name| plan.family.name.starts_with(name))
        && config.is_padded_and_shifted()
}

/// Returns the sizes that the tensors show.
fn sizes(plan: &Plan) -> Result<SwinSizes> {
    Ok(SwinSizes {
        stages: (0..MAX_STAGES).take_while(|&stage| has_block(plan, stage, 0)).count(),
        patch_size: plan.shape("patch_embed.proj.weight", 4)?[2],
        continuous_bias: plan.has(&block(0, 0, "attn.logit_scale")),
    })
}

/// Returns the windows whose tables have this number of rows, at most sixteen.
fn windows_of(rows: i64) -> Vec<(i64, i64)> {
    let window = |down: i64| {
        let across = rows / down;
        (rows % down == 0 && across % 2 == 1).then_some((down / 2 + 1, across / 2 + 1))
    };
    (1..=rows.clamp(1, 1 << 20)).step_by(2).filter_map(window).take(16).collect()
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
    fn a_table_fits_several_windows() {
        assert_eq!(windows_of(77), [(1, 39), (4, 6), (6, 4), (39, 1)]);
        assert!(windows_of(-1).is_empty() && windows_of(8).is_empty());
    }
}
