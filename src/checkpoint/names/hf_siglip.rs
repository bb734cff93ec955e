//! The names of Hugging Face's `SiglipVisionModel` and of the image tower in `SiglipModel`.

use super::{
    Activation, Family, HEAD, INDICES, PositionNames, Rule, TEXT, VIT, copy, hf_clip, skip,
};

pub(in crate::checkpoint) const FAMILY: Family = Family {
    name: "Hugging Face SigLIP",
    backbone: VIT,
    separator: '.',
    prefixes: &["vision_model.", ""],
    // CLIP's tower, which is tried before, has the same name and a class token.
    signatures: &["embeddings.patch_embedding.weight"],
    rules: &[RULES, hf_clip::BLOCKS],
    around: AROUND,
    norm_eps: 1e-6,
    activation: Activation::GeluTanh,
    positions: PositionNames::Class,
};

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("embeddings.position_embedding.weight", "pos_embed"),
    copy("embeddings.patch_embedding.weight", "patch_embed.proj.weight"),
    copy("embeddings.patch_embedding.bias", "patch_embed.proj.bias"),
    copy("post_layernorm.weight", "norm.weight"),
    copy("post_layernorm.bias", "norm.bias"),
    copy("head.probe", "attn_pool.latent"),
    copy("head.attention.in_proj_weight", "attn_pool.qkv.weight"),
    copy("head.attention.in_proj_bias", "attn_pool.qkv.bias"),
    copy("head.attention.out_proj.weight", "attn_pool.proj.weight"),
    copy("head.attention.out_proj.bias", "attn_pool.proj.bias"),
    copy("head.layernorm.weight", "attn_pool.norm.weight"),
    copy("head.layernorm.bias", "attn_pool.norm.bias"),
    copy("head.mlp.fc1.weight", "attn_pool.mlp.fc1.weight"),
    copy("head.mlp.fc1.bias", "attn_pool.mlp.fc1.bias"),
    copy("head.mlp.fc2.weight", "attn_pool.mlp.fc2.weight"),
    copy("head.mlp.fc2.bias", "attn_pool.mlp.fc2.bias"),
    skip("embeddings.position_ids", INDICES),
];

#[rustfmt::skip]
const AROUND: &[Rule] = &[
    skip("text_model.**", TEXT),
    skip("logit_scale", TEXT),
    skip("logit_bias", TEXT),
    skip("classifier.**", HEAD),
];
