//! Hugging Face's `Dinov2Model`, with and without registers, and the models around it.

use super::Layout::Same;
use super::{Activation, Family, HEAD, MASK, QKV_BIAS, QKV_WEIGHT, Rule, copy, half, qkv, skip};

pub(super) const FAMILY: Family = Family {
    name: "Hugging Face DINOv2",
    separator: '.',
    prefixes: &["", "dinov2.", "dinov2_with_registers."],
    signatures: &["encoder.layer.0.norm1.weight"],
    rules: RULES,
    around: AROUND,
    norm_eps: 1e-6,
    activation: Activation::Gelu,
    bare_positions: None,
};

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("embeddings.cls_token", "cls_token"),
    copy("embeddings.register_tokens", "reg_token"),
    copy("embeddings.position_embeddings", "pos_embed"),
    copy("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"),
    copy("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
    copy("encoder.layer.*.norm1.weight", "blocks.*.norm1.weight"),
    copy("encoder.layer.*.norm1.bias", "blocks.*.norm1.bias"),
    qkv("encoder.layer.*.attention.attention.query.weight", QKV_WEIGHT, Same, 0),
    qkv("encoder.layer.*.attention.attention.key.weight", QKV_WEIGHT, Same, 1),
    qkv("encoder.layer.*.attention.attention.value.weight", QKV_WEIGHT, Same, 2),
    qkv("encoder.layer.*.attention.attention.query.bias", QKV_BIAS, Same, 0),
    qkv("encoder.layer.*.attention.attention.key.bias", QKV_BIAS, Same, 1),
    qkv("encoder.layer.*.attention.attention.value.bias", QKV_BIAS, Same, 2),
    copy("encoder.layer.*.attention.output.dense.weight", "blocks.*.attn.proj.weight"),
    copy("encoder.layer.*.attention.output.dense.bias", "blocks.*.attn.proj.bias"),
    copy("encoder.layer.*.layer_scale1.lambda1", "blocks.*.ls1.gamma"),
    copy("encoder.layer.*.norm2.weight", "blocks.*.norm2.weight"),
    copy("encoder.layer.*.norm2.bias", "blocks.*.norm2.bias"),
    copy("encoder.layer.*.mlp.fc1.weight", "blocks.*.mlp.fc1.weight"),
    copy("encoder.layer.*.mlp.fc1.bias", "blocks.*.mlp.fc1.bias"),
    copy("encoder.layer.*.mlp.fc2.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layer.*.mlp.fc2.bias", "blocks.*.mlp.fc2.bias"),
    copy("encoder.layer.*.layer_scale2.lambda1", "blocks.*.ls2.gamma"),
    copy("layernorm.weight", "norm.weight"),
    copy("layernorm.bias", "norm.bias"),
    // ViT-g.
    copy("encoder.layer.*.mlp.weights_in.weight", "blocks.*.mlp.fc1.weight"),
    copy("encoder.layer.*.mlp.weights_in.bias", "blocks.*.mlp.fc1.bias"),
    copy("encoder.layer.*.mlp.weights_out.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layer.*.mlp.weights_out.bias", "blocks.*.mlp.fc2.bias"),
    // The modules of transformers 5, whose names `save_pretrained` does not write.
    qkv("encoder.layer.*.attention.q_proj.weight", QKV_WEIGHT, Same, 0),
    qkv("encoder.layer.*.attention.k_proj.weight", QKV_WEIGHT, Same, 1),
    qkv("encoder.layer.*.attention.v_proj.weight", QKV_WEIGHT, Same, 2),
    qkv("encoder.layer.*.attention.q_proj.bias", QKV_BIAS, Same, 0),
    qkv("encoder.layer.*.attention.k_proj.bias", QKV_BIAS, Same, 1),
    qkv("encoder.layer.*.attention.v_proj.bias", QKV_BIAS, Same, 2),
    copy("encoder.layer.*.attention.o_proj.weight", "blocks.*.attn.proj.weight"),
    copy("encoder.layer.*.attention.o_proj.bias", "blocks.*.attn.proj.bias"),
    half("encoder.layer.*.mlp.gate_proj.weight", "blocks.*.mlp.fc1.weight", 0),
    half("encoder.layer.*.mlp.up_proj.weight", "blocks.*.mlp.fc1.weight", 1),
    half("encoder.layer.*.mlp.gate_proj.bias", "blocks.*.mlp.fc1.bias", 0),
    half("encoder.layer.*.mlp.up_proj.bias", "blocks.*.mlp.fc1.bias", 1),
    copy("encoder.layer.*.mlp.down_proj.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layer.*.mlp.down_proj.bias", "blocks.*.mlp.fc2.bias"),
    skip("embeddings.mask_token", MASK),
];

#[rustfmt::skip]
const AROUND: &[Rule] = &[
    skip("classifier.**", HEAD),
];
