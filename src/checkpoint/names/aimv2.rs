//! The names of AIMv2: Hugging Face's `Aimv2VisionModel` and the image tower of `Aimv2Model`, and the
//! names in Apple's own files.

use super::{Activation, Family, PositionNames, QKV_BIAS, QKV_WEIGHT, Rule, TEXT, VIT, copy, skip};

pub(super) const HUGGING_FACE: Family = Family {
    name: "Hugging Face AIMv2",
    backbone: VIT,
    separator: '.',
    prefixes: &["vision_model.", ""],
    signatures: &["embeddings.rms_norm.weight"],
    rules: &[HUGGING_FACE_RULES],
    around: AROUND,
    norm_eps: 1e-5,
    activation: Activation::Gelu,
    positions: PositionNames::Class,
};

pub(super) const APPLE: Family = Family {
    name: "Apple AIMv2",
    prefixes: &[""],
    signatures: &["preprocessor.patchifier.proj.weight"],
    rules: &[APPLE_RULES],
    around: &[],
    ..HUGGING_FACE
};

#[rustfmt::skip]
const HUGGING_FACE_RULES: &[Rule] = &[
    copy("embeddings.position_embedding.weight", "pos_embed"),
    copy("embeddings.patch_embed.weight", "patch_embed.proj.weight"),
    copy("embeddings.patch_embed.bias", "patch_embed.proj.bias"),
    copy("embeddings.rms_norm.weight", "patch_embed.norm.weight"),
    copy("encoder.layers.*.rms_norm1.weight", "blocks.*.norm1.weight"),
    copy("encoder.layers.*.attention.{q,k,v}_proj.weight", QKV_WEIGHT),
    copy("encoder.layers.*.attention.{q,k,v}_proj.bias", QKV_BIAS),
    copy("encoder.layers.*.attention.out_proj.weight", "blocks.*.attn.proj.weight"),
    copy("encoder.layers.*.attention.out_proj.bias", "blocks.*.attn.proj.bias"),
    copy("encoder.layers.*.rms_norm2.weight", "blocks.*.norm2.weight"),
    copy("encoder.layers.*.ffn.{gate,up}_proj.weight", "blocks.*.mlp.fc1.weight"),
    copy("encoder.layers.*.ffn.{gate,up}_proj.bias", "blocks.*.mlp.fc1.bias"),
    copy("encoder.layers.*.ffn.down_proj.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layers.*.ffn.down_proj.bias", "blocks.*.mlp.fc2.bias"),
    copy("rms_norm.weight", "norm.weight"),
    copy("head.cls_token", "attn_pool.latent"),
    copy("head.{k,v}_proj.weight", "attn_pool.key_value.weight"),
    copy("head.{k,v}_proj.bias", "attn_pool.key_value.bias"),
    copy("head.output_proj.weight", "attn_pool.proj.weight"),
    copy("head.output_proj.bias", "attn_pool.proj.bias"),
];

#[rustfmt::skip]
const AROUND: &[Rule] = &[
    copy("visual_projection.weight", "projection.weight"),
    skip("text_model.**", TEXT),
    skip("text_projection.**", TEXT),
    skip("logit_scale", TEXT),
];

#[rustfmt::skip]
const APPLE_RULES: &[Rule] = &[
    copy("preprocessor.pos_embed", "pos_embed"),
    copy("preprocessor.patchifier.proj.weight", "patch_embed.proj.weight"),
    copy("preprocessor.patchifier.proj.bias", "patch_embed.proj.bias"),
    copy("preprocessor.patchifier.norm.weight", "patch_embed.norm.weight"),
    copy("trunk.blocks.*.norm_1.weight", "blocks.*.norm1.weight"),
    copy("trunk.blocks.*.attn.qkv.weight", QKV_WEIGHT),
    copy("trunk.blocks.*.attn.qkv.bias", QKV_BIAS),
    copy("trunk.blocks.*.attn.proj.weight", "blocks.*.attn.proj.weight"),
    copy("trunk.blocks.*.attn.proj.bias", "blocks.*.attn.proj.bias"),
    copy("trunk.blocks.*.norm_2.weight", "blocks.*.norm2.weight"),
    copy("trunk.blocks.*.mlp.{fc1,fc3}.weight", "blocks.*.mlp.fc1.weight"),
    copy("trunk.blocks.*.mlp.{fc1,fc3}.bias", "blocks.*.mlp.fc1.bias"),
    copy("trunk.blocks.*.mlp.fc2.weight", "blocks.*.mlp.fc2.weight"),
    copy("trunk.blocks.*.mlp.fc2.bias", "blocks.*.mlp.fc2.bias"),
    copy("trunk.post_trunk_norm.weight", "norm.weight"),
];
