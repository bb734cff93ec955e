//! The settings in `open_clip_config.json`.

use serde_json::Value;

use super::{OPEN_CLIP_CONFIG, SideFile, Told, timm};
use crate::backbone::{MlpActivation, Pooling};
use crate::error::Result;

/// The width of an image tower if the file does not give it.
const WIDTH: i64 = 768;

/// The width of a head if the file does not give it.
const HEAD_WIDTH: i64 = 64;

/// The epsilon of PyTorch's layer norm, which open_clip uses.
const NORM_EPS: f64 = 1e-5;

/// Options of the image tower that change its features and are not supported. Each must be absent,
/// null or false.
const UNSUPPORTED: [&str; 7] = [
    "attentional_pool",
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
    "scale_fc",
];

/// Reads the settings of the image tower. Returns `None` if the file describes none. `embed_dim` is
/// the width of the model in the checkpoint, if it has a single one.
pub(super) fn told(file: &SideFile, embed_dim: Option<i64>) -> Result<Option<Told>> {
    let model = model_of(file);
    let tower = &model["vision_cfg"];
    if !tower.is_object() {
        return Ok(None);
    }
    if let Some(name) = tower["timm_model_name"].as_str() {
        let pool = tower["timm_pool"].as_str().unwrap_or("avg");
        let told = timm::of_architecture(file, name, "timm_pool", pool)?;
        let image_size = file.size(tower, "image_size")?;
        return Ok(Some(Told { source: source(Some(name)), image_size, ..told }));
    }
    if let Some(field) = UNSUPPORTED.into_iter().find(|&field| is_set(&tower[field])) {
        return Err(file.field(field, "false", &tower[field]));
    }
    let width = file.width(tower, "width", Some(WIDTH), embed_dim)?.unwrap_or(WIDTH);
    let head_width = file.number(tower, "head_width", Value::as_i64)?.unwrap_or(HEAD_WIDTH);
    let num_heads = (width.checked_div(head_width))
        .ok_or_else(|| file.field("head_width", "above 0", &tower["head_width"]))?;
    let eps = file.number(&tower["norm_kwargs"], "eps", Value::as_f64)?;
    Ok(Some(Told {
        source: source(None),
        num_heads: Some(num_heads),
        norm_eps: Some(eps.unwrap_or(NORM_EPS)),
        activation: Some(activation(file, model, tower)?),
        pooling: Some(pooling(file, tower)?),
        image_size: file.size(tower, "image_size")?,
        ..Told::default()
    }))
}

/// Reads the settings of the text tower. Returns `None` if the file describes none, or one of
/// another library.
pub(super) fn told_of_text(file: &SideFile, embed_dim: Option<i64>) -> Result<Option<Told>> {
    let model = model_of(file);
    let tower = &model["text_cfg"];
    if !tower.is_object() || !tower["hf_model_name"].is_null() {
        return Ok(None);
    }
    file.width(tower, "width", Some(512), embed_dim)?;
    let eps = file.number(&tower["norm_kwargs"], "eps", Value::as_f64)?;
    Ok(Some(Told {
        source: source(None),
        num_heads: Some(file.number(tower, "heads", Value::as_i64)?.unwrap_or(8)),
        norm_eps: Some(eps.unwrap_or(NORM_EPS)),
        activation: Some(activation(file, model, tower)?),
        ..Told::default()
    }))
}

/// Returns the object of the model. The file that goes with the weights has it under `model_cfg`; a
/// bare model config of open_clip is that object itself.
fn model_of(file: &SideFile) -> &Value {
    match &file.json["model_cfg"] {
        model @ Value::Object(_) => model,
        _ => &file.json,
    }
}

fn source(timm_name: Option<&str>) -> String {
    match timm_name {
        Some(name) => format!("{OPEN_CLIP_CONFIG}, timm_model_name {name}"),
        None => OPEN_CLIP_CONFIG.to_owned(),
    }
}

fn is_set(value: &Value) -> bool {
    !(value.is_null() || value == false)
}

fn activation(file: &SideFile, model: &Value, tower: &Value) -> Result<MlpActivation> {
    let options = &tower["act_kwargs"];
    let approximate = &options["approximate"];
    match (model["quick_gelu"] == true, options.as_object().is_some_and(|o| !o.is_empty())) {
        (true, false) => Ok(MlpActivation::QuickGelu),
        (false, false) => Ok(MlpActivation::Gelu),
        (false, true) if approximate == "tanh" => Ok(MlpActivation::GeluTanh),
        (false, true) if approximate == "none" => Ok(MlpActivation::Gelu),
        _ => Err(file.field(
            "act_kwargs",
            "{\"approximate\": \"tanh\"}, without quick_gelu",
            options,
        )),
    }
}

fn pooling(file: &SideFile, tower: &Value) -> Result<Pooling> {
    let norm_last = tower["final_ln_after_pool"] == true;
    match &tower["pool_type"] {
        Value::Null => Ok(Pooling::ClassToken),
        kind if kind == "tok" => Ok(Pooling::ClassToken),
        kind if kind == "avg" && norm_last => Ok(Pooling::AverageThenNorm),
        kind if kind == "avg" => Ok(Pooling::Average),
        kind => Err(file.field("pool_type", "tok or avg", kind)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    fn read(model: Value) -> Result<Option<Told>> {
        let json = json!({ "model_cfg": model });
        told(&SideFile { path: PathBuf::from(OPEN_CLIP_CONFIG), json }, Some(1280))
    }

    #[test]
    fn the_tower_tells_heads_activation_and_pooling() {
        let tower = json!({"width": 1280, "head_width": 80, "image_size": 224, "no_ln_pre": true,
            "pool_type": "avg", "final_ln_after_pool": true});
        let found = read(json!({"vision_cfg": tower, "quick_gelu": true})).unwrap().unwrap();
        assert_eq!((found.num_heads, found.norm_eps), (Some(16), Some(1e-5)));
        assert_eq!(found.activation, Some(MlpActivation::QuickGelu));
        assert_eq!(found.pooling, Some(Pooling::AverageThenNorm));

        let tower = json!({"width": 1280, "act_kwargs": {"approximate": "tanh"},
            "norm_kwargs": {"eps": 1e-6}});
        let found = read(json!({ "vision_cfg": tower })).unwrap().unwrap();
        assert_eq!((found.num_heads, found.norm_eps), (Some(20), Some(1e-6)));
        assert_eq!(found.activation, Some(MlpActivation::GeluTanh));
        assert_eq!(found.pooling, Some(Pooling::ClassToken));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (tower, field) in [
            (json!({"width": 1280, "pool_type": "none"}), "pool_type"),
            (json!({"width": 1280, "head_width": 0}), "head_width"),
            (json!({"width": 1280, "attentional_pool": true}), "attentional_pool"),
            (json!({"width": 1280, "act_kwargs": {"approximate": "erf"}}), "act_kwargs"),
            (json!({"width": 768}), "width"),
        ] {
            let error = read(json!({ "vision_cfg": tower })).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }
}
