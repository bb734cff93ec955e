//! The names of Hugging Face's `ViTModel` and of its task models.

use super::{
    Activation, Family, HEAD, MASK, POOLER, PositionNames, QKV_BIAS, QKV_WEIGHT, Rule, VIT, copy,
    skip,
};

pub(in crate::checkpoint) const FAMILY: Family = Family {
    name: "Hugging Face ViT",
    backbone: VIT,
    separator: '.',
    prefixes: &["", "vit.", "deit."],
    signatures: &["encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight"],
    rules: &[BIASES, SHARED, RULES],
    around: AROUND,
    norm_eps: 1e-12,
    activation: Activation::Gelu,
    // The tables of DeiT have a row for the distillation token.
    positions: PositionNames::AllPrefix,
};

/// The biases of queries, keys and values.
#[rustfmt::skip]
const BIASES: &[Rule] = &[
    copy("encoder.layer.*.attention.attention.{query,key,value}.bias", QKV_BIAS),
    copy("layers.*.attention.{q,k,v}_proj.bias", QKV_BIAS),
];

/// The names that `BeitModel` has, too.
#[rustfmt::skip]
pub(super) const SHARED: &[Rule] = &[
    copy("embeddings.cls_token", "cls_token"),
    copy("embeddings.position_embeddings", "pos_embed"),
    copy("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"),
    copy("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
    copy("encoder.layer.*.layernorm_before.weight", "blocks.*.norm1.weight"),
    copy("encoder.layer.*.layernorm_before.bias", "blocks.*.norm1.bias"),
    copy("encoder.layer.*.attention.attention.{query,key,value}.weight", QKV_WEIGHT),
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
    // Module names of transformers 5, which `save_pretrained` does not write.
    copy("layers.*.layernorm_before.weight", "blocks.*.norm1.weight"),
    copy("layers.*.layernorm_before.bias", "blocks.*.norm1.bias"),
    copy("layers.*.attention.{q,k,v}_proj.weight", QKV_WEIGHT),
    copy("layers.*.attention.o_proj.weight", "blocks.*.attn.proj.weight"),
    copy("layers.*.attention.o_proj.bias", "blocks.*.attn.proj.bias"),
    copy("layers.*.layernorm_after.weight", "blocks.*.norm2.weight"),
    copy("layers.*.layernorm_after.bias", "blocks.*.norm2.bias"),
    copy("layers.*.mlp.fc1.weight", "blocks.*.mlp.fc1.weight"),
    copy("layers.*.mlp.fc1.bias", "blocks.*.mlp.fc1.bias"),
    copy("layers.*.mlp.fc2.weight", "blocks.*.mlp.fc2.weight"),
    copy("layers.*.mlp.fc2.bias", "blocks.*.mlp.fc2.bias"),
    skip("embeddings.mask_token", MASK),
];

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("embeddings.distillation_token", "reg_token"),
    skip("pooler.**", POOLER),
];

#[rustfmt::skip]
const AROUND: &[Rule] = &[
    skip("classifier.**", HEAD),
    skip("cls_classifier.**", HEAD),
    skip("distillation_classifier.**", HEAD),
    skip("decoder.**", MASK),
];
