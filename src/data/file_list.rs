//! The list format of VTAB-1k: one `relative/path label` on each line.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::files::{open_regular, write_atomically};

/// The longest accepted line. Without a limit, a file without line breaks would be read as one
/// line.
const MAX_LINE_BYTES: u64 = 64 << 10;
/// The largest number of classes that is inferred from the highest label. The head gets as many
/// rows, so a higher label is rejected as a mistake (ImageNet-21k has 21,841 classes).
const MAX_INFERRED_CLASSES: i64 = 1 << 16;

/// One image of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileEntry {
    /// The path as written in the list, relative to the root.
    pub path: String,
    /// The class, counted from 0.
    pub label: i64,
    /// The line in the list, counted from 1; 0 for an image that was found in a folder.
    pub line: usize,
}

/// A list of image files with their labels. The images are not opened. Clones share the entries.
#[derive(Debug, Clone)]
pub struct FileList {
    root: PathBuf,
    file: PathBuf,
    entries: Arc<[FileEntry]>,
    num_classes: i64,
    class_names: Arc<[String]>,
}

impl FileList {
    /// Reads the list `file`. Its paths are relative to `root`.
    ///
    /// The label is the last field of a line, separated by white space, so paths may contain
    /// spaces. Windows line endings, a byte order mark, blank lines and a missing last line break
    /// are accepted. If `num_classes` is `None`, the number of classes is the highest label plus 1.
    ///
    /// # Errors
    /// [`Error::Io`] if the list cannot be read; [`Error::ListLine`] if a line is not UTF-8, is too
    /// long, has no path or no label, or has a label outside `0..num_classes` (without
    /// `num_classes`: a label of 65,536 or more); [`Error::CorruptFile`] if the list contains no
    /// image; [`Error::Config`] if `num_classes` is below 1. A missing image is an error only when
    /// it is decoded.
    pub fn read(
        root: impl AsRef<Path>,
        file: impl AsRef<Path>,
        num_classes: Option<i64>,
    ) -> Result<Self> {
        let file = file.as_ref();
        if let Some(classes) = num_classes.filter(|&classes| classes < 1) {
            return Err(Error::config("num_classes", "1 or more", classes));
        }
        let reader = BufReader::new(open_regular(file)?);
        let classes = num_classes.unwrap_or(MAX_INFERRED_CLASSES);
        let entries = read_entries(reader, file, classes)?;
        let Some(highest) = entries.iter().map(|entry| entry.label).max() else {
            return Err(Error::corrupt(file, "the list contains no image"));
        };
        Ok(Self {
            root: root.as_ref().to_path_buf(),
            file: file.to_path_buf(),
            entries: entries.into(),
            num_classes: num_classes.unwrap_or(highest + 1),
            class_names: Arc::new([]),
        })
    }

    /// Creates the list of images that were found in the folders of their classes.
    pub(super) fn found(root: &Path, entries: Vec<FileEntry>, class_names: Vec<String>) -> Self {
        let num_classes = class_names.len() as i64;
        let (root, file) = (root.to_path_buf(), root.to_path_buf());
        Self { root, file, entries: entries.into(), num_classes, class_names: class_names.into() }
    }

    /// Returns this list with other entries of the same classes.
    pub(super) fn with_entries(&self, entries: Vec<FileEntry>) -> Self {
        Self { entries: entries.into(), ..self.clone() }
    }

    /// Writes the list to a file, one `path label` on each line. Read the file again with the same
    /// root. Class names are not saved. The file is written atomically.
    ///
    /// # Errors
    /// [`Error::Config`] if a path cannot be written as a line, for example because it ends with a
    /// space; [`Error::Io`] if the file cannot be written.
    pub fn save(&self, file: impl AsRef<Path>) -> Result<()> {
        let mut text = String::new();
        for FileEntry { path, label, .. } in self.entries() {
            let line = format!("{path} {label}\n");
            let read = parse_line(line.as_bytes(), 1, i64::MAX).ok().flatten();
            if line.matches('\n').count() > 1 || read.is_none_or(|read| read.path != *path) {
                return Err(Error::config("path", "readable from a list", format!("{path:?}")));
            }
            text += &line;
        }
        write_atomically(file.as_ref(), text.as_bytes())
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

    /// Returns the name of each class. The slice is empty unless the list comes from
    /// [`FileList::from_folders`] or [`FileList::from_folders_of`], or names were set with
    /// [`FileList::with_class_names`].
    pub fn class_names(&self) -> &[String] {
        &self.class_names
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

fn read_entries(mut reader: impl BufRead, file: &Path, num_classes: i64) -> Result<Vec<FileEntry>> {
    let mut entries = Vec::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let limit = MAX_LINE_BYTES + 1;
        let length = reader.by_ref().take(limit).read_until(b'\n', &mut bytes);
        let length = length.map_err(Error::io(file))? as u64;
        if length == 0 {
            break;
        }
        let parsed = if length > MAX_LINE_BYTES {
            Err(format!("the line is longer than {MAX_LINE_BYTES} bytes"))
        } else {
            parse_line(&bytes, line, num_classes)
        };
        entries.extend(parsed.map_err(|reason| Error::ListLine {
            file: file.to_path_buf(),
            line,
            reason,
        })?);
    }
    Ok(entries)
}

/// Parses one line; returns `None` for a blank line.
fn parse_line(bytes: &[u8], line: usize, num_classes: i64) -> Result<Option<FileEntry>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "not UTF-8".to_string())?;
    let text = if line == 1 { text.trim_start_matches('\u{feff}') } else { text }.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let (path, label) = text
        .rsplit_once(char::is_whitespace)
        .ok_or_else(|| format!("expected `path label`, found {text:?}"))?;
    let label: i64 = label
        .parse()
        .map_err(|_| format!("expected an integer label at the end, found {label:?}"))?;
    if !(0..num_classes).contains(&label) {
        return Err(format!("label {label} is not in 0..{num_classes}"));
    }
    Ok(Some(FileEntry { path: path.trim_end().to_string(), label, line }))
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
        assert_eq!(refusal(b"a.png 0\n\xff\xfe.png 1\n", None), (2, "not UTF-8".into()));
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
