//! Trainable tensors in a `VarStore`.

use tch::{Tensor, nn};

use crate::error::{Error, Result};

/// Creates the variable `name` with the value `init` and returns it. Dots in `name` separate the
/// parts of the path.
///
/// # Errors
/// Returns [`Error::DuplicateVariable`] if the name exists; tch would silently rename it to
/// `name__1`.
pub(crate) fn variable(vs: &nn::Path, name: &str, init: &Tensor) -> Result<Tensor> {
    let mut parts: Vec<&str> = name.split('.').collect();
    let leaf = parts.pop().unwrap_or_default();
    let path = parts.into_iter().fold(vs.clone(), |path, part| path.sub(part));
    if path.get(leaf).is_some() {
        let name = path.components().chain([leaf]).collect::<Vec<_>>().join(".");
        return Err(Error::DuplicateVariable { name });
    }
    let mut variable = path.f_var(leaf, &init.size(), nn::Init::Const(0.0))?;
    tch::no_grad(|| variable.f_copy_(init))?;
    Ok(variable)
}
