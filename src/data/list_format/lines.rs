//! The list format of VTAB-1k: one `path label` on each line.

use std::fmt::Write;

use super::super::file_list::FileList;
use super::{Label, Refused, Row};

/// The longest accepted line. A longer one is no path with a label.
const MAX_LINE_BYTES: usize = 64 << 10;

pub(super) fn rows(text: &str) -> Result<Vec<Row>, Refused> {
    let rows = text.split('\n').zip(1..).filter_map(|(text, line)| {
        let row = row(text.trim(), line).transpose()?;
        Some(row.map_err(|reason| (line, reason)))
    });
    rows.collect()
}

/// Returns the row of a line, or `None` if the line is blank.
fn row(text: &str, line: usize) -> Result<Option<Row>, String> {
    if text.len() > MAX_LINE_BYTES {
        return Err(format!("the line is longer than {MAX_LINE_BYTES} bytes"));
    }
    if text.is_empty() {
        return Ok(None);
    }
    let Some((path, label)) = text.rsplit_once(char::is_whitespace) else {
        let hint = if text.contains([',', ';']) {
            "; if the fields are separated by commas, let the name of the list end in .csv"
        } else {
            ""
        };
        return Err(format!("expected `path label`, found {text:?}{hint}"));
    };
    let path = path.trim_end();
    let Ok(number) = label.parse() else {
        let hint = if line == 1 { ", and so are header lines" } else { "" };
        return Err(format!(
            "expected an integer label at the end, found {label:?}; names of classes are read from \
             lists whose name ends in .csv, .tsv or .json{hint}"
        ));
    };
    let is_quoted = |quote| path.len() > 1 && path.starts_with(quote) && path.ends_with(quote);
    if is_quoted('"') || is_quoted('\'') {
        return Err(format!(
            "the path {path} is in quotes; leave them out, or let the name of a table end in .csv"
        ));
    }
    if path.ends_with(',') || path.ends_with(';') {
        return Err(format!(
            "expected `path label`, found {text:?}; if the fields are separated by commas, let the \
             name of the list end in .csv"
        ));
    }
    Ok(Some(Row { path: path.to_owned(), label: Label::Number(number), line, part: None }))
}

pub(super) fn written(list: &FileList) -> String {
    let mut text = String::new();
    for entry in list.entries() {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{} {}", entry.path, entry.label);
    }
    text
}
