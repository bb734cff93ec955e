//! The names of Hugging Face's `Dinov2Model`, with and without registers, and of its task models.

use super::{
    Activation, Family, HEAD, MASK, PositionNames, QKV_BIAS, QKV_WEIGHT, Rule, VIT, copy, skip,
};

pub(in crate::checkpoint) const FAMILY: Family = Family {
    name: "Hugging Face DINOv2",
    backbone: VIT,
    separator: '.',
    prefixes: &["", "dinov2.", "dinov2_with_registers."],
    signatures: &["encoder.layer.0.norm1.weight"],
    rules: &[RULES],
    around: AROUND,
    norm_eps: 1e-6,
    activation: Activation::Gelu,
    positions: PositionNames::Class,
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
    copy("encoder.layer.*.attention.attention.{query,key,value}.weight", QKV_WEIGHT),
    copy("encoder.layer.*.attention.attention.{query,key,value}.bias", QKV_BIAS),
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
    // The MLP of ViT-g.
    copy("encoder.layer.*.mlp.weights_in.weight", "blocks.*.mlp.fc1.weight"),
    copy("encoder.layer.*.mlp.weights_in.bias", "blocks.*.mlp.fc1.bias"),
    copy("encoder.layer.*.mlp.weights_out.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layer.*.mlp.weights_out.bias", "blocks.*.mlp.fc2.bias"),
    // Module names of transformers 5, which `save_pretrained` does not write.
    copy("encoder.layer.*.attention.{q,k,v}_proj.weight", QKV_WEIGHT),
    copy("encoder.layer.*.attention.{q,k,v}_proj.bias", QKV_BIAS),
    copy("encoder.layer.*.attention.o_proj.weight", "blocks.*.attn.proj.weight"),
    copy("encoder.layer.*.attention.o_proj.bias", "blocks.*.attn.proj.bias"),
    copy("encoder.layer.*.mlp.{gate,up}_proj.weight", "blocks.*.mlp.fc1.weight"),
    copy("encoder.layer.*.mlp.{gate,up}_proj.bias", "blocks.*.mlp.fc1.bias"),
    copy("encoder.layer.*.mlp.down_proj.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layer.*.mlp.down_proj.bias", "blocks.*.mlp.fc2.bias"),
    skip("embeddings.mask_token", MASK),
];

#[rustfmt::skip]
const AROUND: &[Rule] = &[
    skip("classifier.**", HEAD),
];
