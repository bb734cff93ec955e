//! Features of every checkpoint family against timm, transformers and open_clip.

use std::error::Error;

use convpass::backbone::Forward;
use convpass::backbone::Pass;
use convpass::checkpoint::TensorFile;
use convpass::petl::SsfConfig;
use convpass::{
    Backbone, ConvNeXtConfig, Error as ConvpassError, FrozenConvNeXt, FrozenSwin, FrozenViT,
    Method, PetlConfig, PetlModel, Seam, SwinConfig, TokenLayout, ViTConfig,
};
use tch::{Kind, Tensor};

use crate::golden::{AnyFrozen, Case, cases, check_all, difference};
use crate::support::{BF16_TOLERANCE, F16_TOLERANCE, device};

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
fn dinov3() {
    check_all("dinov3", check);
}

#[test]
fn siglip() {
    check_all("siglip", check);
}

/// EVA, EVA-02, RoPE-ViT, Perception Encoder and BEiT-3.
#[test]
fn timm_eva() {
    check_all("timm_eva", check);
}

#[test]
fn beit() {
    check_all("beit", check);
}

#[test]
fn aimv2() {
    check_all("aimv2", check);
}

/// DeiT with a distillation token, DeiT-III and MAE.
#[test]
fn deit() {
    check_all("deit", check);
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

/// timm's, Microsoft's, Hugging Face's and torchvision's names.
#[test]
fn swin_v2() {
    check_all("swin_v2", check_any::<FrozenSwin>);
}

/// ConvNeXt V2, and ConvNeXts with another stem, norm or head.
#[test]
fn convnext_v2() {
    check_all("convnext_v2", check_any::<FrozenConvNeXt>);
}

/// timm's ViT with norms after the sub-layers.
#[test]
fn post_norm() {
    check_all("post_norm", check);
}

#[test]
fn convnext() {
    check_all("convnext", check_any::<FrozenConvNeXt>);
}

#[test]
fn torchvision() {
    check_all("torchvision", |case| match case.name.as_str() {
        "swin" | "swin_padded" => check_any::<FrozenSwin>(case),
        "convnext" => check_any::<FrozenConvNeXt>(case),
        _ => check(case),
    });
}

#[test]
fn hugging_face_swin_and_convnext() {
    check_all("hf_hierarchical", |case| {
        if case.name.starts_with("swin") {
            check_any::<FrozenSwin>(case)
        } else {
            check_any::<FrozenConvNeXt>(case)
        }
    });
}

/// The features of a family in bf16 and f16 against the golden ones. A norm after a sub-layer, as
/// Swin V2 has it, enlarges its small output together with the error.
fn check_rounded<B: AnyFrozen>(family: &str) {
    let enlarged = if family == "swin_v2" { 4.0 } else { 1.0 };
    check_all(family, |case| {
        let exact: B = case.open(&case.file("file"))?;
        for (kind, tolerance) in [(Kind::BFloat16, BF16_TOLERANCE), (Kind::Half, F16_TOLERANCE)] {
            let found = exact.to_kind(kind)?.features(case.tensor("images"));
            let off = difference(&found, case.tensor("features"));
            if off.is_nan() || off > tolerance * enlarged {
                return Err(format!("{kind:?}: off by {off:.2e} relative").into());
            }
        }
        Ok::<_, Box<dyn Error>>(())
    });
}

#[test]
fn every_family_in_bf16_and_f16() {
    let vits = ["timm_vit", "google_npz", "hf_vit", "clip_vision", "dinov2_hf", "dinov3", "siglip"];
    let others = ["timm_eva", "beit", "aimv2", "deit", "open_clip", "post_norm"];
    vits.into_iter().chain(others).for_each(check_rounded::<FrozenViT>);
    ["swin", "swin_v2"].into_iter().for_each(check_rounded::<FrozenSwin>);
    ["convnext", "convnext_v2"].into_iter().for_each(check_rounded::<FrozenConvNeXt>);
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
        (FrozenViT::open(&swin, device()).unwrap_err(), &swin, "ViT", "Swin"),
        (FrozenSwin::open(&vit, device()).unwrap_err(), &vit, "Swin", "ViT"),
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
    let backbone = FrozenViT::random(stored, 0, device()).unwrap();
    Tensor::write_safetensors(backbone.named_weights(), &path).unwrap();
    let config = ViTConfig { image_size, ..ViTConfig::infer(&path).unwrap() };
    let opened = FrozenViT::open_with(&path, &config, device()).unwrap();
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

/// A seam that adds a prompt, as no method does beside a Swin.
#[derive(Debug)]
struct Prompt;

impl Seam for Prompt {
    fn entering(
        &self,
        _: usize,
        tokens: Tensor,
        layout: TokenLayout,
        _: bool,
    ) -> convpass::Result<(Tensor, TokenLayout)> {
        let prompt = tokens.narrow(1, 0, 1);
        let layout = TokenLayout { prefix: layout.prefix + 1, ..layout };
        Ok((Tensor::cat(&[&prompt, &tokens], 1), layout))
    }
}

#[test]
fn windows_refuse_prefix_tokens() {
    let swin = FrozenSwin::random(&small_swin(), 0, device()).unwrap();
    let images = Tensor::zeros([1, 3, 12, 20], (Kind::Float, device()));
    let error = swin.forward(&images, &Prompt, Pass::default()).unwrap_err();
    assert!(matches!(&error, ConvpassError::Config { field, .. } if field == "layout"), "{error}");
}

fn small_swin() -> SwinConfig {
    SwinConfig {
        image_size: (12, 20),
        embed_dim: 8,
        depths: vec![2, 2],
        num_heads: vec![1, 2],
        window_sizes: vec![(2, 2), (2, 2)],
        ..SwinConfig::default()
    }
}

/// What a method was folded into is a file like any other.
#[test]
fn a_merged_swin_comes_back_from_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("merged.safetensors");
    let config = SwinConfig { qkv_bias: false, ..small_swin() };
    let backbone = FrozenSwin::random(&config, 0, device()).unwrap();
    let method = Method::Ssf(SsfConfig::default());
    let model = PetlModel::new(backbone, &PetlConfig::new(method, 3)).unwrap();
    let merged = model.merged_backbone().unwrap();
    Tensor::write_safetensors(merged.named_weights(), &path).unwrap();
    let config = SwinConfig { image_size: (12, 20), ..SwinConfig::infer(&path).unwrap() };
    let opened = FrozenSwin::open_with(&path, &config, device()).unwrap();
    assert_eq!(opened.config(), merged.config());
    assert_eq!(opened.digest(), merged.digest());
}

/// Each tensor of a file left out, of another rank, empty or larger: opened or refused, and
/// refused where it is left out.
fn spoil<B: AnyFrozen>(family: &str, name: &str) {
    let case = cases(family).into_iter().find(|case| case.name == name).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spoilt.safetensors");
    let file = TensorFile::open(case.file("file")).unwrap();
    let tensors: Vec<(String, Tensor)> =
        file.names().filter_map(|name| Some((name.to_owned(), file.tensor(name).ok()?))).collect();
    let write =
        |tensors: Vec<(String, Tensor)>| Tensor::write_safetensors(&tensors, &path).unwrap();
    let edits: [fn(&Tensor) -> Tensor; 4] = [
        |t| t.unsqueeze(-1),
        |t| t.narrow(0, 0, 0),
        |t| Tensor::cat(&[t, t, t], 0),
        |t| t.flatten(0, -1).narrow(0, 0, 1),
    ];
    for (at, (name, _)) in tensors.iter().enumerate() {
        let with = |changed: Option<Tensor>| {
            let mut tensors =
                tensors.iter().map(|(n, t)| (n.clone(), t.copy())).collect::<Vec<_>>();
            match changed {
                Some(tensor) => tensors[at].1 = tensor.contiguous(),
                None => drop(tensors.remove(at)),
            }
            tensors
        };
        for edit in edits {
            write(with(Some(edit(&tensors[at].1))));
            let _read_or_refused =
                (B::open(&path), B::open_with(&path, &B::infer(&case.file("file")).unwrap()));
        }
        write(with(None));
        let head = name.starts_with("head.") && !name.starts_with("head.norm");
        let bias = name.ends_with("qkv.bias") || name.ends_with("gamma");
        let buffer = name.ends_with("attn_mask") || name.ends_with("relative_coords_table");
        assert!(head || bias || buffer || B::open(&path).is_err(), "{family} without {name}");
    }
}

#[test]
fn spoilt_files_are_read_or_refused() {
    spoil::<FrozenSwin>("swin", "another_image");
    spoil::<FrozenSwin>("swin_v2", "microsoft");
    spoil::<FrozenConvNeXt>("convnext", "conv_mlp");
    spoil::<FrozenConvNeXt>("convnext_v2", "v2");
    spoil::<FrozenConvNeXt>("convnext_v2", "overlapping");
}
