//! What a run's adapter reached on the targets, kept beside its record.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::targets::TargetSet;

/// The file beside `run.json`.
const FILE: &str = "targets.json";

/// By the target's name.
pub struct Measured {
    file: PathBuf,
    targets: BTreeMap<String, Accuracy>,
}

/// Top-1 over the classes of a set.
#[derive(Serialize, Deserialize)]
struct Accuracy {
    /// Hash of the set's list.
    split: String,
    /// The model's class of each label, where it does not have all.
    classes: Option<Vec<i64>>,
    images: usize,
    /// In percent.
    top1: f64,
}

impl Measured {
    /// What is known in the folder of a run.
    pub fn load(folder: &std::path::Path) -> Result<Self> {
        let file = folder.join(FILE);
        let targets = match fs::read(&file) {
            Ok(text) => {
                serde_json::from_slice(&text).with_context(|| file.display().to_string())?
            }
            Err(error) if error.kind() == ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| file.display().to_string()),
        };
        Ok(Measured { file, targets })
    }

    /// Top-1 in percent on the very images and classes of `target`, if it was measured.
    pub fn top1(&self, target: &TargetSet) -> Option<f64> {
        let found = self.targets.get(&target.name)?;
        let same = found.split == target.list.split_hash() && found.classes == classes(target);
        same.then_some(found.top1)
    }

    /// Adds a figure; the file has all or what it had.
    pub fn add(&mut self, target: &TargetSet, images: usize, top1: f64) -> Result<()> {
        let (split, classes) = (target.list.split_hash(), classes(target));
        self.targets.insert(target.name.clone(), Accuracy { split, classes, images, top1 });
        let unfinished = self.file.with_extension("json.tmp");
        fs::write(&unfinished, serde_json::to_vec_pretty(&self.targets)?)
            .and_then(|()| fs::rename(&unfinished, &self.file))
            .with_context(|| self.file.display().to_string())
    }
}

fn classes(target: &TargetSet) -> Option<Vec<i64>> {
    target.subset.as_ref().map(|subset| subset.classes().to_vec())
}
