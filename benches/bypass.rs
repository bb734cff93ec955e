//! The bypass at ViT-B/16 shapes, and one block with and without it.

use std::hint::black_box;

use convpass::{
    ConvBypass, ConvBypassConfig, FrozenViT, Method, PetlConfig, PetlModel, Pooling, TokenLayout,
    ViTConfig,
};
use criterion::{BenchmarkId, Criterion, Throughput};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};

const BATCHES: [i64; 2] = [1, 16];

/// Forward, and forward with backward, of one bypass: `[B, 197, 768]`, h = 8.
pub fn bypass(criterion: &mut Criterion) {
    let layout = TokenLayout { prefix: 1, grid: (14, 14) };
    let vs = VarStore::new(Device::Cpu);
    let bypass = ConvBypass::new(&vs.root(), 768, &ConvBypassConfig::default()).unwrap();
    let mut group = criterion.benchmark_group("bypass");
    for batch in BATCHES {
        let tokens = Tensor::randn([batch, 197, 768], (Kind::Float, Device::Cpu));
        let tracked = tokens.copy().set_requires_grad(true);
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::new("forward", batch), |bencher| {
            bencher.iter(|| {
                black_box(tch::no_grad(|| bypass.forward(&tokens, &layout, false)).unwrap())
            })
        });
        group.bench_function(BenchmarkId::new("forward_backward", batch), |bencher| {
            bencher.iter(|| {
                bypass.forward(&tracked, &layout, true).unwrap().sum(Kind::Float).backward()
            })
        });
    }
    group.finish();
}

/// A ViT-B/16 of one block, evaluated with and without its two bypasses. It pools by averaging, so
/// that the block runs on every token.
pub fn block(criterion: &mut Criterion) {
    let vit = ViTConfig { depth: 1, pooling: Pooling::Average, ..ViTConfig::default() };
    let backbone = FrozenViT::random(&vit, 0, Device::Cpu).unwrap();
    let config = PetlConfig::new(Method::ConvBypass(ConvBypassConfig::default()), 100);
    let model = PetlModel::new(backbone.clone(), &config).unwrap();
    let mut group = criterion.benchmark_group("block");
    for batch in BATCHES {
        let images = Tensor::randn([batch, 3, 224, 224], (Kind::Float, Device::Cpu));
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::new("plain", batch), |bencher| {
            bencher.iter(|| black_box(tch::no_grad(|| backbone.features(&images)).unwrap()))
        });
        group.bench_function(BenchmarkId::new("adapted", batch), |bencher| {
            bencher.iter(|| black_box(tch::no_grad(|| model.features(&images, false)).unwrap()))
        });
    }
    group.finish();
}
