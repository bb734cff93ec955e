//! What updates the weights of a training step: the interface, and gradients before the update.

use tch::{Kind, Tensor, nn};

use super::schedule::CosineSchedule;
use crate::error::{Error, Result};

/// Updates the trainables from their gradients.
///
/// [`fit`](fn@crate::train::fit) uses [`AdamW`](crate::train::AdamW); another optimizer is passed
/// in [`FitOptions`](crate::train::FitOptions). tch's optimizers implement this trait, but cannot be
/// resumed, because libtorch does not give out their state.
pub trait Optimizer {
    /// Updates each trainable that has a gradient, at the learning rate `lr`.
    ///
    /// # Errors
    /// The error of libtorch, which ends the run.
    fn step(&mut self, lr: f64) -> Result<()>;

    /// Returns the tensors that change from step to step, by names that never change. They share
    /// their storage with the optimizer: a resumed run copies the stored values into them. An
    /// optimizer therefore allocates them when it is made, not at the first step.
    ///
    /// # Errors
    /// [`Error::Input`] if the optimizer cannot be resumed.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;

    /// Tells the optimizer that a resumed run has taken `steps` steps. The values of
    /// [`Optimizer::state`] are in place already.
    ///
    /// # Errors
    /// [`Error::Input`] if the optimizer cannot be resumed.
    fn resume(&mut self, steps: usize) -> Result<()>;
}

impl Optimizer for nn::Optimizer {
    fn step(&mut self, lr: f64) -> Result<()> {
        self.set_lr(lr);
        nn::Optimizer::step(self);
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Err(not_resumable())
    }

    fn resume(&mut self, _steps: usize) -> Result<()> {
        Err(not_resumable())
    }
}

fn not_resumable() -> Error {
    Error::Input {
        argument: "optimizer",
        expected: "one whose state can be stored, such as convpass::train::AdamW".to_owned(),
        found: "an optimizer of tch, whose state libtorch does not give out".to_owned(),
    }
}

/// Gives the learning rate of each step. A closure with these arguments is a schedule.
pub trait Schedule {
    /// Returns the learning rate of step `step` (from 0, within its epoch) of epoch `epoch` (from
    /// 0), in a run of `epochs` epochs of `steps` steps each.
    fn lr(&self, epoch: usize, step: usize, epochs: usize, steps: usize) -> f64;
}

impl Schedule for CosineSchedule {
    fn lr(&self, epoch: usize, step: usize, epochs: usize, steps: usize) -> f64 {
        CosineSchedule::lr(self, epoch, step, epochs, steps)
    }
}

impl<F: Fn(usize, usize, usize, usize) -> f64> Schedule for F {
    fn lr(&self, epoch: usize, step: usize, epochs: usize, steps: usize) -> f64 {
        self(epoch, step, epochs, steps)
    }
}

/// Sets the gradients that there are to zero.
pub(super) fn zero_grad<'a>(variables: impl IntoIterator<Item = &'a Tensor>) -> Result<()> {
    for variable in variables {
        let mut gradient = variable.f_grad()?;
        if gradient.defined() {
            let _zeroed = gradient.f_detach_()?.f_zero_()?;
        }
    }
    Ok(())
}

/// Scales the gradients of `variables` in place so that their joint L2 norm is at most `max_norm`,
/// as PyTorch's `clip_grad_norm_` does, and returns the norm before, a scalar of dtype f32. Variables
/// without a gradient are left out. Nothing is copied from the device.
///
/// # Errors
/// [`Error::Config`] if `max_norm` is not positive; the errors of libtorch.
pub fn clip_grad_norm<'a>(
    variables: impl IntoIterator<Item = &'a Tensor>,
    max_norm: f64,
) -> Result<Tensor> {
    check_max_norm(max_norm)?;
    let gradients = variables.into_iter().map(Tensor::f_grad).collect::<Result<Vec<_>, _>>()?;
    let mut gradients: Vec<Tensor> = gradients.into_iter().filter(Tensor::defined).collect();
    tch::no_grad(|| {
        let norms = gradients.iter().map(|g| g.f_norm()?.f_to_kind(Kind::Float));
        let norms = norms.collect::<Result<Vec<_>, _>>()?;
        if norms.is_empty() {
            return Ok(Tensor::f_from_slice(&[0f32])?.f_squeeze()?);
        }
        let norm = Tensor::f_stack(&norms, 0)?.f_norm()?;
        let scale = norm.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(max_norm)?;
        let scale = scale.f_clamp_max(1.0)?;
        for gradient in &mut gradients {
            let scale = scale.f_to_kind(gradient.kind())?;
            let _scaled = gradient.f_mul_(&scale)?;
        }
        Ok(norm)
    })
}

/// Checks the norm that gradients are clipped to.
pub(super) fn check_max_norm(max_norm: f64) -> Result<()> {
    if max_norm.is_finite() && max_norm > 0.0 {
        return Ok(());
    }
    Err(Error::config("max_grad_norm", "finite and positive", max_norm))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn clipped_gradients_have_the_norm_and_keep_their_direction() {
        let variable = |values: &[f32]| Tensor::from_slice(values).set_requires_grad(true);
        let (a, b) = (variable(&[1.0, 2.0]), variable(&[2.0]));
        let unused = variable(&[5.0]);
        ((&a * 3.0).sum(Kind::Float) + &b * 4.0 * 0.5).sum(Kind::Float).backward();
        // Gradients 3, 3 and 2.
        let variables = [&a, &b, &unused];
        let norm = clip_grad_norm(variables, 1.0).unwrap().double_value(&[]);
        assert!((norm - 22f64.sqrt()).abs() < 1e-6, "{norm}");
        for (variable, expected) in [(&a, 3.0), (&b, 2.0)] {
            let found = variable.grad().double_value(&[0]);
            assert!((found - expected / norm).abs() < 1e-6, "{found}");
        }
        assert!(!unused.grad().defined());
        // A norm below the limit changes nothing.
        let before = a.grad().copy();
        let _norm = clip_grad_norm(variables, 2.0).unwrap();
        assert_eq!(a.grad(), before);
        let none = clip_grad_norm([&unused], 1.0).unwrap();
        assert_eq!((none.double_value(&[]), none.device()), (0.0, Device::Cpu));
    }

    #[test]
    fn a_limit_that_is_none_is_refused() {
        for limit in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = clip_grad_norm([], limit).unwrap_err();
            assert!(matches!(error, Error::Config { .. }), "{error}");
        }
    }
}
