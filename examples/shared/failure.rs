//! How a program says why it failed.
#![allow(dead_code, reason = "each example that shares this file uses a part of it")]

use std::process::ExitCode;

/// The status of a program that did its work or could not.
pub fn exit(result: anyhow::Result<()>) -> ExitCode {
    result.map_or_else(|error| report(&error), |()| ExitCode::SUCCESS)
}

/// Prints what happened and why, each cause once: an error of convpass tells its own.
pub fn report(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {}", chain(error));
    ExitCode::FAILURE
}

/// An error and its causes in one line.
pub fn chain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |said, cause| match cause.to_string() {
        cause if said.is_empty() => cause,
        cause if said.ends_with(&cause) => said,
        cause => format!("{said}: {cause}"),
    })
}
