//! Hugging Face's `ViTModel` and the models around it.

use super::Layout::Same;
use super::{Activation, Family, HEAD, MASK, POOLER, QKV_BIAS, QKV_WEIGHT, Rule, copy, qkv, skip};

pub(super) const FAMILY: Family = Family {
    name: "Hugging Face ViT",
    separator: '.',
    prefixes: &["", "vit."],
    signatures: &["encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight"],
    rules: RULES,
    around: AROUND,
    norm_eps: 1e-12,
    activation: Activation::Gelu,
    bare_positions: None,
};

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("embeddings.cls_token", "cls_token"),
    copy("embeddings.position_embeddings", "pos_embed"),
    copy("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"),
    copy("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
    copy("encoder.layer.*.layernorm_before.weight", "blocks.*.norm1.weight"),
    copy("encoder.layer.*.layernorm_before.bias", "blocks.*.norm1.bias"),
    qkv("encoder.layer.*.attention.attention.query.weight", QKV_WEIGHT, Same, 0),
    qkv("encoder.layer.*.attention.attention.key.weight", QKV_WEIGHT, Same, 1),
    qkv("encoder.layer.*.attention.attention.value.weight", QKV_WEIGHT, Same, 2),
    qkv("encoder.layer.*.attention.attention.query.bias", QKV_BIAS, Same, 0),
    qkv("encoder.layer.*.attention.attention.key.bias", QKV_BIAS, Same, 1),
    qkv("encoder.layer.*.attention.attention.value.bias", QKV_BIAS, Same, 2),
    copy("encoder.layer.*.attention.output.dense.weight", "blocks.*.attn.proj.weight"),
    copy("encoder.layer.*.attention.output.dense.bias", "blocks.*.attn.proj.bias"),
    copy("encoder.layer.*.layernorm_after.weight", "blocks.*.norm2.weight"),
    copy("encoder.layer.*.layernorm_after.bias", "blocks.*.norm2.bias"),
    copy("encoder.layer.*.intermediate.dense.weight", "blocks.*.mlp.fc1.weight"),
    copy("encoder.layer.*.intermediate.dense.bias", "blocks.*.mlp.fc1.bias"),
    copy("encoder.layer.*.output.dense.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layer.*.output.dense.bias", "blocks.*.mlp.fc2.bias"),
    copy("layernorm.weight", "norm.weight"),
    copy("layernorm.bias", "norm.bias"),
    // The modules of transformers 5, whose names `save_pretrained` does not write.
    copy("layers.*.layernorm_before.weight", "blocks.*.norm1.weight"),
    copy("layers.*.layernorm_before.bias", "blocks.*.norm1.bias"),
    qkv("layers.*.attention.q_proj.weight", QKV_WEIGHT, Same, 0),
    qkv("layers.*.attention.k_proj.weight", QKV_WEIGHT, Same, 1),
    qkv("layers.*.attention.v_proj.weight", QKV_WEIGHT, Same, 2),
    qkv("layers.*.attention.q_proj.bias", QKV_BIAS, Same, 0),
    qkv("layers.*.attention.k_proj.bias", QKV_BIAS, Same, 1),
    qkv("layers.*.attention.v_proj.bias", QKV_BIAS, Same, 2),
    copy("layers.*.attention.o_proj.weight", "blocks.*.attn.proj.weight"),
    copy("layers.*.attention.o_proj.bias", "blocks.*.attn.proj.bias"),
    copy("layers.*.layernorm_after.weight", "blocks.*.norm2.weight"),
    copy("layers.*.layernorm_after.bias", "blocks.*.norm2.bias"),
    copy("layers.*.mlp.fc1.weight", "blocks.*.mlp.fc1.weight"),
    copy("layers.*.mlp.fc1.bias", "blocks.*.mlp.fc1.bias"),
    copy("layers.*.mlp.fc2.weight", "blocks.*.mlp.fc2.weight"),
    copy("layers.*.mlp.fc2.bias", "blocks.*.mlp.fc2.bias"),
    skip("embeddings.mask_token", MASK),
    skip("pooler.**", POOLER),
];

#[rustfmt::skip]
const AROUND: &[Rule] = &[
    skip("classifier.**", HEAD),
    skip("decoder.**", MASK),
];
