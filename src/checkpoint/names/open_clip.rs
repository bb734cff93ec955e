//! The names of open_clip, which are also those of OpenAI's CLIP: the image tower, the text tower
//! (at the top level or under `text`), and the whole model.

use super::Layout::Transposed;
use super::{
    Activation, CLIP_TEXT, Family, IMAGE, NUMBERS, PositionNames, QKV_BIAS, QKV_WEIGHT, Rule, TEXT,
    VIT, copy, skip, take,
};

pub(super) const FAMILY: Family = Family {
    name: "open_clip",
    backbone: VIT,
    separator: '.',
    prefixes: &["visual.", ""],
    signatures: &["class_embedding"],
    rules: &[RULES, BLOCKS],
    around: AROUND,
    norm_eps: 1e-5,
    activation: Activation::QuickGeluBeside(OPENAI_NUMBERS),
    positions: PositionNames::Class,
};

pub(super) const TEXT_FAMILY: Family = Family {
    name: "open_clip's text tower",
    backbone: CLIP_TEXT,
    separator: '.',
    prefixes: &["text.", ""],
    signatures: &["token_embedding.weight"],
    rules: &[TEXT_RULES, BLOCKS],
    around: AROUND_TEXT,
    norm_eps: 1e-5,
    activation: Activation::QuickGeluBeside(OPENAI_NUMBERS),
    positions: PositionNames::None,
};

/// Scalars in OpenAI's own files, whose models have QuickGELU.
const OPENAI_NUMBERS: &[&str] = &["input_resolution", "context_length", "vocab_size"];

/// The blocks of both towers.
#[rustfmt::skip]
const BLOCKS: &[Rule] = &[
    copy("transformer.resblocks.*.ln_1.weight", "blocks.*.norm1.weight"),
    copy("transformer.resblocks.*.ln_1.bias", "blocks.*.norm1.bias"),
    copy("transformer.resblocks.*.attn.in_proj_weight", QKV_WEIGHT),
    copy("transformer.resblocks.*.attn.in_proj_bias", QKV_BIAS),
    copy("transformer.resblocks.*.attn.out_proj.weight", "blocks.*.attn.proj.weight"),
    copy("transformer.resblocks.*.attn.out_proj.bias", "blocks.*.attn.proj.bias"),
    copy("transformer.resblocks.*.ls_1.gamma", "blocks.*.ls1.gamma"),
    copy("transformer.resblocks.*.ln_2.weight", "blocks.*.norm2.weight"),
    copy("transformer.resblocks.*.ln_2.bias", "blocks.*.norm2.bias"),
    copy("transformer.resblocks.*.mlp.c_fc.weight", "blocks.*.mlp.fc1.weight"),
    copy("transformer.resblocks.*.mlp.c_fc.bias", "blocks.*.mlp.fc1.bias"),
    copy("transformer.resblocks.*.mlp.c_proj.weight", "blocks.*.mlp.fc2.weight"),
    copy("transformer.resblocks.*.mlp.c_proj.bias", "blocks.*.mlp.fc2.bias"),
    copy("transformer.resblocks.*.ls_2.gamma", "blocks.*.ls2.gamma"),
];

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("class_embedding", "cls_token"),
    copy("positional_embedding", "pos_embed"),
    copy("conv1.weight", "patch_embed.proj.weight"),
    copy("conv1.bias", "patch_embed.proj.bias"),
    copy("ln_pre.weight", "norm_pre.weight"),
    copy("ln_pre.bias", "norm_pre.bias"),
    copy("ln_post.weight", "norm.weight"),
    copy("ln_post.bias", "norm.bias"),
    take("proj", "projection.weight", Transposed),
];

#[rustfmt::skip]
pub(super) const AROUND: &[Rule] = &[
    // The projection of a tower of timm.
    skip("visual.head.**", PROJECTION),
    skip("transformer.**", TEXT),
    skip("token_embedding.**", TEXT),
    skip("positional_embedding", TEXT),
    skip("ln_final.**", TEXT),
    skip("text_projection", TEXT),
    skip("text_projection.**", TEXT),
    skip("text.**", TEXT),
    skip("logit_scale", TEXT),
    skip("logit_bias", TEXT),
    skip("input_resolution", NUMBERS),
    skip("context_length", NUMBERS),
    skip("vocab_size", NUMBERS),
];

#[rustfmt::skip]
const TEXT_RULES: &[Rule] = &[
    copy("token_embedding.weight", "token_embed"),
    copy("positional_embedding", "pos_embed"),
    copy("ln_final.weight", "norm.weight"),
    copy("ln_final.bias", "norm.bias"),
    take("text_projection", "projection.weight", Transposed),
    copy("text_projection.weight", "projection.weight"),
];

#[rustfmt::skip]
const AROUND_TEXT: &[Rule] = &[
    copy("logit_scale", "logit_scale"),
    skip("logit_bias", BIAS),
    skip("visual.**", IMAGE),
    skip("input_resolution", NUMBERS),
    skip("context_length", NUMBERS),
    skip("vocab_size", NUMBERS),
];

/// The reason for the bias of models that were trained with SigLIP's loss.
const BIAS: &str = "a bias that is the same for every pair of an image and a text";

/// The reason for the projection of a tower that the crate reads without it.
const PROJECTION: &str = "the projection of CLIP; the features are computed before it";
