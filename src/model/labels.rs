//! What a model carries for whoever uses it: class names, preprocessing, a head from elsewhere.

use std::path::Path;

use sha2::{Digest, Sha256};
use tch::Tensor;

use super::adapter_info::AdapterInfo;
use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Description, Preprocessing};
use crate::checkpoint::TensorFile;
use crate::error::{Error, Result};

/// Where a head came from ([`PetlModel::load_head`]).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeadSource {
    /// SHA-256 of the file, in hex.
    pub digest: String,
    /// Whether the file says that its head was trained over another backbone, or over the same in
    /// another precision, image size or activation.
    pub is_of_other_backbone: bool,
}

impl<B: Backbone> PetlModel<B> {
    /// Names the classes in the order of the head's rows. An adapter file keeps the names.
    ///
    /// # Errors
    /// [`Error::Input`] if there are not as many names as classes, or if one is there twice.
    pub fn set_class_names(&mut self, names: Vec<String>) -> Result<()> {
        let expected = self.config().num_classes;
        if names.len() as i64 != expected {
            return Err(Error::Input {
                argument: "names",
                expected: format!("{expected}, one for each class"),
                found: names.len().to_string(),
            });
        }
        let mut sorted: Vec<&String> = names.iter().collect();
        sorted.sort();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            let (expected, found) = ("names that differ".to_owned(), format!("{} twice", pair[0]));
            return Err(Error::Input { argument: "names", expected, found });
        }
        self.class_names = Some(names);
        Ok(())
    }

    /// Returns the names of the classes in the order of the head's rows, if they are known.
    pub fn class_names(&self) -> Option<&[String]> {
        self.class_names.as_deref()
    }

    /// Says how images are prepared for this model, where that is not what the backbone says. An
    /// adapter file keeps it.
    pub fn set_preprocessing(&mut self, preprocessing: Preprocessing) {
        self.preprocessing = Some(preprocessing);
    }

    /// Returns how images are prepared for this model: as [`PetlModel::set_preprocessing`] said, as
    /// the adapter file said, or as the backbone says; `None` if nobody does.
    pub fn preprocessing(&self) -> Option<Preprocessing> {
        self.preprocessing.clone().or_else(|| self.backbone().describe().preprocessing)
    }

    /// Returns what an adapter file of this model says beside its tensors.
    ///
    /// # Errors
    /// As [`Backbone::digest`].
    pub fn adapter_info(&self) -> Result<AdapterInfo> {
        let described = self.backbone().describe();
        Ok(AdapterInfo {
            config: self.config().clone(),
            backbone_digest: self.backbone().digest()?,
            backbone: Some(Description { preprocessing: self.preprocessing(), ..described }),
            class_names: self.class_names.clone(),
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        })
    }

    /// Starts the head from the head in an adapter file, such as a linear probe's.
    ///
    /// # Errors
    /// As [`TensorFile::open`] and [`PetlModel::set_head`]; [`Error::MissingTensor`] if the file
    /// holds no head. The head is then as it was.
    pub fn load_head(&mut self, path: impl AsRef<Path>) -> Result<HeadSource> {
        let file = TensorFile::open(path)?;
        let tensor = |name: &str| -> Result<Tensor> {
            if file.contains(name) {
                return file.tensor(name);
            }
            let (dim, classes) = (self.backbone().feature_dim(), self.config().num_classes);
            let expected = if name == "head.bias" { vec![classes] } else { vec![classes, dim] };
            let (file, name) = (file.path().to_path_buf(), name.to_owned());
            Err(Error::MissingTensor { file, name, expected })
        };
        let (weight, bias) = (tensor("head.weight")?, tensor("head.bias")?);
        let bytes = std::fs::read(file.path()).map_err(Error::io(file.path()))?;
        let beside = AdapterInfo::of(&file).ok().map(|info| info.backbone_digest);
        let is_of_other_backbone = match beside {
            Some(digest) => digest != self.backbone().digest()?,
            None => false,
        };
        self.set_head(&weight, Some(&bias))?;
        Ok(HeadSource { digest: format!("{:x}", Sha256::digest(bytes)), is_of_other_backbone })
    }
}
