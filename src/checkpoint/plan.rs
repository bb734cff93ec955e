//! Maps each tensor of a file to a tensor of the model.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::names::{Action, FAMILIES, Family, Layout, Part, TEXT_FAMILIES, parts as parts_of};
use super::renamed::{MAX_UNWRAPPINGS, Renamed};
use super::settings::{CONFIG, SideFile};
use super::unsupported::unsupported;
use super::{LoadReport, TensorFile, shards};
use crate::backbone::ClipTextConfig;
use crate::error::{Error, Result, list};

/// A file of a recognized family, with each of its names looked up in the family's rules.
pub struct Plan<'a> {
    pub(super) file: Renamed<'a>,
    pub(super) family: &'static Family,
    prefix: &'static str,
    /// For each name of the model, the tensors of the file that hold its parts, in order.
    sources: BTreeMap<String, Vec<Origin>>,
    skipped: Vec<(String, String)>,
    unknown: Vec<String>,
    /// `config.json` beside the file, once it is read.
    config: OnceCell<Option<SideFile>>,
}

/// A tensor of the file that is a tensor of the model or a part of one.
struct Origin {
    name: String,
    /// The pattern that the name matches.
    pattern: &'static str,
    layout: Layout,
    part: Part,
}

impl<'a> Plan<'a> {
    /// Recognizes the family of a file by its signature tensors, and looks up each name. The file
    /// must hold a model of the family `backbone`.
    ///
    /// # Errors
    /// [`Error::UnknownFormat`] if the names match no family, [`Error::OtherBackbone`] if they
    /// match a family of other backbones.
    pub(super) fn new(file: &'a TensorFile, backbone: &'static str) -> Result<Self> {
        Self::of_one(file, backbone, &FAMILIES, &TEXT_FAMILIES)
    }

    /// Does the same as [`Plan::new`] for a text tower.
    pub(super) fn of_text(file: &'a TensorFile) -> Result<Self> {
        Self::of_one(file, ClipTextConfig::FAMILY, &TEXT_FAMILIES, &FAMILIES)
    }

    /// Makes the plan with `families`. If none matches, `others` show which backbone the file
    /// holds.
    fn of_one(
        file: &'a TensorFile,
        backbone: &'static str,
        families: &[&'static Family],
        others: &[&'static Family],
    ) -> Result<Self> {
        if let Some(reason) = shards::one_of_several(file) {
            return Err(Error::UnknownFormat { file: file.path().to_path_buf(), reason });
        }
        let found = recognize(file, families).or_else(|| {
            // A tower of an unsupported family is more than a tower of another kind beside it.
            let names: Vec<&str> = file.names().collect();
            unsupported(&names, &names).is_none().then(|| recognize(file, others))?
        });
        let Some((file, family, prefix)) = found else { return Err(unknown(file, families)) };
        if family.backbone != backbone {
            let (file, found) = (file.path().to_path_buf(), family.backbone);
            return Err(Error::OtherBackbone { file, expected: backbone, found });
        }
        let mut plan = Plan {
            file,
            family,
            prefix,
            sources: BTreeMap::new(),
            skipped: Vec::new(),
            unknown: Vec::new(),
            config: OnceCell::new(),
        };
        for name in plan.file.names().map(str::to_owned).collect::<Vec<_>>() {
            plan.place(name);
        }
        let beside = |name: &String| (name.clone(), BESIDE.to_owned());
        plan.skipped.extend(plan.file.beside().iter().map(beside));
        plan.check_family()?;
        Ok(plan)
    }

    /// Checks that the names without a rule are not those of a similar family that is not
    /// supported.
    fn check_family(&self) -> Result<()> {
        let unknown: Vec<&str> = self.unknown.iter().map(String::as_str).collect();
        match unsupported(&self.file.names().collect::<Vec<_>>(), &unknown) {
            None => Ok(()),
            Some(reason) => {
                Err(Error::UnknownFormat { file: self.file.path().to_path_buf(), reason })
            }
        }
    }

    fn place(&mut self, name: String) {
        let found = self
            .family
            .find(self.prefix, &name)
            .map(|(rule, found)| (rule.from, rule.action, found));
        let in_file = self.file.in_file(&name);
        match found {
            None => self.unknown.push(in_file),
            Some((_, Action::Skip(reason), _)) => self.skipped.push((in_file, reason.to_owned())),
            Some((pattern, Action::Take { to, layout }, found)) => {
                let (part, sources) = (found.part, self.sources.entry(found.fill(to)).or_default());
                // A second tensor for the same place is unexpected.
                if sources.iter().all(|s| s.part.of == part.of && s.part.index != part.index) {
                    sources.push(Origin { name, pattern, layout, part })
                } else {
                    self.unknown.push(in_file)
                }
                sources.sort_by_key(|source| source.part);
            }
        }
    }

    /// Returns the `config.json` beside the file, if there is one. It is read once.
    ///
    /// # Errors
    /// The errors of [`SideFile::read`].
    pub(super) fn config(&self) -> Result<Option<&SideFile>> {
        if self.config.get().is_none() {
            let _ = self.config.set(SideFile::read(self.file.path(), CONFIG)?);
        }
        Ok(self.config.get().and_then(Option::as_ref))
    }

    /// Returns whether the names of the file are those of the library `library`, whole or around
    /// another library's names.
    pub(super) fn has_names_of(&self, library: &str) -> bool {
        self.family.name == library || library == "open_clip" && self.prefix.starts_with("visual.")
    }

    /// Returns whether the backbone's names have no prefix.
    pub(super) fn is_bare(&self) -> bool {
        self.prefix.is_empty()
    }

    /// Returns whether the file has the model's tensor `name` or a part of it.
    pub(super) fn has(&self, name: &str) -> bool {
        self.sources.contains_key(name)
    }

    /// Returns the shape of the model's tensor `name` according to the file. The shape of the first
    /// part determines the whole.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] if the tensor is absent, or [`Error::ShapeMismatch`] if it does not
    /// have `rank` dimensions. A dimension of any size is -1 in these errors.
    pub(super) fn shape(&self, name: &str, rank: usize) -> Result<Vec<i64>> {
        let Some(source) = self.sources.get(name).and_then(|sources| sources.first()) else {
            return Err(self.missing(name, &vec![-1; rank], 1));
        };
        let found = self.file_shape(source);
        let mut shape = source.layout.to_model(found).unwrap_or_default();
        if source.layout == Layout::Same && shape.len() < rank {
            shape.splice(..0, vec![1; rank - shape.len()]);
        }
        if source.layout == Layout::Pointwise {
            let ones = shape.iter().skip(rank).all(|&dim| dim == 1);
            shape.truncate(if ones { rank } else { shape.len() });
        }
        if shape.len() != rank {
            return Err(self.mismatch(source, vec![-1; rank]));
        }
        if let Some(rows) = shape.first_mut() {
            let Part { of, span, .. } = source.part;
            *rows = rows.saturating_mul(of as i64) / span as i64;
        }
        Ok(shape)
    }

    /// Returns the layout and the shape in the file of the first part of the model's tensor `name`.
    pub(super) fn first_part(&self, name: &str) -> Option<(Layout, &[i64])> {
        let source = self.sources.get(name)?.first()?;
        Some((source.layout, self.file_shape(source)))
    }

    /// Returns whether the file has the tensor `name`, with or without the backbone's prefix.
    pub(super) fn stores(&self, name: &str) -> bool {
        self.file.contains(name) || self.file.contains(&format!("{}{name}", self.prefix))
    }

    /// Returns whether the model's tensor `name` is fused of several tensors of the file.
    pub(super) fn is_fused(&self, name: &str) -> bool {
        self.sources.get(name).is_some_and(|sources| sources.iter().any(|s| s.part.of > 1))
    }

    /// Reads the model's tensor `name` with the shape `shape`. `heads` is the number of heads into
    /// which Flax splits a width.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] or [`Error::ShapeMismatch`], with the name and the shapes in the
    /// file; the errors of reading the tensor.
    pub(super) fn read(&self, name: &str, shape: &[i64], heads: i64) -> Result<Tensor> {
        let sources = self.sources.get(name).map_or(&[][..], Vec::as_slice);
        let Some(first) = sources.first() else { return Err(self.missing(name, shape, heads)) };
        let mut parts = Vec::new();
        for part in parts_of(first.pattern) {
            let part_shape = split(shape, part);
            match sources.iter().find(|source| source.part == part) {
                Some(source) => parts.push(self.read_part(source, &part_shape, heads)?),
                None if part.optional => {
                    let like = parts.first().map_or((Kind::Float, Device::Cpu), kind_of);
                    parts.push(Tensor::f_zeros(&part_shape, like)?)
                }
                None => return Err(self.missing(name, shape, heads)),
            }
        }
        match parts.pop() {
            Some(whole) if parts.is_empty() => Ok(whole),
            last => {
                parts.extend(last);
                Ok(Tensor::f_cat(&parts, 0)?)
            }
        }
    }

    /// Reads one part of a tensor of the model, with the shape `shape`.
    fn read_part(&self, source: &Origin, shape: &[i64], heads: i64) -> Result<Tensor> {
        let expected = source.layout.to_file(shape, heads);
        let found = self.file_shape(source);
        let fits = match source.layout {
            Layout::Same => trim_ones(found) == trim_ones(&expected),
            Layout::Pointwise => trim_last_ones(found) == trim_last_ones(&expected),
            _ => found == expected,
        };
        if !fits {
            return Err(self.mismatch(source, expected));
        }
        let tensor = self.file.finite_tensor(&source.name)?;
        source.layout.apply(&tensor, shape)
    }

    /// Checks that a rule exists for each name of the file.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensors`] with all names that no rule matches.
    pub(super) fn check_names(&self) -> Result<()> {
        self.unexpected(self.unknown.clone())
    }

    /// Reports what became of each tensor of the file. The names must have been checked with
    /// `check_names`; `taken` returns whether the model took its tensor of a name.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensors`] with all tensors that the model did not take.
    pub(super) fn report(self, taken: impl Fn(&str) -> bool) -> Result<LoadReport> {
        let (mut applied, mut left) = (Vec::new(), Vec::new());
        for (name, sources) in &self.sources {
            let names = sources.iter().map(|source| self.file.in_file(&source.name));
            if taken(name) { applied.extend(names) } else { left.extend(names) }
        }
        left.sort();
        self.unexpected(left)?;
        applied.sort();
        let (keys, taken_off) = self.file.wrappers();
        let settings = Vec::new();
        Ok(LoadReport { applied, skipped: self.skipped, keys, taken_off, settings })
    }

    /// Returns an error that lists `names` if there are any.
    fn unexpected(&self, names: Vec<String>) -> Result<()> {
        if names.is_empty() {
            Ok(())
        } else {
            let known = self.family.names_like(self.prefix, &names[0]).into_iter();
            let missing = known.filter(|name| !self.file.contains(name));
            let missing: Vec<String> = missing.map(|name| self.file.in_file(&name)).collect();
            Err(Error::unexpected(self.file.path(), names, missing.iter().map(String::as_str)))
        }
    }

    fn file_shape(&self, source: &Origin) -> &[i64] {
        self.file.shape(&source.name).unwrap_or_default()
    }

    fn mismatch(&self, source: &Origin, expected: Vec<i64>) -> Error {
        Error::ShapeMismatch {
            file: self.file.path().to_path_buf(),
            name: self.file.in_file(&source.name),
            expected,
            found: self.file_shape(source).to_vec(),
        }
    }

    /// Returns the error for the first part of the model's tensor `name` that is absent from the
    /// file.
    fn missing(&self, name: &str, shape: &[i64], heads: i64) -> Error {
        let present = self.sources.get(name).map_or(&[][..], Vec::as_slice);
        let wanted = self.family.file_names(self.prefix, name).into_iter();
        let is_absent = |part: &Part| !part.optional && present.iter().all(|s| s.part != *part);
        let absent = wanted.into_iter().find(|(.., part)| is_absent(part));
        let is_final_norm = FINAL_NORMS.contains(&name);
        let (name, expected) = match absent {
            Some((file_name, layout, part)) => {
                (file_name, layout.to_file(&split(shape, part), heads))
            }
            None => (name.to_owned(), shape.to_vec()),
        };
        let (file, name) = (self.file.path().to_path_buf(), self.file.in_file(&name));
        if is_final_norm {
            return Error::NoFinalNorm { file, name };
        }
        Error::MissingTensor { file, name, expected }
    }
}

/// The model's names of the weight of the last norm.
const FINAL_NORMS: [&str; 2] = ["norm.weight", "head.norm.weight"];

/// Returns the shape of one part of a tensor with the shape `shape`.
fn split(shape: &[i64], part: Part) -> Vec<i64> {
    let mut shape = shape.to_vec();
    if let Some(rows) = shape.first_mut() {
        *rows = if *rows < 0 { *rows } else { *rows / part.of as i64 * part.span as i64 };
    }
    shape
}

fn kind_of(tensor: &Tensor) -> (Kind, Device) {
    (tensor.kind(), tensor.device())
}

fn trim_ones(shape: &[i64]) -> &[i64] {
    let start = shape.iter().position(|&dim| dim != 1).unwrap_or(shape.len());
    &shape[start..]
}

fn trim_last_ones(shape: &[i64]) -> &[i64] {
    let end = shape.iter().rposition(|&dim| dim != 1).map_or(0, |last| last + 1);
    &shape[..end]
}

/// The reason for tensors beside a model whose names have a prefix.
const BESIDE: &str = "beside the backbone, whose names have a prefix";

/// Returns the tensors of the file under the names of the model, its family, and the prefix of the
/// family. What training programs put around the names is taken off if the family is not recognized
/// with it.
fn recognize<'a>(
    file: &'a TensorFile,
    families: &[&'static Family],
) -> Option<(Renamed<'a>, &'static Family, &'static str)> {
    let mut renamed = Renamed::new(file);
    for _ in 0..=MAX_UNWRAPPINGS {
        if let Some((family, prefix)) = family_of(&renamed, families) {
            return Some((renamed, family, prefix));
        }
        renamed = renamed.unwrapped()?;
    }
    None
}

/// Returns the family of the tensors and the prefix of their names.
fn family_of(
    file: &Renamed,
    families: &[&'static Family],
) -> Option<(&'static Family, &'static str)> {
    let signed = |family: &Family, prefix: &str| {
        family.signatures.iter().any(|name| file.contains(&format!("{prefix}{name}")))
    };
    families.iter().find_map(|&family| {
        let prefix = family.prefixes.iter().find(|prefix| signed(family, prefix))?;
        Some((family, *prefix))
    })
}

fn unknown(file: &TensorFile, families: &[&Family]) -> Error {
    let mut known: Vec<&str> = families.iter().map(|family| family.name).collect();
    known.dedup();
    let known = known.join(", ");
    let names: Vec<&str> = file.names().collect();
    let reason = unsupported(&names, &names).unwrap_or_else(|| {
        format!("the tensor names match none of {known}; the file has {}", list(&names))
    });
    Error::UnknownFormat { file: file.path().to_path_buf(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_position_table_is_reported_as_the_image_towers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("open_clip.safetensors");
        // The text tower has a table of the same name without the prefix.
        let weight = Tensor::zeros([8], (tch::Kind::Float, tch::Device::Cpu));
        let names = ["visual.class_embedding", "positional_embedding"];
        Tensor::write_safetensors(&names.map(|name| (name, &weight)), &path).unwrap();
        let file = TensorFile::open(&path).unwrap();
        let plan = Plan::new(&file, "ViT").unwrap();
        for error in [
            plan.shape("pos_embed", 3).unwrap_err(),
            plan.read("pos_embed", &[-1, -1, -1], 1).unwrap_err(),
        ] {
            assert!(
                matches!(&error, Error::MissingTensor { name, expected, .. }
                    if name == "visual.positional_embedding" && expected == &[-1, -1, -1]),
                "{error}"
            );
        }
    }
}
