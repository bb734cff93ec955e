//! What a frozen backbone makes of images: pooled features, dense features, tokens between blocks.
//!
//! ```text
//! $ cargo run --release --example features
//! $ cargo run --release --example features -- --backbone vit.safetensors --image cat.jpg --image dog.jpg
//! ```
//!
//! Without a file the backbone is a tiny one with random weights, and without images it sees noise.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use convpass::data::{Normalization, Resize, decode_image};
use convpass::{FrozenViT, ViTConfig};
use tch::{Device, Kind, Tensor};

/// Prints the features of images.
#[derive(Parser)]
struct Args {
    /// The checkpoint of a ViT, a CLIP image tower or DINOv2.
    #[arg(long, value_name = "FILE")]
    backbone: Option<PathBuf>,
    /// An image file; may be given several times.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    image: Vec<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let backbone = match &args.backbone {
        Some(file) => FrozenViT::open(file, Device::Cpu)?,
        None => FrozenViT::random(&tiny(), 0, Device::Cpu)?,
    };
    let config = backbone.config();
    let images = load(&args.image, config.image_size)?;

    let _no_gradients = tch::no_grad_guard();
    let features = backbone.features(&images)?;
    println!("pooled {:?}", features.size());
    for image in 0..features.size()[0] {
        let first = Vec::<f32>::try_from(features.get(image).narrow(0, 0, 4))?;
        println!("  image {image}: {first:.3?} ..");
    }
    println!("patch features {:?}", backbone.patch_features(&images)?.size());

    let depth = config.depth as usize;
    let blocks = [depth / 2, depth - 1];
    for (block, stream) in blocks.iter().zip(backbone.intermediate(&images, &blocks)?) {
        let (tokens, map) = (stream.tokens.size(), stream.patches()?.size());
        println!("after block {block}: tokens {tokens:?}, as a map {map:?}");
    }
    Ok(())
}

fn tiny() -> ViTConfig {
    ViTConfig {
        image_size: (32, 48),
        embed_dim: 64,
        depth: 4,
        num_heads: 2,
        mlp_dim: 128,
        ..ViTConfig::default()
    }
}

/// The images as `[B, 3, H, W]`, resized to the size that the backbone sees; noise without any.
fn load(paths: &[PathBuf], (height, width): (i64, i64)) -> Result<Tensor> {
    if paths.is_empty() {
        return Ok(Tensor::randn([2, 3, height, width], (Kind::Float, Device::Cpu)));
    }
    let resize = Resize::bicubic((height, width))?;
    let mut images = Vec::new();
    for path in paths {
        let pixels: Vec<u8> = resize.apply(decode_image(path)?.view())?.into_iter().collect();
        images.push(Tensor::from_slice(&pixels).view([height, width, 3]));
    }
    Ok(Normalization::ImageNet.normalize(&Tensor::stack(&images, 0))?)
}
