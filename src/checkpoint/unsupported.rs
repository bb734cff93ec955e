//! What a file holds that this crate does not support, told by the names of its tensors.

/// A family of models that is not supported.
struct Unsupported {
    name: &'static str,
    /// What the crate lacks for it.
    lacks: &'static str,
    /// Its files have each of these whole segments, next to each other, in the name of a tensor.
    marks: &'static [&'static str],
}

const fn family(
    name: &'static str,
    lacks: &'static str,
    marks: &'static [&'static str],
) -> Unsupported {
    Unsupported { name, lacks, marks }
}

/// The families, the ones with more particular marks first.
#[rustfmt::skip]
const FAMILIES: &[Unsupported] = &[
    family("an adapter of PEFT, without the backbone", "weights of a backbone", &["lora_A"]),
    family("Swin V2 CR", "its cosine attention and position bias, which differ from those of Swin V2", &["attn.meta_mlp"]),
    family("an image tower of open_clip that is timm's Swin", "its place in the file", &["visual.trunk", "layers.0.blocks"]),
    family("an image tower of open_clip that is timm's ConvNeXt", "its place in the file", &["visual.trunk", "stages.0"]),
    family("an image tower of open_clip that is timm's", "its architecture", &["visual.trunk"]),
    family("SAM", "decomposed relative positions", &["rel_pos_h"]),
    family("a ViT with differential attention", "this attention", &["lambda_q1"]),
    family("a ViT whose attention and MLP are parallel", "such blocks", &["in_proj", "mlp_out_proj"]),
    family("a ViT with several attentions and MLPs in a block", "such blocks", &["attns.0", "ffns.0"]),
    family("a ViT with a norm of queries and keys", "this norm", &["attn.q_norm"]),
    family("a ResNet of CLIP", "residual networks", &["visual.layer1", "visual.attnpool"]),
    family("a ResNet", "residual networks", &["layer1.0.conv1", "layer4"]),
];

/// Returns what a file with these tensor names holds, if it is of a family that is known and not
/// supported. At least one mark of the family must be among `unknown`, the names without a rule.
pub(super) fn unsupported(names: &[&str], unknown: &[&str]) -> Option<String> {
    let any = |names: &[&str], mark: &str| names.iter().any(|name| has_segments(name, mark));
    let found = FAMILIES.iter().find(|family| {
        family.marks.iter().all(|mark| any(names, mark))
            && family.marks.iter().any(|mark| any(unknown, mark))
    })?;
    let (name, lacks) = (found.name, found.lacks);
    Some(format!("it is {name}, which is not supported; what is missing here: {lacks}"))
}

/// Returns whether the segments of `mark` are next to each other in `name`.
fn has_segments(name: &str, mark: &str) -> bool {
    name.match_indices(mark).any(|(at, _)| {
        let (before, after) = (&name[..at], &name[at + mark.len()..]);
        (before.is_empty() || before.ends_with('.')) && (after.is_empty() || after.starts_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_whole_segments() {
        assert!(has_segments("a.b.c", "b") && has_segments("b.c", "b.c"));
        assert!(!has_segments("a.bb.c", "b") && !has_segments("ab.c", "b.c"));
        assert!(has_segments("bb.b", "b"));
    }

    #[test]
    fn a_family_is_told_by_all_of_its_marks() {
        let of = |names: &[&str]| unsupported(names, names);
        let swin = ["visual.trunk.layers.0.blocks.0.norm1.weight", "visual.trunk.norm.weight"];
        assert!(of(&swin).unwrap().contains("timm's Swin"));
        assert!(of(&swin[1..]).unwrap().contains("its architecture"));
        assert_eq!(unsupported(&swin, &["head.weight"]), None);
        assert_eq!(of(&["blocks.0.norm1.weight", "norm.weight"]), None);
    }
}
