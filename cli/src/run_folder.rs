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

/// Starts the head of `model` from the adapter in `file`; the file's digest.
pub fn start_head<B: Backbone>(model: &mut PetlModel<B>, file: &Path) -> Result<String> {
    let source = model.load_head(file)?;
    if source.is_of_other_backbone {
        let file = file.display();
        eprintln!(
            "warning: {file}: a head for another backbone, activation, image size or precision"
        );
    }
    Ok(source.digest)
}

/// SHA-256 of a file in hex.
pub fn digest(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    Ok(format!("{:x}", Sha256::digest(bytes)))
}
