//! AdamW.

use tch::{Device, Kind, Tensor, nn};

use super::optimizer::{Optimizer, zero_grad};
use crate::error::{Error, Result};
use crate::ffi::{AdamWStep, FusedSlot, fused_adamw};

/// AdamW (Loshchilov and Hutter, 2019) over the variables of a `VarStore`, as PyTorch computes it.
///
/// Unlike tch's optimizer it returns libtorch's errors instead of panicking, visits the variables in
/// the order of their names instead of their creation, and can be resumed.
#[derive(Debug)]
pub struct AdamW {
    weight_decay: f64,
    steps: i32,
    slots: Vec<Slot>,
}

/// Decay rates of the moving averages of the gradient and of its square.
const BETAS: (f64, f64) = (0.9, 0.999);
/// Added to the denominator.
const EPS: f64 = 1e-8;

/// A variable, and the moving averages of its gradient and of its square.
#[derive(Debug)]
struct Slot {
    name: String,
    variable: Tensor,
    /// The learning rate of the variable divided by that of the step.
    lr_factor: f64,
    mean: Tensor,
    square: Tensor,
}

impl AdamW {
    /// Creates the optimizer of every variable of `vs`, with betas 0.9 and 0.999, eps 1e-8 and the
    /// decoupled weight decay `weight_decay`.
    ///
    /// # Errors
    /// [`Error::Config`] for a weight decay that is negative or not finite.
    pub fn new(vs: &nn::VarStore, weight_decay: f64) -> Result<Self> {
        if !(weight_decay.is_finite() && weight_decay >= 0.0) {
            return Err(Error::config("weight_decay", "finite and not negative", weight_decay));
        }
        let mut variables: Vec<_> = vs.variables().into_iter().collect();
        variables.sort_by(|a, b| a.0.cmp(&b.0));
        let slots = variables
            .into_iter()
            .map(|(name, variable)| {
                let zeros = || variable.f_detach()?.f_zeros_like();
                Ok(Slot { mean: zeros()?, square: zeros()?, name, variable, lr_factor: 1.0 })
            })
            .collect::<Result<_>>()?;
        Ok(AdamW { weight_decay, steps: 0, slots })
    }

    /// Multiplies the learning rate of each variable whose name starts with `prefix` by `factor`,
    /// and leaves that of every other variable as it is. The result is that of a parameter group
    /// with its own rate in PyTorch: the decoupled weight decay has the same rate. The head of a
    /// [`PetlModel`](crate::PetlModel) has the prefix `head.`.
    ///
    /// # Errors
    /// [`Error::Config`] for a factor that is negative or not finite.
    pub fn with_lr_factor(mut self, prefix: &str, factor: f64) -> Result<Self> {
        if !(factor.is_finite() && factor >= 0.0) {
            return Err(Error::config("lr_factor", "finite and not negative", factor));
        }
        for slot in self.slots.iter_mut().filter(|slot| slot.name.starts_with(prefix)) {
            slot.lr_factor = factor;
        }
        Ok(self)
    }

    /// Sets the gradients to zero, runs the backward pass of `loss` and updates every variable that
    /// has a gradient, at the learning rate `lr`.
    ///
    /// # Errors
    /// The error of libtorch, for instance if `loss` is not a scalar.
    pub fn backward_step(&mut self, loss: &Tensor, lr: f64) -> Result<()> {
        self.zero_grad()?;
        loss.f_backward()?;
        self.step(lr)
    }

    /// Sets the gradients to zero.
    ///
    /// # Errors
    /// The error of libtorch.
    pub fn zero_grad(&mut self) -> Result<()> {
        zero_grad(self.slots.iter().map(|slot| &slot.variable))
    }

    /// Updates every variable that has a gradient, at the learning rate `lr`.
    ///
    /// # Errors
    /// The error of libtorch.
    pub fn step(&mut self, lr: f64) -> Result<()> {
        self.steps += 1;
        tch::no_grad(|| self.update(lr))
    }

    /// On a CPU the variables are updated with the operations of PyTorch's loop, so that the results
    /// are those of PyTorch there. Elsewhere one kernel updates them: a GPU computes it faster than
    /// it can be asked for the operations of each variable.
    fn update(&mut self, lr: f64) -> Result<()> {
        if self.slots.iter().any(|slot| slot.variable.device() != Device::Cpu) {
            return self.update_at_once(lr);
        }
        self.slots.iter_mut().try_for_each(|slot| slot.update(self.steps, self.weight_decay, lr))
    }

    /// Updates all variables of one learning rate and one dtype in one kernel.
    fn update_at_once(&mut self, lr: f64) -> Result<()> {
        let mut rest = Vec::with_capacity(self.slots.len());
        for slot in &mut self.slots {
            let gradient = slot.variable.f_grad()?;
            if !gradient.defined() {
                continue;
            }
            // The kernel visits all tensors in the order of their memory.
            let is_alike = gradient.stride() == slot.variable.stride()
                && gradient.kind() == slot.variable.kind()
                && slot.mean.stride() == slot.variable.stride();
            if is_alike {
                rest.push((&*slot, gradient));
            } else {
                slot.update(self.steps, self.weight_decay, lr)?;
            }
        }
        while let Some(&(first, _)) = rest.first() {
            let like = |slot: &Slot| (slot.lr_factor, slot.variable.kind(), slot.variable.device());
            let key = like(first);
            let (group, others): (Vec<_>, Vec<_>) =
                rest.into_iter().partition(|(slot, _)| like(slot) == key);
            rest = others;
            let fused: Vec<FusedSlot> = group
                .iter()
                .map(|(slot, gradient)| [&slot.variable, gradient, &slot.mean, &slot.square])
                .collect();
            let number = Tensor::f_full([0i64; 0], f64::from(self.steps), (Kind::Float, key.2))?;
            let (lr, weight_decay) = (lr * key.0, self.weight_decay);
            let step = AdamWStep { lr, betas: BETAS, weight_decay, eps: EPS };
            fused_adamw(&fused, &number, &step)?;
        }
        Ok(())
    }
}

impl Slot {
    /// Updates the variable in step `number`, from 1, if it has a gradient.
    fn update(&mut self, number: i32, weight_decay: f64, lr: f64) -> Result<()> {
        let (beta1, beta2) = BETAS;
        let (bias1, bias2) = (1.0 - beta1.powi(number), 1.0 - beta2.powi(number));
        let Slot { variable, mean, square, lr_factor, .. } = self;
        let lr = lr * *lr_factor;
        let gradient = variable.f_grad()?;
        if !gradient.defined() {
            return Ok(());
        }
        let options = (gradient.kind(), gradient.device());
        let weight = gradient.f_new_full([0i64; 0], 1.0 - beta1, options)?;
        let _mean = mean.f_lerp_tensor_(&gradient, &weight)?;
        let _square = square.f_mul_scalar_(beta2)?;
        let _square = square.f_addcmul_(&gradient, &gradient.f_mul_scalar(1.0 - beta2)?)?;
        let denominator = square.f_sqrt()?.f_div_scalar_(bias2.sqrt())?.f_add_scalar_(EPS)?;
        let _decayed = variable.f_mul_scalar_(1.0 - lr * weight_decay)?;
        let update = mean.f_div(&denominator)?.f_mul_scalar_(lr / bias1)?;
        let _updated = variable.f_sub_(&update)?;
        Ok(())
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, lr: f64) -> Result<()> {
        AdamW::step(self, lr)
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let of = |group, slot: &Slot, tensor: &Tensor| {
            (format!("{group}.{}", slot.name), tensor.shallow_clone())
        };
        let means = self.slots.iter().map(|slot| of("mean", slot, &slot.mean));
        let squares = self.slots.iter().map(|slot| of("square", slot, &slot.square));
        Ok(means.chain(squares).collect())
    }

    fn resume(&mut self, steps: usize) -> Result<()> {
        self.steps = i32::try_from(steps).map_err(|_| Error::Input {
            argument: "steps",
            expected: format!("at most {}", i32::MAX),
            found: steps.to_string(),
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::nn::OptimizerConfig;

    /// A variable that is not contiguous in its gradient, and a vector.
    fn store() -> nn::VarStore {
        let vs = nn::VarStore::new(Device::Cpu);
        let start = Tensor::linspace(-1.0, 1.0, 12, (Kind::Float, Device::Cpu));
        let _a = vs.root().var_copy("a", &start.view([3, 4]));
        let _b = vs.root().var_copy("b", &start.narrow(0, 0, 4));
        let _unused = vs.root().var_copy("unused", &start);
        vs
    }

    fn loss(vs: &nn::VarStore, step: i64) -> Tensor {
        let variables = vs.variables();
        let a = variables["a"].transpose(0, 1).contiguous().transpose(0, 1);
        ((a * (step + 1)).sin() * &variables["b"]).sum(Kind::Float)
    }

    fn same(ours: &nn::VarStore, theirs: &nn::VarStore) {
        for (name, expected) in theirs.variables() {
            let gap = (&ours.variables()[&name] - expected).abs().max().double_value(&[]);
            assert!(gap < 1e-6, "{name}: {gap}");
        }
    }

    #[test]
    fn equals_pytorchs() {
        let (ours, theirs) = (store(), store());
        let mut ada = AdamW::new(&ours, 1e-2).unwrap();
        let mut reference = nn::AdamW::default().wd(1e-2).build(&theirs, 0.0).unwrap();
        for step in 0..20 {
            let lr = 1e-2 / (step + 1) as f64;
            reference.set_lr(lr);
            ada.backward_step(&loss(&ours, step), lr).unwrap();
            reference.backward_step(&loss(&theirs, step));
        }
        same(&ours, &theirs);
    }

    #[test]
    fn one_kernel_computes_the_same_as_the_loop() {
        let (fused, plain) = (store(), store());
        let [mut ada, mut reference] = [&fused, &plain]
            .map(|vs| AdamW::new(vs, 1e-2).unwrap().with_lr_factor("b", 0.3).unwrap());
        for step in 0..20 {
            let lr = 1e-2 / (step + 1) as f64;
            ada.zero_grad().unwrap();
            loss(&fused, step).backward();
            ada.steps += 1;
            let versions = || fused.variables().into_values().map(|v| v.internal_version());
            let before: i64 = versions().sum();
            tch::no_grad(|| ada.update_at_once(lr)).unwrap();
            assert_eq!(versions().sum::<i64>(), before + 2, "a write that is not seen");
            reference.backward_step(&loss(&plain, step), lr).unwrap();
        }
        same(&fused, &plain);
    }
}
