//! From the tensors of a PEFT file to products by block and target.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tch::Tensor;

use super::config::PeftConfig;
use super::names::{self, Module, WRAPPERS};
use crate::checkpoint::TensorFile;
use crate::error::{Error, Result};
use crate::petl::LinearTarget;
use crate::seam::BackboneShape;

/// What PEFT adds to the name of a module for the tensors of its product.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// What a file holds, by the names of its modules.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Modules with a product, by block and path; the names are as in the file.
    modules: BTreeMap<String, (usize, &'static Module)>,
    /// The head that was trained as a whole.
    pub(super) head: Option<String>,
    /// The head that a product stands beside.
    pub(super) adapted_head: Option<String>,
    /// What the modules of the tower have in front of their blocks' numbers.
    pub(super) tower: String,
}

impl Contents {
    /// Sorts the tensors of `file`, for a backbone of `depth` blocks.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensors`] for those that are no product beside a linear layer of one
    /// tower's blocks, nor a head.
    pub(super) fn of(file: &TensorFile, depth: usize) -> Result<Self> {
        let mut contents = Contents::default();
        let mut unexpected: Vec<String> = Vec::new();
        for name in file.names() {
            if !contents.take(name, depth) {
                unexpected.push(name.to_owned());
            }
        }
        if !unexpected.is_empty() {
            return Err(Error::unexpected(file.path(), unexpected, []));
        }
        if contents.modules.is_empty() {
            let reason = "it has no LoRA product beside a layer of a block".to_owned();
            Err(Error::UnknownFormat { file: path(file), reason })
        } else {
            Ok(contents)
        }
    }

    /// Finds the place of one tensor; `false` if it has none.
    fn take(&mut self, name: &str, depth: usize) -> bool {
        let product = name.strip_suffix(A).or_else(|| name.strip_suffix(B));
        let trained = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"));
        match (product, trained) {
            (Some(module), _) if names::is_unused(unwrapped(module)) => true,
            (Some(module), _) if names::is_head(unwrapped(module)) => {
                same(&mut self.adapted_head, module)
            }
            (Some(module), _) => self.take_module(module, depth),
            (None, Some(module)) => {
                names::is_head(unwrapped(module)) && same(&mut self.head, module)
            }
            (None, None) => false,
        }
    }

    fn take_module(&mut self, name: &str, depth: usize) -> bool {
        let Some(place) = names::locate(unwrapped(name)).filter(|place| place.block < depth) else {
            return false;
        };
        if self.modules.is_empty() {
            self.tower = place.tower.to_owned();
        }
        self.modules.insert(name.to_owned(), (place.block, place.module));
        self.tower == place.tower
    }

    /// Reads every product, checked against the config and the backbone.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] for a product without A or B, [`Error::ShapeMismatch`], and
    /// [`Error::UnexpectedTensors`] for two products beside the same layer.
    pub(super) fn products(
        &self,
        file: &TensorFile,
        config: &PeftConfig,
        shape: &BackboneShape,
    ) -> Result<Products> {
        let mut products = Products::new();
        for (name, &(block, module)) in &self.modules {
            let (rank, scale) = config.rank_and_scale(unwrapped(name))?;
            let sizes = module.targets.iter().map(|target| target.size(shape, block));
            let sizes = sizes.collect::<Result<Vec<_>>>()?;
            let outputs: i64 = sizes.iter().map(|&(_, outputs)| outputs / module.part.1).sum();
            let inputs = sizes.first().map_or(0, |&(inputs, _)| inputs);
            let a = read(file, &format!("{name}{A}"), &[rank, inputs])?;
            let b = read(file, &format!("{name}{B}"), &[outputs, rank])?;
            for (target, piece) in pieces(module, &a, &b, scale)? {
                let there = products.entry((block, target)).or_default();
                if there
                    .iter()
                    .any(|other| other.part.1 != module.part.1 || other.part == module.part)
                {
                    let names = vec![format!("{name}{A}"), format!("{name}{B}")];
                    return Err(Error::unexpected(file.path(), names, []));
                }
                there.push(piece);
            }
        }
        Ok(products)
    }
}

/// The products beside each map of each block; more than one only where they add into different
/// parts of its outputs.
pub(super) type Products = BTreeMap<(usize, LinearTarget), Vec<Piece>>;

/// A product `x A^T B^T` that adds, times `scale`, into a part of the outputs of a map.
#[derive(Debug)]
pub(super) struct Piece {
    /// `[r, in]`.
    pub(super) a: Tensor,
    /// `[out of that part, r]`.
    pub(super) b: Tensor,
    pub(super) scale: f64,
    /// Which part, and of how many.
    pub(super) part: (i64, i64),
}

impl Piece {
    pub(super) fn rank(&self) -> i64 {
        self.a.size()[0]
    }
}

/// The product of a module taken apart into one for each of its maps. From a fused one, columns
/// of zeros in a map's share of B are dropped with their rows of A: what was put together of
/// products for its parts falls into these again.
fn pieces(
    module: &Module,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Vec<(LinearTarget, Piece)>> {
    let count = module.targets.len() as i64;
    let piece = |a, b| Piece { a, b, scale, part: module.part };
    let any = f64::try_from(b.f_abs()?.f_max()?)? > 0.0;
    if count == 1 || !any {
        let shares = b.f_chunk(count, 0)?;
        let all = module.targets.iter().zip(shares);
        return Ok(all.map(|(&target, b)| (target, piece(a.shallow_clone(), b))).collect());
    }
    let mut found = Vec::new();
    for (&target, b) in module.targets.iter().zip(b.f_chunk(count, 0)?) {
        let columns = b.f_ne(0.0)?.f_any_dim(0, false)?.f_nonzero()?.f_flatten(0, -1)?;
        if columns.numel() > 0 {
            found.push((
                target,
                piece(a.f_index_select(0, &columns)?, b.f_index_select(1, &columns)?),
            ));
        }
    }
    Ok(found)
}

/// Reads a tensor of this shape.
pub(super) fn read(file: &TensorFile, name: &str, expected: &[i64]) -> Result<Tensor> {
    let (name, expected) = (name.to_owned(), expected.to_vec());
    match file.shape(&name) {
        Some(found) if found == expected => file.tensor(&name),
        Some(found) => {
            let (file, found) = (path(file), found.to_vec());
            Err(Error::ShapeMismatch { file, name, expected, found })
        }
        None => Err(Error::MissingTensor { file: path(file), name, expected }),
    }
}

/// The path of a module in the base model.
pub(super) fn unwrapped(name: &str) -> &str {
    name.strip_prefix(WRAPPERS).unwrap_or(name)
}

fn path(file: &TensorFile) -> PathBuf {
    file.path().to_path_buf()
}

/// Whether `slot` holds `name`, which it takes if it is empty.
fn same(slot: &mut Option<String>, name: &str) -> bool {
    slot.get_or_insert_with(|| name.to_owned()) == name
}
