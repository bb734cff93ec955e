//! The classes of timm and transformers under whose names weights can be written.

use super::names::{self, Family};
use super::written::WeightNames;
use crate::backbone::{MlpActivation, NormPlacement, Pooling, Rotary, ViTConfig};
use crate::error::{Error, Result};

/// A class of another library: which ViTs it computes, and how it names their tensors.
#[derive(Debug)]
pub(super) struct WrittenClass {
    pub(super) library: WeightNames,
    pub(super) name: &'static str,
    /// Whether it has a classifier; `None` if it has one where the caller wants one.
    classifies: Option<bool>,
    pub(super) family: &'static Family,
    /// The prefix of the backbone's names.
    pub(super) written_prefix: &'static str,
    /// The patterns of the rules to use where several rules have names for one tensor.
    pub(super) preferred: &'static [&'static str],
    /// The ends of names whose tensors have no more than this many dimensions.
    pub(super) ranks: &'static [(&'static str, usize)],
    /// Tensors of zeros `[1, .., C]` that the class has and the features do not depend on: the name
    /// behind the prefix, and the number of dimensions.
    pub(super) zeros: &'static [(&'static str, usize)],
    /// Whether queries and values have biases in any case.
    pub(super) needs_qkv_bias: bool,
    /// The layers of the classifier; the logits are the mean of theirs.
    pub(super) heads: &'static [&'static str],
    /// Whether the classifier reads the class token beside the mean of the patches.
    pub(super) head_reads_class_and_mean: bool,
    /// The rows of the position table for prefix tokens; `None` if the class has several forms.
    position_rows: Option<i64>,
    /// Whether the class has an attention pooling that its features do not depend on.
    keeps_pool: bool,
    poolings: &'static [Pooling],
    fits: fn(&ViTConfig) -> bool,
}

use Pooling::{
    Attention, Average, AverageThenNorm, ClassAndDistillation, ClassToken, ClassTokenAndAverage,
};

const TIMM: WrittenClass = WrittenClass {
    library: WeightNames::Timm,
    name: "VisionTransformer",
    classifies: None,
    family: &names::TIMM,
    written_prefix: "",
    preferred: &[],
    ranks: &[],
    zeros: &[],
    needs_qkv_bias: false,
    heads: &["head"],
    head_reads_class_and_mean: false,
    position_rows: None,
    keeps_pool: false,
    poolings: &[ClassToken, Average, AverageThenNorm, Attention],
    // timm's patch embedding has no bias in front of a norm.
    fits: |config| is_plain(config) && config.patch_bias != config.pre_norm,
};

const TIMM_EVA: WrittenClass = WrittenClass {
    name: "Eva",
    preferred: &[
        "blocks.*.gamma_1",
        "blocks.*.gamma_2",
        "blocks.*.attn.{q,k?,v}_bias",
        "blocks.*.mlp.{fc1_g,fc1_x}.weight",
        "blocks.*.mlp.{fc1_g,fc1_x}.bias",
    ],
    poolings: &[ClassToken, Average],
    fits: |config| is_dinov3(config) && config.activation == MlpActivation::SwiGlu,
    ..TIMM
};

const HUGGING_FACE: WrittenClass = WrittenClass {
    library: WeightNames::HuggingFace,
    name: "ViTForImageClassification",
    classifies: Some(true),
    family: &names::HF_VIT,
    written_prefix: "vit.",
    needs_qkv_bias: true,
    heads: &["classifier"],
    position_rows: Some(1),
    poolings: &[ClassToken],
    fits: |config| {
        is_hugging_face(config)
            && config.class_token
            && config.num_registers == 0
            && !config.layer_scale
            && config.activation != MlpActivation::SwiGlu
    },
    ..TIMM
};

const DINOV2: WrittenClass = WrittenClass {
    name: "Dinov2ForImageClassification",
    family: &names::HF_DINOV2,
    written_prefix: "dinov2.",
    preferred: &[],
    zeros: &[("embeddings.mask_token", 2)],
    head_reads_class_and_mean: true,
    poolings: &[ClassToken, Average, ClassTokenAndAverage],
    fits: |config| is_dinov2(config) && config.num_registers == 0,
    ..HUGGING_FACE
};

const DINOV2_REGISTERS: WrittenClass = WrittenClass {
    name: "Dinov2WithRegistersForImageClassification",
    written_prefix: "dinov2_with_registers.",
    fits: |config| is_dinov2(config) && config.num_registers > 0,
    ..DINOV2
};

/// The names of the gated MLP of DINOv2's giant.
const DINOV2_GATED: &[&str] = &[
    "encoder.layer.*.mlp.weights_in.weight",
    "encoder.layer.*.mlp.weights_in.bias",
    "encoder.layer.*.mlp.weights_out.weight",
    "encoder.layer.*.mlp.weights_out.bias",
];

const DINOV3: WrittenClass = WrittenClass {
    name: "DINOv3ViTModel",
    classifies: Some(false),
    family: &names::HF_DINOV3,
    written_prefix: "",
    zeros: &[("embeddings.mask_token", 3)],
    position_rows: None,
    poolings: &[ClassToken, Average, ClassTokenAndAverage],
    fits: |config| is_dinov3(config) && config.activation != MlpActivation::SwiGlu,
    ..HUGGING_FACE
};

const CLIP: WrittenClass = WrittenClass {
    name: "CLIPVisionModel",
    classifies: Some(false),
    family: &names::HF_CLIP,
    written_prefix: "vision_model.",
    ranks: &[("position_embedding.weight", 2), ("class_embedding", 1)],
    fits: |config| {
        let plain = ViTConfig { pre_norm: false, patch_bias: true, ..config.clone() };
        (HUGGING_FACE.fits)(&plain) && config.pre_norm && !config.patch_bias && is_square(config)
    },
    ..HUGGING_FACE
};

const SIGLIP: WrittenClass = WrittenClass {
    name: "SiglipVisionModel",
    classifies: Some(false),
    family: &names::HF_SIGLIP,
    written_prefix: "vision_model.",
    ranks: &[("position_embedding.weight", 2)],
    position_rows: Some(0),
    keeps_pool: true,
    poolings: &[Attention, Average],
    fits: |config| {
        is_hugging_face(config)
            && !config.class_token
            && config.num_registers == 0
            && !config.layer_scale
            && has_usual_pool(config)
            && is_square(config)
    },
    ..HUGGING_FACE
};

/// The classes. The first one that computes what the model does is used.
const CLASSES: [WrittenClass; 19] = [
    WrittenClass {
        name: "VisionTransformerDistilled",
        preferred: &["dist_token"],
        heads: &["head", "head_dist"],
        position_rows: Some(2),
        poolings: &[ClassAndDistillation],
        fits: |config| (TIMM.fits)(config) && config.num_registers == 1 && config.class_token,
        ..TIMM
    },
    TIMM,
    TIMM_EVA,
    WrittenClass {
        preferred: &["blocks.*.gamma_1", "blocks.*.gamma_2", "blocks.*.attn.{q,k?,v}_bias"],
        fits: |config| is_dinov3(config) && config.activation != MlpActivation::SwiGlu,
        ..TIMM_EVA
    },
    HUGGING_FACE,
    WrittenClass { name: "ViTModel", classifies: Some(false), written_prefix: "", ..HUGGING_FACE },
    WrittenClass { preferred: DINOV2_GATED, fits: is_gated_dinov2, ..DINOV2 },
    DINOV2,
    WrittenClass {
        preferred: DINOV2_GATED,
        fits: |config| is_dinov2(config) && is_gated(config) && config.num_registers > 0,
        ..DINOV2_REGISTERS
    },
    DINOV2_REGISTERS,
    WrittenClass {
        name: "Dinov2Model",
        classifies: Some(false),
        written_prefix: "",
        preferred: DINOV2_GATED,
        fits: is_gated_dinov2,
        ..DINOV2
    },
    WrittenClass { name: "Dinov2Model", classifies: Some(false), written_prefix: "", ..DINOV2 },
    WrittenClass {
        name: "Dinov2WithRegistersModel",
        classifies: Some(false),
        written_prefix: "",
        preferred: DINOV2_GATED,
        fits: |config| is_dinov2(config) && is_gated(config) && config.num_registers > 0,
        ..DINOV2_REGISTERS
    },
    WrittenClass {
        name: "Dinov2WithRegistersModel",
        classifies: Some(false),
        written_prefix: "",
        ..DINOV2_REGISTERS
    },
    DINOV3,
    WrittenClass {
        family: &names::HF_DINOV3_GATED,
        fits: |config| is_dinov3(config) && config.activation == MlpActivation::SwiGlu,
        ..DINOV3
    },
    CLIP,
    SIGLIP,
    WrittenClass {
        name: "SiglipForImageClassification",
        classifies: Some(true),
        poolings: &[Average],
        ..SIGLIP
    },
];

fn is_gated(config: &ViTConfig) -> bool {
    config.activation == MlpActivation::SwiGlu
}

fn is_gated_dinov2(config: &ViTConfig) -> bool {
    is_dinov2(config) && is_gated(config) && config.num_registers == 0
}

fn is_square(config: &ViTConfig) -> bool {
    config.image_size.0 == config.image_size.1
}

/// Returns whether the layers are those of the plain ViT of timm, which has no rotary positions and
/// no norms inside sub-layers.
fn is_plain(config: &ViTConfig) -> bool {
    config.rotary.is_none()
        && config.pos_embed
        && has_usual_blocks(config)
        && (config.pooling != Attention || has_usual_pool(config))
}

/// Returns whether the attention pooling has the sizes of the blocks, as in timm and transformers.
fn has_usual_pool(config: &ViTConfig) -> bool {
    config.activation != MlpActivation::SwiGlu
        && config.attention_pool.is_none_or(|pool| {
            pool.num_heads.is_none_or(|heads| heads == config.num_heads)
                && pool.mlp_dim == config.mlp_dim
                && !pool.reads_prefix
        })
}

/// Returns whether a class of transformers may have these layers.
fn is_hugging_face(config: &ViTConfig) -> bool {
    is_plain(config) && config.patch_bias && !config.pre_norm && config.final_norm
}

fn is_dinov2(config: &ViTConfig) -> bool {
    let (c, hidden) = (config.embed_dim, config.mlp_dim);
    // The width between the layers follows from C in these classes.
    let width =
        if is_gated(config) { hidden == (4 * c * 2 / 3 + 7) / 8 * 8 } else { hidden % c == 0 };
    // The classes read the table as that of a square grid.
    is_hugging_face(config)
        && config.class_token
        && config.layer_scale
        && is_square(config)
        && width
}

fn is_dinov3(config: &ViTConfig) -> bool {
    config.rotary == Some(Rotary::DINOV3)
        && config.class_token
        && config.num_registers > 0
        && !config.pos_embed
        && config.layer_scale
        && config.patch_bias
        && !config.pre_norm
        && has_usual_blocks(config)
        && config.final_norm
}

/// Returns whether the blocks have only what those of every class have. Every field is named here,
/// so that a new one has to be considered; the fields that are not used are compared elsewhere in
/// this file, or show in the shapes of the weights, or are arguments of the classes.
fn has_usual_blocks(config: &ViTConfig) -> bool {
    let &ViTConfig {
        image_size: _,
        patch_size: _,
        embed_dim: _,
        depth: _,
        num_heads: _,
        mlp_dim: _,
        activation: _,
        class_token: _,
        num_registers: _,
        pos_embed: _,
        pos_embed_prefix: _,
        rotary: _,
        mixed_rotary,
        relative_bias,
        patch_bias: _,
        patch_norm,
        qkv_bias: _,
        proj_bias,
        rms_norm,
        norm_bias,
        pre_norm: _,
        layer_scale: _,
        attention_norm,
        mlp_norm,
        norm_placement,
        final_norm: _,
        pooling: _,
        attention_pool: _,
        norm_eps: _,
        projection: _,
    } = config;
    let has_more = attention_norm || mlp_norm || patch_norm || mixed_rotary || relative_bias;
    let has_less = !proj_bias || !norm_bias;
    !has_more && !has_less && !rms_norm && norm_placement == NormPlacement::Before
}

impl WrittenClass {
    /// Returns the class of the library that computes what a model of `config` does.
    ///
    /// # Errors
    /// [`Error::NotExportable`] if there is none; it names the class that has the layers but
    /// computes something else from them, if there is one.
    pub(super) fn of(
        library: WeightNames,
        config: &ViTConfig,
        with_head: bool,
    ) -> Result<&'static WrittenClass> {
        const ALL: &[WrittenClass] = &CLASSES;
        let fits = |class: &&WrittenClass| class.library == library && (class.fits)(config);
        let classifies = |class: &&WrittenClass| class.classifies.is_none_or(|c| c == with_head);
        let pools = |class: &&WrittenClass| class.poolings.contains(&config.pooling);
        let fitting = || ALL.iter().filter(fits);
        if let Some(class) = fitting().find(|class| classifies(class) && pools(class)) {
            return Ok(class);
        }
        let reason = match (fitting().find(classifies), fitting().next()) {
            (Some(class), _) => {
                format!("{} has no pooling `{}`", class.name, config.pooling.name())
            }
            (None, Some(class)) => {
                let name = class.name;
                format!(
                    "{name} is the class with these layers, and no classifier over its \
                         features is known; without the head it can be exported"
                )
            }
            (None, None) => match library {
                WeightNames::Timm => {
                    "of timm's classes, VisionTransformer and the DINOv3 form of \
                                      Eva are supported, and neither has these layers"
                }
                WeightNames::HuggingFace => {
                    "of the classes of transformers, ViT, DINOv2, DINOv3, \
                                             CLIP and SigLIP are supported, and none has these \
                                             layers"
                }
            }
            .to_owned(),
        };
        let model = "this ViT".to_owned();
        Err(Error::NotExportable { model, form: library.form(), reason })
    }

    /// Returns whether the class has the weight `name` although the features do not depend on it.
    pub(super) fn has_unread(&self, name: &str) -> bool {
        self.keeps_pool && name.starts_with("attn_pool.")
    }

    /// Returns the number of rows of the position table for prefix tokens.
    pub(super) fn position_rows(&self, config: &ViTConfig) -> i64 {
        let (covered, prefix) = (config.pos_embed_prefix, config.num_prefix_tokens());
        self.position_rows.unwrap_or(if covered == prefix { covered } else { 0 })
    }
}
