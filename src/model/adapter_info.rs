//! [`AdapterInfo`]: what an adapter file says beside its tensors.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::petl_model::PetlConfig;
use crate::backbone::{Backbone, Description};
use crate::checkpoint::TensorFile;
use crate::error::{Error, Result};

/// The one metadata key: safetensors keeps its metadata in a map without an order, and one entry
/// has one order, so that the same model gives the same bytes.
pub(super) const KEY: &str = "convpass";

/// What an adapter file says beside its tensors: enough to build the model again, to prepare images
/// and to name the answers.
///
/// Files of version 0.1 hold `config` and `backbone_digest` alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AdapterInfo {
    /// The method and its config, the number of classes, drop path and seed.
    pub config: PetlConfig,
    /// Digest of the backbone that the adapter was trained beside ([`Backbone::digest`]).
    #[serde(rename = "backbone")]
    pub backbone_digest: String,
    /// What that backbone is called: its family, file, image size, precision and preprocessing.
    #[serde(default, rename = "description", skip_serializing_if = "Option::is_none")]
    pub backbone: Option<Description>,
    /// Names of the classes in the order of the head's rows, if they were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_names: Option<Vec<String>>,
    /// Version of the crate that wrote the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl AdapterInfo {
    /// Reads the metadata of the adapter file at `path`; no backbone is needed.
    ///
    /// # Errors
    /// As [`TensorFile::open`]; [`Error::UnknownFormat`] if the file was not written by
    /// [`PetlModel::save_adapter`](super::PetlModel::save_adapter).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::of(&TensorFile::open(path)?)
    }

    pub(super) fn of(file: &TensorFile) -> Result<Self> {
        let unknown =
            |reason: String| Error::UnknownFormat { file: file.path().to_path_buf(), reason };
        let Some(text) = file.metadata().get(KEY) else {
            return Err(unknown(format!(
                "no metadata `{KEY}`, so it is no adapter saved by this crate"
            )));
        };
        serde_json::from_str(text).map_err(|e| unknown(format!("metadata `{KEY}`: {e}")))
    }

    /// Refuses a backbone other than the one that the adapter in `file` was trained beside.
    pub(super) fn check_backbone(&self, file: &TensorFile, given: &impl Backbone) -> Result<()> {
        let found = given.digest()?;
        if found == self.backbone_digest {
            return Ok(());
        }
        Err(Error::BackboneMismatch {
            file: file.path().to_path_buf(),
            expected: self.backbone_digest.clone(),
            found,
            trained_beside: self.backbone.as_ref().map(ToString::to_string),
            given: given.describe().to_string(),
        })
    }
}
