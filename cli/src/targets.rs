//! Sets of images to measure on, of a model's classes or of some of them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use convpass::data::FileList;
use convpass::eval::ClassSubset;

/// Where a set is.
#[derive(Clone)]
pub struct Target {
    pub name: String,
    /// A list, or a folder with a folder for each class.
    pub images: PathBuf,
    /// The file of its classes, by name or number, in the order of its labels or its folders' names;
    /// without it a list has all, and a folder those that its folders are named after.
    pub classes: Option<PathBuf>,
}

/// A set that was found.
pub struct TargetSet {
    pub name: String,
    pub list: FileList,
    /// The model's classes that it has, if it does not have all.
    pub subset: Option<ClassSubset>,
}

/// `NAME=IMAGES[:CLASSES]`.
pub fn parse_target(text: &str) -> Result<Target, String> {
    match text.split_once('=') {
        Some((name, files)) if !name.is_empty() && !files.is_empty() => Ok(named(name, files)),
        _ => Err("expected NAME=IMAGES[:CLASSES]".to_owned()),
    }
}

/// The set of this name in `IMAGES[:CLASSES]`.
pub fn named(name: &str, files: &str) -> Target {
    let (images, classes) = match files.rsplit_once(':') {
        Some((images, classes)) if !classes.is_empty() && !Path::new(files).exists() => {
            (images, Some(classes.into()))
        }
        _ => (files, None),
    };
    Target { name: name.to_owned(), images: images.into(), classes }
}

/// The sets, whose names have to differ; `names` are those of the model's classes.
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
    /// The paths of a list are relative to `root`, or else to the list's own folder.
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
            FileList::read(root.unwrap_or(folder), &self.images, Some(classes as i64))?
        };
        Ok(TargetSet { name: self.name.clone(), list, subset })
    }
}
