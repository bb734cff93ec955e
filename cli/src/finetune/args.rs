//! The command line of a run.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::ValueEnum;
use convpass::train::TrainConfig;
use convpass::{Method, PetlConfig};
use serde::{Deserialize, Serialize};

use crate::flags::{
    BackboneFile, BackboneFlags, BypassFlags, LogFlags, ThreadFlags, TrainingFlags,
};

/// Finetunes an adapter on one task and tests it once.
///
/// The task is a folder DATA/TASK in the layout of VTAB-1k: train800.txt, val200.txt,
/// train800val200.txt and test.txt, each line `path label`. The adapter, the record of the run and
/// its log go to --out. Ctrl-C ends after the current step; the same command goes on from there,
/// after a kill too, and the adapter is the same byte for byte.
#[derive(clap::Args, Clone)]
#[command(
    args_override_self = true,
    after_long_help = "Example:\n  convpass finetune --data vtab-1k --task dtd --backbone vit_base_patch16_224.safetensors --out runs/dtd"
)]
pub struct Args {
    /// Folder that holds the folders of the tasks.
    #[arg(long, default_value = "data")]
    pub data: PathBuf,
    /// Name of the task's folder.
    #[arg(long)]
    pub task: String,
    /// Name of a method, for its defaults, or its config as JSON: {"name": "lora", "rank": 4}
    /// [default: convpass].
    #[arg(long, value_parser = parse_method)]
    pub method: Option<MethodArg>,
    /// last: train on all 1,000 images and keep the last epoch; val: train on 800 and keep the epoch
    /// that is best on the 200; trial: train on 800, measure the last epoch on the 200, and leave
    /// the test images alone.
    #[arg(long, value_enum, default_value_t = Select::Last)]
    pub select: Select,
    /// Look at the test images every N epochs, and record the best of these looks as best-on-test.
    /// The adapter is the last epoch's in any case.
    #[arg(long, value_name = "N")]
    pub also_best_on_test: Option<NonZeroUsize>,
    /// Adapter whose head the run starts from, such as a linear probe's.
    #[arg(long, value_name = "FILE")]
    pub head: Option<PathBuf>,
    /// Seed of the initial values, the order of the images, dropout and drop path.
    #[arg(long, default_value_t = 42, allow_negative_numbers = true)]
    pub seed: i64,
    /// Keep the output of the frozen blocks in front of the first bypass: in `memory`, or in a folder.
    #[arg(long, value_name = "memory|DIR")]
    pub keep_prefix: Option<String>,
    /// Compute each block again in the backward pass: less memory, more time, the same result.
    #[arg(long)]
    pub recompute: bool,
    /// Folder for adapter.safetensors, run.json and log.jsonl [default: runs/TASK-METHOD].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub file: BackboneFile,
    #[command(flatten)]
    pub backbone: BackboneFlags,
    #[command(flatten)]
    pub bypass: BypassFlags,
    #[command(flatten)]
    pub training: TrainingFlags,
    #[command(flatten)]
    pub logs: LogFlags,
    #[command(flatten)]
    pub threads: ThreadFlags,
    /// The configs of a run of a sweep, as JSON, in place of all flags that say the same.
    #[arg(long, hide = true, value_parser = parse_spec)]
    pub spec: Option<Spec>,
}

/// The configs of a run, as its record has them.
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
pub fn parse_method(text: &str) -> convpass::Result<MethodArg> {
    let by_name = !text.trim_start().starts_with('{');
    Ok(MethodArg { method: text.parse()?, by_name })
}

/// Which weights are kept, and what they are measured on.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Select {
    Last,
    Val,
    Trial,
}

impl Args {
    /// The method asked for; the flags of the bypass apply to Convpass by name.
    pub fn chosen_method(&self) -> Method {
        match &self.method {
            Some(arg) if !(arg.by_name && matches!(arg.method, Method::ConvBypass(_))) => {
                arg.method.clone()
            }
            _ => Method::ConvBypass(self.bypass.config(&self.task)),
        }
    }
}
