//! Builds a model from the files of PEFT.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use tch::Tensor;

use super::config::PeftConfig;
use super::names::HEADS;
use super::products::{Contents, Piece, Products, read, unwrapped};
use super::{OLD_TENSORS, PeftHead, TENSORS};
use crate::backbone::Backbone;
use crate::checkpoint::TensorFile;
use crate::error::{Error, Result};
use crate::model::petl_model::{PetlConfig, PetlModel};
use crate::petl::{LinearTarget, LoraConfig, Method};

pub(super) fn load<B: Backbone>(
    backbone: B,
    folder: &Path,
    head: &PeftHead,
) -> Result<PetlModel<B>> {
    let config = PeftConfig::read(folder)?;
    let file = TensorFile::open(tensors_path(folder))?;
    let shape = backbone.shape();
    let contents = Contents::of(&file, &shape)?;
    let head = Head::read(&file, &contents, &config, head, backbone.feature_dim())?;
    let products = contents.products(&file, &config, &shape)?;

    let lora = lora_config(&products, shape.block_dims.len());
    let config = PetlConfig {
        drop_path: 0.0,
        ..PetlConfig::new(Method::Lora(lora.clone()), head.num_classes())
    };
    let model = PetlModel::new(backbone, &config)?;
    let variables = model.var_store().variables();
    tch::no_grad(|| {
        products.iter().try_for_each(|(&at, pieces)| write(&variables, &lora, at, pieces))?;
        head.write(&variables)
    })?;
    Ok(model)
}

fn tensors_path(folder: &Path) -> PathBuf {
    let (current, old) = (folder.join(TENSORS), folder.join(OLD_TENSORS));
    if !current.exists() && old.exists() { old } else { current }
}

/// Returns a config with room for all products: the rank of each block is the largest rank of its
/// layers, and the factor is that of the first product.
fn lora_config(products: &Products, depth: usize) -> LoraConfig {
    let mut blocks = vec![0; depth];
    for (&(block, _), pieces) in products {
        let rank = pieces.iter().map(Piece::rank).sum();
        blocks[block] = blocks[block].max(rank);
    }
    let rank = blocks.iter().copied().max().unwrap_or_default();
    let first = products.iter().find_map(|(&(block, _), pieces)| {
        let piece = pieces.iter().find(|piece| piece.scale != 0.0)?;
        Some(piece.scale * blocks[block] as f64)
    });
    let targets: BTreeSet<LinearTarget> = products.keys().map(|&(_, target)| target).collect();
    LoraConfig {
        rank,
        alpha: first.unwrap_or(0.0),
        targets: targets.into_iter().collect(),
        blocks: blocks.iter().any(|&block| block != rank).then_some(blocks),
    }
}

/// Writes the products beside one layer into the variables of that layer, one below the other. The
/// unused rows of A keep their initial values, and the unused columns of B stay zero.
fn write(
    variables: &HashMap<String, Tensor>,
    config: &LoraConfig,
    (block, target): (usize, LinearTarget),
    pieces: &[Piece],
) -> Result<()> {
    let variable = |which| &variables[&format!("blocks.{block}.{}.{which}.weight", target.path())];
    let (a, b) = (variable("lora_A"), variable("lora_B"));
    let own = config.alpha / a.size()[0] as f64;
    let mut start = 0;
    for piece in pieces {
        let (rank, outputs) = (piece.rank(), piece.b.size()[0]);
        // 1.0 up to the rounding of f64 if all factors are equal; f32 then keeps every bit.
        let factor = if own == 0.0 { 1.0 } else { piece.scale / own };
        a.f_narrow(0, start, rank)?.f_copy_(&piece.a)?;
        b.f_narrow(0, piece.part.0 * outputs, outputs)?
            .f_narrow(1, start, rank)?
            .f_copy_(&piece.b.f_mul_scalar(factor)?)?;
        start += rank;
    }
    Ok(())
}

/// Weight and bias of the head, or the number of classes of a new head.
enum Head {
    Values { weight: Tensor, bias: Tensor },
    New(i64),
}

impl Head {
    fn read(
        file: &TensorFile,
        contents: &Contents,
        config: &PeftConfig,
        elsewhere: &PeftHead,
        dim: i64,
    ) -> Result<Self> {
        if config.base_class.as_deref() == Some("CLIPForImageClassification") {
            let expected = "a model whose head reads the tower's features; this one averages tokens \
                            that were not normed";
            return Err(config.wrong("auto_mapping", expected, "CLIPForImageClassification"));
        }
        match (&contents.head, elsewhere) {
            (Some(name), PeftHead::New(classes)) => {
                let head = Head::values(file, name, dim)?;
                if head.num_classes() == *classes {
                    Ok(head)
                } else {
                    Err(Error::config("PeftHead::New", head.num_classes().to_string(), classes))
                }
            }
            (Some(name), _) => Head::values(file, name, dim),
            (None, PeftHead::Base(path)) => {
                let base = TensorFile::open(path)?;
                Head::values(&base, &base_head(&base, contents)?, dim)?
                    .adapted(file, contents, config)
            }
            (None, PeftHead::New(classes)) if contents.adapted_head.is_none() => {
                Ok(Head::New(*classes))
            }
            (None, _) => {
                let found = contents.adapted_head.as_deref().map_or("none".to_owned(), |name| {
                    format!("a LoRA product for the base model's {}", unwrapped(name))
                });
                let expected = "a list with the head, or use PeftHead::Base or PeftHead::New";
                Err(config.wrong("modules_to_save", expected, &found))
            }
        }
    }

    /// Reads the linear layer `name` `[K, dim]` of a file. Its bias is zero if the file has none.
    fn values(file: &TensorFile, name: &str, dim: i64) -> Result<Self> {
        let weight = format!("{name}.weight");
        let classes = file.shape(&weight).and_then(|shape| shape.first().copied()).unwrap_or(1);
        let weight = read(file, &weight, &[classes, dim])?;
        let bias = format!("{name}.bias");
        let bias = if file.contains(&bias) {
            read(file, &bias, &[classes])?
        } else {
            weight.f_new_zeros([classes], (weight.kind(), weight.device()))?
        };
        Ok(Head::Values { weight, bias })
    }

    /// Adds the product that the adapter has beside the head to the weight.
    fn adapted(self, file: &TensorFile, contents: &Contents, config: &PeftConfig) -> Result<Self> {
        let (Head::Values { weight, bias }, Some(name)) = (&self, &contents.adapted_head) else {
            return Ok(self);
        };
        let (rank, scale) = config.rank_and_scale(unwrapped(name))?;
        let (classes, dim) = weight.size2()?;
        let a = read(file, &format!("{name}.lora_A.weight"), &[rank, dim])?;
        let b = read(file, &format!("{name}.lora_B.weight"), &[classes, rank])?;
        let weight = weight.f_add(&b.f_matmul(&a)?.f_mul_scalar(scale)?)?;
        Ok(Head::Values { weight, bias: bias.shallow_clone() })
    }

    fn num_classes(&self) -> i64 {
        match self {
            Head::Values { bias, .. } => bias.numel() as i64,
            Head::New(classes) => *classes,
        }
    }

    fn write(&self, variables: &HashMap<String, Tensor>) -> Result<()> {
        if let Head::Values { weight, bias } = self {
            variables["head.weight"].shallow_clone().f_copy_(weight)?;
            variables["head.bias"].shallow_clone().f_copy_(bias)?;
        }
        Ok(())
    }
}

/// Returns the name of the head in the checkpoint of a base model.
fn base_head(base: &TensorFile, contents: &Contents) -> Result<String> {
    let adapted = contents.adapted_head.as_deref().map(unwrapped);
    let mut names = adapted.into_iter().chain(HEADS);
    match names.find(|name| base.contains(&format!("{name}.weight"))) {
        Some(name) => Ok(name.to_owned()),
        None => {
            let reason = format!("it has none of the heads of a base model ({})", HEADS.join(", "));
            Err(Error::UnknownFormat { file: base.path().to_path_buf(), reason })
        }
    }
}
