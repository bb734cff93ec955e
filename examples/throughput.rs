//! Times a training step or an evaluation on random images and prints one JSON line.
//!
//! ```text
//! $ cargo run --release --example throughput -- --mode train --batch 8 --rounds 5 --threads 2
//! {"mode":"train","backbone_preset":"vit_base_patch16_224","batch":8,"threads":2,"median_s":..,"min_s":..,"images_per_s":..,"peak_rss_mb":..}
//! ```
//!
//! `train` is forward, backward and AdamW of Convpass (h = 8, dropout and drop path 0.1), `eval` the adapted model
//! without gradients, `plain-eval` the backbone alone. One round before the first is not counted.

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use convpass::{AdamW, peak_rss_mb};
use convpass::{ConvBypassConfig, FrozenViT, Method, PetlConfig, PetlModel, ViTConfig};
use serde_json::json;
use tch::{Device, Kind, Reduction, Tensor};

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
    /// h, the bottleneck of the bypass.
    #[arg(long, default_value_t = 8)]
    bottleneck_dim: i64,
    #[arg(long, default_value_t = 0.1)]
    drop_path: f64,
    /// Compute each block again in the backward pass.
    #[arg(long)]
    recompute: bool,
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
    let args = Args::parse();
    ensure!(args.rounds > 0 && args.batch > 0, "--rounds and --batch must be at least 1");
    if let Some(threads) = args.threads {
        ensure!(threads > 0, "--threads must be at least 1");
        tch::set_num_threads(threads);
    }
    ensure!(!args.cuda || tch::Cuda::is_available(), "libtorch finds no CUDA device");
    let device = Device::cuda_if_available();
    let device = if args.cuda { device } else { Device::Cpu };
    tch::manual_seed(0);

    let vit = ViTConfig::preset(&args.backbone_preset)?;
    let (height, width) = vit.image_size;
    let images = Tensor::randn([args.batch, 3, height, width], (Kind::Float, device));
    let labels = Tensor::zeros([args.batch], (Kind::Int64, device));
    let backbone = FrozenViT::random(&vit, 0, device)?;
    let bypass = ConvBypassConfig { bottleneck_dim: args.bottleneck_dim, ..Default::default() };
    let config = PetlConfig {
        drop_path: args.drop_path,
        ..PetlConfig::new(Method::ConvBypass(bypass), 100)
    };
    let model = PetlModel::new(backbone.clone(), &config)?;
    let mut optimizer = AdamW::new(model.var_store(), 1e-4)?;
    let mut round = || -> Result<()> {
        match args.mode {
            Mode::Train => {
                let loss = |logits: &Tensor| {
                    let mean = Reduction::Mean;
                    Ok(logits.f_cross_entropy_loss(&labels, None::<&Tensor>, mean, -100, 0.0)?)
                };
                optimizer.zero_grad()?;
                match args.recompute {
                    true => drop(model.backward_recomputed(&images, loss)?),
                    false => loss(&model.forward(&images, true)?)?.f_backward()?,
                }
                optimizer.step(1e-3)?;
            }
            Mode::Eval => drop(tch::no_grad(|| model.forward(&images, false))?),
            Mode::PlainEval => drop(tch::no_grad(|| backbone.features(&images))?),
        }
        if args.cuda {
            tch::Cuda::synchronize(0);
        }
        Ok(())
    };

    round()?;
    let mut seconds = Vec::with_capacity(args.rounds);
    for _ in 0..args.rounds {
        let start = Instant::now();
        round()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let middle = seconds.len() / 2;
    let median = match seconds.len() % 2 {
        0 => 0.5 * (seconds[middle - 1] + seconds[middle]),
        _ => seconds[middle],
    };
    let line = json!({
        "mode": args.mode.to_possible_value().map(|mode| mode.get_name().to_owned()),
        "backbone_preset": args.backbone_preset,
        "batch": args.batch,
        "threads": tch::get_num_threads(),
        "median_s": median,
        "min_s": seconds[0],
        "images_per_s": args.batch as f64 / median,
        "peak_rss_mb": peak_rss_mb(),
    });
    println!("{line}");
    Ok(())
}
