//! Your arrays, your loop and your optimizer: Convpass without the crate's data path and training loop.
//!
//! ```text
//! cargo run --release --example own_data
//! ```
//!
//! It teaches that a `PetlModel` is a function from images to logits, with a `VarStore` of what is trained: anything
//! that optimizes a `VarStore` trains it. Here the images are an `ndarray` made on the spot (stripes in one of four
//! directions), the optimizer is tch's SGD with momentum, and each step accumulates the gradients of two batches and
//! clips them. The adapter is saved, loaded beside the same backbone and gives the same logits.

use anyhow::{Result, ensure};
use convpass::data::{Normalization, bundled};
use convpass::{ConvBypassConfig, FrozenViT, Method, PetlConfig, PetlModel};
use ndarray::{Array1, Array4};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const SIDE: usize = 32;
const CLASSES: i64 = 4;
const BATCH: i64 = 16;
/// Batches whose gradients are summed before the optimizer takes a step.
const ACCUMULATED: usize = 2;
const EPOCHS: usize = 5;

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("vit.safetensors");
    bundled::write_backbone(&file)?;
    let open = || FrozenViT::open(&file, Device::Cpu);

    // h = 8 beside attention and MLP of each block; the head has a row for each class.
    let method = Method::ConvBypass(ConvBypassConfig::default());
    let model = PetlModel::new(open()?, &PetlConfig::new(method, CLASSES))?;
    println!("{}", model.trainable_params());

    let (images, labels) = to_tensors(stripes(240, 0))?;
    let (test_images, test_labels) = to_tensors(stripes(200, 1))?;
    let mut optimizer = nn::sgd(0.9, 0.0, 1e-4, false).build(model.var_store(), 0.0)?;
    tch::manual_seed(0);
    for epoch in 0..EPOCHS {
        // Any schedule will do: here a cosine.
        let done = epoch as f64 / EPOCHS as f64;
        optimizer.set_lr(0.05 * (1.0 + (std::f64::consts::PI * done).cos()));
        let order = Tensor::f_randperm(labels.size()[0], (Kind::Int64, Device::Cpu))?;
        let batches = order.f_split(BATCH, 0)?;
        let mut loss_sum = 0.0;
        for step in batches.chunks(ACCUMULATED) {
            optimizer.zero_grad();
            for index in step {
                // Training mode: dropout and drop path are on.
                let logits = model.forward(&images.f_index_select(0, index)?, true)?;
                let loss = logits.cross_entropy_for_logits(&labels.f_index_select(0, index)?);
                (loss.f_div_scalar(step.len() as f64)?).f_backward()?;
                loss_sum += loss.f_double_value(&[])?;
            }
            optimizer.clip_grad_norm(1.0);
            optimizer.step();
        }
        let top1 = accuracy(&model, &test_images, &test_labels)?;
        let loss = loss_sum / batches.len() as f64;
        println!("epoch {}: loss {loss:.3}, top-1 on 200 other images {top1:.1} %", epoch + 1);
    }

    let adapter = folder.path().join("adapter.safetensors");
    model.save_adapter(&adapter)?;
    let loaded = PetlModel::load_adapter(open()?, &adapter)?;
    let logits = |model: &PetlModel| tch::no_grad(|| model.forward(&test_images, false));
    ensure!(logits(&model)? == logits(&loaded)?, "a loaded adapter gives the same logits");
    println!("the adapter, {} kB, was saved and loaded", adapter.metadata()?.len() / 1000);
    Ok(())
}

/// Images `[N, H, W, 3]` of stripes, and the direction of each, `[N]`: 0, 45, 90 or 135 degrees.
fn stripes(count: usize, seed: u64) -> (Array4<u8>, Array1<i64>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let labels = Array1::from_shape_fn(count, |index| index as i64 % CLASSES);
    let mut images = Array4::zeros((count, SIDE, SIDE, 3));
    for (mut image, label) in images.outer_iter_mut().zip(&labels) {
        let angle = std::f32::consts::PI * *label as f32 / CLASSES as f32;
        let (dx, dy) = (angle.cos(), angle.sin());
        let (width, phase) = (rng.random_range(0.5..1.0f32), rng.random_range(0.0..6.3f32));
        let color: [f32; 3] = rng.random();
        for ((y, x, channel), value) in image.indexed_iter_mut() {
            let wave = (width * (dx * x as f32 + dy * y as f32) + phase).sin();
            let noise = rng.random_range(-0.3..0.3f32);
            *value = (255.0 * (0.5 + 0.4 * wave * color[channel] + noise)) as u8;
        }
    }
    (images, labels)
}

/// Arrays to tensors: images become normalized f32 `[N, 3, H, W]`.
fn to_tensors((images, labels): (Array4<u8>, Array1<i64>)) -> Result<(Tensor, Tensor)> {
    let size: Vec<i64> = images.shape().iter().map(|&length| length as i64).collect();
    let bytes = Tensor::from_slice(images.as_standard_layout().as_slice().unwrap_or_default());
    // The bundled ViT was pretrained with mean and deviation 0.5.
    let images = Normalization::Half.normalize(&bytes.f_view(&size[..])?)?;
    Ok((images, Tensor::from_slice(&labels.to_vec())))
}

/// Top-1 in percent, without dropout and without gradients.
fn accuracy(model: &PetlModel, images: &Tensor, labels: &Tensor) -> Result<f64> {
    let logits = tch::no_grad(|| model.forward(images, false))?;
    Ok(100.0 * logits.accuracy_for_logits(labels).f_double_value(&[])?)
}
