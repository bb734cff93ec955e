//! Reports of a run while it goes on.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use super::batch_sum::number;

/// The point at which a run starts: its beginning, or the point at which an earlier call was
/// interrupted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunStart {
    /// Number of epochs that were finished before.
    pub epoch: usize,
    /// Number of steps of the next epoch that were taken before.
    pub step: usize,
    /// Number of epochs of the run.
    pub epochs: usize,
    /// Number of steps of an epoch.
    pub steps: usize,
    /// Seconds of the run before this start.
    pub seconds: f64,
}

impl RunStart {
    /// Returns the number of steps of the whole run that were taken before.
    pub fn steps_done(&self) -> usize {
        self.epoch.saturating_mul(self.steps).saturating_add(self.step)
    }
}

/// The report at the end of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// The epoch, counted from 0.
    pub epoch: usize,
    /// The step within the epoch, counted from 0.
    pub step: usize,
    /// Number of epochs of the run.
    pub epochs: usize,
    /// Number of steps of an epoch.
    pub steps: usize,
    /// Number of images of this step.
    pub images: usize,
    /// The learning rate of this step.
    pub lr: f64,
    /// Mean cross entropy of the epoch so far. NaN if the model is not on a CPU and
    /// [`Observer::reads_step`] returned `false`.
    pub loss: f64,
    /// Top-1 accuracy in percent on the training batches of the epoch so far, with dropout and drop
    /// path. NaN where `loss` is NaN.
    pub accuracy: f64,
}

impl StepReport {
    /// Returns the number of steps of the whole run so far, including this one.
    pub fn steps_done(&self) -> usize {
        self.epoch.saturating_mul(self.steps).saturating_add(self.step).saturating_add(1)
    }
}

/// The report at the end of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochReport {
    /// The epoch, counted from 0.
    pub epoch: usize,
    /// The learning rate of the last step.
    pub lr: f64,
    /// Mean cross entropy on the training batches.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Top-1 accuracy in percent on the training batches, with dropout and drop path.
    pub accuracy: f64,
    /// Top-1 accuracy in percent on the validation images, if they were evaluated.
    pub val_top1: Option<f64>,
    /// Seconds of the epoch, including validation.
    pub seconds: f64,
}

/// Watches a run and may end it.
///
/// A `Vec` of observers is an observer that passes every report to each of them. Each may end the
/// run.
pub trait Observer {
    /// Called once before the first step.
    fn start(&mut self, _start: &RunStart) {}

    /// Returns whether the loss and the accuracy in the report of the step with the number
    /// `steps_done`, counted from 1 over the whole run, are read.
    ///
    /// The CPU waits for a GPU to compute them, and cannot prepare the next step meanwhile. A run
    /// that diverges ends at the next step that is read, or at the end of the epoch or before its
    /// state is written; the error names the step that diverged, and the weights of the model may
    /// not be finite then.
    fn reads_step(&mut self, _steps_done: usize) -> bool {
        true
    }

    /// Called after each step. `Break` ends the run with the current weights.
    fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// Called after each batch of a pass without training, such as validation, with its name, the
    /// number of finished images and the number of all images. `Break` ends the run.
    fn pass(&mut self, _label: &str, _done: usize, _images: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// Called after each epoch.
    fn epoch(&mut self, _epoch: &EpochReport) {}
}

/// An observer that does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn reads_step(&mut self, _steps_done: usize) -> bool {
        false
    }
}

impl<O: Observer + ?Sized> Observer for &mut O {
    fn start(&mut self, start: &RunStart) {
        (**self).start(start);
    }

    fn reads_step(&mut self, steps_done: usize) -> bool {
        (**self).reads_step(steps_done)
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

    fn reads_step(&mut self, steps_done: usize) -> bool {
        self.iter_mut().any(|each| each.reads_step(steps_done))
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

/// Returns `Break` if any of `flows` is `Break`. Every item is evaluated.
fn all(flows: impl Iterator<Item = ControlFlow<()>>) -> ControlFlow<()> {
    match flows.filter(ControlFlow::is_break).count() {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    }
}
