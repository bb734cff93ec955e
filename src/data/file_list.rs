//! Lists of images with their labels, read from a file or found in folders.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::list_format::{self, Known};
use crate::error::{Error, Result};
use crate::files::write_atomically;

/// One image of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileEntry {
    /// The path as written in the list, relative to the root.
    pub path: String,
    /// The class, counted from 0.
    pub label: i64,
    /// The line in the list, or the number of the entry in a JSON file, counted from 1; 0 for an
    /// image that was found in a folder.
    pub line: usize,
}

/// A file of a folder of images that is not in its list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeftOut {
    /// The path of the file.
    pub path: PathBuf,
    /// Why it is left out.
    pub reason: String,
}

/// A list of image files with their labels. The images are not opened. Clones share the entries.
#[derive(Debug, Clone)]
pub struct FileList {
    root: PathBuf,
    file: PathBuf,
    entries: Arc<[FileEntry]>,
    num_classes: i64,
    class_names: Arc<[String]>,
    warnings: Arc<[String]>,
    left_out: Arc<[LeftOut]>,
}

impl FileList {
    /// Reads the list `file`. Its paths are relative to `root`.
    ///
    /// The extension of the file tells the format:
    ///
    /// | extension | format |
    /// |---|---|
    /// | `csv`, `tsv` | a table with the columns `path` and `label` or `class`, named by its first line; without such a line the two columns are path and label |
    /// | `json` | an array of objects with the members `path` and `label` or `class`, or one object from paths to labels |
    /// | `jsonl`, `ndjson` | such an object on each line |
    /// | any other | a path, white space and a label on each line, as in VTAB-1k |
    ///
    /// Text is UTF-8, or UTF-16 with a byte order mark. Windows line endings and blank lines are
    /// accepted. A label is a number from 0, or, in a table or JSON, the name of a class: then the
    /// classes are the names, sorted. If `num_classes` is `None` and labels are numbers, the number
    /// of classes is the highest label plus 1. What is odd about the labels is in
    /// [`FileList::warnings`].
    ///
    /// # Errors
    /// [`Error::Io`] if the list cannot be read; [`Error::NotAFile`] if it is a pipe or a device;
    /// [`Error::ListLine`] if a line is not UTF-8, is too long, has no path or no label, has a path
    /// in quotes or with backslashes, has a label outside `0..num_classes` (without `num_classes`:
    /// a label of 65,536 or more, or one of 1,000 or more that is 20 times the number of different
    /// labels), if some labels are names and others numbers, or if a column `split`, `subset` or
    /// `partition` says that images belong to several parts; [`Error::CorruptFile`] if the list
    /// contains no image or is not text; [`Error::UnknownFormat`] if it is a workbook of a
    /// spreadsheet; [`Error::Config`] if `num_classes` is below 1 or not the number of names. A
    /// missing image is an error only when it is decoded; [`Survey`](super::Survey) looks for it.
    pub fn read(
        root: impl AsRef<Path>,
        file: impl AsRef<Path>,
        num_classes: Option<i64>,
    ) -> Result<Self> {
        if let Some(classes) = num_classes.filter(|&classes| classes < 1) {
            return Err(Error::config("num_classes", "1 or more", classes));
        }
        let known = num_classes.map_or(Known::Nothing, Known::Count);
        Self::read_known(root.as_ref(), file.as_ref(), known)
    }

    /// Reads a list like [`FileList::read`] whose classes are those of another one: a label is a
    /// name in `class_names` or its position there. If all labels can be read as names, they are
    /// names.
    ///
    /// # Errors
    /// The errors of [`FileList::read`]; [`Error::ListLine`] if a label is not in `class_names`, or
    /// if the list has both and they contradict each other.
    pub fn read_of(
        root: impl AsRef<Path>,
        file: impl AsRef<Path>,
        class_names: &[String],
    ) -> Result<Self> {
        Self::read_known(root.as_ref(), file.as_ref(), Known::Names(class_names))
    }

    fn read_known(root: &Path, file: &Path, known: Known) -> Result<Self> {
        let labelled = list_format::read(file, known)?;
        Ok(Self {
            root: root.to_path_buf(),
            file: file.to_path_buf(),
            entries: labelled.entries.into(),
            num_classes: labelled.num_classes,
            class_names: labelled.class_names.into(),
            warnings: labelled.warnings.into(),
            left_out: Arc::new([]),
        })
    }

    /// Creates the list of images that were found in the folders of their classes.
    pub(super) fn found(
        root: &Path,
        entries: Vec<FileEntry>,
        class_names: Vec<String>,
        left_out: Vec<LeftOut>,
        warnings: Vec<String>,
    ) -> Self {
        Self {
            root: root.to_path_buf(),
            file: root.to_path_buf(),
            entries: entries.into(),
            num_classes: class_names.len() as i64,
            class_names: class_names.into(),
            warnings: warnings.into(),
            left_out: left_out.into(),
        }
    }

    /// Returns this list with other entries of the same classes. What is odd about the whole list
    /// is not told of a part of it.
    pub(super) fn with_entries(&self, entries: Vec<FileEntry>) -> Self {
        let (warnings, left_out) = (Arc::new([]), Arc::new([]));
        Self { entries: entries.into(), warnings, left_out, ..self.clone() }
    }

    /// Returns the images of this list, then those of `other`.
    ///
    /// # Errors
    /// [`Error::Config`] if the lists have different roots or numbers of classes.
    pub fn joined(&self, other: &Self) -> Result<Self> {
        if other.root != self.root || other.num_classes != self.num_classes {
            let describe =
                |list: &Self| format!("{} classes in {}", list.num_classes, list.root.display());
            return Err(Error::config("other", describe(self), describe(other)));
        }
        let is_one_file = self.file == other.file;
        let entries = self.entries().iter().chain(other.entries()).map(|entry| {
            // The line is that of a list; a joined one of two files is in neither.
            FileEntry { line: if is_one_file { entry.line } else { 0 }, ..entry.clone() }
        });
        Ok(self.with_entries(entries.collect()))
    }

    /// Returns this list of the folder `root/inside` with paths relative to `root`.
    pub(super) fn seen_from(self, root: &Path, inside: &str) -> Self {
        let moved = |entry: &FileEntry| {
            let path = format!("{inside}/{}", entry.path);
            FileEntry { path, ..entry.clone() }
        };
        let entries = self.entries.iter().map(moved).collect();
        Self { entries, root: root.to_path_buf(), ..self }
    }

    /// Writes the list to a file in the format that its extension tells, as for
    /// [`FileList::read`]. Read the file again with the same root. Tables and JSON keep the names
    /// of the classes; lines of `path label` do not. The file is written atomically.
    ///
    /// # Errors
    /// [`Error::Config`] if a path or the name of a class cannot be read again from such a file, for
    /// example because it ends with a space; [`Error::Io`] if the file cannot be written.
    pub fn save(&self, file: impl AsRef<Path>) -> Result<()> {
        let file = file.as_ref();
        write_atomically(file, &list_format::written(self, file)?)
    }

    /// Returns the folder that the paths are relative to.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the path of the list file, or the folder that was searched for images.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Returns the images in the order of the list.
    pub fn entries(&self) -> &[FileEntry] {
        &self.entries
    }

    /// Returns the number of classes; every label is below it.
    pub fn num_classes(&self) -> i64 {
        self.num_classes
    }

    /// Returns the name of each class in the order of the labels. The slice is empty unless the list
    /// comes from folders or names its classes, or names were set with
    /// [`FileList::with_class_names`].
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// Returns what is odd about the list, a sentence for each: labels that do not occur, images
    /// that are listed twice, folders whose names differ in case alone. Nothing in it is wrong for
    /// certain.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns the files that were found in the folders of images and are not in the list, because
    /// they are no images. Hidden files are not among them.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// Returns the name of a class, or its label as text if the classes have no names.
    pub fn class_name(&self, label: i64) -> String {
        let name = usize::try_from(label).ok().and_then(|label| self.class_names.get(label));
        name.map_or_else(|| label.to_string(), String::clone)
    }

    /// Returns the number of images of each class, in the order of the labels.
    pub fn class_counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.num_classes as usize];
        for entry in self.entries() {
            counts[entry.label as usize] += 1;
        }
        counts
    }

    /// Sets the names of the classes.
    ///
    /// # Errors
    /// [`Error::Config`] if the number of names is not the number of classes.
    pub fn with_class_names(self, names: Vec<String>) -> Result<Self> {
        if names.len() as i64 != self.num_classes {
            let expected = format!("{} names, one per class", self.num_classes);
            return Err(Error::config("class_names", expected, names.len()));
        }
        Ok(Self { class_names: names.into(), ..self })
    }

    /// Returns the SHA-256 hash, in hex, of the relative paths and labels in their order. It does
    /// not depend on the location of the data.
    pub fn split_hash(&self) -> String {
        let mut hash = Sha256::new();
        for entry in self.entries() {
            // Each entry is hashed as `path \0 label \n`. A path cannot contain \0.
            hash.update(&entry.path);
            hash.update([0]);
            hash.update(entry.label.to_string());
            hash.update(b"\n");
        }
        format!("{:x}", hash.finalize())
    }

    /// Sets the number of classes, which the lists of one folder share.
    pub(super) fn set_num_classes(&mut self, num_classes: i64) {
        self.num_classes = num_classes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8], num_classes: Option<i64>) -> Result<FileList> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("list.txt");
        std::fs::write(&file, content).unwrap();
        FileList::read(folder.path(), &file, num_classes)
    }

    /// Returns the line and the reason of the `ListLine` error that `content` causes.
    fn refusal(content: &[u8], num_classes: Option<i64>) -> (usize, String) {
        match read(content, num_classes) {
            Err(Error::ListLine { line, reason, .. }) => (line, reason),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn reads_the_format_and_its_variants() {
        let text = "\u{feff}images/a b.png 3\r\n\r\n  \n../c.jpg\t 0\nd\u{e9}.png   12";
        let list = read(text.as_bytes(), None).unwrap();
        let found: Vec<_> =
            list.entries().iter().map(|e| (e.path.as_str(), e.label, e.line)).collect();
        assert_eq!(found, [("images/a b.png", 3, 1), ("../c.jpg", 0, 4), ("d\u{e9}.png", 12, 5)]);
        assert_eq!(list.num_classes(), 13);
        assert_eq!(read(text.as_bytes(), Some(20)).unwrap().num_classes(), 20);
    }

    #[test]
    fn a_bad_line_is_named() {
        assert_eq!(refusal(b"a.png 0\nb.png\n", None).0, 2);
        assert_eq!(refusal(b"a.png 0\n\nb.png one\n", None).0, 3);
        assert_eq!(refusal(b"a.png 1.0\n", None).0, 1);
        assert_eq!(
            refusal(b"a.png 0\n\xff\xfe.png 1\n", None),
            (2, "not UTF-8; save the list as UTF-8".into())
        );
        assert_eq!(refusal(b"7\n", None).0, 1);
        let long = [b"a.png 0\n".as_slice(), &vec![b'x'; 1 << 20]].concat();
        assert_eq!(refusal(&long, None).0, 2);
    }

    #[test]
    fn a_label_out_of_range_is_named() {
        let (line, reason) = refusal(b"a.png 0\nb.png 10\n", Some(10));
        assert_eq!((line, reason.as_str()), (2, "label 10 is not in 0..10"));
        assert_eq!(refusal(b"a.png -1\n", Some(10)).0, 1);
        assert_eq!(refusal(b"a.png -1\n", None).0, 1);
        assert_eq!(refusal(b"a.png 9223372036854775807\n", None).0, 1);
        assert_eq!(refusal(b"a.png 99999999999999999999\n", None).0, 1);
    }

    #[test]
    fn an_empty_list_a_missing_one_and_no_classes_are_errors() {
        assert!(matches!(read(b"", None), Err(Error::CorruptFile { .. })));
        assert!(matches!(read(b"\n \r\n", Some(3)), Err(Error::CorruptFile { .. })));
        assert!(matches!(read(b"a.png 0\n", Some(0)), Err(Error::Config { .. })));
        let missing = FileList::read("/", "/no/such/list.txt", None);
        assert!(matches!(missing, Err(Error::Io { .. })));
    }

    #[test]
    fn a_list_survives_being_saved() {
        let list = read(b"a b/c.png 3\n../d.png 0\n", Some(5)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("saved.txt");
        list.save(&file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "a b/c.png 3\n../d.png 0\n");
        let again = FileList::read(list.root(), &file, Some(5)).unwrap();
        assert_eq!(again.entries(), list.entries());
        for path in ["", " ", " a.png", "a.png ", "a\nb.png", "a\r\n 1\nb", "\u{feff}a.png"] {
            let entry = FileEntry { path: path.into(), label: 0, line: 0 };
            let refused = list.with_entries(vec![entry]).save(&file);
            assert!(matches!(refused, Err(Error::Config { .. })), "{path:?}");
        }
        assert!(matches!(list.save("/no/such/folder/list.txt"), Err(Error::Io { .. })));
    }

    #[test]
    fn there_is_a_name_for_each_class_or_for_none() {
        let list = read(b"a.png 1\n", None).unwrap();
        assert!(list.class_names().is_empty());
        let names = |count| (0..count).map(|i| format!("class {i}")).collect();
        let named = list.clone().with_class_names(names(2)).unwrap();
        assert_eq!(named.class_names()[1], "class 1");
        for count in [0, 1, 3] {
            let refused = list.clone().with_class_names(names(count));
            assert!(matches!(refused, Err(Error::Config { .. })), "{count}");
        }
    }

    #[test]
    fn a_hundred_thousand_lines() {
        let text: String = (0..100_000).map(|i| format!("images/{i}.png {}\n", i % 7)).collect();
        let list = read(text.as_bytes(), None).unwrap();
        assert_eq!((list.entries().len(), list.num_classes()), (100_000, 7));
        assert_eq!(list.entries()[99_999].line, 100_000);
    }
}
