//! A head that a run starts from: a linear probe's, or one made of class names.

use std::path::Path;

use anyhow::{Context, Result, bail};
use convpass::{Backbone, PetlModel, TensorFile};
use sha2::{Digest, Sha256};

/// Copies the head of the adapter in `file` into `model`; its digest.
pub fn start<B: Backbone>(model: &PetlModel<B>, file: &Path) -> Result<String> {
    let adapter = TensorFile::open(file)?;
    let variables = model.var_store().variables();
    for name in ["head.weight", "head.bias"] {
        let value = adapter.tensor(name)?;
        let mut variable = variables.get(name).context(name)?.shallow_clone();
        let (found, expected) = (value.size(), variable.size());
        if found != expected {
            bail!("{}: {name} is {found:?}, the task's {expected:?}", file.display());
        }
        tch::no_grad(|| variable.f_copy_(&value))?;
    }
    digest(file)
}

/// SHA-256 of a file in hex.
pub fn digest(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    Ok(format!("{:x}", Sha256::digest(bytes)))
}
