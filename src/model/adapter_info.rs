//! [`AdapterInfo`]: the metadata of an adapter file.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::petl_model::PetlConfig;
use crate::backbone::{Backbone, Description};
use crate::checkpoint::TensorFile;
use crate::error::{Error, Result};

/// The only metadata key. Safetensors keeps its metadata in an unordered map; with one entry, the
/// same model always gives the same bytes.
pub(super) const KEY: &str = "convpass";

/// The metadata of an adapter file: enough to rebuild the model, to prepare images and to name the
/// classes.
///
/// Files of version 0.1 have only `config` and `backbone_digest`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AdapterInfo {
    /// The method with its config, the number of classes, the drop path rate and the seed.
    pub config: PetlConfig,
    /// Digest of the backbone that the adapter was trained on ([`Backbone::digest`]).
    #[serde(rename = "backbone")]
    pub backbone_digest: String,
    /// Description of that backbone: family, file, image size, precision and preprocessing.
    #[serde(default, rename = "description", skip_serializing_if = "Option::is_none")]
    pub backbone: Option<Description>,
    /// Names of the classes in the order of the head's rows, if they are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_names: Option<Vec<String>>,
    /// Version of the crate that wrote the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl AdapterInfo {
    /// Reads the metadata of the adapter file at `path`. This needs no backbone.
    ///
    /// # Errors
    /// The errors of [`TensorFile::open`]; [`Error::UnknownFormat`] if the file was not written by
    /// [`PetlModel::save_adapter`](super::PetlModel::save_adapter).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::of(&TensorFile::open(path)?)
    }

    pub(super) fn of(file: &TensorFile) -> Result<Self> {
        let unknown =
            |reason: String| Error::UnknownFormat { file: file.path().to_path_buf(), reason };
        let Some(text) = file.metadata().get(KEY) else {
            return Err(unknown(format!(
                "it has no metadata `{KEY}`, so it is not an adapter of this crate"
            )));
        };
        serde_json::from_str(text).map_err(|e| unknown(format!("metadata `{KEY}`: {e}")))
    }

    /// Returns an error if `given` is not the backbone that the adapter in `file` was trained on.
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
