//! Settings that no tensor shows: from the files beside the weights, from known shapes, from the
//! caller, and refused where nothing tells them.

use std::path::{Path, PathBuf};

use convpass::backbone::{
    ClipTextConfig, ConvNeXtNorm, MlpActivation, Network, NormPlacement, Pooling,
};
use convpass::checkpoint::{LoadReport, SettingSource};
use convpass::{AnyBackbone, Error, FrozenViT, OpenOptions, ViTConfig};
use tch::{Kind, Tensor};

use crate::golden::{Case, cases, check_all};
use crate::support::device;

fn folder_of(case: &Case) -> PathBuf {
    case.file("file").parent().unwrap().to_path_buf()
}

fn compare(case: &Case, backbone: &AnyBackbone) -> Result<(), String> {
    case.compare("features", &backbone.features(case.tensor("images")).unwrap())
}

#[test]
fn the_file_beside_the_weights_tells_the_settings() {
    check_all("told", |case| {
        let image_size = case.facts.contains_key("fed").then(|| case.fact("fed"));
        let options = OpenOptions { image_size, ..OpenOptions::default() };
        for source in [folder_of(case), case.file("file")] {
            let backbone =
                AnyBackbone::open_with(&source, &options, device()).map_err(|e| e.to_string())?;
            compare(case, &backbone)?;
        }
        Ok::<(), String>(())
    });
}

/// A copy of one file of a case in a folder of its own.
fn alone(file: &Path) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join(file.file_name().unwrap());
    std::fs::copy(file, &copy).unwrap();
    (folder, copy)
}

#[test]
fn a_bare_file_whose_width_is_of_no_known_model_asks_for_the_heads() {
    for case in cases("told").iter().filter(|case| !case.name.contains("convnext")) {
        let (_folder, file) = alone(&case.file("file"));
        for error in [
            AnyBackbone::open(&file, device()).unwrap_err(),
            FrozenViT::open(&file, device()).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(
                matches!(error, Error::Unsettled { field: "num_heads", .. }),
                "{}: {text}",
                case.name
            );
            assert!(text.contains("--heads"), "{text}");
        }
    }
}

/// Both files tell the text tower of the golden CLIPs two heads, which the width does not.
#[test]
fn the_text_tower_is_told_as_well() {
    let model = crate::golden::fixtures().join("clip/model");
    let hugging_face = r#"{"model_type": "clip", "text_config": {"hidden_size": 16,
        "num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-4}}"#;
    let open_clip = r#"{"model_cfg": {"vision_cfg": {"width": 16}, "text_cfg": {"width": 16,
        "heads": 2, "norm_kwargs": {"eps": 1e-4}}}}"#;
    for (file, config, text) in [
        ("hugging_face.safetensors", "config.json", hugging_face),
        ("open_clip.safetensors", "open_clip_config.json", open_clip),
    ] {
        let (folder, copy) = alone(&model.join(file));
        let bare = ClipTextConfig::infer(&copy).unwrap();
        assert_eq!((bare.num_heads, bare.norm_eps), (1, 1e-5));
        std::fs::write(folder.path().join(config), text).unwrap();
        let told = ClipTextConfig::infer(&copy).unwrap();
        assert_eq!((told.num_heads, told.norm_eps), (2, 1e-4));
        assert_eq!(told.activation, MlpActivation::Gelu);
        std::fs::write(folder.path().join(config), text.replace("16", "24")).unwrap();
        assert!(matches!(ClipTextConfig::infer(&copy), Err(Error::FileField { .. })));
    }
}

fn case(name: &str) -> Case {
    cases("told").into_iter().find(|case| case.name == name).unwrap()
}

#[test]
fn what_nothing_tells_is_asked_for_and_can_be_given() {
    let with_heads = OpenOptions { num_heads: Some(4), ..OpenOptions::default() };
    for (name, field, given) in [
        ("hf_msn", "norm_eps", OpenOptions { norm_eps: Some(1e-6), ..with_heads.clone() }),
        ("hf_ijepa", "norm_eps", OpenOptions { norm_eps: Some(1e-6), ..with_heads.clone() }),
        (
            "open_clip_clipa",
            "pooling",
            OpenOptions { pooling: Some(Pooling::AverageThenNorm), ..with_heads.clone() },
        ),
    ] {
        let case = case(name);
        let (_folder, file) = alone(&case.file("file"));
        let error = AnyBackbone::open_with(&file, &with_heads, device()).unwrap_err();
        assert!(
            matches!(&error, Error::Unsettled { field: found, .. } if *found == field),
            "{name}: {error}"
        );
        let backbone = AnyBackbone::open_with(&file, &given, device()).unwrap();
        compare(&case, &backbone).unwrap();
    }
}

/// Opens a bare file of a case with more and more options. Each error names the next field that is
/// to be given, and the last options are enough.
fn asks_for(family: &str, name: &str, given: &[(&str, OpenOptions)], enough: &OpenOptions) {
    let case = cases(family).into_iter().find(|case| case.name == name).unwrap();
    let (_folder, file) = alone(&case.file("file"));
    for (field, options) in given {
        let error = AnyBackbone::open_with(&file, options, device()).unwrap_err();
        assert!(
            matches!(&error, Error::Unsettled { field: found, .. } if found == field),
            "{name}: {error}"
        );
    }
    let backbone = AnyBackbone::open_with(&file, enough, device()).unwrap();
    compare(&case, &backbone).unwrap();
}

#[test]
fn the_windows_of_a_swin_v2_are_asked_for() {
    let windows = OpenOptions { window_size: Some((3, 3)), ..OpenOptions::default() };
    let images = OpenOptions { image_size: Some((32, 44)), ..windows.clone() };
    let all = OpenOptions { pretrained_window_sizes: Some(vec![0]), ..images.clone() };
    let given = [
        ("window_size", OpenOptions::default()),
        ("pretrained_window_sizes", images),
        ("pretrained_window_sizes", windows),
        ("image_size", OpenOptions { image_size: None, ..all.clone() }),
    ];
    asks_for("swin_v2", "timm", &given, &all);
    let config = OpenOptions {
        window_size: Some((4, 3)),
        image_size: Some((24, 44)),
        pretrained_window_sizes: Some(vec![3, 2]),
        ..OpenOptions::default()
    };
    asks_for("swin_v2", "timm_config", &[("window_size", OpenOptions::default())], &config);
    let hugging_face = OpenOptions {
        window_size: Some((3, 3)),
        image_size: Some((32, 48)),
        pretrained_window_sizes: Some(vec![0, 0]),
        ..OpenOptions::default()
    };
    asks_for("swin_v2", "hugging_face", &[("window_size", OpenOptions::default())], &hugging_face);
}

#[test]
fn the_place_and_the_kind_of_norms_are_asked_for() {
    let shape =
        OpenOptions { num_heads: Some(2), image_size: Some((24, 40)), ..OpenOptions::default() };
    let after = OpenOptions { norm_placement: Some(NormPlacement::After), ..shape.clone() };
    asks_for("post_norm", "average", &[("norm_placement", shape)], &after);
    for (name, norm) in [("rms", ConvNeXtNorm::Rms), ("deviation", ConvNeXtNorm::Deviation)] {
        let options = OpenOptions { norm: Some(norm), ..OpenOptions::default() };
        asks_for("convnext_v2", name, &[("norm", OpenOptions::default())], &options);
    }
}

#[test]
fn windows_that_hugging_face_limits_in_another_way_are_refused() {
    let case = cases("swin_v2").into_iter().find(|case| case.name == "hugging_face").unwrap();
    let (folder, file) = alone(&case.file("file"));
    let text = std::fs::read_to_string(folder_of(&case).join("config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (image_size, opens) in [([32, 48], true), ([24, 48], false), ([24, 24], true)] {
        json["image_size"] = serde_json::json!(image_size);
        std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
        let opened = AnyBackbone::open(&file, device());
        let is_refused =
            matches!(&opened, Err(Error::FileField { field, .. }) if field == "image_size");
        assert_eq!((opened.is_ok(), is_refused), (opens, !opens), "{image_size:?}");
    }
}

/// torchvision pads a grid that is smaller than a window, and the Swin here narrows the window.
#[test]
fn windows_that_torchvision_would_pad_are_refused() {
    let case = cases("swin_v2").into_iter().find(|case| case.name == "torchvision").unwrap();
    let options = OpenOptions { image_size: Some((16, 24)), ..OpenOptions::default() };
    let error = AnyBackbone::open_with(case.file("file"), &options, device()).unwrap_err();
    assert!(matches!(&error, Error::Config { field, .. } if field == "image_size"), "{error}");
}

#[test]
fn the_report_says_where_each_setting_comes_from() {
    let source = |report: &LoadReport, name: &str| {
        report.settings.iter().find(|setting| setting.name == name).unwrap().source.clone()
    };
    let options = OpenOptions { norm_eps: Some(1e-4), ..OpenOptions::default() };
    let folder = folder_of(&case("timm_quickgelu"));
    let (_, report) = AnyBackbone::open_reported(&folder, &options, device()).unwrap();
    assert_eq!(source(&report, "norm_eps"), SettingSource::Caller);
    assert_eq!(source(&report, "image_size"), SettingSource::Tensors);
    let SettingSource::File(file) = source(&report, "activation") else { panic!("{report}") };
    assert!(file.contains("config.json") && file.contains("vit_base_patch16_clip_quickgelu_224"));
    assert!(report.to_string().contains("norm_eps 1e-4 (given by the caller)"), "{report}");
}

/// A model with random weights and true widths, saved under timm's names.
fn saved(config: &ViTConfig) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let vit = FrozenViT::random(config, 3, device()).unwrap();
    let weights = convpass::Backbone::named_weights(&vit);
    let tensors: Vec<_> = weights.iter().map(|(name, tensor)| (name, tensor)).collect();
    Tensor::write_safetensors(&tensors, &file).unwrap();
    (folder, file)
}

#[test]
fn the_heads_of_known_widths_are_not_one_for_64_channels() {
    let thin = |embed_dim, num_heads| ViTConfig {
        image_size: (28, 28),
        patch_size: 14,
        embed_dim,
        num_heads,
        depth: 1,
        mlp_dim: 8,
        ..ViTConfig::default()
    };
    for (width, heads) in [(1152, 16), (1280, 16), (1408, 16), (1664, 16), (1792, 16), (1536, 24)] {
        let (_folder, file) = saved(&thin(width, heads));
        let (_, report) =
            AnyBackbone::open_reported(&file, &OpenOptions::default(), device()).unwrap();
        let setting = report.settings.iter().find(|setting| setting.name == "num_heads").unwrap();
        assert_eq!(setting.value, heads.to_string(), "{width}");
        assert!(matches!(setting.source, SettingSource::Known(_)), "{width}");
    }
    // The giant-opt of SigLIP has the width of DINOv2's giant and no class token.
    let giant = ViTConfig {
        class_token: false,
        pos_embed_prefix: 0,
        pooling: Pooling::Average,
        ..thin(1536, 16)
    };
    let found = ViTConfig::infer(saved(&giant).1).unwrap();
    assert_eq!((found.num_heads, found.activation), (16, MlpActivation::GeluTanh));
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    let config = ViTConfig {
        image_size: (8, 8),
        patch_size: 4,
        embed_dim: 64,
        depth: 1,
        num_heads: 1,
        mlp_dim: 32,
        ..ViTConfig::default()
    };
    for value in [f64::NAN, f64::INFINITY] {
        let (_folder, file) = saved(&config);
        let vit = FrozenViT::open(&file, device()).unwrap();
        let tensors: Vec<_> = convpass::Backbone::named_weights(&vit)
            .iter()
            .map(|(name, tensor)| {
                let copy = tensor.copy();
                if name == "blocks.0.mlp.fc2.weight" {
                    let _ = copy.get(3).get(2).fill_(value);
                }
                (name, copy)
            })
            .collect();
        Tensor::write_safetensors(&tensors, &file).unwrap();
        let error = AnyBackbone::open(&file, device()).unwrap_err();
        assert!(
            matches!(&error, Error::NotFinite { name, count: 1, .. } if name == "blocks.0.mlp.fc2.weight"),
            "{error}"
        );
    }
    // Large finite weights whose sum overflows are no error.
    let (_folder, file) = saved(&config);
    let large = Tensor::full([64], 3e38, (Kind::Float, device()));
    let vit = FrozenViT::open(&file, device()).unwrap();
    let tensors: Vec<_> = convpass::Backbone::named_weights(&vit)
        .iter()
        .map(|(name, tensor)| (name, if name == "norm.bias" { &large } else { tensor }))
        .collect();
    Tensor::write_safetensors(&tensors, &file).unwrap();
    assert!(AnyBackbone::open(&file, device()).is_ok());
}

#[test]
fn a_concatenated_pooling_has_twice_the_width() {
    let config = ViTConfig { pooling: Pooling::ClassTokenAndAverage, ..ViTConfig::default() };
    assert_eq!(config.feature_dim(), 2 * config.embed_dim);
    assert!(ViTConfig { class_token: false, pos_embed_prefix: 0, ..config }.validate().is_err());
}
