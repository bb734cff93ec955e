//! What is tried of a method, and which of it is best.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{PlanMethod, RunSettings};
use crate::error::{Error, Result};
use convpass::petl::Method;

/// One combination of a grid: values by the names of their fields. `Display` gives
/// `lr=0.001, scale=10`, or `as given` for none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Setting(pub BTreeMap<String, Value>);

/// A combination, and what came of it on the 200.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// What was tried.
    pub setting: Setting,
    /// Top-1 in percent on the validation images, of the last epoch's weights.
    pub val_top1: f64,
}

/// The first of those with the best top-1 on validation.
pub fn best_trial(trials: &[Trial]) -> Option<&Trial> {
    trials.iter().reduce(|best, trial| if trial.val_top1 > best.val_top1 { trial } else { best })
}

impl PlanMethod {
    /// Every combination of the grid, by the alphabet of the fields, the values of the last one
    /// changing fastest. Without a grid there is one, which changes nothing.
    pub fn settings(&self) -> Vec<Setting> {
        self.grid.iter().fold(vec![Setting::default()], |settings, (field, values)| {
            let with = |setting: &Setting, value: &Value| {
                let mut setting = setting.clone();
                setting.0.insert(field.clone(), value.clone());
                setting
            };
            settings.iter().flat_map(|s| values.iter().map(move |value| with(s, value))).collect()
        })
    }
}

impl Setting {
    /// The name of its folder, without anything that a file system could mind.
    pub fn folder(&self) -> String {
        let plain = |c: char| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '=' | '.' | ',' | '+' => c,
            _ => '-',
        };
        self.to_string().replace(", ", ",").chars().map(plain).collect()
    }

    /// The method and the settings with these values in their fields.
    pub(super) fn apply(
        &self,
        mut method: Method,
        mut settings: RunSettings,
    ) -> Result<(Method, RunSettings)> {
        for (field, value) in &self.0 {
            if let Some(changed) = with_field(&settings, field, value)? {
                settings = changed;
            } else if let Some(changed) = with_field(&method, field, value)? {
                method = changed;
            } else {
                let names = [names(&settings), names(&method)].concat().join(", ");
                return Err(Error::config("grid", format!("fields among {names}"), field));
            }
        }
        Ok((method, settings))
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.pad("as given");
        }
        let text = |(field, value): (&String, &Value)| match value {
            Value::String(text) => format!("{field}={text}"),
            value => format!("{field}={value}"),
        };
        f.pad(&self.0.iter().map(text).collect::<Vec<_>>().join(", "))
    }
}

/// The tag of a method in configs; another one there would be another method.
const TAG: &str = "name";

/// `config` with another value in a field; `None` if it has no such field.
fn with_field<T: Serialize + DeserializeOwned>(
    config: &T,
    field: &str,
    value: &Value,
) -> Result<Option<T>> {
    let Ok(Value::Object(mut fields)) = serde_json::to_value(config) else { return Ok(None) };
    let Some(place) = fields.get_mut(field).filter(|_| field != TAG) else { return Ok(None) };
    *place = value.clone();
    serde_json::from_value(Value::Object(fields)).map(Some).map_err(|e| {
        let found = format!("{value} ({e})");
        Error::config(format!("grid.{field}"), "a value that the field can have", found)
    })
}

fn names(config: &impl Serialize) -> Vec<String> {
    match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields.into_iter().map(|f| f.0).filter(|f| f != TAG).collect(),
        _ => Vec::new(),
    }
}
