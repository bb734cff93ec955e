//! What a test set costs that is decoded while it is evaluated: memory over its length, and the time that decoding
//! takes beside the model's.
//!
//! ```text
//! $ cargo run --release --example stream -- --images 20000
//! list of 100000 lines: 0.02 s, 128 MB resident
//! 2000 images: top-1 9.90 %, 1.9 s, peak 190 MB
//! 20000 images: top-1 10.09 %, 20.7 s, peak 199 MB
//! 2000 images: decode 0.1 s, model 1.8 s, both 1.9 s
//! ```
//!
//! The images are JPEG files in a folder of their own, which is removed; the model is a linear probe on the
//! bundled ViT.

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use convpass::data::{BatchConfig, Batches, Order, PartialBatch, Resize, bundled};
use convpass::eval::{Evaluation, evaluate};
use convpass::train::peak_rss_mb;
use convpass::{FileList, FrozenViT, ImageDataset, Method, Normalization, PetlConfig, PetlModel};
use image::{Rgb, RgbImage};
use tch::Device;

const CLASSES: usize = 10;

#[derive(Parser)]
#[command(about = "Measures evaluation of images that are decoded on the way")]
struct Args {
    /// Lines of the list that is read.
    #[arg(long, default_value_t = 100_000)]
    lines: usize,
    /// Images evaluated; a tenth of them first.
    #[arg(long, default_value_t = 20_000)]
    images: usize,
    /// Height of an image; its width is 4/3 of that.
    #[arg(long, default_value_t = 72)]
    height: u32,
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Threads that decode [default: all cores].
    #[arg(long)]
    decode_threads: Option<NonZeroUsize>,
    /// libtorch's threads [default: all cores].
    #[arg(long)]
    threads: Option<i32>,
}

fn main() -> Result<()> {
    convpass::keep_freed_memory();
    let args = Args::parse();
    ensure!(args.images >= 10 && args.images <= args.lines, "--images from 10 to --lines");
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads);
    }
    let folder = tempfile::tempdir().context("a temporary folder")?;
    for index in 0..args.images {
        write_image(folder.path(), index, args.height)?;
    }
    let start = Instant::now();
    let list = write_list(folder.path(), args.lines)?;
    let resident = resident_mb().unwrap_or(f64::NAN);
    println!(
        "list of {} lines: {:.2} s, {resident:.0} MB resident",
        list.entries().len(),
        start.elapsed().as_secs_f64()
    );
    drop(list);

    let file = folder.path().join("vit.safetensors");
    bundled::write_backbone(&file)?;
    let backbone = FrozenViT::open(file, Device::Cpu)?;
    let model = PetlModel::new(backbone, &PetlConfig::new(Method::LinearProbe, CLASSES as i64))?;
    let resize = Resize::bicubic(model.backbone().config().image_size)?;
    let stream = |images| -> Result<ImageDataset> {
        let dataset = ImageDataset::stream(&write_list(folder.path(), images)?, resize);
        Ok(match args.decode_threads {
            Some(threads) => dataset.with_threads(threads),
            None => dataset,
        })
    };
    let run = |data: &ImageDataset| -> Result<(Evaluation, f64)> {
        let (start, go_on) = (Instant::now(), &mut |_, _| ControlFlow::Continue(()));
        let sums = evaluate(&model, data, Normalization::Half, args.batch_size, go_on)?;
        Ok((sums, start.elapsed().as_secs_f64()))
    };
    for images in [args.images / 10, args.images] {
        let (sums, seconds) = run(&stream(images)?)?;
        let (top1, peak) = (sums.top1(), peak_rss_mb().unwrap_or(f64::NAN));
        println!("{images} images: top-1 {top1:.2} %, {seconds:.1} s, peak {peak:.0} MB");
    }

    let few = stream(args.images / 10)?;
    let both = run(&few)?.1;
    let start = Instant::now();
    let config = BatchConfig {
        batch_size: args.batch_size,
        partial: PartialBatch::Keep,
        order: Order::Sequential,
        normalization: Normalization::Half,
        device: Device::Cpu,
    };
    Batches::new(&few, config)?.try_for_each(|batch| batch.map(drop))?;
    let decode = start.elapsed().as_secs_f64();
    let list = write_list(folder.path(), args.images / 10)?;
    let model = run(&ImageDataset::load_resized(&list, resize)?)?.1;
    println!(
        "{} images: decode {decode:.1} s, model {model:.1} s, both {both:.1} s",
        args.images / 10
    );
    Ok(())
}

fn write_image(folder: &Path, index: usize, height: u32) -> Result<()> {
    let image = RgbImage::from_fn(height * 4 / 3, height, |x, y| {
        let wave = |c: u32| ((x * (3 + c) + 2 * y + index as u32) ^ (x * y / 32)) as u8;
        Rgb([wave(0), wave(1), wave(2)])
    });
    image.save(folder.join(format!("{index}.jpg")))?;
    Ok(())
}

/// A list of the first images; after the last that there is come the names of others.
fn write_list(folder: &Path, lines: usize) -> Result<FileList> {
    let mut text = String::new();
    for index in 0..lines {
        writeln!(text, "{index}.jpg {}", index % CLASSES)?;
    }
    let file = folder.join("list.txt");
    std::fs::write(&file, text)?;
    Ok(FileList::read(folder, &file, Some(CLASSES as i64))?)
}

/// Resident memory now, on Linux.
fn resident_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0 / 1e6)
}
