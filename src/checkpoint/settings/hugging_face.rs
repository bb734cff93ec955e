//! The settings in Hugging Face's `config.json`.

use serde_json::Value;

use super::activations::activation;
use super::{CONFIG, SideFile, Told};
use crate::backbone::MlpActivation::{self, Gelu, GeluTanh, QuickGelu, Silu};
use crate::backbone::Pooling;
use crate::error::Result;

/// What the config class of a model type assumes for a field that the file leaves out.
struct Defaults {
    model_type: &'static str,
    hidden_size: i64,
    num_heads: i64,
    norm_eps: f64,
    activation: MlpActivation,
}

const fn defaults(model_type: &'static str, norm_eps: f64, activation: MlpActivation) -> Defaults {
    Defaults { model_type, hidden_size: 768, num_heads: 12, norm_eps, activation }
}

/// The defaults of the config classes of transformers 4 and 5.
const DEFAULTS: [Defaults; 17] = [
    defaults("vit", 1e-12, Gelu),
    defaults("vit_mae", 1e-12, Gelu),
    defaults("vit_msn", 1e-6, Gelu),
    defaults("ijepa", 1e-12, Gelu),
    defaults("deit", 1e-12, Gelu),
    defaults("clip", 1e-5, QuickGelu),
    defaults("clip_vision_model", 1e-5, QuickGelu),
    Defaults { hidden_size: 512, num_heads: 8, ..defaults("clip_text_model", 1e-5, QuickGelu) },
    defaults("dinov2", 1e-6, Gelu),
    defaults("dinov2_with_registers", 1e-6, Gelu),
    Defaults { hidden_size: 384, num_heads: 6, ..defaults("dinov3_vit", 1e-5, Gelu) },
    defaults("beit", 1e-12, Gelu),
    defaults("data2vec-vision", 1e-12, Gelu),
    Defaults { hidden_size: 1024, num_heads: 8, ..defaults("aimv2", 1e-5, Silu) },
    Defaults { hidden_size: 1024, num_heads: 8, ..defaults("aimv2_vision_model", 1e-5, Silu) },
    defaults("siglip", 1e-6, GeluTanh),
    defaults("siglip_vision_model", 1e-6, GeluTanh),
];

/// The classes whose classifier reads other features than the model type's usual ones.
const POOLINGS: [(&str, Pooling); 5] = [
    ("Dinov2ForImageClassification", Pooling::ClassTokenAndAverage),
    ("Dinov2WithRegistersForImageClassification", Pooling::ClassTokenAndAverage),
    ("DINOv3ViTForImageClassification", Pooling::ClassTokenAndAverage),
    ("SiglipForImageClassification", Pooling::Average),
    ("DeiTForImageClassificationWithTeacher", Pooling::ClassAndDistillation),
];

/// Reads the settings. `embed_dim` is the width of the model in the checkpoint, if it has a single
/// one.
pub(super) fn told(file: &SideFile, embed_dim: Option<i64>) -> Result<Told> {
    // A model with an image tower and a text tower keeps the image tower's settings in an object of
    // their own.
    let vision = &file.json["vision_config"];
    let tower = if vision.is_object() { vision } else { &file.json };
    let model_type = [tower, &file.json].map(|object| &object["model_type"]);
    let usual = model_type.into_iter().find_map(defaults_of);
    let pooling = pooling(&file.json["architectures"]);
    Ok(Told { pooling, ..tower_told(file, tower, usual, embed_dim)? })
}

/// Reads the settings of the text tower of a CLIP.
pub(super) fn told_of_text(file: &SideFile, embed_dim: Option<i64>) -> Result<Told> {
    let text = &file.json["text_config"];
    let tower = if text.is_object() { text } else { &file.json };
    tower_told(file, tower, defaults_of(&"clip_text_model".into()), embed_dim)
}

fn defaults_of(model_type: &Value) -> Option<&'static Defaults> {
    DEFAULTS.iter().find(|usual| model_type == usual.model_type)
}

fn tower_told(
    file: &SideFile,
    tower: &Value,
    usual: Option<&Defaults>,
    embed_dim: Option<i64>,
) -> Result<Told> {
    file.width(tower, "hidden_size", usual.map(|usual| usual.hidden_size), embed_dim)?;
    let heads = file.number(tower, "num_attention_heads", Value::as_i64)?;
    let mut eps = file.number(tower, "layer_norm_eps", Value::as_f64)?;
    if eps.is_none() {
        eps = file.number(tower, "rms_norm_eps", Value::as_f64)?;
    }
    let activation = activation(file, tower, "hidden_act")?;
    let is_aimv2 = usual.is_some_and(|usual| usual.model_type.starts_with("aimv2"));
    if is_aimv2 && activation.is_some_and(|activation| activation != Silu) {
        return Err(file.field("hidden_act", "silu in an AIMv2", &tower["hidden_act"]));
    }
    Ok(Told {
        source: CONFIG.to_owned(),
        num_heads: heads.or(usual.map(|usual| usual.num_heads)),
        norm_eps: eps.or(usual.map(|usual| usual.norm_eps)),
        activation: activation.or(usual.map(|usual| usual.activation)),
        image_size: file.size(tower, "image_size")?,
        ..Told::default()
    })
}

fn pooling(architectures: &Value) -> Option<Pooling> {
    let [class] = architectures.as_array().map_or(&[][..], Vec::as_slice) else { return None };
    POOLINGS.iter().find(|(name, _)| class == name).map(|(_, pooling)| *pooling)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    fn read(json: Value, embed_dim: i64) -> Result<Told> {
        told(&SideFile { path: PathBuf::from(CONFIG), json }, Some(embed_dim))
    }

    #[test]
    fn the_image_towers_object_tells_its_settings() {
        let json = json!({"model_type": "clip", "vision_config": {"hidden_size": 128,
            "hidden_act": "quick_gelu", "num_attention_heads": 2, "layer_norm_eps": 1e-4,
            "image_size": [64, 32]}});
        let expected = Told {
            source: CONFIG.to_owned(),
            num_heads: Some(2),
            norm_eps: Some(1e-4),
            activation: Some(QuickGelu),
            image_size: Some((64, 32)),
            ..Told::default()
        };
        assert_eq!(read(json.clone(), 128).unwrap(), expected);
        let error = read(json, 64).unwrap_err().to_string();
        assert!(error.contains("hidden_size") && error.contains("128"), "{error}");
    }

    #[test]
    fn a_field_that_is_left_out_has_the_default_of_its_class() {
        for (model_type, eps, act) in [("vit_msn", 1e-6, Gelu), ("vit", 1e-12, Gelu)] {
            let found = read(json!({"model_type": model_type}), 768).unwrap();
            assert_eq!(found.norm_eps, Some(eps), "{model_type}");
            assert_eq!((found.num_heads, found.activation), (Some(12), Some(act)), "{model_type}");
        }
        let clip = json!({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}});
        let found = read(clip, 768).unwrap();
        assert_eq!((found.norm_eps, found.activation), (Some(1e-5), Some(Gelu)));
    }

    #[test]
    fn the_epsilon_of_rms_norms_is_read_and_the_gate_must_be_silu() {
        let aimv2 = json!({"model_type": "aimv2", "vision_config": {"rms_norm_eps": 1e-4}});
        let found = read(aimv2, 1024).unwrap();
        assert_eq!((found.num_heads, found.norm_eps), (Some(8), Some(1e-4)));
        let gelu = json!({"model_type": "aimv2_vision_model", "hidden_act": "gelu"});
        let error = read(gelu, 1024).unwrap_err().to_string();
        assert!(error.contains("hidden_act") && error.contains("silu"), "{error}");
    }

    #[test]
    fn activations_are_read_by_the_librarys_names() {
        for (name, expected) in [
            ("gelu_new", Some(MlpActivation::GeluTanh)),
            ("gelu_pytorch_tanh", Some(MlpActivation::GeluTanh)),
            ("relu", Some(MlpActivation::Relu)),
            ("mish", None),
        ] {
            let found = read(json!({"model_type": "vit", "hidden_act": name}), 768);
            match expected {
                Some(expected) => assert_eq!(found.unwrap().activation, Some(expected)),
                None => {
                    let error = found.unwrap_err().to_string();
                    assert!(error.contains("hidden_act") && error.contains(name), "{error}");
                }
            }
        }
    }
}
