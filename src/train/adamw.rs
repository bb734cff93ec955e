//! AdamW.

use tch::{Kind, Tensor, nn};

use crate::error::{Error, Result};

/// AdamW (Loshchilov and Hutter, 2019) over the variables of a `VarStore`, as PyTorch computes it.
///
/// tch's own optimizer panics on what this returns as an error, and orders its variables by their
/// creation, where this goes by their names.
#[derive(Debug)]
pub struct AdamW {
    weight_decay: f64,
    steps: i32,
    slots: Vec<Slot>,
}

/// Factors of the moving averages of the gradient and of its square.
const BETAS: (f64, f64) = (0.9, 0.999);
/// Added to the denominator.
const EPS: f64 = 1e-8;

/// A variable, and the moving averages of its gradient and of its square.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) name: String,
    pub(super) variable: Tensor,
    pub(super) mean: Tensor,
    pub(super) square: Tensor,
}

impl Slot {
    /// Whether a pass ever gave the variable a gradient. One that did not is left as it is; from
    /// then on a pass that gives none counts as a gradient of zero.
    pub(super) fn has_gradient(&self) -> Result<bool> {
        Ok(self.variable.f_grad()?.defined())
    }

    /// A gradient of zero, where the variable has none.
    pub(super) fn give_gradient(&self) -> Result<()> {
        if self.has_gradient()? {
            Ok(())
        } else {
            Ok(self.variable.f_sum(None::<Kind>)?.f_mul_scalar(0.0)?.f_backward()?)
        }
    }
}

impl AdamW {
    /// Betas 0.9 and 0.999, eps 1e-8 and this decoupled weight decay, over every variable of `vs`
    /// in the order of their names.
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
                Ok(Slot { mean: zeros()?, square: zeros()?, name, variable })
            })
            .collect::<Result<_>>()?;
        Ok(AdamW { weight_decay, steps: 0, slots })
    }

    /// The variables in the order of their names.
    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Takes up after so many steps, with what `restore` makes of each variable.
    pub(super) fn restore(
        &mut self,
        steps: i32,
        restore: &mut dyn FnMut(&mut Slot) -> Result<()>,
    ) -> Result<()> {
        self.steps = steps;
        self.slots.iter_mut().try_for_each(restore)
    }

    /// Clears gradients, runs `loss` backwards and updates every variable that got a gradient.
    ///
    /// # Errors
    /// What libtorch says, for instance of a loss that is no scalar.
    pub fn backward_step(&mut self, loss: &Tensor, lr: f64) -> Result<()> {
        self.zero_grad()?;
        loss.f_backward()?;
        self.step(lr)
    }

    /// Clears gradients.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn zero_grad(&mut self) -> Result<()> {
        for slot in &mut self.slots {
            let mut gradient = slot.variable.f_grad()?;
            if gradient.defined() {
                let _zeroed = gradient.f_detach_()?.f_zero_()?;
            }
        }
        Ok(())
    }

    /// Updates every variable that has a gradient.
    ///
    /// # Errors
    /// What libtorch says.
    pub fn step(&mut self, lr: f64) -> Result<()> {
        self.steps += 1;
        tch::no_grad(|| self.update(lr))
    }

    fn update(&mut self, lr: f64) -> Result<()> {
        let (beta1, beta2) = BETAS;
        let (bias1, bias2) = (1.0 - beta1.powi(self.steps), 1.0 - beta2.powi(self.steps));
        for Slot { variable, mean, square, .. } in &mut self.slots {
            let gradient = variable.f_grad()?;
            if !gradient.defined() {
                continue;
            }
            let weight = gradient.f_new_full(
                [0i64; 0],
                1.0 - beta1,
                (gradient.kind(), gradient.device()),
            )?;
            let _mean = mean.f_lerp_tensor_(&gradient, &weight)?;
            let _square = square.f_mul_scalar_(beta2)?;
            let _square = square.f_addcmul_(&gradient, &gradient.f_mul_scalar(1.0 - beta2)?)?;
            let denominator = square.f_sqrt()?.f_div_scalar_(bias2.sqrt())?.f_add_scalar_(EPS)?;
            let _decayed = variable.f_mul_scalar_(1.0 - lr * self.weight_decay)?;
            let update = mean.f_div(&denominator)?.f_mul_scalar_(lr / bias1)?;
            let _updated = variable.f_sub_(&update)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;
    use tch::nn::OptimizerConfig;

    #[test]
    fn equals_pytorchs() {
        let store = || {
            let vs = nn::VarStore::new(Device::Cpu);
            let start = Tensor::linspace(-1.0, 1.0, 12, (Kind::Float, Device::Cpu));
            let _a = vs.root().var_copy("a", &start.view([3, 4]));
            let _b = vs.root().var_copy("b", &start.narrow(0, 0, 4));
            vs
        };
        let loss = |vs: &nn::VarStore, step: i64| {
            let variables = vs.variables();
            ((&variables["a"] * (step + 1)).sin() * &variables["b"]).sum(Kind::Float)
        };
        let (ours, theirs) = (store(), store());
        let mut ada = AdamW::new(&ours, 1e-2).unwrap();
        let mut reference = nn::AdamW::default().wd(1e-2).build(&theirs, 0.0).unwrap();
        for step in 0..20 {
            let lr = 1e-2 / (step + 1) as f64;
            reference.set_lr(lr);
            ada.backward_step(&loss(&ours, step), lr).unwrap();
            reference.backward_step(&loss(&theirs, step));
        }
        for (name, expected) in theirs.variables() {
            let gap = (&ours.variables()[&name] - expected).abs().max().double_value(&[]);
            assert!(gap < 1e-6, "{name}: {gap}");
        }
    }
}
