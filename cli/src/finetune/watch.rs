//! The observer that shows the progress of a run and ends it on Ctrl-C.

use std::ops::ControlFlow;

use convpass::train::{EpochReport, Observer, Progress, RunStart, StepReport};

use crate::stop::Stop;

/// Shows the progress bar, and ends the run on Ctrl-C.
pub struct Watch {
    /// `None` in a process whose progress is that of another.
    pub progress: Option<Progress>,
    /// Whether the run is measured on the test images after epochs, not on validation images.
    pub watches_test: bool,
    pub stop: Stop,
}

impl Observer for Watch {
    fn start(&mut self, start: &RunStart) {
        if let Some(progress) = &mut self.progress {
            progress.start(start);
        }
    }

    fn reads_step(&mut self, steps_done: usize) -> bool {
        self.progress.as_mut().is_some_and(|progress| progress.reads_step(steps_done))
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        let _shown = self.progress.as_mut().map(|progress| progress.step(step));
        self.stop.flow()
    }

    fn pass(&mut self, label: &str, done: usize, images: usize) -> ControlFlow<()> {
        let label = if self.watches_test { "test" } else { label };
        let _shown = self.progress.as_mut().map(|progress| progress.pass(label, done, images));
        self.stop.flow()
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        // The progress line labels the result as `val`, which would be wrong for test images.
        let val_top1 = epoch.val_top1.filter(|_| !self.watches_test);
        if let Some(progress) = &mut self.progress {
            progress.epoch(&EpochReport { val_top1, ..*epoch });
        }
    }
}
