//! A backbone from a safetensors file: two blocks of a ViT-B/16, 60 MB.

use std::hint::black_box;

use convpass::{Backbone, FrozenViT, ViTConfig};
use criterion::{Criterion, Throughput};
use tch::{Device, Tensor};

pub fn load(criterion: &mut Criterion) {
    let config = ViTConfig { depth: 2, ..ViTConfig::default() };
    let backbone = FrozenViT::random(&config, 0, Device::Cpu).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vit.safetensors");
    Tensor::write_safetensors(backbone.named_weights(), &path).unwrap();
    let mut group = criterion.benchmark_group("load");
    group.throughput(Throughput::Bytes(std::fs::metadata(&path).unwrap().len()));
    group.bench_function("safetensors", |bencher| {
        bencher.iter(|| black_box(FrozenViT::open(&path, Device::Cpu)).unwrap())
    });
    group.finish();
}
