//! Forward and backward passes of a model, and their results.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::{Check, Failure, ensure};
use crate::backbone::Backbone;
use crate::model::PetlModel;

/// Moves every variable away from its initial value, so that none of them is zero.
///
/// # Errors
/// Returns the error that libtorch reports.
pub fn disturb<B: Backbone>(model: &PetlModel<B>) -> Check {
    tch::no_grad(|| {
        for (index, mut variable) in variables(model).into_values().enumerate() {
            let count = variable.numel() as i64;
            let steps = Tensor::f_arange(count, (Kind::Float, variable.device()))?;
            let noise = steps.f_add_scalar(index as f64 + 1.0)?.f_mul_scalar(1.7)?.f_sin()?;
            let noise = noise.f_mul_scalar(0.1)?.f_view_as(&variable)?;
            let _sum = variable.f_add_(&noise)?;
        }
        Ok(())
    })
}

pub(super) const SEED: i64 = 7;

/// The results of one forward and backward pass.
pub(super) struct Backward {
    pub(super) logits: Tensor,
    pub(super) loss: Tensor,
    /// The next numbers that libtorch's generator draws.
    pub(super) next_draw: Tensor,
    pub(super) gradients: BTreeMap<String, Tensor>,
}

impl Backward {
    pub(super) fn of<B: Backbone>(
        model: &PetlModel<B>,
        pass: impl FnOnce() -> crate::error::Result<(Tensor, Tensor)>,
    ) -> Result<Self, Failure> {
        for mut variable in variables(model).into_values() {
            variable.zero_grad();
        }
        tch::manual_seed(SEED);
        let (logits, loss) = pass()?;
        let next_draw = Tensor::f_rand([4], (Kind::Float, Device::Cpu))?;
        let mut gradients = BTreeMap::new();
        for (name, variable) in variables(model) {
            let gradient = variable.f_grad()?;
            ensure(gradient.defined(), || format!("{name} has no gradient"))?;
            gradients.insert(name, copy(&gradient)?);
        }
        Ok(Backward { logits, loss, next_draw, gradients })
    }
}

/// Returns a guard that keeps other checks waiting, because only one check at a time may seed
/// libtorch's generator.
pub(super) fn alone() -> impl Drop {
    static GENERATOR: Mutex<()> = Mutex::new(());
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn variables<B: Backbone>(model: &PetlModel<B>) -> BTreeMap<String, Tensor> {
    model.var_store().variables().into_iter().collect()
}

/// Returns the cross entropy; sample `i` has the label `i` modulo the number of classes.
pub(super) fn loss(logits: &Tensor) -> crate::error::Result<Tensor> {
    let labels = Tensor::f_arange(logits.size()[0], (Kind::Int64, logits.device()))?;
    let labels = labels.f_remainder(logits.size()[1])?;
    Ok(logits.f_cross_entropy_loss(&labels, None::<&Tensor>, tch::Reduction::Mean, -100, 0.0)?)
}

/// Returns the largest absolute difference divided by the largest absolute value of `expected`.
pub(super) fn relative(found: &Tensor, expected: &Tensor) -> Result<f64, Failure> {
    let gap = found.f_sub(expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
    let most = expected.f_abs()?.f_max()?.f_double_value(&[])?;
    Ok(if gap == 0.0 { 0.0 } else { gap / most })
}

/// Returns a copy with a storage of its own.
pub(super) fn copy(tensor: &Tensor) -> Result<Tensor, tch::TchError> {
    let mut copy = tensor.f_detach()?.f_zeros_like()?;
    copy.f_copy_(&tensor.f_detach()?)?;
    Ok(copy)
}
