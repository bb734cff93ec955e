//! The settings of a method to try, and the choice of the best one.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{PlanMethod, RunSettings};
use crate::error::{Error, Result};
use convpass::petl::Method;

/// One combination of values of a grid, by the names of the fields. `Display` writes
/// `lr=0.001, scale=10`, or `as given` for an empty combination.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Setting(pub BTreeMap<String, Value>);

/// A combination and its result on the 200 validation images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// The combination that was tried.
    pub setting: Setting,
    /// Top-1 of the last epoch's weights on the validation images, in percent.
    pub val_top1: f64,
}

/// Returns the trial with the best top-1 on validation, the first one if several are equal.
pub fn best_trial(trials: &[Trial]) -> Option<&Trial> {
    trials.iter().reduce(|best, trial| if trial.val_top1 > best.val_top1 { trial } else { best })
}

impl PlanMethod {
    /// Returns every combination of the grid. The fields are in alphabetical order, and the values
    /// of the last field change fastest. Without a grid the only combination is empty.
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
    /// Returns the name of the folder of the combination. Characters that a file system may not
    /// allow are replaced by `-`.
    pub fn folder(&self) -> String {
        let plain = |c: char| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '=' | '.' | ',' | '+' => c,
            _ => '-',
        };
        self.to_string().replace(", ", ",").chars().map(plain).collect()
    }

    /// Returns the method and the settings with the values of the combination.
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

/// The field of a config that names the method. A grid cannot change it.
const TAG: &str = "name";

/// Returns `config` with another value in a field, or `None` if it does not have the field.
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
        Error::config(format!("grid.{field}"), "a valid value of the field", found)
    })
}

fn names(config: &impl Serialize) -> Vec<String> {
    match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields.into_iter().map(|f| f.0).filter(|f| f != TAG).collect(),
        _ => Vec::new(),
    }
}
