//! FacT: the updates of all linear layers as one factored tensor (Jie and Deng, arXiv 2212.03145).

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::linear_targets::{LinearTarget, merge_linear, targets_of};
use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, json};
use super::{checks, widths};
use crate::error::{Error, Result};
use crate::nn::{Init, dropout};
use crate::seam::{BackboneShape, Layer, LayerWeights, Place, Seam};

/// The way in which FacT factors the tensor of all updates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FactForm {
    /// FacT-TT: each layer has its own core between two factors that all layers share.
    #[default]
    TensorTrain,
    /// FacT-TK (Tucker): each core is a trained mixture of the slices of one core that all layers
    /// share.
    Tucker,
}

/// Config of FacT: `s * x U^T S V^T` parallel to every linear layer. All layers and blocks share U
/// `[r, C]` and V `[C, r]`. Each layer of the MLP counts as several layers of width C.
///
/// Where the paper leaves a choice open, this follows the published code. Dropout comes after the
/// core. V starts at zero, U and the cores of the tensor train start uniform with bound `1 /
/// sqrt(in)`, and Tucker's factors start Xavier uniform. Tucker's mixtures are ordered by block,
/// and within a block as queries, keys, values, projection and the layers of the MLP. The published
/// code chooses r and s for each task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FactConfig {
    /// The form of the factors.
    pub form: FactForm,
    /// r, the rank.
    pub rank: i64,
    /// s, the factor of the update.
    pub scale: f64,
    /// Dropout rate between the core and V, in training.
    pub dropout: f64,
}

impl Default for FactConfig {
    fn default() -> Self {
        FactConfig { form: FactForm::TensorTrain, rank: 16, scale: 1.0, dropout: 0.1 }
    }
}

/// The number of layers of width C that each layer of the MLP counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slots {
    c: i64,
    fc1: i64,
    fc2: i64,
}

impl Slots {
    fn of(shape: &BackboneShape) -> Result<Self> {
        let mut all = None;
        for (block, &c) in shape.block_dims.iter().enumerate() {
            let wide = |width: i64| match width % c {
                0 => Ok(width / c),
                _ => Err(Error::config("fact", "used with MLP widths that C divides", width)),
            };
            let (fc1, fc2) =
                (LinearTarget::Fc1.size(shape, block)?.1, LinearTarget::Fc2.size(shape, block)?.0);
            let slots = Slots { c, fc1: wide(fc1)?, fc2: wide(fc2)? };
            if all.is_some_and(|all| all != slots) {
                return Err(Error::config(
                    "fact",
                    "used with blocks of one width",
                    format!("{slots:?}"),
                ));
            }
            all = Some(slots);
        }
        all.ok_or_else(|| Error::config("fact", "used with a backbone that has blocks", "none"))
    }

    /// Returns the slots of a block: queries, keys, values, projection and the layers of the MLP.
    fn per_block(self) -> i64 {
        4 + self.fc1 + self.fc2
    }

    /// Returns the first slot of a map within its block and its number of slots.
    fn range(self, target: LinearTarget) -> (i64, i64) {
        match target {
            LinearTarget::Q => (0, 1),
            LinearTarget::K => (1, 1),
            LinearTarget::V => (2, 1),
            LinearTarget::Proj => (3, 1),
            LinearTarget::Fc1 => (4, self.fc1),
            LinearTarget::Fc2 => (4 + self.fc1, self.fc2),
        }
    }
}

const TARGETS: [LinearTarget; 6] = [
    LinearTarget::Q,
    LinearTarget::K,
    LinearTarget::V,
    LinearTarget::Proj,
    LinearTarget::Fc1,
    LinearTarget::Fc2,
];

impl FactConfig {
    /// Checks that the factors can be created.
    ///
    /// # Errors
    /// Returns [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("FactConfig"))
    }

    fn check(&self) -> Result<()> {
        widths::validate("rank", self.rank, &None)?;
        // The core has r^3 entries.
        if self.form == FactForm::Tucker && self.rank > 1 << 10 {
            return Err(Error::config("rank", "within 1..=1024 for Tucker's form", self.rank));
        }
        checks::scale(self.scale)?;
        checks::dropout(self.dropout)
    }
}

impl PetlMethod for FactConfig {
    fn name(&self) -> &'static str {
        "fact"
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
        ActsFrom::Block(0)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        Ok(Box::new(Fact::new(params, shape, self)?))
    }

    fn folds_beside_others(&self) -> bool {
        true
    }
}

/// The factors of a whole backbone.
#[derive(Debug)]
pub(super) struct Fact {
    /// `[r, C]`.
    u: Tensor,
    /// `[C, r]`.
    v: Tensor,
    cores: Cores,
    slots: Slots,
    scale: f64,
    dropout: f64,
}

#[derive(Debug)]
enum Cores {
    /// The core of each block and target, `[out r, in r]`.
    TensorTrain(Vec<Vec<Tensor>>),
    /// `[r, slots]` and `[r, r, r]`.
    Tucker { mixtures: Tensor, core: Tensor },
}

impl Fact {
    /// Creates the weights under the published names: `FacTu.weight`, `FacTv.weight`, and
    /// `blocks.N.attn.q_FacTs.weight` and so on, or `FacTp` and `FacTc`.
    pub(super) fn new(
        params: &mut Params,
        shape: &BackboneShape,
        config: &FactConfig,
    ) -> Result<Self> {
        let (slots, r, count) = (Slots::of(shape)?, config.rank, shape.block_dims.len());
        let u = params.get("FacTu.weight", &[r, slots.c], Init::KaimingUniform)?;
        let v = params.get("FacTv.weight", &[slots.c, r], Init::Constant(0.0))?;
        let cores = match config.form {
            FactForm::TensorTrain => {
                let mut core = |block: usize, target: LinearTarget| {
                    let n = slots.range(target).1;
                    let shape = if target == LinearTarget::Fc2 { [r, n * r] } else { [n * r, r] };
                    let name = format!("blocks.{block}.{}_FacTs.weight", target.path());
                    params.get(name, &shape, Init::KaimingUniform)
                };
                let mut block = |block| TARGETS.iter().map(|&t| core(block, t)).collect();
                Cores::TensorTrain((0..count).map(&mut block).collect::<Result<_>>()?)
            }
            FactForm::Tucker => {
                let all = slots.per_block() * count as i64;
                Cores::Tucker {
                    mixtures: params.get("FacTp", &[r, all], Init::XavierUniform)?,
                    core: params.get("FacTc", &[r, r, r], Init::XavierUniform)?,
                }
            }
        };
        Ok(Fact { u, v, cores, slots, scale: config.scale, dropout: config.dropout })
    }

    /// Returns the core of a map, `[out r, in r]`.
    fn core(&self, block: usize, target: LinearTarget) -> Result<Tensor> {
        match &self.cores {
            Cores::TensorTrain(blocks) => {
                let index = TARGETS.iter().position(|&t| t == target).unwrap_or_default();
                Ok(blocks[block][index].shallow_clone())
            }
            Cores::Tucker { mixtures, core } => {
                let (start, n) = self.slots.range(target);
                let first = block as i64 * self.slots.per_block() + start;
                // [r, r, r] x [r, n] -> [r, r, n] -> [r, r n], in the order of the published code.
                let mixed = core.f_matmul(&mixtures.f_narrow(1, first, n)?)?.f_flatten(1, 2)?;
                match target {
                    LinearTarget::Fc2 => Ok(mixed),
                    _ => Ok(mixed.f_transpose(0, 1)?),
                }
            }
        }
    }

    /// Adds the updates of `targets` to `output`, `[B, T, k C]`, which concatenates the outputs of
    /// these maps.
    fn add(
        &self,
        block: usize,
        targets: &[LinearTarget],
        input: &Tensor,
        output: &Tensor,
        train: bool,
    ) -> Result<Tensor> {
        let cores = targets.iter().map(|&target| self.core(block, target));
        let core = Tensor::f_cat(&cores.collect::<Result<Vec<_>>>()?, 0)?;
        // [B, T, n C] -> [B, T, n, C] -> [B, T, n r] -> [B, T, k r] -> [B, T, k, r]
        let parts = input.f_unflatten(-1, [-1, self.slots.c])?;
        let hidden = parts.f_linear(&self.u, None::<&Tensor>)?.f_flatten(-2, -1)?;
        let hidden = hidden.f_linear(&core, None::<&Tensor>)?;
        let drop = train && self.dropout > 0.0;
        let hidden = if drop { dropout(&hidden, self.dropout)? } else { hidden };
        let rank = self.u.size()[0];
        // [B T k, r] x [r, C] accumulates into [B T k, C].
        let rows = hidden.f_reshape([-1, rank])?;
        let up = self.v.f_mul_scalar(self.scale)?.f_transpose(0, 1)?;
        let sum = output.f_reshape([-1, self.slots.c])?.f_addmm(&rows, &up)?;
        Ok(sum.f_reshape(output.size())?)
    }
}

impl Seam for Fact {
    fn after_layer(
        &self,
        layer: Layer,
        input: &Tensor,
        output: Tensor,
        train: bool,
    ) -> Result<Tensor> {
        match targets_of(layer) {
            Some((block, targets)) => self.add(block, targets, input, &output, train),
            None => Ok(output),
        }
    }

    fn can_merge(&self) -> bool {
        true
    }

    fn merge(&self, layer: Layer, weights: LayerWeights) -> Result<LayerWeights> {
        match targets_of(layer) {
            Some((block, targets)) => merge_linear(weights, |input, output| {
                self.add(block, targets, input, &output, false)
            }),
            None => Ok(weights),
        }
    }
}
