//! A frozen backbone out of a checkpoint.

use std::collections::HashSet;
use std::path::Path;

use tch::{Device, Tensor};

use super::infer::{infer, prefixes, square_root, usual_prefix};
use super::plan::Plan;
use super::{LoadReport, TensorFile};
use crate::backbone::{FrozenViT, ViTConfig};
use crate::error::Result;
use crate::nn::resize_pos_embed;

impl FrozenViT {
    /// Opens a checkpoint on `device`: recognizes its format, takes the config that it tells
    /// ([`ViTConfig::infer`]) and loads it strictly, in f32.
    ///
    /// # Errors
    /// As [`FrozenViT::open_with`] and [`ViTConfig::infer`].
    pub fn open(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        Ok(Self::open_reported(path, None, device)?.0)
    }

    /// Opens a checkpoint with a config of the caller's.
    ///
    /// A position table that fits the config's grid, with `pos_embed_prefix` rows before it or as
    /// many as the family usually has, is taken as it is: 16 rows are a class token and a grid of
    /// 3x5 where the config says 3x5, though [`ViTConfig::infer`] read a grid of 4x4. One for
    /// another square grid is resized (bicubic and antialiased, as timm does it).
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is no model; with the name in the file:
    /// [`Error::MissingTensor`], [`Error::ShapeMismatch`] and [`Error::UnexpectedTensors`]; and as
    /// [`TensorFile::open`].
    ///
    /// [`Error::Config`]: crate::Error::Config
    /// [`Error::MissingTensor`]: crate::Error::MissingTensor
    /// [`Error::ShapeMismatch`]: crate::Error::ShapeMismatch
    /// [`Error::UnexpectedTensors`]: crate::Error::UnexpectedTensors
    pub fn open_with(path: impl AsRef<Path>, config: &ViTConfig, device: Device) -> Result<Self> {
        Ok(Self::open_reported(path, Some(config), device)?.0)
    }

    /// As [`FrozenViT::open`] or, given a config, [`FrozenViT::open_with`], and what became of
    /// each tensor of the file.
    ///
    /// # Errors
    /// As those.
    pub fn open_reported(
        path: impl AsRef<Path>,
        config: Option<&ViTConfig>,
        device: Device,
    ) -> Result<(Self, LoadReport)> {
        let file = TensorFile::open(path)?;
        let plan = Plan::new(&file)?;
        plan.check_names()?;
        let config = match config {
            Some(config) => fit_positions(&plan, config)?,
            None => infer(&plan)?,
        };
        let mut taken = HashSet::new();
        let backbone = Self::from_source(&config, &mut |name, shape| {
            let weight = match name {
                "pos_embed" => read_positions(&plan, shape, &config)?,
                _ => plan.read(name, shape, config.num_heads)?,
            };
            taken.insert(name.to_owned());
            Ok(weight.f_to_device(device)?)
        })?;
        let report = plan.report(|name| taken.contains(name))?;
        Ok((backbone, report))
    }
}

/// The config with the prefix rows that the file's table most likely has. A table of 4x4 rows is
/// also one of 3x5 and a class token, and only the grid says which; one that fits the grid with an
/// unlikely prefix is more likely to be resized.
fn fit_positions(plan: &Plan, config: &ViTConfig) -> Result<ViTConfig> {
    config.validate()?;
    let rows = plan.shape("pos_embed", 3)?[1];
    let patches = config.layout().num_patches();
    let likely = [config.pos_embed_prefix, usual_prefix(plan, config.class_token)];
    let fits = |prefix: &i64| prefix.checked_add(patches) == Some(rows);
    let resizes = |prefix: &i64| rows.checked_sub(*prefix).and_then(square_root).is_some();
    let prefix = likely
        .into_iter()
        .find(fits)
        .or_else(|| likely.into_iter().find(resizes))
        .or_else(|| prefixes(config.class_token, config.num_registers).into_iter().find(fits));
    let pos_embed_prefix = prefix.unwrap_or(config.pos_embed_prefix);
    Ok(ViTConfig { pos_embed_prefix, ..config.clone() })
}

/// The position table `[1, prefix + N, C]`, resized where the file's is for another square grid.
fn read_positions(plan: &Plan, shape: &[i64], config: &ViTConfig) -> Result<Tensor> {
    let (name, prefix) = ("pos_embed", config.pos_embed_prefix);
    let found = plan.shape(name, shape.len())?;
    let side = found[1].checked_sub(prefix).and_then(square_root);
    match side {
        // The same number of patches is the same table, whatever its grid.
        Some(side) if found[1] != shape[1] => {
            let stored = plan.read(name, &[shape[0], found[1], shape[2]], config.num_heads)?;
            resize_pos_embed(&stored, prefix, (side, side), config.grid())
        }
        _ => plan.read(name, shape, config.num_heads),
    }
}
