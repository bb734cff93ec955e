//! [`SideFile`]: a JSON file beside a checkpoint.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// A JSON file in the folder of a checkpoint.
pub(in crate::checkpoint) struct SideFile {
    pub(in crate::checkpoint) path: PathBuf,
    pub(in crate::checkpoint) json: Value,
}

impl SideFile {
    /// Reads the file `name` in the folder of `checkpoint`; returns `None` if there is no such
    /// file.
    pub(in crate::checkpoint) fn read(checkpoint: &Path, name: &str) -> Result<Option<Self>> {
        let path = checkpoint.parent().unwrap_or(Path::new("")).join(name);
        let text = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(Error::io(&path))?,
        };
        let json =
            serde_json::from_slice(&text).map_err(|e| Error::corrupt(&path, e.to_string()))?;
        Ok(Some(SideFile { path, json }))
    }

    pub(in crate::checkpoint) fn field(&self, field: &str, expected: &str, found: &Value) -> Error {
        Error::FileField {
            file: self.path.clone(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: found.to_string(),
        }
    }

    /// Returns the number `object[key]`, or `None` if it is absent or null.
    pub(in crate::checkpoint) fn number<T>(
        &self,
        object: &Value,
        key: &str,
        read: fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match &object[key] {
            Value::Null => Ok(None),
            value => read(value).map(Some).ok_or_else(|| self.field(key, "a number", value)),
        }
    }

    /// Returns the width `object[key]`, or `usual` if it is absent or null, and checks that it is
    /// `embed_dim`, the width of the model in the checkpoint, if both are known.
    pub(super) fn width(
        &self,
        object: &Value,
        key: &str,
        usual: Option<i64>,
        embed_dim: Option<i64>,
    ) -> Result<Option<i64>> {
        let width = self.number(object, key, Value::as_i64)?.or(usual);
        match (width, embed_dim) {
            (Some(width), Some(embed_dim)) if width != embed_dim => {
                let expected = format!("{embed_dim}, the width of the model in the checkpoint");
                Err(self.field(key, &expected, &object[key]))
            }
            _ => Ok(width),
        }
    }

    /// Returns the height and width in `object[key]`, which is a number, a pair, or an object with
    /// the keys `height` and `width`. Returns `None` if it is absent or null.
    pub(in crate::checkpoint) fn size(
        &self,
        object: &Value,
        key: &str,
    ) -> Result<Option<(i64, i64)>> {
        let value = &object[key];
        let size = match value {
            Value::Null => return Ok(None),
            Value::Number(side) => side.as_i64().map(|side| (side, side)),
            Value::Array(pair) if pair.len() == 2 => pair[0].as_i64().zip(pair[1].as_i64()),
            _ => value["height"].as_i64().zip(value["width"].as_i64()),
        };
        match size {
            Some(size) if size.0 > 0 && size.1 > 0 => Ok(Some(size)),
            _ => Err(self.field(key, "a height and a width in pixels", value)),
        }
    }

    /// Returns the three numbers in `object[key]`, or `None` if it is absent or null.
    pub(in crate::checkpoint) fn channels(
        &self,
        object: &Value,
        key: &str,
    ) -> Result<Option<[f32; 3]>> {
        let value = &object[key];
        if value.is_null() {
            return Ok(None);
        }
        let numbers = value.as_array().map(|list| list.iter().filter_map(Value::as_f64));
        let numbers: Vec<f32> = numbers.into_iter().flatten().map(|number| number as f32).collect();
        let channels = <[f32; 3]>::try_from(numbers).ok();
        channels.map(Some).ok_or_else(|| self.field(key, "three numbers", value))
    }
}
