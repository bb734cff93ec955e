//! The times in logs.

use std::time::Instant;

use super::observer::RunStart;

/// Measures the time of a run and of its steps.
#[derive(Debug)]
pub(super) struct Pace {
    before: f64,
    started: Instant,
    /// The end of the previous step or pass.
    last: Instant,
}

impl Pace {
    pub(super) fn new(start: &RunStart) -> Self {
        let now = Instant::now();
        Pace { before: start.seconds, started: now, last: now }
    }

    /// Returns the seconds of the run, including those before it continued.
    pub(super) fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }

    /// Returns the images per second of a step that ends now.
    pub(super) fn step(&mut self, images: usize) -> f64 {
        let took = self.last.elapsed().as_secs_f64().max(1e-9);
        self.pass();
        images as f64 / took
    }

    /// Ends a pass that is no step.
    pub(super) fn pass(&mut self) {
        self.last = Instant::now();
    }
}
