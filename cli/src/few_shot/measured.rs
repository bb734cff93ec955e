//! The sets that a run is measured on, and the file that keeps the results beside the record.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use convpass::data::{FileList, ImageDataset, Resize};
use convpass::eval::ClassSubset;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::files::write_atomically;
use crate::flags::ThreadFlags;

/// A set of images that a run is measured on.
pub struct MeasuredSet {
    pub name: String,
    pub images: ImageDataset,
    /// The path of each image in its list.
    pub paths: Vec<String>,
    /// The classes of the model that the set has; `None` if it has all of them.
    pub subset: Option<ClassSubset>,
    /// Hash of the sizes of the files. Variants of a dataset may have the same paths and labels,
    /// but their files differ in size.
    sizes: String,
}

impl MeasuredSet {
    /// Returns the set of the images of `list`; each image is decoded when it is used.
    pub fn new(
        name: &str,
        list: &FileList,
        subset: Option<ClassSubset>,
        resize: Resize,
        threads: &ThreadFlags,
    ) -> Result<Self> {
        let mut sizes = Sha256::new();
        for entry in list.entries() {
            let path = list.root().join(&entry.path);
            let file = fs::metadata(&path).with_context(|| path.display().to_string())?;
            sizes.update(file.len().to_le_bytes());
        }
        let sizes = format!("{:x}", sizes.finalize());
        let images = threads.decoding(ImageDataset::stream(list, resize));
        let paths = list.entries().iter().map(|entry| entry.path.clone()).collect();
        Ok(MeasuredSet { name: name.to_owned(), images, paths, subset, sizes })
    }

    /// Returns the class of the model that a label of the set has.
    pub fn class(&self, label: i64) -> i64 {
        let of_set = |subset: &ClassSubset| subset.classes().get(label as usize).copied();
        self.subset.as_ref().and_then(of_set).unwrap_or(label)
    }

    fn classes(&self) -> Option<Vec<i64>> {
        self.subset.as_ref().map(|subset| subset.classes().to_vec())
    }
}

/// The results of a run on each set, by the name of the set.
pub struct Measured {
    file: PathBuf,
    sets: BTreeMap<String, Accuracy>,
}

/// The result on a set: top-1 over the classes of the set.
#[derive(Serialize, Deserialize)]
struct Accuracy {
    /// Hash of the set's list.
    split: String,
    sizes: String,
    /// The class of the model for each label of the set; `None` if the set has all classes.
    classes: Option<Vec<i64>>,
    images: usize,
    /// Top-1 in percent.
    top1: f64,
}

impl Measured {
    /// The name of the file in the folder of a run.
    pub const FILE: &str = "measured.json";

    /// Returns empty results for the run in `folder`.
    pub fn none(folder: &Path) -> Self {
        Measured { file: folder.join(Self::FILE), sets: BTreeMap::new() }
    }

    /// Reads the results of the run in `folder`; they are empty if there is no file.
    pub fn load(folder: &Path) -> Result<Self> {
        let none = Self::none(folder);
        match fs::read(&none.file) {
            Ok(text) => {
                let sets = serde_json::from_slice(&text);
                let sets = sets.with_context(|| none.file.display().to_string())?;
                Ok(Measured { sets, ..none })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(none),
            Err(error) => Err(error).with_context(|| none.file.display().to_string()),
        }
    }

    /// Returns top-1 in percent on `set`, or `None` if the run was not measured on exactly these
    /// images and classes.
    pub fn top1(&self, set: &MeasuredSet) -> Option<f64> {
        let found = self.sets.get(&set.name)?;
        let known = (found.split.as_str(), &found.sizes, found.classes.clone());
        (known == (set.images.split_hash(), &set.sizes, set.classes())).then_some(found.top1)
    }

    pub fn add(&mut self, set: &MeasuredSet, top1: f64) -> Result<()> {
        let accuracy = Accuracy {
            split: set.images.split_hash().to_owned(),
            sizes: set.sizes.clone(),
            classes: set.classes(),
            images: set.images.len(),
            top1,
        };
        self.sets.insert(set.name.clone(), accuracy);
        Ok(write_atomically(&self.file, &serde_json::to_vec_pretty(&self.sets)?)?)
    }
}
