//! The weights of a ViT under the names of other libraries: the rules of [`names`](super::names) in
//! the other direction.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::names::{Family, Layout, Part};
use super::written_class::WrittenClass;
use crate::backbone::{Pooling, ViTConfig};
use crate::error::{Error, Result};

/// The library whose names the tensors of a written file have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightNames {
    /// timm.
    Timm,
    /// Hugging Face transformers, with the names of the files that it writes.
    HuggingFace,
}

impl WeightNames {
    /// Returns how errors call a file with these names.
    pub(crate) fn form(self) -> &'static str {
        match self {
            WeightNames::Timm => "weights under timm's names",
            WeightNames::HuggingFace => "weights under the names of Hugging Face",
        }
    }
}

/// Weights under the names of a class of another library.
#[derive(Debug)]
pub(crate) struct NamedWeights {
    /// The class, such as `ViTForImageClassification`.
    pub(crate) class: &'static str,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

/// Weight `[K, C]` and bias `[K]` of a head.
pub(crate) type ClassifierWeights = (Tensor, Tensor);

impl NamedWeights {
    /// Names the weights `weights` of a ViT, all in one dtype on the CPU, and of its head if there
    /// is one. `is_read` says whether the features depend on a weight.
    pub(crate) fn new(
        names: WeightNames,
        config: &ViTConfig,
        weights: &[(String, Tensor)],
        is_read: impl Fn(&str) -> bool,
        head: Option<ClassifierWeights>,
    ) -> Result<Self> {
        let class = WrittenClass::of(names, config, head.is_some())?;
        let mut own: BTreeMap<&str, Tensor> = weights
            .iter()
            .filter(|(name, _)| is_read(name) || class.has_unread(name))
            .map(|(name, weight)| (name.as_str(), weight.shallow_clone()))
            .collect();
        fit_positions(&mut own, config, class.position_rows(config))?;
        let mut tensors = BTreeMap::new();
        for (name, weight) in &own {
            class.name(name, weight, &mut tensors)?;
        }
        if class.needs_qkv_bias && !config.qkv_bias {
            let zeros = Tensor::f_zeros([3 * config.embed_dim], FLOAT)?;
            for block in 0..config.depth {
                class.name(&format!("blocks.{block}.attn.qkv.bias"), &zeros, &mut tensors)?;
            }
        }
        for (name, rank) in class.zeros {
            let mut shape = vec![1; *rank];
            shape[rank - 1] = config.embed_dim;
            let name = class.written_prefix.to_owned() + name;
            tensors.insert(name, Tensor::f_zeros(shape, FLOAT)?);
        }
        if let Some((weight, bias)) = head {
            let weight = class.head_weight(config, weight)?;
            for layer in class.heads {
                tensors.insert(format!("{layer}.weight"), weight.shallow_clone());
                tensors.insert(format!("{layer}.bias"), bias.shallow_clone());
            }
        }
        Ok(NamedWeights { class: class.name, tensors })
    }
}

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Makes the first `rows` rows of the position table, before those of the patches, belong to prefix
/// tokens. Rows of prefix tokens are added to the tokens themselves where the other library has no
/// place for them, and are zero where the model has none.
fn fit_positions(
    weights: &mut BTreeMap<&str, Tensor>,
    config: &ViTConfig,
    rows: i64,
) -> Result<()> {
    let covered = config.pos_embed_prefix;
    let Some(table) = weights.get("pos_embed").filter(|_| covered != rows) else { return Ok(()) };
    let table = table.shallow_clone();
    let mut start = 0;
    for name in ["cls_token", "reg_token"] {
        let Some(token) = weights.get_mut(name) else { continue };
        let len = token.size()[1];
        if start + len <= covered {
            *token = token.f_add(&table.f_narrow(1, start, len)?)?;
        }
        start += len;
    }
    let patches = table.f_narrow(1, covered, table.size()[1] - covered)?;
    let zeros = Tensor::f_zeros([1, rows, config.embed_dim], FLOAT)?;
    weights.insert("pos_embed", Tensor::f_cat(&[zeros, patches], 1)?);
    Ok(())
}

impl WrittenClass {
    /// Adds the model's tensor `name` to `tensors` under the names of this class: as one tensor, or
    /// as the parts of which the class has it.
    fn name(
        &self,
        name: &str,
        weight: &Tensor,
        tensors: &mut BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let prefix = self.written_prefix;
        let parts = self.family.preferred_names(prefix, name, self.preferred);
        if parts.is_empty() {
            return Err(self.refusal(format!("there is no name for {name}")));
        }
        for (file_name, layout, part) in parts {
            if layout != Layout::Same {
                return Err(self.refusal(format!("{file_name} has another layout")));
            }
            let rows = rows(weight, part)?;
            if part.optional && rows.f_count_nonzero(None::<i64>)?.f_int64_value(&[])? == 0 {
                continue;
            }
            if part.optional {
                return Err(self.refusal(format!(
                    "the class has no bias of the keys, and {name} has one that is not zero"
                )));
            }
            let rows = self.ranked(&file_name, rows)?;
            if tensors.insert(file_name.clone(), rows).is_some() {
                return Err(self.refusal(format!("two tensors have the name {file_name}")));
            }
        }
        Ok(())
    }

    /// Takes leading dimensions of size one off a tensor that has fewer dimensions in this class.
    fn ranked(&self, file_name: &str, tensor: Tensor) -> Result<Tensor> {
        let rank = self.ranks.iter().find(|(end, _)| file_name.ends_with(end));
        let Some((_, rank)) = rank else { return Ok(tensor) };
        let size = tensor.size();
        Ok(tensor.f_reshape(&size[size.len().saturating_sub(*rank)..])?)
    }

    /// Returns the weight of the head over the features that this class computes.
    fn head_weight(&self, config: &ViTConfig, weight: Tensor) -> Result<Tensor> {
        if !self.head_reads_class_and_mean {
            return Ok(weight);
        }
        // The features that the model does not read get the weight zero.
        let zeros = weight.f_zeros_like()?;
        Ok(match config.pooling {
            Pooling::ClassToken => Tensor::f_cat(&[weight, zeros], 1)?,
            Pooling::Average => Tensor::f_cat(&[zeros, weight], 1)?,
            _ => weight,
        })
    }

    fn refusal(&self, reason: String) -> Error {
        let (model, form) = (format!("a model of the class {}", self.name), self.library.form());
        Error::NotExportable { model, form, reason }
    }
}

/// Returns the rows of a fused tensor that one part holds.
fn rows(weight: &Tensor, part: Part) -> Result<Tensor> {
    if part == Part::WHOLE {
        return Ok(weight.shallow_clone());
    }
    let each = weight.size()[0] / part.of as i64;
    Ok(weight.f_narrow(0, each * part.index as i64, each * part.span as i64)?)
}

impl Family {
    /// Does the same as [`Family::file_names`], but the rules whose patterns are in `preferred` come
    /// before the others.
    fn preferred_names(
        &self,
        prefix: &str,
        name: &str,
        preferred: &[&str],
    ) -> Vec<(String, Layout, Part)> {
        let names = self.file_names_of(prefix, name, |pattern| preferred.contains(&pattern));
        if names.is_empty() { self.file_names(prefix, name) } else { names }
    }
}
