//! The names of each model family, one table a file.
//!
//! A rule maps a name of the file to the name that the model has for it, which is timm's. It
//! matches whole path segments; `*` in a pattern stands for a block's number, and a last segment
//! `**` for whatever follows.

mod google;
mod hf_clip;
mod hf_dinov2;
mod hf_vit;
mod open_clip;
mod timm;

use tch::Tensor;

use crate::error::Result;

/// A family of checkpoints: how its files are recognized, and its names.
#[derive(Debug)]
pub(super) struct Family {
    /// What people call it.
    pub(super) name: &'static str,
    /// What separates the segments of a name.
    pub(super) separator: char,
    /// What may stand before the names of `rules`; the empty one is listed where it may be.
    pub(super) prefixes: &'static [&'static str],
    /// A file that has one of these, behind one prefix, is of this family.
    pub(super) signatures: &'static [&'static str],
    /// The names of the backbone.
    pub(super) rules: &'static [Rule],
    /// The names around it, which take no prefix.
    pub(super) around: &'static [Rule],
    /// Epsilon of the layer norms; files do not tell it.
    pub(super) norm_eps: f64,
    /// The activation of an MLP that is not packed; files do not tell it.
    pub(super) activation: Activation,
    /// A tensor beside which the position table usually covers the patches alone.
    pub(super) bare_positions: Option<&'static str>,
}

/// Which activation a family has.
#[derive(Debug)]
pub(super) enum Activation {
    Gelu,
    QuickGelu,
    /// QuickGELU in files that have one of these tensors, else exact GELU.
    QuickGeluBeside(&'static [&'static str]),
}

/// Every family, in the order in which they are tried.
pub(super) const FAMILIES: [&Family; 6] = [
    &google::FAMILY,
    &timm::FAMILY,
    &hf_vit::FAMILY,
    &hf_dinov2::FAMILY,
    &hf_clip::FAMILY,
    &open_clip::FAMILY,
];

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
    /// It is the model's tensor of this name, or the numbered part of it.
    Take { to: &'static str, layout: Layout, part: Part },
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

const WHOLE: Part = Part { index: 0, of: 1 };

const fn take(from: &'static str, to: &'static str, layout: Layout) -> Rule {
    Rule { from, action: Action::Take { to, layout, part: WHOLE } }
}

const fn copy(from: &'static str, to: &'static str) -> Rule {
    take(from, to, Layout::Same)
}

const fn skip(from: &'static str, reason: &'static str) -> Rule {
    Rule { from, action: Action::Skip(reason) }
}

/// Query, key and value: parts 0, 1 and 2 of 3.
const fn qkv(from: &'static str, to: &'static str, layout: Layout, index: usize) -> Rule {
    Rule { from, action: Action::Take { to, layout, part: Part { index, of: 3 } } }
}

/// Gate and value of a SwiGLU: parts 0 and 1 of 2.
const fn half(from: &'static str, to: &'static str, index: usize) -> Rule {
    let (layout, part) = (Layout::Same, Part { index, of: 2 });
    Rule { from, action: Action::Take { to, layout, part } }
}

const QKV_WEIGHT: &str = "blocks.*.attn.qkv.weight";
const QKV_BIAS: &str = "blocks.*.attn.qkv.bias";

const HEAD: &str = "a classification head; features are read before it";
const POOLER: &str = "the pooler; features are read before it";
const MASK: &str = "only used to pretrain on masked images";
const TEXT: &str = "the text tower";
const INDICES: &str = "position numbers, not weights";
const NUMBERS: &str = "numbers about the model, not weights";

impl Family {
    /// The rule for a name of a file of this family whose backbone stands behind `prefix`, and the
    /// number that `*` stands for.
    pub(super) fn find(&self, prefix: &str, name: &str) -> Option<(&'static Rule, Option<u32>)> {
        let within = |rules: &'static [Rule], name: &str| {
            rules.iter().find_map(|rule| Some((rule, rule.matches(name, self.separator)?)))
        };
        name.strip_prefix(prefix)
            .and_then(|name| within(self.rules, name))
            .or_else(|| within(self.around, name))
    }

    /// The name that a file of this family has for each part of the model's `name`: that of the
    /// first rule.
    pub(super) fn file_names(&self, prefix: &str, name: &str) -> Vec<(String, Layout, Part)> {
        let mut names: Vec<(String, Layout, Part)> = Vec::new();
        for rule in self.rules.iter().chain(self.around) {
            let Action::Take { to, layout, part } = rule.action else { continue };
            let Some(number) = matches(to, name, '.') else { continue };
            let follows = match names.last() {
                None => part.index == 0,
                Some((.., last)) => part.of == last.of && part.index == last.index + 1,
            };
            if follows {
                let prefix =
                    if self.around.iter().any(|r| r.from == rule.from) { "" } else { prefix };
                names.push((prefix.to_owned() + &with_number(rule.from, number), layout, part));
            }
        }
        names
    }
}

impl Rule {
    /// Whether `name` is one that this rule is for, and if so, its block's number.
    fn matches(&self, name: &str, separator: char) -> Option<Option<u32>> {
        matches(self.from, name, separator)
    }
}

/// Matches `name` to `pattern` segment by segment and gives the number that `*` stands for.
fn matches(pattern: &str, name: &str, separator: char) -> Option<Option<u32>> {
    let (mut pattern, mut name) = (pattern.split(separator), name.split(separator));
    let mut number = None;
    loop {
        match (pattern.next(), name.next()) {
            (None, None) => return Some(number),
            (Some("**"), Some(_)) => return Some(number),
            (Some(wanted), Some(found)) => match wanted.strip_suffix('*') {
                Some(stem) => number = Some(parse_number(found.strip_prefix(stem)?)?),
                None if wanted == found => {}
                None => return None,
            },
            _ => return None,
        }
    }
}

/// A number as a program writes it: no sign, no leading zero.
fn parse_number(digits: &str) -> Option<u32> {
    let number: u32 = digits.parse().ok()?;
    (number.to_string() == digits).then_some(number)
}

/// The pattern with `*` replaced by the number.
pub(super) fn with_number(pattern: &str, number: Option<u32>) -> String {
    match number {
        Some(number) => pattern.replacen('*', &number.to_string(), 1),
        None => pattern.to_owned(),
    }
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
            ("blocks.*.norm1.weight", "blocks.3.norm1.weight", Some(Some(3))),
            ("blocks.*.norm1.weight", "blocks.03.norm1.weight", None),
            ("blocks.*.norm1.weight", "blocks.+3.norm1.weight", None),
            ("blocks.*.norm1.weight", "blocks.3.norm1.weight.x", None),
            ("blocks.*.norm1.weight", "blocks.3.norm1", None),
            ("head.**", "head.weight", Some(None)),
            ("head.**", "head", None),
            ("head.**", "head_dist.weight", None),
        ] {
            assert_eq!(matches(pattern, name, '.'), found, "{name}");
        }
        assert_eq!(matches("a/block_*/k", "a/block_11/k", '/'), Some(Some(11)));
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
        for family in FAMILIES {
            for rule in family.rules {
                let Action::Take { to, part, .. } = rule.action else { continue };
                let number = to.contains('*').then_some(7);
                let name = with_number(rule.from, number);
                let (found, at) = family.find("", &name).expect(rule.from);
                assert_eq!((found.from, at), (rule.from, number), "{}", family.name);
                let names = family.file_names("", &with_number(to, number));
                assert_eq!(names.len(), names[0].2.of, "{}: {to}", family.name);
                assert!(part.index < part.of);
            }
        }
    }
}
