//! Named configs with timm's names.

use super::{AttentionPooling, Pooling, ViTConfig};
use crate::error::{Error, Result};
use crate::nn::{MlpActivation, Rotary};

/// Name, image side, patch side, C, depth, heads.
type Row = (&'static str, i64, i64, i64, i64, i64);

#[rustfmt::skip]
const VIT: &[Row] = &[
    ("vit_tiny_patch16_224",  224, 16,  192, 12,  3),
    ("vit_small_patch16_224", 224, 16,  384, 12,  6),
    ("vit_base_patch16_224",  224, 16,  768, 12, 12),
    ("vit_base_patch32_224",  224, 32,  768, 12, 12),
    ("vit_large_patch16_224", 224, 16, 1024, 24, 16),
    ("vit_huge_patch14_224",  224, 14, 1280, 32, 16),
];

/// The columns of [`Row`] and the width of the projection.
#[rustfmt::skip]
const CLIP: &[(Row, i64)] = &[
    (("vit_base_patch32_clip_quickgelu_224",  224, 32,  768, 12, 12), 512),
    (("vit_base_patch16_clip_quickgelu_224",  224, 16,  768, 12, 12), 512),
    (("vit_large_patch14_clip_quickgelu_224", 224, 14, 1024, 24, 16), 768),
];

/// DINOv2 models without registers and with four registers.
#[rustfmt::skip]
const DINOV2: &[(Row, Row)] = &[
    (("vit_small_patch14_dinov2",      518, 14,  384, 12,  6),
     ("vit_small_patch14_reg4_dinov2", 518, 14,  384, 12,  6)),
    (("vit_base_patch14_dinov2",       518, 14,  768, 12, 12),
     ("vit_base_patch14_reg4_dinov2",  518, 14,  768, 12, 12)),
    (("vit_large_patch14_dinov2",      518, 14, 1024, 24, 16),
     ("vit_large_patch14_reg4_dinov2", 518, 14, 1024, 24, 16)),
    (("vit_giant_patch14_dinov2",      518, 14, 1536, 40, 24),
     ("vit_giant_patch14_reg4_dinov2", 518, 14, 1536, 40, 24)),
];

/// DINOv3 models, with the size of images and the pooling that timm gives them.
const DINOV3: &[Row] = &[("vit_base_patch16_dinov3", 256, 16, 768, 12, 12)];

const SIGLIP: &[Row] = &[("vit_base_patch16_siglip_224", 224, 16, 768, 12, 12)];

fn plain((_, image, patch_size, embed_dim, depth, num_heads): Row) -> ViTConfig {
    ViTConfig {
        image_size: (image, image),
        patch_size,
        embed_dim,
        depth,
        num_heads,
        mlp_dim: 4 * embed_dim,
        ..ViTConfig::default()
    }
}

fn clip(row: Row, projection: i64) -> ViTConfig {
    ViTConfig {
        activation: MlpActivation::QuickGelu,
        patch_bias: false,
        pre_norm: true,
        norm_eps: 1e-5,
        projection: Some(projection),
        ..plain(row)
    }
}

fn dinov2(row: Row, num_registers: i64) -> ViTConfig {
    let config =
        // The position tables of timm's models with registers cover only the patches.
        ViTConfig { num_registers, pos_embed_prefix: i64::from(num_registers == 0), layer_scale: true, ..plain(row) };
    match config.embed_dim {
        // ViT-g has SwiGLU; its hidden width is 2/3 of 4C, rounded up to a multiple of 8.
        1536 => ViTConfig { activation: MlpActivation::SwiGlu, mlp_dim: 4096, ..config },
        _ => config,
    }
}

fn dinov3(row: Row) -> ViTConfig {
    ViTConfig {
        num_registers: 4,
        pos_embed: false,
        pos_embed_prefix: 0,
        rotary: Some(Rotary::DINOV3),
        qkv_bias: false,
        layer_scale: true,
        norm_eps: 1e-5,
        pooling: Pooling::Average,
        ..plain(row)
    }
}

fn siglip(row: Row) -> ViTConfig {
    let config = plain(row);
    let mlp_dim = config.mlp_dim;
    ViTConfig {
        class_token: false,
        pos_embed_prefix: 0,
        pooling: Pooling::Attention,
        attention_pool: Some(AttentionPooling { num_heads: None, mlp_dim, reads_prefix: false }),
        ..config
    }
}

impl ViTConfig {
    /// Returns a named config: ViT-Ti/S/B/L/H, CLIP B/32, B/16 and L/14 (OpenAI's, with QuickGELU),
    /// DINOv2 S/B/L/g with and without registers, DINOv3 B and SigLIP B/16. [`ViTConfig::presets`]
    /// lists the names.
    ///
    /// # Errors
    /// [`Error::Config`] with all names if the name is unknown.
    pub fn preset(name: &str) -> Result<Self> {
        let vit = VIT.iter().map(|&row| (row.0, plain(row)));
        let clip = CLIP.iter().map(|&(row, dim)| (row.0, clip(row, dim)));
        let dinov2 = DINOV2
            .iter()
            .flat_map(|&(bare, reg4)| [(bare.0, dinov2(bare, 0)), (reg4.0, dinov2(reg4, 4))]);
        let dinov3 = DINOV3.iter().map(|&row| (row.0, dinov3(row)));
        let siglip = SIGLIP.iter().map(|&row| (row.0, siglip(row)));
        vit.chain(clip)
            .chain(dinov2)
            .chain(dinov3)
            .chain(siglip)
            .find_map(|(key, config)| (key == name).then_some(config))
            .ok_or_else(|| {
                let names = Self::presets().collect::<Vec<_>>().join(", ");
                Error::config("preset", format!("one of {names}"), name)
            })
    }

    /// Returns the names that [`ViTConfig::preset`] accepts.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        let vit = VIT.iter().map(|row| row.0);
        let clip = CLIP.iter().map(|(row, _)| row.0);
        let dinov2 = DINOV2.iter().flat_map(|(bare, reg4)| [bare.0, reg4.0]);
        vit.chain(clip).chain(dinov2).chain(DINOV3.iter().chain(SIGLIP).map(|row| row.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid_and_unknown_names_are_told() {
        for name in ViTConfig::presets() {
            ViTConfig::preset(name).unwrap().validate().unwrap();
        }
        let error = ViTConfig::preset("vit_b").unwrap_err().to_string();
        assert!(error.contains("vit_base_patch16_224") && error.contains("vit_b"), "{error}");
    }

    /// The number of weights of timm 1.0's models of the same names, without their heads.
    #[test]
    fn the_presets_have_as_many_weights_as_timms_models() {
        for (name, count) in [
            ("vit_base_patch16_224", 85_798_656),
            ("vit_base_patch14_reg4_dinov2", 86_582_016),
            ("vit_base_patch16_dinov3", 85_641_216),
            ("vit_base_patch16_siglip_224", 92_884_224),
        ] {
            assert_eq!(ViTConfig::preset(name).unwrap().num_params(), count, "{name}");
        }
    }
}
