//! The report of a load.

use std::fmt;

/// What a load did with each tensor of a file. A tensor that was not used is listed with a reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Names in the file of the tensors that the model took.
    pub applied: Vec<String>,
    /// Names in the file of the tensors that the model does not use, each with the reason.
    pub skipped: Vec<(String, String)>,
    /// The keys that lead to the state dict in a training checkpoint, such as `model`. It is empty
    /// if the names are those of the outermost dict.
    pub keys: Vec<String>,
    /// What was taken off all names before they were looked up, outermost first, such as
    /// `module.`.
    pub taken_off: Vec<String>,
    /// The settings that no tensor shows, each with its origin.
    pub settings: Vec<Setting>,
}

/// A setting of a model that changes its features, and the origin of its value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Setting {
    /// The field of the config, such as `num_heads`.
    pub name: &'static str,
    /// The value.
    pub value: String,
    /// The origin of the value.
    pub source: SettingSource,
}

/// The origin of a setting.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SettingSource {
    /// The caller.
    Caller,
    /// This file beside the weights, and what in it, such as `config.json`.
    File(String),
    /// The tensors: which exist, and their shapes.
    Tensors,
    /// The shape of this published model, whose setting is known.
    Known(String),
    /// The models under these names all have this value.
    Names(String),
    /// Nothing tells the value. It is the usual one of the models under these names, and models
    /// with another value exist.
    Assumed(String),
}

impl fmt::Display for SettingSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SettingSource::Caller => f.write_str("given by the caller"),
            SettingSource::File(file) => f.write_str(file),
            SettingSource::Tensors => f.write_str("the tensors"),
            SettingSource::Known(name) => write!(f, "the known shape of {name}"),
            SettingSource::Names(names) => write!(f, "the names of {names}"),
            SettingSource::Assumed(names) => {
                write!(f, "assumed, as usual under the names of {names}")
            }
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.name, self.value, self.source)
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors applied, {} skipped", self.applied.len(), self.skipped.len())?;
        if !self.keys.is_empty() {
            write!(f, "\n  the weights are under the key {}", self.keys.join("."))?;
        }
        if !self.taken_off.is_empty() {
            write!(f, "\n  taken off the names: {}", self.taken_off.join(", "))?;
        }
        self.skipped.iter().try_for_each(|(name, reason)| write!(f, "\n  {name}: {reason}"))?;
        self.settings.iter().try_for_each(|setting| write!(f, "\n  {setting}"))
    }
}
