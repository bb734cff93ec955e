//! What several tests share: the device, the fixtures' folder, a small backbone, images, the settings of a run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::LazyLock;

use convpass::train::{CosineSchedule, Stepped, TrainConfig};
use convpass::{Backbone, FrozenViT, Normalization, PetlModel, ViTConfig};
use tch::{Device, Kind, Tensor};

/// The smallest tolerances, relative to the largest value, on a device other than the CPU: it adds
/// in another order, and computes in the dtype itself where the CPU computes in f32. On the CPU
/// each test states its own. TF32 has to be off (`NVIDIA_TF32_OVERRIDE=0`).
pub const F32_TOLERANCE: f64 = 1e-4;
/// The tolerances of golden features whose frozen weights are in bf16 or f16, on every device.
pub const BF16_TOLERANCE: f64 = 5e-2;
pub const F16_TOLERANCE: f64 = 1e-2;

/// The device that the tests compute on, from `CONVPASS_TEST_DEVICE`: `cpu` (the default), `cuda`
/// or `accelerator`, the device of `tests/accelerator`.
///
/// libtorch has to know the last one before the first backward pass of the process: use it with a
/// filter of tests that call this function.
pub fn device() -> Device {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| {
        let name = std::env::var("CONVPASS_TEST_DEVICE").unwrap_or_default();
        match name.as_str() {
            "" | "cpu" => Device::Cpu,
            "cuda" if tch::Cuda::is_available() => Device::Cuda(0),
            "cuda" => panic!("no CUDA device: {:?}", convpass::cuda_load_error()),
            #[cfg(target_os = "linux")]
            "accelerator" => convpass_accelerator::Accelerator::hold().device(),
            other => panic!("CONVPASS_TEST_DEVICE={other}: cpu, cuda or accelerator"),
        }
    });
    *DEVICE
}

/// The tolerance `on_cpu` on the CPU, and at least [`F32_TOLERANCE`] on another device.
pub fn limit(on_cpu: f64) -> f64 {
    if device() == Device::Cpu { on_cpu } else { on_cpu.max(F32_TOLERANCE) }
}

/// Comparison of tensors within a tolerance that depends on the device.
pub trait Close {
    /// Whether all values are within `limit(relative)` of the expected value plus `limit(absolute)`.
    fn is_close(&self, expected: &Tensor, relative: f64, absolute: f64) -> bool;
}

impl Close for Tensor {
    fn is_close(&self, expected: &Tensor, relative: f64, absolute: f64) -> bool {
        let [found, expected] = [self, expected].map(|tensor| tensor.to_device(Device::Cpu));
        found.allclose(&expected, limit(relative), limit(absolute), false)
    }
}

/// The checkout, or the folder `CONVPASS_TEST_ROOT` with a copy of the files that the tests read.
pub fn root() -> PathBuf {
    let root = std::env::var_os("CONVPASS_TEST_ROOT");
    root.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// A backbone of images of 16x16, 16 patches and two blocks of width 32; always of the same weights.
pub fn small_vit() -> FrozenViT {
    small_vit_on(device())
}

/// [`small_vit`] on a device.
pub fn small_vit_on(device: Device) -> FrozenViT {
    let config = ViTConfig {
        image_size: (16, 16),
        patch_size: 4,
        embed_dim: 32,
        depth: 2,
        num_heads: 2,
        mlp_dim: 64,
        ..ViTConfig::default()
    };
    FrozenViT::random(&config, 3, device).unwrap()
}

/// Pixels of a tensor of this shape that look random and are always the same.
pub fn waves(shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    // Computed on the CPU, so that they are the same everywhere.
    let steps = Tensor::arange(count, (Kind::Float, Device::Cpu));
    (steps * 0.37).sin().view(shape).to_device(device())
}

/// A run with a warm-up of one epoch.
pub fn train_config(epochs: usize, batch_size: usize) -> TrainConfig {
    TrainConfig {
        epochs,
        batch_size,
        schedule: CosineSchedule {
            lr: 1e-2,
            warmup_epochs: 1,
            stepped: Stepped::EachStep,
            ..CosineSchedule::default()
        },
        normalization: Normalization::Half,
        seed: 9,
        ..TrainConfig::default()
    }
}

/// A copy of every trainable variable by name.
pub fn weights<B: Backbone>(model: &PetlModel<B>) -> BTreeMap<String, Tensor> {
    let copy = |(name, weight): (String, Tensor)| (name, weight.detach().copy());
    model.var_store().variables().into_iter().map(copy).collect()
}
