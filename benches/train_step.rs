//! A ViT-B/16 with Convpass, trained and evaluated.

use std::hint::black_box;

use convpass::backbone::Stream;
use convpass::petl::ConvBypassVariant;
use convpass::{Backbone, ConvBypassConfig, FrozenViT, Method, PetlConfig, PetlModel, ViTConfig};
use criterion::{Criterion, Throughput};
use tch::nn::{AdamW, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const BATCH: i64 = 2;

fn model(drop_path: f64) -> PetlModel {
    let backbone = FrozenViT::random(&ViTConfig::default(), 0, Device::Cpu).unwrap();
    let method = Method::ConvBypass(ConvBypassConfig::default());
    let config = PetlConfig { drop_path, ..PetlConfig::new(method, 100) };
    PetlModel::new(backbone, &config).unwrap()
}

fn images() -> Tensor {
    Tensor::randn([BATCH, 3, 224, 224], (Kind::Float, Device::Cpu))
}

/// Forward, backward and AdamW, with the paper's drop path and with none.
pub fn train_step(criterion: &mut Criterion) {
    let (images, labels) = (images(), Tensor::zeros([BATCH], (Kind::Int64, Device::Cpu)));
    let mut group = criterion.benchmark_group("train_step");
    group.throughput(Throughput::Elements(BATCH as u64));
    for (name, drop_path) in [("drop_path", 0.1), ("flat", 0.0)] {
        let model = model(drop_path);
        let mut optimizer = AdamW::default().build(model.var_store(), 1e-3).unwrap();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let logits = model.forward(&images, true).unwrap();
                optimizer.backward_step(&logits.cross_entropy_for_logits(&labels));
            })
        });
    }
    group.finish();
}

/// A step that computes each block again in backward, one from what the frozen blocks in front made
/// of the images before, and one beside weights in int8.
pub fn variants(criterion: &mut Criterion) {
    let (images, labels) = (images(), Tensor::zeros([BATCH], (Kind::Int64, Device::Cpu)));
    let mut group = criterion.benchmark_group("train_step_variants");
    group.throughput(Throughput::Elements(BATCH as u64));
    let loss = |logits: &Tensor| -> convpass::Result<Tensor> {
        Ok(logits.cross_entropy_for_logits(&labels))
    };
    let flat = model(0.0);
    group.bench_function("recompute", |bencher| {
        bencher.iter(|| flat.backward_recomputed(&images, loss).unwrap())
    });
    let config = ConvBypassVariant {
        blocks: Some((0..12).map(|block| if block < 9 { 0 } else { 8 }).collect()),
        ..ConvBypassVariant::default()
    };
    let config =
        PetlConfig { drop_path: 0.0, ..PetlConfig::new(Method::ConvBypassVariant(config), 100) };
    let last = PetlModel::new(flat.backbone().clone(), &config).unwrap();
    group.bench_function("last_3_blocks", |bencher| {
        bencher.iter(|| loss(&last.forward(&images, true).unwrap()).unwrap().backward())
    });
    let Stream { tokens, layout } = last.frozen_prefix(&images).unwrap();
    group.bench_function("last_3_blocks_from_the_prefix", |bencher| {
        bencher.iter(|| {
            let stream = Stream { tokens: tokens.shallow_clone(), layout };
            loss(&last.forward_from(stream, true).unwrap()).unwrap().backward()
        })
    });
    let int8 = flat.backbone().to_int8().unwrap();
    let int8 = PetlModel::new(int8, flat.config()).unwrap();
    group.bench_function("int8", |bencher| {
        bencher.iter(|| loss(&int8.forward(&images, true).unwrap()).unwrap().backward())
    });
    group.finish();
}

/// The adapted model and its backbone alone.
pub fn evaluation(criterion: &mut Criterion) {
    let (images, model) = (images(), model(0.0));
    let mut group = criterion.benchmark_group("evaluation");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("adapted", |bencher| {
        bencher.iter(|| black_box(tch::no_grad(|| model.forward(&images, false)).unwrap()))
    });
    group.bench_function("plain", |bencher| {
        bencher.iter(|| black_box(tch::no_grad(|| model.backbone().features(&images)).unwrap()))
    });
    group.finish();
}
