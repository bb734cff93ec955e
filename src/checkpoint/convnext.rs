//! Reads the config of a ConvNeXt from a checkpoint.

use std::path::Path;

use tch::Tensor;

use super::load::{Checkpoint, infer};
use super::names::final_norm_eps;
use super::plan::Plan;
use crate::backbone::ConvNeXtConfig;
use crate::error::Result;

/// One stage more than a valid config has, so that validation sees if a file has too many.
const MAX_STAGES: usize = 17;

impl ConvNeXtConfig {
    /// Infers the config of the model in a checkpoint. The tensors show every value except the
    /// epsilon of the norms, which is 1e-6. For Hugging Face's names it is 1e-12 in the last norm.
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
        };
        for stage in (0..MAX_STAGES).take_while(|&stage| has(stage, 0)) {
            let mlp = plan.shape(&block(stage, 0, "mlp.fc1.weight"), 2)?;
            config.dims.push(mlp[1]);
            config.depths.push((0..).take_while(|&index| has(stage, index)).count() as i64);
            // A width is `dim * mlp_ratio` rounded down, so the largest quotient is the closest
            // one.
            config.mlp_ratio = config.mlp_ratio.max(mlp[0] as f64 / mlp[1].max(1) as f64);
        }
        Ok(config)
    }

    fn read(&self, plan: &Plan, name: &str, shape: &[i64]) -> Result<Tensor> {
        plan.read(name, shape, 1)
    }
}
