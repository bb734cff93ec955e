//! The labels of a list: numbers or names of classes, and what is odd about them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use unicode_normalization::UnicodeNormalization;

use super::super::file_list::FileEntry;
use super::{Label, Row};
use crate::error::{Error, Result, list};

/// The largest number of classes that is inferred from the highest label. The head gets as many
/// rows, so a higher label is rejected as a mistake (ImageNet-21k has 21,841 classes).
const MAX_INFERRED_CLASSES: i64 = 1 << 16;
/// From this label on, labels must be dense to be believed: see [`MIN_DENSITY`].
const HIGH_LABEL: i64 = 1000;
/// At least one in so many labels must occur, if the highest one is above [`HIGH_LABEL`].
const MIN_DENSITY: i64 = 20;

/// What is known about the classes of a list before it is read.
#[derive(Clone, Copy, Debug)]
pub(in crate::data) enum Known<'a> {
    Nothing,
    /// The number of classes.
    Count(i64),
    /// The names of the classes.
    Names(&'a [String]),
}

/// The images of a list with their labels.
#[derive(Debug)]
pub(in crate::data) struct Labelled {
    pub(in crate::data) entries: Vec<FileEntry>,
    pub(in crate::data) num_classes: i64,
    /// Empty if the list names no classes.
    pub(in crate::data) class_names: Vec<String>,
    pub(in crate::data) warnings: Vec<String>,
}

/// Returns the images of the rows with their labels.
pub(in crate::data) fn label(rows: Vec<Row>, file: &Path, known: Known) -> Result<Labelled> {
    if rows.is_empty() {
        return Err(Error::corrupt(file, "the list contains no image"));
    }
    let refuse = |line: usize, reason: String| {
        Err(Error::ListLine { file: file.to_path_buf(), line, reason })
    };
    let labelled = match is_numbered(&rows, known) {
        Ok(true) => numbered(rows, known),
        Ok(false) => named(rows, known),
        Err(refused) => Err(refused),
    };
    let mut labelled = match labelled {
        Ok(labelled) => labelled,
        Err((line, reason)) => return refuse(line, reason),
    };
    if let Known::Count(count) = known
        && !labelled.class_names.is_empty()
        && labelled.class_names.len() as i64 != count
    {
        let (expected, found) =
            (format!("{count}, one name per class"), labelled.class_names.len());
        return Err(Error::config("class_names", expected, found));
    }
    labelled.warnings.extend(listed_twice(&labelled.entries));
    Ok(labelled)
}

/// Returns whether the labels are numbers. They are if each of them can be read as one, unless
/// each is one of the names that are known.
fn is_numbered(rows: &[Row], known: Known) -> Result<bool, (usize, String)> {
    let number = |row: &Row| match &row.label {
        Label::Number(_) | Label::Both(..) => true,
        Label::Text(text) => text.parse::<i64>().is_ok(),
    };
    if let Known::Names(names) = known {
        let names: BTreeSet<String> = names.iter().map(|name| composed(name)).collect();
        let is_name =
            |row: &Row| matches!(&row.label, Label::Text(t) if names.contains(&composed(t)));
        if rows.iter().all(is_name) {
            return Ok(false);
        }
    }
    let (Some(numbered), Some(named)) =
        (rows.iter().find(|row| number(row)), rows.iter().find(|row| !number(row)))
    else {
        return Ok(rows.iter().all(number));
    };
    let found = match &named.label {
        Label::Text(text) => text.clone(),
        _ => String::new(),
    };
    let reason =
        format!("the label {found:?} is a name, but that of line {} is a number", numbered.line);
    Err((named.line, reason))
}

fn numbered(rows: Vec<Row>, known: Known) -> Result<Labelled, (usize, String)> {
    let limit = match known {
        Known::Nothing => MAX_INFERRED_CLASSES,
        Known::Count(count) => count,
        Known::Names(names) => names.len() as i64,
    };
    let (mut entries, mut names) = (Vec::new(), BTreeMap::new());
    for Row { path, label, line, .. } in rows {
        let (label, name) = match label {
            Label::Number(number) => (number, None),
            Label::Both(number, name) => (number, Some(composed(&name))),
            // `is_numbered` has read it.
            Label::Text(text) => (text.parse().unwrap_or(-1), None),
        };
        if !(0..limit).contains(&label) {
            return Err((line, format!("label {label} is not in 0..{limit}")));
        }
        if let Some(name) = name {
            let before = names.entry(label).or_insert_with(|| name.clone());
            if *before != name {
                return Err((
                    line,
                    format!("label {label} is called {name:?} here and {before:?} before"),
                ));
            }
        }
        entries.push(FileEntry { path, label, line });
    }
    let highest = entries.iter().map(|entry| entry.label).max().unwrap_or(0);
    let mut warnings = Vec::new();
    if let Known::Nothing = known {
        check_density(&entries, highest)?;
        warnings.extend(unused(&entries, highest));
    }
    let num_classes = if let Known::Nothing = known { highest + 1 } else { limit };
    let class_names = match known {
        Known::Names(expected) => {
            check_names(&entries, &names, expected)?;
            expected.to_vec()
        }
        _ => of_labels(names, num_classes, &mut warnings),
    };
    Ok(Labelled { entries, num_classes, class_names, warnings })
}

/// Returns the names in the order of the labels, or none if a class has no name.
fn of_labels(
    names: BTreeMap<i64, String>,
    num_classes: i64,
    warnings: &mut Vec<String>,
) -> Vec<String> {
    if names.len() as i64 == num_classes {
        return names.into_values().collect();
    }
    if !names.is_empty() {
        let found = names.len();
        warnings.push(format!(
            "only {found} of {num_classes} classes have a name, so the names are not used"
        ));
    }
    Vec::new()
}

/// Checks that names beside labels are those that the labels are known to have.
fn check_names(
    entries: &[FileEntry],
    names: &BTreeMap<i64, String>,
    expected: &[String],
) -> Result<(), (usize, String)> {
    for entry in entries {
        let (name, known) = (names.get(&entry.label), composed(&expected[entry.label as usize]));
        if let Some(name) = name.filter(|name| **name != known) {
            let label = entry.label;
            return Err((
                entry.line,
                format!("label {label} is called {name:?}, expected {known:?}"),
            ));
        }
    }
    Ok(())
}

/// Checks that the highest label is not far above the number of different labels.
fn check_density(entries: &[FileEntry], highest: i64) -> Result<(), (usize, String)> {
    let different = entries.iter().map(|entry| entry.label).collect::<BTreeSet<_>>().len();
    if highest < HIGH_LABEL || different as i64 * MIN_DENSITY > highest {
        return Ok(());
    }
    let line = entries.iter().find(|entry| entry.label == highest).map_or(0, |entry| entry.line);
    Err((
        line,
        format!(
            "label {highest} is far above the number of different labels, {different}; classes are \
             numbered from 0 without large gaps"
        ),
    ))
}

/// Returns what is odd about the labels that do not occur.
fn unused(entries: &[FileEntry], highest: i64) -> Option<String> {
    let used: BTreeSet<i64> = entries.iter().map(|entry| entry.label).collect();
    let unused: Vec<String> =
        (0..=highest).filter(|label| !used.contains(label)).map(|l| l.to_string()).collect();
    let classes = highest + 1;
    if unused.is_empty() {
        return None;
    }
    Some(if unused == ["0"] {
        format!(
            "labels are from 1 to {highest}, but classes are numbered from 0: the model has \
             {classes} classes, and class 0 has no image"
        )
    } else {
        format!("of {classes} classes, {} have no image: {}", unused.len(), list(&unused))
    })
}

fn named(rows: Vec<Row>, known: Known) -> Result<Labelled, (usize, String)> {
    let name = |row: &Row| match &row.label {
        Label::Text(text) => composed(text),
        Label::Both(_, name) => composed(name),
        Label::Number(number) => number.to_string(),
    };
    let names: Vec<String> = match known {
        Known::Names(names) => names.to_vec(),
        _ => rows.iter().map(name).collect::<BTreeSet<_>>().into_iter().collect(),
    };
    let labels: HashMap<String, i64> = names.iter().map(|name| composed(name)).zip(0..).collect();
    let mut entries = Vec::new();
    for row in rows {
        let name = name(&row);
        let Some(&label) = labels.get(&name) else {
            return Err((row.line, format!("{name:?} is not one of the {} classes", names.len())));
        };
        entries.push(FileEntry { path: row.path, label, line: row.line });
    }
    let num_classes = names.len() as i64;
    Ok(Labelled { entries, num_classes, class_names: names, warnings: Vec::new() })
}

/// Returns a warning if the list names a path twice.
fn listed_twice(entries: &[FileEntry]) -> Option<String> {
    let mut seen: HashMap<&str, &FileEntry> = HashMap::new();
    let mut twice = Vec::new();
    for entry in entries {
        if let Some(first) = seen.insert(&entry.path, entry) {
            let labels = if first.label == entry.label {
                String::new()
            } else {
                format!(", with label {} and {}", first.label, entry.label)
            };
            twice.push(format!("{} (lines {} and {}{labels})", entry.path, first.line, entry.line));
        }
    }
    let count = twice.len();
    (count > 0).then(|| format!("{count} images are listed more than once: {}", list(&twice)))
}

/// Returns a name in the Unicode normalization form C. File systems and programs write one name in
/// several forms.
pub(in crate::data) fn composed(name: &str) -> String {
    name.nfc().collect()
}
