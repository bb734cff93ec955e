//! Reads the config of a ConvNeXt from a checkpoint.

use std::path::Path;

use tch::Tensor;

use super::choice::{Choice, Unsettled};
use super::load::{Checkpoint, infer};
use super::plan::Plan;
use super::report::{Setting, SettingSource};
use super::settings::{self, KnownConvNeXt};
use crate::backbone::{ConvNeXtConfig, ConvNeXtNorm, ConvNeXtStem, MlpActivation};
use crate::error::Result;

/// One stage more than a valid config has, so that validation sees if a file has too many.
const MAX_STAGES: usize = 17;

impl ConvNeXtConfig {
    /// Infers the config of the model in a checkpoint. The tensors show every value except the
    /// epsilon of the norms, the activation, and which norm it is if norms have no bias. timm's
    /// `config.json` beside the checkpoint tells them; otherwise they are 1e-6 and GELU, except for
    /// the widths of ConvNeXt-XXL (1e-5), and the RMS norm, except for the widths of
    /// `convnext_zepto_rms`.
    /// For Hugging Face's names the epsilon of the last norm is that of its `config.json`, or 1e-12.
    ///
    /// # Errors
    /// The errors of [`ViTConfig::infer`](crate::ViTConfig::infer), with ConvNeXt in place of ViT.
    pub fn infer(path: impl AsRef<Path>) -> Result<Self> {
        infer(path)
    }
}

impl Checkpoint for ConvNeXtConfig {
    fn from_plan(plan: &Plan) -> Result<Self> {
        let (stem, patch_size) = stem(plan)?;
        let has = |stage, index| plan.has(&block(stage, index, "conv_dw.weight"));
        let mut config = ConvNeXtConfig {
            patch_size,
            stem,
            dims: Vec::new(),
            depths: Vec::new(),
            kernel_size: plan.shape(&block(0, 0, "conv_dw.weight"), 4)?[2],
            kernel_sizes: Vec::new(),
            mlp_ratio: 0.0,
            layer_scale: plan.has(&block(0, 0, "gamma")),
            response_norm: plan.has(&block(0, 0, "mlp.grn.weight")),
            norm: ConvNeXtNorm::Layer,
            norm_before_pooling: plan.has("norm_pre.weight"),
            head_dim: if plan.has("head.pre_logits.fc.weight") {
                Some(plan.shape("head.pre_logits.fc.weight", 2)?[0])
            } else {
                None
            },
            norm_eps: plan.family.norm_eps,
            final_norm_eps: settings::last_norm_eps(plan)?,
            activation: MlpActivation::Gelu,
        };
        for stage in (0..MAX_STAGES).take_while(|&stage| has(stage, 0)) {
            let mlp = plan.shape(&block(stage, 0, "mlp.fc1.weight"), 2)?;
            config.dims.push(mlp[1]);
            config.kernel_sizes.push(plan.shape(&block(stage, 0, "conv_dw.weight"), 4)?[2]);
            config.depths.push((0..).take_while(|&index| has(stage, index)).count() as i64);
            // A width is `dim * mlp_ratio` rounded down, so the largest quotient is the closest
            // one.
            config.mlp_ratio = config.mlp_ratio.max(mlp[0] as f64 / mlp[1].max(1) as f64);
        }
        if config.kernel_sizes.iter().all(|&kernel| kernel == config.kernel_size) {
            config.kernel_sizes.clear();
        }
        let ConvNeXtSettings { norm_eps, activation, norm, .. } = settings_of(plan, &config)?;
        Ok(ConvNeXtConfig {
            norm_eps: norm_eps.value,
            activation: activation.value,
            norm: norm.value,
            ..config
        })
    }

    fn unsettled(plan: &Plan) -> Result<Vec<Unsettled>> {
        Ok(settings_of(plan, &Self::from_plan(plan)?)?.unsettled)
    }

    fn settings(&self, plan: &Plan) -> Result<Vec<Setting>> {
        let settings = settings_of(plan, self)?;
        let mut used = vec![
            settings.norm_eps.setting("norm_eps", &self.norm_eps, |eps| format!("{eps:e}")),
            settings.activation.setting("activation", &self.activation, |act| format!("{act:?}")),
        ];
        if self.norm != ConvNeXtNorm::Layer {
            used.push(settings.norm.setting("norm", &self.norm, |norm| format!("{norm:?}")));
        }
        Ok(used)
    }

    fn read(&self, plan: &Plan, name: &str, shape: &[i64]) -> Result<Tensor> {
        plan.read(name, shape, 1)
    }
}

/// Returns the name of a part of a block.
fn block(stage: usize, block: usize, part: &str) -> String {
    format!("stages.{stage}.blocks.{block}.{part}")
}

/// Returns the stem and the side of its patches.
fn stem(plan: &Plan) -> Result<(ConvNeXtStem, i64)> {
    let first = plan.shape("stem.0.weight", 4)?;
    let is_convolution = |name: &str| {
        plan.first_part(&format!("{name}.weight")).is_some_and(|(_, shape)| shape.len() == 4)
    };
    let (plain, activated) = (is_convolution("stem.1"), is_convolution("stem.2"));
    if plain || activated {
        return Ok((ConvNeXtStem::Overlapping { hidden_dim: first[0], activation: activated }, 4));
    }
    Ok((ConvNeXtStem::Patch, first[2]))
}

/// The settings of a ConvNeXt that no tensor shows.
struct ConvNeXtSettings {
    norm_eps: Choice<f64>,
    activation: Choice<MlpActivation>,
    norm: Choice<ConvNeXtNorm>,
    unsettled: Vec<Unsettled>,
}

/// Chooses the settings of a model with the widths and kernels of `config`.
fn settings_of(plan: &Plan, config: &ConvNeXtConfig) -> Result<ConvNeXtSettings> {
    let told = settings::told_of_convnext(plan)?;
    let biases = plan.has("stages.0.blocks.0.norm.bias");
    let known = KnownConvNeXt::find(&config.dims, &config.kernel_sizes, biases);
    let source = || match known {
        Some(row) => SettingSource::Known(row.name.to_owned()),
        None => SettingSource::Names(plan.family.name.to_owned()),
    };
    let norm_eps = Choice::told(told.norm_eps, &told.source, || {
        Choice::new(known.map_or(plan.family.norm_eps, |row| row.norm_eps), source())
    });
    let activation = Choice::told(told.activation, &told.source, || {
        Choice::new(known.map_or(MlpActivation::Gelu, |row| row.activation), source())
    });
    let mut unsettled = Vec::new();
    let norm = if biases {
        Choice::new(ConvNeXtNorm::Layer, SettingSource::Tensors)
    } else {
        let known = known.and_then(|row| Some(Choice::new(row.norm?, source())));
        Choice::told(told.norm, &told.source, || {
            known.unwrap_or_else(|| {
                unsettled.push(NORM);
                Choice::new(ConvNeXtNorm::Rms, source())
            })
        })
    };
    Ok(ConvNeXtSettings { norm_eps, activation, norm, unsettled })
}

const NORM: Unsettled = Unsettled {
    field: "norm",
    candidates: "rms (timm's rmsnorm), deviation (timm's simplenorm)",
    flag: "--norm",
};
