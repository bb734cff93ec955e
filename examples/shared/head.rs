//! A head that a run starts from: a linear probe's, or one made of class names.

use std::path::Path;

use anyhow::{Context, Result, bail};
use convpass::{Backbone, PetlModel, TensorFile};
use sha2::{Digest, Sha256};

/// Copies the head of the adapter in `file` into `model`, whose backbone has the digest `beside`; the file's digest.
pub fn start<B: Backbone>(model: &PetlModel<B>, file: &Path, beside: &str) -> Result<String> {
    let adapter = TensorFile::open(file)?;
    if backbone_of(&adapter).is_some_and(|of| of != beside) {
        let file = file.display();
        eprintln!(
            "warning: {file}: a head for another backbone, activation, image size or precision"
        );
    }
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

/// Digest of the backbone that an adapter was saved beside.
fn backbone_of(adapter: &TensorFile) -> Option<String> {
    let info: serde_json::Value = serde_json::from_str(adapter.metadata().get("convpass")?).ok()?;
    info["backbone"].as_str().map(str::to_owned)
}

/// SHA-256 of a file in hex.
pub fn digest(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    Ok(format!("{:x}", Sha256::digest(bytes)))
}
