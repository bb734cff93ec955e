//! Evaluates a frozen backbone in turn with each library of products and in each precision, and prints one JSON line.
//!
//! ```text
//! $ cargo run --release --example products -- --backbone clip.safetensors --photos photos/ --threads 2
//! {"batch":8,"seconds":{"f32-blas":..,"f32-onednn":..,"bf16":..,..},"ratios":{..},"feature_gap":{..},..}
//! ```
//!
//! The backbone is a ViT-B/16 of random weights without `--backbone`, and the images are random without `--photos`. It
//! prints medians, the ratio of each to f32 with the BLAS, and how far the features are from its, as the norm of the
//! difference over that of the features. Precisions that the processor does not have are left out.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use convpass::backbone::ImageSize;
use convpass::data::{BatchConfig, Batches, Order, PartialBatch};
use convpass::train::peak_rss_mb;
use convpass::{
    AnyBackbone, Backbone, FileList, FrozenViT, ImageDataset, Normalization, OpenOptions,
    Precision, ProductLibrary, ViTConfig,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// Evaluates a frozen backbone with each library of products and in each precision.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// A checkpoint, in place of a ViT-B/16 of random weights.
    #[arg(long)]
    backbone: Option<PathBuf>,
    /// Folder with images and a `list.txt`, in place of random images.
    #[arg(long)]
    photos: Option<PathBuf>,
    /// Images a step.
    #[arg(long, default_value_t = 8)]
    batch: i64,
    /// Timed rounds, each of all ways in turn.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Threads of libtorch [default: all cores].
    #[arg(long)]
    threads: Option<NonZeroUsize>,
}

fn main() -> Result<()> {
    let args = Cli::parse();
    convpass::keep_freed_memory();
    let threads = match args.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism()?,
    };
    tch::set_num_threads(threads.get().try_into().context("--threads is too large")?);
    tch::manual_seed(0);
    let mut line = products(&args)?;
    line["threads"] = threads.get().into();
    line["peak_rss_mb"] = peak_rss_mb().into();
    println!("{line}");
    Ok(())
}

fn median(sorted: &[f64]) -> f64 {
    0.5 * (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2])
}

/// A way of evaluating a backbone.
struct Way {
    name: String,
    library: ProductLibrary,
    precision: Precision,
    backbone: AnyBackbone,
    seconds: Vec<f64>,
    features: Tensor,
}

impl Way {
    fn evaluate(&mut self, images: &Tensor) -> Result<()> {
        self.library.select()?;
        let _guard = self.precision.guard(Device::Cpu)?;
        let start = Instant::now();
        self.features = tch::no_grad(|| self.backbone.features(images))?.to_kind(Kind::Float);
        self.seconds.push(start.elapsed().as_secs_f64());
        Ok(())
    }
}

fn products(args: &Cli) -> Result<Value> {
    ensure!(args.batch > 0 && args.rounds > 0, "--batch and --rounds must be at least 1");
    let default = ProductLibrary::current();
    let ways = [
        ("f32-blas", Precision::F32, ProductLibrary::Blas),
        ("f32-onednn", Precision::F32, ProductLibrary::OneDnn),
        ("bf16", Precision::Bf16, default),
        ("autocast-bf16", Precision::AutocastBf16, default),
        ("int8", Precision::Int8, default),
        ("int8-dynamic", Precision::Int8Dynamic, default),
    ];
    // Some processors have no int8 products.
    let can = |precision: Precision| precision.guard(Device::Cpu).is_ok();
    let mut ways: Vec<Way> = ways
        .into_iter()
        .filter(|(_, precision, _)| can(*precision))
        .map(|(name, precision, library)| {
            let backbone = backbone_in(args.backbone.as_ref(), precision)?;
            let features = Tensor::new();
            let seconds = Vec::new();
            Ok(Way { name: name.into(), library, precision, backbone, seconds, features })
        })
        .collect::<Result<_>>()?;
    let ImageSize::Fixed(height, width) = ways[0].backbone.image_size() else {
        anyhow::bail!("a backbone without a fixed image size");
    };
    let images = match &args.photos {
        Some(folder) => first_batch(folder, args.batch, (height, width))?,
        None => Tensor::randn([args.batch, 3, height, width], (Kind::Float, Device::Cpu)),
    };
    for round in 0..=args.rounds {
        for way in &mut ways {
            way.evaluate(&images)?;
            // The first round sets things up.
            if round == 0 {
                way.seconds.clear();
            }
        }
    }
    let (exact, exact_norm) = (ways[0].features.copy(), ways[0].features.norm());
    let mut medians = Vec::new();
    for way in &mut ways {
        way.seconds.sort_by(f64::total_cmp);
        let gap = ((&way.features - &exact).norm() / &exact_norm).double_value(&[]);
        medians.push((&way.name, median(&way.seconds), gap));
    }
    let of = |value: &dyn Fn(&(&String, f64, f64)) -> f64| -> Value {
        medians.iter().map(|entry| (entry.0.clone(), value(entry))).collect()
    };
    let first = medians[0].1;
    Ok(json!({
        "batch": args.batch,
        "seconds": of(&|entry| entry.1),
        "ratios": of(&|entry| entry.1 / first),
        "feature_gap": of(&|entry| entry.2),
    }))
}

/// The first `batch` images of `FOLDER/list.txt`.
fn first_batch(folder: &Path, batch: i64, (height, width): (i64, i64)) -> Result<Tensor> {
    let list = FileList::read(folder, folder.join("list.txt"), None)?;
    let dataset = ImageDataset::load_with(&list, (height, width), NonZeroUsize::MIN, |_| {})?;
    let config = BatchConfig {
        batch_size: batch as usize,
        partial: PartialBatch::Drop,
        order: Order::Sequential,
        normalization: Normalization::ImageNet,
        device: Device::Cpu,
    };
    let batch = Batches::new(&dataset, config)?.next().context("fewer images than --batch")?;
    Ok(batch?.0)
}

fn backbone_in(file: Option<&PathBuf>, precision: Precision) -> Result<AnyBackbone> {
    if let Some(file) = file {
        let options = OpenOptions { precision: Some(precision), ..OpenOptions::default() };
        return Ok(AnyBackbone::open_with(file, &options, Device::Cpu)?);
    }
    let vit = FrozenViT::random(&ViTConfig::preset("vit_base_patch16_224")?, 0, Device::Cpu)?;
    Ok(AnyBackbone::from(precision.convert(vit)?))
}
