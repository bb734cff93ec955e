//! LoRA: a low-rank product parallel to a linear layer (Hu et al., arXiv 2106.09685).

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::linear_targets::{LinearTarget, merge_linear, targets_of};
use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, json};
use super::widths;
use crate::error::{Error, Result};
use crate::nn::Init;
use crate::seam::{BackboneShape, Layer, LayerWeights, Place, Seam};

/// Config of LoRA: `x W^T + alpha / r * x A^T B^T`.
///
/// The default acts on queries and values with r = alpha = 8, as in the comparison of the Convpass
/// paper. A starts Kaiming uniform (a = sqrt(5), so the bound is `1 / sqrt(in)`) and B starts at
/// zero, as in LoRA's published code and in Hugging Face PEFT. The text of the LoRA paper draws A
/// from a normal distribution instead.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// r, the rank.
    pub rank: i64,
    /// The product is multiplied by `alpha / r`.
    pub alpha: f64,
    /// The linear layers that the method acts on, each at most once.
    pub targets: Vec<LinearTarget>,
    /// r of each block in place of `rank`; 0 leaves the block without LoRA. The factor is then
    /// `alpha` divided by the rank of the block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Vec<i64>>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        let targets = vec![LinearTarget::Q, LinearTarget::V];
        LoraConfig { rank: 8, alpha: 8.0, targets, blocks: None }
    }
}

impl LoraConfig {
    /// Checks that the products can be created.
    ///
    /// # Errors
    /// Returns [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("LoraConfig"))
    }

    fn check(&self) -> Result<()> {
        widths::validate("rank", self.rank, &self.blocks)?;
        if !self.alpha.is_finite() {
            return Err(Error::config("alpha", "finite", self.alpha));
        }
        let repeated = |i: usize| self.targets[..i].contains(&self.targets[i]);
        if self.targets.is_empty() || (0..self.targets.len()).any(repeated) {
            let found = format!("{:?}", self.targets);
            return Err(Error::config("targets", "a non-empty list without repetition", found));
        }
        Ok(())
    }
}

impl PetlMethod for LoraConfig {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn config(&self) -> Value {
        json(self)
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn needs(&self) -> &[Place] {
        &[Place::Blocks]
    }

    fn starts_as_identity(&self) -> bool {
        true
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        widths::acts_from(self.rank, &self.blocks)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(Lora::new(params, shape, self)?))
    }

    fn folds_beside_others(&self) -> bool {
        true
    }
}

/// The low-rank products of a whole backbone, by block.
#[derive(Debug)]
pub(super) struct Lora(Vec<Vec<Product>>);

#[derive(Debug)]
struct Product {
    target: LinearTarget,
    /// `[r, in]`.
    a: Tensor,
    /// `[out, r]`.
    b: Tensor,
    scale: f64,
}

impl Lora {
    /// Creates the weights `blocks.N.attn.q.lora_A.weight [r, in]`, `...lora_B.weight [out, r]` and
    /// so on, for each target.
    pub(super) fn new(
        params: &mut Params,
        shape: &BackboneShape,
        config: &LoraConfig,
    ) -> Result<Self> {
        let ranks = widths::resolve(config.rank, &config.blocks, shape.block_dims.len())?;
        let mut product = |block: usize, rank: i64, target: LinearTarget| {
            let (inputs, outputs) = target.size(shape, block)?;
            let mut params = params.at(format_args!("blocks.{block}.{}", target.path()));
            Ok(Product {
                target,
                a: params.get("lora_A.weight", &[rank, inputs], Init::KaimingUniform)?,
                b: params.get("lora_B.weight", &[outputs, rank], Init::Constant(0.0))?,
                scale: config.alpha / rank as f64,
            })
        };
        let mut blocks = Vec::with_capacity(ranks.len());
        for (block, rank) in ranks.into_iter().enumerate() {
            let targets = config.targets.iter().filter(|_| rank > 0);
            let products = targets.map(|&target| product(block, rank, target));
            blocks.push(products.collect::<Result<_>>()?);
        }
        Ok(Lora(blocks))
    }

    /// Returns one entry for each linear map of which the output of `layer` consists: its product,
    /// or `None` if the map has no product. Returns `None` if no map of the layer has one.
    fn at(&self, layer: Layer) -> Option<Vec<Option<&Product>>> {
        let (block, targets) = targets_of(layer)?;
        let products = self.0.get(block)?;
        let find = |target| products.iter().find(|product| product.target == target);
        let found: Vec<_> = targets.iter().map(|&target| find(target)).collect();
        found.iter().any(Option::is_some).then_some(found)
    }
}

/// Adds every product of a layer to its output with only two small matrix products: it stacks the
/// matrices A and puts the matrices B on a block diagonal.
fn add(products: &[Option<&Product>], input: &Tensor, output: Tensor) -> Result<Tensor> {
    let downs: Vec<&Tensor> = products.iter().flatten().map(|product| &product.a).collect();
    let hidden = input.f_linear(&Tensor::f_cat(&downs, 0)?, None::<&Tensor>)?;
    let outputs = output.size().last().copied().unwrap_or_default() / products.len() as i64;
    let ups = products.iter().map(|product| match product {
        Some(product) => Ok(product.b.f_mul_scalar(product.scale)?),
        None => Ok(hidden.f_new_zeros([outputs, 0], (hidden.kind(), hidden.device()))?),
    });
    // [out, sum of ranks]
    let up = Tensor::f_block_diag(&ups.collect::<Result<Vec<_>>>()?)?;
    let (hidden, flat) = (hidden.f_flatten(0, 1)?, output.f_flatten(0, 1)?);
    Ok(flat.f_addmm(&hidden, &up.f_transpose(0, 1)?)?.f_reshape(output.size())?)
}

impl Seam for Lora {
    fn after_layer(&self, layer: Layer, input: &Tensor, output: Tensor, _: bool) -> Result<Tensor> {
        match self.at(layer) {
            Some(products) => add(&products, input, output),
            None => Ok(output),
        }
    }

    fn can_merge(&self) -> bool {
        true
    }

    fn merge(&self, layer: Layer, weights: LayerWeights) -> Result<LayerWeights> {
        match self.at(layer) {
            Some(products) => merge_linear(weights, |input, output| add(&products, input, output)),
            None => Ok(weights),
        }
    }
}
