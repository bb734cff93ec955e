//! Kinds of ViT that differ in more than their tensors show. Each is recognized by all of its
//! marks, because many kinds share most of their names.

use super::plan::Plan;
use super::vit_bias::FREQUENCIES;
use crate::backbone::{NormPlacement, Pooling, Rotary, RotaryCoordinates, RotaryPairs};
use crate::error::{Error, Result};

/// A kind of ViT: its marks, and the settings that no tensor of its files shows.
#[derive(Debug)]
pub(super) struct ViTKind {
    pub(super) name: &'static str,
    /// The families of names that its files have.
    families: &'static [&'static str],
    /// Tensors of the model that its files have, or parts of them.
    has: &'static [&'static str],
    /// Tensors of the model that its files do not have.
    lacks: &'static [&'static str],
    /// A name in the file itself, without any prefix or with that of the backbone.
    stored: Option<&'static str>,
    /// Whether the biases of queries, keys and values are separate tensors.
    parted_bias: Option<bool>,
    /// Whether the MLP is gated.
    gated: Option<bool>,
    width: Option<i64>,
    /// A part of the name of timm's architecture in the file beside the checkpoint.
    architecture: Option<&'static str>,
    /// The end of the file's name.
    extension: Option<&'static str>,
    /// What such a file is, if it is refused.
    refused: Option<&'static str>,
    /// The rotary position embedding.
    pub(super) rotary: Option<Rotary>,
    pub(super) norm_eps: Option<f64>,
    pub(super) pooling: Option<Pooling>,
    /// The poolings that models of this kind have, if there are several.
    pub(super) poolings: Option<&'static str>,
    /// Width of a head.
    pub(super) head_dim: Option<i64>,
    /// Heads of the attention pooling; those of the blocks if `None`.
    pub(super) pool_heads: Option<i64>,
    /// Where the norms of the blocks are.
    pub(super) norm_placement: NormPlacement,
    /// Whether there is a norm behind the blocks or the pooling.
    pub(super) final_norm: bool,
    /// Whether attention pooling reads prefix tokens.
    pub(super) pool_prefix: bool,
    /// Side of the images in pixels, for a kind without a position table.
    pub(super) side: i64,
}

const ANY: ViTKind = ViTKind {
    name: "",
    families: TIMM,
    has: &[],
    lacks: &[],
    stored: None,
    parted_bias: None,
    gated: None,
    width: None,
    architecture: None,
    extension: None,
    refused: None,
    rotary: None,
    norm_eps: None,
    pooling: None,
    poolings: None,
    head_dim: None,
    pool_heads: None,
    pool_prefix: false,
    norm_placement: NormPlacement::Before,
    final_norm: true,
    side: 224,
};

const TIMM: &[&str] = &["timm"];
const GAMMA: &str = "blocks.0.ls1.gamma";

/// A rotary embedding on row and column numbers, as timm's `cat` type computes it.
const fn indexed(
    base: f64,
    offset: f64,
    reference: Option<(i64, i64)>,
    columns_first: bool,
) -> Option<Rotary> {
    let coordinates = RotaryCoordinates::Index { offset, reference, columns_first };
    Some(Rotary { base, pairs: RotaryPairs::Neighbours, coordinates })
}

const DINOV3: ViTKind = ViTKind {
    name: "DINOv3",
    families: &["Meta DINOv3", "Hugging Face DINOv3"],
    has: &["cls_token", "reg_token", GAMMA],
    lacks: &["pos_embed"],
    rotary: Some(Rotary::DINOV3),
    norm_eps: Some(1e-5),
    pooling: Some(Pooling::ClassToken),
    head_dim: Some(64),
    ..ANY
};

/// timm's own reading of DINOv3, with another pooling and image size.
const TIMM_DINOV3: ViTKind = ViTKind {
    families: TIMM,
    lacks: &["pos_embed", "fc_norm.weight"],
    pooling: Some(Pooling::Average),
    side: 256,
    ..DINOV3
};

/// The image tower of Perception Encoder for one width. `side` is that of the grid in training.
const fn perception(width: i64, side: i64, offset: f64, lacks: &'static [&'static str]) -> ViTKind {
    ViTKind {
        name: "Perception Encoder",
        has: &["attn_pool.latent", "norm_pre.weight", "pos_embed"],
        lacks,
        gated: Some(false),
        width: Some(width),
        rotary: indexed(1e4, offset, Some((side, side)), true),
        norm_eps: Some(1e-5),
        pool_heads: Some(8),
        pool_prefix: true,
        ..ANY
    }
}

/// The towers of Perception Encoder for dense features and for language, which have no last norm.
const fn dense_perception(
    has: &'static [&'static str],
    lacks: &'static [&'static str],
    offset: f64,
) -> ViTKind {
    ViTKind {
        name: "Perception Encoder without a last norm",
        has,
        lacks,
        gated: Some(false),
        rotary: indexed(1e4, offset, Some((32, 32)), true),
        norm_eps: Some(1e-5),
        pooling: Some(Pooling::Average),
        final_norm: false,
        ..ANY
    }
}

const ROPE_WITH_TABLE: ViTKind = ViTKind {
    name: "RoPE-ViT with a table",
    has: &["cls_token", "pos_embed", GAMMA],
    lacks: &["reg_token"],
    stored: Some("blocks.0.gamma_1"),
    parted_bias: Some(false),
    ..ANY
};

const SEPARATE_HEADS: ViTKind = ViTKind {
    name: "DeiT with a distillation token",
    stored: Some("dist_token"),
    pooling: Some(Pooling::ClassAndDistillation),
    ..ANY
};

/// The kinds. The first one whose marks a file has is used.
const KINDS: &[ViTKind] = &[
    ViTKind { name: "RoPE-ViT with learned frequencies", has: &[FREQUENCIES], ..ANY },
    ViTKind {
        name: "AIMv2",
        families: &["timm", "Hugging Face AIMv2", "Apple AIMv2"],
        has: &["patch_embed.norm.weight", "pos_embed"],
        lacks: &["cls_token", "blocks.0.norm1.bias"],
        gated: Some(true),
        norm_eps: Some(1e-5),
        head_dim: Some(128),
        ..ANY
    },
    ViTKind {
        name: "AIMv2 for native resolutions",
        families: &["Hugging Face AIMv2", "Apple AIMv2"],
        lacks: &["pos_embed"],
        refused: Some("AIMv2 for native resolutions, whose sinusoidal positions are not supported"),
        ..ANY
    },
    ViTKind {
        name: "C-RADIO",
        architecture: Some("_radio_"),
        lacks: &["norm.weight", "fc_norm.weight"],
        final_norm: false,
        ..ANY
    },
    ViTKind {
        name: "InternViT",
        architecture: Some("vit_intern300m_"),
        lacks: &["norm.weight", "fc_norm.weight"],
        final_norm: false,
        ..ANY
    },
    ViTKind { width: Some(4096), head_dim: Some(128), ..DINOV3 },
    ViTKind { width: Some(4096), head_dim: Some(128), ..TIMM_DINOV3 },
    DINOV3,
    ViTKind {
        name: "LingBot-Vision g",
        width: Some(1536),
        gated: Some(true),
        pooling: Some(Pooling::ClassToken),
        side: 512,
        ..TIMM_DINOV3
    },
    // LingBot-Vision has the class token as its usual feature, under the same names and biases.
    ViTKind { stored: Some("blocks.0.mlp.fc1_g.weight"), ..TIMM_DINOV3 },
    ViTKind {
        parted_bias: Some(true),
        poolings: Some("average (DINOv3 and EUPE in timm), class_token (LingBot-Vision)"),
        ..TIMM_DINOV3
    },
    TIMM_DINOV3,
    ViTKind {
        name: "timm's rope_reg_gap",
        has: &["reg_token", "fc_norm.weight", GAMMA],
        lacks: &["pos_embed", "cls_token"],
        rotary: indexed(1e4, 0.0, Some((16, 16)), false),
        side: 256,
        ..ANY
    },
    ViTKind {
        name: "RoPE-ViT",
        has: &["cls_token", "norm.weight", GAMMA],
        lacks: &["pos_embed", "reg_token"],
        parted_bias: Some(false),
        rotary: indexed(100.0, 0.0, None, true),
        ..ANY
    },
    ViTKind {
        name: "EVA-02",
        has: &["cls_token", "pos_embed"],
        lacks: &[GAMMA],
        parted_bias: Some(true),
        gated: Some(true),
        rotary: indexed(1e4, 0.0, Some((16, 16)), false),
        ..ANY
    },
    ViTKind {
        name: "EVA-02 E",
        has: &["cls_token", "pos_embed"],
        parted_bias: Some(true),
        width: Some(1792),
        norm_placement: NormPlacement::After,
        ..ANY
    },
    ViTKind {
        name: "BEiT-3",
        has: &["blocks.0.attn.norm.weight", "blocks.0.mlp.norm.weight", "pos_embed"],
        gated: Some(false),
        parted_bias: Some(false),
        norm_eps: Some(1e-5),
        ..ANY
    },
    perception(192, 24, 1.0, &[]),
    perception(384, 24, 1.0, &[]),
    perception(768, 14, 1.0, &[]),
    perception(1024, 24, 1.0, &[]),
    perception(1536, 32, 0.0, &["cls_token"]),
    dense_perception(
        &["norm_pre.weight", "pos_embed", "cls_token"],
        &["norm.weight", "fc_norm.weight", "attn_pool.latent", "patch_embed.proj.bias"],
        1.0,
    ),
    dense_perception(
        &["norm_pre.weight", "pos_embed", GAMMA],
        &["norm.weight", "fc_norm.weight", "attn_pool.latent", "cls_token"],
        0.0,
    ),
    ViTKind {
        name: "an unknown Perception Encoder",
        has: &["attn_pool.latent", "norm_pre.weight", "pos_embed"],
        refused: Some(
            "a Perception Encoder of an unknown width; no tensor shows the grid of its rotary \
             positions",
        ),
        ..ANY
    },
    ViTKind {
        architecture: Some("_rope_ape_"),
        rotary: indexed(100.0, 0.0, None, true),
        ..ROPE_WITH_TABLE
    },
    ViTKind {
        extension: Some("safetensors"),
        refused: Some(
            "timm's vit_*_rope_ape_*, whose rotary positions no tensor shows, or Facebook's \
             DeiT-III, which has the same names; Facebook's file is read with the extension .pth",
        ),
        ..ROPE_WITH_TABLE
    },
    ViTKind {
        name: "timm's test_vit3",
        has: &["attn_pool.latent", "reg_token", GAMMA],
        lacks: &["cls_token"],
        width: Some(96),
        pool_prefix: true,
        ..ANY
    },
    SEPARATE_HEADS,
    ViTKind {
        stored: Some("cls_classifier.weight"),
        families: &["Hugging Face ViT"],
        ..SEPARATE_HEADS
    },
    // The classifier reads the mean although the file has an attention pooling.
    ViTKind {
        name: "SiglipForImageClassification",
        families: &["Hugging Face SigLIP"],
        stored: Some("classifier.weight"),
        pooling: Some(Pooling::Average),
        ..ANY
    },
];

impl ViTKind {
    /// Returns the kind of the model in a file whose MLP is `gated`, or `None` if its tensors show
    /// everything.
    ///
    /// # Errors
    /// [`Error::UnknownFormat`] if models of this kind are not supported; the errors of reading the
    /// file beside the checkpoint.
    pub(super) fn of(plan: &Plan, width: i64, gated: bool) -> Result<Option<&'static ViTKind>> {
        let architecture = plan.config()?.and_then(|file| file.json["architecture"].as_str());
        let fits = |kind: &&ViTKind| {
            kind.fits(plan, width, gated)
                && kind
                    .architecture
                    .is_none_or(|part| architecture.is_some_and(|a| a.contains(part)))
        };
        let Some(kind) = KINDS.iter().find(fits) else {
            return Ok(None);
        };
        match kind.refused {
            Some(what) => {
                let file = plan.file.path().to_path_buf();
                Err(Error::UnknownFormat {
                    file,
                    reason: format!("the tensors are those of {what}"),
                })
            }
            None => Ok(Some(kind)),
        }
    }

    fn fits(&self, plan: &Plan, width: i64, gated: bool) -> bool {
        let is_parted = || plan.is_fused("blocks.0.attn.qkv.bias");
        let ends = |end: &str| plan.file.path().extension().is_some_and(|found| found == end);
        self.families.contains(&plan.family.name)
            && self.has.iter().all(|name| plan.has(name))
            && !self.lacks.iter().any(|name| plan.has(name))
            && self.stored.is_none_or(|name| plan.stores(name))
            && self.parted_bias.is_none_or(|parted| parted == is_parted())
            && self.gated.is_none_or(|wanted| wanted == gated)
            && self.width.is_none_or(|wanted| wanted == width)
            && self.extension.is_none_or(ends)
    }
}
