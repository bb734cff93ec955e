//! The names in Google's `.npz` files: the Flax names of the original release, and the names of its
//! successor big_vision, which numbers the layers of a block differently. SigLIP's files hold both
//! towers under big_vision's names.

use super::Layout::{HeadsBias, Hwio, IntoHeads, OutOfHeads, Transposed};
use super::{
    Activation, Family, HEAD, PositionNames, QKV_BIAS, QKV_WEIGHT, Rule, TEXT, VIT, copy, skip,
    take,
};

pub(super) const FAMILY: Family = Family {
    name: "Google ViT (Flax)",
    backbone: VIT,
    separator: '/',
    prefixes: &["", "opt/target/", "params/"],
    signatures: &["embedding/kernel"],
    rules: &[RULES],
    around: &[],
    norm_eps: 1e-6,
    activation: Activation::Gelu,
    positions: PositionNames::Class,
};

/// SigLIP, in which GELU is the tanh approximation, as everywhere in Flax.
pub(super) const SIGLIP: Family = Family {
    name: "Google SigLIP (Flax)",
    prefixes: &["params/img/"],
    signatures: &["MAPHead_0/probe"],
    rules: &[RULES, POOLING],
    around: SIGLIP_AROUND,
    activation: Activation::GeluTanh,
    ..FAMILY
};

/// The attention pooling.
#[rustfmt::skip]
const POOLING: &[Rule] = &[
    copy("MAPHead_0/probe", "attn_pool.latent"),
    take("MAPHead_0/MultiHeadDotProductAttention_0/{query,key,value}/kernel", "attn_pool.qkv.weight", IntoHeads),
    take("MAPHead_0/MultiHeadDotProductAttention_0/{query,key,value}/bias", "attn_pool.qkv.bias", HeadsBias),
    take("MAPHead_0/MultiHeadDotProductAttention_0/out/kernel", "attn_pool.proj.weight", OutOfHeads),
    copy("MAPHead_0/MultiHeadDotProductAttention_0/out/bias", "attn_pool.proj.bias"),
    copy("MAPHead_0/LayerNorm_0/scale", "attn_pool.norm.weight"),
    copy("MAPHead_0/LayerNorm_0/bias", "attn_pool.norm.bias"),
    take("MAPHead_0/MlpBlock_0/Dense_0/kernel", "attn_pool.mlp.fc1.weight", Transposed),
    copy("MAPHead_0/MlpBlock_0/Dense_0/bias", "attn_pool.mlp.fc1.bias"),
    take("MAPHead_0/MlpBlock_0/Dense_1/kernel", "attn_pool.mlp.fc2.weight", Transposed),
    copy("MAPHead_0/MlpBlock_0/Dense_1/bias", "attn_pool.mlp.fc2.bias"),
];

#[rustfmt::skip]
const SIGLIP_AROUND: &[Rule] = &[
    skip("params/txt/**", TEXT),
    skip("params/t", TEXT),
    skip("params/b", TEXT),
];

#[rustfmt::skip]
const RULES: &[Rule] = &[
    copy("cls", "cls_token"),
    take("embedding/kernel", "patch_embed.proj.weight", Hwio),
    copy("embedding/bias", "patch_embed.proj.bias"),
    copy("Transformer/posembed_input/pos_embedding", "pos_embed"),
    copy("pos_embedding", "pos_embed"),
    copy("Transformer/encoderblock_*/LayerNorm_0/scale", "blocks.*.norm1.weight"),
    copy("Transformer/encoderblock_*/LayerNorm_0/bias", "blocks.*.norm1.bias"),
    take("Transformer/encoderblock_*/MultiHeadDotProductAttention_1/{query,key,value}/kernel", QKV_WEIGHT, IntoHeads),
    take("Transformer/encoderblock_*/MultiHeadDotProductAttention_1/{query,key,value}/bias", QKV_BIAS, HeadsBias),
    take("Transformer/encoderblock_*/MultiHeadDotProductAttention_1/out/kernel", "blocks.*.attn.proj.weight", OutOfHeads),
    copy("Transformer/encoderblock_*/MultiHeadDotProductAttention_1/out/bias", "blocks.*.attn.proj.bias"),
    copy("Transformer/encoderblock_*/LayerNorm_2/scale", "blocks.*.norm2.weight"),
    copy("Transformer/encoderblock_*/LayerNorm_2/bias", "blocks.*.norm2.bias"),
    take("Transformer/encoderblock_*/MlpBlock_3/Dense_0/kernel", "blocks.*.mlp.fc1.weight", Transposed),
    copy("Transformer/encoderblock_*/MlpBlock_3/Dense_0/bias", "blocks.*.mlp.fc1.bias"),
    take("Transformer/encoderblock_*/MlpBlock_3/Dense_1/kernel", "blocks.*.mlp.fc2.weight", Transposed),
    copy("Transformer/encoderblock_*/MlpBlock_3/Dense_1/bias", "blocks.*.mlp.fc2.bias"),
    copy("Transformer/encoder_norm/scale", "norm.weight"),
    copy("Transformer/encoder_norm/bias", "norm.bias"),
    // big_vision: the same layers with other numbers.
    take("Transformer/encoderblock_*/MultiHeadDotProductAttention_0/{query,key,value}/kernel", QKV_WEIGHT, IntoHeads),
    take("Transformer/encoderblock_*/MultiHeadDotProductAttention_0/{query,key,value}/bias", QKV_BIAS, HeadsBias),
    take("Transformer/encoderblock_*/MultiHeadDotProductAttention_0/out/kernel", "blocks.*.attn.proj.weight", OutOfHeads),
    copy("Transformer/encoderblock_*/MultiHeadDotProductAttention_0/out/bias", "blocks.*.attn.proj.bias"),
    copy("Transformer/encoderblock_*/LayerNorm_1/scale", "blocks.*.norm2.weight"),
    copy("Transformer/encoderblock_*/LayerNorm_1/bias", "blocks.*.norm2.bias"),
    take("Transformer/encoderblock_*/MlpBlock_0/Dense_0/kernel", "blocks.*.mlp.fc1.weight", Transposed),
    copy("Transformer/encoderblock_*/MlpBlock_0/Dense_0/bias", "blocks.*.mlp.fc1.bias"),
    take("Transformer/encoderblock_*/MlpBlock_0/Dense_1/kernel", "blocks.*.mlp.fc2.weight", Transposed),
    copy("Transformer/encoderblock_*/MlpBlock_0/Dense_1/bias", "blocks.*.mlp.fc2.bias"),
    skip("head/**", HEAD),
    skip("pre_logits/**", HEAD),
];
