//! The names of ConvNeXt and ConvNeXt V2 in timm's, Facebook's and Hugging Face's files. timm's also stand in
//! open_clip's models under `visual.trunk`.

use super::Layout::Pointwise;
use super::{Activation, Family, HEAD, PositionNames, Rule, copy, open_clip, skip, take};
use crate::backbone::{ConvNeXtConfig, Network};

pub(super) const TIMM: Family = Family {
    name: "timm ConvNeXt",
    backbone: ConvNeXtConfig::FAMILY,
    separator: '.',
    prefixes: &["", "visual.trunk."],
    signatures: &["stages.0.blocks.0.conv_dw.weight"],
    rules: &[TIMM_RULES],
    around: open_clip::AROUND,
    norm_eps: 1e-6,
    activation: Activation::Gelu,
    positions: PositionNames::None,
};

pub(super) const FACEBOOK: Family = Family {
    name: "Facebook ConvNeXt",
    prefixes: &[""],
    signatures: &["stages.0.0.dwconv.weight"],
    rules: &[FACEBOOK_RULES],
    around: &[],
    ..TIMM
};

pub(super) const HUGGING_FACE: Family = Family {
    name: "Hugging Face ConvNeXt",
    prefixes: &["", "convnext.", "convnextv2."],
    signatures: &["encoder.stages.0.layers.0.dwconv.weight"],
    rules: &[HUGGING_FACE_RULES],
    around: &[skip("classifier.**", HEAD)],
    ..TIMM
};

pub(super) const HUGGING_FACE_DINOV3: Family = Family {
    name: "Hugging Face DINOv3 ConvNeXt",
    prefixes: &["", "model."],
    signatures: &["stages.0.layers.0.depthwise_conv.weight"],
    rules: &[HUGGING_FACE_DINOV3_RULES],
    around: &[
        copy("layer_norm.weight", "head.norm.weight"),
        copy("layer_norm.bias", "head.norm.bias"),
    ],
    ..TIMM
};

/// The reasons for tensors beside the ConvNeXts of DINOv3 and EUPE.
const DENSE: &str = "norms for dense features; the last one is the norm of the model once more";
const PROJECTORS: &str = "projections for distillation";

#[rustfmt::skip]
const TIMM_RULES: &[Rule] = &[
    copy("stem.0.weight", "stem.0.weight"),
    copy("stem.0.bias",   "stem.0.bias"),
    copy("stem.1.weight", "stem.1.weight"),
    copy("stem.1.bias",   "stem.1.bias"),
    // A stem of two convolutions, the second with an activation in front of it or without one.
    copy("stem.2.weight", "stem.2.weight"),
    copy("stem.2.bias",   "stem.2.bias"),
    copy("stem.3.weight", "stem.3.weight"),
    copy("stem.3.bias",   "stem.3.bias"),
    copy("stages.*.downsample.0.weight", "stages.*.downsample.0.weight"),
    copy("stages.*.downsample.0.bias",   "stages.*.downsample.0.bias"),
    copy("stages.*.downsample.1.weight", "stages.*.downsample.1.weight"),
    copy("stages.*.downsample.1.bias",   "stages.*.downsample.1.bias"),
    copy("stages.*.blocks.*.gamma",          "stages.*.blocks.*.gamma"),
    copy("stages.*.blocks.*.conv_dw.weight", "stages.*.blocks.*.conv_dw.weight"),
    copy("stages.*.blocks.*.conv_dw.bias",   "stages.*.blocks.*.conv_dw.bias"),
    copy("stages.*.blocks.*.norm.weight",    "stages.*.blocks.*.norm.weight"),
    copy("stages.*.blocks.*.norm.bias",      "stages.*.blocks.*.norm.bias"),
    take("stages.*.blocks.*.mlp.fc1.weight", "stages.*.blocks.*.mlp.fc1.weight", Pointwise),
    copy("stages.*.blocks.*.mlp.fc1.bias",   "stages.*.blocks.*.mlp.fc1.bias"),
    copy("stages.*.blocks.*.mlp.grn.weight", "stages.*.blocks.*.mlp.grn.weight"),
    copy("stages.*.blocks.*.mlp.grn.bias",   "stages.*.blocks.*.mlp.grn.bias"),
    take("stages.*.blocks.*.mlp.fc2.weight", "stages.*.blocks.*.mlp.fc2.weight", Pointwise),
    copy("stages.*.blocks.*.mlp.fc2.bias",   "stages.*.blocks.*.mlp.fc2.bias"),
    copy("norm_pre.weight",  "norm_pre.weight"),
    copy("norm_pre.bias",    "norm_pre.bias"),
    copy("head.norm.weight", "head.norm.weight"),
    copy("head.norm.bias",   "head.norm.bias"),
    copy("head.pre_logits.fc.weight", "head.pre_logits.fc.weight"),
    copy("head.pre_logits.fc.bias",   "head.pre_logits.fc.bias"),
    skip("head.fc.**", HEAD),
];

#[rustfmt::skip]
const FACEBOOK_RULES: &[Rule] = &[
    copy("downsample_layers.0.0.weight", "stem.0.weight"),
    copy("downsample_layers.0.0.bias",   "stem.0.bias"),
    copy("downsample_layers.0.1.weight", "stem.1.weight"),
    copy("downsample_layers.0.1.bias",   "stem.1.bias"),
    copy("downsample_layers.*.0.weight", "stages.*.downsample.0.weight"),
    copy("downsample_layers.*.0.bias",   "stages.*.downsample.0.bias"),
    copy("downsample_layers.*.1.weight", "stages.*.downsample.1.weight"),
    copy("downsample_layers.*.1.bias",   "stages.*.downsample.1.bias"),
    copy("stages.*.*.gamma",          "stages.*.blocks.*.gamma"),
    copy("stages.*.*.dwconv.weight",  "stages.*.blocks.*.conv_dw.weight"),
    copy("stages.*.*.dwconv.bias",    "stages.*.blocks.*.conv_dw.bias"),
    copy("stages.*.*.norm.weight",    "stages.*.blocks.*.norm.weight"),
    copy("stages.*.*.norm.bias",      "stages.*.blocks.*.norm.bias"),
    copy("stages.*.*.pwconv1.weight", "stages.*.blocks.*.mlp.fc1.weight"),
    copy("stages.*.*.pwconv1.bias",   "stages.*.blocks.*.mlp.fc1.bias"),
    copy("stages.*.*.grn.gamma",      "stages.*.blocks.*.mlp.grn.weight"),
    copy("stages.*.*.grn.beta",       "stages.*.blocks.*.mlp.grn.bias"),
    copy("stages.*.*.pwconv2.weight", "stages.*.blocks.*.mlp.fc2.weight"),
    copy("stages.*.*.pwconv2.bias",   "stages.*.blocks.*.mlp.fc2.bias"),
    copy("norm.weight", "head.norm.weight"),
    copy("norm.bias",   "head.norm.bias"),
    skip("norms.**", DENSE),
    skip("projectors.**", PROJECTORS),
    skip("head.**", HEAD),
];

#[rustfmt::skip]
const HUGGING_FACE_RULES: &[Rule] = &[
    copy("embeddings.patch_embeddings.weight", "stem.0.weight"),
    copy("embeddings.patch_embeddings.bias", "stem.0.bias"),
    copy("embeddings.layernorm.weight", "stem.1.weight"),
    copy("embeddings.layernorm.bias", "stem.1.bias"),
    copy("encoder.stages.*.downsampling_layer.0.weight", "stages.*.downsample.0.weight"),
    copy("encoder.stages.*.downsampling_layer.0.bias", "stages.*.downsample.0.bias"),
    copy("encoder.stages.*.downsampling_layer.1.weight", "stages.*.downsample.1.weight"),
    copy("encoder.stages.*.downsampling_layer.1.bias", "stages.*.downsample.1.bias"),
    copy("encoder.stages.*.layers.*.layer_scale_parameter", "stages.*.blocks.*.gamma"),
    copy("encoder.stages.*.layers.*.dwconv.weight", "stages.*.blocks.*.conv_dw.weight"),
    copy("encoder.stages.*.layers.*.dwconv.bias", "stages.*.blocks.*.conv_dw.bias"),
    copy("encoder.stages.*.layers.*.layernorm.weight", "stages.*.blocks.*.norm.weight"),
    copy("encoder.stages.*.layers.*.layernorm.bias", "stages.*.blocks.*.norm.bias"),
    copy("encoder.stages.*.layers.*.pwconv1.weight", "stages.*.blocks.*.mlp.fc1.weight"),
    copy("encoder.stages.*.layers.*.pwconv1.bias", "stages.*.blocks.*.mlp.fc1.bias"),
    copy("encoder.stages.*.layers.*.grn.weight", "stages.*.blocks.*.mlp.grn.weight"),
    copy("encoder.stages.*.layers.*.grn.bias", "stages.*.blocks.*.mlp.grn.bias"),
    copy("encoder.stages.*.layers.*.pwconv2.weight", "stages.*.blocks.*.mlp.fc2.weight"),
    copy("encoder.stages.*.layers.*.pwconv2.bias", "stages.*.blocks.*.mlp.fc2.bias"),
    copy("layernorm.weight", "head.norm.weight"),
    copy("layernorm.bias", "head.norm.bias"),
];

/// The first layers of stage 0 are the stem.
#[rustfmt::skip]
const HUGGING_FACE_DINOV3_RULES: &[Rule] = &[
    copy("stages.0.downsample_layers.0.weight", "stem.0.weight"),
    copy("stages.0.downsample_layers.0.bias", "stem.0.bias"),
    copy("stages.0.downsample_layers.1.weight", "stem.1.weight"),
    copy("stages.0.downsample_layers.1.bias", "stem.1.bias"),
    copy("stages.*.downsample_layers.0.weight", "stages.*.downsample.0.weight"),
    copy("stages.*.downsample_layers.0.bias", "stages.*.downsample.0.bias"),
    copy("stages.*.downsample_layers.1.weight", "stages.*.downsample.1.weight"),
    copy("stages.*.downsample_layers.1.bias", "stages.*.downsample.1.bias"),
    copy("stages.*.layers.*.gamma", "stages.*.blocks.*.gamma"),
    copy("stages.*.layers.*.depthwise_conv.weight", "stages.*.blocks.*.conv_dw.weight"),
    copy("stages.*.layers.*.depthwise_conv.bias", "stages.*.blocks.*.conv_dw.bias"),
    copy("stages.*.layers.*.layer_norm.weight", "stages.*.blocks.*.norm.weight"),
    copy("stages.*.layers.*.layer_norm.bias", "stages.*.blocks.*.norm.bias"),
    copy("stages.*.layers.*.pointwise_conv1.weight", "stages.*.blocks.*.mlp.fc1.weight"),
    copy("stages.*.layers.*.pointwise_conv1.bias", "stages.*.blocks.*.mlp.fc1.bias"),
    copy("stages.*.layers.*.pointwise_conv2.weight", "stages.*.blocks.*.mlp.fc2.weight"),
    copy("stages.*.layers.*.pointwise_conv2.bias", "stages.*.blocks.*.mlp.fc2.bias"),
];
