//! Models written for other programs. `write_cases` writes what `tests/export/check.py` reads.

use std::path::{Path, PathBuf};

use convpass::backbone::{AttentionPooling, MlpActivation, Rotary};
use convpass::export::{MergedWeights, OnnxModel, WeightNames};
use convpass::petl::{AdapterConfig, SsfConfig};
use convpass::{
    Backbone, ConvBypassConfig, Error, FrozenViT, LoraConfig, Method, PetlConfig, PetlModel,
    Pooling, ViTConfig,
};
use serde_json::json;
use tch::Tensor;

use crate::support::{device, waves};

const CLASSES: i64 = 7;

fn vit() -> ViTConfig {
    ViTConfig {
        image_size: (32, 48),
        patch_size: 8,
        embed_dim: 64,
        depth: 3,
        num_heads: 4,
        mlp_dim: 128,
        norm_eps: 1e-5,
        ..ViTConfig::default()
    }
}

fn dinov3() -> ViTConfig {
    ViTConfig {
        num_registers: 4,
        pos_embed: false,
        pos_embed_prefix: 0,
        rotary: Some(Rotary::DINOV3),
        qkv_bias: false,
        layer_scale: true,
        ..vit()
    }
}

fn siglip() -> ViTConfig {
    ViTConfig {
        image_size: (32, 32),
        class_token: false,
        pos_embed_prefix: 0,
        activation: MlpActivation::GeluTanh,
        pooling: Pooling::Attention,
        attention_pool: Some(AttentionPooling {
            num_heads: None,
            mlp_dim: 128,
            reads_prefix: false,
        }),
        ..vit()
    }
}

/// Backbones by the names that `check.py` builds the classes of.
fn backbones() -> Vec<(&'static str, ViTConfig)> {
    let dinov2 = ViTConfig { image_size: (32, 32), layer_scale: true, ..vit() };
    let average = Pooling::Average;
    vec![
        ("vit", vit()),
        ("vit_average", ViTConfig { pooling: average, ..vit() }),
        ("vit_fc_norm", ViTConfig { pooling: Pooling::AverageThenNorm, ..vit() }),
        (
            "vit_distilled",
            ViTConfig {
                num_registers: 1,
                pos_embed_prefix: 2,
                pooling: Pooling::ClassAndDistillation,
                ..vit()
            },
        ),
        ("dinov2", dinov2.clone()),
        // The table of DINOv2 with registers under timm's names has no row for the class token.
        ("dinov2_registers", ViTConfig { num_registers: 4, pos_embed_prefix: 0, ..dinov2.clone() }),
        (
            "dinov2_registers_class_row",
            ViTConfig { num_registers: 4, pooling: average, ..dinov2.clone() },
        ),
        (
            "dinov2_gated",
            ViTConfig { activation: MlpActivation::SwiGlu, mlp_dim: 176, ..dinov2.clone() },
        ),
        ("dinov2_both", ViTConfig { pooling: Pooling::ClassTokenAndAverage, ..dinov2 }),
        ("dinov3", dinov3()),
        ("dinov3_average", ViTConfig { pooling: average, qkv_bias: true, ..dinov3() }),
        ("dinov3_gated", ViTConfig { activation: MlpActivation::SwiGlu, ..dinov3() }),
        ("siglip", siglip()),
        ("siglip_average", ViTConfig { pooling: average, ..siglip() }),
        (
            "clip",
            ViTConfig {
                image_size: (32, 32),
                pre_norm: true,
                patch_bias: false,
                activation: MlpActivation::QuickGelu,
                projection: Some(24),
                ..vit()
            },
        ),
    ]
}

/// Methods by name, from which files of weights can be written if they fold in.
fn methods() -> Vec<(&'static str, Method)> {
    vec![
        ("linear_probe", Method::LinearProbe),
        ("lora", Method::Lora(LoraConfig { rank: 2, ..LoraConfig::default() })),
        ("conv_bypass", Method::ConvBypass(ConvBypassConfig::default())),
        ("full", Method::Full),
    ]
}

/// A model whose weights are nowhere at their initial values. The bias of the keys is zero, as in
/// the networks whose classes have none.
fn model(config: &ViTConfig, method: &Method) -> PetlModel {
    let backbone = FrozenViT::random(config, 3, device()).unwrap();
    let mut step = 0.1;
    let backbone = backbone.map_weights(&mut |name, weight| {
        step += 0.37;
        let noise = waves(&weight.size()) * step;
        let changed = weight + noise.sin() * 0.2;
        if name.ends_with("attn.qkv.bias") && config.rotary.is_some() {
            let c = config.embed_dim;
            let _keys = changed.narrow(0, c, c).zero_();
        }
        Ok(changed)
    });
    let config = PetlConfig::new(method.clone(), CLASSES);
    let model = PetlModel::new(backbone.unwrap(), &config).unwrap();
    let mut variables: Vec<_> = model.var_store().variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    tch::no_grad(|| {
        for (index, (name, mut variable)) in variables.into_iter().enumerate() {
            if !name.ends_with("attn.qkv.bias") {
                let noise = (waves(&variable.size()) * (2.0 + index as f64)).sin() * 0.2;
                let _changed = variable.f_add_(&noise).unwrap();
            }
        }
    });
    model
}

fn images(config: &ViTConfig) -> Tensor {
    waves(&[5, 3, config.image_size.0, config.image_size.1])
}

fn gap(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    let largest = expected.abs().max().double_value(&[]);
    (found - expected).abs().max().double_value(&[]) / largest
}

/// The merged weights of each library that has a class for the model, with a head or without.
fn merged(model: &PetlModel) -> Vec<(WeightNames, bool, MergedWeights)> {
    let mut found = Vec::new();
    for names in [WeightNames::Timm, WeightNames::HuggingFace] {
        for with_head in [true, false] {
            let merged = if with_head {
                MergedWeights::new(model, names)
            } else {
                MergedWeights::features(model, names)
            };
            match merged {
                Ok(merged) => found.push((names, with_head, merged)),
                Err(Error::NotExportable { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
    }
    found
}

#[test]
fn merged_weights_open_with_the_features_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("merged.safetensors");
    let mut classes = Vec::new();
    for (name, config) in backbones() {
        let model = model(&config, &methods()[1].1);
        let images = images(&config);
        let expected = tch::no_grad(|| model.features(&images, false)).unwrap();
        for (names, with_head, merged) in merged(&model) {
            let what = format!("{name} {names:?} {} head={with_head}", merged.class());
            classes.push(merged.class());
            merged.save(&path).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            merged.save(&path).unwrap();
            assert!(bytes == std::fs::read(&path).unwrap(), "{what}");
            // A classifier in the file changes what is opened, so that the config is given.
            let given = ViTConfig { projection: None, ..config.clone() };
            let pool = config.attention_pool.filter(|_| {
                merged.names().any(|name| name.contains("attn_pool") || name.contains("head.probe"))
            });
            let has_bias = |name: &str| name.contains("q_bias") || name.contains("q_proj.bias");
            let qkv_bias = config.qkv_bias || merged.names().any(has_bias);
            let given = ViTConfig { attention_pool: pool, qkv_bias, ..given };
            let opened = FrozenViT::open_with(&path, &given, device()).unwrap_or_else(|error| {
                panic!("{what}: {error}");
            });
            let found = opened.features(&images).unwrap();
            assert!(gap(&found, &expected) < 1e-5, "{what}: {}", gap(&found, &expected));
        }
    }
    classes.sort_unstable();
    classes.dedup();
    assert_eq!(
        classes,
        [
            "CLIPVisionModel",
            "DINOv3ViTModel",
            "Dinov2ForImageClassification",
            "Dinov2Model",
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersModel",
            "Eva",
            "SiglipForImageClassification",
            "SiglipVisionModel",
            "ViTForImageClassification",
            "ViTModel",
            "VisionTransformer",
            "VisionTransformerDistilled",
        ]
    );
}

#[test]
fn what_cannot_be_merged_is_refused_with_the_reason() {
    let refused = |model: &PetlModel, names| match MergedWeights::new(model, names) {
        Err(Error::NotExportable { model, form, reason, .. }) => {
            format!("{model} {form}: {reason}")
        }
        other => panic!("{other:?}"),
    };
    let (timm, hugging_face) = (WeightNames::Timm, WeightNames::HuggingFace);
    for method in
        [Method::ConvBypass(ConvBypassConfig::default()), Method::Adapter(AdapterConfig::default())]
    {
        let text = refused(&model(&vit(), &method), timm);
        assert!(text.contains(method.name()) && text.contains("does not fold"), "{text}");
    }
    let with_lora = |config: ViTConfig| model(&config, &methods()[1].1);
    let eva = ViTConfig { attention_norm: true, ..dinov3() };
    assert!(refused(&with_lora(eva), timm).contains("the DINOv3 form of Eva"));
    assert!(refused(&with_lora(dinov3()), hugging_face).contains("no classifier"));
    assert!(refused(&with_lora(siglip()), hugging_face).contains("pooling `attention`"));
    let distilled = &backbones()[3].1;
    assert!(refused(&with_lora(distilled.clone()), hugging_face).contains("none has these layers"));
    // SSF shifts the outputs of layers that have no bias in the class.
    let shifted = model(&dinov3(), &Method::Ssf(SsfConfig::default()));
    assert!(refused(&shifted, timm).contains("bias of the keys"));
}

/// Every method beside every backbone is written in every form. `tests/export/check.py` reads the
/// files from the folder `CONVPASS_EXPORT_CASES`; without it they are written to a temporary one.
#[test]
fn cases_are_written_in_every_form() {
    let temporary = tempfile::tempdir().unwrap();
    let chosen = std::env::var_os("CONVPASS_EXPORT_CASES").map(PathBuf::from);
    let root = chosen.unwrap_or_else(|| temporary.path().to_path_buf());
    for (backbone, config) in backbones() {
        for (method, of_method) in methods() {
            let model = model(&config, &of_method);
            write_case(&root.join(format!("{backbone}-{method}")), &config, &model);
        }
    }
}

fn write_case(folder: &Path, config: &ViTConfig, model: &PetlModel) {
    std::fs::create_dir_all(folder).unwrap();
    let images = images(config);
    let logits = tch::no_grad(|| model.forward(&images, false)).unwrap();
    let features = tch::no_grad(|| model.features(&images, false)).unwrap();
    let tensors = [("images", &images), ("logits", &logits), ("features", &features)];
    Tensor::write_safetensors(&tensors, folder.join("expected.safetensors")).unwrap();
    OnnxModel::new(model).unwrap().save(folder.join("logits.onnx")).unwrap();
    OnnxModel::features(model).unwrap().save_with_data(folder.join("features.onnx")).unwrap();
    let mut files = Vec::new();
    for (index, (names, with_head, merged)) in merged(model).into_iter().enumerate() {
        let file = format!("merged_{index}.safetensors");
        merged.save(folder.join(&file)).unwrap();
        let library = if names == WeightNames::Timm { "timm" } else { "transformers" };
        files.push(json!({"file": file, "library": library, "class": merged.class(),
            "with_head": with_head}));
    }
    let case = json!({"config": config, "classes": CLASSES, "merged": files});
    std::fs::write(folder.join("case.json"), case.to_string()).unwrap();
}
