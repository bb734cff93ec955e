//! The names of ConvNeXt in timm's, Facebook's and Hugging Face's files. timm's also stand in
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
    prefixes: &["", "convnext."],
    signatures: &["encoder.stages.0.layers.0.dwconv.weight"],
    rules: &[HUGGING_FACE_RULES],
    around: &[skip("classifier.**", HEAD)],
    ..TIMM
};

/// Returns the epsilon of the last norm if it is not that of the other norms.
pub(in crate::checkpoint) fn final_norm_eps(family: &Family) -> Option<f64> {
    (family.name == HUGGING_FACE.name).then_some(1e-12)
}

#[rustfmt::skip]
const TIMM_RULES: &[Rule] = &[
    copy("stem.0.weight", "stem.0.weight"),
    copy("stem.0.bias",   "stem.0.bias"),
    copy("stem.1.weight", "stem.1.weight"),
    copy("stem.1.bias",   "stem.1.bias"),
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
    take("stages.*.blocks.*.mlp.fc2.weight", "stages.*.blocks.*.mlp.fc2.weight", Pointwise),
    copy("stages.*.blocks.*.mlp.fc2.bias",   "stages.*.blocks.*.mlp.fc2.bias"),
    copy("head.norm.weight", "head.norm.weight"),
    copy("head.norm.bias",   "head.norm.bias"),
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
    copy("stages.*.*.pwconv2.weight", "stages.*.blocks.*.mlp.fc2.weight"),
    copy("stages.*.*.pwconv2.bias",   "stages.*.blocks.*.mlp.fc2.bias"),
    copy("norm.weight", "head.norm.weight"),
    copy("norm.bias",   "head.norm.bias"),
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
    copy("encoder.stages.*.layers.*.pwconv2.weight", "stages.*.blocks.*.mlp.fc2.weight"),
    copy("encoder.stages.*.layers.*.pwconv2.bias", "stages.*.blocks.*.mlp.fc2.bias"),
    copy("layernorm.weight", "head.norm.weight"),
    copy("layernorm.bias", "head.norm.bias"),
];
