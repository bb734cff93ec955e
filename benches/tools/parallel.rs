//! Times of training steps and of the all-reduce of their gradients, in one process or in several:
//! start it as docs/scaling.md says, with the variables of a launcher or without.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use convpass::distributed::ProcessGroup;
use convpass::train::{FitOptions, Observer, StepReport, fit_with};
use convpass::{
    ConvBypassConfig, FrozenViT, ImageDataset, Method, PetlConfig, PetlModel, TrainConfig,
    ViTConfig,
};
use ndarray::Array4;
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
struct Args {
    /// Images of a batch in all processes.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Steps that are timed, after one that is not.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Threads of this process.
    #[arg(long, default_value_t = 1)]
    threads: i32,
    /// A small network in place of ViT-B/16 at 224x224.
    #[arg(long)]
    small: bool,
}

/// The time at the end of each step.
struct Ends(Vec<Instant>);

impl Observer for Ends {
    fn step(&mut self, _: &StepReport) -> ControlFlow<()> {
        self.0.push(Instant::now());
        ControlFlow::Continue(())
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    tch::set_num_threads(args.threads);
    let group = ProcessGroup::from_env(Device::Cpu, Duration::from_secs(300))?;
    let vit = ViTConfig::default();
    let small = ViTConfig { depth: 2, embed_dim: 192, num_heads: 3, mlp_dim: 768, ..vit.clone() };
    let vit = if args.small { small } else { vit };
    let side = vit.image_size.0 as usize;
    let backbone = FrozenViT::random(&vit, 0, Device::Cpu)?;
    let method = Method::ConvBypass(ConvBypassConfig::default());
    let mut model = PetlModel::new(backbone, &PetlConfig::new(method, 10))?;
    let count = args.batch * (args.steps + 1);
    let images = Array4::from_shape_fn((count, side, side, 3), |(n, y, x, c)| {
        (n * 31 + y * 17 + x * 7 + c * 3) as u8
    });
    let images =
        ImageDataset::from_arrays(images, (0..count as i64).map(|n| n % 10).collect(), 10)?;
    let config = TrainConfig { epochs: 1, batch_size: args.batch, ..TrainConfig::default() };
    let options = FitOptions { group: group.as_ref(), ..FitOptions::default() };
    let mut ends = Ends(Vec::new());
    fit_with(&mut model, &images, None, &config, options, &mut ends)?;
    let steps = ends.0.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    let trainables = model.trainable_params();
    let numbers = trainables.method + trainables.head;
    let reduce = match &group {
        Some(group) => Some(all_reduce(group, numbers as i64)?),
        None => None,
    };
    if group.as_ref().is_none_or(|group| group.rank() == 0) {
        let processes = group.as_ref().map_or(1, ProcessGroup::world_size);
        let step = median(steps).context("no step was timed")?;
        println!("{processes} processes, batch {}: step {:.1} ms", args.batch, 1e3 * step);
        if let Some(reduce) = reduce {
            let share = 100.0 * reduce / step;
            println!("all-reduce of {numbers} numbers: {:.2} ms, {share:.2} %", 1e3 * reduce);
        }
    }
    Ok(())
}

/// Returns the median seconds of an all-reduce of `numbers` f32.
fn all_reduce(group: &ProcessGroup, numbers: i64) -> Result<f64> {
    let mut bucket = Tensor::ones([numbers], (Kind::Float, Device::Cpu)) * 1e-6;
    let mut seconds = Vec::new();
    for _ in 0..200 {
        let start = Instant::now();
        group.all_reduce(&mut bucket)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    median(seconds).context("no operation was timed")
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
