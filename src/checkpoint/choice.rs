//! A setting that several origins may tell, and the settings that none tells.

use std::path::Path;

use super::report::{Setting, SettingSource};
use crate::error::Error;

/// A value and its origin.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choice<T> {
    pub(super) value: T,
    pub(super) source: SettingSource,
}

impl<T: PartialEq> Choice<T> {
    pub(super) fn new(value: T, source: SettingSource) -> Self {
        Choice { value, source }
    }

    /// Returns the value that the file `source` tells, or else `other`.
    pub(super) fn told(value: Option<T>, source: &str, other: impl FnOnce() -> Choice<T>) -> Self {
        match value {
            Some(value) => Choice { value, source: SettingSource::File(source.to_owned()) },
            None => other(),
        }
    }

    /// Returns the setting `name` of a config that has the value `used`, which `text` shows. It is
    /// the caller's if it is not the value of this choice.
    pub(super) fn setting(
        self,
        name: &'static str,
        used: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Setting {
        let source = if self.value == *used { self.source } else { SettingSource::Caller };
        Setting { name, value: text(used), source }
    }
}

/// A setting that nothing tells, although models with different values exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsettled {
    /// The field of the config and of [`OpenOptions`](super::OpenOptions).
    pub(super) field: &'static str,
    /// The values that are possible, with what has them.
    pub(super) candidates: &'static str,
    /// The flag of the command line that gives the value.
    pub(super) flag: &'static str,
}

impl Unsettled {
    /// Returns the error for the checkpoint `file`.
    pub(super) fn error(&self, file: &Path) -> Error {
        Error::Unsettled {
            file: file.to_path_buf(),
            field: self.field,
            candidates: self.candidates,
            flag: self.flag,
        }
    }
}
