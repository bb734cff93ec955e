//! The state of a run in its folder, until it is done.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use convpass::RunCheckpoint;

fn file(out: &Path) -> PathBuf {
    out.join("run.state.safetensors")
}

/// Where the state of the run in `out` is, written each `every` steps.
pub fn checkpoint(out: &Path, every: usize) -> RunCheckpoint {
    RunCheckpoint { path: file(out), every }
}

/// Removes the state, if there is one.
pub fn remove(out: &Path) -> Result<()> {
    let file = file(out);
    match std::fs::remove_file(&file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| file.display().to_string())
        }
        _ => Ok(()),
    }
}
