//! Losses and hits of steps that a device may still have to compute.

use tch::{Device, Tensor};

use crate::error::Result;

/// A step whose loss was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadStep {
    /// The step within its epoch.
    pub(super) step: usize,
    pub(super) images: usize,
    pub(super) lr: f64,
    /// The mean loss of the images.
    pub(super) loss: f64,
    /// The images whose highest logit is that of their label.
    pub(super) correct: usize,
}

/// The steps of an epoch that were taken and not read. To read them, the CPU waits for the device.
#[derive(Debug, Default)]
pub(super) struct Unread {
    /// The steps without loss and hits.
    steps: Vec<ReadStep>,
    /// `[2]` for each step: the mean loss and the hits.
    values: Vec<Tensor>,
}

impl Unread {
    /// Adds a step.
    pub(super) fn push(&mut self, step: usize, images: usize, lr: f64, values: Tensor) {
        self.steps.push(ReadStep { step, images, lr, loss: f64::NAN, correct: 0 });
        self.values.push(values);
    }

    /// Returns whether the values are on the CPU, so that nothing waits for them.
    pub(super) fn is_on_cpu(&self) -> bool {
        self.values.iter().all(|values| values.device() == Device::Cpu)
    }

    /// Returns the steps in their order and forgets them. One copy brings all of them to the CPU.
    pub(super) fn read(&mut self) -> Result<Vec<ReadStep>> {
        let steps = std::mem::take(&mut self.steps);
        let values = std::mem::take(&mut self.values);
        if values.is_empty() {
            return Ok(steps);
        }
        let values = Tensor::f_cat(&values, 0)?.f_to_device(Device::Cpu)?;
        let values = Vec::<f64>::try_from(values.f_to_kind(tch::Kind::Double)?)?;
        let with = |(step, values): (ReadStep, &[f64])| ReadStep {
            loss: values[0],
            correct: values[1] as usize,
            ..step
        };
        Ok(steps.into_iter().zip(values.chunks_exact(2)).map(with).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_once_and_in_their_order() {
        let mut unread = Unread::default();
        assert!(unread.read().unwrap().is_empty());
        for step in 3..6 {
            let values = Tensor::from_slice(&[0.5 * step as f32, step as f32 + 1.0]);
            unread.push(step, 8, 0.1, values);
        }
        assert!(unread.is_on_cpu());
        let read = unread.read().unwrap();
        let found: Vec<_> = read.iter().map(|step| (step.step, step.loss, step.correct)).collect();
        assert_eq!(found, [(3, 1.5, 4), (4, 2.0, 5), (5, 2.5, 6)]);
        assert!(unread.read().unwrap().is_empty());
    }
}
