//! Pretrains the small ViT that the crate bundles, on Fashion-MNIST (60,000 images of clothes, MIT).
//!
//! ```text
//! cargo run --release --example pretrain_fashion -- --data DIR --out vit.safetensors
//! ```
//!
//! `DIR` holds the four `*-ubyte.gz` files, as Debian's package `dataset-fashion-mnist` installs them. Each
//! epoch sees every image anew: moved, mirrored, enlarged, in random colours. Prints loss and accuracy for each
//! epoch, then the top-1 on the 10,000 test images, and writes the weights in f16 under timm's names.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use convpass::Normalization;
use convpass::train::{AdamW, CosineSchedule, Stepped};
use convpass::{FrozenViT, Method, PetlConfig, PetlModel, ViTConfig};
use flate2::read::GzDecoder;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
#[command(about = "Pretrains the bundled ViT on Fashion-MNIST")]
struct Args {
    /// Folder of the four *-ubyte.gz files.
    #[arg(long)]
    data: PathBuf,
    /// Where the weights go.
    #[arg(long)]
    out: PathBuf,
    #[arg(long, default_value_t = 12)]
    epochs: usize,
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    #[arg(long, default_value_t = 1.5e-3)]
    lr: f64,
    #[arg(long, default_value_t = 0)]
    seed: i64,
}

const SIDE: i64 = 32;

/// 1.0 M weights: 64 patches of 4x4, C = 128, 5 blocks, 2 heads.
fn config() -> ViTConfig {
    ViTConfig {
        image_size: (SIDE, SIDE),
        patch_size: 4,
        embed_dim: 128,
        depth: 5,
        num_heads: 2,
        mlp_dim: 512,
        ..ViTConfig::default()
    }
}

fn main() -> Result<()> {
    convpass::keep_freed_memory();
    let args = Args::parse();
    let (images, labels) = read(&args.data, "train")?;
    let backbone = FrozenViT::random(&config(), args.seed, Device::Cpu)?;
    let model_config =
        PetlConfig { drop_path: 0.0, seed: args.seed, ..PetlConfig::new(Method::Full, 10) };
    let model = PetlModel::new(backbone, &model_config)?;
    println!("{}", model.trainable_params());

    let schedule = CosineSchedule {
        lr: args.lr,
        warmup_epochs: 1,
        stepped: Stepped::EachStep,
        ..Default::default()
    };
    let mut optimizer = AdamW::new(model.var_store(), 0.05)?;
    let steps = labels.numel() / args.batch_size;
    for epoch in 0..args.epochs {
        let start = std::time::Instant::now();
        let mut rng = ChaCha8Rng::seed_from_u64((args.seed << 16) as u64 + epoch as u64);
        tch::manual_seed(args.seed + epoch as i64);
        let order = Tensor::randperm(labels.numel() as i64, (Kind::Int64, Device::Cpu));
        let (mut loss_sum, mut correct) = (0.0, 0);
        for (step, index) in order.split(args.batch_size as i64, 0).iter().take(steps).enumerate() {
            let batch = augment(&images.index_select(0, index), &mut rng)?;
            let labels = labels.index_select(0, index);
            let logits = model.forward(&batch, true)?;
            let loss =
                logits.cross_entropy_loss(&labels, None::<Tensor>, tch::Reduction::Mean, -100, 0.0);
            optimizer.backward_step(&loss, schedule.lr(epoch, step, args.epochs, steps))?;
            loss_sum += f64::try_from(&loss)?;
            correct +=
                logits.argmax(-1, false).eq_tensor(&labels).sum(Kind::Int64).int64_value(&[]);
        }
        println!(
            "epoch {}: loss {:.4}, train {:.2} %, {:.0} s",
            epoch + 1,
            loss_sum / steps as f64,
            100.0 * correct as f64 / (steps * args.batch_size) as f64,
            start.elapsed().as_secs_f64()
        );
        save(&model, &args.out)?;
    }
    println!("test top-1: {:.2} %", test(&model, &args.data)?);
    Ok(())
}

/// Images as f32 `[N, 28, 28]` in 0..=1 and labels `[N]` of one split (`train` or `t10k`).
fn read(folder: &Path, split: &str) -> Result<(Tensor, Tensor)> {
    let pixels = read_idx(&folder.join(format!("{split}-images-idx3-ubyte.gz")), 16)?;
    let labels = read_idx(&folder.join(format!("{split}-labels-idx1-ubyte.gz")), 8)?;
    ensure!(
        pixels.len() == labels.len() * 28 * 28,
        "{split}: images and labels do not go together"
    );
    let images = Tensor::from_slice(&pixels).view([-1, 28, 28]).to_kind(Kind::Float) / 255.0;
    Ok((images, Tensor::from_slice(&labels).to_kind(Kind::Int64)))
}

fn read_idx(path: &Path, header: usize) -> Result<Vec<u8>> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let mut bytes = Vec::new();
    GzDecoder::new(file).read_to_end(&mut bytes).with_context(|| path.display().to_string())?;
    ensure!(bytes.len() > header, "{}: too short", path.display());
    Ok(bytes.split_off(header))
}

/// Gray `[B, 28, 28]` to normalized colour `[B, 3, 32, 32]`: each image between two colours, at a
/// random size (75 to 100 %) and place, mirrored half of the time.
fn augment(gray: &Tensor, rng: &mut ChaCha8Rng) -> Result<Tensor> {
    let batch = gray.size()[0];
    let mut maps = Vec::new();
    for _ in 0..batch {
        // From a place on the canvas, in -1..=1, to one in the image.
        let zoom: f32 = 1.0 / rng.random_range(0.75..=1.0f32);
        let slack = 1.0 - 1.0 / zoom;
        let mut shift = || rng.random_range(-1.0..=1.0f32) * slack * zoom;
        let (x, y) = (shift(), shift());
        let mirrored = if rng.random() { -zoom } else { zoom };
        maps.extend([mirrored, 0.0, x, 0.0, zoom, y]);
    }
    let maps = Tensor::from_slice(&maps).view([batch, 2, 3]);
    let grid = Tensor::affine_grid_generator(&maps, [batch, 1, SIDE, SIDE], false);
    let canvas = gray.unsqueeze(1).grid_sampler_2d(&grid, 0, 0, false);
    // One colour dark and one bright, either of them the clothes'.
    let (mut front, mut back) = (Vec::new(), Vec::new());
    for _ in 0..batch {
        let mut colour =
            |low: f32| (0..3).map(|_| low + 0.4 * rng.random::<f32>()).collect::<Vec<_>>();
        let (mut a, mut b) = (colour(0.0), colour(0.6));
        if rng.random() {
            std::mem::swap(&mut a, &mut b);
        }
        front.append(&mut a);
        back.append(&mut b);
    }
    let colour = |values: &[f32]| Tensor::from_slice(values).view([batch, 3, 1, 1]);
    normalize(&(colour(&front) * &canvas + colour(&back) * (1 - &canvas)))
}

/// White on black in the middle, normalized: `[B, 28, 28] -> [B, 3, 32, 32]`.
fn plain(gray: &Tensor) -> Result<Tensor> {
    let padded = gray.unsqueeze(1).constant_pad_nd([2, 2, 2, 2]);
    normalize(&padded.expand([-1, 3, -1, -1], false))
}

fn normalize(images: &Tensor) -> Result<Tensor> {
    let bytes = (images.permute([0, 2, 3, 1]) * 255.0).round().to_kind(Kind::Uint8);
    Ok(Normalization::Half.normalize(&bytes)?)
}

fn test(model: &PetlModel, folder: &Path) -> Result<f64> {
    let (images, labels) = read(folder, "t10k")?;
    let mut correct = 0;
    for (images, labels) in images.split(500, 0).iter().zip(labels.split(500, 0)) {
        let logits =
            tch::no_grad(|| model.forward(&plain(images)?, false).map_err(anyhow::Error::from))?;
        correct += logits.argmax(-1, false).eq_tensor(&labels).sum(Kind::Int64).int64_value(&[]);
    }
    Ok(100.0 * correct as f64 / labels.numel() as f64)
}

fn save(model: &PetlModel, out: &Path) -> Result<()> {
    let mut weights: Vec<_> = model.var_store().variables().into_iter().collect();
    weights.retain(|(name, _)| !name.starts_with("head."));
    let weights: Vec<_> =
        weights.into_iter().map(|(name, w)| (name, w.detach().to_kind(Kind::Half))).collect();
    Tensor::write_safetensors(&weights, out)?;
    println!("{}: {} tensors", out.display(), weights.len());
    Ok(())
}
