//! The folder of a run: its logs, its adapter, and its state until the run is done.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use convpass::data::{ImageDataset, Orientation};
use convpass::train::{
    Fit, FitOptions, ImagesRecord, JsonLog, Observer, RunCheckpoint, RunRecord, TensorBoard,
    TrainConfig, fit_with,
};
use convpass::{Backbone, PetlModel, Precision};
use fs4::fs_std::FileExt;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::failure::{chain, chain_of};
use crate::files::{read_json, remove_unfinished, write_json};
use crate::plan::PlannedRun;
use crate::processes::Processes;

/// The name of the record of a run in its folder.
pub const RECORD: &str = "run.json";
/// The name of the adapter of a run in its folder.
const ADAPTER: &str = "adapter.safetensors";
/// The name of the state of a run in its folder.
const STATE: &str = "run.state.safetensors";

/// A folder that no other process of this program works in until the value is dropped.
pub struct FolderLock(File);

/// How long a process tries to share a folder.
const MOMENT: Duration = Duration::from_secs(10);

impl FolderLock {
    /// Creates the folder if it does not exist, locks it, and removes the temporary files that a
    /// killed process left there.
    ///
    /// # Errors
    /// If another process holds the lock, or the folder cannot be written.
    pub fn take(folder: &Path) -> Result<Self> {
        let lock = Self::open(folder)?;
        lock.attempt(folder, FileExt::try_lock_exclusive)?;
        remove_unfinished(folder).with_context(|| folder.display().to_string())?;
        Ok(lock)
    }

    /// Does the same as [`FolderLock::take`] for a process that shares the folder with others of its
    /// kind. A process that finds no other one removes temporary files and calls `alone` before it
    /// shares the folder. Returns also whether this process did that.
    ///
    /// # Errors
    /// The errors of [`FolderLock::take`] and of `alone`.
    pub fn share(folder: &Path, alone: impl FnOnce() -> Result<()>) -> Result<(Self, bool)> {
        let lock = Self::open(folder)?;
        let is_alone = match lock.0.try_lock_exclusive() {
            Ok(is_alone) => is_alone,
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let folder = folder.display();
                eprintln!("warning: {folder}: {error}; start no second process that works in it");
                true
            }
            Err(error) => return Err(error).with_context(|| folder.display().to_string()),
        };
        if is_alone {
            remove_unfinished(folder).with_context(|| folder.display().to_string())?;
            alone()?;
            let _unsupported = FileExt::unlock(&lock.0);
        }
        // Another process may hold the lock for the moment that it needs to find out the same.
        let started = Instant::now();
        while let Err(error) = lock.attempt(folder, FileExt::try_lock_shared) {
            if started.elapsed() > MOMENT {
                return Err(error);
            }
            sleep(Duration::from_millis(20));
        }
        Ok((lock, is_alone))
    }

    /// Does the same as [`FolderLock::take`], but waits for other processes.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn wait(folder: &Path) -> Result<Self> {
        let lock = Self::open(folder)?;
        match lock.0.lock_exclusive() {
            Err(error) if error.kind() != ErrorKind::Unsupported => {
                Err(error).with_context(|| folder.display().to_string())
            }
            _ => Ok(lock),
        }
    }

    /// Returns whether a process works in the folder.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn is_held(folder: &Path) -> Result<bool> {
        let is_free = |lock: FolderLock| match lock.0.try_lock_exclusive() {
            Err(error) if error.kind() != ErrorKind::Unsupported => Err(error),
            locked => Ok(locked.unwrap_or(true)),
        };
        let is_free = if folder.exists() { is_free(Self::open(folder)?) } else { Ok(true) };
        Ok(!is_free.with_context(|| folder.display().to_string())?)
    }

    fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let path = folder.join(".lock");
        // A shared lock on NFS needs a file that is open for reading.
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        Ok(FolderLock(file.with_context(|| path.display().to_string())?))
    }

    fn attempt(&self, folder: &Path, lock: fn(&File) -> std::io::Result<bool>) -> Result<()> {
        match lock(&self.0) {
            Ok(true) => Ok(()),
            Ok(false) => bail!(
                "{}: another process of convpass works in this folder; wait for it, or choose \
                 another --out",
                folder.display()
            ),
            // Some network file systems have no locks.
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            Err(error) => Err(error).with_context(|| folder.display().to_string()),
        }
    }
}

/// A run whose numbers became NaN or infinite, which is remembered in its folder: they would be the
/// same again.
#[derive(Serialize, Deserialize)]
pub struct Diverged {
    pub run: PlannedRun,
    pub reason: String,
}

impl Diverged {
    const FILE: &str = "diverged.json";

    /// Writes the file into the folder of the run.
    pub fn save(&self, folder: &Path) -> Result<()> {
        Ok(write_json(&folder.join(Self::FILE), self)?)
    }

    /// Returns why the run `planned` in `folder` diverged earlier, if it did.
    ///
    /// # Errors
    /// If another run diverged there.
    pub fn before(folder: &Path, planned: &PlannedRun) -> Result<Option<String>> {
        let file = folder.join(Self::FILE);
        if !file.exists() {
            return Ok(None);
        }
        let found: Diverged = read_json(&file)?;
        if found.run != *planned {
            bail!("{} holds another run, which diverged and is left as it is", folder.display());
        }
        Ok(Some(found.reason))
    }
}

/// Returns the record of the run `planned` if `folder` holds it and it is finished.
///
/// # Errors
/// If the folder holds a finished run with other settings, which is left as it is.
pub fn finished(
    folder: &Path,
    planned: &PlannedRun,
    images: &ImagesRecord,
) -> Result<Option<RunRecord>> {
    let file = folder.join(RECORD);
    if !file.exists() {
        return Ok(None);
    }
    let differences = match RunRecord::load(&file) {
        Ok(record) if !is_finished(&record) => return Ok(None),
        Ok(record) => {
            let mut differences = planned.differences(&record);
            differences.extend(orientation_difference(&record, images.orientation));
            if record.images.preprocessing != images.preprocessing {
                differences.push("images.preprocessing: another preprocessing".to_owned());
            }
            let adapter = folder.join(ADAPTER);
            if differences.is_empty() && !adapter.exists() {
                return Ok(None);
            }
            if !is_adapter_of(&record, &adapter)? {
                differences.push(format!("{ADAPTER} is not the one that the record describes"));
            }
            if differences.is_empty() {
                return Ok(Some(record));
            }
            differences
        }
        Err(error) => vec![chain_of(error)],
    };
    bail!(
        "{} holds another run, which is left as it is ({}); use --force to replace it, or choose \
         another --out",
        folder.display(),
        differences.join("; ")
    )
}

/// Returns what differs if the images of a run were not read with this orientation.
pub fn orientation_difference(record: &RunRecord, orientation: Orientation) -> Option<String> {
    let is_other = record.images.orientation != orientation;
    is_other.then(|| "images.orientation: --ignore-exif differs".to_owned())
}

/// Returns whether a run reached its end: it was not stopped, and it was tested if it was to be.
fn is_finished(record: &RunRecord) -> bool {
    !record.fit.stopped && (record.test_top1.is_some() || record.test_split.is_none())
}

/// Returns whether `adapter` is the file that `record` describes. Records of earlier versions do
/// not tell.
pub fn is_adapter_of(record: &RunRecord, adapter: &Path) -> Result<bool> {
    match &record.adapter_digest {
        Some(expected) => Ok(digest(adapter)? == *expected),
        None => Ok(true),
    }
}

/// Removes the record, the adapter and the state of an earlier run from `folder`. The record goes
/// first, so that no adapter is left beside the record of another run.
pub fn clear(folder: &Path) -> Result<()> {
    [RECORD, ADAPTER, STATE].into_iter().try_for_each(|name| remove(&folder.join(name)))
}

/// Removes a file if it exists.
fn remove(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| file.display().to_string())
        }
        _ => Ok(()),
    }
}

/// The folder of a run, and which files are written there.
#[derive(Clone, Copy)]
pub struct RunFolder<'a> {
    pub path: &'a Path,
    /// The state of the run is written every so many steps; 0 means never.
    pub checkpoint_every: usize,
    /// Whether to write an event file for TensorBoard.
    pub tensorboard: bool,
}

impl RunFolder<'_> {
    fn state(&self) -> PathBuf {
        self.path.join(STATE)
    }

    /// Trains the model, together with the other `processes`, the first of which writes the files.
    /// If an earlier run left its state in the folder, training continues from it.
    pub fn fit<B: Backbone>(
        &self,
        model: &mut PetlModel<B>,
        train: &ImageDataset,
        val: Option<&ImageDataset>,
        config: &TrainConfig,
        processes: &Processes,
        watch: &mut dyn Observer,
    ) -> Result<Fit> {
        let writes = processes.is_first();
        let log = writes.then(|| JsonLog::open(self.path.join("log.jsonl")));
        let mut log = log.transpose()?;
        let events = (writes && self.tensorboard).then(|| TensorBoard::create(self.path));
        let mut events = events.transpose()?;
        let mut observers: Vec<&mut dyn Observer> = vec![watch];
        observers.extend(log.as_mut().map(|log| log as &mut dyn Observer));
        observers.extend(events.as_mut().map(|events| events as &mut dyn Observer));
        let every = self.checkpoint_every;
        let checkpoint = (every > 0).then(|| RunCheckpoint { path: self.state(), every });
        let options = FitOptions {
            checkpoint: checkpoint.as_ref(),
            #[cfg(feature = "distributed")]
            group: processes.group(),
            ..FitOptions::default()
        };
        let fit = fit_with(model, train, val, config, options, &mut observers)?;
        for ended in
            [log.map_or(Ok(()), JsonLog::finish), events.map_or(Ok(()), TensorBoard::finish)]
        {
            if let Err(error) = ended {
                eprintln!("{}: the run continued without this log", chain(&error.into()));
            }
        }
        Ok(fit)
    }

    /// Removes the state of the run, if there is one; the run is done.
    pub fn done(&self) -> Result<()> {
        remove(&self.state())
    }

    /// Writes the adapter of the run and returns its digest. The record of an earlier run that was
    /// not finished is removed first.
    pub fn save_adapter<B: Backbone>(&self, model: &PetlModel<B>) -> Result<String> {
        remove(&self.path.join(RECORD))?;
        let adapter = self.path.join(ADAPTER);
        model.save_adapter(&adapter)?;
        digest(&adapter)
    }

    /// Writes the record of the run.
    pub fn save_record(&self, record: &RunRecord) -> Result<()> {
        Ok(record.save(self.path.join(RECORD))?)
    }
}

/// Returns the name of a checkpoint for a record: an absolute path, so that it is found from any
/// folder, or the name of a checkpoint on the hub.
pub fn backbone_name(checkpoint: &Path) -> Result<String> {
    if checkpoint.to_string_lossy().starts_with("hf:") {
        return Ok(checkpoint.display().to_string());
    }
    let path = std::path::absolute(checkpoint);
    Ok(path.with_context(|| checkpoint.display().to_string())?.display().to_string())
}

/// Returns the precision as a run's record stores it: `None` for f32.
pub fn recorded(precision: Precision) -> Option<String> {
    (precision != Precision::F32).then(|| precision.to_string())
}

/// Returns the precision of a run's record.
pub fn precision_of(record: &RunRecord) -> Result<Precision> {
    Ok(record.precision.as_deref().map_or(Ok(Precision::F32), str::parse)?)
}

/// Loads the head of an adapter into `model` and returns the digest of the adapter's file. `path`
/// is that file or the folder of its run.
pub fn start_head<B: Backbone>(model: &mut PetlModel<B>, path: &Path) -> Result<String> {
    let file = adapter_file(path);
    let source = model.load_head(&file)?;
    if source.is_of_other_backbone {
        let file = file.display();
        eprintln!(
            "warning: {file}: the head was trained with another backbone, activation, image size or \
             precision"
        );
    }
    Ok(source.digest)
}

/// Returns the file of an adapter: `adapter.safetensors` in `path` if it is a folder, else `path`.
pub fn adapter_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(ADAPTER) } else { path.to_owned() }
}

/// Reads the names of the classes from `file`, one on each line. Without the file there are none.
pub fn class_names(file: &Path) -> Result<Vec<String>> {
    match std::fs::read_to_string(file) {
        Ok(text) => {
            let text = text.trim_start_matches('\u{feff}').trim_end();
            Ok(text.lines().map(|line| line.trim().to_owned()).collect())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| file.display().to_string()),
    }
}

/// Returns the SHA-256 of a file in hex.
pub fn digest(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    Ok(format!("{:x}", Sha256::digest(bytes)))
}
