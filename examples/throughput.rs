//! Times a training step or an evaluation on random images and prints one JSON line.
//!
//! ```text
//! $ cargo run --release --example throughput -- --mode train --batch 8 --rounds 5 --threads 2
//! {"mode":"train","backbone_preset":"vit_base_patch16_224","batch":8,"threads":2,"median_s":..,"min_s":..,"images_per_s":..,"peak_rss_mb":..}
//! ```
//!
//! `train` is forward, backward and AdamW of Convpass (h = 8, dropout and drop path 0.1), `eval` the adapted model
//! without gradients, `plain-eval` the backbone alone. One round before the first is not counted. `gflop` is what a
//! round multiplies, `gemm_share` its speed over that of the machine's product of matrices, timed in the same process.

#[path = "shared/precision.rs"]
mod precision;
#[path = "throughput/work.rs"]
mod work;

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use convpass::{AdamW, Backbone, peak_rss_mb};
use convpass::{
    ConvBypassConfig, ConvBypassVariant, FrozenViT, Method, PetlConfig, PetlModel, Stream,
    ViTConfig,
};
use precision::Precision;
use serde_json::json;
use tch::{Device, Kind, Reduction, Tensor};
use work::{Work, gemm_speed};

/// Times Convpass on random images.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[arg(long, value_enum, default_value_t = Mode::Train)]
    mode: Mode,
    /// Images a step.
    #[arg(long, default_value_t = 8)]
    batch: i64,
    /// Timed rounds.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// libtorch's threads [default: all cores].
    #[arg(long)]
    threads: Option<i32>,
    #[arg(long, default_value = "vit_base_patch16_224")]
    backbone_preset: String,
    /// Image height and width.
    #[arg(long)]
    image_size: Option<i64>,
    /// h, the bottleneck of the bypass.
    #[arg(long, default_value_t = 8)]
    bottleneck_dim: i64,
    /// Bypasses in the last so many blocks alone.
    #[arg(long)]
    last_blocks: Option<i64>,
    /// Start each step from what the blocks in front of the first bypass make of the images, computed once; without
    /// drop path.
    #[arg(long)]
    prefix: bool,
    #[arg(long, default_value_t = 0.1)]
    drop_path: f64,
    /// Compute each block again in the backward pass.
    #[arg(long)]
    recompute: bool,
    /// The frozen weights, or autocast over weights in f32.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Run on the first CUDA device.
    #[arg(long)]
    cuda: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Mode {
    Train,
    Eval,
    PlainEval,
}

fn main() -> Result<()> {
    convpass::keep_freed_memory();
    let mut args = Args::parse();
    ensure!(args.rounds > 0 && args.batch > 0, "--rounds and --batch must be at least 1");
    if let Some(threads) = args.threads {
        ensure!(threads > 0, "--threads must be at least 1");
        tch::set_num_threads(threads);
    }
    ensure!(!args.cuda || tch::Cuda::is_available(), "libtorch finds no CUDA device");
    if args.prefix {
        args.drop_path = 0.0;
    }
    tch::manual_seed(0);
    let device = if args.cuda { Device::Cuda(0) } else { Device::Cpu };
    let guard = args.precision.guard(device)?;
    let bench = Bench::new(&args, device)?;
    let mut optimizer = AdamW::new(bench.model.var_store(), 1e-4)?;
    let mut seconds = Vec::with_capacity(args.rounds);
    for _ in 0..=args.rounds {
        let start = Instant::now();
        bench.round(&args, &mut optimizer)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    // The first sets things up.
    let mut seconds = seconds.split_off(1);
    seconds.sort_by(f64::total_cmp);
    let median = 0.5 * (seconds[(seconds.len() - 1) / 2] + seconds[seconds.len() / 2]);
    let peak = peak_rss_mb();
    drop(guard);
    let (flop, speed) = (bench.flop(&args), gemm_speed(device));
    let line = json!({
        "mode": args.mode.to_possible_value().map(|mode| mode.get_name().to_owned()),
        "precision": args.precision.to_string(),
        "backbone_preset": args.backbone_preset,
        "batch": args.batch,
        "threads": tch::get_num_threads(),
        "median_s": median,
        "min_s": seconds[0],
        "images_per_s": args.batch as f64 / median,
        "peak_rss_mb": peak,
        "frozen_mb": bench.frozen_bytes() as f64 / 1e6,
        "gflop": flop / 1e9,
        "gemm_gflop_per_s": speed / 1e9,
        "gemm_share": flop / median / speed,
    });
    println!("{line}");
    Ok(())
}

struct Bench {
    vit: ViTConfig,
    first: i64,
    model: PetlModel,
    images: Tensor,
    labels: Tensor,
    /// What a step starts from in place of images.
    prefix: Option<Stream>,
}

impl Bench {
    fn new(args: &Args, device: Device) -> Result<Self> {
        let mut vit = ViTConfig::preset(&args.backbone_preset)?;
        if let Some(side) = args.image_size {
            vit.image_size = (side, side);
        }
        let last = args.last_blocks.unwrap_or(vit.depth);
        ensure!((1..=vit.depth).contains(&last), "--last-blocks must be from 1 to {}", vit.depth);
        let first = vit.depth - last;
        let backbone = FrozenViT::random(&vit, 0, device)?;
        let backbone = args.precision.convert(backbone)?;
        let width = |block| if block < first { 0 } else { args.bottleneck_dim };
        let base = ConvBypassConfig { bottleneck_dim: args.bottleneck_dim, ..Default::default() };
        let method = match first {
            0 => Method::ConvBypass(base),
            _ => Method::ConvBypassVariant(ConvBypassVariant {
                blocks: Some((0..vit.depth).map(width).collect()),
                ..ConvBypassVariant::from(base)
            }),
        };
        let config = PetlConfig { drop_path: args.drop_path, ..PetlConfig::new(method, 100) };
        let (height, width) = vit.image_size;
        let images = Tensor::randn([args.batch, 3, height, width], (Kind::Float, device));
        let labels = Tensor::zeros([args.batch], (Kind::Int64, device));
        let model = PetlModel::new(backbone, &config)?;
        let prefix = args.prefix.then(|| model.frozen_prefix(&images)).transpose()?;
        Ok(Bench { vit, first, model, images, labels, prefix })
    }

    fn logits(&self, train: bool) -> Result<Tensor> {
        Ok(match self.stream() {
            Some(stream) => self.model.forward_from(stream, train)?,
            None => self.model.forward(&self.images, train)?,
        })
    }

    fn stream(&self) -> Option<Stream> {
        let Stream { tokens, layout } = self.prefix.as_ref()?;
        Some(Stream { tokens: tokens.shallow_clone(), layout: *layout })
    }

    fn round(&self, args: &Args, optimizer: &mut AdamW) -> Result<()> {
        match args.mode {
            Mode::Train => {
                let loss = |logits: &Tensor| {
                    let mean = Reduction::Mean;
                    let labels = &self.labels;
                    Ok(logits.f_cross_entropy_loss(labels, None::<&Tensor>, mean, -100, 0.0)?)
                };
                optimizer.zero_grad()?;
                match (args.recompute, self.stream()) {
                    (false, _) => loss(&self.logits(true)?)?.f_backward()?,
                    (true, Some(stream)) => {
                        drop(self.model.backward_recomputed_from(stream, loss)?)
                    }
                    (true, None) => drop(self.model.backward_recomputed(&self.images, loss)?),
                }
                optimizer.step(1e-3)?;
            }
            Mode::Eval => drop(tch::no_grad(|| self.logits(false))?),
            Mode::PlainEval => drop(tch::no_grad(|| self.model.backbone().features(&self.images))?),
        }
        if args.cuda {
            tch::Cuda::synchronize(0);
        }
        Ok(())
    }

    /// Of one round.
    fn flop(&self, args: &Args) -> f64 {
        let work = Work {
            vit: &self.vit,
            bottleneck_dim: args.bottleneck_dim,
            first: self.first,
            prefix: args.prefix,
            train: args.mode == Mode::Train,
            adapted: args.mode != Mode::PlainEval,
            recompute: args.recompute,
        };
        work.flop() * args.batch as f64
    }

    fn frozen_bytes(&self) -> usize {
        let weights = self.model.backbone().named_weights().iter();
        weights.map(|(_, weight)| weight.numel() * weight.kind().elt_size_in_bytes()).sum()
    }
}
