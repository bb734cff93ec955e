//! Reads the JSON files beside a checkpoint: `config.json` and `preprocessor_config.json` of
//! Hugging Face, and `config.json` of timm.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::backbone::{MlpActivation, Preprocessing, PreprocessingSource, Resampling, ResizeMode};
use crate::error::{Error, Result};

const CONFIG: &str = "config.json";
const PREPROCESSOR: &str = "preprocessor_config.json";

/// The settings of a plain ViT that `config.json` states and the tensors do not show.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Told {
    pub(super) num_heads: Option<i64>,
    pub(super) norm_eps: Option<f64>,
    pub(super) activation: Option<MlpActivation>,
    pub(super) image_size: Option<(i64, i64)>,
}

/// A JSON file in the folder of a checkpoint.
struct SideFiles {
    path: PathBuf,
    json: Value,
}

impl SideFiles {
    /// Reads the file `name` in the folder of `checkpoint`; returns `None` if there is no such
    /// file.
    fn read(checkpoint: &Path, name: &str) -> Result<Option<Self>> {
        let path = checkpoint.parent().unwrap_or(Path::new("")).join(name);
        let text = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(Error::io(&path))?,
        };
        let json =
            serde_json::from_slice(&text).map_err(|e| Error::corrupt(&path, e.to_string()))?;
        Ok(Some(SideFiles { path, json }))
    }

    fn field(&self, field: &str, expected: &str, found: &Value) -> Error {
        Error::FileField {
            file: self.path.clone(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: found.to_string(),
        }
    }

    /// Returns the number `object[key]`, or `None` if it is absent or null.
    fn number<T>(
        &self,
        object: &Value,
        key: &str,
        read: fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match &object[key] {
            Value::Null => Ok(None),
            value => read(value).map(Some).ok_or_else(|| self.field(key, "a number", value)),
        }
    }

    /// Returns the height and width in `object[key]`, which is a number, a pair, or an object with
    /// the keys `height` and `width`. Returns `None` if it is absent or null.
    fn size(&self, object: &Value, key: &str) -> Result<Option<(i64, i64)>> {
        let value = &object[key];
        let size = match value {
            Value::Null => return Ok(None),
            Value::Number(side) => side.as_i64().map(|side| (side, side)),
            Value::Array(pair) if pair.len() == 2 => pair[0].as_i64().zip(pair[1].as_i64()),
            _ => value["height"].as_i64().zip(value["width"].as_i64()),
        };
        match size {
            Some(size) if size.0 > 0 && size.1 > 0 => Ok(Some(size)),
            _ => Err(self.field(key, "a height and a width in pixels", value)),
        }
    }

    /// Returns the three numbers in `object[key]`, or `None` if it is absent or null.
    fn channels(&self, object: &Value, key: &str) -> Result<Option<[f32; 3]>> {
        let value = &object[key];
        if value.is_null() {
            return Ok(None);
        }
        let numbers = value.as_array().map(|list| list.iter().filter_map(Value::as_f64));
        let numbers: Vec<f32> = numbers.into_iter().flatten().map(|number| number as f32).collect();
        let channels = <[f32; 3]>::try_from(numbers).ok();
        channels.map(Some).ok_or_else(|| self.field(key, "three numbers", value))
    }
}

/// Reads the settings of a ViT from Hugging Face's `config.json` beside a checkpoint of width
/// `embed_dim`. All fields are `None` if there is no such file, or if the file is timm's.
///
/// # Errors
/// [`Error::CorruptFile`] if the file is not valid JSON; [`Error::FileField`] if the value of a
/// field is not supported, or if the file describes a model of another width.
pub(super) fn told(checkpoint: &Path, embed_dim: i64) -> Result<Told> {
    let Some(config) = SideFiles::read(checkpoint, CONFIG)? else { return Ok(Told::default()) };
    if config.json["model_type"].is_null() {
        return Ok(Told::default());
    }
    // A model with an image tower and a text tower keeps the image tower's settings in an object of
    // their own.
    let vision = &config.json["vision_config"];
    let tower = if vision.is_object() { vision } else { &config.json };
    let width = config.number(tower, "hidden_size", Value::as_i64)?;
    if width.is_some_and(|width| width != embed_dim) {
        let expected = format!("{embed_dim}, the width of the model in {}", checkpoint.display());
        return Err(config.field("hidden_size", &expected, &tower["hidden_size"]));
    }
    let activation = match &tower["hidden_act"] {
        Value::Null => None,
        name if name == "gelu" || name == "gelu_python" => Some(MlpActivation::Gelu),
        name if name == "quick_gelu" => Some(MlpActivation::QuickGelu),
        name => return Err(config.field("hidden_act", "gelu or quick_gelu", name)),
    };
    Ok(Told {
        num_heads: config.number(tower, "num_attention_heads", Value::as_i64)?,
        norm_eps: config.number(tower, "layer_norm_eps", Value::as_f64)?,
        activation,
        image_size: config.size(tower, "image_size")?,
    })
}

/// Returns the preprocessing that the files beside a checkpoint state, or `None` if they state
/// none. A value that the files leave out comes from `usual`. The image size is always that of
/// `usual`, which the backbone accepts; the resize is scaled to it.
///
/// # Errors
/// [`Error::CorruptFile`] if a file is not valid JSON; [`Error::FileField`] if the value of a field
/// is not supported.
pub(super) fn preprocessing(
    checkpoint: &Path,
    usual: &Preprocessing,
) -> Result<Option<Preprocessing>> {
    if let Some(file) = SideFiles::read(checkpoint, PREPROCESSOR)? {
        return hugging_face(&file, usual).map(Some);
    }
    match SideFiles::read(checkpoint, CONFIG)? {
        Some(file) if file.json["pretrained_cfg"].is_object() => timm(&file, usual).map(Some),
        _ => Ok(None),
    }
}

fn hugging_face(file: &SideFiles, usual: &Preprocessing) -> Result<Preprocessing> {
    let json = &file.json;
    let normalizes = json["do_normalize"].as_bool().unwrap_or(true);
    let (mean, std) = if normalizes {
        let mean = file.channels(json, "image_mean")?.unwrap_or(usual.mean);
        (mean, file.channels(json, "image_std")?.unwrap_or(usual.std))
    } else {
        ([0.0; 3], [1.0; 3])
    };
    let interpolation = match &json["resample"] {
        Value::Null => usual.interpolation,
        code if code == 2 => Resampling::Bilinear,
        code if code == 3 => Resampling::Bicubic,
        code => return Err(file.field("resample", "2 (bilinear) or 3 (bicubic)", code)),
    };
    let crops = json["do_center_crop"].as_bool().unwrap_or(!json["crop_size"].is_null());
    let shorter = match &json["size"] {
        size @ Value::Object(_) => size["shortest_edge"].as_i64(),
        size => size.as_i64().filter(|_| crops),
    };
    let resize = match (shorter, file.size(json, "crop_size")?) {
        (Some(shorter), Some(crop)) if crops => cropped(shorter, crop, usual),
        (Some(shorter), _) => cropped(shorter, (shorter, shorter), usual),
        _ => ResizeMode::Squash,
    };
    let source = PreprocessingSource::File(PREPROCESSOR.to_owned());
    Ok(Preprocessing { image_size: usual.image_size, resize, interpolation, mean, std, source })
}

fn timm(file: &SideFiles, usual: &Preprocessing) -> Result<Preprocessing> {
    let json = &file.json["pretrained_cfg"];
    let interpolation = match &json["interpolation"] {
        Value::Null => usual.interpolation,
        name if name == "bilinear" => Resampling::Bilinear,
        name if name == "bicubic" => Resampling::Bicubic,
        name => return Err(file.field("interpolation", "bilinear or bicubic", name)),
    };
    let crop = file.number(json, "crop_pct", Value::as_f64)?.unwrap_or(1.0);
    if !(crop > 0.0 && crop <= 1.0) {
        return Err(file.field("crop_pct", "above 0 and at most 1", &json["crop_pct"]));
    }
    let resize = if json["crop_mode"] == "squash" {
        ResizeMode::Squash
    } else {
        let side = usual.image_size.0.min(usual.image_size.1) as f64;
        ResizeMode::CenterCrop { shorter_side: (side / crop).floor() as i64 }
    };
    Ok(Preprocessing {
        image_size: usual.image_size,
        resize,
        interpolation,
        mean: file.channels(json, "mean")?.unwrap_or(usual.mean),
        std: file.channels(json, "std")?.unwrap_or(usual.std),
        source: PreprocessingSource::File(CONFIG.to_owned()),
    })
}

/// Returns a center crop to the backbone's image size, with the ratio of resize to crop that the
/// file states.
fn cropped(shorter: i64, crop: (i64, i64), usual: &Preprocessing) -> ResizeMode {
    let side = |(height, width): (i64, i64)| height.min(width);
    let ratio = shorter as f64 / side(crop) as f64;
    let shorter_side = (side(usual.image_size) as f64 * ratio.max(1.0)).round() as i64;
    ResizeMode::CenterCrop { shorter_side }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual() -> Preprocessing {
        Preprocessing {
            image_size: (224, 224),
            resize: ResizeMode::Squash,
            interpolation: Resampling::Bicubic,
            mean: [0.1; 3],
            std: [0.2; 3],
            source: PreprocessingSource::Family("ViT".to_owned()),
        }
    }

    /// Returns the path of a checkpoint in a new folder that holds one file with this name and
    /// text.
    fn beside(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), text).unwrap();
        let checkpoint = folder.path().join("model.safetensors");
        (folder, checkpoint)
    }

    #[test]
    fn hugging_face_configs_tell_what_tensors_cannot() {
        let text = r#"{"model_type": "clip", "vision_config": {"hidden_size": 128, "hidden_act":
            "quick_gelu", "num_attention_heads": 2, "layer_norm_eps": 1e-5, "image_size": 64}}"#;
        let (_folder, checkpoint) = beside(CONFIG, text);
        let expected = Told {
            num_heads: Some(2),
            norm_eps: Some(1e-5),
            activation: Some(MlpActivation::QuickGelu),
            image_size: Some((64, 64)),
        };
        assert_eq!(told(&checkpoint, 128).unwrap(), expected);
        let error = told(&checkpoint, 64).unwrap_err().to_string();
        assert!(error.contains("hidden_size") && error.contains("128"), "{error}");
    }

    #[test]
    fn an_activation_that_is_not_supported_is_an_error() {
        let (_folder, checkpoint) =
            beside(CONFIG, r#"{"model_type": "siglip", "hidden_act": "gelu_pytorch_tanh"}"#);
        let error = told(&checkpoint, 64).unwrap_err().to_string();
        assert!(error.contains("hidden_act") && error.contains("gelu_pytorch_tanh"), "{error}");
        let (_folder, checkpoint) = beside(CONFIG, "{");
        assert!(matches!(told(&checkpoint, 64), Err(Error::CorruptFile { .. })));
    }

    #[test]
    fn preprocessing_is_read_from_both_kinds_of_file() {
        let clip = r#"{"crop_size": {"height": 224, "width": 224}, "do_center_crop": true,
            "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1], "resample": 3,
            "size": {"shortest_edge": 224}}"#;
        let (_folder, checkpoint) = beside(PREPROCESSOR, clip);
        let found = preprocessing(&checkpoint, &usual()).unwrap().unwrap();
        assert_eq!(found.resize, ResizeMode::CenterCrop { shorter_side: 224 });
        assert_eq!((found.mean, found.std), ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1]));

        let vit =
            r#"{"size": {"height": 224, "width": 224}, "resample": 2, "do_normalize": false}"#;
        let (_folder, checkpoint) = beside(PREPROCESSOR, vit);
        let found = preprocessing(&checkpoint, &usual()).unwrap().unwrap();
        assert_eq!((found.resize, found.interpolation), (ResizeMode::Squash, Resampling::Bilinear));
        assert_eq!((found.mean, found.std), ([0.0; 3], [1.0; 3]));

        let timm = r#"{"architecture": "vit_base_patch16_224", "pretrained_cfg": {"crop_pct": 0.9,
            "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}"#;
        let (_folder, checkpoint) = beside(CONFIG, timm);
        let found = preprocessing(&checkpoint, &usual()).unwrap().unwrap();
        assert_eq!(found.resize, ResizeMode::CenterCrop { shorter_side: 248 });
        assert_eq!(found.source, PreprocessingSource::File(CONFIG.to_owned()));

        let (_folder, checkpoint) = beside("other.json", "{}");
        assert_eq!(preprocessing(&checkpoint, &usual()).unwrap(), None);
    }
}
