//! VPT: trained prompt tokens in the sequence (Jia et al., arXiv 2203.12119).

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, json};
use super::{checks, widths};
use crate::error::{Error, Result};
use crate::nn::{Init, dropout};
use crate::seam::{BackboneShape, Layer, Place, Seam, TokenLayout};

/// Config of VPT. The default is VPT-deep, with the number of prompts and the dropout rate (0) of
/// the published code.
///
/// Prompts are the last prefix tokens: they come after the class token and the registers and before
/// the patches. They are inserted after the position embedding is added, and after CLIP's norm
/// before the first block. The features never read them: average pooling uses only the patches.
/// Prompts start uniform with bound `sqrt(6 / (3 p^2 + C))` for patches of side p, as in the
/// published code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VptConfig {
    /// Number of prompts in each block that has prompts.
    pub num_tokens: i64,
    /// If true, every block has its own prompts, which replace those of the previous block
    /// (VPT-deep). If false, the prompts of the first block pass through all blocks (VPT-shallow).
    pub deep: bool,
    /// Dropout rate on the prompts, in training.
    pub dropout: f64,
    /// Number of prompts of each block in place of `num_tokens`, 0 for none. Only valid if `deep`
    /// is true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Vec<i64>>,
}

impl Default for VptConfig {
    fn default() -> Self {
        VptConfig { num_tokens: 5, deep: true, dropout: 0.0, blocks: None }
    }
}

impl VptConfig {
    /// Checks that the prompts can be created.
    ///
    /// # Errors
    /// Returns [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("VptConfig"))
    }

    fn check(&self) -> Result<()> {
        widths::validate("num_tokens", self.num_tokens, &self.blocks)?;
        if self.blocks.is_some() && !self.deep {
            return Err(Error::config("blocks", "absent unless `deep` is true", "present"));
        }
        checks::dropout(self.dropout)
    }

    /// Returns the number of prompts that each block adds.
    fn tokens(&self, count: usize) -> Result<Vec<i64>> {
        let mut tokens = widths::resolve(self.num_tokens, &self.blocks, count)?;
        if !self.deep {
            tokens.iter_mut().skip(1).for_each(|tokens| *tokens = 0);
        }
        Ok(tokens)
    }
}

impl PetlMethod for VptConfig {
    fn name(&self) -> &'static str {
        "vpt"
    }

    fn config(&self) -> Value {
        json(self)
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn needs(&self) -> &[Place] {
        &[Place::Blocks, Place::Prefix]
    }

    fn starts_as_identity(&self) -> bool {
        false
    }

    fn acts_from(&self, _: &BackboneShape) -> ActsFrom {
        widths::acts_from(self.num_tokens, &self.blocks)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(Prompts::new(params, shape, self)?))
    }
}

/// The prompts of a whole backbone.
#[derive(Debug)]
pub(super) struct Prompts {
    /// The prompts of each block, `[tokens, C]`.
    blocks: Vec<Option<Tensor>>,
    deep: bool,
    dropout: f64,
}

impl Prompts {
    /// Creates the weights `blocks.N.prompts [tokens, C]`; without `deep`, only those of the first
    /// block.
    pub(super) fn new(
        params: &mut Params,
        shape: &BackboneShape,
        config: &VptConfig,
    ) -> Result<Self> {
        let Some(patch) = shape.layer(Layer::PatchEmbed) else {
            return Err(Error::config("vpt", "used with a patch embedding", "none"));
        };
        let dims = &shape.block_dims;
        let mut prompts = |(index, (&c, tokens)): (usize, (&i64, i64))| {
            let bound = (6.0 / (patch.inputs + c) as f64).sqrt();
            let name = format_args!("blocks.{index}.prompts");
            (tokens > 0)
                .then(|| params.get(name, &[tokens, c], Init::Uniform { bound }))
                .transpose()
        };
        let tokens = config.tokens(dims.len())?;
        let blocks =
            dims.iter().zip(tokens).enumerate().map(&mut prompts).collect::<Result<_>>()?;
        Ok(Prompts { blocks, deep: config.deep, dropout: config.dropout })
    }

    /// Returns the number of prompts of the previous block that are still in the sequence when a
    /// block is entered.
    fn left_by_the_block_before(&self, block: usize) -> i64 {
        let before = block.checked_sub(1).filter(|_| self.deep);
        let prompts = before.and_then(|before| self.blocks.get(before)?.as_ref());
        prompts.map_or(0, |prompts| prompts.size()[0])
    }
}

impl Seam for Prompts {
    fn entering(
        &self,
        block: usize,
        tokens: Tensor,
        layout: TokenLayout,
        train: bool,
    ) -> Result<(Tensor, TokenLayout)> {
        let stale = self.left_by_the_block_before(block);
        let own = self.blocks.get(block).and_then(Option::as_ref);
        if stale == 0 && own.is_none() {
            return Ok((tokens, layout));
        }
        let kept = layout.prefix - stale;
        let mut parts = vec![tokens.f_narrow(1, 0, kept)?];
        let mut prefix = kept;
        if let Some(own) = own {
            let prompts = own.f_unsqueeze(0)?.f_expand([tokens.size()[0], -1, -1], false)?;
            let drop = train && self.dropout > 0.0;
            parts.push(if drop { dropout(&prompts, self.dropout)? } else { prompts });
            prefix += own.size()[0];
        }
        parts.push(tokens.f_narrow(1, layout.prefix, layout.num_patches())?);
        Ok((Tensor::f_cat(&parts, 1)?, TokenLayout { prefix, ..layout }))
    }
}
