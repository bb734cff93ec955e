//! Lists as JSON: an array of objects, an object from paths to labels, or an object on each line.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Value, json};

use super::super::file_list::{FileEntry, FileList};
use super::table::{CLASS, LABEL, PART, PATH};
use super::{Label, Refused, Row};

/// The members of an object in their order. A name may occur twice, which must be noticed.
struct Members(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

pub(super) fn rows(text: &str) -> Result<Vec<Row>, Refused> {
    let syntax = |e: serde_json::Error| (e.line().max(1), e.to_string());
    if text.trim_start().starts_with('[') {
        let objects: Vec<Value> = serde_json::from_str(text).map_err(syntax)?;
        let rows = objects.iter().zip(1..).map(|(object, at)| {
            row(object, at).map_err(|reason| (at, format!("entry {at}: {reason}")))
        });
        return rows.collect();
    }
    let Members(members) = serde_json::from_str(text).map_err(syntax)?;
    let rows = members.into_iter().zip(1..).map(|((path, value), line)| {
        let label = label(&value).map_err(|reason| (line, format!("{path:?}: {reason}")))?;
        Ok(Row { path, label, line, part: None })
    });
    rows.collect()
}

pub(super) fn rows_of_lines(text: &str) -> Result<Vec<Row>, Refused> {
    let lines = text.split('\n').zip(1..).filter(|(text, _)| !text.trim().is_empty());
    let rows = lines.map(|(text, line)| {
        let object = serde_json::from_str(text).map_err(|e| (line, e.to_string()))?;
        row(&object, line).map_err(|reason| (line, reason))
    });
    rows.collect()
}

fn row(object: &Value, line: usize) -> Result<Row, String> {
    let find = |known: &[&str]| known.iter().find_map(|name| object.get(name));
    let path = find(PATH).and_then(Value::as_str);
    let path = path.ok_or_else(|| format!("expected an object with a `path`, found {object}"))?;
    let label = match (find(LABEL), find(CLASS)) {
        (Some(number), Some(class)) => match (number.as_i64(), class.as_str()) {
            (Some(number), Some(class)) => Label::Both(number, class.to_owned()),
            _ => return Err(format!("expected an integer label and a class, found {object}")),
        },
        (Some(value), None) | (None, Some(value)) => label(value)?,
        (None, None) => return Err(format!("expected a `label` or a `class`, found {object}")),
    };
    let part = find(PART).and_then(Value::as_str).map(str::to_owned);
    Ok(Row { path: path.to_owned(), label, line, part })
}

fn label(value: &Value) -> Result<Label, String> {
    match value {
        Value::String(text) => Ok(Label::Text(text.clone())),
        value => value
            .as_i64()
            .map(Label::Number)
            .ok_or_else(|| format!("expected an integer label or a name, found {value}")),
    }
}

pub(super) fn written(list: &FileList) -> String {
    let objects: Vec<Value> = list.entries().iter().map(|entry| object(list, entry)).collect();
    format!("{:#}\n", Value::from(objects))
}

pub(super) fn written_as_lines(list: &FileList) -> String {
    list.entries().iter().map(|entry| format!("{}\n", object(list, entry))).collect()
}

fn object(list: &FileList, entry: &FileEntry) -> Value {
    match list.class_names().get(entry.label as usize) {
        Some(class) => json!({"path": entry.path, "label": entry.label, "class": class}),
        None => json!({"path": entry.path, "label": entry.label}),
    }
}
