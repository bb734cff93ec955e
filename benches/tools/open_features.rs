//! The features of a checkpoint as the crate opens it by default, as one line of JSON: the side of `tests/sweep/run.py`
//! that is ours.
//!
//! ```text
//! $ cargo run --release --example open_features -- model.safetensors x.safetensors
//! {"choices":"vit heads=12 ..","features":[0.25,..],"max":2.5,"ok":true}
//! ```
//!
//! X is a file whose tensor `x` holds images [1, 3, H, W]. What cannot be opened, or does not accept the images, is
//! `{"ok":false,"stage":"open","error":".."}`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use convpass::checkpoint::TensorFile;
use convpass::{AnyBackbone, Backbone};
use serde_json::{Value, json};
use tch::Device;

#[derive(Parser)]
struct Args {
    /// A checkpoint, or a folder that holds one.
    source: PathBuf,
    /// A file with the tensor `x`.
    x: PathBuf,
    /// libtorch's threads.
    #[arg(long, default_value_t = 1)]
    threads: i32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    tch::set_num_threads(args.threads);
    println!("{}", features(&args.source, &args.x)?);
    Ok(())
}

fn features(source: &Path, x: &Path) -> Result<Value> {
    let images = TensorFile::open(x)?.tensor("x").context("the images")?;
    let refused = |stage, error: convpass::Error| json!({"ok": false, "stage": stage, "error": error.to_string()});
    let backbone = match AnyBackbone::open(source, Device::Cpu) {
        Ok(backbone) => backbone,
        Err(error) => return Ok(refused("open", error)),
    };
    let _no_gradients = tch::no_grad_guard();
    let features = match backbone.features(&images) {
        Ok(features) => Vec::<f32>::try_from(features.flatten(0, -1))?,
        Err(error) => return Ok(refused("features", error)),
    };
    let max = features.iter().fold(0.0, |max: f32, feature| max.max(feature.abs()));
    Ok(json!({"ok": true, "max": max, "choices": backbone.choices(), "features": features}))
}
