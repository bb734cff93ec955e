//! The settings of a Swin or a ConvNeXt in Hugging Face's `config.json`.

use serde_json::Value;

use super::activations::activation;
use super::{CONFIG, SideFile, Told, told_of_timm};
use crate::backbone::MlpActivation;
use crate::checkpoint::plan::Plan;
use crate::error::Result;

/// Epsilon of the last norm of Hugging Face's ConvNeXt, if its config does not tell another one.
const LAST_EPS: f64 = 1e-12;

/// The epsilon that the layer norms of a Swin have here.
const SWIN_EPS: f64 = 1e-5;

/// Returns the file of settings beside a checkpoint with Hugging Face's names, if it is of a model
/// of the type `model_type`.
fn config<'a>(plan: &'a Plan, model_type: &str) -> Result<Option<&'a SideFile>> {
    if !plan.family.name.starts_with("Hugging Face") {
        return Ok(None);
    }
    Ok(plan.config()?.filter(|file| file.json["model_type"] == model_type))
}

/// Reads the settings of a ConvNeXt from the files beside its checkpoint.
///
/// # Errors
/// The errors of [`told`](super::told).
pub(in crate::checkpoint) fn told_of_convnext(plan: &Plan) -> Result<Told> {
    match config(plan, "convnext")? {
        Some(file) => Ok(Told {
            source: CONFIG.to_owned(),
            activation: activation(file, &file.json, "hidden_act")?,
            ..Told::default()
        }),
        None => told_of_timm(plan),
    }
}

/// Returns the epsilon of the last norm of a ConvNeXt, if it is not that of the other norms.
///
/// # Errors
/// The errors of [`told`](super::told).
pub(in crate::checkpoint) fn last_norm_eps(plan: &Plan) -> Result<Option<f64>> {
    if !plan.family.name.starts_with("Hugging Face") {
        return Ok(None);
    }
    let told = match config(plan, "convnext")? {
        Some(file) => file.number(&file.json, "layer_norm_eps", Value::as_f64)?,
        None => None,
    };
    Ok(Some(told.unwrap_or(LAST_EPS)))
}

/// Returns the image size of a Swin that the file of settings tells, and checks that the other
/// settings are those of the Swin here.
///
/// # Errors
/// The errors of [`told`](super::told).
pub(in crate::checkpoint) fn swin_image_size(plan: &Plan) -> Result<Option<(i64, i64)>> {
    let Some(file) = config(plan, "swin")? else { return Ok(None) };
    let json = &file.json;
    if !matches!(activation(file, json, "hidden_act")?, None | Some(MlpActivation::Gelu)) {
        return Err(file.field("hidden_act", "gelu in a Swin", &json["hidden_act"]));
    }
    let eps = file.number(json, "layer_norm_eps", Value::as_f64)?;
    if eps.is_some_and(|eps| eps != SWIN_EPS) {
        let expected = format!("{SWIN_EPS:e} in a Swin");
        return Err(file.field("layer_norm_eps", &expected, &json["layer_norm_eps"]));
    }
    file.size(json, "image_size")
}
