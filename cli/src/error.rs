//! What can go wrong in a command, beside the library's errors.

use std::path::{Path, PathBuf};

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong in a command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The library refused.
    #[error(transparent)]
    Library(#[from] convpass::Error),

    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),

    /// A file could not be opened, read or written.
    #[error("{}", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    /// A file is cut off or contradicts itself.
    #[error("{}: corrupt: {reason}", file.display())]
    CorruptFile { file: PathBuf, reason: String },

    /// A setting that no run can have.
    #[error("configuration: {field} must be {expected}, found {found}")]
    Config { field: String, expected: String, found: String },

    /// Pixels or tensors of a wrong shape.
    #[error("{argument}: expected {expected}, found {found}")]
    Input { argument: &'static str, expected: String, found: String },

    /// A plan of runs cannot be used; the line is where the mistake begins.
    #[error("{}:{line}: {reason}", file.display())]
    PlanLine { file: PathBuf, line: usize, reason: String },

    /// The drawing library failed on a chart.
    #[error("chart: {reason}")]
    Chart { reason: String },
}

impl Error {
    /// Wraps an I/O error with the path it happened on.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// A setting that no run can have.
    pub fn config(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Error::Config { field: field.into(), expected: expected.into(), found: found.to_string() }
    }

    /// Whether a setting is wrong, for this program or for the library.
    #[cfg(test)]
    pub fn is_config(&self) -> bool {
        matches!(self, Error::Config { .. } | Error::Library(convpass::Error::Config { .. }))
    }

    /// A file that is cut off or contradicts itself.
    pub fn corrupt(file: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Error::CorruptFile { file: file.as_ref().to_path_buf(), reason: reason.into() }
    }
}
