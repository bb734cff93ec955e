//! Reads the preprocessing from the files beside a checkpoint: `preprocessor_config.json` of Hugging
//! Face, `config.json` of timm, `open_clip_config.json`.

use std::path::Path;

use serde_json::Value;

use super::settings::{CONFIG, OPEN_CLIP_CONFIG, SideFile};
use crate::backbone::{Preprocessing, PreprocessingSource, Resampling, ResizeMode};
use crate::error::Result;
use crate::preprocessing::CLIP;

pub(super) const PREPROCESSOR: &str = "preprocessor_config.json";

/// Returns the preprocessing that the files beside a checkpoint state, or `None` if they state
/// none. A value that the files leave out comes from `usual`. The image size is always that of
/// `usual`, which the backbone accepts; the resize is scaled to it.
///
/// # Errors
/// [`Error::CorruptFile`](crate::Error::CorruptFile) if a file is not valid JSON;
/// [`Error::FileField`](crate::Error::FileField) if the value of a field
/// is not supported.
pub(super) fn preprocessing(
    checkpoint: &Path,
    usual: &Preprocessing,
) -> Result<Option<Preprocessing>> {
    if let Some(file) = SideFile::read(checkpoint, PREPROCESSOR)? {
        return hugging_face(&file, usual).map(Some);
    }
    match SideFile::read(checkpoint, CONFIG)? {
        Some(file) if file.json["pretrained_cfg"].is_object() => timm(&file, usual).map(Some),
        _ => match SideFile::read(checkpoint, OPEN_CLIP_CONFIG)? {
            Some(file) => open_clip(&file, usual).map(Some),
            None => Ok(None),
        },
    }
}

fn open_clip(file: &SideFile, usual: &Preprocessing) -> Result<Preprocessing> {
    let json = &file.json["preprocess_cfg"];
    let interpolation = interpolation(file, json, Resampling::Bicubic)?;
    let (height, width) = usual.image_size;
    let resize = match &json["resize_mode"] {
        mode if mode.is_null() || mode == "shortest" => {
            ResizeMode::CenterCrop { shorter_side: height.min(width) }
        }
        mode if mode == "squash" => ResizeMode::Squash,
        mode => return Err(file.field("resize_mode", "shortest or squash", mode)),
    };
    Ok(Preprocessing {
        image_size: usual.image_size,
        resize,
        interpolation,
        mean: file.channels(json, "mean")?.unwrap_or(CLIP.0),
        std: file.channels(json, "std")?.unwrap_or(CLIP.1),
        orientation: usual.orientation,
        source: PreprocessingSource::File(OPEN_CLIP_CONFIG.to_owned()),
    })
}

fn hugging_face(file: &SideFile, usual: &Preprocessing) -> Result<Preprocessing> {
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
    Ok(Preprocessing { resize, interpolation, mean, std, source, ..usual.clone() })
}

fn timm(file: &SideFile, usual: &Preprocessing) -> Result<Preprocessing> {
    let json = &file.json["pretrained_cfg"];
    let interpolation = interpolation(file, json, usual.interpolation)?;
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
        orientation: usual.orientation,
        source: PreprocessingSource::File(CONFIG.to_owned()),
    })
}

/// Returns the interpolation that timm and open_clip name in `object`, or `usual` if there is none.
fn interpolation(file: &SideFile, object: &Value, usual: Resampling) -> Result<Resampling> {
    match &object["interpolation"] {
        Value::Null => Ok(usual),
        name if name == "bilinear" => Ok(Resampling::Bilinear),
        name if name == "bicubic" => Ok(Resampling::Bicubic),
        name => Err(file.field("interpolation", "bilinear or bicubic", name)),
    }
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
    use std::path::PathBuf;

    use super::*;

    fn usual() -> Preprocessing {
        Preprocessing {
            image_size: (224, 224),
            resize: ResizeMode::Squash,
            interpolation: Resampling::Bicubic,
            mean: [0.1; 3],
            std: [0.2; 3],
            orientation: Default::default(),
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
