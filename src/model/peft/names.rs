//! The names of the linear layers that PEFT adapts, one table for each family.

use super::PeftNames;
use crate::petl::LinearTarget::{self, Fc1, Fc2, K, Proj, Q, V};

/// The prefix of every name in a file of PEFT, which comes from its wrappers.
pub(super) const WRAPPERS: &str = "base_model.model.";

/// Names of the head in base models whose head is a linear layer over the features.
pub(super) const HEADS: [&str; 4] = ["classifier", "head", "head.fc", "fc"];

/// Modules that are left out, because the features do not depend on them.
const UNUSED: [&str; 2] = [
    // The pooler of Hugging Face's ViTModel, which no other module reads.
    "pooler.dense",
    // The prefix of all modules in the text tower of CLIPModel.
    "text_model",
];

/// The block names of a family of base models.
#[derive(Debug)]
pub(super) struct PeftFamily {
    /// Whether the MLPs are gated, if another family has the same names with another meaning.
    pub(super) gated: Option<bool>,
    /// Name of the list of blocks, which precedes the number of a block.
    pub(super) blocks: &'static str,
    pub(super) modules: &'static [Module],
}

/// A linear layer of a block.
#[derive(Debug)]
pub(super) struct Module {
    /// Path of the layer within the block.
    path: &'static str,
    /// The layers of this crate whose concatenated outputs are the outputs of this layer.
    pub(super) targets: &'static [LinearTarget],
    /// The part of its single target's outputs that this layer computes, and the number of parts.
    pub(super) part: (i64, i64),
}

const fn whole(path: &'static str, targets: &'static [LinearTarget]) -> Module {
    Module { path, targets, part: (0, 1) }
}

/// Creates one of the two layers, gate and value, that `fc1` of a SwiGLU packs.
const fn half(path: &'static str, index: i64) -> Module {
    Module { path, targets: &[Fc1], part: (index, 2) }
}

#[rustfmt::skip]
const VIT: PeftFamily = PeftFamily { gated: None, blocks: "layers", modules: &[
    whole("attention.q_proj", &[Q]),
    whole("attention.k_proj", &[K]),
    whole("attention.v_proj", &[V]),
    whole("attention.o_proj", &[Proj]),
    whole("mlp.fc1",          &[Fc1]),
    whole("mlp.fc2",          &[Fc2]),
] };

#[rustfmt::skip]
const VIT_4: PeftFamily = PeftFamily { gated: None, blocks: "encoder.layer", modules: &[
    whole("attention.attention.query", &[Q]),
    whole("attention.attention.key",   &[K]),
    whole("attention.attention.value", &[V]),
    whole("attention.output.dense",    &[Proj]),
    whole("intermediate.dense",        &[Fc1]),
    whole("output.dense",              &[Fc2]),
] };

#[rustfmt::skip]
const DINOV2: PeftFamily = PeftFamily { gated: None, blocks: "encoder.layer", modules: &[
    whole("attention.q_proj", &[Q]),
    whole("attention.k_proj", &[K]),
    whole("attention.v_proj", &[V]),
    whole("attention.o_proj", &[Proj]),
    whole("mlp.fc1",          &[Fc1]),
    whole("mlp.fc2",          &[Fc2]),
] };

#[rustfmt::skip]
const DINOV2_SWIGLU: PeftFamily = PeftFamily { gated: None, blocks: "encoder.layer", modules: &[
    whole("attention.q_proj", &[Q]),
    whole("attention.k_proj", &[K]),
    whole("attention.v_proj", &[V]),
    whole("attention.o_proj", &[Proj]),
    half("mlp.gate_proj",     0),
    half("mlp.up_proj",       1),
    whole("mlp.down_proj",    &[Fc2]),
] };

#[rustfmt::skip]
const DINOV2_4: PeftFamily = PeftFamily { gated: None, blocks: "encoder.layer", modules: &[
    whole("attention.attention.query", &[Q]),
    whole("attention.attention.key",   &[K]),
    whole("attention.attention.value", &[V]),
    whole("attention.output.dense",    &[Proj]),
    whole("mlp.fc1",                   &[Fc1]),
    whole("mlp.fc2",                   &[Fc2]),
] };

#[rustfmt::skip]
const DINOV2_4_SWIGLU: PeftFamily = PeftFamily { gated: None, blocks: "encoder.layer", modules: &[
    whole("attention.attention.query", &[Q]),
    whole("attention.attention.key",   &[K]),
    whole("attention.attention.value", &[V]),
    whole("attention.output.dense",    &[Proj]),
    whole("mlp.weights_in",            &[Fc1]),
    whole("mlp.weights_out",           &[Fc2]),
] };

#[rustfmt::skip]
const CLIP: PeftFamily = PeftFamily { gated: None, blocks: "encoder.layers", modules: &[
    whole("self_attn.q_proj",   &[Q]),
    whole("self_attn.k_proj",   &[K]),
    whole("self_attn.v_proj",   &[V]),
    whole("self_attn.out_proj", &[Proj]),
    whole("mlp.fc1",            &[Fc1]),
    whole("mlp.fc2",            &[Fc2]),
] };

#[rustfmt::skip]
const TIMM: PeftFamily = PeftFamily { gated: None, blocks: "blocks", modules: &[
    whole("attn.qkv",  &[Q, K, V]),
    whole("attn.proj", &[Proj]),
    whole("mlp.fc1",   &[Fc1]),
    whole("mlp.fc2",   &[Fc2]),
] };

/// The names of DINOv3 and, because only the last segment of the list's name is compared, those in
/// transformers 5, whose list is `model.layer`.
#[rustfmt::skip]
const DINOV3: PeftFamily = PeftFamily { gated: Some(false), blocks: "layer", modules: &[
    whole("attention.q_proj", &[Q]),
    whole("attention.k_proj", &[K]),
    whole("attention.v_proj", &[V]),
    whole("attention.o_proj", &[Proj]),
    whole("mlp.up_proj",      &[Fc1]),
    whole("mlp.down_proj",    &[Fc2]),
] };

#[rustfmt::skip]
const DINOV3_GATED: PeftFamily = PeftFamily { gated: Some(true), blocks: "layer", modules: DINOV2_SWIGLU.modules };

/// The names of ViT-g in the DINOv2 repository.
#[rustfmt::skip]
const DINOV2_REPOSITORY: PeftFamily = PeftFamily { gated: None, blocks: "blocks", modules: &[
    whole("mlp.w12", &[Fc1]),
    whole("mlp.w3",  &[Fc2]),
] };

/// The names of timm's AIMv2.
#[rustfmt::skip]
const TIMM_GATED: PeftFamily = PeftFamily { gated: None, blocks: "blocks", modules: &[
    whole("attn.qkv",  &[Q, K, V]),
    whole("attn.proj", &[Proj]),
    half("mlp.fc1_g",  0),
    half("mlp.fc1_x",  1),
    whole("mlp.fc2",   &[Fc2]),
] };

/// The names in timm's models whose queries, keys and values have separate layers, such as EVA-02.
#[rustfmt::skip]
const TIMM_SPLIT: PeftFamily = PeftFamily { gated: None, blocks: "blocks", modules: &[
    whole("attn.q_proj", &[Q]),
    whole("attn.k_proj", &[K]),
    whole("attn.v_proj", &[V]),
] };

#[rustfmt::skip]
const AIMV2: PeftFamily = PeftFamily { gated: None, blocks: "encoder.layers", modules: &[
    whole("attention.q_proj",   &[Q]),
    whole("attention.k_proj",   &[K]),
    whole("attention.v_proj",   &[V]),
    whole("attention.out_proj", &[Proj]),
    half("ffn.gate_proj",       0),
    half("ffn.up_proj",         1),
    whole("ffn.down_proj",      &[Fc2]),
] };

const FAMILIES: [&PeftFamily; 14] = [
    &VIT,
    &VIT_4,
    &DINOV2,
    &DINOV2_SWIGLU,
    &DINOV2_4,
    &DINOV2_4_SWIGLU,
    &CLIP,
    &TIMM,
    &TIMM_GATED,
    &TIMM_SPLIT,
    &AIMV2,
    &DINOV2_REPOSITORY,
    &DINOV3,
    &DINOV3_GATED,
];

impl PeftNames {
    /// Returns the table to write with, for a backbone with or without SwiGLU.
    pub(super) fn family(self, swiglu: bool) -> &'static PeftFamily {
        match (self, swiglu) {
            (PeftNames::Vit, _) => &VIT,
            (PeftNames::Vit4, _) => &VIT_4,
            (PeftNames::Dinov2, false) => &DINOV2,
            (PeftNames::Dinov2, true) => &DINOV2_SWIGLU,
            (PeftNames::Dinov2V4, false) => &DINOV2_4,
            (PeftNames::Dinov2V4, true) => &DINOV2_4_SWIGLU,
            (PeftNames::Clip, _) => &CLIP,
            (PeftNames::Timm, _) => &TIMM,
            (PeftNames::TimmGated, _) => &TIMM_GATED,
            (PeftNames::Aimv2, _) => &AIMV2,
            (PeftNames::Dinov3, false) => &DINOV3,
            (PeftNames::Dinov3, true) => &DINOV3_GATED,
        }
    }
}

impl PeftFamily {
    /// Returns the path of `module` in block `number` of a base model, after `prefix`.
    pub(super) fn path(&self, prefix: &str, number: usize, module: &Module) -> String {
        format!("{prefix}{}.{number}.{}", self.blocks, module.path)
    }
}

/// The position of a module in a base model.
#[derive(Clone, Copy, Debug)]
pub(super) struct ModulePlace<'a> {
    /// The path before the number of the block, which is the same for all blocks of a tower.
    pub(super) tower: &'a str,
    pub(super) block: usize,
    pub(super) module: &'static Module,
}

/// Returns the position of the module at `path`, with any wrapper around its tower. `gated` is
/// whether the MLPs of the backbone are gated.
pub(super) fn locate(path: &str, gated: bool) -> Option<ModulePlace<'_>> {
    path.match_indices('.').find_map(|(at, _)| {
        let (tower, (number, below)) = (&path[..at], path[at + 1..].split_once('.')?);
        let block: usize =
            number.parse().ok().filter(|block: &usize| block.to_string() == number)?;
        let families = FAMILIES.iter().filter(|family| {
            ends_with(tower, family.blocks) && family.gated.is_none_or(|wanted| wanted == gated)
        });
        let module = families.flat_map(|family| family.modules).find(|m| m.path == below)?;
        Some(ModulePlace { tower, block, module })
    })
}

/// Returns whether the module at `path` is a head.
pub(super) fn is_head(path: &str) -> bool {
    HEADS.iter().any(|head| ends_with(path, head))
}

/// Returns whether the features do not depend on the module at `path`.
pub(super) fn is_unused(path: &str) -> bool {
    UNUSED.iter().any(|unused| format!(".{path}.").contains(&format!(".{unused}.")))
}

/// Returns whether the last segments of `path` are those of `tail`.
fn ends_with(path: &str, tail: &str) -> bool {
    path.strip_suffix(tail).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_that_is_written_is_found_again() {
        for family in FAMILIES {
            for module in family.modules {
                for prefix in ["", "vit.", "model.vision_model."] {
                    let path = family.path(prefix, 11, module);
                    let gated = family.gated.unwrap_or(false);
                    let place = locate(&path, gated).expect(&path);
                    assert_eq!(place.tower, format!("{prefix}{}", family.blocks));
                    assert_eq!((place.block, place.module.path), (11, module.path));
                    assert_eq!(place.module.targets, module.targets);
                    assert_eq!(place.module.part, module.part);
                    assert!(!is_head(&path) && !is_unused(&path));
                }
            }
        }
    }

    #[test]
    fn whole_segments_match() {
        for path in [
            "vit.layers.01.mlp.fc1",
            "vit.layers.+1.mlp.fc1",
            "vit.layers.mlp.fc1",
            "vit.sublayers.1.mlp.fc1",
            "vit.layers.1.mlp.fc1.x",
            "vit.layers.1.attn.qkv",
            "layers.99999999999999999999.mlp.fc1",
            "",
        ] {
            assert!(locate(path, false).is_none(), "{path}");
        }
        assert!(is_head("model.classifier") && is_head("head.fc") && !is_head("heads"));
        assert!(is_unused("vit.pooler.dense") && !is_unused("vit.pooler.dense2"));
        assert!(is_unused("text_model.encoder.layers.0.mlp.fc1") && !is_unused("context_model.x"));
    }
}
