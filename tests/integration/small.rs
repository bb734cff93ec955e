//! The smallest backbone that several tests train beside.

use convpass::{FrozenViT, ViTConfig};
use tch::Device;

/// Images of 16x16, 16 patches, two blocks of width 32; always of the same weights.
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
