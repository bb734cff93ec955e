//! What an adapted model promises whatever its weights: the frozen function at the start, an
//! untouched backbone, exact files, the paper's counts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use convpass::backbone::Stream;
use convpass::backbone::{BlockPass, Hooks, ImageSize};
use convpass::seam::BackboneShape;
use convpass::{
    Backbone, ConvBypassConfig, ConvInit, Error, FrozenViT, Method, PetlConfig, PetlModel,
    Placement, Pooling, Result, SubLayers, ViTConfig,
};
use tch::{Kind, Tensor, nn, nn::OptimizerConfig};

use crate::support::{device, waves};

const CLASSES: i64 = 5;

fn small_vit() -> ViTConfig {
    ViTConfig {
        image_size: (12, 20),
        patch_size: 4,
        embed_dim: 32,
        depth: 3,
        num_heads: 4,
        mlp_dim: 48,
        ..ViTConfig::default()
    }
}

/// A class token, none, and registers.
fn small_vits() -> [ViTConfig; 3] {
    let class_token = small_vit();
    let none = ViTConfig {
        class_token: false,
        pos_embed_prefix: 0,
        pooling: Pooling::Average,
        ..small_vit()
    };
    let registers = ViTConfig { num_registers: 4, ..small_vit() };
    [class_token, none, registers]
}

fn backbone(seed: i64) -> FrozenViT {
    FrozenViT::random(&small_vit(), seed, device()).unwrap()
}

fn bypasses(config: ConvBypassConfig) -> PetlConfig {
    PetlConfig::new(Method::ConvBypass(config), CLASSES)
}

fn model(seed: i64) -> PetlModel {
    PetlModel::new(backbone(seed), &bypasses(ConvBypassConfig::default())).unwrap()
}

fn images(count: i64) -> Tensor {
    waves(&[count, 3, 12, 20])
}

fn logits(model: &PetlModel) -> Tensor {
    tch::no_grad(|| model.forward(&images(3), false).unwrap())
}

fn variables(model: &PetlModel) -> BTreeMap<String, Tensor> {
    model.var_store().variables().into_iter().collect()
}

/// A few steps of AdamW on labels that mean nothing, with dropout and drop path on.
fn train(model: &PetlModel, steps: usize) {
    let mut optimizer = nn::AdamW::default().build(model.var_store(), 1e-2).unwrap();
    let labels = Tensor::from_slice(&[0i64, 1, 2, 3, 4, 0, 1, 2]).to_device(device());
    for _ in 0..steps {
        let loss = model.forward(&images(8), true).unwrap().cross_entropy_for_logits(&labels);
        optimizer.backward_step(&loss);
    }
}

#[test]
fn an_untrained_model_is_a_linear_probe_bit_for_bit() {
    let choices = [
        ConvBypassConfig::default(),
        ConvBypassConfig { conv_init: ConvInit::XavierUniform, scale: 100.0, ..Default::default() },
        ConvBypassConfig { placement: Placement::Sequential, ..Default::default() },
        ConvBypassConfig { sub_layers: SubLayers::Attention, ..Default::default() },
        ConvBypassConfig { sub_layers: SubLayers::Mlp, kernel_size: 1, ..Default::default() },
    ];
    for vit in small_vits() {
        let backbone = FrozenViT::random(&vit, 1, device()).unwrap();
        let probe = PetlConfig::new(Method::LinearProbe, CLASSES);
        let probe = PetlModel::new(backbone.clone(), &probe).unwrap();
        for choice in &choices {
            let adapted = PetlModel::new(backbone.clone(), &bypasses(choice.clone())).unwrap();
            let features = tch::no_grad(|| adapted.features(&images(3), false).unwrap());
            assert_eq!(features, backbone.features(&images(3)).unwrap(), "{vit:?} {choice:?}");

            let head = variables(&adapted);
            tch::no_grad(|| {
                variables(&probe).into_iter().for_each(|(name, mut v)| v.copy_(&head[&name]));
            });
            assert_eq!(logits(&adapted), logits(&probe), "{vit:?} {choice:?}");
        }
    }
}

#[test]
fn training_moves_every_trainable_and_no_frozen_byte() {
    let model = model(2);
    let digest = model.backbone().digest();
    let before: BTreeMap<_, _> =
        variables(&model).into_iter().map(|(name, v)| (name, v.detach().copy())).collect();
    let logits_before = logits(&model);
    train(&model, 4);
    assert_eq!(model.backbone().digest(), digest);
    assert_ne!(logits(&model), logits_before);
    for (name, after) in variables(&model) {
        assert_ne!(after, before[&name], "{name} was not trained");
    }
}

#[test]
fn the_var_store_holds_the_published_names_alone() {
    let model = model(0);
    let mut expected = vec!["head.bias".to_owned(), "head.weight".to_owned()];
    for block in 0..3 {
        for sub_layer in ["attn", "mlp"] {
            for conv in ["down", "conv", "up"] {
                for part in ["weight", "bias"] {
                    expected
                        .push(format!("blocks.{block}.adapter_{sub_layer}.adapter_{conv}.{part}"));
                }
            }
        }
    }
    expected.sort();
    assert_eq!(variables(&model).into_keys().collect::<Vec<_>>(), expected);
    assert!(variables(&model).values().all(|v| v.requires_grad()));
}

#[test]
fn a_saved_adapter_comes_back_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second, third) =
        (folder.path().join("1"), folder.path().join("2"), folder.path().join("3"));
    let config = PetlConfig {
        drop_path: 0.2,
        seed: 7,
        ..bypasses(ConvBypassConfig { scale: 0.1, bottleneck_dim: 4, ..Default::default() })
    };
    let model = PetlModel::new(backbone(3), &config).unwrap();
    train(&model, 2);
    model.save_adapter(&first).unwrap();
    model.save_adapter(&second).unwrap();
    let bytes = std::fs::read(&first).unwrap();
    assert_eq!(std::fs::read(&second).unwrap(), bytes);

    let again = PetlModel::load_adapter(backbone(3), &first).unwrap();
    assert_eq!(again.config(), &config);
    assert_eq!(logits(&again), logits(&model));
    again.save_adapter(&third).unwrap();
    assert_eq!(std::fs::read(&third).unwrap(), bytes);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3, "a temporary file is left");
}

#[test]
fn an_adapter_refuses_another_backbone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    model(3).save_adapter(&path).unwrap();
    let error = PetlModel::load_adapter(backbone(4), &path).unwrap_err();
    let (expected_digest, found_digest) =
        (Backbone::digest(&backbone(3)).unwrap(), Backbone::digest(&backbone(4)).unwrap());
    match error {
        Error::BackboneMismatch { file, expected, found, .. } => {
            assert_eq!((file, expected, found), (path, expected_digest, found_digest));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn weights_without_metadata_are_no_adapter_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), variables(&model(0)));
    let error = PetlModel::<FrozenViT>::load_adapter(backbone(0), &path).unwrap_err();
    assert!(matches!(error, Error::UnknownFormat { .. }), "{error}");
}

#[test]
fn one_by_one_convolutions_load_as_matrices() {
    let folder = tempfile::tempdir().unwrap();
    let source = model(0);
    train(&source, 1);
    let mut weights = variables(&source);
    for (name, weight) in &mut weights {
        if name.ends_with("down.weight") || name.ends_with("up.weight") {
            *weight = weight.unsqueeze(-1).unsqueeze(-1);
        }
    }
    let mut target = model(0);
    target.load_weights(write(folder.path(), weights)).unwrap();
    assert_eq!(logits(&target), logits(&source));
}

#[test]
fn load_weights_refuses_what_does_not_fit_and_changes_nothing() {
    const NAME: &str = "blocks.1.adapter_mlp.adapter_conv.weight";
    type Edit = fn(&mut BTreeMap<String, Tensor>);
    type Expected = fn(Error) -> bool;
    let cases: [(Edit, Expected); 5] = [
        (
            |weights| drop(weights.remove(NAME)),
            |e| matches!(e, Error::MissingTensor { name, expected, .. } if name == NAME && expected == [8, 8, 3, 3]),
        ),
        (
            |weights| drop(weights.insert(NAME.replace("mlp", "mpl"), Tensor::from(0.5f32))),
            |e| matches!(e, Error::UnexpectedTensors { names, .. } if names == [NAME.replace("mlp", "mpl")]),
        ),
        (
            // Only a name that the file lacks can be the one that was meant.
            |weights| {
                let weight = weights.remove(NAME).expect("it is there");
                weights.insert(NAME.replace("mlp", "mpl"), weight);
            },
            |e| matches!(e, Error::UnexpectedTensors { nearest, .. } if nearest.as_deref() == Some(NAME)),
        ),
        (
            |weights| {
                drop(
                    weights
                        .insert(NAME.into(), Tensor::ones([8, 8, 1, 1], (Kind::Float, device()))),
                )
            },
            |e| matches!(e, Error::ShapeMismatch { name, found, .. } if name == NAME && found == [8, 8, 1, 1]),
        ),
        (
            |weights| {
                drop(
                    weights
                        .insert(NAME.into(), Tensor::ones([8, 8, 3, 3], (Kind::Int64, device()))),
                )
            },
            |e| matches!(e, Error::ElementType { name, .. } if name == NAME),
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    let trained = model(0);
    train(&trained, 1);
    for (number, (edit, expected)) in cases.into_iter().enumerate() {
        let mut weights = variables(&trained);
        edit(&mut weights);
        let path = write(folder.path(), weights);
        let mut target = model(0);
        let before = logits(&target);
        let error = target.load_weights(&path).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&path.display().to_string()), "{text}");
        assert!(expected(error), "case {number}: {text}");
        assert_eq!(logits(&target), before, "case {number} changed the model");
    }
}

#[test]
fn load_weights_refuses_every_cut_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let cut = folder.path().join("cut");
    let published = crate::golden::fixtures().join("convpass_model/rectangular/adapter.pt");
    let saved = folder.path().join("saved");
    model(0).save_adapter(&saved).unwrap();
    for whole in [&saved, &published] {
        let bytes = std::fs::read(whole).unwrap();
        let ends = (0..bytes.len()).step_by(997).chain([1, 7, 8, 9, bytes.len() - 1]);
        for end in ends {
            std::fs::write(&cut, &bytes[..end]).unwrap();
            assert!(model(0).load_weights(&cut).is_err(), "{} cut at {end}", whole.display());
        }
    }
    assert!(matches!(model(0).load_weights(folder.path().join("none")), Err(Error::Io { .. })));
    assert!(model(0).load_weights(folder.path()).is_err(), "a folder is no file");
}

fn write(folder: &Path, weights: BTreeMap<String, Tensor>) -> PathBuf {
    let path = folder.join("weights.safetensors");
    let weights: Vec<(String, Tensor)> =
        weights.into_iter().map(|(name, weight)| (name, weight.detach().contiguous())).collect();
    Tensor::write_safetensors(&weights, &path).unwrap();
    path
}

/// Blocks that have widths and no weights: enough to count trainables of a model too large for a test.
#[derive(Clone, Debug)]
struct Widths(Vec<i64>);

impl Backbone for Widths {
    fn num_blocks(&self) -> usize {
        self.0.len()
    }

    fn embed(&self, _: &Tensor, _: &Hooks) -> Result<Stream> {
        unreachable!("only counted")
    }

    fn block(&self, _: Stream, _: &BlockPass) -> Result<Stream> {
        unreachable!("only counted")
    }

    fn pool(&self, _: Stream, _: &Hooks) -> Result<Tensor> {
        unreachable!("only counted")
    }

    fn patch_map(&self, _: Stream, _: &Hooks) -> Result<Tensor> {
        unreachable!("only counted")
    }

    fn image_size(&self) -> ImageSize {
        ImageSize::From(1)
    }

    fn feature_dim(&self) -> i64 {
        self.0[self.0.len() - 1]
    }

    fn shape(&self) -> BackboneShape {
        BackboneShape::new("row of widths", self.0.clone(), Vec::new(), 0)
    }

    fn named_weights(&self) -> &[(String, Tensor)] {
        &[]
    }

    fn map_weights(&self, _: &mut dyn FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(self.clone())
    }

    fn choices(&self) -> String {
        String::new()
    }
}

#[test]
fn trainables_are_the_papers() {
    let (base, large) = (Widths(vec![768; 12]), Widths(vec![1024; 24]));
    let attention = SubLayers::Attention;
    let counts = [
        (&base, ConvBypassConfig::default(), 327_552),
        (&base, ConvBypassConfig { sub_layers: attention, ..Default::default() }, 163_776),
        (&base, ConvBypassConfig { bottleneck_dim: 16, ..Default::default() }, 664_320),
        (&large, ConvBypassConfig::default(), 864_000),
    ];
    for (backbone, config, expected) in counts {
        let counted =
            PetlModel::new(backbone.clone(), &bypasses(config)).unwrap().trainable_params();
        assert_eq!(counted.method, expected);
        assert_eq!(counted.head as i64, (backbone.feature_dim() + 1) * CLASSES);
        assert_eq!(counted.total(), counted.method + counted.head);
    }
    let probe = PetlModel::new(base, &PetlConfig::new(Method::LinearProbe, CLASSES)).unwrap();
    assert_eq!(probe.trainable_params().method, 0);
}
