//! One cell: a training step of Convpass on random images, timed in a process of its own.

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use convpass::backbone::Stream;
use convpass::petl::ConvBypassVariant;
use convpass::train::{AdamW, peak_rss_mb};
use convpass::{ConvBypassConfig, FrozenViT, Method, PetlConfig, PetlModel, ViTConfig};
use serde_json::{Value, json};
use tch::{Device, Kind, Reduction, Tensor};

use crate::work::{Work, gemm_speed};

/// The size of a step.
#[derive(Args)]
pub struct Cell {
    /// Images a step.
    #[arg(long, default_value_t = 8)]
    batch: i64,
    /// Timed rounds.
    #[arg(long, default_value_t = 2)]
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
    /// Bypasses in this many blocks, counted from the last.
    #[arg(long)]
    last_blocks: Option<i64>,
    /// Start each step from the tokens in front of the first bypass, computed once; without drop path.
    #[arg(long)]
    prefix: bool,
    #[arg(long, default_value_t = 0.1)]
    drop_path: f64,
    /// Compute each block again in the backward pass.
    #[arg(long)]
    recompute: bool,
}

/// Times the cell. One round before the first is not counted; `gflop` is what a step multiplies, and `gemm_share` its
/// speed over that of a large matrix product, timed in the same process.
pub fn measure(args: &Cell) -> Result<Value> {
    convpass::keep_freed_memory();
    ensure!(args.rounds > 0 && args.batch > 0, "--rounds and --batch must be at least 1");
    if let Some(threads) = args.threads {
        ensure!(threads > 0, "--threads must be at least 1");
        tch::set_num_threads(threads);
    }
    tch::manual_seed(0);
    let step = Step::new(args)?;
    let mut optimizer = AdamW::new(step.model.var_store(), 1e-4)?;
    let mut seconds = Vec::with_capacity(args.rounds);
    for _ in 0..=args.rounds {
        let start = Instant::now();
        step.run(args.recompute, &mut optimizer)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    // The first sets things up.
    let mut seconds = seconds.split_off(1);
    seconds.sort_by(f64::total_cmp);
    let median = 0.5 * (seconds[(seconds.len() - 1) / 2] + seconds[seconds.len() / 2]);
    let peak = peak_rss_mb();
    let (flop, speed) = (step.flop(args), gemm_speed());
    Ok(json!({
        "backbone_preset": args.backbone_preset,
        "batch": args.batch,
        "threads": tch::get_num_threads(),
        "median_s": median,
        "min_s": seconds[0],
        "peak_rss_mb": peak,
        "gflop": flop / 1e9,
        "gemm_gflop_per_s": speed / 1e9,
        "gemm_share": flop / median / speed,
    }))
}

struct Step {
    vit: ViTConfig,
    first: i64,
    model: PetlModel,
    images: Tensor,
    labels: Tensor,
    /// What a step starts from in place of images.
    prefix: Option<Stream>,
}

impl Step {
    fn new(args: &Cell) -> Result<Self> {
        let mut vit = ViTConfig::preset(&args.backbone_preset)?;
        if let Some(side) = args.image_size {
            vit.image_size = (side, side);
        }
        let last = args.last_blocks.unwrap_or(vit.depth);
        ensure!((1..=vit.depth).contains(&last), "--last-blocks must be from 1 to {}", vit.depth);
        let first = vit.depth - last;
        let width = |block| if block < first { 0 } else { args.bottleneck_dim };
        let base = ConvBypassConfig { bottleneck_dim: args.bottleneck_dim, ..Default::default() };
        let method = if first == 0 {
            Method::ConvBypass(base)
        } else {
            Method::ConvBypassVariant(ConvBypassVariant {
                blocks: Some((0..vit.depth).map(width).collect()),
                ..ConvBypassVariant::from(base)
            })
        };
        let drop_path = if args.prefix { 0.0 } else { args.drop_path };
        let config = PetlConfig { drop_path, ..PetlConfig::new(method, 100) };
        let (height, width) = vit.image_size;
        let images = Tensor::randn([args.batch, 3, height, width], (Kind::Float, Device::Cpu));
        let labels = Tensor::zeros([args.batch], (Kind::Int64, Device::Cpu));
        let model = PetlModel::new(FrozenViT::random(&vit, 0, Device::Cpu)?, &config)?;
        let prefix = args.prefix.then(|| model.frozen_prefix(&images)).transpose()?;
        Ok(Step { vit, first, model, images, labels, prefix })
    }

    fn prefix(&self) -> Option<Stream> {
        let Stream { tokens, layout } = self.prefix.as_ref()?;
        Some(Stream { tokens: tokens.shallow_clone(), layout: *layout })
    }

    fn run(&self, recompute: bool, optimizer: &mut AdamW) -> Result<()> {
        let loss = |logits: &Tensor| {
            let (mean, weights) = (Reduction::Mean, None::<&Tensor>);
            Ok(logits.f_cross_entropy_loss(&self.labels, weights, mean, -100, 0.0)?)
        };
        optimizer.zero_grad()?;
        let model = &self.model;
        match (recompute, self.prefix()) {
            (true, Some(stream)) => drop(model.backward_recomputed_from(stream, loss)?),
            (true, None) => drop(model.backward_recomputed(&self.images, loss)?),
            (false, Some(stream)) => loss(&model.forward_from(stream, true)?)?.f_backward()?,
            (false, None) => loss(&model.forward(&self.images, true)?)?.f_backward()?,
        }
        Ok(optimizer.step(1e-3)?)
    }

    /// Floating-point operations of one step.
    fn flop(&self, args: &Cell) -> f64 {
        let work = Work {
            vit: &self.vit,
            bottleneck_dim: args.bottleneck_dim,
            first: self.first,
            prefix: args.prefix,
            recompute: args.recompute,
        };
        work.flop() * args.batch as f64
    }
}
