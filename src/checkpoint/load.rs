//! Loads a frozen backbone from a checkpoint.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;

use tch::{Device, Tensor};

use super::choice::Unsettled;
use super::plan::Plan;
use super::report::Setting;
use super::{LoadReport, TensorFile};
use crate::backbone::{Frozen, Network};
use crate::error::{Error, Result};

/// A config whose model can be read from a checkpoint. Each family of backbones implements it once.
pub trait Checkpoint: Network {
    /// Returns the config that the tensors of a recognized file show. It may be invalid.
    fn from_plan(plan: &Plan) -> Result<Self>;

    /// Returns the caller's valid config, completed with the values that only the file determines.
    fn fit(&self, _plan: &Plan) -> Result<Self> {
        Ok(self.clone())
    }

    /// Checks that a config from [`Checkpoint::from_plan`] is valid. A value that the file does not
    /// tell may be invalid.
    fn check_inferred(&self) -> Result<()> {
        self.validate()
    }

    /// Checks that the file tells every value of a config from [`Checkpoint::from_plan`].
    fn check_told(&self, _plan: &Plan) -> Result<()> {
        Ok(())
    }

    /// Returns the settings that neither the tensors nor a file beside them tell, although models
    /// with different values exist.
    ///
    /// # Errors
    /// The errors of [`Checkpoint::from_plan`].
    fn unsettled(_plan: &Plan) -> Result<Vec<Unsettled>> {
        Ok(Vec::new())
    }

    /// Returns the settings of this config that no tensor shows, each with its origin.
    ///
    /// # Errors
    /// The errors of [`Checkpoint::from_plan`].
    fn settings(&self, _plan: &Plan) -> Result<Vec<Setting>> {
        Ok(Vec::new())
    }

    /// Returns the name under which the plan has the model's weight `name`.
    fn stored_name<'n>(&self, _plan: &Plan, name: &'n str) -> Cow<'n, str> {
        name.into()
    }

    /// Reads the model's weight `name` with the shape `shape`. `name` is the stored name.
    fn read(&self, plan: &Plan, name: &str, shape: &[i64]) -> Result<Tensor>;
}

/// Infers the config of the model in the checkpoint at `path`, and the settings that nothing tells.
pub(super) fn infer_unsettled<C: Checkpoint>(path: &Path) -> Result<(C, Vec<Unsettled>)> {
    let file = TensorFile::open(path)?;
    let plan = Plan::new(&file, C::FAMILY)?;
    Ok((infer_from(&plan)?, C::unsettled(&plan)?))
}

/// Infers the config of the model in the checkpoint at `path`.
pub(super) fn infer<C: Checkpoint>(path: impl AsRef<Path>) -> Result<C> {
    infer_from(&Plan::new(&TensorFile::open(path)?, C::FAMILY)?)
}

fn infer_from<C: Checkpoint>(plan: &Plan) -> Result<C> {
    let (config, path) = (C::from_plan(plan)?, plan.file.path());
    config.check_inferred().map_err(|e| Error::corrupt(path, e.to_string()))?;
    Ok(config)
}

impl<C: Checkpoint> Frozen<C> {
    /// Opens a checkpoint on `device`: recognizes its format, infers the config (see `infer` of the
    /// config type) and loads the weights strictly, in f32.
    ///
    /// # Errors
    /// The errors of [`Frozen::open_with`] and `infer`; [`Error::Unsettled`] if nothing tells a
    /// setting, although models with different values exist.
    pub fn open(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        Ok(Self::open_reported(path, None, device)?.0)
    }

    /// Opens a checkpoint with the config of the caller.
    ///
    /// A position table whose size differs from the config's is resized as the library of the
    /// file's names does it (Hugging Face mostly without antialiasing, timm with it): a ViT's
    /// table from one square grid of patches to another grid, a Swin's from one square window to
    /// another window. The bias tables of a BEiT are resized from one square grid to another grid.
    ///
    /// A ViT's table is used unchanged if it has the rows of the config's grid plus
    /// `pos_embed_prefix` rows, or plus the usual number of prefix rows of its family. For example,
    /// a table of 16 rows is a class token and a grid of 3x5 if the config has that grid, although
    /// [`ViTConfig::infer`](crate::ViTConfig::infer) reads it as a grid of 4x4.
    ///
    /// # Errors
    /// [`Error::Config`] if `config` is invalid; [`Error::OtherBackbone`] if the file holds a model
    /// of another family; [`Error::MissingTensor`], [`Error::ShapeMismatch`] and
    /// [`Error::UnexpectedTensors`], which use the names in the file; the errors of
    /// [`TensorFile::open`].
    pub fn open_with(path: impl AsRef<Path>, config: &C, device: Device) -> Result<Self> {
        Ok(Self::open_reported(path, Some(config), device)?.0)
    }

    /// Opens a checkpoint as [`Frozen::open_with`] does if `config` is given, and as
    /// [`Frozen::open`] does otherwise. The report says for each tensor of the file whether it was
    /// applied or skipped.
    ///
    /// # Errors
    /// The errors of [`Frozen::open`] and [`Frozen::open_with`].
    pub fn open_reported(
        path: impl AsRef<Path>,
        config: Option<&C>,
        device: Device,
    ) -> Result<(Self, LoadReport)> {
        let file = TensorFile::open(path)?;
        let plan = Plan::new(&file, C::FAMILY)?;
        plan.check_names()?;
        let given = config.is_some();
        let config = match config {
            Some(config) => {
                config.validate()?;
                config.fit(&plan)?
            }
            None => {
                if let Some(unsettled) = C::unsettled(&plan)?.first() {
                    return Err(unsettled.error(file.path()));
                }
                let config: C = infer_from(&plan)?;
                config.check_told(&plan)?;
                config
            }
        };
        let mut taken = HashSet::new();
        let backbone = Self::from_source(&config, &mut |name, shape| {
            let name = config.stored_name(&plan, name);
            let weight = config.read(&plan, &name, shape)?;
            taken.insert(name.into_owned());
            Ok(weight.f_to_device(device)?)
        })?;
        // The caller's config may be right where a file beside the weights is not supported.
        let settings = match config.settings(&plan) {
            Err(_) if given => Vec::new(),
            settings => settings?,
        };
        let report = plan.report(|name| taken.contains(name))?;
        Ok((backbone, LoadReport { settings, ..report }))
    }
}
