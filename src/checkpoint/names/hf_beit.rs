//! The names of Hugging Face's `BeitModel` and `Data2VecVisionModel`, and of their task models.

use super::{
    Activation, BIAS_TABLE, Family, HEAD, INDICES, MASK, PositionNames, QKV_BIAS, Rule,
    SHARED_BIAS_TABLE, VIT, copy, hf_vit, skip,
};

pub(super) const FAMILY: Family = Family {
    name: "Hugging Face BEiT",
    backbone: VIT,
    separator: '.',
    prefixes: &["", "beit.", "data2vec_vision."],
    // ViTModel, which is tried later, has the names of the layers without these.
    signatures: &[
        "encoder.layer.0.lambda_1",
        "encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table",
        "layers.0.lambda_1",
        "layers.0.relative_position_bias.relative_position_bias_table",
    ],
    rules: &[RULES, hf_vit::SHARED],
    around: AROUND,
    norm_eps: 1e-12,
    activation: Activation::Gelu,
    positions: PositionNames::Class,
};

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("encoder.layer.*.attention.attention.{query,key?,value}.bias", QKV_BIAS),
    copy("encoder.layer.*.attention.attention.relative_position_bias.relative_position_bias_table", BIAS_TABLE),
    copy("encoder.relative_position_bias.relative_position_bias_table", SHARED_BIAS_TABLE),
    copy("encoder.layer.*.lambda_1", "blocks.*.ls1.gamma"),
    copy("encoder.layer.*.lambda_2", "blocks.*.ls2.gamma"),
    copy("pooler.layernorm.weight", "fc_norm.weight"),
    copy("pooler.layernorm.bias", "fc_norm.bias"),
    // Module names of transformers 5, which `save_pretrained` does not write.
    copy("layers.*.attention.{q,k?,v}_proj.bias", QKV_BIAS),
    copy("layers.*.relative_position_bias.relative_position_bias_table", BIAS_TABLE),
    copy("shared_position_bias.relative_position_bias_table", SHARED_BIAS_TABLE),
    copy("layers.*.lambda_1", "blocks.*.ls1.gamma"),
    copy("layers.*.lambda_2", "blocks.*.ls2.gamma"),
    skip("encoder.layer.*.attention.attention.relative_position_bias.relative_position_index", INDICES),
    skip("encoder.relative_position_bias.relative_position_index", INDICES),
];

#[rustfmt::skip]
const AROUND: &[Rule] = &[
    skip("classifier.**", HEAD),
    // `BeitForMaskedImageModeling`.
    skip("layernorm.**", MASK),
    skip("lm_head.**", MASK),
];
