//! Lists as tables: CSV and TSV.

use csv::{Position, ReaderBuilder, StringRecord, WriterBuilder};

use super::super::file_list::FileList;
use super::{Label, Refused, Row};

/// The names that the column of the paths may have.
pub(super) const PATH: &[&str] = &[
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "img",
];
/// The names that the column of the labels may have: numbers, or names if there is no other.
pub(super) const LABEL: &[&str] = &["label", "target", "label_id", "class_id", "class_index"];
/// The names that the column of the classes' names may have.
pub(super) const CLASS: &[&str] = &["class", "class_name", "label_name", "category", "name"];

/// The names that a column may have which says to which part an image belongs, such as `train`.
pub(super) const PART: &[&str] = &["split", "subset", "partition"];

/// The columns of a table.
struct Columns {
    path: usize,
    label: Option<usize>,
    class: Option<usize>,
    part: Option<usize>,
}

pub(super) fn rows(text: &str, separator: u8) -> Result<Vec<Row>, Refused> {
    let first = text.lines().next().unwrap_or_default();
    // Spreadsheets write semicolons where the comma is the decimal separator.
    let is_semicolon = separator == b',' && !first.contains(',') && first.contains(';');
    let separator = if is_semicolon { b';' } else { separator };
    let mut reader = ReaderBuilder::new();
    let reader = reader.delimiter(separator).has_headers(false).flexible(true);
    let mut records = Vec::new();
    for record in reader.from_reader(text.as_bytes()).into_records() {
        let record = record.map_err(|e| {
            let line = e.position().map_or(1, |position| position.line() as usize);
            (line, e.to_string())
        })?;
        let line = record.position().map_or(0, |position| line_of(text, position));
        if record.iter().any(|field| !field.trim().is_empty()) {
            records.push((line, record));
        }
    }
    let Some((_, first)) = records.first() else { return Ok(Vec::new()) };
    let (columns, has_header) = match header(first)? {
        Some(columns) => (columns, true),
        None => (Columns { path: 0, label: Some(1), class: None, part: None }, false),
    };
    if !has_header {
        check_headless(&records)?;
    }
    let records = records.iter().skip(usize::from(has_header));
    records.map(|(line, record)| row(record, &columns, *line).map_err(|r| (*line, r))).collect()
}

/// Returns the line of a record. Its position is that of the blank lines before it, if there are
/// any.
fn line_of(text: &str, position: &Position) -> usize {
    let rest = text.as_bytes().get(position.byte() as usize..).unwrap_or_default();
    let blank = rest.iter().take_while(|byte| matches!(byte, b'\r' | b'\n'));
    position.line() as usize + blank.filter(|&&byte| byte == b'\n').count()
}

/// Returns the fields of a record for a message.
fn fields(record: &StringRecord) -> String {
    record.iter().map(|field| format!("{field:?}")).collect::<Vec<_>>().join(", ")
}

/// Returns the columns that the first record names, or `None` if it names none of them.
fn header(first: &StringRecord) -> Result<Option<Columns>, Refused> {
    let find = |known: &[&str]| {
        let is_known = |name: &str| known.contains(&&*name.trim().to_ascii_lowercase());
        let mut found = first.iter().enumerate().filter(|(_, name)| is_known(name));
        match (found.next(), found.next()) {
            (Some((_, one)), Some((_, two))) => {
                Err((1, format!("the columns {one:?} and {two:?} have the same meaning; keep one")))
            }
            (found, _) => Ok(found.map(|(at, _)| at)),
        }
    };
    let (path, label, class, part) = (find(PATH)?, find(LABEL)?, find(CLASS)?, find(PART)?);
    match (path, label.or(class)) {
        (None, None) => Ok(None),
        (Some(path), Some(_)) => Ok(Some(Columns { path, label, class, part })),
        (missing, _) => {
            let missing = if missing.is_none() { "path" } else { "label" };
            Err((1, format!("the header {} names no column `{missing}`", fields(first))))
        }
    }
}

/// Checks that a table without a known header has the columns path and label, and that its first
/// record is not a header with other names.
fn check_headless(records: &[(usize, StringRecord)]) -> Result<(), Refused> {
    for (line, record) in records {
        if record.len() != 2 {
            return Err((
                *line,
                format!(
                    "expected a path and a label, found {} fields; with more columns, the first \
                     line must name the columns `path` and `label` or `class`",
                    record.len()
                ),
            ));
        }
    }
    if let [(line, first), (_, second), ..] = records {
        let is_file = |record: &StringRecord| record[0].contains(['.', '/']);
        let is_number = |record: &StringRecord| record[1].trim().parse::<i64>().is_ok();
        if is_file(second) && !is_file(first) || is_number(second) && !is_number(first) {
            return Err((
                *line,
                format!(
                    "{} seems to be a header; name its columns `path` and `label` or `class`",
                    fields(first)
                ),
            ));
        }
    }
    Ok(())
}

fn row(record: &StringRecord, columns: &Columns, line: usize) -> Result<Row, String> {
    let field = |at: usize, name: &str| {
        let field = record.get(at).filter(|field| !field.trim().is_empty());
        field.ok_or_else(|| format!("the field {name} is empty or missing in {}", fields(record)))
    };
    let path = field(columns.path, "path")?.to_owned();
    let label = match (columns.label, columns.class) {
        (Some(label), Some(class)) => {
            let (label, class) = (field(label, "label")?.trim(), field(class, "class")?.trim());
            let number = label.parse().map_err(|_| {
                format!("expected an integer label beside the class {class:?}, found {label:?}")
            })?;
            Label::Both(number, class.to_owned())
        }
        (Some(at), None) | (None, Some(at)) => Label::Text(field(at, "label")?.trim().to_owned()),
        (None, None) => return Err("there is no column `label`".to_owned()),
    };
    let part = columns.part.and_then(|at| record.get(at));
    Ok(Row { path, label, line, part: part.map(|part| part.trim().to_owned()) })
}

pub(super) fn written(list: &FileList, separator: u8) -> String {
    let mut table = WriterBuilder::new().delimiter(separator).from_writer(Vec::new());
    let names = list.class_names();
    let header: &[&str] =
        if names.is_empty() { &["path", "label"] } else { &["path", "label", "class"] };
    // Writing to memory does not fail, and `written` of the module reads the text again.
    let _ = table.write_record(header);
    for entry in list.entries() {
        let label = entry.label.to_string();
        let class = names.get(entry.label as usize).map(String::as_str);
        let _ = table.write_record([&*entry.path, &*label].into_iter().chain(class));
    }
    String::from_utf8(table.into_inner().unwrap_or_default()).unwrap_or_default()
}
