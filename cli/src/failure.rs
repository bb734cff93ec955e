//! How a command says why it failed.

use std::process::ExitCode;

/// Flags that do not fit together, which clap cannot tell. The exit code is that of wrong arguments.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Prints an error with each of its causes once, and returns the exit code: 2 for wrong arguments,
/// else 1.
pub fn report(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {}", chain(error));
    if error.is::<Usage>() {
        eprintln!("\nFor more information, try '--help'.");
        return ExitCode::from(2);
    }
    ExitCode::FAILURE
}

/// Returns an error and its causes in one line.
pub fn chain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| match cause.to_string() {
        cause if text.is_empty() => cause,
        cause if text.ends_with(&cause) => text,
        cause => format!("{text}: {cause}"),
    })
}

/// Returns any error and its causes in one line.
pub fn chain_of(error: impl Into<anyhow::Error>) -> String {
    chain(&error.into())
}
