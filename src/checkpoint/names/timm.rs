//! The names of timm (ViT, CLIP and DINOv2), and the names of the DINOv2 repository, which differ
//! in three tensors.

use super::{Activation, Family, HEAD, MASK, PositionNames, Rule, VIT, copy, skip};

pub(super) const FAMILY: Family = Family {
    name: "timm",
    backbone: VIT,
    separator: '.',
    prefixes: &[""],
    signatures: &["blocks.0.norm1.weight"],
    rules: &[RULES],
    around: &[],
    norm_eps: 1e-6,
    activation: Activation::Gelu,
    positions: PositionNames::UsuallyNoneBeside("reg_token"),
};

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("cls_token",                 "cls_token"),
    copy("reg_token",                 "reg_token"),
    copy("pos_embed",                 "pos_embed"),
    copy("patch_embed.proj.weight",   "patch_embed.proj.weight"),
    copy("patch_embed.proj.bias",     "patch_embed.proj.bias"),
    copy("norm_pre.weight",           "norm_pre.weight"),
    copy("norm_pre.bias",             "norm_pre.bias"),
    copy("blocks.*.norm1.weight",     "blocks.*.norm1.weight"),
    copy("blocks.*.norm1.bias",       "blocks.*.norm1.bias"),
    copy("blocks.*.attn.qkv.weight",  "blocks.*.attn.qkv.weight"),
    copy("blocks.*.attn.qkv.bias",    "blocks.*.attn.qkv.bias"),
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
    copy("fc_norm.weight",            "fc_norm.weight"),
    copy("fc_norm.bias",              "fc_norm.bias"),
    // This crate's own name, for a CLIP image tower that was saved with its projection.
    copy("projection.weight",         "projection.weight"),
    // The names of the DINOv2 repository.
    copy("register_tokens",           "reg_token"),
    copy("blocks.*.mlp.w12.weight",   "blocks.*.mlp.fc1.weight"),
    copy("blocks.*.mlp.w12.bias",     "blocks.*.mlp.fc1.bias"),
    copy("blocks.*.mlp.w3.weight",    "blocks.*.mlp.fc2.weight"),
    copy("blocks.*.mlp.w3.bias",      "blocks.*.mlp.fc2.bias"),
    skip("mask_token",                MASK),
    // The decoder of an MAE.
    skip("decoder_pos_embed",         MASK),
    skip("decoder_embed.**",          MASK),
    skip("decoder_blocks.**",         MASK),
    skip("decoder_norm.**",           MASK),
    skip("decoder_pred.**",           MASK),
    skip("head.**",                   HEAD),
    skip("pre_logits.**",             HEAD),
];
