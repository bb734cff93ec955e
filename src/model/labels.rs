//! Class names, preprocessing, and a head from another file.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use sha2::{Digest, Sha256};
use tch::Tensor;

use super::adapter_info::AdapterInfo;
use super::petl_model::PetlModel;
use crate::backbone::{Backbone, Description, Preprocessing};
use crate::checkpoint::TensorFile;
use crate::error::{Error, Result};

/// Origin of a head that was loaded with [`PetlModel::load_head`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeadSource {
    /// SHA-256 of the file, in hex.
    pub digest: String,
    /// Whether the head was trained on another backbone according to the metadata of its file. The
    /// same backbone with another precision, image size or activation counts as another one.
    pub is_of_other_backbone: bool,
}

impl<B: Backbone> PetlModel<B> {
    /// Sets the names of the classes in the order of the head's rows. They are saved in adapter
    /// files.
    ///
    /// # Errors
    /// [`Error::Input`] if the number of names is not the number of classes, or if a name occurs
    /// twice.
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

    /// Sets the preprocessing of this model if it differs from that of the backbone. It is saved in
    /// adapter files.
    pub fn set_preprocessing(&mut self, preprocessing: Preprocessing) {
        self.preprocessing = Some(preprocessing);
    }

    /// Returns the preprocessing of this model: the value of [`PetlModel::set_preprocessing`] or of
    /// the adapter file, else that of the backbone. Returns `None` if none of them is known.
    pub fn preprocessing(&self) -> Option<Preprocessing> {
        self.preprocessing.clone().or_else(|| self.backbone().describe().preprocessing)
    }

    /// Returns the metadata that an adapter file of this model has.
    ///
    /// # Errors
    /// The errors of [`Backbone::digest`].
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

    /// Initializes the head with the head in an adapter file, such as that of a linear probe.
    ///
    /// If both the file and the model name their classes, the rows of the head are put in the order
    /// of the model's names. Names that are the labels as text count as no names. Call
    /// [`PetlModel::set_class_names`] first.
    ///
    /// # Errors
    /// The errors of [`TensorFile::open`] and [`PetlModel::set_head`]; [`Error::MissingTensor`] if
    /// the file has no head; [`Error::ClassMismatch`] if its classes have other names. The head is
    /// unchanged after an error.
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
        let (mut weight, mut bias) = (tensor("head.weight")?, tensor("head.bias")?);
        let bytes = std::fs::read(file.path()).map_err(Error::io(file.path()))?;
        let info = AdapterInfo::of(&file).ok();
        let is_of_other_backbone = match &info {
            Some(info) => info.backbone_digest != self.backbone().digest()?,
            None => false,
        };
        let names = info.and_then(|info| info.class_names);
        if let (Some(own), Some(names)) = (self.class_names(), names)
            && let Some(rows) = rows_of(file.path(), own, &names)?
        {
            // A head with another number of rows is refused by `set_head`.
            let rows = Tensor::f_from_slice(&rows)?;
            (weight, bias) = (weight.f_index_select(0, &rows)?, bias.f_index_select(0, &rows)?);
        }
        self.set_head(&weight, Some(&bias))?;
        Ok(HeadSource { digest: format!("{:x}", Sha256::digest(bytes)), is_of_other_backbone })
    }
}

/// Returns the row of the head in `file`, whose classes are called `names`, for each class of the
/// model, or `None` if they are in the same order or not named.
fn rows_of(file: &Path, own: &[String], names: &[String]) -> Result<Option<Vec<i64>>> {
    let is_numbers =
        |names: &[String]| (0..).zip(names).all(|(at, name): (i64, _)| *name == at.to_string());
    if own == names || is_numbers(own) || is_numbers(names) {
        return Ok(None);
    }
    let places: HashMap<&String, i64> = names.iter().zip(0..).collect();
    let own_names: HashSet<&String> = own.iter().collect();
    let missing: Vec<_> = own.iter().filter(|name| !places.contains_key(name)).cloned().collect();
    let unexpected: Vec<_> =
        names.iter().filter(|name| !own_names.contains(name)).cloned().collect();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(Error::ClassMismatch { file: file.to_path_buf(), missing, unexpected });
    }
    Ok(Some(own.iter().filter_map(|name| places.get(name).copied()).collect()))
}
