//! The error type of the crate.

use std::path::{Path, PathBuf};

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every error of the crate, with the fields that a program needs to handle it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the text of a variant names its fields")]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    /// A path leads to a pipe, a socket or a device, which are not read.
    #[error("{}: expected a regular file, found {found}", path.display())]
    NotAFile { path: PathBuf, found: &'static str },

    /// libtorch refused an operation.
    #[error("libtorch refused an operation")]
    Torch(#[source] tch::TchError),

    /// A field of a config or an argument has a value that is not allowed. [`Error::config`]
    /// creates this error.
    #[error("{}{field} must be {expected}, found {found}", of_config(config))]
    #[non_exhaustive]
    Config {
        /// The type of the config, such as `LoraConfig`; `None` for an argument.
        config: Option<&'static str>,
        /// The field or the argument.
        field: String,
        /// The allowed values.
        expected: String,
        /// The value that was found.
        found: String,
    },

    /// The method cannot be applied to this backbone.
    #[error("{method} cannot act on a {backbone}: {reason}")]
    Unsupported { method: &'static str, backbone: &'static str, reason: &'static str },

    /// The model cannot be written in this form.
    #[error("{model} cannot be exported as {form}: {reason}")]
    #[non_exhaustive]
    NotExportable {
        /// The part of the model that does not allow it, such as its method.
        model: String,
        /// The form: the kind of file, and for a file of weights the names.
        form: &'static str,
        /// The reason, with what can be done instead.
        reason: String,
    },

    /// A tensor passed by the caller has the wrong shape, dtype or device.
    #[error("{argument}: expected {expected}, found {found}")]
    Input { argument: &'static str, expected: String, found: String },

    /// The `VarStore` already has a variable with this name; tch would rename the second one.
    #[error("the VarStore already has a variable named {name}")]
    DuplicateVariable { name: String },

    /// A checkpoint of the Hugging Face hub could not be fetched.
    #[error("{name}: {reason}")]
    Hub { name: String, reason: String },

    /// The file is in no supported format.
    #[error("{}: unsupported format: {reason}", file.display())]
    UnknownFormat { file: PathBuf, reason: String },

    /// The checkpoint holds a backbone of another family.
    #[error("{}: a checkpoint of a {found}, not of a {expected}", file.display())]
    OtherBackbone { file: PathBuf, expected: &'static str, found: &'static str },

    /// The file is cut off, contradicts itself, or its header asks for more data than the file has.
    #[error("{}: corrupt: {reason}", file.display())]
    CorruptFile { file: PathBuf, reason: String },

    /// The pickle in the file holds an object of a class in place of a state dict. The code of the
    /// class was not run.
    #[error(
        "{}: its pickle holds a {global} in place of tensors, whose code is not run here; in \
         Python, torch.save the state_dict() of the model",
        file.display()
    )]
    PickleGlobal { file: PathBuf, global: String },

    /// A tensor that the model needs is not in the file.
    /// A size of -1 stands for any size.
    #[error("{}: tensor {name} is missing (expected {})", file.display(), sizes(expected))]
    MissingTensor { file: PathBuf, name: String, expected: Vec<i64> },

    /// The final norm of the model is not in the file, as in one that was saved for its feature maps.
    #[error(
        "{}: tensor {name} is missing, the final norm; a backbone that was saved without it is not \
         supported",
        file.display()
    )]
    NoFinalNorm { file: PathBuf, name: String },

    /// The file has tensors that no part of the model uses.
    #[error(
        "{}: tensors that the model does not have: {}{}",
        file.display(),
        list(names),
        meant(names, nearest)
    )]
    #[non_exhaustive]
    UnexpectedTensors {
        /// The file.
        file: PathBuf,
        /// All these names, sorted.
        names: Vec<String>,
        /// The name that was probably meant by the first one: a missing name of the model that is
        /// similar.
        nearest: Option<String>,
    },

    /// A tensor in the file has another shape than the model's tensor.
    #[error("{}: tensor {name}: expected {expected:?}, found {found:?}", file.display())]
    ShapeMismatch { file: PathBuf, name: String, expected: Vec<i64>, found: Vec<i64> },

    /// A field of a file that describes the model has a value that is not supported.
    #[error("{}: {field} must be {expected}, found {found}", file.display())]
    FileField { file: PathBuf, field: String, expected: String, found: String },

    /// Neither the tensors nor a file beside them tell a setting that changes the features, and
    /// models with different values exist.
    #[error(
        "{}: nothing tells {field}: {candidates}; give it with {flag} or OpenOptions::{field}, \
         or put the config file of the model beside the weights",
        file.display()
    )]
    Unsettled { file: PathBuf, field: &'static str, candidates: &'static str, flag: &'static str },

    /// A tensor in the file has elements that are NaN or infinite.
    #[error("{}: tensor {name}: expected finite numbers, found {count} NaN or infinite", file.display())]
    NotFinite { file: PathBuf, name: String, count: i64 },

    /// A run of training produced a loss, logits or weights that are NaN or infinite.
    #[error(
        "training diverged at step {} of epoch {} (learning rate {lr:e}): {what} NaN or infinite; \
         try a lower learning rate, a longer warm-up or a limit for the norm of the gradients",
        step + 1,
        epoch + 1
    )]
    #[non_exhaustive]
    Diverged {
        /// The epoch, counted from 0.
        epoch: usize,
        /// The step within the epoch, counted from 0.
        step: usize,
        /// The learning rate of the step.
        lr: f64,
        /// What is not finite, such as "the loss is".
        what: &'static str,
    },

    /// The replay of a captured training step does not compute what the same step computes without
    /// a graph.
    #[error(
        "the captured training step has another {what}: the difference is {difference:.1e} of its \
         size, and {limit:.0e} is expected at most; train without cuda_graph"
    )]
    #[non_exhaustive]
    CaptureDiffers {
        /// What differs: "loss", or the gradient of a variable, which it names.
        what: String,
        /// The norm of the difference, relative to the norm of the value.
        difference: f64,
        /// The largest relative difference that rounding explains.
        limit: f64,
    },

    /// A tensor in the file has a dtype that no model uses.
    #[error("{}: tensor {name}: expected f32, f16, bf16 or f64, found {found}", file.display())]
    ElementType { file: PathBuf, name: String, found: String },

    /// A file names a method of another crate that could not be created.
    #[error("{}: its method {name} belongs to another crate: {reason}", file.display())]
    OutsideMethod { file: PathBuf, name: String, reason: String },

    /// The adapter was trained on another backbone.
    #[error(
        "{}: the adapter was trained on another backbone: {}; the given one is {}",
        file.display(),
        called(trained_beside.as_deref().unwrap_or("one of unknown name"), expected),
        called(given, found)
    )]
    #[non_exhaustive]
    BackboneMismatch {
        /// The adapter file.
        file: PathBuf,
        /// Digest of the backbone that the adapter was trained on.
        expected: String,
        /// Digest of the backbone that was given.
        found: String,
        /// Name of the backbone that the adapter was trained on: family, file, image size,
        /// precision. It is `None` for files of version 0.1, which do not store it.
        trained_beside: Option<String>,
        /// Name of the backbone that was given.
        given: String,
    },

    /// The state file belongs to another run than the one that should resume from it. `field` is
    /// the first field in which the two runs differ.
    #[error(
        "{}: it is the state of another run, whose {field} is {found} instead of {expected}; \
         remove the file to start a new run",
        file.display()
    )]
    OtherRun { file: PathBuf, field: String, expected: String, found: String },

    /// The head in an adapter file has other classes than the model. `missing` are the names that
    /// only the model has, `unexpected` those that only the file has.
    #[error(
        "{}: its head is of other classes: it lacks {}, and the model lacks {}",
        file.display(),
        list_or_none(missing),
        list_or_none(unexpected)
    )]
    ClassMismatch { file: PathBuf, missing: Vec<String>, unexpected: Vec<String> },

    /// A line of a file list cannot be used.
    #[error("{}:{line}: {reason}", file.display())]
    ListLine { file: PathBuf, line: usize, reason: String },

    /// A folder does not contain one folder of images for each class.
    #[error("{}: expected a folder of images for each class: {reason}", folder.display())]
    ClassFolders { folder: PathBuf, reason: String },

    /// A class has fewer images than the number to draw.
    #[error("{}: class {class} has {found} images, but {expected} are needed", file.display())]
    TooFewImages { file: PathBuf, class: String, expected: usize, found: usize },

    /// An operation of several processes failed. `rank` is the process that reports it, and `failed`
    /// the one that the others waited for, if it could be found out.
    #[cfg(feature = "distributed")]
    #[error("rank {rank} of {world_size}: {during} failed: {}{reason}", of_rank(failed))]
    Distributed {
        rank: usize,
        world_size: usize,
        during: String,
        failed: Option<usize>,
        reason: String,
    },

    /// A process has other settings than process 0. `field` is the first one that differs.
    #[cfg(feature = "distributed")]
    #[error("rank {rank} differs from rank 0: its {field} is {found} instead of {expected}")]
    RanksDiffer { rank: usize, field: String, expected: String, found: String },

    /// An image cannot be decoded. `list` is the file list and the line that name the image, if
    /// any.
    #[error("{}: {reason}{}", path.display(), origin(list))]
    Image { path: PathBuf, reason: String, list: Option<(PathBuf, usize)> },
}

impl From<tch::TchError> for Error {
    /// Leaves out the frames of libtorch's C++ stack, which tell a user nothing.
    fn from(error: tch::TchError) -> Self {
        Error::Torch(match error {
            tch::TchError::Torch(text) => tch::TchError::Torch(without_frames(&text).to_owned()),
            other => other,
        })
    }
}

/// Returns the message of an exception of libtorch without the C++ stack frames behind it.
fn without_frames(text: &str) -> &str {
    text.split("\nException raised from").next().unwrap_or(text).trim_end()
}

impl Error {
    /// Returns a function that wraps an I/O error with its path.
    pub(crate) fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// Creates an [`Error::Config`]: `field` must be `expected`. Configs of other crates can return
    /// it from their own checks.
    ///
    /// ```
    /// use convpass::Error;
    ///
    /// let error = Error::config("rank", "at least 1", 0).in_config("LoraConfig");
    /// assert_eq!(error.to_string(), "LoraConfig.rank must be at least 1, found 0");
    /// ```
    pub fn config(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        let (field, expected, found) = (field.into(), expected.into(), found.to_string());
        Error::Config { config: None, field, expected, found }
    }

    /// Sets the config type of an [`Error::Config`] if it is not set yet. Any other error is
    /// returned unchanged.
    #[must_use]
    pub fn in_config(mut self, name: &'static str) -> Self {
        if let Error::Config { config, .. } = &mut self {
            config.get_or_insert(name);
        }
        self
    }

    /// Creates an [`Error::UnexpectedTensors`] for the tensors `names` of a file, at least one.
    /// `missing` are the names that the model has and the file does not have.
    pub(crate) fn unexpected<'a>(
        file: impl AsRef<Path>,
        names: Vec<String>,
        missing: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let first = names.first().map_or("", String::as_str);
        let nearest = nearest(first, missing).map(str::to_owned);
        Error::UnexpectedTensors { file: file.as_ref().to_path_buf(), names, nearest }
    }

    pub(crate) fn corrupt(file: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Error::CorruptFile { file: file.as_ref().to_path_buf(), reason: reason.into() }
    }
}

/// Joins the first ten names. If there are more, the text also gives their number.
pub(crate) fn list<S: AsRef<str>>(names: &[S]) -> String {
    const SHOWN: usize = 10;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    let mut text = shown.join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more ({} in all)", names.len() - SHOWN, names.len());
    }
    text
}

/// The same as [`list`], and `none` if there is no name.
fn list_or_none(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { list(names) }
}

/// A shape as text, with `?` for a size of -1.
fn sizes(shape: &[i64]) -> String {
    let size = |&size: &i64| if size < 0 { "?".to_owned() } else { size.to_string() };
    format!("[{}]", shape.iter().map(size).collect::<Vec<_>>().join(", "))
}

fn meant(names: &[String], nearest: &Option<String>) -> String {
    match (names.first(), nearest) {
        (Some(name), Some(nearest)) => format!("; is {name} meant to be {nearest}?"),
        _ => String::new(),
    }
}

/// Formats the name of a backbone and the start of its digest.
fn called(name: &str, digest: &str) -> String {
    format!("{name} (digest {})", digest.chars().take(12).collect::<String>())
}

fn of_config(config: &Option<&'static str>) -> String {
    config.map(|name| format!("{name}.")).unwrap_or_default()
}

/// Returns the name in `known` that is most similar to `name`. It needs at most three edits, and at
/// most one edit for every three letters of `name`.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let most = 3.min(name.chars().count() / 3);
    let near = known.into_iter().filter(|other| other.len().abs_diff(name.len()) <= 4 * most);
    let (edits, other) = near.map(|other| (edits(name, other), other)).min()?;
    (edits <= most).then_some(other)
}

/// Returns the number of letters to insert, remove or replace to turn `a` into `b`.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &b) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(feature = "distributed")]
fn of_rank(failed: &Option<usize>) -> String {
    failed.map(|rank| format!("rank {rank}: ")).unwrap_or_default()
}

fn origin(list: &Option<(PathBuf, usize)>) -> String {
    match list {
        Some((file, line)) => format!(" (named by {}:{line})", file.display()),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn the_nearest_name_is_a_near_one() {
        let known = ["blocks.0.adapter_mlp.conv", "blocks.1.adapter_mlp.conv", "head.bias"];
        assert_eq!(nearest("blocks.1.adapter_mpl.conv", known), Some(known[1]));
        assert_eq!(nearest("head.bais", known), Some("head.bias"));
        assert_eq!(nearest("x", known), None);
        assert_eq!(nearest("patch_embed.weight", known), None);
        assert_eq!((edits("", "abc"), edits("kitten", "sitting")), (3, 3));
    }

    #[test]
    fn lists_say_ten_and_how_many() {
        let names: Vec<String> = (0..13).map(|i| format!("n{i}")).collect();
        assert!(list(&names).ends_with("n8, n9 and 3 more (13 in all)"), "{}", list(&names));
        assert_eq!(list(&names[..2]), "n0, n1");
    }

    #[test]
    fn an_error_does_not_repeat_its_source() {
        let torch = tch::Tensor::f_zeros([-1], (tch::Kind::Float, tch::Device::Cpu)).unwrap_err();
        let io = std::io::Error::other("no such luck");
        for error in [Error::from(torch), Error::io("file")(io)] {
            let source = error.source().expect("both have one").to_string();
            assert!(!error.to_string().contains(&source), "{error}");
        }
    }

    #[test]
    fn the_innermost_config_is_named() {
        let error = Error::config("rank", "at least 1", 0).in_config("LoraConfig");
        let error = error.in_config("PetlConfig");
        assert_eq!(error.to_string(), "LoraConfig.rank must be at least 1, found 0");
        let error = Error::config("kind", "f32", "int8");
        assert_eq!(error.to_string(), "kind must be f32, found int8");
    }
}
