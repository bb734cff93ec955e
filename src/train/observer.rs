//! What is told of a run while it goes on.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use crate::eval::number;

/// Where a run starts: at its beginning, or where an interrupted one is taken up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunStart {
    /// Epochs that were finished before.
    pub epoch: usize,
    /// Steps of the next epoch that were taken before.
    pub step: usize,
    /// Epochs of the run.
    pub epochs: usize,
    /// Steps an epoch.
    pub steps: usize,
    /// Seconds that the run took before.
    pub seconds: f64,
}

impl RunStart {
    /// Steps of the run that were taken before.
    pub fn steps_done(&self) -> usize {
        self.epoch.saturating_mul(self.steps).saturating_add(self.step)
    }
}

/// One step, as it ends.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// From 0.
    pub epoch: usize,
    /// From 0, within the epoch.
    pub step: usize,
    /// Epochs of the run.
    pub epochs: usize,
    /// Steps an epoch.
    pub steps: usize,
    /// Images of this step.
    pub images: usize,
    /// The learning rate of this step.
    pub lr: f64,
    /// Mean cross entropy over the epoch so far.
    pub loss: f64,
    /// Top-1 in percent on training batches, dropout and drop path on, over the epoch so far.
    pub accuracy: f64,
}

impl StepReport {
    /// Steps of the run so far, this one counted in.
    pub fn steps_done(&self) -> usize {
        self.epoch.saturating_mul(self.steps).saturating_add(self.step + 1)
    }
}

/// One epoch, as it ends.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochReport {
    /// From 0.
    pub epoch: usize,
    /// The learning rate of its last step.
    pub lr: f64,
    /// Mean cross entropy on the training batches.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Top-1 in percent on the training batches, dropout and drop path on.
    pub accuracy: f64,
    /// Top-1 in percent on the validation images, where there are any.
    pub val_top1: Option<f64>,
    /// Seconds, validation included.
    pub seconds: f64,
}

/// Watches a run and may end it.
///
/// A `Vec` of observers is an observer: each is told everything, and each may end the run.
pub trait Observer {
    /// Before anything else.
    fn start(&mut self, _start: &RunStart) {}

    /// After each step; `Break` ends the run with the weights as they are.
    fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// After each batch of a pass without training: features computed once, or validation.
    /// `Break` ends the run.
    fn pass(&mut self, _label: &str, _done: usize, _images: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// After each epoch.
    fn epoch(&mut self, _epoch: &EpochReport) {}
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

impl<O: Observer + ?Sized> Observer for &mut O {
    fn start(&mut self, start: &RunStart) {
        (**self).start(start);
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        (**self).step(step)
    }

    fn pass(&mut self, label: &str, done: usize, images: usize) -> ControlFlow<()> {
        (**self).pass(label, done, images)
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        (**self).epoch(epoch);
    }
}

impl<O: Observer> Observer for Vec<O> {
    fn start(&mut self, start: &RunStart) {
        self.iter_mut().for_each(|each| each.start(start));
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        all(self.iter_mut().map(|each| each.step(step)))
    }

    fn pass(&mut self, label: &str, done: usize, images: usize) -> ControlFlow<()> {
        all(self.iter_mut().map(|each| each.pass(label, done, images)))
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        self.iter_mut().for_each(|each| each.epoch(epoch));
    }
}

/// Asks all, also where one of them breaks.
fn all(flows: impl Iterator<Item = ControlFlow<()>>) -> ControlFlow<()> {
    match flows.filter(ControlFlow::is_break).count() {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    }
}
