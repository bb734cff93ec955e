//! The learning rate over a run: linear warm-up, then cosine.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// When the learning rate changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stepped {
    /// Once after each epoch, as in the published code with timm's `CosineLRScheduler`: epoch e has
    /// the rate of time e - 1, so that epochs 0 and 1 both have the first rate of the warm-up.
    #[default]
    AfterEpoch,
    /// At each step: step k has the rate of time k.
    EachStep,
}

/// Linear warm-up from `warmup_lr` to `lr`, then a cosine down to `min_lr`. The cosine is computed
/// over the whole run, including the warm-up. The default is the schedule of the paper for VTAB-1k.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CosineSchedule {
    /// The rate after warm-up.
    pub lr: f64,
    /// The rate at the end.
    pub min_lr: f64,
    /// The rate at which warm-up starts.
    pub warmup_lr: f64,
    /// Epochs of warm-up.
    pub warmup_epochs: usize,
    /// When the rate changes.
    pub stepped: Stepped,
}

impl Default for CosineSchedule {
    fn default() -> Self {
        CosineSchedule {
            lr: 1e-3,
            min_lr: 1e-5,
            warmup_lr: 1e-6,
            warmup_epochs: 10,
            stepped: Stepped::AfterEpoch,
        }
    }
}

impl CosineSchedule {
    /// Returns the default schedule with another peak rate. `min_lr` and `warmup_lr` are lowered to
    /// `lr` if it is below them.
    pub fn with_lr(lr: f64) -> Self {
        let default = CosineSchedule::default();
        let (min_lr, warmup_lr) = (default.min_lr.min(lr), default.warmup_lr.min(lr));
        CosineSchedule { lr, min_lr, warmup_lr, ..default }
    }

    /// Checks the rates.
    ///
    /// # Errors
    /// [`Error::Config`] for the first rate that is negative or not finite.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("CosineSchedule"))
    }

    fn check(&self) -> Result<()> {
        let rates = [("lr", self.lr), ("min_lr", self.min_lr), ("warmup_lr", self.warmup_lr)];
        for (field, rate) in rates {
            if !(rate.is_finite() && rate >= 0.0) {
                return Err(Error::config(field, "finite and not negative", rate));
            }
        }
        Ok(())
    }

    /// Returns the learning rate of `step` (within its epoch) of `epoch`, in a run of `epochs` epochs
    /// of `steps` steps each.
    pub fn lr(&self, epoch: usize, step: usize, epochs: usize, steps: usize) -> f64 {
        match self.stepped {
            Stepped::AfterEpoch => self.at(epoch.saturating_sub(1), self.warmup_epochs, epochs),
            Stepped::EachStep => {
                let time = epoch.saturating_mul(steps).saturating_add(step);
                let warmup = self.warmup_epochs.saturating_mul(steps);
                self.at(time, warmup, epochs.saturating_mul(steps))
            }
        }
    }

    fn at(&self, time: usize, warmup: usize, end: usize) -> f64 {
        let (time, warmup, end) = (time as f64, warmup as f64, end.max(1) as f64);
        if time < warmup {
            return self.warmup_lr + (self.lr - self.warmup_lr) * time / warmup;
        }
        let cosine = (std::f64::consts::PI * time / end).cos();
        self.min_lr + 0.5 * (self.lr - self.min_lr) * (1.0 + cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 5e-3 * expected, "{found} against {expected}");
    }

    #[test]
    fn the_published_rates() {
        let lr = |epoch| CosineSchedule::default().lr(epoch, 0, 100, 15);
        for (epoch, expected) in [(0, 1e-6), (1, 1e-6), (10, 9.0e-4), (11, 9.76e-4), (99, 1.10e-5)]
        {
            close(lr(epoch), expected);
        }
    }

    #[test]
    fn by_step_it_is_continuous_and_ends_at_the_least() {
        let schedule = CosineSchedule {
            warmup_epochs: 1,
            stepped: Stepped::EachStep,
            ..CosineSchedule::default()
        };
        let lr = |step: usize| schedule.lr(step / 31, step % 31, 4, 31);
        close(lr(0), 1e-6);
        assert!((1..31).all(|step| lr(step) > lr(step - 1)));
        assert!((32..124).all(|step| lr(step) < lr(step - 1)));
        assert!(lr(123) < 1.1e-5 && lr(123) > 1e-5);
    }

    #[test]
    fn a_run_shorter_than_its_warm_up_and_an_empty_one_are_finite() {
        let schedule = CosineSchedule::default();
        assert!((0..3).all(|epoch| schedule.lr(epoch, 0, 3, 1).is_finite()));
        assert!(schedule.lr(0, 0, 0, 0).is_finite());
    }
}
