//! The names of Swin in timm's files and in Microsoft's files. In Microsoft's files a patch merging
//! belongs to the stage before it; in timm's files it belongs to the stage after it.

use super::{Activation, Family, HEAD, INDICES, PositionNames, Rule, copy, skip};
use crate::backbone::{Network, SwinConfig};

pub(super) const MICROSOFT: Family = Family {
    name: "Microsoft Swin",
    signatures: &["layers.0.downsample.reduction.weight"],
    around: &[
        copy("layers.*.downsample.norm.weight", "layers.*+1.downsample.norm.weight"),
        copy("layers.*.downsample.norm.bias", "layers.*+1.downsample.norm.bias"),
        copy("layers.*.downsample.reduction.weight", "layers.*+1.downsample.reduction.weight"),
    ],
    ..TIMM
};

pub(super) const TIMM: Family = Family {
    name: "timm Swin",
    backbone: SwinConfig::FAMILY,
    separator: '.',
    prefixes: &[""],
    signatures: &["layers.0.blocks.0.attn.relative_position_bias_table"],
    rules: &[RULES],
    around: &[
        copy("layers.*.downsample.norm.weight", "layers.*.downsample.norm.weight"),
        copy("layers.*.downsample.norm.bias", "layers.*.downsample.norm.bias"),
        copy("layers.*.downsample.reduction.weight", "layers.*.downsample.reduction.weight"),
        // This crate's own name, for a model into which a method was folded.
        copy("layers.*.downsample.reduction.bias", "layers.*.downsample.reduction.bias"),
    ],
    norm_eps: 1e-5,
    activation: Activation::Gelu,
    positions: PositionNames::None,
};

const MASK: &str = "a mask that follows from the image size and the window size";

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("patch_embed.proj.weight", "patch_embed.proj.weight"),
    copy("patch_embed.proj.bias",   "patch_embed.proj.bias"),
    copy("patch_embed.norm.weight", "patch_embed.norm.weight"),
    copy("patch_embed.norm.bias",   "patch_embed.norm.bias"),
    copy("layers.*.blocks.*.norm1.weight", "layers.*.blocks.*.norm1.weight"),
    copy("layers.*.blocks.*.norm1.bias",   "layers.*.blocks.*.norm1.bias"),
    copy("layers.*.blocks.*.attn.relative_position_bias_table", "layers.*.blocks.*.attn.relative_position_bias_table"),
    copy("layers.*.blocks.*.attn.qkv.weight",  "layers.*.blocks.*.attn.qkv.weight"),
    copy("layers.*.blocks.*.attn.qkv.bias",    "layers.*.blocks.*.attn.qkv.bias"),
    copy("layers.*.blocks.*.attn.proj.weight", "layers.*.blocks.*.attn.proj.weight"),
    copy("layers.*.blocks.*.attn.proj.bias",   "layers.*.blocks.*.attn.proj.bias"),
    copy("layers.*.blocks.*.norm2.weight",   "layers.*.blocks.*.norm2.weight"),
    copy("layers.*.blocks.*.norm2.bias",     "layers.*.blocks.*.norm2.bias"),
    copy("layers.*.blocks.*.mlp.fc1.weight", "layers.*.blocks.*.mlp.fc1.weight"),
    copy("layers.*.blocks.*.mlp.fc1.bias",   "layers.*.blocks.*.mlp.fc1.bias"),
    copy("layers.*.blocks.*.mlp.fc2.weight", "layers.*.blocks.*.mlp.fc2.weight"),
    copy("layers.*.blocks.*.mlp.fc2.bias",   "layers.*.blocks.*.mlp.fc2.bias"),
    copy("norm.weight", "norm.weight"),
    copy("norm.bias",   "norm.bias"),
    skip("layers.*.blocks.*.attn.relative_position_index", INDICES),
    skip("layers.*.blocks.*.attn_mask", MASK),
    skip("head.**", HEAD),
];
