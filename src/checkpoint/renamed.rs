//! The tensors of a file under the names that the model itself gives them, without what training
//! programs put around the names.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use super::TensorFile;
use crate::error::Result;

/// How many prefixes are taken off at most.
pub(super) const MAX_UNWRAPPINGS: usize = 6;

/// First segments of the names of what training programs store beside a model whose names have a
/// prefix.
const BESIDE: [&str; 14] = [
    "classifier",
    "criterion",
    "dino_head",
    "dino_loss",
    "fc",
    "head",
    "heads",
    "ibot_head",
    "loss",
    "loss_fn",
    "momentum_encoder",
    "n_averaged",
    "predictor",
    "projector",
];

/// The tensors of a file, some of them under shorter names.
#[derive(Clone)]
pub(super) struct Renamed<'a> {
    file: &'a TensorFile,
    /// The name in the file of each tensor.
    names: BTreeMap<String, String>,
    /// What was taken off the names, outermost first.
    taken_off: Vec<String>,
    /// Names in the file of the tensors that are beside the model.
    beside: Vec<String>,
}

impl<'a> Renamed<'a> {
    /// Returns the tensors under their own names.
    pub(super) fn new(file: &'a TensorFile) -> Self {
        let names = file.names().map(|name| (name.to_owned(), name.to_owned())).collect();
        Renamed { file, names, taken_off: Vec::new(), beside: Vec::new() }
    }

    /// Takes one prefix off that all names have, such as `module.`, or the numbers of the chunks in
    /// which DINOv2 stores its blocks. Returns `None` if there is none.
    pub(super) fn unwrapped(&self) -> Option<Self> {
        self.without_chunks().or_else(|| self.without_prefix())
    }

    /// The tensors that [`BESIDE`] lists need not have the prefix.
    fn without_prefix(&self) -> Option<Self> {
        let is_beside = |name: &str| {
            BESIDE.contains(&name.split_once('.').map_or(name, |(segment, _)| segment))
        };
        let names = || self.names.keys().map(String::as_str);
        let common = names().find(|name| !is_beside(name))?.split_once('.')?.0;
        let has = |name: &str| name.split_once('.').is_some_and(|(first, _)| first == common);
        if !names().all(|name| has(name) || is_beside(name)) {
            return None;
        }
        let prefix = format!("{common}.");
        let (mut kept, mut beside) = (BTreeMap::new(), self.beside.clone());
        for (name, in_file) in &self.names {
            match name.strip_prefix(&prefix) {
                Some(rest) => drop(kept.insert(rest.to_owned(), in_file.clone())),
                None => beside.push(in_file.clone()),
            }
        }
        Some(self.with(kept, prefix, beside))
    }

    /// Turns `blocks.1.6.x`, which is block 6 in chunk 1, into `blocks.6.x`.
    fn without_chunks(&self) -> Option<Self> {
        let is_number = |segment: &str| segment.parse::<u32>().is_ok();
        let mut names = BTreeMap::new();
        for (name, in_file) in &self.names {
            let name = match name.strip_prefix("blocks.") {
                None => name.clone(),
                Some(rest) => {
                    let (_, block) = rest.split_once('.').filter(|(chunk, _)| is_number(chunk))?;
                    let (number, _) = block.split_once('.')?;
                    is_number(number).then(|| format!("blocks.{block}"))?
                }
            };
            names.insert(name, in_file.clone());
        }
        let changed = names.len() == self.names.len() && !names.keys().eq(self.names.keys());
        changed.then(|| self.with(names, "the chunk in blocks.*".to_owned(), self.beside.clone()))
    }

    fn with(
        &self,
        names: BTreeMap<String, String>,
        taken_off: String,
        beside: Vec<String>,
    ) -> Self {
        let taken_off = [&self.taken_off[..], &[taken_off]].concat();
        Renamed { file: self.file, names, taken_off, beside }
    }

    /// Returns the path of the file.
    pub(super) fn path(&self) -> &'a Path {
        self.file.path()
    }

    /// Returns the names of the tensors of the model, sorted.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Returns the names in the file of the tensors that are beside the model.
    pub(super) fn beside(&self) -> &[String] {
        &self.beside
    }

    /// Returns the keys that lead to the tensors in the file, and what was taken off their names.
    pub(super) fn wrappers(&self) -> (Vec<String>, Vec<String>) {
        (self.file.keys().to_vec(), self.taken_off.clone())
    }

    /// Returns the name in the file of the tensor `name`, or the name that it would have.
    pub(super) fn in_file(&self, name: &str) -> String {
        let prefixes = || self.taken_off.iter().filter(|part| part.ends_with('.'));
        match self.names.get(name) {
            Some(in_file) => in_file.clone(),
            None => prefixes().map(String::as_str).chain([name]).collect(),
        }
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[i64]> {
        self.file.shape(self.names.get(name)?)
    }

    pub(super) fn finite_tensor(&self, name: &str) -> Result<Tensor> {
        self.file.finite_tensor(&self.in_file(name))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    /// Returns the names of a file with these names after all prefixes are taken off, and what was
    /// taken off, each joined by spaces.
    fn unwrapped(names: &[&str]) -> (String, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let tensor = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        let tensors: Vec<_> = names.iter().map(|&name| (name, &tensor)).collect();
        Tensor::write_safetensors(&tensors, &path).unwrap();
        let file = TensorFile::open(&path).unwrap();
        let mut renamed = Renamed::new(&file);
        while let Some(next) = renamed.unwrapped() {
            renamed = next;
        }
        for name in renamed.names() {
            assert!(file.contains(&renamed.in_file(name)));
            assert_eq!(renamed.shape(name), Some(&[1][..]));
        }
        (renamed.names().collect::<Vec<_>>().join(" "), renamed.taken_off.join(" "))
    }

    #[test]
    fn prefixes_of_all_names_are_taken_off() {
        for (names, expected, taken_off) in [
            (&["module.a.x", "module.b"][..], "a.x b", "module."),
            (&["a._orig_mod.x.w", "a._orig_mod.y"], "x.w y", "a. _orig_mod."),
            (&["module.a", "n_averaged"], "a", "module."),
            (&["backbone.a", "backbone.b.c", "dino_head.d"], "a b.c", "backbone."),
            (
                &["module.base.a", "module.base.b", "module.momentum_encoder.a"],
                "a b",
                "module. base.",
            ),
            (&["module.a", "b.c"], "b.c module.a", ""),
            (&["0.a", "0.b"], "a b", "0."),
            (
                &["blocks.0.0.w", "blocks.1.6.w", "x"],
                "blocks.0.w blocks.6.w x",
                "the chunk in blocks.*",
            ),
            (&["blocks.0.w", "blocks.1.6.w", "x"], "blocks.0.w blocks.1.6.w x", ""),
        ] {
            assert_eq!(unwrapped(names), (expected.to_owned(), taken_off.to_owned()));
        }
    }
}
