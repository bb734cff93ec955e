//! The names of DINOv3: those of Meta's repository, and those of Hugging Face's `DINOv3ViTModel`,
//! with plain and with gated MLPs.

use super::{
    Activation, Family, HEAD, Layout, MASK, PositionNames, QKV_BIAS, QKV_WEIGHT, Rule, VIT, copy,
    skip, take, timm,
};

pub(super) const META: Family = Family {
    name: "Meta DINOv3",
    backbone: VIT,
    separator: '.',
    prefixes: &[""],
    signatures: &["storage_tokens"],
    rules: &[timm::SHARED, META_RULES],
    around: &[],
    norm_eps: 1e-5,
    activation: Activation::Gelu,
    positions: PositionNames::None,
};

pub(in crate::checkpoint) const HUGGING_FACE: Family = Family {
    name: "Hugging Face DINOv3",
    prefixes: &["", "dinov3_vit."],
    signatures: &["layer.0.mlp.up_proj.weight", "model.layer.0.mlp.up_proj.weight"],
    rules: &[RULES, BLOCKS, BLOCKS_5, MLP],
    around: AROUND,
    ..META
};

pub(in crate::checkpoint) const HUGGING_FACE_GATED: Family = Family {
    signatures: &["layer.0.mlp.gate_proj.weight", "model.layer.0.mlp.gate_proj.weight"],
    rules: &[RULES, BLOCKS, BLOCKS_5, GATED_MLP],
    ..HUGGING_FACE
};

const PERIODS: &str = "the periods of the rotary embedding, which are computed in f32";
const KEY_MASK: &str = "the mask of the keys' bias, which is always zero";
const LOCAL: &str = "a norm of the pretraining";

#[rustfmt::skip]
const META_RULES: &[Rule] = &[
    copy("cls_token",                 "cls_token"),
    copy("storage_tokens",            "reg_token"),
    copy("blocks.*.attn.qkv.weight",  QKV_WEIGHT),
    take("blocks.*.attn.qkv.bias",    QKV_BIAS, Layout::NoKeys),
    skip("blocks.*.attn.qkv.bias_mask", KEY_MASK),
    copy("blocks.*.mlp.{w1,w2}.weight", "blocks.*.mlp.fc1.weight"),
    copy("blocks.*.mlp.{w1,w2}.bias", "blocks.*.mlp.fc1.bias"),
    copy("blocks.*.mlp.w3.weight",    "blocks.*.mlp.fc2.weight"),
    copy("blocks.*.mlp.w3.bias",      "blocks.*.mlp.fc2.bias"),
    skip("rope_embed.periods",        PERIODS),
    skip("mask_token",                MASK),
    skip("local_cls_norm.**",         LOCAL),
    skip("projectors.**",             LOCAL),
    skip("head.**",                   HEAD),
];

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("embeddings.cls_token", "cls_token"),
    copy("embeddings.register_tokens", "reg_token"),
    copy("embeddings.patch_embeddings.weight", "patch_embed.proj.weight"),
    copy("embeddings.patch_embeddings.bias", "patch_embed.proj.bias"),
    skip("embeddings.mask_token", MASK),
    copy("norm.weight", "norm.weight"),
    copy("norm.bias", "norm.bias"),
];

/// The blocks of transformers 4, and of the files that transformers 5 writes.
#[rustfmt::skip]
const BLOCKS: &[Rule] = &[
    copy("layer.*.norm1.weight", "blocks.*.norm1.weight"),
    copy("layer.*.norm1.bias", "blocks.*.norm1.bias"),
    copy("layer.*.attention.{q,k,v}_proj.weight", QKV_WEIGHT),
    copy("layer.*.attention.{q,k?,v}_proj.bias", QKV_BIAS),
    copy("layer.*.attention.o_proj.weight", "blocks.*.attn.proj.weight"),
    copy("layer.*.attention.o_proj.bias", "blocks.*.attn.proj.bias"),
    copy("layer.*.layer_scale1.lambda1", "blocks.*.ls1.gamma"),
    copy("layer.*.norm2.weight", "blocks.*.norm2.weight"),
    copy("layer.*.norm2.bias", "blocks.*.norm2.bias"),
    copy("layer.*.layer_scale2.lambda1", "blocks.*.ls2.gamma"),
];

/// The blocks in the memory of transformers 5.
#[rustfmt::skip]
const BLOCKS_5: &[Rule] = &[
    copy("model.layer.*.norm1.weight", "blocks.*.norm1.weight"),
    copy("model.layer.*.norm1.bias", "blocks.*.norm1.bias"),
    copy("model.layer.*.attention.{q,k,v}_proj.weight", QKV_WEIGHT),
    copy("model.layer.*.attention.{q,k?,v}_proj.bias", QKV_BIAS),
    copy("model.layer.*.attention.o_proj.weight", "blocks.*.attn.proj.weight"),
    copy("model.layer.*.attention.o_proj.bias", "blocks.*.attn.proj.bias"),
    copy("model.layer.*.layer_scale1.lambda1", "blocks.*.ls1.gamma"),
    copy("model.layer.*.norm2.weight", "blocks.*.norm2.weight"),
    copy("model.layer.*.norm2.bias", "blocks.*.norm2.bias"),
    copy("model.layer.*.layer_scale2.lambda1", "blocks.*.ls2.gamma"),
];

#[rustfmt::skip]
const MLP: &[Rule] = &[
    copy("layer.*.mlp.up_proj.weight", "blocks.*.mlp.fc1.weight"),
    copy("layer.*.mlp.up_proj.bias", "blocks.*.mlp.fc1.bias"),
    copy("layer.*.mlp.down_proj.weight", "blocks.*.mlp.fc2.weight"),
    copy("layer.*.mlp.down_proj.bias", "blocks.*.mlp.fc2.bias"),
    copy("model.layer.*.mlp.up_proj.weight", "blocks.*.mlp.fc1.weight"),
    copy("model.layer.*.mlp.up_proj.bias", "blocks.*.mlp.fc1.bias"),
    copy("model.layer.*.mlp.down_proj.weight", "blocks.*.mlp.fc2.weight"),
    copy("model.layer.*.mlp.down_proj.bias", "blocks.*.mlp.fc2.bias"),
];

#[rustfmt::skip]
const GATED_MLP: &[Rule] = &[
    copy("layer.*.mlp.{gate,up}_proj.weight", "blocks.*.mlp.fc1.weight"),
    copy("layer.*.mlp.{gate,up}_proj.bias", "blocks.*.mlp.fc1.bias"),
    copy("layer.*.mlp.down_proj.weight", "blocks.*.mlp.fc2.weight"),
    copy("layer.*.mlp.down_proj.bias", "blocks.*.mlp.fc2.bias"),
    copy("model.layer.*.mlp.{gate,up}_proj.weight", "blocks.*.mlp.fc1.weight"),
    copy("model.layer.*.mlp.{gate,up}_proj.bias", "blocks.*.mlp.fc1.bias"),
    copy("model.layer.*.mlp.down_proj.weight", "blocks.*.mlp.fc2.weight"),
    copy("model.layer.*.mlp.down_proj.bias", "blocks.*.mlp.fc2.bias"),
];

#[rustfmt::skip]
const AROUND: &[Rule] = &[
    skip("classifier.**", HEAD),
];
