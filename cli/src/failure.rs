//! Prints why a command failed.

use std::process::ExitCode;

/// Flags that cannot be used together, if clap cannot detect it. The exit code is 2, as for all
/// wrong arguments.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Prints an error and its causes, each once, and returns the exit code: 2 for wrong arguments,
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

/// Returns an error of any type and its causes in one line.
pub fn chain_of(error: impl Into<anyhow::Error>) -> String {
    chain(&error.into())
}
