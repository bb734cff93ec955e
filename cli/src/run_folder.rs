//! What a run keeps in its folder: its logs, and until it is done its state.

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

/// The folder of a run, and what is kept there.
#[derive(Clone, Copy)]
pub struct RunFolder<'a> {
    pub path: &'a Path,
    /// Steps after which the run's state is written; 0: never.
    pub checkpoint_every: usize,
    /// Whether an event file for TensorBoard is written.
    pub tensorboard: bool,
}

impl RunFolder<'_> {
    fn state(&self) -> PathBuf {
        self.path.join("run.state.safetensors")
    }

    /// Trains, or goes on where a run before ended.
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
                eprintln!("{}: the run went on without this log", chain(&error.into()));
            }
        }
        Ok(fit)
    }

    /// Removes the state of a run that is done, if there is one.
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

/// What a run's record says of a precision: nothing for f32.
pub fn recorded(precision: Precision) -> Option<String> {
    (precision != Precision::F32).then(|| precision.to_string())
}

/// The precision that a run's record says.
pub fn precision_of(record: &RunRecord) -> Result<Precision> {
    Ok(record.precision.as_deref().map_or(Ok(Precision::F32), str::parse)?)
}

/// Starts the head of `model` from the adapter in `path`, which is its file or the folder of its run.
/// Returns the digest of the file.
pub fn start_head<B: Backbone>(model: &mut PetlModel<B>, path: &Path) -> Result<String> {
    let file = adapter_file(path);
    let source = model.load_head(&file)?;
    if source.is_of_other_backbone {
        let file = file.display();
        eprintln!(
            "warning: {file}: a head for another backbone, activation, image size or precision"
        );
    }
    Ok(source.digest)
}

/// The file of an adapter: `path` itself, or the one in the folder of a run.
pub fn adapter_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("adapter.safetensors") } else { path.to_owned() }
}

/// The names of the classes in `file`, one on each line; none if there is no such file.
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

/// SHA-256 of a file in hex.
pub fn digest(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    Ok(format!("{:x}", Sha256::digest(bytes)))
}
