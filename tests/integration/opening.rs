//! Opening a backbone of any family, and the adapter files beside it.

use std::path::{Path, PathBuf};

use convpass::backbone::{ConvNeXtNorm, NormPlacement};
use convpass::checkpoint::TensorFile;
use convpass::model::AdapterInfo;
use convpass::{
    AnyBackbone, Backbone, Error, FrozenViT, LoraConfig, Method, OpenOptions, PetlConfig,
    PetlModel, Precision, ViTConfig,
};
use tch::{Kind, Tensor};

use crate::golden::fixtures;
use crate::support::{Close, device};

fn old_vit() -> AnyBackbone {
    let options = OpenOptions { num_heads: Some(2), ..Default::default() };
    let file = fixtures().join("adapter_0_1/vit.safetensors");
    AnyBackbone::open_with(file, &options, device()).unwrap()
}

/// The golden features hold each family's own type; this holds that `AnyBackbone` computes the same.
#[test]
fn every_family_opens_with_the_features_of_its_own_type() {
    for (cases, family) in [("timm_vit", "ViT"), ("swin", "Swin"), ("convnext", "ConvNeXt")] {
        // No file of these tells its heads, and the width is of no known model.
        let num_heads = (family == "ViT").then_some(4);
        let options = OpenOptions { num_heads, ..OpenOptions::default() };
        let backbone = AnyBackbone::open_with(first_of(cases), &options, device()).unwrap();
        assert_eq!(backbone.family(), family);
        let (height, width) = backbone.preprocessing().image_size;
        let images = Tensor::ones([1, 3, height, width], (Kind::Float, device()));
        let own = match family {
            "ViT" => backbone.as_vit().unwrap().features(&images),
            "Swin" => backbone.as_swin().unwrap().features(&images),
            _ => backbone.as_conv_next().unwrap().features(&images),
        };
        assert!(backbone.features(&images).unwrap().equal(&own.unwrap()), "{family}");
    }
}

/// The first checkpoint among the cases of a family.
fn first_of(cases: &str) -> PathBuf {
    let list = |folder: &Path| {
        let mut paths: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    };
    let is_checkpoint = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.ends_with(".safetensors") && name != "golden.safetensors"
    };
    let folders = list(&fixtures().join(cases)).into_iter().filter(|path| path.is_dir());
    folders.flat_map(|folder| list(&folder)).find(is_checkpoint).expect("a case has a checkpoint")
}

#[test]
fn adapters_of_version_0_1_load_and_give_the_same_logits() {
    let golden = TensorFile::open(fixtures().join("adapter_0_1/golden.safetensors")).unwrap();
    let x = golden.tensor("x").unwrap().to_device(device());
    for name in ["conv_bypass", "lora", "vpt", "compose", "low_bit", "bit_fit"] {
        let file = fixtures().join(format!("adapter_0_1/{name}.safetensors"));
        let model = PetlModel::load_adapter(old_vit(), &file).unwrap();
        let logits = tch::no_grad(|| model.forward(&x, false)).unwrap();
        // Bit for bit on the machine that made them; another one's products differ in the last bits.
        assert!(logits.is_close(&golden.tensor(name).unwrap(), 1e-5, 1e-6), "{name}");
        let info = AdapterInfo::read(&file).unwrap();
        assert_eq!((info.version, info.class_names), (None, None), "{name}");
    }
}

#[test]
fn an_adapter_file_says_what_a_user_of_it_needs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let config = PetlConfig::new(Method::Lora(LoraConfig::default()), 3);
    let mut model = PetlModel::new(old_vit(), &config).unwrap();
    let names = ["cat", "dog", "rat"].map(str::to_owned).to_vec();
    assert!(matches!(model.set_class_names(names[1..].to_vec()), Err(Error::Input { .. })));
    assert!(matches!(model.set_class_names(vec!["cat".to_owned(); 3]), Err(Error::Input { .. })));
    model.set_class_names(names.clone()).unwrap();
    model.save_adapter(&file).unwrap();

    let info = AdapterInfo::read(&file).unwrap();
    assert_eq!(info.class_names.as_ref(), Some(&names));
    assert_eq!(info.config, config);
    assert_eq!(info.version.as_deref(), Some(env!("CARGO_PKG_VERSION")));
    let described = info.backbone.unwrap();
    assert_eq!(described.family, "ViT");
    assert_eq!(described.file.as_deref(), Some("vit.safetensors"));
    assert_eq!(described.image_size, Some((12, 12)));
    assert_eq!(described.precision, Some(Precision::F32));
    assert_eq!(described.preprocessing.as_ref(), Some(old_vit().preprocessing()));

    let bytes = std::fs::read(&file).unwrap();
    let read = PetlModel::load_adapter(old_vit(), &file).unwrap();
    assert_eq!(read.class_names(), Some(&names[..]));
    read.save_adapter(&file).unwrap();
    assert!(bytes == std::fs::read(&file).unwrap(), "the same model gives the same bytes");
}

#[test]
fn another_backbone_is_named_by_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let config = PetlConfig::new(Method::LinearProbe, 3);
    PetlModel::new(old_vit(), &config).unwrap().save_adapter(&file).unwrap();
    let options =
        OpenOptions { num_heads: Some(2), precision: Some(Precision::Bf16), ..Default::default() };
    let vit = fixtures().join("adapter_0_1/vit.safetensors");
    let in_bf16 = AnyBackbone::open_with(vit, &options, device()).unwrap();
    let error = PetlModel::load_adapter(in_bf16, &file).unwrap_err().to_string();
    for part in ["ViT vit.safetensors", "12x12", "f32", "bf16"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_head_is_taken_from_another_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("probe.safetensors");
    let probe = PetlModel::new(old_vit(), &PetlConfig::new(Method::LinearProbe, 3)).unwrap();
    probe.save_adapter(&file).unwrap();
    let config = PetlConfig { seed: 5, ..PetlConfig::new(Method::Lora(LoraConfig::default()), 3) };
    let mut model = PetlModel::new(old_vit(), &config).unwrap();
    let source = model.load_head(&file).unwrap();
    assert!(!source.is_of_other_backbone && source.digest.len() == 64);
    let x = Tensor::ones([1, 3, 12, 12], (Kind::Float, device()));
    let [a, b] = [&probe, &model].map(|model| model.forward(&x, false).unwrap());
    assert!(a.equal(&b));
    let mut other = PetlModel::new(old_vit(), &PetlConfig::new(Method::LinearProbe, 4)).unwrap();
    assert!(matches!(other.load_head(&file), Err(Error::Input { .. })));
}

/// A ViT split into two shards with an index, as Hugging Face writes large models.
#[test]
fn a_folder_of_shards_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let whole = TensorFile::open(fixtures().join("adapter_0_1/vit.safetensors")).unwrap();
    let names: Vec<String> = whole.names().map(str::to_owned).collect();
    let (first, second) = names.split_at(names.len() / 2);
    let mut map = serde_json::Map::new();
    for (shard, names) in [("model-1.safetensors", first), ("model-2.safetensors", second)] {
        let tensors: Vec<_> =
            names.iter().map(|name| (name, whole.tensor(name).unwrap())).collect();
        Tensor::write_safetensors(&tensors, folder.path().join(shard)).unwrap();
        map.extend(names.iter().map(|name| (name.clone(), shard.into())));
    }
    let index = folder.path().join("model.safetensors.index.json");
    let write = |map: &serde_json::Map<_, _>| {
        std::fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    };
    write(&map);
    let options = OpenOptions { num_heads: Some(2), ..Default::default() };
    for source in [folder.path(), &index] {
        let opened = AnyBackbone::open_with(source, &options, device()).unwrap();
        assert_eq!(Backbone::digest(&opened).unwrap(), Backbone::digest(&old_vit()).unwrap());
    }
    // A tensor that its shard does not hold, a tensor that is not listed, a shard elsewhere.
    for (name, shard) in [(&names[0], "model-2.safetensors"), (&names[0], "../model-1.safetensors")]
    {
        let mut map = map.clone();
        map.insert(name.clone(), shard.into());
        write(&map);
        let error = AnyBackbone::open(folder.path(), device()).unwrap_err();
        assert!(matches!(&error, Error::CorruptFile { .. }) && error.to_string().contains(name));
    }
    map.remove(&names[0]);
    write(&map);
    let error = AnyBackbone::open(folder.path(), device()).unwrap_err();
    assert!(error.to_string().contains("not listed"), "{error}");
    std::fs::remove_file(folder.path().join("model-2.safetensors")).unwrap();
    assert!(
        matches!(AnyBackbone::open(folder.path(), device()), Err(Error::Io { path, .. }) if path.ends_with("model-2.safetensors"))
    );
}

#[test]
fn config_json_beside_the_weights_says_what_they_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    std::fs::copy(fixtures().join("adapter_0_1/vit.safetensors"), &file).unwrap();
    let write = |text: &str| std::fs::write(folder.path().join("config.json"), text).unwrap();
    write(
        r#"{"model_type": "vit", "hidden_size": 16, "num_attention_heads": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "image_size": 12}"#,
    );
    for source in [folder.path(), &file] {
        let opened = AnyBackbone::open(source, device()).unwrap();
        assert_eq!(Backbone::digest(&opened).unwrap(), Backbone::digest(&old_vit()).unwrap());
    }
    assert_eq!(ViTConfig::infer(&file).unwrap().num_heads, 2);
    write(
        r#"{"model_type": "vit", "hidden_size": 16, "num_attention_heads": 2, "hidden_act": "mish"}"#,
    );
    let error = FrozenViT::open(&file, device()).unwrap_err();
    assert!(matches!(&error, Error::FileField { field, .. } if field == "hidden_act"), "{error}");
}

#[test]
fn an_option_that_does_not_apply_is_refused() {
    let others = OpenOptions::default();
    for (family, option, options) in [
        ("swin", "num_heads", OpenOptions { num_heads: Some(4), ..others.clone() }),
        (
            "swin",
            "pretrained_window_sizes",
            OpenOptions { pretrained_window_sizes: Some(vec![0]), ..others.clone() },
        ),
        ("convnext", "norm", OpenOptions { norm: Some(ConvNeXtNorm::Rms), ..others.clone() }),
        (
            "convnext",
            "norm_placement",
            OpenOptions { norm_placement: Some(NormPlacement::After), ..others },
        ),
    ] {
        let error = AnyBackbone::open_with(first_of(family), &options, device()).unwrap_err();
        assert!(matches!(&error, Error::Config { field, .. } if field == option), "{error}");
    }
}

/// A bias table that is not that of a square grid tells no image size.
#[test]
fn a_grid_that_is_not_square_is_asked_for() {
    let case = crate::golden::cases("beit").into_iter().find(|case| case.name == "timm").unwrap();
    let file = case.file("file");
    let error = AnyBackbone::open(&file, device()).unwrap_err();
    assert!(matches!(error, Error::Unsettled { field: "image_size", .. }), "{error}");
    assert!(error.to_string().contains("--image-size"), "{error}");
    let image_size = Some(case.fact::<serde_json::Value>("config")["image_size"].clone());
    let image_size = image_size.map(|size| serde_json::from_value(size).unwrap());
    let options = OpenOptions { image_size, ..OpenOptions::default() };
    let backbone = AnyBackbone::open_with(&file, &options, device()).unwrap();
    case.compare("features", &backbone.features(case.tensor("images")).unwrap()).unwrap();
    let other = OpenOptions { image_size: Some((16, 16)), ..options };
    let error = AnyBackbone::open_with(&file, &other, device()).unwrap_err();
    assert!(matches!(error, Error::ShapeMismatch { .. }), "{error}");
}

/// A file with a bias table for all blocks and one for each block is not read in part.
#[test]
fn two_kinds_of_bias_tables_are_not_read_in_part() {
    let case = crate::golden::cases("beit").into_iter().find(|case| case.name == "hf").unwrap();
    let mut tensors: Vec<_> = Tensor::read_safetensors(case.file("file")).unwrap();
    let table = tensors.iter().find(|(name, _)| name.ends_with("bias_table")).unwrap().1.copy();
    tensors.push(("encoder.relative_position_bias.relative_position_bias_table".into(), table));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    Tensor::write_safetensors(&tensors, &file).unwrap();
    let error = AnyBackbone::open(&file, device()).unwrap_err();
    assert!(matches!(error, Error::UnexpectedTensors { .. }), "{error}");
}

/// What is known of a family and not supported is named.
#[test]
fn aimv2_for_native_resolutions_is_refused_by_name() {
    let case = crate::golden::cases("aimv2").into_iter().find(|case| case.name == "hf").unwrap();
    let mut tensors: Vec<_> = Tensor::read_safetensors(case.file("file")).unwrap();
    tensors.retain(|(name, _)| name != "embeddings.position_embedding.weight");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    Tensor::write_safetensors(&tensors, &file).unwrap();
    let error = AnyBackbone::open(&file, device()).unwrap_err();
    assert!(error.to_string().contains("AIMv2 for native resolutions"), "{error}");
}
