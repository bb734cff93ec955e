//! The settings that change the features of a model and that its tensors do not show: what the
//! files beside a checkpoint tell, and what is known of the shapes of published models.

mod activations;
mod hierarchical;
mod hugging_face;
mod known;
mod open_clip;
mod side_file;
mod timm;

use serde_json::Value;

use super::plan::Plan;
use crate::backbone::{ConvNeXtNorm, MlpActivation, NormPlacement, Pooling};
use crate::error::Result;

pub(super) use hierarchical::{ToldSwin, last_norm_eps, told_of_convnext, told_of_swin};
pub(super) use known::{KnownConvNeXt, KnownViT};
pub(super) use side_file::SideFile;

/// The file of settings of Hugging Face and of timm.
pub(super) const CONFIG: &str = "config.json";

/// The file of settings of open_clip.
pub(super) const OPEN_CLIP_CONFIG: &str = "open_clip_config.json";

/// The settings of a model that a file beside its checkpoint tells.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Told {
    /// The name of the file, and in it what told the settings if that is not a field of its own.
    pub(super) source: String,
    pub(super) num_heads: Option<i64>,
    pub(super) norm_eps: Option<f64>,
    pub(super) activation: Option<MlpActivation>,
    pub(super) pooling: Option<Pooling>,
    pub(super) image_size: Option<(i64, i64)>,
    pub(super) norm_placement: Option<NormPlacement>,
    /// The norm of a ConvNeXt without biases in its norms.
    pub(super) norm: Option<ConvNeXtNorm>,
}

/// Reads the settings from the files beside the checkpoint of `plan`, a model of width `embed_dim`
/// (`None` if the model has no single width). All fields are `None` if there is no such file.
///
/// The file of the library whose names the checkpoint has comes first: a folder may hold the same
/// model under the names of several libraries, each with its own file.
///
/// # Errors
/// [`Error::CorruptFile`](crate::Error::CorruptFile) if a file is not valid JSON;
/// [`Error::FileField`](crate::Error::FileField) if the value of a field is not supported, or if
/// the file describes a model of another width.
pub(super) fn told(plan: &Plan, embed_dim: Option<i64>) -> Result<Told> {
    let checkpoint = plan.file.path();
    let config = || config_told(plan, embed_dim);
    let open_clip = || match SideFile::read(checkpoint, OPEN_CLIP_CONFIG)? {
        Some(file) => open_clip::told(&file, embed_dim),
        None => Ok(None),
    };
    let is_open_clip = plan.has_names_of("open_clip");
    let told = if is_open_clip { or_else(open_clip()?, config)? } else { config()? };
    Ok(told.unwrap_or_default())
}

/// Reads the settings that timm's or open_clip's file beside the checkpoint of `plan` tells of a
/// network without attention. Hugging Face's files tell the settings of other networks.
///
/// # Errors
/// The errors of [`told`].
pub(super) fn told_of_timm(plan: &Plan) -> Result<Told> {
    if plan.config()?.is_some_and(|file| !file.json["model_type"].is_null()) {
        return Ok(Told::default());
    }
    told(plan, None)
}

/// Reads the settings of the text tower of width `embed_dim` from the files beside the checkpoint of
/// `plan`.
///
/// # Errors
/// The errors of [`told`].
pub(super) fn told_of_text(plan: &Plan, embed_dim: i64) -> Result<Told> {
    let checkpoint = plan.file.path();
    let is_clip = |kind: &Value| kind.as_str().is_some_and(|kind| kind.starts_with("clip"));
    let config = || match plan.config()? {
        Some(file) if is_clip(&file.json["model_type"]) => {
            hugging_face::told_of_text(file, Some(embed_dim)).map(Some)
        }
        _ => Ok(None),
    };
    let open_clip = || match SideFile::read(checkpoint, OPEN_CLIP_CONFIG)? {
        Some(file) => open_clip::told_of_text(&file, Some(embed_dim)),
        None => Ok(None),
    };
    let is_open_clip = plan.family.name.starts_with("open_clip");
    let told = if is_open_clip { or_else(open_clip()?, config)? } else { config()? };
    Ok(told.unwrap_or_default())
}

fn or_else(first: Option<Told>, second: impl Fn() -> Result<Option<Told>>) -> Result<Option<Told>> {
    if first.is_some() { Ok(first) } else { second() }
}

fn config_told(plan: &Plan, embed_dim: Option<i64>) -> Result<Option<Told>> {
    match plan.config()? {
        Some(file) if !file.json["model_type"].is_null() => {
            hugging_face::told(file, embed_dim).map(Some)
        }
        Some(file) if !file.json["architecture"].is_null() => timm::told(file, embed_dim).map(Some),
        _ => Ok(None),
    }
}
