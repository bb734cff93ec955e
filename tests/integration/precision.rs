//! Backbones in other numbers than f32: what they compute, what trains beside them, what is refused.

use convpass::backbone::Pass;
use convpass::backbone::{ContinuousBiasConfig, ConvNeXtNorm, Forward, NormPlacement};
use convpass::seam::NoMethod;
use convpass::train::Silent;
use convpass::{
    AnyBackbone, Autocast, Backbone, ConvBypassConfig, ConvNeXtConfig, Error, FrozenConvNeXt,
    FrozenSwin, FrozenViT, LoraConfig, Method, PetlConfig, PetlModel, Precision, SwinConfig,
    TrainConfig, ViTConfig,
};
use tch::{Device, Kind, Tensor};

use crate::resume::bars;
use crate::support::{device, limit};

fn small_vit() -> ViTConfig {
    ViTConfig {
        image_size: (16, 16),
        patch_size: 4,
        embed_dim: 32,
        depth: 3,
        num_heads: 4,
        mlp_dim: 64,
        ..ViTConfig::default()
    }
}

/// Numbers that look random: libtorch's generator is the whole process's, and other tests draw
/// from it meanwhile.
fn numbers(shape: &[i64], seed: f64) -> Tensor {
    let count = shape.iter().product::<i64>();
    let steps = Tensor::arange(count, (Kind::Double, Device::Cpu));
    let values = ((steps * 12.9898 + seed).sin() * 43.758).sin();
    values.to_kind(Kind::Float).view(shape).to_device(device())
}

fn images() -> Tensor {
    numbers(&[3, 3, 16, 16], 1.0)
}

fn bytes(backbone: &impl Backbone) -> usize {
    let weights = backbone.named_weights().iter();
    weights.map(|(_, weight)| weight.numel() * weight.kind().elt_size_in_bytes()).sum()
}

/// The trainables in the order of their names, moved away from the zeros that methods start at.
fn disturbed<B: Backbone>(model: &PetlModel<B>) -> Vec<(String, Tensor)> {
    let mut variables: Vec<_> = model.var_store().variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    tch::no_grad(|| {
        for (seed, (_, variable)) in variables.iter_mut().enumerate() {
            let noise = numbers(&variable.size(), seed as f64).to_device(variable.device()) * 0.1;
            let _added = variable.f_add_(&noise).unwrap();
        }
    });
    variables
}

fn features(backbone: &impl Backbone, images: &Tensor) -> Tensor {
    backbone.forward(images, &NoMethod, Pass::default()).unwrap()
}

/// The largest difference, over the largest value.
fn gap(a: &Tensor, b: &Tensor) -> f64 {
    let size = b.abs().max().double_value(&[]);
    (a.to_kind(Kind::Float) - b).abs().max().double_value(&[]) / size
}

#[test]
fn int8_is_close_small_and_one_backbone_however_it_is_built() {
    let vit = FrozenViT::random(&small_vit(), 0, device()).unwrap();
    let int8 = vit.to_int8().unwrap();
    assert!(int8.is_int8() && !vit.is_int8());
    assert!(gap(&int8.features(&images()).unwrap(), &vit.features(&images()).unwrap()) < 0.02);
    assert!(bytes(&int8) * 2 < bytes(&vit), "{} {}", bytes(&int8), bytes(&vit));
    assert_ne!(int8.digest(), vit.digest());
    for same in [int8.clone(), int8.to_int8().unwrap()] {
        assert_eq!(same.digest(), int8.digest());
        assert_eq!(same.features(&images()).unwrap(), int8.features(&images()).unwrap());
    }
    // Its own numbers beside the weights in int8.
    let half = int8.to_kind(Kind::BFloat16).unwrap();
    assert!(half.is_int8() && half.kind() == Kind::BFloat16);
    assert!(gap(&half.features(&images()).unwrap(), &vit.features(&images()).unwrap()) < 0.05);

    let swin = FrozenSwin::random(&small_swin(), 0, device()).unwrap();
    let images = numbers(&[2, 3, 32, 32], 2.0);
    let int8 = swin.to_int8().unwrap().features(&images).unwrap();
    assert!(gap(&int8, &swin.features(&images).unwrap()) < 0.02);
}

/// Beside int8 the trainables get the gradients of a backbone in f32 of the same values.
#[test]
fn gradients_beside_int8_are_those_of_its_values() {
    let int8 = FrozenViT::random(&small_vit(), 0, device()).unwrap().to_int8().unwrap();
    let scales: std::collections::HashMap<_, _> =
        int8.named_weights().iter().map(|(name, weight)| (name.clone(), weight)).collect();
    let vit = FrozenViT::random(&small_vit(), 0, device()).unwrap();
    let values = vit
        .map_weights(&mut |name, weight| {
            let scale =
                name.strip_suffix(".weight").and_then(|n| scales.get(&format!("{n}.scale")));
            Ok(match scale {
                Some(scale) => scales[name].to_kind(Kind::Float) * scale.unsqueeze(1),
                None => weight.shallow_clone(),
            })
        })
        .unwrap();
    let bypass = Method::ConvBypass(ConvBypassConfig::default());
    for method in [bypass, Method::Lora(LoraConfig::default()), Method::BitFit] {
        let gradients = |backbone: FrozenViT| {
            let config = PetlConfig { drop_path: 0.0, ..PetlConfig::new(method.clone(), 4) };
            let model = PetlModel::new(backbone, &config).unwrap();
            let variables = disturbed(&model);
            let labels = Tensor::from_slice(&[0i64, 1, 2]).to_device(device());
            let logits = model.forward(&images(), false).unwrap();
            logits.cross_entropy_for_logits(&labels).backward();
            variables.into_iter().map(|(name, v)| (name, v.grad())).collect::<Vec<_>>()
        };
        for ((name, found), (_, expected)) in
            gradients(int8.clone()).iter().zip(gradients(values.clone()))
        {
            assert!(found.defined(), "{method:?}: {name} has no gradient");
            assert!(gap(found, &expected) < limit(1e-4), "{method:?}: {name}");
        }
    }
}

fn small_swin() -> SwinConfig {
    SwinConfig {
        image_size: (32, 32),
        embed_dim: 32,
        depths: vec![1, 2],
        num_heads: vec![2, 4],
        window_sizes: vec![(4, 4), (4, 4)],
        patch_size: 4,
        ..SwinConfig::default()
    }
}

fn small_swin_v2() -> SwinConfig {
    SwinConfig {
        norm_placement: NormPlacement::After,
        cosine_attention: true,
        continuous_bias: Some(ContinuousBiasConfig {
            hidden_dim: 8,
            pretrained_window_sizes: vec![(0, 0), (3, 3)],
        }),
        // Padded windows, whose keys are zero.
        window_sizes: vec![(3, 3), (3, 3)],
        ..small_swin()
    }
}

fn small_convnext() -> ConvNeXtConfig {
    ConvNeXtConfig {
        depths: vec![1, 1, 2, 1],
        dims: vec![8, 16, 24, 32],
        ..ConvNeXtConfig::default()
    }
}

fn small_convnext_v2() -> ConvNeXtConfig {
    ConvNeXtConfig {
        response_norm: true,
        layer_scale: false,
        norm: ConvNeXtNorm::Deviation,
        head_dim: Some(8),
        ..small_convnext()
    }
}

/// On a CPU weights in f16 are kept as they are and computed with in f32: the features are to the
/// last bit those of the same numbers in f32.
#[test]
fn f16_on_a_cpu_is_f32_over_rounded_weights() {
    fn halved<B: Backbone>(exact: &B, images: &Tensor) -> (B, B) {
        let half = exact.to_kind(Kind::Half).unwrap();
        let rounded = half.to_kind(Kind::Float).unwrap();
        assert_eq!(features(&half, images), features(&rounded, images));
        (half, rounded)
    }
    fn check<B: Backbone>(exact: &B, images: &Tensor) {
        let (half, rounded) = halved(exact, images);
        assert_eq!((half.kind(), half.compute_kind()), (Kind::Half, Kind::Float));
        assert_eq!(bytes(&half) * 2, bytes(exact));
        assert_ne!(half.digest().unwrap(), rounded.digest().unwrap());
        let bypass = Method::ConvBypass(ConvBypassConfig::default());
        let lora = Method::Lora(LoraConfig::default());
        let both = Method::Compose { methods: vec![lora.clone(), Method::BitFit] };
        let methods = [bypass, lora, Method::BitFit, Method::LayerNorm, both, Method::Full];
        let places = |method: &Method| {
            let convolutional = exact.shape().family == "ConvNeXt";
            !convolutional || matches!(method, Method::Full)
        };
        for method in methods.into_iter().filter(places) {
            let config = PetlConfig { drop_path: 0.0, ..PetlConfig::new(method.clone(), 4) };
            let gradients = |backbone: &B| {
                let model = PetlModel::new(backbone.clone(), &config).unwrap();
                let variables = disturbed(&model);
                let labels = Tensor::arange(images.size()[0], (Kind::Int64, Device::Cpu));
                let logits = model.forward(images, false).unwrap();
                logits.cross_entropy_for_logits(&labels).backward();
                (logits.detach(), variables)
            };
            let ((logits, found), (expected, others)) = (gradients(&half), gradients(&rounded));
            assert!(gap(&logits, &expected) < 1e-6, "{method:?}");
            for ((name, a), (_, b)) in found.iter().zip(&others) {
                assert_eq!((a.kind(), a.grad().defined()), (Kind::Float, b.grad().defined()));
                if a.grad().defined() {
                    let largest = b.grad().abs().max().double_value(&[]);
                    let gap = (a.grad() - b.grad()).abs().max().double_value(&[]);
                    // A bias of all scores alike has no gradient but for rounding.
                    let bound = 1e-5 * largest + 1e-9;
                    assert!(gap <= bound, "{method:?}: {name}: {gap} of {largest}");
                }
            }
        }
    }
    let vit = ViTConfig { layer_scale: true, pre_norm: true, ..small_vit() };
    check(&FrozenViT::random(&vit, 0, Device::Cpu).unwrap(), &images().to_device(Device::Cpu));
    let larger = numbers(&[2, 3, 32, 32], 2.0).to_device(Device::Cpu);
    for swin in [small_swin(), small_swin_v2()] {
        check(&FrozenSwin::random(&swin, 0, Device::Cpu).unwrap(), &larger);
    }
    for convnext in [small_convnext(), small_convnext_v2()] {
        check(&FrozenConvNeXt::random(&convnext, 0, Device::Cpu).unwrap(), &larger);
    }
    // Beside weights in int8 too.
    let swin = FrozenSwin::random(&small_swin_v2(), 0, Device::Cpu).unwrap().to_int8().unwrap();
    halved(&swin, &larger);
    let vit = FrozenViT::random(&vit, 0, Device::Cpu).unwrap().to_int8().unwrap();
    halved(&vit, &images().to_device(Device::Cpu));
}

/// Autocast beside weights in f16, in every family: close to f32.
#[test]
fn f16_goes_with_autocast() {
    fn check<B: Backbone>(exact: &B, images: &Tensor) {
        let half = exact.to_kind(Kind::Half).unwrap();
        let guard = Autocast::enter(device(), Kind::BFloat16).unwrap();
        let found = features(&half, images);
        drop(guard);
        assert!(gap(&found, &features(exact, images)) < 0.05, "{}", exact.shape().family);
    }
    let vit = ViTConfig { num_registers: 2, pos_embed_prefix: 0, ..small_vit() };
    check(&FrozenViT::random(&vit, 0, device()).unwrap(), &images());
    let larger = numbers(&[2, 3, 32, 32], 2.0);
    for swin in [small_swin(), small_swin_v2()] {
        check(&FrozenSwin::random(&swin, 0, device()).unwrap(), &larger);
    }
    for convnext in [small_convnext(), small_convnext_v2()] {
        check(&FrozenConvNeXt::random(&convnext, 0, device()).unwrap(), &larger);
    }
}

#[test]
fn what_needs_the_weights_themselves_refuses_int8() {
    let int8 = FrozenViT::random(&small_vit(), 0, device()).unwrap().to_int8().unwrap();
    let full = PetlModel::new(int8.clone(), &PetlConfig::new(Method::Full, 4)).unwrap_err();
    assert!(matches!(full, Error::Config { .. }), "{full}");
    let lora = PetlConfig::new(Method::Lora(LoraConfig::default()), 4);
    let merged = PetlModel::new(int8, &lora).unwrap().merged_backbone().unwrap_err();
    assert!(matches!(merged, Error::Config { .. }), "{merged}");
}

#[test]
fn a_step_runs_in_every_precision() {
    let vit = FrozenViT::random(&small_vit(), 0, device()).unwrap();
    let method = Method::ConvBypass(ConvBypassConfig::default());
    // Which samples drop path leaves out would tell more than the precision does. (A new bypass adds
    // nothing, so that dropout shows in the gradients alone.)
    let config = PetlConfig { drop_path: 0.0, ..PetlConfig::new(method, 4) };
    let labels = Tensor::from_slice(&[0i64, 1, 2]).to_device(device());
    let loss = |backbone: FrozenViT| {
        let model = PetlModel::new(backbone, &config).unwrap();
        let logits = model.forward(&images(), true).unwrap();
        let loss = logits.to_kind(Kind::Float).cross_entropy_for_logits(&labels);
        loss.backward();
        for (name, variable) in model.var_store().variables() {
            let gradient = variable.grad();
            assert_eq!(gradient.kind(), Kind::Float, "{name}");
            assert!(gradient.isfinite().all().int64_value(&[]) == 1, "{name}");
        }
        loss.double_value(&[])
    };
    let expected = loss(vit.clone());
    for kind in [Kind::BFloat16, Kind::Half] {
        assert!((loss(vit.to_kind(kind).unwrap()) - expected).abs() < 0.1, "{kind:?}");
    }
    assert!((loss(vit.to_int8().unwrap()) - expected).abs() < 0.1);
    let guarded = {
        let _guard = Autocast::enter(device(), Kind::BFloat16).unwrap();
        loss(vit.clone())
    };
    assert!((guarded - expected).abs() < 0.1);
    assert!((loss(vit) - expected).abs() < 0.1);
}

/// The features of small random networks. Training is refused before its first step.
#[test]
fn dynamic_int8_evaluates_and_does_not_train() {
    let backbone = FrozenViT::random(&small_vit(), 0, Device::Cpu).unwrap();
    let exact = AnyBackbone::from(backbone.clone());
    let int8 = Precision::Int8Dynamic.convert(backbone).unwrap();
    assert!(int8.is_int8());
    let guard = match Precision::Int8Dynamic.guard(Device::Cpu) {
        Ok(guard) => guard,
        // A processor without the instructions refuses.
        Err(error) => return assert!(error.to_string().contains("AVX512-VNNI"), "{error}"),
    };
    let images = images().to_device(Device::Cpu);
    let expected = exact.features(&images).unwrap();
    let found = features(&int8, &images);
    let off = gap(&found, &expected);
    assert!(0.0 < off && off < 0.03, "{off}");
    // The steps of the rounding are those of the whole batch.
    let alone = features(&int8, &images.narrow(0, 0, 1));
    assert!(gap(&alone, &expected.narrow(0, 0, 1)) < 0.03);
    let config = PetlConfig::new(Method::ConvBypass(ConvBypassConfig::default()), 4);
    let mut model = PetlModel::new(int8.clone(), &config).unwrap();
    let logits = tch::no_grad(|| model.forward(&images, false)).unwrap();
    assert_eq!((logits.kind(), logits.size()), (Kind::Float, vec![3, 4]));
    let _variables = disturbed(&model);
    let error = model.forward(&images, true).unwrap_err().to_string();
    assert!(error.contains("int8-dynamic"), "{error}");
    let train = bars(80, 16, 0);
    let error = convpass::fit(&mut model, &train, None, &TrainConfig::default(), &mut Silent);
    assert!(error.unwrap_err().to_string().contains("int8-dynamic"));
    drop(guard);
    let plain = int8.to_int8().unwrap();
    assert!(gap(&features(&int8, &images), &features(&plain, &images)) < 1e-6);
    let gpu = Precision::Int8Dynamic.guard(Device::Cuda(0)).unwrap_err().to_string();
    assert!(gpu.contains("a CPU"), "{gpu}");
}
