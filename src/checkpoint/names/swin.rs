//! The names of Swin and Swin V2 in timm's, Microsoft's and Hugging Face's files. In timm's files a patch merging
//! belongs to the stage after it; in the others it belongs to the stage before it.

use super::{
    Activation, Family, HEAD, INDICES, MASK as PRETRAINING, PositionNames, Rule, copy, skip,
};
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
    signatures: &[
        "layers.0.blocks.0.attn.relative_position_bias_table",
        "layers.0.blocks.0.attn.logit_scale",
    ],
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

pub(super) const HUGGING_FACE: Family = Family {
    name: "Hugging Face Swin",
    prefixes: &["", "swin."],
    signatures: &[
        "encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
        "encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table",
    ],
    rules: &[HUGGING_FACE_V1_RULES, HUGGING_FACE_RULES],
    around: &[skip("classifier.**", HEAD), skip("decoder.**", PRETRAINING)],
    ..TIMM
};

pub(super) const HUGGING_FACE_V2: Family = Family {
    name: "Hugging Face Swin V2",
    prefixes: &["", "swinv2."],
    signatures: &["encoder.layers.0.blocks.0.attention.self.logit_scale"],
    rules: &[HUGGING_FACE_V2_RULES, HUGGING_FACE_RULES],
    ..HUGGING_FACE
};

/// The reason for the input of the MLP that computes the position bias.
pub(super) const OFFSETS: &str = "offsets that follow from the windows, not weights";

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
    copy("layers.*.blocks.*.attn.logit_scale", "layers.*.blocks.*.attn.logit_scale"),
    copy("layers.*.blocks.*.attn.cpb_mlp.0.weight", "layers.*.blocks.*.attn.cpb_mlp.0.weight"),
    copy("layers.*.blocks.*.attn.cpb_mlp.0.bias", "layers.*.blocks.*.attn.cpb_mlp.0.bias"),
    copy("layers.*.blocks.*.attn.cpb_mlp.2.weight", "layers.*.blocks.*.attn.cpb_mlp.2.weight"),
    copy("layers.*.blocks.*.attn.qkv.weight",  "layers.*.blocks.*.attn.qkv.weight"),
    copy("layers.*.blocks.*.attn.qkv.bias",    "layers.*.blocks.*.attn.qkv.bias"),
    copy("layers.*.blocks.*.attn.{q,k?,v}_bias", "layers.*.blocks.*.attn.qkv.bias"),
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
    skip("layers.*.blocks.*.attn.relative_coords_table", OFFSETS),
    skip("layers.*.blocks.*.attn_mask", MASK),
    skip("head.**", HEAD),
];

#[rustfmt::skip]
const HUGGING_FACE_RULES: &[Rule] = &[
    copy("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"),
    copy("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
    copy("embeddings.norm.weight", "patch_embed.norm.weight"),
    copy("embeddings.norm.bias", "patch_embed.norm.bias"),
    copy("encoder.layers.*.blocks.*.layernorm_before.weight", "layers.*.blocks.*.norm1.weight"),
    copy("encoder.layers.*.blocks.*.layernorm_before.bias", "layers.*.blocks.*.norm1.bias"),
    copy("encoder.layers.*.blocks.*.attention.self.{query,key,value}.weight", "layers.*.blocks.*.attn.qkv.weight"),
    copy("encoder.layers.*.blocks.*.attention.output.dense.weight", "layers.*.blocks.*.attn.proj.weight"),
    copy("encoder.layers.*.blocks.*.attention.output.dense.bias", "layers.*.blocks.*.attn.proj.bias"),
    copy("encoder.layers.*.blocks.*.layernorm_after.weight", "layers.*.blocks.*.norm2.weight"),
    copy("encoder.layers.*.blocks.*.layernorm_after.bias", "layers.*.blocks.*.norm2.bias"),
    copy("encoder.layers.*.blocks.*.intermediate.dense.weight", "layers.*.blocks.*.mlp.fc1.weight"),
    copy("encoder.layers.*.blocks.*.intermediate.dense.bias", "layers.*.blocks.*.mlp.fc1.bias"),
    copy("encoder.layers.*.blocks.*.output.dense.weight", "layers.*.blocks.*.mlp.fc2.weight"),
    copy("encoder.layers.*.blocks.*.output.dense.bias", "layers.*.blocks.*.mlp.fc2.bias"),
    copy("encoder.layers.*.downsample.norm.weight", "layers.*+1.downsample.norm.weight"),
    copy("encoder.layers.*.downsample.norm.bias", "layers.*+1.downsample.norm.bias"),
    copy("encoder.layers.*.downsample.reduction.weight", "layers.*+1.downsample.reduction.weight"),
    copy("layernorm.weight", "norm.weight"),
    copy("layernorm.bias", "norm.bias"),
    skip("embeddings.mask_token", PRETRAINING),
];

#[rustfmt::skip]
const HUGGING_FACE_V1_RULES: &[Rule] = &[
    copy("encoder.layers.*.blocks.*.attention.self.relative_position_bias_table", "layers.*.blocks.*.attn.relative_position_bias_table"),
    copy("encoder.layers.*.blocks.*.attention.self.{query,key,value}.bias", "layers.*.blocks.*.attn.qkv.bias"),
    // Module names of transformers 5, which `save_pretrained` does not write.
    copy("encoder.layers.*.blocks.*.attention.relative_position_bias.relative_position_bias_table", "layers.*.blocks.*.attn.relative_position_bias_table"),
    copy("encoder.layers.*.blocks.*.attention.{q,k,v}_proj.weight", "layers.*.blocks.*.attn.qkv.weight"),
    copy("encoder.layers.*.blocks.*.attention.{q,k,v}_proj.bias", "layers.*.blocks.*.attn.qkv.bias"),
    copy("encoder.layers.*.blocks.*.attention.o_proj.weight", "layers.*.blocks.*.attn.proj.weight"),
    copy("encoder.layers.*.blocks.*.attention.o_proj.bias", "layers.*.blocks.*.attn.proj.bias"),
    copy("encoder.layers.*.blocks.*.mlp.fc1.weight", "layers.*.blocks.*.mlp.fc1.weight"),
    copy("encoder.layers.*.blocks.*.mlp.fc1.bias", "layers.*.blocks.*.mlp.fc1.bias"),
    copy("encoder.layers.*.blocks.*.mlp.fc2.weight", "layers.*.blocks.*.mlp.fc2.weight"),
    copy("encoder.layers.*.blocks.*.mlp.fc2.bias", "layers.*.blocks.*.mlp.fc2.bias"),
    skip("encoder.layers.*.blocks.*.attention.self.relative_position_index", INDICES),
    skip("encoder.layers.*.blocks.*.attention.relative_position_bias.relative_position_index", INDICES),
];

#[rustfmt::skip]
const HUGGING_FACE_V2_RULES: &[Rule] = &[
    copy("encoder.layers.*.blocks.*.attention.self.logit_scale", "layers.*.blocks.*.attn.logit_scale"),
    copy("encoder.layers.*.blocks.*.attention.self.continuous_position_bias_mlp.0.weight", "layers.*.blocks.*.attn.cpb_mlp.0.weight"),
    copy("encoder.layers.*.blocks.*.attention.self.continuous_position_bias_mlp.0.bias", "layers.*.blocks.*.attn.cpb_mlp.0.bias"),
    copy("encoder.layers.*.blocks.*.attention.self.continuous_position_bias_mlp.2.weight", "layers.*.blocks.*.attn.cpb_mlp.2.weight"),
    copy("encoder.layers.*.blocks.*.attention.self.{query,key?,value}.bias", "layers.*.blocks.*.attn.qkv.bias"),
    skip("encoder.layers.*.blocks.*.attention.self.relative_position_index", INDICES),
    skip("encoder.layers.*.blocks.*.attention.self.relative_coords_table", OFFSETS),
];
