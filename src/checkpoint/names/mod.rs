//! The names of each model family, one table a file.
//!
//! A rule maps a name of the file to the name that the model has for it, which is timm's. It
//! matches whole path segments. In a pattern `*` stands for a number (of a block or a stage), `*+1`
//! for one more than it, `{a,b}` for one of these, and a last segment `**` for whatever follows. The tensors of the names in braces are, in
//! this order, the parts of one tensor of the model.

mod convnext;
mod google;
mod hf_clip;
mod hf_dinov2;
mod hf_vit;
mod open_clip;
mod swin;
mod timm;

use tch::Tensor;

use crate::backbone::{ClipTextConfig, Network, ViTConfig};
use crate::error::Result;

/// A family of checkpoints: how its files are recognized, and its names.
#[derive(Debug)]
pub(super) struct Family {
    /// What people call it.
    pub(super) name: &'static str,
    /// The family of backbones that its files are of, [`Network::FAMILY`], or the text tower.
    pub(super) backbone: &'static str,
    /// What separates the segments of a name.
    pub(super) separator: char,
    /// What may stand before the names of `rules`; the empty one is listed where it may be.
    pub(super) prefixes: &'static [&'static str],
    /// A file that has one of these, behind one prefix, is of this family.
    pub(super) signatures: &'static [&'static str],
    /// The names of the backbone, in tables that families may share.
    pub(super) rules: &'static [&'static [Rule]],
    /// The names around it, which take no prefix.
    pub(super) around: &'static [Rule],
    /// Epsilon of the layer norms; files do not tell it.
    pub(super) norm_eps: f64,
    /// The activation of an MLP that is not packed; files do not tell it.
    pub(super) activation: Activation,
    /// Which prefix tokens have rows in the position table; files do not tell it.
    pub(super) positions: Positions,
}

/// Which activation a family has.
#[derive(Debug)]
pub(super) enum Activation {
    Gelu,
    QuickGelu,
    /// QuickGELU in files that have one of these tensors, else exact GELU.
    QuickGeluBeside(&'static [&'static str]),
}

/// Which prefix tokens have rows in the position table.
#[derive(Debug)]
pub(super) enum Positions {
    /// There is no table.
    None,
    /// The class token, where there is one.
    Class,
    /// None, the class token, or all; usually none in files that have this tensor, else the class
    /// token.
    UsuallyNoneBeside(&'static str),
}

/// Every family, in the order in which they are tried.
pub(super) const FAMILIES: [&Family; 10] = [
    &google::FAMILY,
    &timm::FAMILY,
    &hf_vit::FAMILY,
    &hf_dinov2::FAMILY,
    &hf_clip::FAMILY,
    &open_clip::FAMILY,
    &swin::MICROSOFT,
    &swin::TIMM,
    &convnext::TIMM,
    &convnext::FACEBOOK,
];

/// Those of text towers. A file of both towers is also of one of [`FAMILIES`].
pub(super) const TEXT_FAMILIES: [&Family; 2] = [&hf_clip::TEXT_FAMILY, &open_clip::TEXT_FAMILY];

/// What happens to the tensors of a name.
#[derive(Debug)]
pub(super) struct Rule {
    /// Pattern of the name in the file.
    pub(super) from: &'static str,
    pub(super) action: Action,
}

/// What becomes of a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    /// It is the model's tensor of this name, or a part of it.
    Take { to: &'static str, layout: Layout },
    /// It belongs to nothing that is computed here, for this reason.
    Skip(&'static str),
}

/// A part of a fused tensor along its first dimension: which one, of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Part {
    pub(super) index: usize,
    pub(super) of: usize,
}

/// How a tensor of the model lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// As in the model; leading dimensions of one may be left out.
    Same,
    /// Flax and CLIP's bare matrices: `[in, out]` for `[out, in]`.
    Transposed,
    /// A Flax convolution: `[h, w, in, out]` for `[out, in, h, w]`.
    Hwio,
    /// A Flax projection into heads: `[in, heads, d]` for `[heads * d, in]`.
    IntoHeads,
    /// Its bias: `[heads, d]` for `[heads * d]`.
    HeadsBias,
    /// A Flax projection out of heads: `[heads, d, out]` for `[out, heads * d]`.
    OutOfHeads,
}

const fn take(from: &'static str, to: &'static str, layout: Layout) -> Rule {
    Rule { from, action: Action::Take { to, layout } }
}

const fn copy(from: &'static str, to: &'static str) -> Rule {
    take(from, to, Layout::Same)
}

const fn skip(from: &'static str, reason: &'static str) -> Rule {
    Rule { from, action: Action::Skip(reason) }
}

const QKV_WEIGHT: &str = "blocks.*.attn.qkv.weight";
const QKV_BIAS: &str = "blocks.*.attn.qkv.bias";

const VIT: &str = ViTConfig::FAMILY;
const CLIP_TEXT: &str = ClipTextConfig::FAMILY;

const HEAD: &str = "a classification head; features are read before it";
const POOLER: &str = "the pooler; features are read before it";
const MASK: &str = "only used to pretrain on masked images";
const TEXT: &str = "the text tower";
const IMAGE: &str = "the image tower";
const INDICES: &str = "position numbers, not weights";
const NUMBERS: &str = "numbers about the model, not weights";

impl Family {
    /// The rule for a name of a file of this family whose backbone stands behind `prefix`, and how
    /// it matches.
    pub(super) fn find(&self, prefix: &str, name: &str) -> Option<(&'static Rule, Match)> {
        self.rules(prefix).find_map(|(prefix, rule)| {
            Some((rule, matches(rule.from, name.strip_prefix(prefix)?, self.separator)?))
        })
    }

    /// The name that a file of this family has for each part of the model's `name`: that of the
    /// first rule.
    pub(super) fn file_names(&self, prefix: &str, name: &str) -> Vec<(String, Layout, Part)> {
        for (prefix, rule) in self.rules(prefix) {
            let Action::Take { to, layout } = rule.action else { continue };
            let Some(Match { numbers, .. }) = matches(to, name, '.') else { continue };
            let file_name = |part| prefix.to_owned() + &Match { numbers, part }.fill(rule.from);
            return parts(rule.from).map(|part| (file_name(part), layout, part)).collect();
        }
        Vec::new()
    }

    /// Every name that a rule has for the numbers in `name`, to look for the one that is meant.
    pub(super) fn names_like(&self, prefix: &str, name: &str) -> Vec<String> {
        let digits =
            |segment: &str| parse_number(segment.trim_start_matches(|c: char| !c.is_ascii_digit()));
        let mut found = name.split(self.separator).filter_map(digits);
        let numbers = [found.next(), found.next()];
        let mut names = Vec::new();
        for (prefix, rule) in self.rules(prefix) {
            let filled = parts(rule.from).map(|part| Match { numbers, part }.fill(rule.from));
            names.extend(filled.map(|name| prefix.to_owned() + &name));
        }
        names
    }

    /// Every rule with what stands before its names.
    fn rules<'a>(
        &self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'static Rule)> + use<'a> {
        let own = self.rules.iter().copied().flatten().map(move |rule| (prefix, rule));
        own.chain(self.around.iter().map(|rule| ("", rule)))
    }
}

/// What the variable places of a pattern stand for in a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Match {
    /// The numbers for each `*`, in order.
    pub(super) numbers: [Option<u32>; 2],
    /// Which of the names in braces; the whole where there are none.
    pub(super) part: Part,
}

impl Match {
    /// The name that `pattern` matches with these values.
    pub(super) fn fill(self, pattern: &str) -> String {
        let mut name = match braces(pattern) {
            Some((before, names, after)) => [before, names[self.part.index], after].concat(),
            None => pattern.to_owned(),
        };
        for number in self.numbers.into_iter().flatten() {
            let Some(at) = name.find('*') else { break };
            let next = name[at..].starts_with("*+1");
            let (len, number) = if next { (3, number.saturating_add(1)) } else { (1, number) };
            name.replace_range(at..at + len, &number.to_string());
        }
        name
    }
}

/// Matches `name` to `pattern` segment by segment.
fn matches(pattern: &str, name: &str, separator: char) -> Option<Match> {
    let (mut pattern, mut name) = (pattern.split(separator), name.split(separator));
    let mut result = Match { numbers: [None; 2], part: Part { index: 0, of: 1 } };
    loop {
        let (wanted, found) = match (pattern.next(), name.next()) {
            (None, None) | (Some("**"), Some(_)) => return Some(result),
            (Some(wanted), Some(found)) => (wanted, found),
            _ => return None,
        };
        if let Some((stem, offset)) = star(wanted) {
            let number = parse_number(found.strip_prefix(stem)?)?.checked_sub(offset)?;
            let place = result.numbers.iter_mut().find(|place| place.is_none())?;
            *place = Some(number);
        } else if let Some((before, names, after)) = braces(wanted) {
            let found = found.strip_prefix(before)?.strip_suffix(after)?;
            let index = names.iter().position(|&name| name == found)?;
            result.part = Part { index, of: names.len() };
        } else if wanted != found {
            return None;
        }
    }
}

/// What stands in front of a number in a segment of a pattern, and what is added to it.
fn star(segment: &str) -> Option<(&str, u32)> {
    let next = segment.strip_suffix("*+1").map(|stem| (stem, 1));
    next.or_else(|| Some((segment.strip_suffix('*')?, 0)))
}

/// The part for each name that `pattern` has in braces; the whole where there are none.
fn parts(pattern: &str) -> impl Iterator<Item = Part> {
    let of = braces(pattern).map_or(1, |(_, names, _)| names.len());
    (0..of).map(move |index| Part { index, of })
}

/// What stands before the braces of a pattern, the names within, and what stands after.
fn braces(pattern: &str) -> Option<(&str, Vec<&str>, &str)> {
    let (before, rest) = pattern.split_once('{')?;
    let (names, after) = rest.split_once('}')?;
    Some((before, names.split(',').collect(), after))
}

/// A number as a program writes it: no sign, no leading zero.
fn parse_number(digits: &str) -> Option<u32> {
    let number: u32 = digits.parse().ok()?;
    (number.to_string() == digits).then_some(number)
}

impl Layout {
    /// The order in which the dimensions of the file make those of the model, heads apart.
    fn order(self) -> &'static [i64] {
        match self {
            Layout::Same => &[],
            Layout::Transposed => &[1, 0],
            Layout::Hwio => &[3, 2, 0, 1],
            Layout::IntoHeads => &[1, 2, 0],
            Layout::HeadsBias => &[0, 1],
            Layout::OutOfHeads => &[2, 0, 1],
        }
    }

    /// The model's shape of a tensor that has this shape in the file; `None` if it has another
    /// number of dimensions.
    pub(super) fn to_model(self, file: &[i64]) -> Option<Vec<i64>> {
        if self == Layout::Same {
            return Some(file.to_vec());
        }
        let order = self.order();
        let d: Vec<_> = (file.len() == order.len())
            .then(|| order.iter().map(|&at| file[at as usize]).collect())?;
        Some(match self {
            Layout::IntoHeads => vec![d[0].checked_mul(d[1])?, d[2]],
            Layout::HeadsBias => vec![d[0].checked_mul(d[1])?],
            Layout::OutOfHeads => vec![d[0], d[1].checked_mul(d[2])?],
            _ => d,
        })
    }

    /// The shape in the file of a tensor that has this shape in the model.
    pub(super) fn to_file(self, model: &[i64], heads: i64) -> Vec<i64> {
        match (self, model) {
            (Layout::Transposed, &[out, inner]) => vec![inner, out],
            (Layout::Hwio, &[out, inner, h, w]) => vec![h, w, inner, out],
            (Layout::IntoHeads, &[out, inner]) => vec![inner, heads, out / heads],
            (Layout::HeadsBias, &[out]) => vec![heads, out / heads],
            (Layout::OutOfHeads, &[out, inner]) => vec![heads, inner / heads, out],
            _ => model.to_vec(),
        }
    }

    /// The tensor of the file as the model has it, in `shape`.
    pub(super) fn apply(self, tensor: &Tensor, shape: &[i64]) -> Result<Tensor> {
        match self {
            Layout::Same => Ok(tensor.f_reshape(shape)?),
            _ => Ok(tensor.f_permute(self.order())?.f_reshape(shape)?.f_contiguous()?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_segments() {
        for (pattern, name, found) in [
            ("blocks.*.norm1.weight", "blocks.3.norm1.weight", Some(([Some(3), None], 0, 1))),
            ("blocks.*.norm1.weight", "blocks.03.norm1.weight", None),
            ("blocks.*.norm1.weight", "blocks.+3.norm1.weight", None),
            ("blocks.*.norm1.weight", "blocks.3.norm1.weight.x", None),
            ("blocks.*.norm1.weight", "blocks.3.norm1", None),
            ("head.**", "head.weight", Some(([None; 2], 0, 1))),
            ("head.**", "head", None),
            ("head.**", "head_dist.weight", None),
            ("layers.*.b.*.x", "layers.2.b.5.x", Some(([Some(2), Some(5)], 0, 1))),
            ("layers.*+1.x", "layers.1.x", Some(([Some(0), None], 0, 1))),
            ("layers.*+1.x", "layers.0.x", None),
            ("{query,key,value}.bias", "query.bias", Some(([None; 2], 0, 3))),
            ("{query,key,value}.bias", "value.bias", Some(([None; 2], 2, 3))),
            ("{query,key,value}.bias", "query,key.bias", None),
            ("layers.*.{q,k,v}_proj.bias", "layers.7.k_proj.bias", Some(([Some(7), None], 1, 3))),
            ("layers.*.{q,k,v}_proj.bias", "layers.7.qk_proj.bias", None),
            ("layers.*.{q,k,v}_proj.bias", "layers.7.k.bias", None),
        ] {
            let found =
                found.map(|(numbers, index, of)| Match { numbers, part: Part { index, of } });
            assert_eq!(matches(pattern, name, '.'), found, "{name}");
        }
        let found = matches("a/block_*/k", "a/block_11/k", '/');
        assert_eq!(found.map(|found| found.numbers), Some([Some(11), None]));
    }

    #[test]
    fn shapes_go_both_ways() {
        for (layout, file, model) in [
            (Layout::Same, vec![2, 3], vec![2, 3]),
            (Layout::Transposed, vec![3, 2], vec![2, 3]),
            (Layout::Hwio, vec![4, 5, 3, 8], vec![8, 3, 4, 5]),
            (Layout::IntoHeads, vec![12, 2, 5], vec![10, 12]),
            (Layout::HeadsBias, vec![2, 5], vec![10]),
            (Layout::OutOfHeads, vec![2, 5, 12], vec![12, 10]),
        ] {
            assert_eq!(layout.to_model(&file).unwrap(), model);
            assert_eq!(layout.to_file(&model, 2), file);
            let tensor = Tensor::zeros(&file, (tch::Kind::Float, tch::Device::Cpu));
            assert_eq!(layout.apply(&tensor, &model).unwrap().size(), model);
        }
    }

    #[test]
    fn each_name_of_a_table_leads_back_to_itself() {
        for (family, prefix, before, rule) in every_rule() {
            let Action::Take { to, .. } = rule.action else { continue };
            let numbers = numbers_for(to);
            for part in parts(rule.from) {
                let matched = Match { numbers, part };
                let name = before.to_owned() + &matched.fill(rule.from);
                let (found, how) = family.find(prefix, &name).expect(&name);
                assert_eq!((found.from, how), (rule.from, matched), "{}", family.name);
            }
        }
    }

    #[test]
    fn the_file_names_of_a_tensor_lead_to_it() {
        for (family, prefix, _, rule) in every_rule() {
            let Action::Take { to, .. } = rule.action else { continue };
            let numbers = numbers_for(to);
            let to_name = Match { numbers, part: Part { index: 0, of: 1 } }.fill(to);
            let names = family.file_names(prefix, &to_name);
            assert_eq!(names.len(), names[0].2.of, "{}: {to}", family.name);
            for (name, layout, part) in names {
                let (found, how) = family.find(prefix, &name).expect(&name);
                assert_eq!(how, Match { numbers, part }, "{name}");
                assert!(
                    matches!(found.action, Action::Take { to: t, layout: l } if t == to && l == layout),
                    "{name}"
                );
            }
        }
    }

    /// Numbers for the stars of a pattern.
    fn numbers_for(pattern: &str) -> [Option<u32>; 2] {
        let stars = pattern.matches('*').count();
        [(stars > 0).then_some(7), (stars > 1).then_some(3)]
    }

    /// Each rule with its family, a prefix, and what stands before the rule's names beside it.
    fn every_rule()
    -> impl Iterator<Item = (&'static Family, &'static str, &'static str, &'static Rule)> {
        let prefixes = |family: &'static Family| family.prefixes.iter().map(move |p| (family, *p));
        FAMILIES.into_iter().chain(TEXT_FAMILIES).flat_map(prefixes).flat_map(|(family, prefix)| {
            family.rules(prefix).map(move |(before, rule)| (family, prefix, before, rule))
        })
    }
}
