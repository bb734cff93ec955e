//! Times one part of a run alone (a bypass, loading a backbone, the data path) and prints one JSON line.
//!
//! ```text
//! $ cargo run --release --example parts -- bypass --batch 16 --rounds 50 --threads 2
//! {"part":"bypass","median_s":..,"min_s":..,"loss_s":..,"bound_s":..,"times_bound":..,"peak_rss_mb":..,"threads":2}
//! $ cargo run --release --example parts -- load vit_base_patch16_224.safetensors
//! {"part":"load","median_s":..,"min_s":..,"file_mb":..,"grown_rss_mb":..,"peak_rss_mb":..,"threads":2}
//! $ cargo run --release --example parts -- data FOLDER --rounds 3 --threads 2
//! {"part":"data","median_s":..,"min_s":..,"images":..,"images_per_s":..,"peak_rss_mb":..,"threads":2}
//! $ MALLOC_MMAP_THRESHOLD_=65536 cargo run --release --example parts -- activations --batch 8 --threads 2
//! {"part":"activations","saved_mb_per_image":..,"batch":8,"recompute":false,"peak_rss_mb":..,"threads":2}
//! ```
//!
//! `bypass` is forward and backward of one bypass (h = 8, dropout 0.1) added into a residual stream `[B, 197, 768]`,
//! less the loss that backward starts from (`loss_s`); `bound_s` is one sum of two such tensors into a third, which
//! no way of adding a bypass can beat. `load` opens the file once, as a program does; `data` decodes, resizes to
//! 224x224 and batches the images of `FOLDER/list.txt` (lines `path label`), by 32. `activations` is what a training
//! step of Convpass beside a ViT-B/16 holds between its forward and its backward pass, as the growth of the resident
//! memory: exact where glibc gets each large block from the kernel and gives it back, which that variable tells it to.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use convpass::backbone::{BlockPass, Hooks, ImageSize};
use convpass::backbone::{Branch, Stream};
use convpass::data::{BatchConfig, Batches, Order, PartialBatch};
use convpass::seam::{BackboneShape, Beside, Site, SubLayer};
use convpass::train::peak_rss_mb;
use convpass::{
    Backbone, ConvBypassConfig, FileList, FrozenViT, ImageDataset, Method, Normalization,
    PetlConfig, PetlModel, SubLayers, TokenLayout, ViTConfig,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Reduction, Tensor};

/// Times one part of a run alone.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    part: Part,
    /// Threads of libtorch, and of decoding [default: all cores].
    #[arg(long, global = true)]
    threads: Option<NonZeroUsize>,
}

#[derive(Subcommand)]
enum Part {
    /// One bypass, forward and backward.
    Bypass(BypassArgs),
    /// Opening a backbone's file.
    Load { file: PathBuf },
    /// From image files to batches.
    Data(DataArgs),
    /// The memory between forward and backward.
    Activations {
        /// Images a step.
        #[arg(long, default_value_t = 8)]
        batch: i64,
        /// Compute each block again in the backward pass.
        #[arg(long)]
        recompute: bool,
        #[arg(long, default_value_t = 0.1)]
        drop_path: f64,
    },
}

#[derive(Args)]
struct BypassArgs {
    /// Images a step.
    #[arg(long, default_value_t = 16)]
    batch: i64,
    /// Timed rounds.
    #[arg(long, default_value_t = 50)]
    rounds: usize,
}

#[derive(Args)]
struct DataArgs {
    /// Folder with a `list.txt`.
    folder: PathBuf,
    /// Timed passes over the list.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    if !matches!(cli.part, Part::Activations { .. }) {
        convpass::keep_freed_memory();
    }
    let threads = match cli.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism()?,
    };
    tch::set_num_threads(threads.get().try_into().context("--threads is too large")?);
    tch::manual_seed(0);
    let mut line = match cli.part {
        Part::Bypass(args) => bypass(&args)?,
        Part::Load { file } => load(&file)?,
        Part::Data(args) => data(&args, threads)?,
        Part::Activations { batch, recompute, drop_path } => {
            activations(batch, recompute, drop_path)?
        }
    };
    line["threads"] = threads.get().into();
    line["peak_rss_mb"] = peak_rss_mb().into();
    println!("{line}");
    Ok(())
}

/// Seconds of each of `rounds` calls after one that is not counted, from low to high.
fn time(rounds: usize, mut round: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    ensure!(rounds > 0, "--rounds must be at least 1");
    round()?;
    let mut seconds = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let start = Instant::now();
        round()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}

fn median(sorted: &[f64]) -> f64 {
    0.5 * (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2])
}

fn bypass(args: &BypassArgs) -> Result<Value> {
    ensure!(args.batch > 0, "--batch must be at least 1");
    let layout = TokenLayout { prefix: 1, grid: (14, 14) };
    let bypass = ConvBypassConfig { sub_layers: SubLayers::Attention, ..Default::default() };
    let config = PetlConfig::new(Method::ConvBypass(bypass), 1);
    let model = PetlModel::new(BareStream { layout, embed_dim: 768 }, &config)?;
    let shape = [args.batch, layout.num_tokens(), 768];
    let normal = || Tensor::randn(shape, (Kind::Float, Device::Cpu));
    let (tokens, weights) = (normal(), normal());
    let weights = weights.flatten(0, -1);
    // Backward of a product with fixed weights: the gradient that reaches the stream is a full tensor.
    let gradients = |branch: &dyn Fn(&Tensor) -> Result<Tensor>, variables: &[Tensor]| {
        let leaf = tokens.detach().set_requires_grad(true);
        let loss = branch(&leaf)?.flatten(0, -1).f_dot(&weights)?;
        let inputs: Vec<&Tensor> = variables.iter().chain([&leaf]).collect();
        Tensor::f_run_backward(&[loss], &inputs, false, false)?;
        Ok(())
    };
    let variables: Vec<Tensor> = model
        .var_store()
        .variables()
        .into_iter()
        .filter(|(name, _)| !name.starts_with("head."))
        .map(|(_, variable)| variable)
        .collect();
    let whole =
        time(args.rounds, || gradients(&|tokens| Ok(model.features(tokens, true)?), &variables))?;
    let loss = time(args.rounds, || gradients(&|tokens| Ok(tokens.shallow_clone()), &[]))?;
    let other = normal();
    let bound = time(args.rounds, || {
        drop(tokens.f_add(&other)?);
        Ok(())
    })?;
    let (median_s, bound_s) = (median(&whole) - median(&loss), median(&bound));
    Ok(json!({
        "part": "bypass",
        "batch": args.batch,
        "median_s": median_s,
        "min_s": whole[0] - loss[0],
        "loss_s": median(&loss),
        "bound_s": bound_s,
        "times_bound": median_s / bound_s,
    }))
}

/// A "backbone" that is a residual stream alone: what comes in, and what a method adds beside it.
#[derive(Clone, Debug)]
struct BareStream {
    layout: TokenLayout,
    embed_dim: i64,
}

impl Backbone for BareStream {
    fn num_blocks(&self) -> usize {
        1
    }

    fn embed(&self, tokens: &Tensor, _: &Hooks) -> convpass::Result<Stream> {
        Ok(Stream { tokens: tokens.shallow_clone(), layout: self.layout })
    }

    fn block(&self, stream: Stream, pass: &BlockPass) -> convpass::Result<Stream> {
        let Stream { tokens, layout } = stream;
        let site = Site { block: pass.block, sub_layer: SubLayer::Attention };
        let (branch, train) = (&Branch::All, pass.hooks.train());
        let at = Beside::new(site, &tokens, &tokens, &layout, branch, train);
        let tokens = pass.hooks.method().beside(&at, tokens.shallow_clone())?;
        Ok(Stream { tokens, layout })
    }

    fn pool(&self, stream: Stream, _: &Hooks) -> convpass::Result<Tensor> {
        Ok(stream.tokens)
    }

    fn patch_map(&self, stream: Stream, _: &Hooks) -> convpass::Result<Tensor> {
        stream.patches()
    }

    /// What comes in are tokens, not images.
    fn check_images(&self, _tokens: &Tensor) -> convpass::Result<()> {
        Ok(())
    }

    fn image_size(&self) -> ImageSize {
        ImageSize::From(1)
    }

    fn feature_dim(&self) -> i64 {
        self.embed_dim
    }

    fn shape(&self) -> BackboneShape {
        BackboneShape::new("a residual stream", vec![self.embed_dim], Vec::new(), 0)
    }

    fn named_weights(&self) -> &[(String, Tensor)] {
        &[]
    }

    fn map_weights(
        &self,
        _replace: &mut dyn FnMut(&str, &Tensor) -> convpass::Result<Tensor>,
    ) -> convpass::Result<Self> {
        Ok(self.clone())
    }

    fn choices(&self) -> String {
        String::new()
    }
}

fn activations(batch: i64, recompute: bool, drop_path: f64) -> Result<Value> {
    ensure!(batch > 0, "--batch must be at least 1");
    let vit = ViTConfig::preset("vit_base_patch16_224")?;
    let method = Method::ConvBypass(ConvBypassConfig::default());
    let config = PetlConfig { drop_path, ..PetlConfig::new(method, 100) };
    let model = PetlModel::new(FrozenViT::random(&vit, 0, Device::Cpu)?, &config)?;
    let images = Tensor::randn([batch, 3, 224, 224], (Kind::Float, Device::Cpu));
    let labels = Tensor::zeros([batch], (Kind::Int64, Device::Cpu));
    let mut growths = Vec::new();
    // The first round sets things up; which samples drop path leaves out changes from round to round.
    for round in 0..6 {
        let before = rss_mb()?;
        let mut after = before;
        let mut loss = |logits: &Tensor| {
            let mean = Reduction::Mean;
            let loss = logits.f_cross_entropy_loss(&labels, None::<&Tensor>, mean, -100, 0.0)?;
            after = rss_mb().unwrap_or(f64::NAN);
            Ok(loss)
        };
        if recompute {
            drop(model.backward_recomputed(&images, loss)?)
        } else {
            let logits = model.forward(&images, true)?;
            let result: convpass::Result<Tensor> = loss(&logits);
            result?.f_backward()?;
        }
        if round > 0 {
            growths.push((after - before) / batch as f64);
        }
    }
    growths.sort_by(f64::total_cmp);
    Ok(json!({
        "part": "activations",
        "batch": batch,
        "recompute": recompute,
        "saved_mb_per_image": median(&growths),
    }))
}

/// The resident memory now, in MB (10^6 bytes).
fn rss_mb() -> Result<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm").context("/proc/self/statm")?;
    let pages: f64 = statm.split(' ').nth(1).context("/proc/self/statm")?.parse()?;
    Ok(pages * 4096.0 / 1e6)
}

fn load(file: &PathBuf) -> Result<Value> {
    // So that what libtorch sets up once, its threads among it, is there.
    drop(Tensor::ones([1 << 20], (Kind::Float, Device::Cpu)) + 1.0);
    let before = peak_rss_mb();
    let start = Instant::now();
    let backbone = FrozenViT::open(file, Device::Cpu)?;
    let seconds = start.elapsed().as_secs_f64();
    let grown = before.zip(peak_rss_mb()).map(|(before, after)| after - before);
    Ok(json!({
        "part": "load",
        "weights": backbone.num_params(),
        "median_s": seconds,
        "min_s": seconds,
        "file_mb": std::fs::metadata(file)?.len() as f64 / 1e6,
        "grown_rss_mb": grown,
    }))
}

fn data(args: &DataArgs, threads: NonZeroUsize) -> Result<Value> {
    let list = args.folder.join("list.txt");
    let images = FileList::read(&args.folder, &list, None)?.entries().len();
    let config = BatchConfig {
        batch_size: 32,
        partial: PartialBatch::Keep,
        order: Order::Sequential,
        normalization: Normalization::ImageNet,
        device: Device::Cpu,
    };
    let seconds = time(args.rounds, || {
        let list = FileList::read(&args.folder, &list, None)?;
        let dataset = ImageDataset::load_with(&list, (224, 224), threads, |_| {})?;
        for batch in Batches::new(&dataset, config)? {
            drop(batch?);
        }
        Ok(())
    })?;
    Ok(json!({
        "part": "data",
        "images": images,
        "median_s": median(&seconds),
        "min_s": seconds[0],
        "images_per_s": images as f64 / median(&seconds),
    }))
}
