//! The names of timm (ViT, DeiT, CLIP, SigLIP, DINOv2, DINOv3, EVA, BEiT, AIMv2), and the names of
//! repositories that differ in a few tensors: DINOv2, DeiT-III, MAE, BEiT.

use super::{
    Activation, BIAS_TABLE, DECODER, Family, HEAD, INDICES, MASK, PositionNames, QKV_BIAS,
    QKV_WEIGHT, Rule, SHARED_BIAS_TABLE, TEXT, VIT, copy, skip,
};

pub(in crate::checkpoint) const FAMILY: Family = Family {
    name: "timm",
    backbone: VIT,
    separator: '.',
    prefixes: &["", "visual.trunk."],
    signatures: &["blocks.0.norm1.weight"],
    rules: &[SHARED, RULES],
    around: AROUND,
    norm_eps: 1e-6,
    activation: Activation::Gelu,
    positions: PositionNames::UsuallyNoneBeside("reg_token"),
};

/// The names that Meta's DINOv3 has, too. They come first, because errors name the first rule for a
/// tensor.
#[rustfmt::skip]
pub(super) const SHARED: &[Rule] = &[
    copy("patch_embed.proj.weight",   "patch_embed.proj.weight"),
    copy("patch_embed.proj.bias",     "patch_embed.proj.bias"),
    copy("blocks.*.norm1.weight",     "blocks.*.norm1.weight"),
    copy("blocks.*.norm1.bias",       "blocks.*.norm1.bias"),
    copy("blocks.*.attn.proj.weight", "blocks.*.attn.proj.weight"),
    copy("blocks.*.attn.proj.bias",   "blocks.*.attn.proj.bias"),
    copy("blocks.*.ls1.gamma",        "blocks.*.ls1.gamma"),
    copy("blocks.*.norm2.weight",     "blocks.*.norm2.weight"),
    copy("blocks.*.norm2.bias",       "blocks.*.norm2.bias"),
    copy("blocks.*.mlp.fc1.weight",   "blocks.*.mlp.fc1.weight"),
    copy("blocks.*.mlp.fc1.bias",     "blocks.*.mlp.fc1.bias"),
    copy("blocks.*.mlp.fc2.weight",   "blocks.*.mlp.fc2.weight"),
    copy("blocks.*.mlp.fc2.bias",     "blocks.*.mlp.fc2.bias"),
    copy("blocks.*.ls2.gamma",        "blocks.*.ls2.gamma"),
    copy("norm.weight",               "norm.weight"),
    copy("norm.bias",                 "norm.bias"),
];

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("cls_token",                 "cls_token"),
    copy("reg_token",                 "reg_token"),
    copy("pos_embed",                 "pos_embed"),
    copy("patch_embed.norm.weight",   "patch_embed.norm.weight"),
    copy("patch_embed.norm.bias",     "patch_embed.norm.bias"),
    copy("rope.freqs",                "rope.freqs"),
    copy("norm_pre.weight",           "norm_pre.weight"),
    copy("norm_pre.bias",             "norm_pre.bias"),
    copy("blocks.*.attn.qkv.weight",  "blocks.*.attn.qkv.weight"),
    copy("blocks.*.attn.qkv.bias",    "blocks.*.attn.qkv.bias"),
    copy("dist_token",                "reg_token"),
    copy("blocks.*.gamma_1",          "blocks.*.ls1.gamma"),
    copy("blocks.*.gamma_2",          "blocks.*.ls2.gamma"),
    copy("blocks.*.attn.{q,k?,v}_bias",      QKV_BIAS),
    copy("blocks.*.attn.{q,k,v}_proj.weight", QKV_WEIGHT),
    copy("blocks.*.attn.{q,k?,v}_proj.bias", QKV_BIAS),
    copy("blocks.*.attn.relative_position_bias_table", BIAS_TABLE),
    copy("rel_pos_bias.relative_position_bias_table", SHARED_BIAS_TABLE),
    copy("blocks.*.attn.norm.weight",  "blocks.*.attn.norm.weight"),
    copy("blocks.*.attn.norm.bias",    "blocks.*.attn.norm.bias"),
    copy("blocks.*.mlp.{fc1_g,fc1_x}.weight", "blocks.*.mlp.fc1.weight"),
    copy("blocks.*.mlp.{fc1_g,fc1_x}.bias", "blocks.*.mlp.fc1.bias"),
    copy("blocks.*.mlp.norm.weight",  "blocks.*.mlp.norm.weight"),
    copy("blocks.*.mlp.norm.bias",    "blocks.*.mlp.norm.bias"),
    copy("attn_pool.latent",          "attn_pool.latent"),
    copy("attn_pool.{q,kv,kv}.weight", "attn_pool.qkv.weight"),
    copy("attn_pool.{q,kv,kv}.bias",  "attn_pool.qkv.bias"),
    copy("attn_pool.proj.weight",     "attn_pool.proj.weight"),
    copy("attn_pool.proj.bias",       "attn_pool.proj.bias"),
    copy("attn_pool.norm.weight",     "attn_pool.norm.weight"),
    copy("attn_pool.norm.bias",       "attn_pool.norm.bias"),
    copy("attn_pool.mlp.fc1.weight",  "attn_pool.mlp.fc1.weight"),
    copy("attn_pool.mlp.fc1.bias",    "attn_pool.mlp.fc1.bias"),
    copy("attn_pool.mlp.fc2.weight",  "attn_pool.mlp.fc2.weight"),
    copy("attn_pool.mlp.fc2.bias",    "attn_pool.mlp.fc2.bias"),
    copy("fc_norm.weight",            "fc_norm.weight"),
    copy("fc_norm.bias",              "fc_norm.bias"),
    // This crate's own names: a CLIP image tower that was saved with its projection, and the fused
    // projections of attention pooling.
    copy("projection.weight",         "projection.weight"),
    copy("attn_pool.qkv.weight",      "attn_pool.qkv.weight"),
    copy("attn_pool.qkv.bias",        "attn_pool.qkv.bias"),
    copy("attn_pool.key_value.weight", "attn_pool.key_value.weight"),
    copy("attn_pool.key_value.bias",  "attn_pool.key_value.bias"),
    // The names of the DINOv2 repository.
    copy("register_tokens",           "reg_token"),
    copy("blocks.*.mlp.w12.weight",   "blocks.*.mlp.fc1.weight"),
    copy("blocks.*.mlp.w12.bias",     "blocks.*.mlp.fc1.bias"),
    copy("blocks.*.mlp.w3.weight",    "blocks.*.mlp.fc2.weight"),
    copy("blocks.*.mlp.w3.bias",      "blocks.*.mlp.fc2.bias"),
    skip("mask_token",                MASK),
    skip("head.**",                   HEAD),
    skip("pre_logits.**",             HEAD),
    skip("head_dist.**",              HEAD),
    // Microsoft's files of BEiT.
    skip("blocks.*.attn.relative_position_index", INDICES),
    skip("rel_pos_bias.relative_position_index", INDICES),
    skip("lm_head.**",                MASK),
    // The decoder of an MAE.
    skip("decoder_embed.**",          DECODER),
    skip("decoder_pos_embed",         DECODER),
    skip("decoder_blocks.**",         DECODER),
    skip("decoder_norm.**",           DECODER),
    skip("decoder_pred.**",           DECODER),
];

/// The names around the tower in open_clip's models.
#[rustfmt::skip]
const AROUND: &[Rule] = &[
    skip("text.**",      TEXT),
    skip("visual.head.**", PROJECTION),
    skip("logit_scale",  TEXT),
    skip("logit_bias",   TEXT),
];

const PROJECTION: &str = "a projection after the features";
