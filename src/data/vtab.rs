//! VTAB-1k: a table of its 19 tasks, and its folder layout.
//!
//! The layout is `<root>/<task>/{train800.txt, val200.txt, train800val200.txt, test.txt}`. Each
//! line of a list is a `relative/path label`, with the path relative to the task's folder. Other
//! tasks in this layout can be opened too.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::file_list::FileList;
use crate::error::{Error, Result};

/// The group of a task. The published average is the mean of the means of the three groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VtabGroup {
    /// Photos of everyday objects and scenes.
    Natural,
    /// Images of a special device: a microscope, a satellite, a retina camera.
    Specialized,
    /// Mostly rendered images, for tasks of counting, distance, position and orientation.
    Structured,
}

impl fmt::Display for VtabGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Natural => "natural",
            Self::Specialized => "specialized",
            Self::Structured => "structured",
        })
    }
}

/// The initialization of the 3x3 convolution in the published run of a task. It corresponds to the
/// method's `ConvInit`, which this module cannot import; the names in a configuration are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PublishedInit {
    /// The centre tap is the identity and the other taps are zero. Its name is `identity`.
    Identity,
    /// Xavier uniform. Its name is `xavier_uniform`.
    XavierUniform,
}

/// The per-task settings of a published run, from the code of arXiv 2207.07039.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PublishedChoice {
    /// The scale s of the bypass.
    pub scale: f64,
    /// The initialization of the 3x3 convolution.
    pub conv_init: PublishedInit,
}

/// A task of VTAB-1k, with the settings and the accuracy published for ViT-B/16.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct VtabTask {
    /// The name of the task and of its folder.
    pub name: &'static str,
    /// The group of the task.
    pub group: VtabGroup,
    /// The number of classes.
    pub num_classes: i64,
    /// The number of test images.
    pub test_size: usize,
    /// The settings of bypasses beside both sub-layers.
    pub convpass: PublishedChoice,
    /// The settings of bypasses beside attention only.
    pub convpass_attention: PublishedChoice,
    /// Top-1 accuracy in percent with bypasses beside both sub-layers, seed 42.
    pub convpass_top1: f64,
}

const IDENTITY: PublishedInit = PublishedInit::Identity;
const XAVIER: PublishedInit = PublishedInit::XavierUniform;
const NATURAL: VtabGroup = VtabGroup::Natural;
const SPECIALIZED: VtabGroup = VtabGroup::Specialized;
const STRUCTURED: VtabGroup = VtabGroup::Structured;

const fn row(
    (name, group, num_classes, test_size): (&'static str, VtabGroup, i64, usize),
    both: (f64, PublishedInit),
    attention: (f64, PublishedInit),
    convpass_top1: f64,
) -> VtabTask {
    let convpass = PublishedChoice { scale: both.0, conv_init: both.1 };
    let convpass_attention = PublishedChoice { scale: attention.0, conv_init: attention.1 };
    VtabTask { name, group, num_classes, test_size, convpass, convpass_attention, convpass_top1 }
}

/// The 19 tasks, in the order of the published results.
#[rustfmt::skip]
pub const TASKS: [VtabTask; 19] = [
    // name, group, classes, test images; s and init beside both sub-layers; beside attention only;
    // top-1
    row(("cifar", NATURAL, 100, 10_000), (0.1, IDENTITY), (0.1, XAVIER), 72.29),
    row(("caltech101", NATURAL, 102, 6_084), (1.0, IDENTITY), (100.0, XAVIER), 91.16),
    row(("dtd", NATURAL, 47, 1_880), (0.01, XAVIER), (0.1, XAVIER), 72.18),
    row(("oxford_flowers102", NATURAL, 102, 6_149), (0.1, XAVIER), (1.0, XAVIER), 99.15),
    row(("oxford_iiit_pet", NATURAL, 37, 3_669), (1.0, XAVIER), (1.0, XAVIER), 90.90),
    row(("svhn", NATURAL, 10, 26_032), (100.0, XAVIER), (100.0, XAVIER), 91.26),
    row(("sun397", NATURAL, 397, 21_750), (0.1, IDENTITY), (0.1, XAVIER), 54.87),
    row(("patch_camelyon", SPECIALIZED, 2, 32_768), (10.0, IDENTITY), (10.0, XAVIER), 84.19),
    row(("eurosat", SPECIALIZED, 10, 5_400), (10.0, IDENTITY), (10.0, XAVIER), 96.13),
    row(("resisc45", SPECIALIZED, 45, 6_300), (10.0, IDENTITY), (100.0, XAVIER), 85.32),
    row(("diabetic_retinopathy", SPECIALIZED, 5, 42_670), (1.0, IDENTITY), (0.1, XAVIER), 75.60),
    row(("clevr_count", STRUCTURED, 8, 15_000), (1.0, IDENTITY), (10.0, XAVIER), 82.26),
    row(("clevr_dist", STRUCTURED, 6, 15_000), (0.1, XAVIER), (1.0, XAVIER), 67.86),
    row(("dmlab", STRUCTURED, 6, 22_735), (10.0, IDENTITY), (10.0, XAVIER), 51.31),
    row(("kitti", STRUCTURED, 4, 711), (10.0, XAVIER), (10.0, XAVIER), 80.03),
    row(("dsprites_loc", STRUCTURED, 16, 73_728), (100.0, XAVIER), (10.0, XAVIER), 85.94),
    row(("dsprites_ori", STRUCTURED, 16, 73_728), (0.1, XAVIER), (1.0, XAVIER), 53.13),
    row(("smallnorb_azi", STRUCTURED, 18, 12_150), (100.0, XAVIER), (100.0, XAVIER), 36.43),
    row(("smallnorb_ele", STRUCTURED, 9, 12_150), (1.0, XAVIER), (1.0, XAVIER), 44.44),
];

/// Returns the task with this name.
pub fn task(name: &str) -> Option<&'static VtabTask> {
    TASKS.iter().find(|task| task.name == name)
}

/// One of the four lists of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VtabSplit {
    /// 800 images for training while hyperparameters are chosen.
    Train800,
    /// 200 images for choosing hyperparameters.
    Val200,
    /// Both together: the training images of a final run.
    Train800Val200,
    /// The test images.
    Test,
}

impl VtabSplit {
    /// Every split.
    pub const ALL: [Self; 4] = [Self::Train800, Self::Val200, Self::Train800Val200, Self::Test];

    /// Returns the file name of the list.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Train800 => "train800.txt",
            Self::Val200 => "val200.txt",
            Self::Train800Val200 => "train800val200.txt",
            Self::Test => "test.txt",
        }
    }
}

/// The folder of a task. Its four lists are read and checked; the images are not opened.
#[derive(Debug, Clone)]
pub struct VtabFolder {
    name: String,
    path: PathBuf,
    num_classes: i64,
    /// In the order of [`VtabSplit::ALL`].
    lists: [FileList; 4],
}

impl VtabFolder {
    /// Opens `<root>/<task>`. The number of classes of a task in [`TASKS`] comes from the table.
    /// For another task it is the highest label of the four lists plus 1.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder or one of its lists is missing, with the expected layout; also
    /// the errors of [`FileList::read`].
    pub fn open(root: impl AsRef<Path>, task: &str) -> Result<Self> {
        let path = root.as_ref().join(task);
        check_layout(&path)?;
        let known = self::task(task).map(|row| row.num_classes);
        let read = |split: VtabSplit| FileList::read(&path, path.join(split.file_name()), known);
        let [train, val, both, test] = VtabSplit::ALL.map(read);
        let mut lists = [train?, val?, both?, test?];
        let highest = lists.iter().map(FileList::num_classes).fold(1, i64::max);
        let num_classes = known.unwrap_or(highest);
        for list in &mut lists {
            list.set_num_classes(num_classes);
        }
        Ok(Self { name: task.to_string(), path, num_classes, lists })
    }

    /// Returns the name of the task.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the folder of the task.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the number of classes, which is the same for each split.
    pub fn num_classes(&self) -> i64 {
        self.num_classes
    }

    /// Returns the list of a split.
    pub fn split(&self, split: VtabSplit) -> &FileList {
        &self.lists[split as usize]
    }

    /// Returns the task with another list for a split, such as the one without the images that
    /// cannot be read ([`FileList::without_unreadable`]).
    ///
    /// # Errors
    /// [`Error::Config`] if the list has another number of classes than the task.
    pub fn with_split(mut self, split: VtabSplit, list: FileList) -> Result<Self> {
        if list.num_classes() != self.num_classes {
            let expected = format!("{} classes, as the task", self.num_classes);
            return Err(Error::config("list", expected, list.num_classes()));
        }
        self.lists[split as usize] = list;
        Ok(self)
    }
}

/// Checks that the folder of a task contains its four lists.
fn check_layout(path: &Path) -> Result<()> {
    let names = VtabSplit::ALL.map(VtabSplit::file_name);
    let missing: Vec<_> = names.into_iter().filter(|name| !path.join(name).is_file()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let found = if path.is_dir() {
        format!("the folder lacks {}", missing.join(", "))
    } else {
        "there is no such folder".to_string()
    };
    let expected = "expected a VTAB-1k task: a folder with the lists";
    let message = format!("{found}; {expected} {}, each line `path label`", names.join(", "));
    Err(Error::io(path)(io::Error::new(io::ErrorKind::NotFound, message)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_of(task: &str, lists: [&str; 4]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join(task)).unwrap();
        for (split, text) in VtabSplit::ALL.into_iter().zip(lists) {
            std::fs::write(root.path().join(task).join(split.file_name()), text).unwrap();
        }
        root
    }

    #[test]
    fn the_table_gives_the_published_averages() {
        let mean = |tasks: &[f64]| tasks.iter().sum::<f64>() / tasks.len() as f64;
        let all: Vec<f64> = TASKS.iter().map(|task| task.convpass_top1).collect();
        let groups = [NATURAL, SPECIALIZED, STRUCTURED].map(|group| {
            let of_group = TASKS.iter().filter(|task| task.group == group);
            mean(&of_group.map(|task| task.convpass_top1).collect::<Vec<_>>())
        });
        assert!((mean(&all) - 74.44).abs() < 0.006);
        assert!((mean(&groups) - 76.56).abs() < 0.006);
        assert_eq!(task("kitti").unwrap().num_classes, 4);
        assert!(task("mnist").is_none());
    }

    #[test]
    fn classes_come_from_the_table_or_from_all_lists() {
        let lists = ["a 0\n", "b 1\n", "a 0\nb 1\n", "c 4\n"];
        let own = folder_of("own", lists);
        let folder = VtabFolder::open(own.path(), "own").unwrap();
        assert_eq!(folder.num_classes(), 5);
        for split in VtabSplit::ALL {
            assert_eq!(folder.split(split).num_classes(), 5);
            assert!(folder.split(split).file().ends_with(split.file_name()));
        }
        let eurosat = folder_of("eurosat", lists);
        assert_eq!(VtabFolder::open(eurosat.path(), "eurosat").unwrap().num_classes(), 10);
        let kitti = folder_of("kitti", lists);
        let refused = VtabFolder::open(kitti.path(), "kitti");
        assert!(matches!(refused, Err(Error::ListLine { line: 1, .. })), "{refused:?}");
    }

    #[test]
    fn a_list_is_replaced_by_one_of_the_same_classes() {
        let root = folder_of("own", ["a 0\n", "b 1\n", "a 0\nb 1\n", "c 4\n"]);
        let folder = VtabFolder::open(root.path(), "own").unwrap();
        let (both, test) = (folder.split(VtabSplit::Train800Val200).clone(), VtabSplit::Test);
        let other = folder.clone().with_split(test, both.clone()).unwrap();
        assert_eq!(other.split(test).split_hash(), both.split_hash());
        assert_eq!(
            other.split(VtabSplit::Val200).entries(),
            folder.split(VtabSplit::Val200).entries()
        );
        let file = root.path().join("own/train800.txt");
        let fewer = FileList::read(root.path(), file, None).unwrap();
        let refused = folder.with_split(test, fewer);
        assert!(matches!(refused, Err(Error::Config { .. })), "{refused:?}");
    }

    /// Returns the text of an error and of its source, as programs print them.
    fn told(error: Error) -> String {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    }

    #[test]
    fn a_folder_that_lacks_something_says_what() {
        let root = folder_of("own", ["a 0", "a 0", "a 0", "a 0"]);
        let absent = told(VtabFolder::open(root.path(), "other").unwrap_err());
        assert!(absent.contains("no such folder") && absent.contains("train800val200.txt"));
        std::fs::remove_file(root.path().join("own/val200.txt")).unwrap();
        let partial = told(VtabFolder::open(root.path(), "own").unwrap_err());
        assert!(partial.contains("lacks val200.txt;"), "{partial}");
    }
}
