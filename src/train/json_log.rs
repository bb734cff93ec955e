//! The log of a run as JSON lines.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::observer::{EpochReport, Observer, RunStart, StepReport};
use super::pace::Pace;
use crate::error::{Error, Result};

/// Writes one JSON object on a line after each step and after each epoch.
///
/// Each object has `event` ("step" or "epoch"), `step` (number of steps of the run so far), `epoch`
/// (counted from 0), `lr`, `loss` and `accuracy` (of the epoch so far, in percent) and `seconds` (of
/// the run). A step also has `images_per_s`, and an epoch `val_top1` in percent if there are
/// validation images. JSON has no NaN, so a number that is not finite is `null`.
///
/// Each line is written at once. If a run continues, the lines after its starting point are removed,
/// so that no step occurs twice. A run from its beginning empties the file.
#[derive(Debug)]
pub struct JsonLog {
    path: PathBuf,
    file: File,
    steps: usize,
    pace: Pace,
    error: Option<Error>,
}

#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    place: LinePlace,
    lr: f64,
    loss: f64,
    accuracy: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    val_top1: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    images_per_s: Option<f64>,
    seconds: f64,
}

#[derive(Serialize, Deserialize)]
struct LinePlace {
    event: Event,
    step: usize,
    epoch: usize,
}

#[derive(PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Event {
    Step,
    Epoch,
}

impl JsonLog {
    /// Opens or creates the log of one run at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(Error::io(&path))?;
        Ok(JsonLog { path, file, steps: 0, pace: Pace::new(&RunStart::default()), error: None })
    }

    /// Ends the log. An error of writing does not end the run; it is returned here.
    ///
    /// # Errors
    /// [`Error::Io`] if a line could not be written.
    pub fn finish(self) -> Result<()> {
        self.error.map_or(Ok(()), Err)
    }

    /// Keeps the first error. Nothing is written after it.
    fn note(&mut self, result: io::Result<()>) {
        self.error = self.error.take().or(result.map_err(Error::io(&self.path)).err());
    }

    fn write(&mut self, line: &Line) {
        if self.error.is_none() {
            // One write, so that a killed process leaves a whole line or none.
            let written = serde_json::to_string(line)
                .map_err(io::Error::from)
                .and_then(|text| self.file.write_all((text + "\n").as_bytes()));
            self.note(written);
        }
    }
}

impl Observer for JsonLog {
    fn start(&mut self, start: &RunStart) {
        self.steps = start.steps;
        self.pace = Pace::new(start);
        let cut = cut(&mut self.file, start);
        self.note(cut);
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        let images_per_s = Some(self.pace.step(step.images));
        self.write(&Line {
            place: LinePlace { event: Event::Step, step: step.steps_done(), epoch: step.epoch },
            lr: step.lr,
            loss: step.loss,
            accuracy: step.accuracy,
            val_top1: None,
            images_per_s,
            seconds: self.pace.seconds(),
        });
        ControlFlow::Continue(())
    }

    fn pass(&mut self, _label: &str, _done: usize, _images: usize) -> ControlFlow<()> {
        self.pace.pass();
        ControlFlow::Continue(())
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        let step = (epoch.epoch + 1).saturating_mul(self.steps);
        self.write(&Line {
            place: LinePlace { event: Event::Epoch, step, epoch: epoch.epoch },
            lr: epoch.lr,
            loss: epoch.loss,
            accuracy: epoch.accuracy,
            val_top1: epoch.val_top1,
            images_per_s: None,
            seconds: self.pace.seconds(),
        });
        self.pace.pass();
    }
}

/// The largest length in bytes of a line that is read back.
const LONGEST: u64 = 4096;

/// Removes the lines that are not from before `start`.
fn cut(file: &mut File, start: &RunStart) -> io::Result<()> {
    file.rewind()?;
    let (mut reader, mut line, mut kept) = (BufReader::new(&*file), Vec::new(), 0);
    loop {
        line.clear();
        // Bounded, because another file may have no line breaks.
        let length = reader.by_ref().take(LONGEST).read_until(b'\n', &mut line)?;
        if !is_before(&line, start) {
            break;
        }
        kept += length as u64;
    }
    file.set_len(kept)?;
    file.seek(SeekFrom::Start(kept)).map(drop)
}

/// Returns whether `line` is complete and from before `start`.
fn is_before(line: &[u8], start: &RunStart) -> bool {
    let Some(line) = line.strip_suffix(b"\n") else { return false };
    serde_json::from_slice(line).is_ok_and(|LinePlace { event, step, epoch }| match event {
        Event::Step => step <= start.steps_done(),
        Event::Epoch => epoch < start.epoch,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(epoch: usize, step: usize) -> RunStart {
        RunStart { epoch, step, epochs: 3, steps: 2, seconds: 100.0 }
    }

    /// Two epochs of two steps each, from `from` on.
    fn run(log: &mut JsonLog, from: RunStart) {
        log.start(&from);
        for epoch in from.epoch..2 {
            for step in 0..2 {
                if (epoch, step) >= (from.epoch, from.step) {
                    let (epochs, steps, images) = (3, 2, 8);
                    let (lr, loss, accuracy) = (1e-3, f64::NAN, 50.0);
                    let report =
                        StepReport { epoch, step, epochs, steps, images, lr, loss, accuracy };
                    assert!(log.step(&report).is_continue());
                }
            }
            let (lr, loss, accuracy, val_top1) = (1e-3, 0.5, 50.0, Some(62.5));
            log.epoch(&EpochReport { epoch, lr, loss, accuracy, val_top1, seconds: 1.0 });
        }
    }

    fn places(path: &Path) -> Vec<(String, u64)> {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        let place = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            (line["event"].as_str().unwrap().to_owned(), line["step"].as_u64().unwrap())
        };
        text.lines().map(place).collect()
    }

    #[test]
    fn a_run_that_is_taken_up_has_each_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let mut log = JsonLog::open(&path).unwrap();
        run(&mut log, start(0, 0));
        log.finish().unwrap();
        let whole = places(&path);
        let kinds: Vec<&str> = whole.iter().map(|(event, _)| event.as_str()).collect();
        assert_eq!(kinds, ["step", "step", "epoch", "step", "step", "epoch"]);
        let first = std::fs::read_to_string(&path).unwrap();
        let first: serde_json::Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
        assert!(first["loss"].is_null() && first["images_per_s"].as_f64().unwrap() > 0.0);
        assert!(first["seconds"].as_f64().unwrap() >= 100.0);

        let bytes = std::fs::read(&path).unwrap();
        for from in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)] {
            // Killed at the end, or in the middle of the last line.
            for length in [bytes.len(), bytes.len() - 3] {
                std::fs::write(&path, &bytes[..length]).unwrap();
                let mut log = JsonLog::open(&path).unwrap();
                run(&mut log, start(from.0, from.1));
                log.finish().unwrap();
                let cut =
                    &whole[..whole.len() - usize::from(from == (2, 0) && length < bytes.len())];
                assert_eq!(places(&path), cut, "{from:?}");
            }
        }
        std::fs::write(&path, "not a log\n").unwrap();
        run(&mut JsonLog::open(&path).unwrap(), start(0, 0));
        assert_eq!(places(&path), whole);
        assert!(matches!(JsonLog::open(folder.path()).unwrap_err(), Error::Io { .. }));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_log_that_cannot_be_written_says_so_at_the_end() {
        let mut log = JsonLog::open("/dev/full").unwrap();
        run(&mut log, start(0, 0));
        let error = log.finish().unwrap_err();
        assert!(error.to_string() == "/dev/full", "{error}");
    }
}
