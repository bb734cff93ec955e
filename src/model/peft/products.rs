//! Converts the tensors of a PEFT file to products by block and target.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tch::Tensor;

use super::config::PeftConfig;
use super::names::{self, Module, WRAPPERS};
use crate::checkpoint::TensorFile;
use crate::error::{Error, Result};
use crate::petl::LinearTarget;
use crate::seam::{BackboneShape, Layer};

/// The suffixes that PEFT adds to the name of a module for the tensors of its product.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// The contents of a file by module name.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// For each module with a product, its name in the file, its block and its entry in the tables.
    modules: BTreeMap<String, (usize, &'static Module)>,
    /// The head that was trained as a whole.
    pub(super) head: Option<String>,
    /// The head that has a product.
    pub(super) adapted_head: Option<String>,
    /// The path of the tower's modules before the number of a block.
    pub(super) tower: String,
}

/// Returns whether the MLPs of the backbone are gated: the first layer is then twice as wide as the
/// input of the second one.
fn is_gated(shape: &BackboneShape) -> bool {
    match (shape.layer(Layer::Fc1(0)), shape.layer(Layer::Fc2(0))) {
        (Some(fc1), Some(fc2)) => fc1.outputs == 2 * fc2.inputs,
        _ => false,
    }
}

impl Contents {
    /// Assigns the tensors of `file` to the modules of a backbone of this shape.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensors`] for tensors that belong neither to a head nor to a product
    /// beside a linear layer in the blocks of one tower.
    pub(super) fn of(file: &TensorFile, shape: &BackboneShape) -> Result<Self> {
        let depth = shape.block_dims.len();
        let gated = is_gated(shape);
        let mut contents = Contents::default();
        let mut unexpected: Vec<String> = Vec::new();
        for name in file.names() {
            if !contents.take(name, depth, gated) {
                unexpected.push(name.to_owned());
            }
        }
        if !unexpected.is_empty() {
            return Err(Error::unexpected(file.path(), unexpected, []));
        }
        if contents.modules.is_empty() {
            let reason = "it has no LoRA product for a layer of a block".to_owned();
            Err(Error::UnknownFormat { file: path(file), reason })
        } else {
            Ok(contents)
        }
    }

    /// Assigns one tensor; returns `false` if it belongs to no module.
    fn take(&mut self, name: &str, depth: usize, gated: bool) -> bool {
        let product = name.strip_suffix(A).or_else(|| name.strip_suffix(B));
        let trained = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"));
        match (product, trained) {
            (Some(module), _) if names::is_unused(unwrapped(module)) => true,
            (Some(module), _) if names::is_head(unwrapped(module)) => {
                same(&mut self.adapted_head, module)
            }
            (Some(module), _) => self.take_module(module, depth, gated),
            (None, Some(module)) => {
                names::is_head(unwrapped(module)) && same(&mut self.head, module)
            }
            (None, None) => false,
        }
    }

    fn take_module(&mut self, name: &str, depth: usize, gated: bool) -> bool {
        let place = names::locate(unwrapped(name), gated);
        let Some(place) = place.filter(|place| place.block < depth) else {
            return false;
        };
        if self.modules.is_empty() {
            self.tower = place.tower.to_owned();
        }
        self.modules.insert(name.to_owned(), (place.block, place.module));
        self.tower == place.tower
    }

    /// Reads every product and checks it against the config and the backbone.
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

/// The products beside each target of each block. There is more than one only if they add to
/// different parts of the target's outputs.
pub(super) type Products = BTreeMap<(usize, LinearTarget), Vec<Piece>>;

/// A product `x A^T B^T`, which is multiplied by `scale` and added to a part of a target's outputs.
#[derive(Debug)]
pub(super) struct Piece {
    /// `[r, in]`.
    pub(super) a: Tensor,
    /// `[out of the part, r]`.
    pub(super) b: Tensor,
    pub(super) scale: f64,
    /// Index of the part, and the number of parts.
    pub(super) part: (i64, i64),
}

impl Piece {
    pub(super) fn rank(&self) -> i64 {
        self.a.size()[0]
    }
}

/// Splits the product of a module into one product for each of its targets. For a fused module, the
/// columns of zeros in a target's share of B are dropped together with their rows of A. A fused
/// product that was made of several products is split into the same products again.
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

/// Reads a tensor and checks its shape.
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

/// Returns the path of a module in the base model.
pub(super) fn unwrapped(name: &str) -> &str {
    name.strip_prefix(WRAPPERS).unwrap_or(name)
}

fn path(file: &TensorFile) -> PathBuf {
    file.path().to_path_buf()
}

/// Sets `slot` to `name` if it is empty, and returns whether it then holds `name`.
fn same(slot: &mut Option<String>, name: &str) -> bool {
    slot.get_or_insert_with(|| name.to_owned()) == name
}
