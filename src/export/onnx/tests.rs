//! Exported graphs against the models that they were made from.

use std::path::Path;

use prost::Message;
use tch::{Device, Tensor};

use super::OnnxModel;
use super::graph::WeightSet;
use super::interpreter::{run, waves};
use super::proto::ModelProto;
use crate::backbone::{
    AnyBackbone, AttentionPooling, Backbone, FrozenSwin, FrozenViT, MlpActivation, Pooling,
    Precision, Preprocessing, Rotary, RotaryCoordinates, RotaryPairs, SwinConfig, ViTConfig,
};
use crate::error::Error;
use crate::model::{PetlConfig, PetlModel};
use crate::petl::{
    AdaptFormerConfig, AdaptFormerInput, AdapterConfig, BottleneckActivation, ConvBypassConfig,
    ConvBypassVariant, FactConfig, LoraConfig, LowBitConfig, Method, Placement, RepAdapterConfig,
    SsfConfig, SubLayers, VptConfig,
};

fn small() -> ViTConfig {
    ViTConfig {
        image_size: (17, 24),
        patch_size: 4,
        embed_dim: 16,
        depth: 3,
        num_heads: 2,
        mlp_dim: 32,
        norm_eps: 1e-3,
        ..ViTConfig::default()
    }
}

/// Every setting of a ViT, each in at least one config.
fn configs() -> Vec<ViTConfig> {
    let dinov3 = ViTConfig {
        num_registers: 4,
        pos_embed: false,
        pos_embed_prefix: 0,
        rotary: Some(Rotary::DINOV3),
        qkv_bias: false,
        layer_scale: true,
        ..small()
    };
    let coordinates =
        RotaryCoordinates::Index { offset: 1.0, reference: Some((7, 9)), columns_first: true };
    let pool = AttentionPooling { num_heads: Some(4), mlp_dim: 20, reads_prefix: false };
    let siglip = ViTConfig {
        class_token: false,
        pos_embed_prefix: 0,
        activation: MlpActivation::GeluTanh,
        pooling: Pooling::Attention,
        attention_pool: Some(pool),
        ..small()
    };
    vec![
        small(),
        ViTConfig {
            activation: MlpActivation::SwiGlu,
            pooling: Pooling::Average,
            ..dinov3.clone()
        },
        ViTConfig { pooling: Pooling::ClassTokenAndAverage, ..dinov3.clone() },
        ViTConfig {
            rotary: Some(Rotary { base: 1e4, pairs: RotaryPairs::Neighbours, coordinates }),
            pos_embed: true,
            pos_embed_prefix: 1,
            attention_norm: true,
            mlp_norm: true,
            pooling: Pooling::AverageThenNorm,
            ..dinov3
        },
        ViTConfig {
            pre_norm: true,
            patch_bias: false,
            activation: MlpActivation::QuickGelu,
            projection: Some(12),
            ..small()
        },
        ViTConfig {
            num_registers: 1,
            pos_embed_prefix: 2,
            activation: MlpActivation::Relu,
            pooling: Pooling::ClassAndDistillation,
            ..small()
        },
        ViTConfig {
            class_token: true,
            pos_embed_prefix: 1,
            activation: MlpActivation::SwiGlu,
            attention_pool: Some(AttentionPooling { reads_prefix: true, num_heads: None, ..pool }),
            ..siglip.clone()
        },
        ViTConfig {
            pooling: Pooling::Average,
            final_norm: false,
            activation: MlpActivation::Silu,
            ..siglip.clone()
        },
        siglip,
    ]
}

/// Methods of every kind that can be exported.
fn methods() -> Vec<Method> {
    let bypass = ConvBypassConfig { bottleneck_dim: 3, scale: 0.7, ..ConvBypassConfig::default() };
    let adapter = AdapterConfig {
        bottleneck_dim: 3,
        scale: 0.6,
        blocks: Some(vec![0, 2, 3]),
        ..AdapterConfig::default()
    };
    let vpt = VptConfig { num_tokens: 2, ..VptConfig::default() };
    let former = AdaptFormerConfig { bottleneck_dim: 2, ..AdaptFormerConfig::default() };
    vec![
        Method::LinearProbe,
        Method::ConvBypass(bypass.clone()),
        Method::ConvBypass(ConvBypassConfig {
            placement: Placement::Sequential,
            sub_layers: SubLayers::Attention,
            ..bypass.clone()
        }),
        Method::ConvBypassVariant(ConvBypassVariant {
            base: bypass.clone(),
            mlp_kernel_size: Some(1),
            channel_scale: true,
            blocks: Some(vec![2, 0, 3]),
        }),
        Method::Lora(LoraConfig { rank: 2, ..LoraConfig::default() }),
        Method::Adapter(AdapterConfig {
            sub_layers: SubLayers::Both,
            activation: BottleneckActivation::QuickGelu,
            channel_scale: true,
            ..adapter.clone()
        }),
        Method::AdaptFormer(former.clone()),
        Method::AdaptFormer(AdaptFormerConfig { input: AdaptFormerInput::Normed, ..former }),
        Method::Vpt(vpt.clone()),
        Method::Vpt(VptConfig { deep: false, ..vpt.clone() }),
        Method::Ssf(SsfConfig::default()),
        Method::RepAdapter(RepAdapterConfig::default()),
        Method::Fact(FactConfig { rank: 2, ..FactConfig::default() }),
        Method::BitFit,
        Method::Full,
        Method::LowBit(LowBitConfig {
            bits: 2,
            method: Box::new(Method::ConvBypass(bypass.clone())),
        }),
        Method::LowBit(LowBitConfig {
            bits: 1,
            method: Box::new(Method::Lora(LoraConfig::default())),
        }),
        Method::Compose {
            methods: vec![
                Method::Lora(LoraConfig { rank: 2, ..LoraConfig::default() }),
                Method::Vpt(VptConfig { blocks: Some(vec![2, 0, 3]), ..vpt }),
                Method::Adapter(adapter),
                Method::ConvBypass(bypass),
                Method::LayerNorm,
            ],
        },
    ]
}

/// A model with random weights everywhere.
fn model(config: &ViTConfig, method: &Method) -> PetlModel<FrozenViT> {
    let backbone = FrozenViT::random(config, 3, Device::Cpu).unwrap();
    let mut step = 0.1;
    let backbone = backbone.map_weights(&mut |_, weight| {
        step += 0.37;
        Ok(weight + waves(&weight.size(), step) * 0.3)
    });
    let model = PetlModel::new(backbone.unwrap(), &PetlConfig::new(method.clone(), 5)).unwrap();
    shake(&model);
    model
}

fn shake<B: Backbone>(model: &PetlModel<B>) {
    let mut variables: Vec<_> = model.var_store().variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    tch::no_grad(|| {
        for (index, (_, mut variable)) in variables.into_iter().enumerate() {
            let noise = waves(&variable.size(), 1.3 + index as f64) * 0.3;
            let _changed = variable.f_add_(&noise).unwrap();
        }
    });
}

fn saved(onnx: &OnnxModel) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    onnx.save(&path).unwrap();
    std::fs::read(path).unwrap()
}

fn images(config: &ViTConfig, batch: i64) -> Tensor {
    waves(&[batch, 3, config.image_size.0, config.image_size.1], 0.7)
}

fn assert_close(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}");
    let largest = expected.abs().max().double_value(&[]);
    let gap = (found - expected).abs().max().double_value(&[]);
    assert!(gap <= 2e-5 * largest, "{what}: {gap} of {largest}");
}

#[test]
fn graphs_compute_what_the_models_do() {
    let (configs, methods) = (configs(), methods());
    for (number, config) in configs.iter().enumerate() {
        for method in &methods {
            // Every method on two backbones, and every backbone with three methods.
            let is_wide = matches!(method, Method::ConvBypass(_) | Method::Compose { .. });
            if number > 1 && !is_wide {
                continue;
            }
            let model = model(config, method);
            let onnx = OnnxModel::new(&model).unwrap();
            let images = images(config, 2);
            let expected = tch::no_grad(|| model.forward(&images, false)).unwrap();
            let what = format!("config {number}, {method:?}");
            assert_close(&run(&saved(&onnx), &[], &images), &expected, &what);
        }
    }
}

#[test]
fn other_precisions_are_exported_in_f32() {
    let config = small();
    for method in [&methods()[1], &methods()[4]] {
        for precision in [Precision::Bf16, Precision::F16, Precision::Int8] {
            let backbone = FrozenViT::random(&config, 3, Device::Cpu).unwrap();
            let backbone = precision.convert(backbone).unwrap();
            let model = PetlModel::new(backbone, &PetlConfig::new(method.clone(), 5)).unwrap();
            shake(&model);
            let onnx = OnnxModel::new(&model).unwrap();
            let images = images(&config, 2);
            let found = run(&saved(&onnx), &[], &images);
            let expected = tch::no_grad(|| model.forward(&images, false)).unwrap();
            // bf16 rounds to 8 bits in each layer.
            let bound = if precision == Precision::Bf16 { 5e-2 } else { 2e-5 };
            let largest = expected.abs().max().double_value(&[]);
            let gap = (found - expected).abs().max().double_value(&[]);
            assert!(gap <= bound * largest, "{precision}: {gap} of {largest}");
        }
    }
}

#[test]
fn a_backbone_and_the_features_of_a_model_are_exported() {
    for config in [&configs()[1], &configs()[8]] {
        let model = model(config, &methods()[1]);
        let images = images(config, 3);
        let adapted = tch::no_grad(|| model.features(&images, false)).unwrap();
        let onnx = OnnxModel::features(&model).unwrap();
        assert_close(&run(&saved(&onnx), &[], &images), &adapted, "adapted");
        let frozen = model.backbone().features(&images).unwrap();
        let onnx = OnnxModel::of_backbone(model.backbone()).unwrap();
        assert_close(&run(&saved(&onnx), &[], &images), &frozen, "frozen");
        assert!((frozen - adapted).abs().max().double_value(&[]) > 1e-3);
    }
}

#[test]
fn a_file_says_what_it_is() {
    let config = small();
    let backbone = AnyBackbone::from(FrozenViT::random(&config, 3, Device::Cpu).unwrap());
    let mut model = PetlModel::new(backbone, &PetlConfig::new(methods()[1].clone(), 2)).unwrap();
    model.set_class_names(vec!["cat".to_owned(), "dog".to_owned()]).unwrap();
    let onnx = OnnxModel::new(&model).unwrap();
    let bytes = saved(&onnx);
    assert_eq!(bytes, saved(&OnnxModel::new(&model).unwrap()));
    let file = ModelProto::decode(&bytes[..]).unwrap();
    assert_eq!((file.ir_version, file.opset_import[0].version), (8, OnnxModel::OPSET));
    let metadata: std::collections::BTreeMap<_, _> =
        file.metadata_props.iter().map(|entry| (entry.key.clone(), entry.value.clone())).collect();
    assert_eq!(&metadata, onnx.metadata());
    assert_eq!(metadata["class_names"], r#"["cat","dog"]"#);
    let read: Preprocessing = serde_json::from_str(&metadata["preprocessing"]).unwrap();
    assert_eq!(&read, model.backbone().preprocessing());
    let method: Method = serde_json::from_str(&metadata["method"]).unwrap();
    assert_eq!(method, methods()[1]);
    assert_eq!(metadata["backbone_digest"], model.backbone().digest().unwrap());
    let graph = file.graph.unwrap();
    let of = |info: &super::ValueInfo| {
        let shape = info.of.clone().unwrap().tensor_type.unwrap().shape.unwrap();
        let sizes: Vec<_> = shape.dim[1..].iter().map(|dim| dim.dim_value.unwrap()).collect();
        (info.name.clone(), shape.dim[0].dim_param.clone().unwrap(), sizes)
    };
    assert_eq!(of(&graph.input[0]), ("images".into(), "batch".into(), vec![3, 17, 24]));
    assert_eq!(of(&graph.output[0]), ("logits".into(), "batch".into(), vec![2]));
}

#[test]
fn large_weights_may_be_beside_the_model() {
    let config = ViTConfig { embed_dim: 32, mlp_dim: 64, ..small() };
    let model = model(&config, &methods()[4]);
    let onnx = OnnxModel::new(&model).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let files = onnx.save_with_data(&path).unwrap();
    let data_path = folder.path().join("model.onnx.data");
    assert_eq!((&files.model, files.data.as_deref()), (&path, Some(&*data_path)));
    let read = |path: &Path| std::fs::read(path).unwrap();
    let (file, data) = (read(&path), read(&data_path));
    assert!(file.len() * 2 < data.len());
    let images = images(&config, 1);
    let expected = tch::no_grad(|| model.forward(&images, false)).unwrap();
    assert_close(&run(&file, &data, &images), &expected, "with data");
    let external = ModelProto::decode(&file[..]).unwrap().graph.unwrap().initializer;
    let offsets = external.iter().flat_map(|t| t.external_data.get(1));
    assert!(offsets.clone().count() > 10);
    assert!(offsets.map(|at| at.value.parse::<usize>().unwrap()).all(|at| at % 4096 == 0));
    onnx.save_with_data(&path).unwrap();
    assert_eq!((read(&path), read(&data_path)), (file, data));
    // A file of just the largest size, and one of a byte more.
    let whole = saved(&onnx).len();
    for (limit, has_data) in [(whole, false), (whole - 1, true)] {
        let files = super::file::write(&onnx, &path, limit).unwrap();
        assert_eq!(files.data.is_some(), has_data);
    }
}

#[test]
fn what_has_no_graph_is_refused_with_the_reason() {
    let reason = |error: Error| match error {
        Error::NotExportable { model, form, reason } => format!("{model} {form}: {reason}"),
        other => panic!("{other}"),
    };
    let composed = Method::Compose { methods: vec![methods()[11].clone(), methods()[1].clone()] };
    let refused = reason(OnnxModel::new(&model(&small(), &composed)).unwrap_err());
    assert!(refused.contains("rep_adapter ONNX"), "{refused}");
    let config = SwinConfig::preset("swin_tiny_patch4_window7_224").unwrap();
    let swin = FrozenSwin::blank(&config).unwrap();
    let refused = reason(OnnxModel::of_backbone(&AnyBackbone::from(swin)).unwrap_err());
    assert!(refused.contains("Swin") && refused.contains("only ViTs"), "{refused}");
    let onnx = OnnxModel::of_backbone(model(&small(), &methods()[0]).backbone()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_owned(), folder.path().join("none/model.onnx")] {
        assert!(matches!(onnx.save(&path), Err(Error::Io { .. })), "{path:?}");
        assert!(matches!(onnx.save_with_data(&path), Err(Error::Io { .. })), "{path:?}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_weight_without_a_place_is_an_error() {
    let weights = ["a", "b"].map(|name| (name.to_owned(), waves(&[2], 1.0)));
    let mut weights = WeightSet::new("the backbone", weights.into());
    assert!(weights.get("a").is_ok());
    let error = weights.check_used().unwrap_err().to_string();
    assert!(error.contains("the graph has no place for its weight b"), "{error}");
    assert!(weights.find("b").unwrap().is_some() && weights.find("c").unwrap().is_none());
    weights.check_used().unwrap();
    assert!(weights.get("c").unwrap_err().to_string().contains("it has no weight c"));
}
