//! Reads the config of a ConvNeXt from a checkpoint.

use std::path::Path;

use tch::Tensor;

use super::choice::Choice;
use super::load::{Checkpoint, infer};
use super::names::final_norm_eps;
use super::plan::Plan;
use super::report::{Setting, SettingSource};
use super::settings::{self, KnownConvNeXt};
use crate::backbone::{ConvNeXtConfig, MlpActivation};
use crate::error::Result;

/// One stage more than a valid config has, so that validation sees if a file has too many.
const MAX_STAGES: usize = 17;

impl ConvNeXtConfig {
    /// Infers the config of the model in a checkpoint. The tensors show every value except the
    /// epsilon of the norms and the activation. timm's `config.json` beside the checkpoint tells
    /// them; otherwise they are 1e-6 and GELU, except for the widths of ConvNeXt-XXL (1e-5).
    /// For Hugging Face's names the epsilon of the last norm is 1e-12.
    ///
    /// # Errors
    /// The errors of [`ViTConfig::infer`](crate::ViTConfig::infer), with ConvNeXt in place of ViT.
    pub fn infer(path: impl AsRef<Path>) -> Result<Self> {
        infer(path)
    }
}

impl Checkpoint for ConvNeXtConfig {
    fn from_plan(plan: &Plan) -> Result<Self> {
        let block = |stage: usize, block: usize, part: &str| {
            format!("stages.{stage}.blocks.{block}.{part}")
        };
        let has = |stage, index| plan.has(&block(stage, index, "conv_dw.weight"));
        let mut config = ConvNeXtConfig {
            patch_size: plan.shape("stem.0.weight", 4)?[2],
            dims: Vec::new(),
            depths: Vec::new(),
            kernel_size: plan.shape(&block(0, 0, "conv_dw.weight"), 4)?[2],
            mlp_ratio: 0.0,
            layer_scale: plan.has(&block(0, 0, "gamma")),
            norm_eps: plan.family.norm_eps,
            final_norm_eps: final_norm_eps(plan.family),
            activation: MlpActivation::Gelu,
        };
        for stage in (0..MAX_STAGES).take_while(|&stage| has(stage, 0)) {
            let mlp = plan.shape(&block(stage, 0, "mlp.fc1.weight"), 2)?;
            config.dims.push(mlp[1]);
            config.depths.push((0..).take_while(|&index| has(stage, index)).count() as i64);
            // A width is `dim * mlp_ratio` rounded down, so the largest quotient is the closest
            // one.
            config.mlp_ratio = config.mlp_ratio.max(mlp[0] as f64 / mlp[1].max(1) as f64);
        }
        let (norm_eps, activation) = choices(plan, &config.dims)?;
        Ok(ConvNeXtConfig { norm_eps: norm_eps.value, activation: activation.value, ..config })
    }

    fn settings(&self, plan: &Plan) -> Result<Vec<Setting>> {
        let (norm_eps, activation) = choices(plan, &self.dims)?;
        Ok(vec![
            norm_eps.setting("norm_eps", &self.norm_eps, |eps| format!("{eps:e}")),
            activation.setting("activation", &self.activation, |act| format!("{act:?}")),
        ])
    }

    fn read(&self, plan: &Plan, name: &str, shape: &[i64]) -> Result<Tensor> {
        plan.read(name, shape, 1)
    }
}

/// Chooses the epsilon and the activation of a model with the widths `dims`.
fn choices(plan: &Plan, dims: &[i64]) -> Result<(Choice<f64>, Choice<MlpActivation>)> {
    let told = settings::told_of_timm(plan)?;
    let known = KnownConvNeXt::find(dims);
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
    Ok((norm_eps, activation))
}
