//! Times a training step or an evaluation on random images and prints one JSON line.
//!
//! ```text
//! $ cargo run --release --example throughput -- --mode train --batch 8 --rounds 5 --threads 2
//! {"backbone_preset":"vit_base_patch16_224","batch":8,"images_per_s":..,"median_s":..,"min_s":..,"peak_rss_mb":..,..}
//! ```
//!
//! It teaches what a step costs on your machine before you train: `train` is forward, backward and AdamW of Convpass
//! (h = 8, dropout and drop path 0.1), `eval` is the adapted model without gradients, `plain-eval` the backbone alone.
//! The first round sets things up and is not counted. `--mode eval --batch 1` is the latency of an image. `--recompute`
//! trades time for memory in training, and `--precision` keeps the frozen weights in bf16 or f16, or computes under
//! autocast. `--mode fit` times the steps of `convpass::fit` with the copies of their batches, without dropout and drop
//! path; `--cuda-graph` captures them.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use clap::{Parser, ValueEnum};
use convpass::backbone::Precision;
use convpass::train::{AdamW, Observer, StepReport, peak_rss_mb};
use convpass::{
    ConvBypassConfig, FrozenViT, ImageDataset, Method, PetlConfig, PetlModel, TrainConfig,
    ViTConfig, fit,
};
use ndarray::Array4;
use serde_json::json;
use tch::{Device, Kind, Reduction, Tensor};

/// Times Convpass on random images.
#[derive(Parser)]
struct Args {
    #[arg(long, value_enum, default_value_t = Mode::Train)]
    mode: Mode,
    /// Images a step.
    #[arg(long, default_value_t = 8)]
    batch: i64,
    /// Timed rounds.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Threads of libtorch [default: all cores].
    #[arg(long)]
    threads: Option<i32>,
    /// A ViT's preset; its weights are random.
    #[arg(long, default_value = "vit_base_patch16_224")]
    backbone_preset: String,
    /// Side of the images in pixels [default: the preset's].
    #[arg(long)]
    image_size: Option<i64>,
    /// Classes of the head.
    #[arg(long, default_value_t = 100)]
    classes: i64,
    #[arg(long, default_value_t = 0.1)]
    drop_path: f64,
    /// Compute each block again in the backward pass: less memory, more time.
    #[arg(long)]
    recompute: bool,
    /// Replay a captured step in `--mode fit`.
    #[arg(long)]
    cuda_graph: bool,
    /// Of the frozen weights: f32, bf16, f16, int8, autocast-bf16 or, to evaluate, int8-dynamic.
    #[arg(long, default_value_t = Precision::F32)]
    precision: Precision,
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum On {
    Cpu,
    /// The first CUDA device.
    Cuda,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Mode {
    Train,
    Fit,
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
    let cuda = args.device == On::Cuda;
    if cuda && !tch::Cuda::is_available() {
        bail!("no CUDA device: {}", convpass::cuda_load_error().unwrap_or("libtorch finds none"));
    }
    tch::manual_seed(0);
    let device = if cuda { Device::Cuda(0) } else { Device::Cpu };
    let _guard = args.precision.guard(device)?;
    ensure!(args.mode == Mode::Fit || !args.cuda_graph, "--cuda-graph needs --mode fit");
    let mut step = Step::new(&args, device)?;
    let mut seconds =
        if args.mode == Mode::Fit { step.fit(&args, cuda)? } else { step.rounds(&args, cuda)? };
    seconds.sort_by(f64::total_cmp);
    let median = 0.5 * (seconds[(seconds.len() - 1) / 2] + seconds[seconds.len() / 2]);
    let mode = args.mode.to_possible_value();
    let line = json!({
        "mode": mode.map(|mode| mode.get_name().to_owned()),
        "precision": args.precision.name(),
        "backbone_preset": args.backbone_preset,
        "image_size": step.images.size()[2],
        "classes": args.classes,
        "batch": args.batch,
        "threads": tch::get_num_threads(),
        "median_s": median,
        "min_s": seconds[0],
        "images_per_s": args.batch as f64 / median,
        "peak_rss_mb": peak_rss_mb(),
        "trainable_params": step.model.trainable_params().total(),
    });
    println!("{line}");
    Ok(())
}

/// The seconds from one lap to the next, when the device has done its work.
struct Clock {
    cuda: bool,
    last: Instant,
    seconds: Vec<f64>,
}

impl Clock {
    fn new(cuda: bool) -> Self {
        Clock { cuda, last: Instant::now(), seconds: Vec::new() }
    }

    fn lap(&mut self) {
        if self.cuda {
            tch::Cuda::synchronize(0);
        }
        self.seconds.push(self.last.elapsed().as_secs_f64());
        self.last = Instant::now();
    }
}

impl Observer for Clock {
    fn reads_step(&mut self, _steps_done: usize) -> bool {
        false
    }

    fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
        self.lap();
        ControlFlow::Continue(())
    }
}

/// A model with a batch of random images.
struct Step {
    model: PetlModel,
    images: Tensor,
    labels: Tensor,
}

impl Step {
    fn new(args: &Args, device: Device) -> Result<Self> {
        let mut vit = ViTConfig::preset(&args.backbone_preset)?;
        vit.image_size = args.image_size.map_or(vit.image_size, |side| (side, side));
        let backbone = FrozenViT::random(&vit, 0, device)?;
        let backbone = args.precision.convert(backbone)?;
        let mut bypass = ConvBypassConfig::default();
        let mut drop_path = args.drop_path;
        if args.mode == Mode::Fit {
            (bypass.dropout, drop_path) = (0.0, 0.0);
        }
        let method = Method::ConvBypass(bypass);
        let config = PetlConfig { drop_path, ..PetlConfig::new(method, args.classes) };
        let (height, width) = vit.image_size;
        Ok(Step {
            model: PetlModel::new(backbone, &config)?,
            images: Tensor::randn([args.batch, 3, height, width], (Kind::Float, device)),
            labels: Tensor::zeros([args.batch], (Kind::Int64, device)),
        })
    }

    /// Returns the seconds of each round after the first.
    fn rounds(&self, args: &Args, cuda: bool) -> Result<Vec<f64>> {
        let mut optimizer = AdamW::new(self.model.var_store(), 1e-4)?;
        let mut clock = Clock::new(cuda);
        for _ in 0..=args.rounds {
            self.run(args, &mut optimizer)?;
            clock.lap();
        }
        Ok(clock.seconds.split_off(1))
    }

    /// Returns the seconds of each step of `fit` after the first ones, which set up what a captured
    /// step needs and compare it.
    fn fit(&mut self, args: &Args, cuda: bool) -> Result<Vec<f64>> {
        const SET_UP: usize = 4;
        let (batch_size, size) = (usize::try_from(args.batch)?, self.images.size());
        let (height, width) = (usize::try_from(size[2])?, usize::try_from(size[3])?);
        let count = batch_size * (SET_UP + args.rounds);
        let pixels = Array4::from_shape_fn((count, height, width, 3), |(n, row, column, _)| {
            ((n * 31 + row * 17 + column * 7) % 256) as u8
        });
        let images = ImageDataset::from_arrays(pixels, vec![0; count], args.classes)?;
        let (epochs, recompute, cuda_graph) = (1, args.recompute, args.cuda_graph);
        let config =
            TrainConfig { epochs, batch_size, recompute, cuda_graph, ..TrainConfig::default() };
        let mut clock = Clock::new(cuda);
        fit(&mut self.model, &images, None, &config, &mut clock)?;
        Ok(clock.seconds.split_off(SET_UP))
    }

    /// One round: a training step or an evaluation of the batch.
    fn run(&self, args: &Args, optimizer: &mut AdamW) -> Result<()> {
        match args.mode {
            Mode::Train | Mode::Fit => self.train(args.recompute, optimizer)?,
            Mode::Eval => drop(tch::no_grad(|| self.model.forward(&self.images, false))?),
            Mode::PlainEval => drop(tch::no_grad(|| self.model.backbone().features(&self.images))?),
        }
        Ok(())
    }

    fn train(&self, recompute: bool, optimizer: &mut AdamW) -> Result<()> {
        let loss = |logits: &Tensor| {
            let (mean, weights) = (Reduction::Mean, None::<&Tensor>);
            Ok(logits.f_cross_entropy_loss(&self.labels, weights, mean, -100, 0.0)?)
        };
        optimizer.zero_grad()?;
        if recompute {
            drop(self.model.backward_recomputed(&self.images, loss)?);
        } else {
            loss(&self.model.forward(&self.images, true)?)?.f_backward()?;
        }
        Ok(optimizer.step(1e-3)?)
    }
}
