//! Prints why a command failed.

use std::path::PathBuf;
use std::process::ExitCode;

use convpass::eval::Evaluation;

/// Flags that cannot be used together, if clap cannot detect it. The exit code is 2, as for all
/// wrong arguments.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// The exit code after results that are NaN or infinite.
pub const NOT_FINITE: u8 = 3;

/// Results that are NaN or infinite. The exit code is 3, as for a training run that diverged.
#[derive(Debug, thiserror::Error)]
#[error(
    "{count} of {images} {set} images have logits that are NaN or infinite; the result is not usable"
)]
pub struct NotFinite {
    set: String,
    count: usize,
    images: usize,
}

/// Returns an error if a logit of an image of `set` was NaN or infinite.
pub fn finite(evaluation: &Evaluation, set: &str) -> Result<(), NotFinite> {
    let &Evaluation { images, not_finite: count, .. } = evaluation;
    if count == 0 { Ok(()) } else { Err(NotFinite { set: set.to_owned(), count, images }) }
}

/// Returns an error if no member of an ensemble had finite logits for an image of `set`.
pub fn answered(answers: &[Option<i64>], set: &str) -> Result<(), NotFinite> {
    let (images, count) = (answers.len(), answers.iter().filter(|a| a.is_none()).count());
    if count == 0 { Ok(()) } else { Err(NotFinite { set: set.to_owned(), count, images }) }
}

/// All settings that were tried diverged. The exit code is 3.
#[derive(Debug, thiserror::Error)]
#[error("{}: all {count} learning rates that were tried diverged; the first: {reason}", folder.display())]
pub struct AllDiverged {
    pub folder: PathBuf,
    pub count: usize,
    pub reason: String,
}

/// Returns whether numbers that are NaN or infinite ended the command.
pub fn is_not_finite(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let of_library = |cause: &convpass::Error| {
            matches!(cause, convpass::Error::Diverged { .. } | convpass::Error::NotFinite { .. })
        };
        cause.is::<NotFinite>()
            || cause.is::<AllDiverged>()
            || cause.downcast_ref().is_some_and(of_library)
            || matches!(cause.downcast_ref(), Some(crate::error::Error::Library(e)) if of_library(e))
    })
}

/// Prints an error and its causes, each once, and returns the exit code: 2 for wrong arguments, 3
/// for results that are NaN or infinite, else 1.
pub fn report(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {}", chain(error));
    if error.is::<Usage>() {
        eprintln!("\nFor more information, try '--help'.");
        return ExitCode::from(2);
    }
    if is_not_finite(error) {
        return ExitCode::from(NOT_FINITE);
    }
    ExitCode::FAILURE
}

/// Returns an error and its causes in one line.
pub fn chain(error: &anyhow::Error) -> String {
    joined(error.chain())
}

/// Returns an error that belongs to another value and its causes in one line.
pub fn chain_of_ref(error: &(dyn std::error::Error + 'static)) -> String {
    joined(anyhow::Chain::new(error))
}

fn joined(chain: anyhow::Chain) -> String {
    chain.fold(String::new(), |text, cause| match cause.to_string() {
        cause if text.is_empty() => cause,
        cause if text.ends_with(&cause) => text,
        cause => format!("{text}: {cause}"),
    })
}

/// Returns an error of any type and its causes in one line.
pub fn chain_of(error: impl Into<anyhow::Error>) -> String {
    chain(&error.into())
}
