//! Reads the config and the weights of CLIP's text tower from a checkpoint.

use std::collections::HashSet;
use std::path::Path;

use tch::Device;

use super::plan::Plan;
use super::settings;
use super::vit_settings::{activation, usual_heads};
use super::{LoadReport, TensorFile};
use crate::backbone::{ClipText, ClipTextConfig};
use crate::error::{Error, Result};

impl ClipTextConfig {
    /// Infers the config of the text tower in a checkpoint of Hugging Face, OpenAI or open_clip.
    /// The image tower may be in the same file.
    ///
    /// The tensors do not show every value; the table gives the rules for the others. If a rule
    /// does not hold for your model, correct the value and use [`ClipText::open_with`]. Hugging
    /// Face's `config.json` and `open_clip_config.json` beside the checkpoint have priority over
    /// the rules.
    ///
    /// | value | rule |
    /// |---|---|
    /// | heads | `embed_dim / 64`, or 1 if 64 does not divide `embed_dim` |
    /// | eps | 1e-5 |
    /// | activation | the rule of [`ViTConfig::infer`](crate::ViTConfig::infer) for the image tower |
    /// | end token | `None`: the highest id of a text, which is the end token of CLIP's vocabulary |
    ///
    /// # Errors
    /// The errors of [`ViTConfig::infer`](crate::ViTConfig::infer); [`Error::OtherBackbone`] if
    /// there is no text tower.
    pub fn infer(path: impl AsRef<Path>) -> Result<Self> {
        infer(&Plan::of_text(&TensorFile::open(path)?)?)
    }
}

fn infer(plan: &Plan) -> Result<ClipTextConfig> {
    let table = plan.shape("token_embed", 2)?;
    let mlp_dim = plan.shape("blocks.0.mlp.fc2.weight", 2)?[1];
    let fc1_rows = plan.shape("blocks.0.mlp.fc1.weight", 2)?[0];
    let told = settings::told_of_text(plan, table[1])?;
    let config = ClipTextConfig {
        vocab_size: table[0],
        context_length: plan.shape("pos_embed", 2)?[0],
        embed_dim: table[1],
        depth: (0..).take_while(|i| plan.has(&format!("blocks.{i}.norm1.weight"))).count() as i64,
        num_heads: told.num_heads.unwrap_or_else(|| usual_heads(table[1])),
        mlp_dim,
        activation: told.activation.unwrap_or_else(|| activation(plan, fc1_rows, mlp_dim)),
        layer_scale: plan.has("blocks.0.ls1.gamma"),
        norm_eps: told.norm_eps.unwrap_or(plan.family.norm_eps),
        projection: if plan.has("projection.weight") {
            Some(plan.shape("projection.weight", 2)?[0])
        } else {
            None
        },
        logit_scale: plan.has("logit_scale"),
        end_token: None,
    };
    config.validate().map_err(|e| Error::corrupt(plan.file.path(), e.to_string()))?;
    Ok(config)
}

impl ClipText {
    /// Opens the text tower of a checkpoint on `device`, strictly and in f32, with the config that
    /// [`ClipTextConfig::infer`] returns. The tensors of an image tower in the same file are
    /// skipped.
    ///
    /// # Errors
    /// The errors of [`ClipText::open_with`] and [`ClipTextConfig::infer`].
    pub fn open(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        Ok(Self::open_reported(path, None, device)?.0)
    }

    /// Opens the text tower as [`ClipText::open`] does, with the config of the caller.
    ///
    /// # Errors
    /// The errors of [`FrozenViT::open_with`](crate::FrozenViT::open_with).
    pub fn open_with(
        path: impl AsRef<Path>,
        config: &ClipTextConfig,
        device: Device,
    ) -> Result<Self> {
        Ok(Self::open_reported(path, Some(config), device)?.0)
    }

    /// Opens the text tower as [`ClipText::open_with`] does if `config` is given, and as
    /// [`ClipText::open`] does otherwise. The report says for each tensor of the file whether it
    /// was applied or skipped.
    ///
    /// # Errors
    /// The errors of [`ClipText::open`] and [`ClipText::open_with`].
    pub fn open_reported(
        path: impl AsRef<Path>,
        config: Option<&ClipTextConfig>,
        device: Device,
    ) -> Result<(Self, LoadReport)> {
        let file = TensorFile::open(path)?;
        let plan = Plan::of_text(&file)?;
        plan.check_names()?;
        let config = match config {
            Some(config) => config.clone(),
            None => infer(&plan)?,
        };
        let mut taken = HashSet::new();
        let tower = Self::from_source(&config, &mut |name, shape| {
            let weight = plan.read(name, shape, config.num_heads)?;
            taken.insert(name.to_owned());
            Ok(weight.f_to_device(device)?)
        })?;
        let report = plan.report(|name| taken.contains(name))?;
        Ok((tower, report))
    }
}
