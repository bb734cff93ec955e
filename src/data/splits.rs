//! The training, validation and test images of a dataset in a folder or a list.

use std::path::{Path, PathBuf};

use rand::seq::SliceRandom;

use super::few_shot::{by_class, generator};
use super::file_list::{FileList, LeftOut};
use super::folders::{has_image_extension, list};
use crate::error::{Error, Result, list as listed};

/// The names that the part of a dataset may have, as a folder or as the start of a list's name.
const PARTS: [&[&str]; 3] =
    [&["train", "training"], &["val", "valid", "validation"], &["test", "testing"]];
/// The extensions of lists.
const LISTS: [&str; 6] = ["csv", "tsv", "json", "jsonl", "ndjson", "txt"];
/// How many folders in a row that hold nothing but one folder are entered.
const MAX_PARENTS: usize = 4;

/// The images of a dataset in three parts, which share their classes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Splits {
    /// The images to train on.
    pub train: FileList,
    /// The images to choose by, such as the best epoch.
    pub val: Option<FileList>,
    /// The images to report a result on.
    pub test: Option<FileList>,
    /// What is odd about the dataset, a sentence for each; nothing of it is wrong for certain.
    pub warnings: Vec<String>,
    /// The files that are in no list, because they are no images.
    pub left_out: Vec<LeftOut>,
}

/// The fractions of the images of each class that are drawn for validation and for the test.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitFractions {
    /// The fraction for validation, from 0 to below 1.
    pub val: f64,
    /// The fraction for the test, from 0 to below 1.
    pub test: f64,
}

impl Default for SplitFractions {
    /// A tenth for validation and a fifth for the test.
    fn default() -> Self {
        Self { val: 0.1, test: 0.2 }
    }
}

impl Splits {
    /// Opens a dataset:
    ///
    /// - a folder that holds `train` and `val` or `test` (also called `training`, `valid`,
    ///   `validation`, `testing`, in upper or lower case): folders with one folder for each class,
    ///   or lists such as `train.csv`;
    /// - a folder with one folder for each class ([`FileList::from_folders`]), whose images are all
    ///   in `train`;
    /// - a folder that holds nothing but such a folder;
    /// - a list ([`FileList::read`]), whose images are all in `train`.
    ///
    /// The paths of lists are relative to `root`, or without it to the folder of the list. The
    /// classes are those of `train`. The images are not opened.
    ///
    /// # Errors
    /// The errors of [`FileList::from_folders`], [`FileList::from_folders_of`], [`FileList::read`]
    /// and [`FileList::read_of`]; [`Error::ClassFolders`] if two folders or lists could be the same
    /// part.
    pub fn open(path: impl AsRef<Path>, root: Option<&Path>) -> Result<Self> {
        let mut path = path.as_ref().to_path_buf();
        if !path.is_dir() {
            let folder = path.parent().unwrap_or(Path::new(""));
            return Ok(Self::of_train(FileList::read(root.unwrap_or(folder), &path, None)?));
        }
        let mut warnings = Vec::new();
        for _ in 0..MAX_PARENTS {
            if let Some(parts) = Parts::find(&path)? {
                return parts.read(&path, root, warnings);
            }
            let Some(only) = only_folder(&path)? else { break };
            warnings.push(format!("{}: the images are in {}", path.display(), only.display()));
            path = only;
        }
        let mut splits = Self::of_train(FileList::from_folders(&path)?);
        splits.warnings.splice(0..0, warnings);
        Ok(splits)
    }

    fn of_train(train: FileList) -> Self {
        let (warnings, left_out) = (told(&train), train.left_out().to_vec());
        Self { train, val: None, test: None, warnings, left_out }
    }

    /// Draws the parts that are missing from `train` at random with `seed`, the fraction of each
    /// class that `fractions` gives, rounded to whole images.
    ///
    /// A class gives at least one image to each part whose fraction is not 0, the test first, and
    /// keeps at least one image in `train`; where it has too few for that, a warning says so. What
    /// is drawn does not depend on the order of the list or on the machine.
    ///
    /// # Errors
    /// [`Error::Config`] if a fraction is not in `0..1` or their sum is not below 1.
    pub fn complete(mut self, fractions: SplitFractions, seed: i64) -> Result<Self> {
        for (field, fraction) in [("val", fractions.val), ("test", fractions.test)] {
            if !(0.0..1.0).contains(&fraction) {
                return Err(Error::config(field, "from 0 to below 1", fraction));
            }
        }
        if fractions.val + fractions.test >= 1.0 {
            let sum = fractions.val + fractions.test;
            return Err(Error::config("val + test", "below 1", sum));
        }
        let missing =
            |part: &Option<FileList>, fraction| if part.is_none() { fraction } else { 0.0 };
        let wanted = [missing(&self.test, fractions.test), missing(&self.val, fractions.val)];
        let names = ["test", "validation"];
        let (mut kept, mut drawn, mut short) =
            (Vec::new(), [Vec::new(), Vec::new()], [(); 2].map(|()| Vec::new()));
        for (label, mut images) in by_class(&self.train) {
            images.shuffle(&mut generator(b"few-shot", seed, label));
            let mut rest: Vec<_> = images.into_iter().cloned().collect();
            let count = rest.len();
            for (part, fraction) in
                wanted.into_iter().enumerate().filter(|(_, wanted)| *wanted > 0.0)
            {
                let share = (count as f64 * fraction).round().max(1.0) as usize;
                let share = share.min(rest.len() - 1);
                if share == 0 {
                    short[part].push(format!("{} ({count})", self.train.class_name(label)));
                }
                drawn[part].extend(rest.drain(rest.len() - share..));
            }
            kept.extend(rest);
        }
        for (part, classes) in short.iter().enumerate().filter(|(_, classes)| !classes.is_empty()) {
            self.warnings.push(format!(
                "{} classes have too few images to give one to the {} images: {}",
                classes.len(),
                names[part],
                listed(classes)
            ));
        }
        let list = |mut entries: Vec<super::FileEntry>| {
            entries.sort_by(|a, b| (a.label, &a.path, a.line).cmp(&(b.label, &b.path, b.line)));
            (!entries.is_empty()).then(|| self.train.with_entries(entries))
        };
        let [test, val] = drawn.map(list);
        let train = list(kept).unwrap_or_else(|| self.train.clone());
        Ok(Self { val: self.val.or(val), test: self.test.or(test), train, ..self })
    }
}

/// Returns the warnings of a list with its file or folder.
fn told(list: &FileList) -> Vec<String> {
    let file = list.file().display();
    list.warnings().iter().map(|warning| format!("{file}: {warning}")).collect()
}

/// Returns the only folder in `path`, if `path` holds no image and that folder holds folders.
fn only_folder(path: &Path) -> Result<Option<PathBuf>> {
    let names = list(path)?;
    let mut folders = names.iter().filter(|(_, is_folder)| *is_folder);
    let (Some((only, _)), None) = (folders.next(), folders.next()) else { return Ok(None) };
    if names.iter().any(|(name, is_folder)| !is_folder && has_image_extension(name)) {
        return Ok(None);
    }
    let only = path.join(only);
    let holds_folders = list(&only)?.iter().any(|(_, is_folder)| *is_folder);
    Ok(holds_folders.then_some(only))
}

/// The folders or lists of the three parts.
struct Parts {
    /// Train, validation and test.
    paths: [Option<PathBuf>; 3],
    /// The folders beside them that are no part.
    others: Vec<String>,
}

impl Parts {
    /// Finds the parts of the dataset in `path`, if it has them.
    fn find(path: &Path) -> Result<Option<Self>> {
        let (mut paths, mut others) = ([const { None::<PathBuf> }; 3], Vec::new());
        for (name, is_folder) in list(path)? {
            let Some(part) = part_of(&name, is_folder) else {
                others.extend(is_folder.then_some(name));
                continue;
            };
            if let Some(other) = paths[part].replace(path.join(&name)) {
                let reason = format!("{} and {name} could be the same images", other.display());
                return Err(Error::ClassFolders { folder: path.to_path_buf(), reason });
            }
        }
        let is_list = paths[0].as_ref().is_some_and(|train| !train.is_dir());
        // A class may be called `train`, for example beside `bus`.
        let has_other_part = paths[1].is_some() || paths[2].is_some();
        let is_found = paths[0].is_some() && (has_other_part || is_list || others.is_empty());
        Ok(is_found.then_some(Self { paths, others }))
    }

    fn read(self, path: &Path, root: Option<&Path>, warnings: Vec<String>) -> Result<Splits> {
        let [train, val, test] = self.paths;
        let root = root.unwrap_or(path);
        let train = train.unwrap_or_default();
        let from_here = |list: FileList, part: &Path| {
            let name = part.file_name().unwrap_or_default().to_string_lossy().into_owned();
            list.seen_from(path, &name)
        };
        let mut splits = Splits::of_train(if train.is_dir() {
            from_here(FileList::from_folders(&train)?, &train)
        } else {
            FileList::read(root, &train, None)?
        });
        splits.warnings.splice(0..0, warnings);
        if !self.others.is_empty() && train.is_dir() {
            let others = listed(&self.others);
            splits.warnings.push(format!("{}: folders left out: {others}", path.display()));
        }
        let names = splits.train.class_names().to_vec();
        let read = |part: PathBuf| match (part.is_dir(), names.is_empty()) {
            (true, _) => Ok(from_here(FileList::from_folders_of(&part, &names)?, &part)),
            (false, true) => FileList::read(root, &part, Some(splits.train.num_classes())),
            (false, false) => FileList::read_of(root, &part, &names),
        };
        (splits.val, splits.test) = (val.map(read).transpose()?, test.map(read).transpose()?);
        for part in [&splits.val, &splits.test].into_iter().flatten() {
            splits.warnings.extend(told(part));
            splits.left_out.extend_from_slice(part.left_out());
        }
        Ok(splits)
    }
}

/// Returns the part that a folder or a file is of, by its name.
fn part_of(name: &str, is_folder: bool) -> Option<usize> {
    let name = name.to_ascii_lowercase();
    let name = if is_folder {
        &*name
    } else {
        let (name, extension) = name.split_once('.')?;
        LISTS.contains(&extension).then_some(name)?
    };
    PARTS.iter().position(|names| names.contains(&name))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::folders::tests::tree;

    fn paths(list: &FileList) -> Vec<&str> {
        list.entries().iter().map(|entry| entry.path.as_str()).collect()
    }

    #[test]
    fn parts_are_recognized_as_folders_and_as_lists() {
        let root =
            tree(&["Train/a/1.png", "Train/b/1.png", "valid/b/2.png", "test/a/3.png", "raw/x"]);
        let splits = Splits::open(root.path(), None).unwrap();
        assert_eq!(paths(&splits.train), ["Train/a/1.png", "Train/b/1.png"]);
        let val = splits.val.unwrap();
        assert_eq!((paths(&val), val.entries()[0].label), (vec!["valid/b/2.png"], 1));
        assert_eq!(splits.test.unwrap().class_names(), ["a", "b"]);
        assert!(splits.warnings.join(" ").contains("folders left out: raw"));
        // The same images as lists, from the folder that they are saved in.
        let lists = tempfile::tempdir().unwrap();
        splits.train.save(lists.path().join("train.csv")).unwrap();
        val.save(lists.path().join("val.csv")).unwrap();
        let again = Splits::open(lists.path(), Some(root.path())).unwrap();
        assert_eq!(again.train.split_hash(), splits.train.split_hash());
        assert_eq!(again.val.unwrap().split_hash(), val.split_hash());
        assert!(again.test.is_none() && again.train.class_names() == ["a", "b"]);
        fs::write(lists.path().join("training.txt"), "a 0").unwrap();
        let error = Splits::open(lists.path(), None).unwrap_err().to_string();
        assert!(error.contains("could be the same images"), "{error}");
    }

    #[test]
    fn classes_are_told_from_parts_and_parents() {
        let vehicles = tree(&["train/1.png", "bus/1.png", "car/1.png"]);
        let splits = Splits::open(vehicles.path(), None).unwrap();
        assert_eq!(splits.train.class_names(), ["bus", "car", "train"]);
        let parent = tree(&["set/images/a/1.png", "set/images/b/1.png", "set/readme.txt"]);
        let splits = Splits::open(parent.path(), None).unwrap();
        assert_eq!(paths(&splits.train), ["a/1.png", "b/1.png"]);
        assert!(splits.warnings[0].contains("the images are in"), "{:?}", splits.warnings);
        let parent = tree(&["set/train/a/1.png", "set/test/a/1.png"]);
        assert!(Splits::open(parent.path(), None).unwrap().test.is_some());
        let flat = tree(&["1.png", "2.png"]);
        let error = Splits::open(flat.path(), None).unwrap_err().to_string();
        assert!(error.contains("no folder, but 2 images"), "{error}");
        let unknown = tree(&["train/a/1.png", "test/b/1.png"]);
        let error = Splits::open(unknown.path(), None).unwrap_err().to_string();
        assert!(error.contains("b is not one of the classes"), "{error}");
    }

    #[test]
    fn what_is_missing_is_drawn_of_each_class() {
        let names: Vec<String> = [("a", 20), ("b", 10), ("c", 2), ("d", 1)]
            .into_iter()
            .flat_map(|(class, count)| (0..count).map(move |i| format!("{class}/{i}.png")))
            .collect();
        let root = tree(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let draw = |seed| {
            let splits = Splits::open(root.path(), None).unwrap();
            splits.complete(SplitFractions::default(), seed).unwrap()
        };
        let splits = draw(0);
        let (val, test) = (splits.val.as_ref().unwrap(), splits.test.as_ref().unwrap());
        assert_eq!(splits.train.class_counts(), [14, 7, 1, 1]);
        assert_eq!((val.class_counts(), test.class_counts()), (vec![2, 1, 0, 0], vec![4, 2, 1, 0]));
        let mut all = [paths(&splits.train), paths(val), paths(test)].concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 33);
        assert_eq!(paths(draw(0).test.as_ref().unwrap()), paths(test));
        assert_ne!(paths(draw(1).test.as_ref().unwrap()), paths(test));
        let told = splits.warnings.join("\n");
        assert!(
            told.contains("1 classes have too few images to give one to the test images: d (1)")
        );
        assert!(told.contains("to the validation images: c (2), d (1)"), "{told}");
        // The parts that are there stay as they are.
        let again = splits.clone().complete(SplitFractions::default(), 5).unwrap();
        assert_eq!(paths(&again.train), paths(&splits.train));
        for (val, test) in [(0.5, 0.5), (-0.1, 0.1), (1.0, 0.0), (f64::NAN, 0.0)] {
            let refused = splits.clone().complete(SplitFractions { val, test }, 0);
            assert!(matches!(refused, Err(Error::Config { .. })), "{val} {test}");
        }
    }
}
