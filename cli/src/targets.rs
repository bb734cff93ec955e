//! Sets of images that a model is measured on. A set has all classes of the model or some of them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use convpass::data::FileList;
use convpass::eval::ClassSubset;

/// The paths of a set of images.
#[derive(Clone)]
pub struct Target {
    pub name: String,
    /// A list, or a folder that holds one folder for each class.
    pub images: PathBuf,
    /// The file with the classes of the set, by name or number, in the order of its labels or of
    /// its folders' names. Without it a list has all classes, and a folder has the classes that its
    /// folders are named after.
    pub classes: Option<PathBuf>,
}

/// A set of images that was read.
pub struct TargetSet {
    pub name: String,
    pub list: FileList,
    /// The classes of the model that the set has; `None` if it has all of them.
    pub subset: Option<ClassSubset>,
}

/// Parses `NAME=IMAGES[:CLASSES]`.
pub fn parse_target(text: &str) -> Result<Target, String> {
    match text.split_once('=') {
        Some((name, files)) if !name.is_empty() && !files.is_empty() => Ok(named(name, files)),
        _ => Err("expected NAME=IMAGES[:CLASSES]".to_owned()),
    }
}

/// Parses `IMAGES[:CLASSES]` into the set called `name`.
pub fn named(name: &str, files: &str) -> Target {
    let (images, classes) = match files.rsplit_once(':') {
        Some((images, classes)) if !classes.is_empty() && !Path::new(files).exists() => {
            (images, Some(classes.into()))
        }
        _ => (files, None),
    };
    Target { name: name.to_owned(), images: images.into(), classes }
}

/// Reads the sets. `names` are the names of the model's classes.
///
/// # Errors
/// If two sets have the same name, or a set cannot be read.
pub fn read(targets: &[Target], root: Option<&Path>, names: &[String]) -> Result<Vec<TargetSet>> {
    for (at, target) in targets.iter().enumerate() {
        let twice = targets[..at].iter().any(|other| other.name == target.name);
        ensure!(!twice, "--target: two sets are called {}", target.name);
    }
    let read = |target: &Target| {
        target.read(root, names).with_context(|| format!("the set {}", target.name))
    };
    targets.iter().map(read).collect()
}

impl Target {
    /// Reads the set. The paths in a list are relative to `root`, or to the list's folder without
    /// it.
    fn read(&self, root: Option<&Path>, names: &[String]) -> Result<TargetSet> {
        let read = |file| ClassSubset::read(file, names);
        let mut subset = self.classes.as_ref().map(read).transpose()?;
        let classes = subset.as_ref().map_or(names.len(), |subset| subset.classes().len());
        let list = if self.images.is_dir() {
            let list = FileList::from_folders(&self.images)?;
            if subset.is_none() {
                let of_folders = ClassSubset::by_name(list.class_names(), names);
                subset = Some(of_folders.with_context(|| self.images.display().to_string())?);
            } else {
                let found = list.num_classes();
                let path = self.images.display();
                ensure!(found == classes as i64, "{path}: {found} folders, and {classes} classes");
            }
            list
        } else {
            let folder = self.images.parent().unwrap_or(Path::new(""));
            // A list numbers the classes of the set, or names them.
            let of_set = match &subset {
                Some(subset) => {
                    subset.classes().iter().map(|&class| names[class as usize].clone()).collect()
                }
                None => names.to_vec(),
            };
            FileList::read_of(root.unwrap_or(folder), &self.images, &of_set)?
        };
        Ok(TargetSet { name: self.name.clone(), list, subset })
    }
}
