//! Errors of a command. They include the errors of the library.

use std::path::{Path, PathBuf};

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong in a command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An error of the library.
    #[error(transparent)]
    Library(#[from] convpass::Error),

    /// A file could not be opened, read or written.
    #[error("{}", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    /// A file is cut off or contradicts itself.
    #[error("{}: corrupt: {reason}", file.display())]
    CorruptFile { file: PathBuf, reason: String },

    /// The value of a setting is not valid.
    #[error("{field} must be {expected}, found {found}")]
    Config { field: String, expected: String, found: String },

    /// Pixels or tensors have a wrong shape.
    #[error("{argument}: expected {expected}, found {found}")]
    Input { argument: &'static str, expected: String, found: String },

    /// A plan of runs is not valid. `line` is the line where the mistake begins.
    #[error("{}:{line}: {reason}", file.display())]
    PlanLine { file: PathBuf, line: usize, reason: String },

    /// The drawing library failed on a chart.
    #[error("chart: {reason}")]
    Chart { reason: String },
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Error::Library(error.into())
    }
}

impl Error {
    /// Returns a function that adds `path` to an I/O error.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// Returns the error for a setting whose value is not valid.
    pub fn config(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Error::Config { field: field.into(), expected: expected.into(), found: found.to_string() }
    }

    /// Returns whether this program or the library rejected the value of a setting.
    #[cfg(test)]
    pub fn is_config(&self) -> bool {
        matches!(self, Error::Config { .. } | Error::Library(convpass::Error::Config { .. }))
    }

    /// Returns the error for a file that is cut off or contradicts itself.
    pub fn corrupt(file: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Error::CorruptFile { file: file.as_ref().to_path_buf(), reason: reason.into() }
    }
}
