//! The one error type of the crate.

use std::path::{Path, PathBuf};

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with the fields a program needs to act on it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the text of a variant names its fields")]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),

    /// A configuration that no model can have.
    #[error("configuration: {field} must be {expected}, found {found}")]
    Config { field: String, expected: String, found: String },

    /// A method that the backbone has no place for.
    #[error("{method} cannot act on a {backbone}: {reason}")]
    Unsupported { method: &'static str, backbone: &'static str, reason: &'static str },

    /// A tensor passed by the caller has the wrong shape, kind or device.
    #[error("{argument}: expected {expected}, found {found}")]
    Input { argument: &'static str, expected: String, found: String },

    /// A variable of that name is in the `VarStore` already; tch would rename the second one.
    #[error("the VarStore has a variable named {name} already")]
    DuplicateVariable { name: String },

    /// The file is none of the formats that are read here.
    #[error("{}: not a format that is read here: {reason}", file.display())]
    UnknownFormat { file: PathBuf, reason: String },

    /// The checkpoint is of another family of backbones.
    #[error("{}: a checkpoint of a {found}, not of a {expected}", file.display())]
    OtherBackbone { file: PathBuf, expected: &'static str, found: &'static str },

    /// The file is cut off, contradicts itself, or asks for more than it holds.
    #[error("{}: corrupt: {reason}", file.display())]
    CorruptFile { file: PathBuf, reason: String },

    /// The file's pickle names code that a state dict does not need; it was not run.
    #[error("{}: its pickle calls {global}, which is not run here", file.display())]
    PickleGlobal { file: PathBuf, global: String },

    /// A tensor that the model needs is not in the file.
    #[error("{}: tensor {name} is missing (expected {expected:?})", file.display())]
    MissingTensor { file: PathBuf, name: String, expected: Vec<i64> },

    /// Tensors in the file that nothing in the model takes.
    #[error("{}: tensors with no place in the model: {}", file.display(), list(names))]
    UnexpectedTensors { file: PathBuf, names: Vec<String> },

    /// A tensor of the file has another shape than the model's.
    #[error("{}: tensor {name}: expected {expected:?}, found {found:?}", file.display())]
    ShapeMismatch { file: PathBuf, name: String, expected: Vec<i64>, found: Vec<i64> },

    /// A field of a file that says how its tensors are to be used has a value that is not read here.
    #[error("{}: {field} must be {expected}, found {found}", file.display())]
    FileField { file: PathBuf, field: String, expected: String, found: String },

    /// A tensor of the file has an element type that has no place in a model.
    #[error("{}: tensor {name}: expected f32, f16, bf16 or f64, found {found}", file.display())]
    ElementType { file: PathBuf, name: String, found: String },

    /// A file names a method that is not of this crate, and nothing made it.
    #[error("{}: its method {name} is of another crate: {reason}", file.display())]
    OutsideMethod { file: PathBuf, name: String, reason: String },

    /// The adapter was trained beside another backbone.
    #[error(
        "{}: the adapter was trained beside another backbone: {expected}; the one given is {found}",
        file.display()
    )]
    BackboneMismatch { file: PathBuf, expected: String, found: String },

    /// The file is the state of another run than the one that was to go on from it; `field` is the
    /// first one in which the two differ.
    #[error(
        "{}: the state of another run, whose {field} is {found} and not {expected}; \
         remove the file to start anew",
        file.display()
    )]
    OtherRun { file: PathBuf, field: String, expected: String, found: String },

    /// A line of a file list cannot be used.
    #[error("{}:{line}: {reason}", file.display())]
    ListLine { file: PathBuf, line: usize, reason: String },

    /// A folder is no dataset with a folder for each class.
    #[error("{}: expected a folder of images for each class: {reason}", folder.display())]
    ClassFolders { folder: PathBuf, reason: String },

    /// A class has fewer images than are to be drawn of it.
    #[error("{}: class {class} has {found} images, {expected} are asked for", file.display())]
    TooFewImages { file: PathBuf, class: String, expected: usize, found: usize },

    /// An image cannot be decoded; `list` and `line` say who asked for it, where a list did.
    #[error("{}: {reason}{}", path.display(), origin(list))]
    Image { path: PathBuf, reason: String, list: Option<(PathBuf, usize)> },
}

impl Error {
    /// Wraps an I/O error with the path it happened on.
    pub(crate) fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn config(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Error::Config { field: field.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn corrupt(file: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Error::CorruptFile { file: file.as_ref().to_path_buf(), reason: reason.into() }
    }
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

fn origin(list: &Option<(PathBuf, usize)>) -> String {
    match list {
        Some((file, line)) => format!(" (named by {}:{line})", file.display()),
        None => String::new(),
    }
}
