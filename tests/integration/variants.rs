//! The backbones that the contract is checked on.

use convpass::backbone::{
    AttentionPooling, ContinuousBiasConfig, ConvNeXtNorm, ConvNeXtStem, MlpActivation,
    NormPlacement, Rotary, RotaryCoordinates, RotaryPairs,
};
use convpass::{
    ConvNeXtConfig, FrozenConvNeXt, FrozenSwin, FrozenViT, Pooling, SwinConfig, ViTConfig,
};
use tch::{Device, Kind};

use crate::golden::AnyFrozen;
use crate::support::device;

const DEPTH: usize = 3;

/// A kind of backbone and its variants, each in f32 and bf16, and on the CPU in f16.
pub trait Contract: AnyFrozen {
    fn variants() -> Vec<(&'static str, Self::Config)>;

    /// Whether its blocks are of several widths.
    fn has_widths(&self) -> bool {
        self.shape().block_dims.windows(2).any(|pair| pair[0] != pair[1])
    }

    fn backbones() -> Vec<(String, Self)> {
        let mut kinds = vec![("f32", Kind::Float), ("bf16", Kind::BFloat16), ("f16", Kind::Half)];
        // The CPU computes in f32 beside weights in f16. Another device computes in f16, in which
        // small gradients of an unscaled loss are zero.
        kinds.truncate(if device() == Device::Cpu { 3 } else { 2 });
        let variants = Self::variants().into_iter();
        variants
            .map(|(name, config)| (name, Self::random(&config, device())))
            .flat_map(|(name, backbone)| {
                let of = |&(kind, k)| (format!("{name}, {kind}"), backbone.to_kind(k).unwrap());
                kinds.iter().map(of).collect::<Vec<_>>()
            })
            .collect()
    }
}

impl Contract for FrozenViT {
    fn variants() -> Vec<(&'static str, ViTConfig)> {
        let class_token = ViTConfig {
            image_size: (12, 20),
            patch_size: 4,
            embed_dim: 24,
            depth: DEPTH as i64,
            num_heads: 4,
            mlp_dim: 48,
            ..ViTConfig::default()
        };
        let average = ViTConfig {
            class_token: false,
            pos_embed_prefix: 0,
            pooling: Pooling::Average,
            ..class_token.clone()
        };
        let registers = ViTConfig {
            num_registers: 4,
            layer_scale: true,
            activation: MlpActivation::SwiGlu,
            pooling: Pooling::AverageThenNorm,
            ..class_token.clone()
        };
        let clip = ViTConfig {
            pre_norm: true,
            patch_bias: false,
            qkv_bias: false,
            activation: MlpActivation::QuickGelu,
            norm_eps: 1e-5,
            projection: Some(7),
            ..class_token.clone()
        };
        let mut variants = vec![
            ("class token", class_token.clone()),
            ("average", average.clone()),
            ("registers, SwiGLU", registers.clone()),
            ("CLIP", clip),
        ];
        variants.extend(relatives(class_token, average, registers));
        variants
    }
}

/// Families whose attention, pooling or prefix differs from those of a ViT.
fn relatives(
    class_token: ViTConfig,
    average: ViTConfig,
    registers: ViTConfig,
) -> Vec<(&'static str, ViTConfig)> {
    let dinov3 = ViTConfig {
        num_heads: 3,
        pos_embed: false,
        pos_embed_prefix: 0,
        rotary: Some(Rotary::DINOV3),
        activation: MlpActivation::Gelu,
        pooling: Pooling::ClassToken,
        norm_eps: 1e-5,
        ..registers
    };
    let siglip = ViTConfig {
        activation: MlpActivation::GeluTanh,
        pooling: Pooling::Attention,
        attention_pool: Some(AttentionPooling {
            num_heads: Some(2),
            mlp_dim: 40,
            reads_prefix: false,
        }),
        ..average
    };
    let distilled = ViTConfig {
        num_registers: 1,
        pos_embed_prefix: 2,
        pooling: Pooling::ClassAndDistillation,
        ..class_token.clone()
    };
    let post_norm = ViTConfig { norm_placement: NormPlacement::After, ..class_token.clone() };
    let eva = eva(class_token.clone());
    let mut found = vec![
        ("DINOv3", dinov3),
        ("SigLIP", siglip),
        ("DeiT", distilled),
        ("EVA-02", eva),
        ("norms after", post_norm),
    ];
    found.extend(with_other_layers(class_token));
    found
}

/// Rotary positions, norms inside the sub-layers and a gated MLP.
fn eva(class_token: ViTConfig) -> ViTConfig {
    let coordinates =
        RotaryCoordinates::Index { offset: 1.0, reference: Some((4, 4)), columns_first: true };
    ViTConfig {
        num_heads: 2,
        rotary: Some(Rotary { base: 1e4, pairs: RotaryPairs::Neighbours, coordinates }),
        activation: MlpActivation::SwiGlu,
        attention_norm: true,
        mlp_norm: true,
        pooling: Pooling::AverageThenNorm,
        ..class_token
    }
}

/// Families with a bias between tokens, learned frequencies, RMS norms or layers without a bias.
fn with_other_layers(class_token: ViTConfig) -> Vec<(&'static str, ViTConfig)> {
    let beit = ViTConfig {
        pos_embed: false,
        pos_embed_prefix: 0,
        relative_bias: true,
        layer_scale: true,
        ..class_token.clone()
    };
    let mixed = ViTConfig { mixed_rotary: true, ..class_token.clone() };
    let aimv2 = ViTConfig {
        class_token: false,
        pos_embed_prefix: 0,
        patch_norm: true,
        qkv_bias: false,
        proj_bias: false,
        rms_norm: true,
        norm_bias: false,
        activation: MlpActivation::SwiGlu,
        pooling: Pooling::Attention,
        attention_pool: Some(AttentionPooling { num_heads: None, mlp_dim: 0, reads_prefix: false }),
        ..class_token
    };
    vec![("BEiT", beit), ("RoPE-ViT, mixed", mixed), ("AIMv2", aimv2)]
}

/// Shifted windows that do not divide the grid, in stages of several widths and of one.
impl Contract for FrozenSwin {
    fn variants() -> Vec<(&'static str, SwinConfig)> {
        let stages = SwinConfig {
            image_size: (12, 20),
            patch_size: 2,
            embed_dim: 16,
            depths: vec![1, DEPTH as i64 - 1],
            num_heads: vec![2, 4],
            window_sizes: vec![(4, 4), (2, 2)],
            mlp_ratio: 2.0,
            ..SwinConfig::default()
        };
        let one_width = SwinConfig {
            patch_size: 4,
            embed_dim: 24,
            depths: vec![DEPTH as i64],
            num_heads: vec![4],
            window_sizes: vec![(2, 3)],
            qkv_bias: false,
            patch_norm: false,
            ..stages.clone()
        };
        let second = |config: &SwinConfig| SwinConfig {
            norm_placement: NormPlacement::After,
            cosine_attention: true,
            continuous_bias: Some(ContinuousBiasConfig {
                hidden_dim: 6,
                pretrained_window_sizes: vec![(3, 0); config.depths.len()],
            }),
            ..config.clone()
        };
        let (v2, one_width_v2) = (second(&stages), second(&one_width));
        vec![
            ("Swin", stages),
            ("Swin of one stage", one_width),
            ("Swin V2", v2),
            ("Swin V2 of one stage", one_width_v2),
        ]
    }
}

impl Contract for FrozenConvNeXt {
    fn variants() -> Vec<(&'static str, ConvNeXtConfig)> {
        let config = ConvNeXtConfig {
            patch_size: 2,
            dims: vec![6, 10],
            depths: vec![1, 2],
            kernel_size: 3,
            ..ConvNeXtConfig::default()
        };
        let second = ConvNeXtConfig {
            patch_size: 4,
            stem: ConvNeXtStem::Overlapping { hidden_dim: 5, activation: true },
            layer_scale: false,
            response_norm: true,
            norm: ConvNeXtNorm::Deviation,
            norm_before_pooling: true,
            head_dim: Some(7),
            ..config.clone()
        };
        vec![("ConvNeXt", config), ("ConvNeXt V2", second)]
    }
}
