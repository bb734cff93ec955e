//! What a person sees of a run, and how they end it.

use std::ops::ControlFlow;

use convpass::train::{EpochReport, Observer, Progress, RunStart, StepReport};

use crate::stop::Stop;

/// The progress bar, and Ctrl-C.
pub struct Watch {
    pub progress: Progress,
    /// What the run evaluates on its way are the test images.
    pub watches_test: bool,
    pub stop: Stop,
}

impl Observer for Watch {
    fn start(&mut self, start: &RunStart) {
        self.progress.start(start);
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        let _shown = self.progress.step(step);
        self.stop.flow()
    }

    fn pass(&mut self, label: &str, done: usize, images: usize) -> ControlFlow<()> {
        let label = if self.watches_test { "test" } else { label };
        let _shown = self.progress.pass(label, done, images);
        self.stop.flow()
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        // The line of an epoch says `val`.
        let val_top1 = epoch.val_top1.filter(|_| !self.watches_test);
        self.progress.epoch(&EpochReport { val_top1, ..*epoch });
    }
}
