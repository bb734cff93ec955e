//! The folder of a run: its logs, its adapter, and its state until the run is done.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use convpass::data::ImageDataset;
use convpass::train::{
    Fit, JsonLog, Observer, RunCheckpoint, RunRecord, TensorBoard, TrainConfig, fit, fit_resumable,
};
use convpass::{Backbone, PetlModel, Precision};
use sha2::{Digest, Sha256};

use crate::failure::chain;

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
        self.path.join("run.state.safetensors")
    }

    /// Trains the model. If an earlier run left its state in the folder, training continues from
    /// it.
    pub fn fit<B: Backbone>(
        &self,
        model: &mut PetlModel<B>,
        train: &ImageDataset,
        val: Option<&ImageDataset>,
        config: &TrainConfig,
        watch: &mut dyn Observer,
    ) -> Result<Fit> {
        let mut log = JsonLog::open(self.path.join("log.jsonl"))?;
        let mut events = self.tensorboard.then(|| TensorBoard::create(self.path)).transpose()?;
        let mut observers: Vec<&mut dyn Observer> = vec![watch, &mut log];
        observers.extend(events.as_mut().map(|events| events as &mut dyn Observer));
        let fit = match self.checkpoint_every {
            0 => fit(model, train, val, config, &mut observers),
            every => {
                let checkpoint = RunCheckpoint { path: self.state(), every };
                fit_resumable(model, train, val, config, &checkpoint, &mut observers)
            }
        }?;
        for ended in [log.finish(), events.map_or(Ok(()), TensorBoard::finish)] {
            if let Err(error) = ended {
                eprintln!("{}: the run continued without this log", chain(&error.into()));
            }
        }
        Ok(fit)
    }

    /// Removes the state of the run, if there is one; the run is done.
    pub fn done(&self) -> Result<()> {
        let state = self.state();
        match std::fs::remove_file(&state) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| state.display().to_string())
            }
            _ => Ok(()),
        }
    }
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
    if path.is_dir() { path.join("adapter.safetensors") } else { path.to_owned() }
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
