//! The command line of a run.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use convpass::{
    ConvBypassConfig, ConvInit, Method, Normalization, PetlConfig, Placement, SubLayers,
    TrainConfig, published_choice,
};
use serde::{Deserialize, Serialize};

use super::backbone::{Processor, Source, Untold};
use super::flags::AllArgs;
use super::method;
use super::precision::Precision;

/// Finetunes a frozen ViT on a task in the VTAB-1k layout; without --task, compares methods on bundled tasks, with
/// settings of their own where no flag says otherwise.
#[derive(Parser)]
#[command(version, args_override_self = true)]
pub struct Args {
    /// Folder that holds the tasks' folders; the bundled tasks are written here too [default: data].
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Name of the task's folder.
    #[arg(long, requires = "backbone")]
    pub task: Option<String>,
    /// Checkpoint of a ViT, CLIP tower, DINOv2, Swin or ConvNeXt; the README lists the formats.
    #[arg(long)]
    pub backbone: Option<PathBuf>,
    /// How the frozen backbone is kept and computed with; what is trained is f32 all the same.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub precision: Precision,
    #[command(flatten)]
    pub untold: Untold,
    /// A method's name, for its defaults, or its config as JSON: {"name": "lora", "rank": 4}
    /// [default: conv_bypass].
    #[arg(long, value_parser = parse_method, requires = "task")]
    pub method: Option<MethodArg>,
    /// h, the bottleneck of the bypass.
    #[arg(long = "bottleneck-dim", visible_alias = "h", default_value_t = 8)]
    pub bottleneck_dim: i64,
    /// s, the factor on the bypass [default: the task's published one, else 1].
    #[arg(long)]
    pub scale: Option<f64>,
    /// How the 3x3 convolution starts [default: the task's published one, else identity].
    #[arg(long, value_enum)]
    pub init: Option<Init>,
    #[arg(long, value_enum, default_value_t = Where::Both)]
    pub sub_layers: Where,
    #[arg(long)]
    pub sequential: bool,
    #[arg(long, default_value_t = 3)]
    pub kernel_size: i64,
    #[arg(long, default_value_t = 0.1)]
    pub dropout: f64,
    /// Drop path rate at the last block [default: 0.1, for a linear probe 0].
    #[arg(long)]
    pub drop_path: Option<f64>,
    #[arg(long, default_value_t = 100)]
    pub epochs: usize,
    /// Epochs of warm-up [default: a tenth of the epochs, at least 1].
    #[arg(long)]
    pub warmup_epochs: Option<usize>,
    /// When the learning rate changes.
    #[arg(long, value_enum, default_value_t = Stepping::Epoch)]
    pub schedule: Stepping,
    #[arg(long, default_value_t = 64)]
    pub batch_size: usize,
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
    #[arg(long, default_value_t = 1e-4)]
    pub weight_decay: f64,
    /// imagenet, half, unit or clip [default: clip for a CLIP tower, else imagenet].
    #[arg(long)]
    pub normalization: Option<Normalization>,
    #[arg(long, default_value_t = 42)]
    pub seed: i64,
    /// Keep what the blocks in front of the first bypass make of each image: in `memory`, or in a folder.
    #[arg(long, value_name = "memory|DIR")]
    pub keep_prefix: Option<String>,
    /// Compute each block again in the backward pass: less memory, more time, the same result.
    #[arg(long)]
    pub recompute: bool,
    /// last: train on all 1,000, keep the last epoch; val: train on 800, keep the best epoch on the 200; trial: train
    /// on 800, keep the last epoch, report it on the 200 and leave the test images alone.
    #[arg(long, value_enum, default_value_t = Select::Last)]
    pub select: Select,
    /// Look at the test images each N epochs and record the best of them beside, as best-on-test. The adapter is the
    /// last epoch's all the same.
    #[arg(long, value_name = "N")]
    pub also_best_on_test: Option<NonZeroUsize>,
    /// Where adapter.safetensors, run.json and log.jsonl go [default: runs/TASK-METHOD; of --all runs/all, of --plan runs/PLAN].
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Steps after which the run's state is written to --out, and after each epoch; 0: never. The same command goes
    /// on from it.
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub checkpoint_every: usize,
    /// Write an event file for TensorBoard to --out too.
    #[arg(long)]
    pub tensorboard: bool,
    /// Adapter whose head the run starts from, a linear probe's for instance.
    #[arg(long, requires = "task")]
    pub head: Option<PathBuf>,
    /// cpu or cuda.
    #[arg(long, value_enum, default_value_t = Processor::Cpu)]
    pub device: Processor,
    /// libtorch's threads; in the demo, runs side by side [default: all cores].
    #[arg(long)]
    pub threads: Option<NonZeroUsize>,
    #[command(flatten)]
    pub all: AllArgs,
    /// The configs of a run of a plan, as JSON: they stand for all flags above that say the same.
    #[arg(long, hide = true, value_parser = parse_spec)]
    pub spec: Option<Spec>,
}

impl Args {
    pub fn data(&self) -> &Path {
        self.data.as_deref().unwrap_or(Path::new("data"))
    }

    pub fn source<'a>(&self, file: &'a Path) -> Source<'a> {
        Source { file, untold: self.untold, processor: self.device, precision: self.precision }
    }
}

/// What a run is of, in the words of its record.
#[derive(Clone, Serialize, Deserialize)]
pub struct Spec {
    pub model: PetlConfig,
    pub train: TrainConfig,
}

fn parse_spec(text: &str) -> Result<Spec, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// A method, and whether a config was given or the name alone.
#[derive(Clone)]
pub struct MethodArg {
    pub method: Method,
    pub by_name: bool,
}

/// A method from its name or from JSON.
pub fn parse_method(text: &str) -> Result<MethodArg, String> {
    let by_name = !text.starts_with('{');
    method::parse_method(text).map(|method| MethodArg { method, by_name })
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Init {
    Identity,
    #[value(aliases = ["xavier", "xavier-uniform"])]
    XavierUniform,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Where {
    Both,
    Attention,
    Mlp,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Stepping {
    /// Once after each epoch, as the published code does.
    Epoch,
    /// At each step.
    Step,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Select {
    Last,
    Val,
    Trial,
}

/// The method asked for; the flags of the bypass apply to Convpass by name.
pub fn chosen_method(args: &Args, task: &str) -> Method {
    match &args.method {
        Some(arg) if !(arg.by_name && matches!(arg.method, Method::ConvBypass(_))) => {
            arg.method.clone()
        }
        _ => Method::ConvBypass(bypass_config(args, task)),
    }
}

/// The flags, and for a VTAB-1k task the published s and init where no flag says otherwise.
pub fn bypass_config(args: &Args, task: &str) -> ConvBypassConfig {
    let sub_layers = match args.sub_layers {
        Where::Both => SubLayers::Both,
        Where::Attention => SubLayers::Attention,
        Where::Mlp => SubLayers::Mlp,
    };
    let (scale, init) = published_choice(task, sub_layers).unwrap_or((1.0, ConvInit::Identity));
    ConvBypassConfig {
        bottleneck_dim: args.bottleneck_dim,
        kernel_size: args.kernel_size,
        scale: args.scale.unwrap_or(scale),
        dropout: args.dropout,
        conv_init: match args.init {
            Some(Init::Identity) => ConvInit::Identity,
            Some(Init::XavierUniform) => ConvInit::XavierUniform,
            None => init,
        },
        sub_layers,
        placement: if args.sequential { Placement::Sequential } else { Placement::Parallel },
    }
}
