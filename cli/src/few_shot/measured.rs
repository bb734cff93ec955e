//! The sets that a run is measured on, and what its adapter reached on them, kept beside its record.

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

/// The file beside `run.json`.
const FILE: &str = "measured.json";

/// Images to measure on.
pub struct MeasuredSet {
    pub name: String,
    pub images: ImageDataset,
    /// The model's classes that it has, if it does not have all.
    pub subset: Option<ClassSubset>,
    /// Hash of the files' sizes: datasets that are variants of one another have the same paths and labels.
    sizes: String,
}

impl MeasuredSet {
    /// The images of `list`, decoded as they are reached.
    pub fn new(
        name: &str,
        list: &FileList,
        subset: Option<ClassSubset>,
        resize: Resize,
    ) -> Result<Self> {
        let mut sizes = Sha256::new();
        for entry in list.entries() {
            let path = list.root().join(&entry.path);
            let file = fs::metadata(&path).with_context(|| path.display().to_string())?;
            sizes.update(file.len().to_le_bytes());
        }
        let sizes = format!("{:x}", sizes.finalize());
        let images = ImageDataset::stream(list, resize);
        Ok(MeasuredSet { name: name.to_owned(), images, subset, sizes })
    }

    fn classes(&self) -> Option<Vec<i64>> {
        self.subset.as_ref().map(|subset| subset.classes().to_vec())
    }
}

/// By the set's name.
pub struct Measured {
    file: PathBuf,
    sets: BTreeMap<String, Accuracy>,
}

/// Top-1 over the classes of a set.
#[derive(Serialize, Deserialize)]
struct Accuracy {
    /// Hash of the set's list.
    split: String,
    sizes: String,
    /// The model's class of each label, where it does not have all.
    classes: Option<Vec<i64>>,
    images: usize,
    /// In percent.
    top1: f64,
}

impl Measured {
    /// Nothing yet, in the folder of a run.
    pub fn none(folder: &Path) -> Self {
        Measured { file: folder.join(FILE), sets: BTreeMap::new() }
    }

    /// What is known in the folder of a run.
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

    /// Top-1 in percent on the very images and classes of `set`, if it was measured.
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
