//! The times that logs state.

use std::time::Instant;

use super::observer::RunStart;

/// How long a run has taken, and its steps.
#[derive(Debug)]
pub(super) struct Pace {
    before: f64,
    started: Instant,
    /// The end of what came before the step that is being taken.
    last: Instant,
}

impl Pace {
    pub(super) fn new(start: &RunStart) -> Self {
        let now = Instant::now();
        Pace { before: start.seconds, started: now, last: now }
    }

    /// Seconds of the run, those before it was taken up counted in.
    pub(super) fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }

    /// Images a second of a step of so many images, which ends now.
    pub(super) fn step(&mut self, images: usize) -> f64 {
        let took = self.last.elapsed().as_secs_f64().max(1e-9);
        self.pass();
        images as f64 / took
    }

    /// What ends now was no step.
    pub(super) fn pass(&mut self) {
        self.last = Instant::now();
    }
}
