//! From JPEG files of 500x375 to batches of 224x224, and the two steps of it that cost most.

use std::hint::black_box;
use std::path::Path;

use convpass::data::{BatchConfig, Batches, Order, PartialBatch, Resize, decode_image};
use convpass::{FileList, ImageDataset, Normalization};
use criterion::{Criterion, Throughput};
use image::{Rgb, RgbImage};
use tch::Device;

const IMAGES: usize = 32;

/// Waves of many lengths, which leave a JPEG about as much to do as a photo does.
fn wave(x: u32, y: u32) -> Rgb<u8> {
    let (x, y) = (f64::from(x), f64::from(y));
    Rgb(std::array::from_fn(|c| {
        let octave = |k: i32| {
            let rate = f64::from(1 << k) / 100.0;
            (rate * (x + 0.7 * y) + c as f64).sin() * (rate * (y - 0.4 * x)).cos()
        };
        (127.0 + (0..8).map(|k| 30.0 * octave(k)).sum::<f64>()) as u8
    }))
}

fn write_photos(folder: &Path) -> FileList {
    let mut lines = String::new();
    for index in 0..IMAGES {
        let shift = 31 * index as u32;
        let photo = RgbImage::from_fn(500, 375, |x, y| wave(x + shift, y));
        photo.save(folder.join(format!("{index}.jpg"))).unwrap();
        lines += &format!("{index}.jpg 0\n");
    }
    std::fs::write(folder.join("list.txt"), lines).unwrap();
    FileList::read(folder, folder.join("list.txt"), None).unwrap()
}

pub fn data_path(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let list = write_photos(folder.path());
    let photo = folder.path().join("0.jpg");
    let decoded = decode_image(&photo).unwrap();
    let resize = Resize::bicubic((224, 224)).unwrap();
    let config = BatchConfig {
        batch_size: IMAGES,
        partial: PartialBatch::Keep,
        order: Order::Sequential,
        normalization: Normalization::ImageNet,
        device: Device::Cpu,
    };
    let mut group = criterion.benchmark_group("data_path");
    group.bench_function("decode", |bencher| {
        bencher.iter(|| black_box(decode_image(&photo)).unwrap())
    });
    group.bench_function("resize", |bencher| {
        bencher.iter(|| black_box(resize.apply(decoded.view())).unwrap())
    });
    group.throughput(Throughput::Elements(IMAGES as u64));
    group.bench_function("batches", |bencher| {
        bencher.iter(|| {
            let dataset = ImageDataset::load(&list, (224, 224)).unwrap();
            Batches::new(&dataset, config).unwrap().for_each(|batch| drop(batch.unwrap()));
        })
    });
    group.finish();
}
