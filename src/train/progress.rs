//! A progress bar on the terminal.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::observer::{EpochReport, Observer, RunStart, StepReport};

/// Shows epoch, loss, accuracy, images per second and remaining time on standard error if it is a
/// terminal. Each finished epoch is printed as a line in any case.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    images: usize,
    /// Loss and accuracy of the last step that was read, and when it was.
    shown: Option<(f64, f64)>,
    read: Option<Instant>,
}

/// The time between two steps whose loss is shown. Reading one makes the CPU wait for a GPU.
const INTERVAL: Duration = Duration::from_millis(200);

impl Progress {
    /// Creates a bar with a label, such as the name of the task.
    pub fn new(label: &str) -> Self {
        const TEMPLATE: &str = "{prefix} [{wide_bar}] {pos}/{len} steps, {msg}, {eta} left";
        let bar = ProgressBar::new(0).with_prefix(label.to_owned());
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_secs(1));
        Progress { bar, images: 0, shown: None, read: None }
    }

    /// Prints a line. A hidden bar (no terminal) would drop it.
    fn line(&self, line: String) {
        if self.bar.is_hidden() { eprintln!("{line}") } else { self.bar.println(line) }
    }
}

impl Observer for Progress {
    fn start(&mut self, start: &RunStart) {
        let RunStart { epoch, step, epochs, steps, .. } = *start;
        (self.shown, self.read) = (None, None);
        let label = self.bar.prefix();
        match start.steps_done() {
            0 => {}
            _ if epoch >= epochs => self.line(format!("{label}: trained before")),
            _ => self.line(format!(
                "{label}: resuming at epoch {} of {epochs}, after step {step} of {steps}",
                epoch + 1
            )),
        }
        self.bar.set_position(start.steps_done() as u64);
        self.bar.reset_eta();
    }

    fn reads_step(&mut self, _steps_done: usize) -> bool {
        let is_due = self.read.is_none_or(|read| read.elapsed() >= INTERVAL);
        if is_due {
            self.read = Some(Instant::now());
        }
        is_due
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        self.images += step.images;
        if !step.loss.is_nan() {
            self.shown = Some((step.loss, step.accuracy));
        }
        let (loss, accuracy) = self.shown.unwrap_or((step.loss, step.accuracy));
        self.bar.set_length(step.epochs.saturating_mul(step.steps) as u64);
        self.bar.set_position(step.steps_done() as u64);
        let rate = self.images as f64 / self.bar.elapsed().as_secs_f64().max(1e-9);
        self.bar.set_message(format!(
            "epoch {}/{}, loss {loss:.4}, train {accuracy:.1} %, {rate:.1} images/s",
            step.epoch + 1,
            step.epochs,
        ));
        ControlFlow::Continue(())
    }

    fn pass(&mut self, label: &str, done: usize, images: usize) -> ControlFlow<()> {
        self.bar.set_message(format!("{label} {done}/{images}"));
        ControlFlow::Continue(())
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        let val = epoch.val_top1.map(|top1| format!(", val {top1:.2} %")).unwrap_or_default();
        let line = format!(
            "{} epoch {}: lr {:.2e}, loss {:.4}, train {:.2} %{val}, {:.1} s",
            self.bar.prefix(),
            epoch.epoch + 1,
            epoch.lr,
            epoch.loss,
            epoch.accuracy,
            epoch.seconds
        );
        self.line(line);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
