//! The log of a run as an event file of TensorBoard.
//!
//! The available crates need `protoc` to build, or an old version of protobuf with advisories. Only
//! two messages and a frame around them are needed.

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::observer::{EpochReport, Observer, RunStart, StepReport};
use super::pace::Pace;
use crate::error::{Error, Result};

/// Writes scalars for TensorBoard: `train/loss`, `train/accuracy` (of the epoch so far, in percent),
/// `train/lr` and `train/images_per_s` after each step; `epoch/loss`, `epoch/accuracy` and, if there
/// are validation images, `val/top1` after each epoch. The step is counted through the whole run.
///
/// Each start of a run writes its own file. It tells TensorBoard to drop the steps of older files
/// from its starting point on, so that no step is shown twice.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: File,
    steps: usize,
    pace: Pace,
    error: Option<Error>,
}

impl TensorBoard {
    /// Creates an event file in `folder`, and the folder if it does not exist. TensorBoard shows a
    /// folder as a run of that name.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder or the file cannot be created.
    pub fn create(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let (time, process) =
            (time_of_file(folder).map_err(Error::io(folder))?, std::process::id());
        let path = folder.join(format!("{START}{time:020.9}.{process}.convpass"));
        let file = File::create_new(&path).map_err(Error::io(&path))?;
        let (steps, pace) = (0, Pace::new(&RunStart::default()));
        let mut log = TensorBoard { path, file, steps, pace, error: None };
        log.write(Event { file_version: Some("brain.Event:2".to_owned()), ..Event::default() });
        match log.error.take() {
            Some(error) => Err(error),
            None => Ok(log),
        }
    }

    /// Ends the log. An error of writing does not end the run; it is returned here.
    ///
    /// # Errors
    /// [`Error::Io`] if an event could not be written.
    pub fn finish(self) -> Result<()> {
        self.error.map_or(Ok(()), Err)
    }

    /// Writes the event with the current time. Keeps the first error; nothing is written after it.
    fn write(&mut self, event: Event) {
        if self.error.is_none() {
            // One write, so that a killed process leaves a whole event or none.
            let written = self.file.write_all(&record(&Event { wall_time: now(), ..event }));
            self.error = written.map_err(Error::io(&self.path)).err();
        }
    }

    fn scalars(&mut self, step: usize, scalars: &[(&str, f64)]) {
        self.write(Event { summary: Some(summary(scalars)), ..Event::at(step) });
    }
}

impl Observer for TensorBoard {
    fn start(&mut self, start: &RunStart) {
        self.steps = start.steps;
        self.pace = Pace::new(start);
        let session_log = Some(SessionLog { status: SessionLog::START });
        self.write(Event { session_log, ..Event::at(start.steps_done().saturating_add(1)) });
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        let images_per_s = self.pace.step(step.images);
        let scalars = [
            ("train/loss", step.loss),
            ("train/accuracy", step.accuracy),
            ("train/lr", step.lr),
            ("train/images_per_s", images_per_s),
        ];
        self.scalars(step.steps_done(), &scalars);
        ControlFlow::Continue(())
    }

    fn pass(&mut self, _label: &str, _done: usize, _images: usize) -> ControlFlow<()> {
        self.pace.pass();
        ControlFlow::Continue(())
    }

    fn epoch(&mut self, epoch: &EpochReport) {
        let mut scalars = vec![("epoch/loss", epoch.loss), ("epoch/accuracy", epoch.accuracy)];
        scalars.extend(epoch.val_top1.map(|top1| ("val/top1", top1)));
        self.scalars((epoch.epoch + 1).saturating_mul(self.steps), &scalars);
        self.pace.pass();
    }
}

/// How the name of an event file begins. The time in seconds since 1970 follows.
const START: &str = "events.out.tfevents.";

/// Returns the time for the name of a new file in `folder`. TensorBoard reads files in the order of
/// their names, so the time is not before that of a file there, even if the clock went back.
fn time_of_file(folder: &Path) -> std::io::Result<f64> {
    let mut time = now();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let rest = name.strip_prefix(START).unwrap_or_default();
        let seconds = rest.split('.').next().and_then(|seconds| seconds.parse::<u32>().ok());
        if let Some(seconds) = seconds.map(f64::from).filter(|&seconds| seconds >= time) {
            // What follows the seconds is not always their fraction.
            time = seconds + 1.0;
        }
    }
    Ok(time)
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// `Event` of TensorFlow's event.proto with the fields that are used here.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

impl Event {
    fn at(step: usize) -> Self {
        Event { step: i64::try_from(step).unwrap_or(i64::MAX), ..Event::default() }
    }
}

/// `SessionLog` of event.proto. A start makes the events of older files from its step on obsolete.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

impl SessionLog {
    const START: i32 = 1;
}

/// `Summary` of summary.proto.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

/// `Summary.Value` of summary.proto. The number is one of several kinds of value, so a zero is
/// written too.
#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

fn summary(scalars: &[(&str, f64)]) -> Summary {
    let scalar = |&(tag, value): &(&str, f64)| Scalar {
        tag: tag.to_owned(),
        simple_value: Some(value as f32),
    };
    Summary { value: scalars.iter().map(scalar).collect() }
}

/// Returns an event in the frame of a TFRecord: its length, the checksum of the length, the event,
/// the checksum of the event.
fn record(event: &Event) -> Vec<u8> {
    let event = event.encode_to_vec();
    let length = (event.len() as u64).to_le_bytes();
    let (of_length, of_event) = (checksum(&length), checksum(&event));
    [&length[..], &of_length[..], &event[..], &of_event[..]].concat()
}

/// Returns the CRC-32C, masked as TensorFlow does it for a checksum that is stored beside the data.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_what_tensorboards_own_writer_makes() {
        let at = |seconds: f64, event| Event { wall_time: 1_700_000_000.25 + seconds, ..event };
        let scalars =
            |scalars: &[_], step| Event { summary: Some(summary(scalars)), ..Event::at(step) };
        let version = Event { file_version: Some("brain.Event:2".to_owned()), ..Event::default() };
        let start = Event { session_log: Some(SessionLog { status: 1 }), ..Event::at(1) };
        let first = [("train/loss", 2.5), ("train/accuracy", 0.0), ("train/lr", 1e-6)];
        let later = [("train/loss", f64::INFINITY), ("train/accuracy", 62.5), ("train/lr", 1e-3)];
        let events = [
            at(0.0, version),
            at(1.0, start),
            at(2.0, scalars(&first, 1)),
            at(3.0, scalars(&later, 300)),
            at(4.0, scalars(&[("val/top1", 71.25)], 300)),
        ];
        let found: Vec<u8> = events.iter().flat_map(record).collect();
        let golden = "tests/integration/fixtures/tensorboard/run.tfevents";
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join(golden);
        assert!(found == std::fs::read(golden).unwrap());
    }

    /// Returns the events of a file. Each frame is checked.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let (mut rest, mut events) = (&bytes[..], Vec::new());
        while let Some((length, after)) = rest.split_first_chunk::<8>() {
            let length = u64::from_le_bytes(*length) as usize;
            let event = Event::decode(&after[4..][..length]).unwrap();
            let (whole, after) = rest.split_at(length + 16);
            assert_eq!(record(&event), whole);
            events.push(event);
            rest = after;
        }
        events
    }

    /// The clock of a machine without a battery starts again in 1970, and a container's processes
    /// have the same numbers each time.
    #[test]
    fn a_file_comes_after_those_before_it_when_the_clock_went_back() {
        let folder = tempfile::tempdir().unwrap();
        let (later, process) = (now() + 1e6, std::process::id());
        for before in [
            format!("{START}{later:020.9}.{process}.convpass"),
            format!("{START}{}.host", later as u64 + 5),
            format!("{START}99999999999.{process}.convpass"),
            format!("{START}.x"),
            "notes.txt".to_owned(),
        ] {
            std::fs::write(folder.path().join(before), b"").unwrap();
        }
        let names: Vec<_> = (0..3)
            .map(|_| {
                let log = TensorBoard::create(folder.path()).unwrap();
                log.path.file_name().unwrap().to_string_lossy().into_owned()
            })
            .collect();
        assert!(names.is_sorted() && names[0] > format!("{START}{}.host", later as u64 + 5));
    }

    #[test]
    fn each_start_has_a_file_that_says_where_it_starts() {
        let folder = tempfile::tempdir().unwrap();
        let runs = folder.path().join("runs");
        for epoch in [0, 3] {
            let mut log = TensorBoard::create(&runs).unwrap();
            log.start(&RunStart { epoch, step: 1, epochs: 4, steps: 5, seconds: 2.0 });
            let (epochs, steps, images, lr, loss, accuracy) = (4, 5, 8, 1e-3, 0.5, 25.0);
            let step = StepReport { epoch, step: 1, epochs, steps, images, lr, loss, accuracy };
            assert!(log.step(&step).is_continue());
            let val_top1 = Some(75.0);
            log.epoch(&EpochReport { epoch, lr, loss, accuracy, val_top1, seconds: 1.0 });
            log.finish().unwrap();
        }
        let files = std::fs::read_dir(&runs).unwrap().map(|file| file.unwrap().path());
        let mut files: Vec<PathBuf> = files.collect();
        files.sort();
        assert_eq!(files.len(), 2);
        for (path, done) in files.iter().zip([1, 16]) {
            let events = read(path);
            assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
            let start = events[1].session_log.as_ref().map(|log| log.status);
            assert_eq!((start, events[1].step), (Some(1), done + 1));
            let steps: Vec<i64> = events[2..].iter().map(|event| event.step).collect();
            assert_eq!(steps, [done + 1, done + 4]);
            let last = &events[3].summary.as_ref().unwrap().value[2];
            assert_eq!((last.tag.as_str(), last.simple_value), ("val/top1", Some(75.0)));
        }
        assert!(matches!(TensorBoard::create(&files[0]).unwrap_err(), Error::Io { .. }));
    }
}
