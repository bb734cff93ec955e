//! The names of torchvision's ViT, Swin and ConvNeXt. In Swin and ConvNeXt the layer `2n + 1` of
//! `features` is stage n, and the layer `2n` in front of it is the downsampling into it.

use super::Layout::{NoKeys, Pointwise};
use super::{
    Activation, Family, HEAD, INDICES, PositionNames, QKV_BIAS, QKV_WEIGHT, Rule, VIT, convnext,
    copy, skip, swin, take,
};

pub(super) const VIT_FAMILY: Family = Family {
    name: "torchvision ViT",
    backbone: VIT,
    separator: '.',
    prefixes: &[""],
    signatures: &["encoder.layers.encoder_layer_0.ln_1.weight"],
    rules: &[VIT_RULES],
    around: &[],
    norm_eps: 1e-6,
    activation: Activation::Gelu,
    positions: PositionNames::Class,
};

pub(super) const SWIN: Family = Family {
    name: "torchvision Swin",
    signatures: &["features.1.0.attn.relative_position_bias_table"],
    rules: &[SWIN_V1_RULES, SWIN_RULES],
    around: &[],
    ..swin::TIMM
};

pub(super) const SWIN_V2: Family = Family {
    name: "torchvision Swin V2",
    signatures: &["features.1.0.attn.logit_scale"],
    rules: &[SWIN_V2_RULES, SWIN_RULES],
    ..SWIN
};

pub(super) const CONVNEXT: Family = Family {
    name: "torchvision ConvNeXt",
    signatures: &["features.1.0.layer_scale"],
    rules: &[CONVNEXT_RULES],
    around: &[],
    ..convnext::TIMM
};

#[rustfmt::skip]
const VIT_RULES: &[Rule] = &[
    copy("class_token", "cls_token"),
    copy("encoder.pos_embedding", "pos_embed"),
    copy("conv_proj.weight", "patch_embed.proj.weight"),
    copy("conv_proj.bias", "patch_embed.proj.bias"),
    copy("encoder.layers.encoder_layer_*.ln_1.weight", "blocks.*.norm1.weight"),
    copy("encoder.layers.encoder_layer_*.ln_1.bias", "blocks.*.norm1.bias"),
    copy("encoder.layers.encoder_layer_*.self_attention.in_proj_weight", QKV_WEIGHT),
    copy("encoder.layers.encoder_layer_*.self_attention.in_proj_bias", QKV_BIAS),
    copy("encoder.layers.encoder_layer_*.self_attention.out_proj.weight", "blocks.*.attn.proj.weight"),
    copy("encoder.layers.encoder_layer_*.self_attention.out_proj.bias", "blocks.*.attn.proj.bias"),
    copy("encoder.layers.encoder_layer_*.ln_2.weight", "blocks.*.norm2.weight"),
    copy("encoder.layers.encoder_layer_*.ln_2.bias", "blocks.*.norm2.bias"),
    copy("encoder.layers.encoder_layer_*.mlp.0.weight", "blocks.*.mlp.fc1.weight"),
    copy("encoder.layers.encoder_layer_*.mlp.0.bias", "blocks.*.mlp.fc1.bias"),
    copy("encoder.layers.encoder_layer_*.mlp.3.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layers.encoder_layer_*.mlp.3.bias", "blocks.*.mlp.fc2.bias"),
    // The names before torchvision 0.13, which the published files have.
    copy("encoder.layers.encoder_layer_*.mlp.linear_1.weight", "blocks.*.mlp.fc1.weight"),
    copy("encoder.layers.encoder_layer_*.mlp.linear_1.bias", "blocks.*.mlp.fc1.bias"),
    copy("encoder.layers.encoder_layer_*.mlp.linear_2.weight", "blocks.*.mlp.fc2.weight"),
    copy("encoder.layers.encoder_layer_*.mlp.linear_2.bias", "blocks.*.mlp.fc2.bias"),
    copy("encoder.ln.weight", "norm.weight"),
    copy("encoder.ln.bias", "norm.bias"),
    skip("heads.**", HEAD),
];

#[rustfmt::skip]
const SWIN_V1_RULES: &[Rule] = &[
    copy("features.*x2+1.*.attn.relative_position_bias_table", "layers.*.blocks.*.attn.relative_position_bias_table"),
    copy("features.*x2+1.*.attn.qkv.bias",    "layers.*.blocks.*.attn.qkv.bias"),
];

#[rustfmt::skip]
const SWIN_V2_RULES: &[Rule] = &[
    copy("features.*x2+1.*.attn.logit_scale", "layers.*.blocks.*.attn.logit_scale"),
    copy("features.*x2+1.*.attn.cpb_mlp.0.weight", "layers.*.blocks.*.attn.cpb_mlp.0.weight"),
    copy("features.*x2+1.*.attn.cpb_mlp.0.bias", "layers.*.blocks.*.attn.cpb_mlp.0.bias"),
    copy("features.*x2+1.*.attn.cpb_mlp.2.weight", "layers.*.blocks.*.attn.cpb_mlp.2.weight"),
    take("features.*x2+1.*.attn.qkv.bias", "layers.*.blocks.*.attn.qkv.bias", NoKeys),
    skip("features.*x2+1.*.attn.relative_coords_table", swin::OFFSETS),
];

#[rustfmt::skip]
const SWIN_RULES: &[Rule] = &[
    copy("features.0.0.weight", "patch_embed.proj.weight"),
    copy("features.0.0.bias",   "patch_embed.proj.bias"),
    copy("features.0.2.weight", "patch_embed.norm.weight"),
    copy("features.0.2.bias",   "patch_embed.norm.bias"),
    copy("features.*x2+1.*.norm1.weight", "layers.*.blocks.*.norm1.weight"),
    copy("features.*x2+1.*.norm1.bias",   "layers.*.blocks.*.norm1.bias"),
    copy("features.*x2+1.*.attn.qkv.weight",  "layers.*.blocks.*.attn.qkv.weight"),
    copy("features.*x2+1.*.attn.proj.weight", "layers.*.blocks.*.attn.proj.weight"),
    copy("features.*x2+1.*.attn.proj.bias",   "layers.*.blocks.*.attn.proj.bias"),
    copy("features.*x2+1.*.norm2.weight", "layers.*.blocks.*.norm2.weight"),
    copy("features.*x2+1.*.norm2.bias",   "layers.*.blocks.*.norm2.bias"),
    copy("features.*x2+1.*.mlp.0.weight", "layers.*.blocks.*.mlp.fc1.weight"),
    copy("features.*x2+1.*.mlp.0.bias",   "layers.*.blocks.*.mlp.fc1.bias"),
    copy("features.*x2+1.*.mlp.3.weight", "layers.*.blocks.*.mlp.fc2.weight"),
    copy("features.*x2+1.*.mlp.3.bias",   "layers.*.blocks.*.mlp.fc2.bias"),
    copy("features.*x2.norm.weight",      "layers.*.downsample.norm.weight"),
    copy("features.*x2.norm.bias",        "layers.*.downsample.norm.bias"),
    copy("features.*x2.reduction.weight", "layers.*.downsample.reduction.weight"),
    copy("norm.weight", "norm.weight"),
    copy("norm.bias",   "norm.bias"),
    skip("features.*x2+1.*.attn.relative_position_index", INDICES),
    skip("head.**", HEAD),
];

#[rustfmt::skip]
const CONVNEXT_RULES: &[Rule] = &[
    copy("features.0.0.weight", "stem.0.weight"),
    copy("features.0.0.bias",   "stem.0.bias"),
    copy("features.0.1.weight", "stem.1.weight"),
    copy("features.0.1.bias",   "stem.1.bias"),
    copy("features.*x2.0.weight", "stages.*.downsample.0.weight"),
    copy("features.*x2.0.bias",   "stages.*.downsample.0.bias"),
    copy("features.*x2.1.weight", "stages.*.downsample.1.weight"),
    copy("features.*x2.1.bias",   "stages.*.downsample.1.bias"),
    take("features.*x2+1.*.layer_scale", "stages.*.blocks.*.gamma", Pointwise),
    copy("features.*x2+1.*.block.0.weight", "stages.*.blocks.*.conv_dw.weight"),
    copy("features.*x2+1.*.block.0.bias",   "stages.*.blocks.*.conv_dw.bias"),
    copy("features.*x2+1.*.block.2.weight", "stages.*.blocks.*.norm.weight"),
    copy("features.*x2+1.*.block.2.bias",   "stages.*.blocks.*.norm.bias"),
    copy("features.*x2+1.*.block.3.weight", "stages.*.blocks.*.mlp.fc1.weight"),
    copy("features.*x2+1.*.block.3.bias",   "stages.*.blocks.*.mlp.fc1.bias"),
    copy("features.*x2+1.*.block.5.weight", "stages.*.blocks.*.mlp.fc2.weight"),
    copy("features.*x2+1.*.block.5.bias",   "stages.*.blocks.*.mlp.fc2.bias"),
    copy("classifier.0.weight", "head.norm.weight"),
    copy("classifier.0.bias",   "head.norm.bias"),
    skip("classifier.2.**", HEAD),
];
