//! The names of activations in the libraries' files.

use serde_json::Value;

use super::SideFile;
use crate::backbone::MlpActivation;
use crate::backbone::MlpActivation::{Gelu, GeluTanh, QuickGelu, Relu, Silu};
use crate::error::Result;

/// The names of Hugging Face (`ACT2FN` of transformers) and of timm (`create_act`).
const NAMES: [(&str, MlpActivation); 14] = [
    ("gelu", Gelu),
    ("gelu_python", Gelu),
    ("gelu_new", GeluTanh),
    ("gelu_fast", GeluTanh),
    ("gelu_accurate", GeluTanh),
    ("gelu_pytorch_tanh", GeluTanh),
    ("gelu_python_tanh", GeluTanh),
    ("gelu_tanh", GeluTanh),
    ("quick_gelu", QuickGelu),
    ("quickgelu", QuickGelu),
    ("relu", Relu),
    ("silu", Silu),
    ("swish", Silu),
    // The activation of an MLP with a gate. The tensors show the gate.
    ("swiglu", MlpActivation::SwiGlu),
];

/// Returns the activation that `object[key]` names, or `None` if the field is absent or null.
///
/// # Errors
/// [`Error::FileField`](crate::Error::FileField) if the crate does not compute this activation.
pub(super) fn activation(
    file: &SideFile,
    object: &Value,
    key: &str,
) -> Result<Option<MlpActivation>> {
    let value = &object[key];
    if value.is_null() {
        return Ok(None);
    }
    let found = NAMES.iter().find(|(name, _)| value == name).map(|(_, activation)| *activation);
    let names = || NAMES.map(|(name, _)| name).join(", ");
    found.map(Some).ok_or_else(|| file.field(key, &format!("one of {}", names()), value))
}
