//! The tensor names of each model family, one table in each file.
//!
//! A rule maps a name in the file to the model's name, which is timm's name. A pattern matches
//! whole path segments. `*` stands for a number (of a block or a stage), `*+1` for that number plus
//! one, `*x2` for twice the number, `*x2+1` for one more than that, `{a,b}` for one of the listed
//! names, and a last segment `**` for any rest. The tensors whose names are listed in braces are,
//! in this order, the equal parts of one tensor of the model. A name that is listed twice stands for
//! a tensor of two parts, and a part whose name ends with `?` is zero if the file does not have it.

mod aimv2;
mod convnext;
mod dinov3;
mod google;
mod hf_beit;
mod hf_clip;
mod hf_dinov2;
mod hf_siglip;
mod hf_vit;
mod open_clip;
mod swin;
mod timm;
mod torchvision;

use tch::Tensor;

use crate::backbone::{ClipTextConfig, Network, ViTConfig};
use crate::error::Result;

/// A family of checkpoints: its tensor names and how its files are recognized.
#[derive(Debug)]
pub(super) struct Family {
    /// Name of the family in error messages.
    pub(super) name: &'static str,
    /// The backbone that its files hold: [`Network::FAMILY`] of a config, or the text tower.
    pub(super) backbone: &'static str,
    /// Separator of the segments of a name.
    pub(super) separator: char,
    /// Possible prefixes of the names in `rules`. The empty prefix is listed if it is possible.
    pub(super) prefixes: &'static [&'static str],
    /// A file belongs to this family if it has one of these names after one of the prefixes.
    pub(super) signatures: &'static [&'static str],
    /// Rules for the names of the backbone, in tables that several families may share.
    pub(super) rules: &'static [&'static [Rule]],
    /// Rules for the names outside the backbone, which have no prefix.
    pub(super) around: &'static [Rule],
    /// Epsilon of the layer norms, which the tensors do not show.
    pub(super) norm_eps: f64,
    /// Activation of an MLP that is not packed, which the tensors do not show.
    pub(super) activation: Activation,
    /// Which prefix tokens have rows in the position table, which the tensors do not show.
    pub(super) positions: PositionNames,
}

/// The activation of a family.
#[derive(Debug)]
pub(super) enum Activation {
    Gelu,
    GeluTanh,
    QuickGelu,
    /// QuickGELU in files that have one of these tensors, otherwise exact GELU.
    QuickGeluBeside(&'static [&'static str]),
}

/// Which prefix tokens have rows in the position table.
#[derive(Debug)]
pub(super) enum PositionNames {
    /// There is no position table.
    None,
    /// The class token, if there is one.
    Class,
    /// All of them.
    AllPrefix,
    /// None, the class token, or all prefix tokens. The usual case is none in files that have this
    /// tensor, and the class token in other files.
    UsuallyNoneBeside(&'static str),
}

/// All families of backbones, in the order in which they are tried.
pub(super) const FAMILIES: [&Family; 26] = [
    &google::SIGLIP,
    &google::FAMILY,
    &dinov3::META,
    &timm::FAMILY,
    &dinov3::HUGGING_FACE_GATED,
    &dinov3::HUGGING_FACE,
    &hf_beit::FAMILY,
    &hf_vit::FAMILY,
    &hf_dinov2::FAMILY,
    &hf_clip::FAMILY,
    &hf_siglip::FAMILY,
    &aimv2::HUGGING_FACE,
    &aimv2::APPLE,
    &open_clip::FAMILY,
    &swin::MICROSOFT,
    &swin::TIMM,
    &swin::HUGGING_FACE,
    &swin::HUGGING_FACE_V2,
    &convnext::TIMM,
    &convnext::FACEBOOK,
    &convnext::HUGGING_FACE,
    &convnext::HUGGING_FACE_DINOV3,
    &torchvision::VIT_FAMILY,
    &torchvision::SWIN,
    &torchvision::SWIN_V2,
    &torchvision::CONVNEXT,
];

pub(super) use dinov3::{HUGGING_FACE as HF_DINOV3, HUGGING_FACE_GATED as HF_DINOV3_GATED};
pub(super) use hf_clip::FAMILY as HF_CLIP;
pub(super) use hf_dinov2::FAMILY as HF_DINOV2;
pub(super) use hf_siglip::FAMILY as HF_SIGLIP;
pub(super) use hf_vit::FAMILY as HF_VIT;
pub(super) use timm::FAMILY as TIMM;

/// All families of text towers. A file with both towers also belongs to one of [`FAMILIES`].
pub(super) const TEXT_FAMILIES: [&Family; 2] = [&hf_clip::TEXT_FAMILY, &open_clip::TEXT_FAMILY];

/// A name pattern and the action for the tensors that it matches.
#[derive(Debug)]
pub(super) struct Rule {
    /// Pattern of the name in the file.
    pub(super) from: &'static str,
    pub(super) action: Action,
}

/// The action for a tensor of the file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    /// Use it as the model's tensor `to`, or as a part of that tensor.
    Take { to: &'static str, layout: Layout },
    /// Skip it for this reason: the model does not need it.
    Skip(&'static str),
}

/// One part of a tensor that is fused along its first dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Part {
    /// Number of the part, from 0.
    pub(super) index: usize,
    /// Number of parts of the whole.
    pub(super) of: usize,
    /// Number of parts that this one consists of.
    pub(super) span: usize,
    /// Whether the part is zero if the file does not have it.
    pub(super) optional: bool,
}

impl Part {
    /// A tensor that is not fused of parts.
    pub(super) const WHOLE: Part = Part { index: 0, of: 1, span: 1, optional: false };
}

/// How the file lays out a tensor of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// As in the model. Leading dimensions of size one may be left out.
    Same,
    /// As in the model, or with more dimensions of size one at the end: the matrix of a linear layer
    /// as a 1x1 convolution, or a factor for each channel of a map.
    Pointwise,
    /// A matrix of Flax, or one of CLIP's bare matrices: `[in, out]` for `[out, in]`.
    Transposed,
    /// A Flax convolution: `[h, w, in, out]` for `[out, in, h, w]`.
    Hwio,
    /// A Flax projection into heads: `[in, heads, d]` for `[heads * d, in]`.
    IntoHeads,
    /// The bias of a Flax projection into heads: `[heads, d]` for `[heads * d]`.
    HeadsBias,
    /// A Flax projection out of heads: `[heads, d, out]` for `[out, heads * d]`.
    OutOfHeads,
    /// The bias of queries, keys and values whose middle third, that of the keys, is not used.
    NoKeys,
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
const BIAS_TABLE: &str = "blocks.*.attn.relative_position_bias_table";

/// The name of a bias table that all blocks of a ViT share.
pub(super) const SHARED_BIAS_TABLE: &str = "rel_pos_bias";

const VIT: &str = ViTConfig::FAMILY;
const CLIP_TEXT: &str = ClipTextConfig::FAMILY;

const HEAD: &str = "a classification head; the features are computed before it";
const POOLER: &str = "the pooler; the features are computed before it";
const MASK: &str = "only used for pretraining on masked images";
const DECODER: &str = "the decoder of the pretraining";
const TEXT: &str = "the text tower";
const IMAGE: &str = "the image tower";
const INDICES: &str = "position numbers, not weights";
const NUMBERS: &str = "numbers about the model, not weights";

impl Family {
    /// Returns the rule that matches `name` in a file of this family, and the match. `prefix` is
    /// the prefix of the backbone's names in the file.
    pub(super) fn find(&self, prefix: &str, name: &str) -> Option<(&'static Rule, Match)> {
        self.rules(prefix).find_map(|(prefix, rule)| {
            Some((rule, matches(rule.from, name.strip_prefix(prefix)?, self.separator)?))
        })
    }

    /// Returns, for each part of the model's tensor `name`, the name in a file of this family, its
    /// layout and the part. If several rules apply, the first one determines the names.
    pub(super) fn file_names(&self, prefix: &str, name: &str) -> Vec<(String, Layout, Part)> {
        self.file_names_of(prefix, name, |_| true)
    }

    /// Does the same as [`Family::file_names`] with the rules whose pattern is `wanted`.
    pub(super) fn file_names_of(
        &self,
        prefix: &str,
        name: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> Vec<(String, Layout, Part)> {
        for (prefix, rule) in self.rules(prefix).filter(|(_, rule)| wanted(rule.from)) {
            let Action::Take { to, layout } = rule.action else { continue };
            let Some(Match { numbers, .. }) = matches(to, name, '.') else { continue };
            let file_name = |part| prefix.to_owned() + &Match { numbers, part }.fill(rule.from);
            let parts = parts(rule.from).into_iter();
            return parts.map(|part| (file_name(part), layout, part)).collect();
        }
        Vec::new()
    }

    /// Returns all names that the rules give with the numbers in `name`. The caller searches them
    /// for the name that was meant.
    pub(super) fn names_like(&self, prefix: &str, name: &str) -> Vec<String> {
        let digits =
            |segment: &str| parse_number(segment.trim_start_matches(|c: char| !c.is_ascii_digit()));
        let mut found = name.split(self.separator).filter_map(digits);
        let numbers = [found.next(), found.next()];
        let mut names = Vec::new();
        for (prefix, rule) in self.rules(prefix) {
            let filled =
                parts(rule.from).into_iter().map(|part| Match { numbers, part }.fill(rule.from));
            names.extend(filled.map(|name| prefix.to_owned() + &name));
        }
        names
    }

    /// Returns every rule with the prefix of its names.
    fn rules<'a>(
        &self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'static Rule)> + use<'a> {
        let own = self.rules.iter().copied().flatten().map(move |rule| (prefix, rule));
        own.chain(self.around.iter().map(|rule| ("", rule)))
    }
}

/// The values of the variable places of a pattern for one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Match {
    /// The number for each `*`, in order.
    pub(super) numbers: [Option<u32>; 2],
    /// The part that a name in braces stands for; the whole tensor if there are no braces.
    pub(super) part: Part,
}

impl Match {
    /// Returns the name that `pattern` matches with these values.
    pub(super) fn fill(self, pattern: &str) -> String {
        let mut name = match braces(pattern) {
            Some((before, names, after)) => {
                let name = names[self.part.index].trim_end_matches('?');
                [before, name, after].concat()
            }
            None => pattern.to_owned(),
        };
        for number in self.numbers.into_iter().flatten() {
            let Some(at) = name.find('*') else { break };
            let Some((star, number)) = STARS.iter().find_map(|star| {
                name[at..].starts_with(star.text).then(|| (star, star.to_file(number)))
            }) else {
                break;
            };
            name.replace_range(at..at + star.text.len(), &number.to_string());
        }
        name
    }
}

/// Matches `name` to `pattern` segment by segment.
fn matches(pattern: &str, name: &str, separator: char) -> Option<Match> {
    let (mut pattern, mut name) = (pattern.split(separator), name.split(separator));
    let mut result = Match { numbers: [None; 2], part: Part::WHOLE };
    loop {
        let (wanted, found) = match (pattern.next(), name.next()) {
            (None, None) | (Some("**"), Some(_)) => return Some(result),
            (Some(wanted), Some(found)) => (wanted, found),
            _ => return None,
        };
        if let Some((stem, star)) = star(wanted) {
            let number = star.to_model(parse_number(found.strip_prefix(stem)?)?)?;
            let place = result.numbers.iter_mut().find(|place| place.is_none())?;
            *place = Some(number);
        } else if let Some((before, names, after)) = braces(wanted) {
            let found = found.strip_prefix(before)?.strip_suffix(after)?;
            let index = names.iter().position(|name| name.trim_end_matches('?') == found)?;
            result.part = part(&names, index);
        } else if wanted != found {
            return None;
        }
    }
}

/// A place for a number in a pattern.
#[derive(Debug)]
struct Star {
    text: &'static str,
    times: u32,
    plus: u32,
}

/// The places for numbers. One that starts with the text of another comes before it.
const STARS: [Star; 4] = [
    Star { text: "*x2+1", times: 2, plus: 1 },
    Star { text: "*x2", times: 2, plus: 0 },
    Star { text: "*+1", times: 1, plus: 1 },
    Star { text: "*", times: 1, plus: 0 },
];

impl Star {
    fn to_file(&self, number: u32) -> u32 {
        number.saturating_mul(self.times).saturating_add(self.plus)
    }

    fn to_model(&self, number: u32) -> Option<u32> {
        let rest = number.checked_sub(self.plus)?;
        (rest % self.times == 0).then(|| rest / self.times)
    }
}

/// Returns the text before the number in a segment of a pattern, and the place for the number.
fn star(segment: &str) -> Option<(&str, &'static Star)> {
    STARS.iter().find_map(|star| Some((segment.strip_suffix(star.text)?, star)))
}

/// Returns the part for each name in the braces of `pattern`; the whole if there are no braces.
pub(super) fn parts(pattern: &str) -> Vec<Part> {
    let Some((_, names, _)) = braces(pattern) else { return vec![Part::WHOLE] };
    let first = |index: &usize| *index == 0 || names[*index] != names[*index - 1];
    (0..names.len()).filter(first).map(|index| part(&names, index)).collect()
}

/// Returns the part that the name at `index` and the same names after it stand for.
fn part(names: &[&str], index: usize) -> Part {
    let span = names[index..].iter().take_while(|name| **name == names[index]).count();
    Part { index, of: names.len(), span, optional: names[index].ends_with('?') }
}

/// Returns the text before the braces of a pattern, the names in the braces, and the text after.
fn braces(pattern: &str) -> Option<(&str, Vec<&str>, &str)> {
    let (before, rest) = pattern.split_once('{')?;
    let (names, after) = rest.split_once('}')?;
    Some((before, names.split(',').collect(), after))
}

/// Parses a number as programs write it: without a sign and without leading zeros.
fn parse_number(digits: &str) -> Option<u32> {
    let number: u32 = digits.parse().ok()?;
    (number.to_string() == digits).then_some(number)
}

impl Layout {
    /// The permutation that turns the dimensions of the file into those of the model. The heads are
    /// still a dimension of their own.
    fn order(self) -> &'static [i64] {
        match self {
            Layout::Same | Layout::Pointwise | Layout::NoKeys => &[],
            Layout::Transposed => &[1, 0],
            Layout::Hwio => &[3, 2, 0, 1],
            Layout::IntoHeads => &[1, 2, 0],
            Layout::HeadsBias => &[0, 1],
            Layout::OutOfHeads => &[2, 0, 1],
        }
    }

    /// Returns the model's shape of a tensor with the shape `file` in the file; `None` if the
    /// number of dimensions does not match the layout.
    pub(super) fn to_model(self, file: &[i64]) -> Option<Vec<i64>> {
        if matches!(self, Layout::Same | Layout::Pointwise | Layout::NoKeys) {
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

    /// Returns the shape in the file of a tensor with the shape `model` in the model.
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

    /// Converts a tensor of the file to the model's layout, with the shape `shape`.
    pub(super) fn apply(self, tensor: &Tensor, shape: &[i64]) -> Result<Tensor> {
        match self {
            Layout::Same | Layout::Pointwise => Ok(tensor.f_reshape(shape)?),
            Layout::NoKeys => {
                let third = shape.first().copied().unwrap_or_default() / 3;
                let (q, v) = (tensor.f_narrow(0, 0, third)?, tensor.f_narrow(0, 2 * third, third)?);
                Ok(Tensor::f_cat(&[&q, &q.f_zeros_like()?, &v], 0)?.f_reshape(shape)?)
            }
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
            ("f.*x2+1.x", "f.5.x", Some(([Some(2), None], 0, 1))),
            ("f.*x2+1.x", "f.4.x", None),
            ("f.*x2.x", "f.4.x", Some(([Some(2), None], 0, 1))),
            ("{query,key,value}.bias", "query.bias", Some(([None; 2], 0, 3))),
            ("{query,key,value}.bias", "value.bias", Some(([None; 2], 2, 3))),
            ("{query,key,value}.bias", "query,key.bias", None),
            ("{q,k?,v}_bias", "k_bias", Some(([None; 2], 1, 3))),
            ("{q,kv,kv}.bias", "kv.bias", Some(([None; 2], 1, 3))),
            ("layers.*.{q,k,v}_proj.bias", "layers.7.k_proj.bias", Some(([Some(7), None], 1, 3))),
            ("layers.*.{q,k,v}_proj.bias", "layers.7.qk_proj.bias", None),
            ("layers.*.{q,k,v}_proj.bias", "layers.7.k.bias", None),
        ] {
            let matched = matches(pattern, name, '.');
            let matched = matched.map(|m| (m.numbers, m.part.index, m.part.of));
            assert_eq!(matched, found, "{name}");
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
            let to_name = Match { numbers, part: Part::WHOLE }.fill(to);
            let names = family.file_names(prefix, &to_name);
            let spans: usize = names.iter().map(|(.., part)| part.span).sum();
            assert_eq!(spans, names[0].2.of, "{}: {to}", family.name);
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

    /// Returns example numbers for the stars of a pattern.
    fn numbers_for(pattern: &str) -> [Option<u32>; 2] {
        let stars = pattern.matches('*').count();
        [(stars > 0).then_some(7), (stars > 1).then_some(3)]
    }

    /// Returns each rule with its family, a prefix of the family, and the prefix of the rule's own
    /// names.
    fn every_rule()
    -> impl Iterator<Item = (&'static Family, &'static str, &'static str, &'static Rule)> {
        let prefixes = |family: &'static Family| family.prefixes.iter().map(move |p| (family, *p));
        FAMILIES.into_iter().chain(TEXT_FAMILIES).flat_map(prefixes).flat_map(|(family, prefix)| {
            family.rules(prefix).map(move |(before, rule)| (family, prefix, before, rule))
        })
    }
}
