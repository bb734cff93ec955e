//! The formats of lists of images: lines, tables and JSON.

mod json;
mod labels;
mod lines;
mod table;

use std::io::Read;
use std::path::Path;

pub(super) use labels::{Known, composed};
use labels::{Labelled, label};

use super::file_list::{FileEntry, FileList};
use crate::error::{Error, Result};
use crate::files::open_regular;

/// One image of a list, before the classes are known.
#[derive(Debug, PartialEq)]
struct Row {
    path: String,
    label: Label,
    /// The line in the file, or the number of the entry in a JSON file, from 1.
    line: usize,
    /// The part that the image belongs to, such as `train`, if a column says it.
    part: Option<String>,
}

/// What a list says about the class of an image.
#[derive(Debug, PartialEq)]
enum Label {
    Number(i64),
    /// A number or a name, which the other rows decide.
    Text(String),
    /// A number with its name, from two columns.
    Both(i64, String),
}

/// The format of a list, which the extension of its file tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum ListFormat {
    /// `path label` on each line.
    Lines,
    /// A table whose fields are separated by this byte.
    Table(u8),
    Json,
    /// A JSON object on each line.
    JsonLines,
}

impl ListFormat {
    pub(super) fn of(file: &Path) -> Self {
        let extension = file.extension().unwrap_or_default().to_string_lossy();
        match &*extension.to_ascii_lowercase() {
            "csv" => Self::Table(b','),
            "tsv" => Self::Table(b'\t'),
            "json" => Self::Json,
            "jsonl" | "ndjson" => Self::JsonLines,
            _ => Self::Lines,
        }
    }
}

/// Reads the list `file`.
pub(super) fn read(file: &Path, known: Known) -> Result<Labelled> {
    let mut bytes = Vec::new();
    open_regular(file)?.read_to_end(&mut bytes).map_err(Error::io(file))?;
    label(rows(file, &text(file, bytes)?)?, file, known)
}

fn rows(file: &Path, text: &str) -> Result<Vec<Row>> {
    let rows = match ListFormat::of(file) {
        ListFormat::Lines => lines::rows(text),
        ListFormat::Table(separator) => table::rows(text, separator),
        ListFormat::Json => json::rows(text),
        ListFormat::JsonLines => json::rows_of_lines(text),
    };
    let rows = rows.and_then(|rows| {
        let bad = rows.iter().find_map(|row| Some((row.line, refusal(&row.path)?)));
        bad.or_else(|| several_parts(&rows)).map_or(Ok(rows), Err)
    });
    let file = file.to_path_buf();
    rows.map_err(|(line, reason)| Error::ListLine { file, line, reason })
}

/// Returns the line and the reason if the list has images of several parts. To read them as one list
/// would train on test images.
fn several_parts(rows: &[Row]) -> Option<Refused> {
    let first = rows.first()?.part.as_ref();
    let other = rows.iter().find(|row| row.part.as_ref() != first)?;
    let [first, part] = [first, other.part.as_ref()].map(|part| part.map_or("", |part| part));
    let reason = format!(
        "a column says that images belong to several parts, {first:?} and {part:?}; save each part \
         as a list of its own, train.csv, val.csv and test.csv in one folder, or remove the column"
    );
    Some((other.line, reason))
}

/// Returns why `path` cannot be the path of an image in a list, if it cannot.
fn refusal(path: &str) -> Option<String> {
    if path.trim().is_empty() {
        return Some("the path is empty".to_owned());
    }
    if path.contains(['\0', '\r', '\n']) {
        return Some(format!("the path {path:?} contains a line break or a zero byte"));
    }
    if !cfg!(windows) && path.contains('\\') {
        return Some(format!("the path {path:?} has backslashes; write / between folders"));
    }
    None
}

/// Returns the text of a list in UTF-8, or in UTF-16 with a byte order mark.
fn text(file: &Path, bytes: Vec<u8>) -> Result<String> {
    let unit = |read: fn([u8; 2]) -> u16| {
        let (pairs, rest) = bytes[2..].as_chunks::<2>();
        let units: Vec<u16> = pairs.iter().copied().map(read).collect();
        let text = String::from_utf16(&units).ok().filter(|_| rest.is_empty());
        text.ok_or_else(|| Error::corrupt(file, "it is not valid UTF-16; save it as UTF-8"))
    };
    match &*bytes {
        [0xFF, 0xFE, ..] => return unit(u16::from_le_bytes),
        [0xFE, 0xFF, ..] => return unit(u16::from_be_bytes),
        [b'P', b'K', 3, 4, ..] => {
            let reason = "it is a zip archive, as a workbook of Excel is; export the table as CSV";
            return Err(Error::UnknownFormat { file: file.to_path_buf(), reason: reason.into() });
        }
        bytes if bytes.contains(&0) && ::image::guess_format(bytes).is_ok() => {
            let reason = "it is an image; give the folder of the images, or a list of them";
            return Err(Error::UnknownFormat { file: file.to_path_buf(), reason: reason.into() });
        }
        bytes if bytes.iter().take(64).any(|&byte| byte == 0) => {
            let reason = "it has zero bytes, as UTF-16 without a byte order mark; save it as UTF-8";
            return Err(Error::corrupt(file, reason));
        }
        _ => {}
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = valid.iter().filter(|&&byte| byte == b'\n').count() + 1;
        let reason = "not UTF-8; save the list as UTF-8".to_owned();
        Error::ListLine { file: file.to_path_buf(), line, reason }
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(text) => text.to_owned(),
        None => text,
    })
}

/// Returns the content of `file` with the images of `list`, in the format that its extension tells.
///
/// # Errors
/// [`Error::Config`] if reading the content again would not give the same paths, labels and names of
/// classes.
pub(super) fn written(list: &FileList, file: &Path) -> Result<Vec<u8>> {
    let text = match ListFormat::of(file) {
        ListFormat::Lines => lines::written(list),
        ListFormat::Table(separator) => table::written(list, separator),
        ListFormat::Json => json::written(list),
        ListFormat::JsonLines => json::written_as_lines(list),
    };
    let again = self::text(file, text.clone().into_bytes()).and_then(|text| rows(file, &text));
    let again = again.unwrap_or_default();
    let is_same = |(entry, row): (&FileEntry, &Row)| {
        entry.path == row.path
            && match &row.label {
                Label::Number(label) | Label::Both(label, _) => *label == entry.label,
                Label::Text(label) => label.parse() == Ok(entry.label),
            }
    };
    let same = list.entries().iter().zip(&again).take_while(|&pair| is_same(pair)).count();
    if same < list.entries().len() || again.len() != same {
        let path = list.entries().get(same).map_or("", |entry| &entry.path);
        return Err(Error::config("path", "readable from a list", format!("{path:?}")));
    }
    let is_renamed = |row: &&Row| match &row.label {
        Label::Both(label, name) => *name != list.class_name(*label),
        _ => false,
    };
    match again.iter().find(is_renamed) {
        Some(Row { label: Label::Both(label, _), .. }) => {
            let name = format!("{:?}", list.class_name(*label));
            Err(Error::config("class_names", "names that are readable from a list", name))
        }
        _ => Ok(text.into_bytes()),
    }
}

/// The line of a list that cannot be used, and why.
type Refused = (usize, String);

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(name: &str, content: &[u8], known: Known) -> Result<Labelled> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(name);
        std::fs::write(&file, content).unwrap();
        read(&file, known)
    }

    /// The images of a list, and the names of its classes.
    fn images(name: &str, content: &str) -> (Vec<(String, i64, usize)>, Vec<String>) {
        let list = read_as(name, content.as_bytes(), Known::Nothing).unwrap();
        let entries = list.entries.into_iter().map(|e| (e.path, e.label, e.line)).collect();
        (entries, list.class_names)
    }

    fn refusal(name: &str, content: &str) -> (usize, String) {
        match read_as(name, content.as_bytes(), Known::Nothing) {
            Err(Error::ListLine { line, reason, .. }) => (line, reason),
            other => panic!("{name}, {content:?}: {other:?}"),
        }
    }

    /// A table is read without the spaces around a name.
    #[test]
    fn a_name_that_a_table_cannot_keep_is_refused() {
        let list = read_as("l.json", br#"{"a.png": "cat ", "b.png": "dog"}"#, Known::Nothing);
        let labelled = list.unwrap();
        let names = labelled.class_names.clone();
        let list = FileList::found(Path::new(""), labelled.entries, names, vec![], vec![]);
        let folder = tempfile::tempdir().unwrap();
        for name in ["l.csv", "l.tsv"] {
            let error = list.save(folder.path().join(name)).unwrap_err();
            assert!(error.to_string().contains("\"cat \""), "{error}");
        }
        let json = folder.path().join("l.json");
        list.save(&json).unwrap();
        let again = FileList::read_of("", &json, list.class_names()).unwrap();
        assert_eq!(again.class_counts(), list.class_counts());
    }

    #[test]
    fn a_table_has_names_or_numbers() {
        let names = ["cat".to_owned(), "dog, small".to_owned()];
        let expected = vec![("a, b.png".to_owned(), 1, 2), ("c.png".to_owned(), 0, 4)];
        for (name, content) in [
            ("l.csv", "path,label\n\"a, b.png\",\"dog, small\"\n\nc.png,cat\n"),
            ("l.csv", "\u{feff}Class;Image\r\ndog, small;a, b.png\r\n\r\ncat;c.png\r\n"),
            ("l.TSV", "id\tfilename\tcategory\n7\ta, b.png\tdog, small\n\n8\tc.png\tcat\n"),
            ("l.csv", "path,label,class\n\"a, b.png\",1,\"dog, small\"\n\nc.png,0,cat"),
        ] {
            assert_eq!(images(name, content), (expected.clone(), names.to_vec()), "{content:?}");
        }
        let (entries, names) = images("l.csv", "x/a.png,3\nx/b.png, 0\n");
        assert_eq!((entries[1].1, entries[0].1, names.len()), (0, 3, 0));
    }

    #[test]
    fn json_has_an_array_an_object_or_lines() {
        let expected = vec![("a.png".to_owned(), 1, 1), ("b.png".to_owned(), 0, 2)];
        let names = ["cat".to_owned(), "dog".to_owned()];
        for (name, content) in [
            ("l.json", r#"[{"path": "a.png", "label": "dog"}, {"path": "b.png", "label": "cat"}]"#),
            ("l.json", r#"{"a.png": "dog", "b.png": "cat"}"#),
            (
                "l.jsonl",
                "{\"image\": \"a.png\", \"class\": \"dog\"}\n{\"file\": \"b.png\", \"label\": \"cat\"}",
            ),
        ] {
            assert_eq!(images(name, content), (expected.clone(), names.to_vec()), "{content}");
        }
        assert_eq!(refusal("l.json", "[{\"path\": \"a.png\"}]").0, 1);
        assert_eq!(refusal("l.json", "[\n{\"path\": \"a.png\",\n}]").0, 3);
        assert_eq!(refusal("l.jsonl", "{\"path\": \"a.png\", \"label\": 0}\nx\n").0, 2);
        assert!(refusal("l.json", "{\"a.png\": 1.5}").1.contains("integer label or a name"));
    }

    #[test]
    fn utf_16_is_read_and_other_text_is_refused_with_a_hint() {
        let text = "path,label\ncafé/a.png,café\nb.png,x\n";
        for order in [u16::to_le_bytes, u16::to_be_bytes] {
            let units = [0xFEFF].into_iter().chain(text.encode_utf16());
            let bytes: Vec<u8> = units.flat_map(order).collect();
            let list = read_as("l.csv", &bytes, Known::Nothing).unwrap();
            assert_eq!((&*list.entries[0].path, &*list.class_names[0]), ("café/a.png", "café"));
            assert!(matches!(
                read_as("l.csv", &bytes[..bytes.len() - 1], Known::Nothing),
                Err(Error::CorruptFile { .. })
            ));
        }
        let unmarked: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let error = read_as("l.csv", &unmarked, Known::Nothing).unwrap_err().to_string();
        assert!(error.contains("UTF-16 without a byte order mark"), "{error}");
        for other in [b"PK\x03\x04...".as_slice(), b"\xFF\xD8\xFF\xE0\0\x10JFIF\0"] {
            let error = read_as("l.csv", other, Known::Nothing).unwrap_err();
            assert!(matches!(error, Error::UnknownFormat { .. }), "{error}");
        }
    }

    #[test]
    fn what_people_write_by_mistake_is_refused_with_a_hint() {
        for (name, content, line, hint) in [
            ("l.txt", "images/0.png,9\nimages/1.png,0\n", 1, "end in .csv"),
            ("l.txt", "images/0.png, 9\n", 1, "end in .csv"),
            ("l.txt", "a.png 0\n\"b c.png\" 9\n", 2, "in quotes"),
            ("l.txt", "a.png 0\rb.png 1\r", 1, "line break"),
            ("l.txt", "path label\na.png 0\n", 1, "header lines"),
            ("l.txt", "a.png 0\nb.png cat\n", 2, "names of classes are read from"),
            ("l.csv", "a.png,0\nb.png,cat\n", 2, "is a name, but that of line 1 is a number"),
            ("l.csv", "a.png,0,x\n", 1, "found 3 fields"),
            ("l.csv", "path,species\na.png,cat\n", 1, "names no column `label`"),
            ("l.csv", "photo,species\na.png,cat\n", 1, "seems to be a header"),
            ("l.csv", "a file,kind\nb.png,0\n", 1, "seems to be a header"),
            ("l.csv", "path,file,label\na,b,0\n", 1, "same meaning"),
            ("l.csv", "path,label\na.png,\n", 2, "is empty"),
            ("l.csv", "path,label,class\na.png,0,cat\nb.png,0,dog\n", 3, "called \"dog\" here"),
            ("l.csv", "path,label,split\na,0,train\nb,1,train\nc,0,test\n", 4, "\"test\""),
            ("l.csv", "path,label,Subset\na,0,train\nb,1\n", 3, "save each part"),
            (
                "l.jsonl",
                "{\"path\":\"a\",\"label\":0,\"split\":\"val\"}\n{\"path\":\"b\",\"label\":1}",
                2,
                "\"val\"",
            ),
        ] {
            let (found, reason) = refusal(name, content);
            assert!(found == line && reason.contains(hint), "{content:?}: {found}: {reason}");
        }
        #[cfg(not(windows))]
        assert!(refusal("l.csv", "path,label\nx\\a.png,0\n").1.contains("backslashes"));
    }

    #[test]
    fn a_column_with_one_part_changes_nothing() {
        let list = read_as("l.csv", b"path,label,split\na,0,test\nb,1,test\n", Known::Nothing);
        assert_eq!(list.unwrap().entries.len(), 2);
    }

    #[test]
    fn odd_labels_are_told_or_refused() {
        let warnings = |content: &str, known| {
            read_as("l.txt", content.as_bytes(), known).unwrap().warnings.join("; ")
        };
        let none = Known::Nothing;
        assert_eq!(warnings("a 0\nb 1\n", none), "");
        assert!(
            warnings("a 1\nb 2\nc 3\n", none).contains("from 1 to 3, but classes are numbered")
        );
        assert!(warnings("a 0\nb 4\n", none).contains("of 5 classes, 3 have no image: 1, 2, 3"));
        assert_eq!(warnings("a 1\nb 2\n", Known::Count(3)), "");
        assert!(
            warnings("a 0\nb 1\na 1\n", none).contains("a (lines 1 and 3, with label 0 and 1)")
        );
        let (line, reason) = refusal("l.txt", "a 0\nb 65000\nc 1\n");
        assert!(line == 2 && reason.contains("far above the number of different labels, 3"));
        assert_eq!(refusal("l.txt", "a 0\nb 65536\n").0, 2);
        let sparse: String = (0..60).map(|i| format!("{i}.png {}\n", i * 19)).collect();
        assert_eq!(read_as("l.txt", sparse.as_bytes(), none).unwrap().num_classes, 59 * 19 + 1);
    }

    #[test]
    fn known_classes_decide_what_a_label_means() {
        let names = ["1", "10", "2", "café"].map(str::to_owned);
        let labels = |content: &str| {
            let list = read_as("l.csv", content.as_bytes(), Known::Names(&names))?;
            assert_eq!(list.class_names, names);
            Ok(list.entries.iter().map(|entry| entry.label).collect::<Vec<_>>())
        };
        assert_eq!(labels("a.png,10\nb.png,2\n").unwrap(), [1, 2]);
        assert_eq!(labels("a.png,0\nb.png,3\n").unwrap(), [0, 3]);
        assert_eq!(labels("a.png,cafe\u{301}\n").unwrap(), [3]);
        assert_eq!(labels("path,label,class\na.png,1,10\n").unwrap(), [1]);
        for wrong in ["a.png,4\n", "a.png,dog\n", "path,label,class\na.png,1,2\n"] {
            assert!(matches!(labels(wrong), Err(Error::ListLine { .. })), "{wrong}");
        }
        let refused = read_as("l.csv", b"a.png,x\nb.png,y\n", Known::Count(3));
        assert!(matches!(refused, Err(Error::Config { .. })));
    }

    #[test]
    fn every_format_survives_being_saved() {
        let folder = tempfile::tempdir().unwrap();
        let content = "path,label,class\n\"a, \"\"b\"\"\",1,dog\nc d/é.png,0,\"cat; or\tsuch\"\n";
        std::fs::write(folder.path().join("l.csv"), content).unwrap();
        let list = FileList::read("", folder.path().join("l.csv"), None).unwrap();
        for name in ["s.csv", "s.tsv", "s.json", "s.jsonl", "s.txt"] {
            let file = folder.path().join(name);
            list.save(&file).unwrap();
            let again = FileList::read("", &file, None).unwrap();
            assert_eq!(again.split_hash(), list.split_hash(), "{name}");
            let kept = if name == "s.txt" { &[] } else { list.class_names() };
            assert_eq!(again.class_names(), kept, "{name}");
        }
    }
}
