//! Writes a model in the format of PEFT.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::config::{self, Written};
use super::names::{Module, WRAPPERS};
use super::{PeftOptions, TENSORS};
use crate::backbone::Backbone;
use crate::error::{Error, Result};
use crate::files::{write_atomically, write_atomically_with};
use crate::model::adapter_file::{self, Bytes};
use crate::model::petl_model::PetlModel;
use crate::petl::{LinearTarget, LoraConfig, Method};
use crate::seam::{BackboneShape, Layer};

pub(super) fn save<B: Backbone>(
    model: &PetlModel<B>,
    folder: &Path,
    options: &PeftOptions,
) -> Result<()> {
    let Method::Lora(lora) = &model.config().method else {
        return Err(Error::config("method", "lora", model.config().method.name()));
    };
    options.validate()?;
    let variables = model.var_store().variables().into_iter().collect();
    let source = ProductSource { lora, shape: &model.backbone().shape(), variables: &variables };
    let products = source.products(options)?;
    let Some(first) = products.first() else {
        return Err(Error::config("blocks", "a rank in some block", "0 in all"));
    };
    let config = source.config(first, &products, options);
    let mut tensors = BTreeMap::new();
    for Product { path, a, b, .. } in products {
        tensors.insert(format!("{WRAPPERS}{path}.lora_A.weight"), Bytes::of(&a)?);
        tensors.insert(format!("{WRAPPERS}{path}.lora_B.weight"), Bytes::of(&b)?);
    }
    if let Some(head) = &options.head {
        for part in ["weight", "bias"] {
            let value = Bytes::of(&variables[&format!("head.{part}")])?;
            tensors.insert(format!("{WRAPPERS}{head}.{part}"), value);
        }
    }
    let (tensors_path, config_path) = (folder.join(TENSORS), folder.join(config::FILE));
    let tensors = adapter_file::encode(&tensors_path, &tensors, ("format", "pt"))?;
    let config =
        serde_json::to_vec_pretty(&config).map_err(|e| Error::io(&config_path)(e.into()))?;
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    // The config is written when the tensors are complete beside the old ones, so that an error of
    // either leaves the old tensors.
    let mut refused = None;
    let config = || {
        write_atomically(&config_path, &config).map_err(|error| {
            refused = Some(error);
            ErrorKind::Other.into()
        })
    };
    let written = write_atomically_with(&tensors_path, |file| file.write_all(&tensors), config);
    refused.map_or(written, Err)
}

impl PeftOptions {
    /// Checks that the names can be parts of module paths.
    fn validate(&self) -> Result<()> {
        let word = |part: &str| {
            !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        let prefix = self.prefix.strip_suffix('.');
        if !self.prefix.is_empty() && !prefix.is_some_and(|path| path.split('.').all(word)) {
            return Err(Error::config(
                "prefix",
                "empty, or module names each followed by a dot",
                &self.prefix,
            ));
        }
        match &self.head {
            Some(head) if !head.split('.').all(word) => {
                Err(Error::config("head", "module names with dots between them", head))
            }
            _ => Ok(()),
        }
    }
}

/// The product beside a module of the base model.
struct Product {
    path: String,
    block: usize,
    /// `[r, in]`.
    a: Tensor,
    /// `[out, r]`.
    b: Tensor,
}

impl Product {
    fn rank(&self) -> i64 {
        self.a.size()[0]
    }
}

/// The config, the shape and the variables from which the products are made.
struct ProductSource<'a> {
    lora: &'a LoraConfig,
    shape: &'a BackboneShape,
    variables: &'a BTreeMap<String, Tensor>,
}

impl ProductSource<'_> {
    /// Returns the products of all modules of the base model, block by block.
    fn products(&self, options: &PeftOptions) -> Result<Vec<Product>> {
        let mut products = Vec::new();
        for block in (0..self.shape.block_dims.len()).filter(|&block| self.rank(block) > 0) {
            let family = options.names.family(self.has_swiglu(block));
            for module in family.modules {
                if module.targets.iter().any(|target| self.lora.targets.contains(target)) {
                    let path = family.path(&options.prefix, block, module);
                    let (a, b) = self.fused(block, module)?;
                    products.push(Product { path, block, a, b });
                }
            }
        }
        Ok(products)
    }

    /// Returns A and B of a module, fused if the module has several targets.
    fn fused(&self, block: usize, module: &Module) -> Result<(Tensor, Tensor)> {
        let maps = module.targets.iter().map(|&target| self.map(block, target));
        let maps = maps.collect::<Result<Vec<_>>>()?;
        let downs: Vec<&Tensor> = maps.iter().filter_map(|map| map.down.as_ref()).collect();
        let (a, b) = if downs.iter().all(|a| *a == downs[0]) {
            let ups = maps.iter().map(|map| map.up(self.rank(block)));
            (downs[0].shallow_clone(), Tensor::f_cat(&ups.collect::<Result<Vec<_>>>()?, 0)?)
        } else {
            let ups = maps.iter().map(|map| map.up(0)).collect::<Result<Vec<_>>>()?;
            (Tensor::f_cat(&downs, 0)?, Tensor::f_block_diag(&ups)?)
        };
        let (part, of) = module.part;
        let outputs = b.size()[0] / of;
        Ok((a, b.f_narrow(0, part * outputs, outputs)?))
    }

    fn map(&self, block: usize, target: LinearTarget) -> Result<LowRank> {
        let (_, outputs) = target.size(self.shape, block)?;
        let present = self.lora.targets.contains(&target);
        let variable = |which| {
            let name = format!("blocks.{block}.{}.{which}.weight", target.path());
            self.variables[&name].f_detach()?.f_to_device(Device::Cpu)
        };
        let read = |which| present.then(|| variable(which)).transpose();
        Ok(LowRank { outputs, down: read("lora_A")?, up: read("lora_B")? })
    }

    fn rank(&self, block: usize) -> i64 {
        self.lora.blocks.as_ref().map_or(self.lora.rank, |blocks| blocks[block])
    }

    /// Returns whether the first layer of the MLP packs two layers (SwiGLU), each as wide as the
    /// inputs of the second layer.
    fn has_swiglu(&self, block: usize) -> bool {
        let inputs = self.shape.layer(Layer::Fc2(block)).map_or(0, |layer| layer.inputs);
        self.shape.layer(Layer::Fc1(block)).is_some_and(|layer| layer.outputs == 2 * inputs)
    }

    /// Returns the `lora_alpha` with which PEFT computes this model's factor. PEFT divides it by
    /// the rank of the product, so it is `alpha` times the product's rank over the block's rank.
    fn alpha(&self, product: &Product) -> f64 {
        self.lora.alpha * (product.rank() / self.rank(product.block)) as f64
    }

    /// Returns the config with the rank and alpha of the first product. Other values are
    /// in the patterns, by path.
    fn config(&self, first: &Product, products: &[Product], options: &PeftOptions) -> Written {
        let unlike_first = |value: &dyn Fn(&Product) -> Value| {
            let others = products.iter().filter(|product| value(product) != value(first));
            others.map(|product| (product.path.clone(), value(product))).collect()
        };
        let alpha = |product: &Product| number(self.alpha(product));
        Written {
            alpha_pattern: unlike_first(&alpha),
            base_model_name_or_path: None,
            bias: "none",
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: true,
            lora_alpha: alpha(first),
            lora_dropout: 0.0,
            modules_to_save: options.head.clone().map(|head| vec![head]),
            peft_type: "LORA",
            r: first.rank(),
            rank_pattern: unlike_first(&|product| Value::from(product.rank())),
            target_modules: products.iter().map(|product| product.path.clone()).collect(),
            task_type: None,
            use_dora: false,
            use_rslora: false,
        }
    }
}

/// Converts a number to JSON, as an integer if possible, because PEFT declares alpha as an integer.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < (1i64 << 53) as f64 {
        Value::from(value as i64)
    } else {
        Value::from(value)
    }
}

/// A and B of one target; `None` if the method does not act on it.
struct LowRank {
    outputs: i64,
    down: Option<Tensor>,
    up: Option<Tensor>,
}

impl LowRank {
    /// Returns B, or `rank` columns of zeros.
    fn up(&self, rank: i64) -> Result<Tensor> {
        Ok(match &self.up {
            Some(up) => up.shallow_clone(),
            None => Tensor::f_zeros([self.outputs, rank], (Kind::Float, Device::Cpu))?,
        })
    }
}
