//! A frozen backbone out of a checkpoint.

use std::collections::HashSet;
use std::path::Path;

use tch::{Device, Tensor};

use super::plan::Plan;
use super::{LoadReport, TensorFile};
use crate::backbone::{Frozen, Network};
use crate::error::{Error, Result};

/// A config that checkpoints are read for: one implementation for each family of backbones.
pub trait Checkpoint: Network {
    /// All that a recognized file tells; what it tells need not be a valid config.
    fn from_plan(plan: &Plan) -> Result<Self>;

    /// A valid config of the caller's, with what the file alone can settle.
    fn fit(&self, _plan: &Plan) -> Result<Self> {
        Ok(self.clone())
    }

    /// The model's weight `name` in `shape`.
    fn read(&self, plan: &Plan, name: &str, shape: &[i64]) -> Result<Tensor>;
}

/// The config that the file at `path` tells.
pub(super) fn infer<C: Checkpoint>(path: impl AsRef<Path>) -> Result<C> {
    infer_from(&Plan::new(&TensorFile::open(path)?, C::FAMILY)?)
}

fn infer_from<C: Checkpoint>(plan: &Plan) -> Result<C> {
    let (config, path) = (C::from_plan(plan)?, plan.file.path());
    config.validate().map_err(|e| Error::corrupt(path, e.to_string()))?;
    Ok(config)
}

impl<C: Checkpoint> Frozen<C> {
    /// Opens a checkpoint on `device`: recognizes its format, takes the config that it tells
    /// (`infer`, of the config) and loads it strictly, in f32.
    ///
    /// # Errors
    /// As [`Frozen::open_with`] and `infer`.
    pub fn open(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        Ok(Self::open_reported(path, None, device)?.0)
    }

    /// Opens a checkpoint with a config of the caller's.
    ///
    /// A table for other positions than the config's is resized as timm does it: a ViT's for
    /// another square grid of patches, a Swin's for another square window. A ViT's that fits the
    /// config's grid, with `pos_embed_prefix` rows before it or as many as the family usually has,
    /// is taken as it is: 16 rows are a class token and a grid of 3x5 where the config says 3x5,
    /// though [`ViTConfig::infer`](crate::ViTConfig::infer) read a grid of 4x4.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is no model; [`Error::OtherBackbone`] if the file is of
    /// another family; with the name in the file: [`Error::MissingTensor`],
    /// [`Error::ShapeMismatch`] and [`Error::UnexpectedTensors`]; and as [`TensorFile::open`].
    pub fn open_with(path: impl AsRef<Path>, config: &C, device: Device) -> Result<Self> {
        Ok(Self::open_reported(path, Some(config), device)?.0)
    }

    /// As [`Frozen::open`] or, given a config, [`Frozen::open_with`], and what became of each
    /// tensor of the file.
    ///
    /// # Errors
    /// As those.
    pub fn open_reported(
        path: impl AsRef<Path>,
        config: Option<&C>,
        device: Device,
    ) -> Result<(Self, LoadReport)> {
        let file = TensorFile::open(path)?;
        let plan = Plan::new(&file, C::FAMILY)?;
        plan.check_names()?;
        let config = match config {
            Some(config) => {
                config.validate()?;
                config.fit(&plan)?
            }
            None => infer_from(&plan)?,
        };
        let mut taken = HashSet::new();
        let backbone = Self::from_source(&config, &mut |name, shape| {
            let weight = config.read(&plan, name, shape)?;
            taken.insert(name.to_owned());
            Ok(weight.f_to_device(device)?)
        })?;
        let report = plan.report(|name| taken.contains(name))?;
        Ok((backbone, report))
    }
}
