//! What several tests share: a small backbone, images, the settings of a run.

use std::collections::BTreeMap;

use convpass::train::{CosineSchedule, Stepped, TrainConfig};
use convpass::{Backbone, FrozenViT, Normalization, PetlModel, ViTConfig};
use tch::{Device, Kind, Tensor};

/// A backbone of images of 16x16, 16 patches and two blocks of width 32; always of the same weights.
pub fn small_vit() -> FrozenViT {
    let config = ViTConfig {
        image_size: (16, 16),
        patch_size: 4,
        embed_dim: 32,
        depth: 2,
        num_heads: 2,
        mlp_dim: 64,
        ..ViTConfig::default()
    };
    FrozenViT::random(&config, 3, Device::Cpu).unwrap()
}

/// Pixels of a tensor of this shape that look random and are always the same.
pub fn waves(shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.37).sin().view(shape)
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
