//! Methods of few bits: the size of their files, what they refuse, training before and after a file.

use std::collections::BTreeMap;
use std::path::Path;

use convpass::petl::LowBitConfig;
use convpass::{
    ConvBypassConfig, Error, FrozenViT, Method, PetlConfig, PetlModel, ViTConfig, audit,
};
use tch::{Kind, Tensor, nn, nn::OptimizerConfig};

use crate::support::device;

const CLASSES: i64 = 4;

fn low_bit(bits: i64, method: Method) -> Method {
    Method::LowBit(LowBitConfig { bits, method: Box::new(method) })
}

fn bypass() -> Method {
    Method::ConvBypass(ConvBypassConfig::default())
}

fn small_vit() -> ViTConfig {
    ViTConfig {
        image_size: (16, 16),
        patch_size: 4,
        embed_dim: 32,
        depth: 2,
        num_heads: 4,
        mlp_dim: 64,
        ..ViTConfig::default()
    }
}

fn model(method: Method) -> PetlModel {
    let backbone = FrozenViT::random(&small_vit(), 0, device()).unwrap();
    PetlModel::new(backbone, &PetlConfig::new(method, CLASSES)).unwrap()
}

/// Stripes, of another width and direction for each of the four classes, twice.
fn images() -> Tensor {
    let ramp = Tensor::arange(16, (Kind::Float, device()));
    let stripes = |width: f64| (&ramp * width).sin().expand([3, 16, 16], false) * 3.0;
    let across = [0.4, 1.3].map(stripes);
    let along = [0.4, 1.3].map(|width| stripes(width).transpose(1, 2));
    let four = Tensor::stack(&[&across[0], &across[1], &along[0], &along[1]], 0);
    Tensor::cat(&[&four, &(&four * 0.8)], 0)
}

fn logits(model: &PetlModel) -> Tensor {
    tch::no_grad(|| model.forward(&images(), false).unwrap())
}

/// The losses of some steps of AdamW.
fn train(model: &PetlModel, steps: usize) -> Vec<f64> {
    let mut optimizer = nn::AdamW::default().build(model.var_store(), 3e-3).unwrap();
    let labels = Tensor::from_slice(&[0i64, 1, 2, 3, 0, 1, 2, 3]).to_device(device());
    let mut step = || {
        let loss = model.forward(&images(), false).unwrap().cross_entropy_for_logits(&labels);
        optimizer.backward_step(&loss);
        loss.double_value(&[])
    };
    (0..steps).map(|_| step()).collect()
}

fn load(model: &PetlModel, path: &Path) -> convpass::Result<PetlModel> {
    PetlModel::load_adapter(model.backbone().clone(), path)
}

/// 327,552 weights in 144 tensors; each keeps a mean and a deviation.
#[test]
fn a_bypass_of_one_bit_takes_forty_one_kilobytes() {
    let vit = ViTConfig::default();
    for (bits, bytes) in [(1, 40_944), (2, 81_888), (4, 163_776), (8, 327_552)] {
        let row = audit(&vit, &low_bit(bits, bypass())).unwrap();
        assert_eq!((row.params, row.bytes), (327_552, bytes + 144 * 8));
    }
    assert_eq!(audit(&vit, &bypass()).unwrap().bytes, 4 * 327_552);
    assert_eq!(audit(&vit, &Method::Full).unwrap().bytes, 4 * 85_798_656);
}

#[test]
fn a_file_is_as_large_as_the_audit_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    for method in [bypass(), low_bit(1, bypass()), low_bit(4, bypass())] {
        let model = model(method.clone());
        model.save_adapter(&path).unwrap();
        let file = std::fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as i64;
        let head = 4 * model.trainable_params().head as i64;
        let bytes = audit(model.backbone().config(), &method).unwrap().bytes;
        assert_eq!(file.len() as i64, header + head + bytes, "{method:?}");
    }
}

#[test]
fn one_bit_learns_and_goes_on_after_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    let first = model(low_bit(1, bypass()));
    let losses = train(&first, 60);
    assert!(losses.iter().any(|loss| *loss < 0.5 * losses[0]), "{losses:?}");
    first.save_adapter(&path).unwrap();

    let second = load(&first, &path).unwrap();
    assert_eq!(logits(&second), logits(&first));
    train(&second, 10);
    assert_ne!(logits(&second), logits(&first));
    // Trained again, so coded again.
    second.save_adapter(&path).unwrap();
    assert_eq!(logits(&load(&first, &path).unwrap()), logits(&second));
}

#[test]
fn full_precision_weights_load_into_few_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plain");
    let plain = model(bypass());
    train(&plain, 2);
    plain.save_adapter(&path).unwrap();
    let mut coded = model(low_bit(8, bypass()));
    coded.load_weights(&path).unwrap();
    let gap = (logits(&coded) - logits(&plain)).abs().max() / logits(&plain).abs().max();
    let gap = gap.double_value(&[]);
    assert!(gap > 0.0 && gap < 0.05, "{gap}");
}

#[test]
fn a_file_that_does_not_fit_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (path, damaged) = (folder.path().join("adapter"), folder.path().join("damaged"));
    let mut model = model(low_bit(2, bypass()));
    model.save_adapter(&path).unwrap();
    let before = logits(&model);
    let tensors: BTreeMap<String, Tensor> =
        Tensor::read_safetensors(&path).unwrap().into_iter().collect();
    assert_eq!(tensors["low_bit.codes"].kind(), Kind::Uint8);
    let edited = |name: &str, tensor: Option<Tensor>| {
        let mut tensors: Vec<(&str, Tensor)> =
            tensors.iter().map(|(name, t)| (name.as_str(), t.shallow_clone())).collect();
        tensors.retain(|(own, _)| *own != name);
        tensors.extend(tensor.map(|tensor| (name, tensor)));
        Tensor::write_safetensors(&tensors, &damaged).unwrap();
    };

    let codes = &tensors["low_bit.codes"];
    edited("low_bit.codes", Some(codes.narrow(0, 1, codes.size()[0] - 1)));
    let error = model.load_weights(&damaged).unwrap_err();
    assert!(
        matches!(&error, Error::ShapeMismatch { name, .. } if name == "low_bit.codes"),
        "{error}"
    );
    edited("low_bit.codes", Some(codes.to_kind(Kind::Float)));
    let error = model.load_weights(&damaged).unwrap_err();
    assert!(error.to_string().contains("expected u8, found f32"), "{error}");
    edited("low_bit.statistics", None);
    let error = model.load_weights(&damaged).unwrap_err();
    assert!(
        matches!(&error, Error::MissingTensor { name, .. } if name == "low_bit.statistics"),
        "{error}"
    );
    edited("head.bias", None);
    let error = model.load_weights(&damaged).unwrap_err();
    assert!(matches!(&error, Error::MissingTensor { name, .. } if name == "head.bias"), "{error}");
    assert_eq!(logits(&model), before);

    let error = self::model(bypass()).load_weights(&path).unwrap_err();
    assert!(matches!(error, Error::UnexpectedTensors { .. }), "{error}");
    let bytes = std::fs::read(&path).unwrap();
    for length in (0..bytes.len()).step_by(97) {
        std::fs::write(&damaged, &bytes[..length]).unwrap();
        load(&model, &damaged).unwrap_err();
    }
}

#[test]
fn what_cannot_be_of_few_bits_is_told() {
    for method in [
        low_bit(3, bypass()),
        low_bit(0, bypass()),
        low_bit(1, Method::Full),
        low_bit(1, low_bit(1, bypass())),
        low_bit(1, Method::Compose { methods: vec![bypass(), Method::BitFit] }),
        low_bit(1, Method::ConvBypass(ConvBypassConfig { kernel_size: 2, ..Default::default() })),
    ] {
        let error = audit(&small_vit(), &method).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{method:?}: {error}");
    }
}
