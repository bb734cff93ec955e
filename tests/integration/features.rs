//! Features of every checkpoint family against timm, transformers and open_clip.

use std::error::Error;

use convpass::{
    Backbone, ConvNeXtConfig, Error as ConvpassError, FrozenConvNeXt, FrozenSwin, FrozenViT,
    SwinConfig, ViTConfig,
};
use tch::{Device, Tensor};

use crate::golden::{AnyFrozen, Case, cases, check_all};

fn check(case: &Case) -> Result<(), Box<dyn Error>> {
    let vit: FrozenViT = case.open(&case.file("file"))?;
    let features = vit.features(case.tensor("images"))?;
    case.compare("features", &features)?;
    if case.tensors.contains_key("image_embeds") {
        case.compare("image_embeds", &vit.project(&features)?)?;
    }
    Ok(())
}

#[test]
fn timm() {
    check_all("timm_vit", check);
}

#[test]
fn google_npz() {
    check_all("google_npz", check);
}

#[test]
fn hugging_face_vit() {
    check_all("hf_vit", check);
}

#[test]
fn hugging_face_clip() {
    check_all("clip_vision", check);
}

#[test]
fn hugging_face_dinov2() {
    check_all("dinov2_hf", check);
}

#[test]
fn open_clip() {
    check_all("open_clip", check);
}

fn check_any<B: AnyFrozen>(case: &Case) -> Result<(), Box<dyn Error>> {
    let backbone: B = case.open(&case.file("file"))?;
    Ok(case.compare("features", &backbone.features(case.tensor("images")))?)
}

#[test]
fn swin() {
    check_all("swin", check_any::<FrozenSwin>);
}

#[test]
fn convnext() {
    check_all("convnext", check_any::<FrozenConvNeXt>);
}

/// A file of one family opened as another says which it is of.
#[test]
fn another_family_is_named() {
    let file = |family: &str| {
        let case = cases(family).remove(0);
        case.file("file")
    };
    let (vit, swin, convnext) = (file("timm_vit"), file("swin"), file("convnext"));
    let errors = [
        (FrozenViT::open(&swin, Device::Cpu).unwrap_err(), &swin, "ViT", "Swin"),
        (FrozenSwin::open(&vit, Device::Cpu).unwrap_err(), &vit, "Swin", "ViT"),
        (SwinConfig::infer(&convnext).unwrap_err(), &convnext, "Swin", "ConvNeXt"),
        (ConvNeXtConfig::infer(&vit).unwrap_err(), &vit, "ConvNeXt", "ViT"),
    ];
    for (error, path, wanted, is) in errors {
        let text = error.to_string();
        let fits = matches!(&error, ConvpassError::OtherBackbone { file, expected, found }
            if file == path && *expected == wanted && *found == is);
        assert!(fits, "{text}");
    }
}

/// The size of the position table of a timm file of `stored` opened at another image size.
fn positions_at(stored: &ViTConfig, image_size: (i64, i64)) -> i64 {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let backbone = FrozenViT::random(stored, 0, Device::Cpu).unwrap();
    Tensor::write_safetensors(backbone.named_weights(), &path).unwrap();
    let config = ViTConfig { image_size, ..ViTConfig::infer(&path).unwrap() };
    let opened = FrozenViT::open_with(&path, &config, Device::Cpu).unwrap();
    let table = opened.named_weights().iter().find(|(name, _)| name == "pos_embed");
    table.unwrap().1.size()[1]
}

/// 16 rows are 4x4 patches, or 3x5 and a class token: which, the family and the grid must say.
#[test]
fn a_position_table_is_read_for_the_grid_it_was_made_for() {
    let vit = ViTConfig {
        patch_size: 4,
        embed_dim: 64,
        depth: 1,
        num_heads: 1,
        mlp_dim: 64,
        ..ViTConfig::default()
    };
    let at = |rows: i64, cols: i64| (4 * rows, 4 * cols);
    let with_class = ViTConfig { image_size: at(3, 5), ..vit.clone() };
    assert_eq!(positions_at(&with_class, at(3, 5)), 1 + 15);
    let registers =
        ViTConfig { image_size: at(4, 4), num_registers: 4, pos_embed_prefix: 0, ..vit.clone() };
    assert_eq!(positions_at(&registers, at(3, 5)), 15);
    let square = ViTConfig { image_size: at(7, 7), ..vit };
    assert_eq!(positions_at(&square, at(5, 10)), 1 + 50);
}
