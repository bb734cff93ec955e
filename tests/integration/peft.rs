//! LoRA adapters of Hugging Face PEFT: what it saved loads and computes what it computes, and what is saved for it is
//! what `fixtures/peft_back/check_back.py` loaded in PEFT.

use std::error::Error as StdError;
use std::path::{Path, PathBuf};

use convpass::model::{PeftHead, PeftNames, PeftOptions};
use convpass::petl::LinearTarget;
use convpass::{Error, FrozenViT, LoraConfig, Method, PetlConfig, PetlModel, ViTConfig};
use tch::{Kind, Tensor};

use crate::golden::{Case, cases, check_all, fixtures};
use crate::support::device;

fn load(case: &Case) -> convpass::Result<PetlModel> {
    let base = case.shared_file("base");
    let head = match case.fact::<String>("head").as_str() {
        "saved" => PeftHead::Saved,
        "base" => PeftHead::Base(base.clone()),
        _ => PeftHead::New(5),
    };
    PetlModel::load_peft_with(case.open(&base)?, adapter(case), &head)
}

fn adapter(case: &Case) -> PathBuf {
    fixtures().join("peft_adapter").join(&case.name).join("adapter")
}

fn options(case: &Case) -> PeftOptions {
    let names = match case.fact::<String>("names").as_str() {
        "vit" => PeftNames::Vit,
        "vit4" => PeftNames::Vit4,
        "dinov2" => PeftNames::Dinov2,
        "dinov2_v4" => PeftNames::Dinov2V4,
        "clip" => PeftNames::Clip,
        "aimv2" => PeftNames::Aimv2,
        "timm_gated" => PeftNames::TimmGated,
        _ => PeftNames::Timm,
    };
    let head = match (names, case.fact::<String>("compared").as_str()) {
        (_, "features") => None,
        (PeftNames::Timm | PeftNames::TimmGated, _) => Some("head"),
        _ => Some("classifier"),
    };
    PeftOptions { names, prefix: case.fact("prefix"), head: head.map(str::to_owned) }
}

fn compare(case: &Case, model: &PetlModel) -> Result<(), Box<dyn StdError>> {
    let images = case.tensor("images");
    let (features, logits) =
        tch::no_grad(|| (model.features(images, false), model.forward(images, false)));
    let (features, logits) = (features?, logits?);
    let found = if case.fact::<String>("compared") == "logits" { logits } else { features };
    Ok(case.compare(&case.fact::<String>("compared"), &found)?)
}

#[test]
fn what_peft_saved_computes_what_peft_computes() {
    check_all("peft_adapter", |case| compare(case, &load(case)?));
}

#[test]
fn adapters_of_this_crate_compute_what_merged_weights_do() {
    check_all("peft_back", |case| compare(case, &own(case)?));
}

/// What is saved for PEFT is, byte for byte, what `check_back.py` had PEFT load; and it comes back.
#[test]
fn what_is_saved_is_what_peft_was_given() {
    let folder = tempfile::tempdir().unwrap();
    let root = std::env::var_os("PEFT_BACK").map(PathBuf::from);
    let mut saved = 0;
    for (case, model) in every_model() {
        let target = root.as_deref().unwrap_or(folder.path()).join(&case.name);
        let options = options(&case);
        model.save_peft(&target, &options).unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let golden = fixtures().join("peft_back/saved").join(&case.name).join(file);
            assert!(
                std::fs::read(target.join(file)).unwrap() == std::fs::read(&golden).unwrap(),
                "{} is another",
                golden.display()
            );
        }
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 2, "a temporary file is left");
        let head = if options.head.is_some() { PeftHead::Saved } else { PeftHead::New(5) };
        let backbone = model.backbone().clone();
        let again = PetlModel::load_peft_with(backbone, &target, &head).unwrap();
        compare(&case, &again).unwrap();
        saved += 1;
    }
    assert_eq!(std::fs::read_dir(fixtures().join("peft_back/saved")).unwrap().count(), saved);
}

/// The cases that are saved, each with its model. A head that a product was folded into is left
/// out: its last bits depend on the processor.
fn every_model() -> impl Iterator<Item = (Case, PetlModel)> {
    let adapters = cases("peft_adapter").into_iter().filter(|case| case.name != "vit_base_head");
    let adapters = adapters.map(|case| {
        let model = load(&case).unwrap();
        (case, model)
    });
    adapters.chain(cases("peft_back").into_iter().map(|case| {
        let model = own(&case).unwrap();
        (case, model)
    }))
}

fn own(case: &Case) -> convpass::Result<PetlModel> {
    let config = PetlConfig::new(case.fact("method"), case.fact("num_classes"));
    let mut model = PetlModel::new(case.open(&case.shared_file("base"))?, &config)?;
    model.load_weights(case.file("adapter"))?;
    Ok(model)
}

#[test]
fn products_keep_their_shape_and_bits() {
    let all = cases("peft_adapter");
    let model = |name: &str| load(all.iter().find(|case| case.name == name).unwrap()).unwrap();
    let lora = |model: &PetlModel| match &model.config().method {
        Method::Lora(lora) => lora.clone(),
        other => panic!("{other:?}"),
    };
    // The usual adapter is taken as it is.
    let plain = model("vit_4");
    let targets = vec![LinearTarget::Q, LinearTarget::V];
    let expected = LoraConfig { rank: 4, alpha: 16.0, targets: targets.clone(), blocks: None };
    assert_eq!((lora(&plain), plain.config().drop_path), (expected, 0.0));
    let file = fixtures().join("peft_adapter/vit_4/adapter/adapter_model.safetensors");
    let tensors = Tensor::read_safetensors(file).unwrap();
    let name = "base_model.model.vit.encoder.layer.2.attention.attention.value.lora_B.weight";
    let (_, b) = tensors.iter().find(|(found, _)| found == name).unwrap();
    assert_eq!(
        &plain.var_store().variables()["blocks.2.attn.v.lora_B.weight"],
        &b.to_device(device())
    );

    assert_eq!(lora(&model("vit_some_layers")).blocks, Some(vec![4, 0, 2]));
    assert_eq!(lora(&model("dinov2_swiglu")).rank, 5, "3 for the gate and 2 for the value");
    // Through timm's fused projection and back, q and v have their own ranks again.
    let own = own(&cases("peft_back").into_iter().find(|case| case.name == "own_timm").unwrap());
    let (own, folder) = (own.unwrap(), fixtures().join("peft_back/saved/own_timm"));
    let back = PetlModel::load_peft(own.backbone().clone(), folder).unwrap();
    let LoraConfig { targets, blocks, .. } = lora(&back);
    assert_eq!((targets, blocks), (lora(&own).targets, Some(vec![2, 0, 3])));
    let variables = back.var_store().variables();
    for (name, variable) in own.var_store().variables() {
        assert_eq!(variables[&name], variable, "{name}");
    }
}

fn backbone() -> FrozenViT {
    let base = fixtures().join("peft_adapter/bases/classifier.safetensors");
    let config = ViTConfig { num_heads: 4, ..ViTConfig::infer(&base).unwrap() };
    FrozenViT::open_with(base, &config, device()).unwrap()
}

/// The folder of a good adapter, its files to be spoilt.
struct Spoilt(tempfile::TempDir, FrozenViT);

impl Spoilt {
    fn new(case: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let good = fixtures().join("peft_adapter").join(case).join("adapter");
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            std::fs::copy(good.join(file), folder.path().join(file)).unwrap();
        }
        Spoilt(folder, backbone())
    }

    fn tensors_path(&self) -> PathBuf {
        self.0.path().join("adapter_model.safetensors")
    }

    fn config_path(&self) -> PathBuf {
        self.0.path().join("adapter_config.json")
    }

    fn tensors(self, change: impl FnOnce(&mut Vec<(String, Tensor)>)) -> Self {
        let mut tensors = Tensor::read_safetensors(self.tensors_path()).unwrap();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        change(&mut tensors);
        Tensor::write_safetensors(&tensors, self.tensors_path()).unwrap();
        self
    }

    fn config(self, field: &str, value: serde_json::Value) -> Self {
        let text = std::fs::read(self.config_path()).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
        config[field] = value;
        std::fs::write(self.config_path(), config.to_string()).unwrap();
        self
    }

    fn error(&self) -> Error {
        self.error_with(&PeftHead::Saved)
    }

    fn error_with(&self, head: &PeftHead) -> Error {
        PetlModel::load_peft_with(self.1.clone(), &self.0, head).unwrap_err()
    }
}

#[test]
fn a_config_that_asks_for_more_is_refused_by_name() {
    use serde_json::json;
    for (name, value) in [
        ("peft_type", json!("VERA")),
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("lora_bias", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("init_lora_weights", json!("pissa")),
        ("auto_mapping", json!({"base_model_class": "CLIPForImageClassification"})),
        ("r", json!(-1)),
        ("r", json!(1e300)),
        ("lora_alpha", json!([1])),
        ("rank_pattern", json!({"fc2": 0})),
    ] {
        let spoilt = Spoilt::new("vit_all_linear").config(name, value);
        match spoilt.error() {
            Error::FileField { file, field, .. } => {
                assert_eq!((file, field.as_str()), (spoilt.config_path(), name));
            }
            other => panic!("{name}: {other}"),
        }
    }
    // What says nothing about the products may say what it likes.
    for (name, value) in [
        ("a_newer_field", json!("x")),
        ("lora_dropout", json!(0.5)),
        ("target_modules", json!("all-linear")),
        ("fan_in_fan_out", json!(true)),
        ("inference_mode", json!(null)),
        ("use_something_new", json!(false)),
    ] {
        let folder = Spoilt::new("vit_all_linear").config(name, value).0;
        PetlModel::load_peft(backbone(), &folder).unwrap();
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, device()));
    let layer = "base_model.model.vit.layers";
    for name in [
        format!("{layer}.3.attention.q_proj.lora_A.weight"),
        format!("{layer}.0.attention.q_proj.lora_magnitude_vector.weight"),
        format!("{layer}.0.attention.q_proj.lora_B.bias"),
        format!("{layer}.0.attention.q_proj.base_layer.bias"),
        format!("{layer}.0.attention.qkv.lora_A.weight"),
        "base_model.model.wrapped.vit.layers.0.mlp.fc1.lora_A.weight".to_owned(),
        "base_model.model.vit.embeddings.patch_embeddings.projection.lora_A.weight".to_owned(),
        "base_model.model.vit.layernorm.weight".to_owned(),
        "base_model.model.vit.head.weight".to_owned(),
        "x".to_owned(),
    ] {
        let spoilt = Spoilt::new("vit_all_linear")
            .tensors(|tensors| tensors.push((name.clone(), zeros(&[4, 32]))));
        match spoilt.error() {
            Error::UnexpectedTensors { file, names, .. } => {
                assert_eq!((file, names), (spoilt.tensors_path(), vec![name]));
            }
            other => panic!("{name}: {other}"),
        }
    }
    let count = Spoilt::new("vit_all_linear");
    let count = Tensor::read_safetensors(count.tensors_path()).unwrap().len();
    for index in 0..count {
        // Another shape, then none: the bias of a head alone may be absent.
        for shape in [Some([7, 7]), None] {
            let mut name = String::new();
            let spoilt = Spoilt::new("vit_all_linear").tensors(|tensors| match shape {
                Some(shape) => {
                    tensors[index].1 = zeros(&shape);
                    name = tensors[index].0.clone();
                }
                None => name = tensors.remove(index).0,
            });
            if shape.is_none() && name == "base_model.model.classifier.bias" {
                PetlModel::load_peft(backbone(), &spoilt.0).unwrap();
                continue;
            }
            match (shape, spoilt.error()) {
                (Some(_), Error::ShapeMismatch { name: found, .. })
                | (None, Error::MissingTensor { name: found, .. }) => assert_eq!(found, name),
                (_, other) => panic!("{name}: {other}"),
            }
        }
    }
}

#[test]
fn a_file_cut_short_or_absent_is_an_error() {
    let spoilt = Spoilt::new("vit_layers_to_transform");
    for path in [spoilt.tensors_path(), spoilt.config_path()] {
        let whole = std::fs::read(&path).unwrap();
        // JSON ends in a line feed, which it can do without.
        for end in (0..whole.trim_ascii_end().len()).step_by(7) {
            std::fs::write(&path, &whole[..end]).unwrap();
            match spoilt.error() {
                Error::CorruptFile { file, .. }
                | Error::UnknownFormat { file, .. }
                | Error::Io { path: file, .. } => assert_eq!(file, path),
                other => panic!("{}: {other}", path.display()),
            }
        }
        // Another byte somewhere is an error or another adapter, never a panic.
        for at in (0..whole.len().min(2000)).step_by(11) {
            let mut bytes = whole.clone();
            bytes[at] = if bytes[at] == b'9' { b'"' } else { b'9' };
            std::fs::write(&path, bytes).unwrap();
            let _ = PetlModel::load_peft(spoilt.1.clone(), &spoilt.0);
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(spoilt.error(), Error::Io { path: found, .. } if found == path));
        std::fs::write(&path, whole).unwrap();
    }
    std::fs::write(spoilt.config_path(), vec![b' '; 2 << 20]).unwrap();
    assert!(matches!(spoilt.error(), Error::CorruptFile { .. }));
}

#[test]
fn a_head_comes_from_somewhere_or_is_asked_for() {
    let frozen = Spoilt::new("vit_frozen_head");
    match frozen.error() {
        Error::FileField { field, .. } => assert_eq!(field, "modules_to_save"),
        other => panic!("{other}"),
    }
    let classes = |folder: &Path, head: &PeftHead| {
        PetlModel::load_peft_with(backbone(), folder, head).unwrap().config().num_classes
    };
    assert_eq!(classes(frozen.0.path(), &PeftHead::New(9)), 9);
    let without = PeftHead::Base(fixtures().join("peft_adapter/bases/vit.safetensors"));
    assert!(matches!(frozen.error_with(&without), Error::UnknownFormat { .. }));
    assert!(matches!(frozen.error_with(&PeftHead::New(0)), Error::Config { .. }));
    assert!(matches!(frozen.error_with(&PeftHead::Base("none".into())), Error::Io { .. }));
    // A product beside a head needs the head.
    let adapted = Spoilt::new("vit_base_head");
    assert!(matches!(adapted.error_with(&PeftHead::New(5)), Error::FileField { .. }));
    // A head that was saved goes first.
    let saved = Spoilt::new("vit_all_linear");
    assert_eq!(classes(saved.0.path(), &without), 5);
    assert!(matches!(saved.error_with(&PeftHead::New(9)), Error::Config { .. }));
}

#[test]
fn only_lora_under_names_that_can_be_is_saved() {
    let folder = tempfile::tempdir().unwrap();
    let model = |method| PetlModel::new(backbone(), &PetlConfig::new(method, 5)).unwrap();
    let refused = |model: &PetlModel, options: PeftOptions| match model
        .save_peft(folder.path().join("a"), &options)
    {
        Err(Error::Config { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&model(Method::LinearProbe), PeftOptions::default()), "method");
    let none = LoraConfig { blocks: Some(vec![0; 3]), ..Default::default() };
    assert_eq!(refused(&model(Method::Lora(none)), PeftOptions::default()), "blocks");
    let lora = model(Method::Lora(LoraConfig::default()));
    for prefix in [".", "vit", "vit..", "a b.", "vit(.", "."] {
        let options = PeftOptions { prefix: prefix.to_owned(), ..Default::default() };
        assert_eq!(refused(&lora, options), "prefix");
    }
    let options = PeftOptions { head: Some(String::new()), ..Default::default() };
    assert_eq!(refused(&lora, options), "head");
    assert!(!folder.path().join("a").exists());
    // An untrained one, whose B are zero, comes back too.
    lora.save_peft(folder.path(), &PeftOptions { names: PeftNames::Timm, ..Default::default() })
        .unwrap();
    PetlModel::load_peft(backbone(), folder.path()).unwrap();
}
