//! The names of Hugging Face's `CLIPVisionModel` and `CLIPTextModel`, with and without projection,
//! and of the whole `CLIPModel`. The files spell `pre_layrnorm` this way.

use super::{
    Activation, CLIP_TEXT, Family, HEAD, IMAGE, INDICES, PositionNames, QKV_BIAS, QKV_WEIGHT, Rule,
    TEXT, VIT, copy, skip,
};

pub(in crate::checkpoint) const FAMILY: Family = Family {
    name: "Hugging Face CLIP",
    backbone: VIT,
    separator: '.',
    prefixes: &["vision_model.", ""],
    signatures: &["embeddings.class_embedding"],
    rules: &[RULES, BLOCKS],
    around: AROUND,
    norm_eps: 1e-5,
    activation: Activation::QuickGelu,
    positions: PositionNames::Class,
};

pub(super) const TEXT_FAMILY: Family = Family {
    name: "Hugging Face CLIP's text tower",
    backbone: CLIP_TEXT,
    separator: '.',
    prefixes: &["text_model.", ""],
    signatures: &["embeddings.token_embedding.weight"],
    rules: &[TEXT_RULES, BLOCKS],
    around: AROUND_TEXT,
    norm_eps: 1e-5,
    activation: Activation::QuickGelu,
    positions: PositionNames::None,
};

/// The blocks of both towers.
#[rustfmt::skip]
pub(super) const BLOCKS: &[Rule] = &[
    copy("encoder.layers.*.layer_norm1.weight", "blocks.*.norm1.weight"),
    copy("encoder.layers.*.layer_norm1.bias", "blocks.*.norm1.bias"),
    copy("encoder.layers.*.self_attn.{q,k,v}_proj.weight", QKV_WEIGHT),
    copy("encoder.layers.*.self_attn.{q,k,v}_proj.bias", QKV_BIAS),
    copy("encoder.layers.*.self_attn.out_proj.weight", "blocks.*.attn.proj.weight"),
    copy("encoder.layers.*.self_attn.out_proj.bias", "blocks.*.attn.proj.bias"),
    copy("encoder.layers.*.layer_norm2.weight", "blocks.*.norm2.weight"),
    copy("encoder.layers.*.layer_norm2.bias", "blocks.*.norm2.bias"),
    copy("encoder.layers.*.mlp.fc1.weight", "blocks.*.mlp.fc1.weight"),
    copy("encoder.layers.*.mlp.fc1.bias", "blocks.*.mlp.fc1.bias"),
    copy("encoder.layers.*.mlp.fc2.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layers.*.mlp.fc2.bias", "blocks.*.mlp.fc2.bias"),
];

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("embeddings.class_embedding", "cls_token"),
    copy("embeddings.position_embedding.weight", "pos_embed"),
    copy("embeddings.patch_embedding.weight", "patch_embed.proj.weight"),
    copy("embeddings.patch_embedding.bias", "patch_embed.proj.bias"),
    copy("pre_layrnorm.weight", "norm_pre.weight"),
    copy("pre_layrnorm.bias", "norm_pre.bias"),
    copy("post_layernorm.weight", "norm.weight"),
    copy("post_layernorm.bias", "norm.bias"),
    skip("embeddings.position_ids", INDICES),
];

#[rustfmt::skip]
const AROUND: &[Rule] = &[
    copy("visual_projection.weight", "projection.weight"),
    // `CLIPForImageClassification`.
    skip("classifier.**", HEAD),
    skip("text_model.**", TEXT),
    skip("text_projection.**", TEXT),
    skip("logit_scale", TEXT),
];

#[rustfmt::skip]
const TEXT_RULES: &[Rule] = &[
    copy("embeddings.token_embedding.weight", "token_embed"),
    copy("embeddings.position_embedding.weight", "pos_embed"),
    copy("final_layer_norm.weight", "norm.weight"),
    copy("final_layer_norm.bias", "norm.bias"),
    skip("embeddings.position_ids", INDICES),
];

#[rustfmt::skip]
const AROUND_TEXT: &[Rule] = &[
    copy("text_projection.weight", "projection.weight"),
    copy("logit_scale", "logit_scale"),
    skip("vision_model.**", IMAGE),
    skip("visual_projection.**", IMAGE),
];
