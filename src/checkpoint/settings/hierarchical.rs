//! The settings of a Swin or a ConvNeXt in Hugging Face's `config.json`.

use serde_json::Value;

use super::activations::activation;
use super::{CONFIG, SideFile, Told, told_of_timm};
use crate::backbone::{MlpActivation, SwinConfig};
use crate::checkpoint::plan::Plan;
use crate::error::Result;

/// Epsilon of the last norm of Hugging Face's ConvNeXt, if its config does not tell another one.
const LAST_EPS: f64 = 1e-12;

/// The model types of Hugging Face's ConvNeXts.
const CONV_NEXTS: [&str; 3] = ["convnext", "convnextv2", DINOV3];

const DINOV3: &str = "dinov3_convnext";

/// The epsilon that the layer norms of a Swin have here.
const SWIN_EPS: f64 = 1e-5;

/// Returns the file of settings beside a checkpoint with Hugging Face's names, if it is of a model
/// of one of the types `model_types`.
fn config<'a>(plan: &'a Plan, model_types: &[&str]) -> Result<Option<&'a SideFile>> {
    if !plan.family.name.starts_with("Hugging Face") {
        return Ok(None);
    }
    Ok(plan
        .config()?
        .filter(|file| model_types.iter().any(|kind| file.json["model_type"] == *kind)))
}

/// Reads the settings of a ConvNeXt from the files beside its checkpoint.
///
/// # Errors
/// The errors of [`told`](super::told).
pub(in crate::checkpoint) fn told_of_convnext(plan: &Plan) -> Result<Told> {
    match config(plan, &CONV_NEXTS)? {
        Some(file) => Ok(Told {
            source: CONFIG.to_owned(),
            norm_eps: if file.json["model_type"] == DINOV3 {
                file.number(&file.json, "layer_norm_eps", Value::as_f64)?
            } else {
                // The config tells the epsilon of the last norm alone.
                None
            },
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
    if plan.family.name != "Hugging Face ConvNeXt" {
        return Ok(None);
    }
    let told = match config(plan, &CONV_NEXTS)? {
        Some(file) => file.number(&file.json, "layer_norm_eps", Value::as_f64)?,
        None => None,
    };
    Ok(Some(told.unwrap_or(LAST_EPS)))
}

/// What the files beside a Swin tell of its windows and images.
#[derive(Debug, Default)]
pub(in crate::checkpoint) struct ToldSwin {
    /// The name of the file, and in it what told the settings if that is not a field of its own.
    pub(in crate::checkpoint) source: String,
    pub(in crate::checkpoint) image_size: Option<(i64, i64)>,
    /// Rows and columns of the windows of each stage.
    pub(in crate::checkpoint) window_sizes: Option<Vec<(i64, i64)>>,
    /// The same of the pretraining, where zero stands for the window itself.
    pub(in crate::checkpoint) pretrained_window_sizes: Option<Vec<(i64, i64)>>,
}

/// Reads the settings of a Swin of `stages` stages from the files beside its checkpoint, and checks
/// that the other settings are those of the Swin here. Windows are told of a Swin V2 alone.
///
/// # Errors
/// The errors of [`told`](super::told).
pub(in crate::checkpoint) fn told_of_swin(
    plan: &Plan,
    patch_size: i64,
    stages: usize,
) -> Result<ToldSwin> {
    if let Some(file) = config(plan, &["swin", "swinv2"])? {
        return swin_of_hugging_face(file, patch_size, stages);
    }
    let told = told_of_timm(plan)?;
    let mut found =
        ToldSwin { source: told.source, image_size: told.image_size, ..ToldSwin::default() };
    let Some(file) = plan.config()? else { return Ok(found) };
    let Some(name) = file.json["architecture"].as_str() else { return Ok(found) };
    let known = SwinConfig::preset(name.split('.').next().unwrap_or_default()).ok();
    let known = known.filter(|known| known.depths.len() == stages);
    let args = &file.json["model_args"];
    found.image_size = found.image_size.or(known.as_ref().map(|known| known.image_size));
    found.window_sizes = windows(file, args, "window_size", stages)?
        .or(known.as_ref().map(|known| known.window_sizes.clone()));
    found.pretrained_window_sizes =
        windows_by_stage(file, args, "pretrained_window_sizes", stages)?
            .or(known.and_then(|known| Some(known.continuous_bias?.pretrained_window_sizes)));
    Ok(found)
}

fn swin_of_hugging_face(file: &SideFile, patch_size: i64, stages: usize) -> Result<ToldSwin> {
    let json = &file.json;
    if !matches!(activation(file, json, "hidden_act")?, None | Some(MlpActivation::Gelu)) {
        return Err(file.field("hidden_act", "gelu in a Swin", &json["hidden_act"]));
    }
    let eps = file.number(json, "layer_norm_eps", Value::as_f64)?;
    if eps.is_some_and(|eps| eps != SWIN_EPS) {
        let expected = format!("{SWIN_EPS:e} in a Swin");
        return Err(file.field("layer_norm_eps", &expected, &json["layer_norm_eps"]));
    }
    let image_size = file.size(json, "image_size")?;
    let source = CONFIG.to_owned();
    if json["model_type"] != "swinv2" {
        return Ok(ToldSwin { source, image_size, ..ToldSwin::default() });
    }
    // The defaults of the config class.
    let image_size = image_size.unwrap_or((224, 224));
    let window = file.number(json, "window_size", Value::as_i64)?.unwrap_or(7);
    let pretrained = windows_by_stage(file, json, "pretrained_window_sizes", stages)?;
    if !limits_alike(image_size, patch_size, window, stages) {
        let expected = "square where a window is as large as the grid of a stage, because Hugging \
                        Face's Swin V2 limits a window by the rows alone";
        return Err(file.field("image_size", expected, &json["image_size"]));
    }
    Ok(ToldSwin {
        source,
        image_size: Some(image_size),
        window_sizes: Some(vec![(window, window); stages]),
        pretrained_window_sizes: Some(pretrained.unwrap_or(vec![(0, 0); stages])),
    })
}

/// Returns whether Hugging Face's Swin V2 has the same windows as the Swin here. It limits both
/// sides of a window by the rows of the grid, and it halves a grid from stage to stage and rounds
/// down.
fn limits_alike(image_size: (i64, i64), patch_size: i64, window: i64, stages: usize) -> bool {
    let side = |pixels: i64| pixels.checked_div(patch_size).unwrap_or_default();
    let (rows, cols) = (side(image_size.0), side(image_size.1));
    (0..stages.min(62)).all(|stage| {
        let has_many = (rows >> stage).min(cols >> stage) > window;
        has_many || rows == cols && rows % (1 << stage) == 0
    })
}

/// Returns the windows in `object[key]`: a side or a pair of rows and columns for all stages, or a
/// list with one of them for each stage. Returns `None` if the field is absent or null.
fn windows(
    file: &SideFile,
    object: &Value,
    key: &str,
    stages: usize,
) -> Result<Option<Vec<(i64, i64)>>> {
    match window(&object[key]) {
        Some(window) => Ok(Some(vec![window; stages])),
        None => windows_by_stage(file, object, key, stages),
    }
}

/// Returns the windows in the list `object[key]`, one for each stage; more are not read. Returns `None` if the field is
/// absent or null.
fn windows_by_stage(
    file: &SideFile,
    object: &Value,
    key: &str,
    stages: usize,
) -> Result<Option<Vec<(i64, i64)>>> {
    let value = &object[key];
    if value.is_null() {
        return Ok(None);
    }
    let list = value.as_array().filter(|list| list.len() >= stages);
    let windows = list.and_then(|list| list[..stages].iter().map(window).collect());
    let expected = format!("a window for each of {stages} stages");
    windows.map(Some).ok_or_else(|| file.field(key, &expected, value))
}

/// Returns the window that `value` is: a side, or a pair of rows and columns.
fn window(value: &Value) -> Option<(i64, i64)> {
    match value {
        Value::Array(sides) if sides.len() == 2 => sides[0].as_i64().zip(sides[1].as_i64()),
        side => side.as_i64().map(|side| (side, side)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_limited_alike_where_grids_are_square_or_large() {
        for (image, window, expected) in [
            ((256, 256), 8, true),
            ((256, 256), 16, true),
            ((288, 352), 8, true),
            ((256, 512), 8, false),
            ((512, 256), 8, false),
            ((260, 260), 16, false),
        ] {
            assert_eq!(limits_alike(image, 4, window, 4), expected, "{image:?} {window}");
        }
        assert!(limits_alike((36, 36), 0, 4, 2) && limits_alike((0, 0), 4, 4, 100));
    }
}
