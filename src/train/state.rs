//! The state of a run in a file, so that one that was cut off goes on where it was.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::adamw::{AdamW, Slot};
use super::config::TrainConfig;
use super::observer::EpochReport;
use crate::backbone::Backbone;
use crate::checkpoint::TensorFile;
use crate::data::ImageDataset;
use crate::error::{Error, Result};
use crate::eval::{Evaluation, PrefixCache};
use crate::ffi::autocast::Autocast;
use crate::files::{remove_unfinished, write_atomically};
use crate::model::{Bytes, PetlConfig, PetlModel, encode};

/// The one metadata key.
const KEY: &str = "convpass_run";
/// Changes with what a state file holds.
const FORMAT: u32 = 1;

/// Where a run keeps its state, and how often it is written.
///
/// No part of [`TrainConfig`]: it changes nothing of what is computed, and the record of a run that
/// was interrupted says what that of an uninterrupted one does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunCheckpoint {
    /// The file: three times the trainables, once more with the best epoch on validation.
    pub path: PathBuf,
    /// Steps after which it is written; it is written at the end of each epoch too.
    pub every: usize,
}

/// A place between two steps of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// Epochs that were finished.
    pub(crate) epoch: usize,
    /// Steps of the next one that were taken.
    pub(crate) step: usize,
    /// Over these steps.
    pub(crate) sum: Evaluation,
}

/// What a run has reached, beside what is in its model and its optimizer.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Reached {
    pub(super) place: Place,
    pub(super) epochs: Vec<EpochReport>,
    pub(super) best: Option<Best>,
    /// Seconds of the run.
    pub(super) seconds: f64,
    /// Seconds of the epoch that was begun.
    pub(super) epoch_seconds: f64,
}

/// The best epoch on validation so far.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Best {
    pub(super) epoch: usize,
    pub(super) top1: f64,
    /// Its weights by name; among the tensors of the file.
    #[serde(skip)]
    pub(super) weights: BTreeMap<String, Tensor>,
}

/// What makes a run that run and no other.
#[derive(Serialize)]
struct Identity<'a> {
    format: u32,
    model: &'a PetlConfig,
    train: TrainConfig,
    backbone: String,
    /// What autocast brings products to.
    #[serde(skip_serializing_if = "Option::is_none")]
    autocast: Option<&'static str>,
    train_images: Images<'a>,
    val_images: Option<Images<'a>>,
    /// Checksum of the trainables that it starts from. By its name the last to be compared: where it
    /// differs alone, nothing else says why.
    weights_at_start: u32,
}

#[derive(Serialize)]
struct Images<'a> {
    split: &'a str,
    count: usize,
    size: (i64, i64),
}

impl<'a> Images<'a> {
    fn of(set: &'a ImageDataset) -> Self {
        Images { split: set.split_hash(), count: set.len(), size: set.image_size() }
    }
}

/// What a state file says beside its tensors.
#[derive(Serialize, Deserialize)]
struct Info<R> {
    run: Value,
    reached: R,
    /// The variables that no pass has given a gradient yet.
    without_gradient: BTreeSet<String>,
    /// Of the tensors.
    checksum: u32,
}

/// The state file of one run.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    every: usize,
    run: Value,
    /// Steps since it was written.
    since: usize,
}

impl StateFile {
    /// That of a run of these, whose model holds what it starts from. What a killed process left
    /// half-written beside it is removed.
    ///
    /// # Errors
    /// [`Error::Config`] for no steps between two writes, [`Error::Io`] if the folder is not there.
    pub(super) fn new<B: Backbone>(
        checkpoint: &RunCheckpoint,
        model: &PetlModel<B>,
        train: &ImageDataset,
        validation: Option<&ImageDataset>,
        config: &TrainConfig,
    ) -> Result<Self> {
        if checkpoint.every == 0 {
            return Err(Error::config("every", "1 step or more", 0));
        }
        remove_unfinished(&checkpoint.path)?;
        let variables: BTreeMap<String, Tensor> =
            model.var_store().variables().into_iter().collect();
        let variables = variables.iter().map(|(name, value)| Ok((name.clone(), Bytes::of(value)?)));
        // Kept elsewhere they are the same tokens.
        let prefix =
            config.prefix.as_ref().map(|cache| PrefixCache { folder: None, ..cache.clone() });
        let identity = Identity {
            format: FORMAT,
            model: model.config(),
            train: TrainConfig { prefix, ..config.clone() },
            backbone: model.backbone().digest()?,
            autocast: Autocast::active(model.backbone().device())?,
            weights_at_start: checksum(&variables.collect::<Result<_>>()?),
            train_images: Images::of(train),
            val_images: validation.map(Images::of),
        };
        let path = checkpoint.path.clone();
        let run = serde_json::to_value(identity).map_err(|e| Error::io(&path)(e.into()))?;
        Ok(StateFile { path, every: checkpoint.every, run, since: 0 })
    }

    /// Counts a step; whether the state is to be written.
    pub(super) fn is_due(&mut self) -> bool {
        self.since += 1;
        self.since >= self.every
    }

    /// Writes the state; the file is the old one or the new one whole.
    pub(super) fn save(&mut self, optimizer: &AdamW, reached: &Reached) -> Result<()> {
        let mut tensors = BTreeMap::new();
        let mut without_gradient = BTreeSet::new();
        for slot in optimizer.slots() {
            for (group, tensor) in groups(slot) {
                tensors.insert(key(group, &slot.name), Bytes::of(tensor)?);
            }
            if !slot.has_gradient()? {
                without_gradient.insert(slot.name.clone());
            }
        }
        for (name, tensor) in reached.best.iter().flat_map(|best| &best.weights) {
            tensors.insert(key("best", name), Bytes::of(tensor)?);
        }
        let checksum = checksum(&tensors);
        let info = Info { run: self.run.clone(), reached, without_gradient, checksum };
        let text = serde_json::to_string(&info).map_err(|e| Error::io(&self.path)(e.into()))?;
        write_atomically(&self.path, &encode(&self.path, &tensors, (KEY, &text))?)?;
        self.since = 0;
        Ok(())
    }

    /// Takes the run up where the file has it, with `steps` steps an epoch; `None`, and nothing is
    /// changed, if there is no file.
    ///
    /// # Errors
    /// [`Error::OtherRun`] with the first field that is another one in the file's run; what
    /// [`TensorFile::open`] returns, [`Error::CorruptFile`] and its like if the file is damaged.
    /// Nothing is changed then either.
    pub(super) fn load(
        &self,
        optimizer: &mut AdamW,
        config: &TrainConfig,
        steps: usize,
    ) -> Result<Option<Reached>> {
        let file = match TensorFile::open_file(self.path.clone()) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Ok(None);
            }
            file => file?,
        };
        let mut info = info(&file)?;
        if let Some((field, found, expected)) = difference(String::new(), &info.run, &self.run) {
            return Err(Error::OtherRun { file: self.path.clone(), field, expected, found });
        }
        let corrupt = |reason: &str| Error::corrupt(&self.path, reason);
        if !info.reached.is_possible(config, steps) {
            return Err(corrupt("its counts of epochs, steps and images contradict each other"));
        }
        let done = info.reached.place.epoch * steps + info.reached.place.step;
        let done = i32::try_from(done).map_err(|_| corrupt("more steps than can be counted"))?;
        let mut values = read(&file, optimizer, info.reached.best.is_some())?;
        if checksum(&bytes(&values)?) != info.checksum {
            return Err(corrupt("its tensors do not match their checksum"));
        }
        if let Some(best) = &mut info.reached.best {
            for slot in optimizer.slots() {
                let value = values.remove(&key("best", &slot.name));
                best.weights.extend(value.map(|value| (slot.name.clone(), value)));
            }
        }
        optimizer.restore(done, &mut |slot| {
            if !info.without_gradient.contains(&slot.name) {
                slot.give_gradient()?;
            }
            for (group, mut tensor) in groups(slot).map(|(group, t)| (group, t.shallow_clone())) {
                if let Some(value) = values.get(&key(group, &slot.name)) {
                    tch::no_grad(|| tensor.f_copy_(value))?;
                }
            }
            Ok(())
        })?;
        Ok(Some(info.reached))
    }
}

impl Reached {
    /// Whether a run of `config` can come to this.
    fn is_possible(&self, config: &TrainConfig, steps: usize) -> bool {
        let Place { epoch, step, sum } = self.place;
        let is_last = epoch == config.epochs;
        epoch == self.epochs.len()
            && self.epochs.iter().enumerate().all(|(index, report)| report.epoch == index)
            && (epoch < config.epochs && step <= steps || is_last && step == 0)
            && sum.images == step * config.batch_size
            && sum.correct <= sum.images
            && self.best.as_ref().is_none_or(|best| best.epoch < epoch)
    }
}

/// The three tensors that a variable has in the file, each with its group.
fn groups(slot: &Slot) -> [(&'static str, &Tensor); 3] {
    [("weight", &slot.variable), ("mean", &slot.mean), ("square", &slot.square)]
}

fn key(group: &str, name: &str) -> String {
    format!("{group}.{name}")
}

fn info(file: &TensorFile) -> Result<Info<Reached>> {
    let unknown = |reason: String| Error::UnknownFormat { file: file.path().to_path_buf(), reason };
    let Some(text) = file.metadata().get(KEY) else {
        return Err(unknown(format!("no metadata `{KEY}`, so it is no state of a run")));
    };
    serde_json::from_str(text).map_err(|e| unknown(format!("metadata `{KEY}`: {e}")))
}

/// Every tensor of the file, which are those that the optimizer's variables ask for and no others.
fn read(file: &TensorFile, optimizer: &AdamW, with_best: bool) -> Result<BTreeMap<String, Tensor>> {
    let path = || file.path().to_path_buf();
    let mut values = BTreeMap::new();
    for slot in optimizer.slots() {
        let best = with_best.then_some(("best", &slot.variable));
        for (group, tensor) in groups(slot).into_iter().chain(best) {
            let (name, expected) = (key(group, &slot.name), tensor.size());
            match file.shape(&name) {
                Some(found) if found == expected => {}
                Some(found) => {
                    let found = found.to_vec();
                    return Err(Error::ShapeMismatch { file: path(), name, expected, found });
                }
                None => return Err(Error::MissingTensor { file: path(), name, expected }),
            }
            let value = file.tensor(&name)?;
            values.insert(name, value);
        }
    }
    let names: Vec<String> =
        file.names().filter(|name| !values.contains_key(*name)).map(str::to_owned).collect();
    if names.is_empty() { Ok(values) } else { Err(Error::unexpected(path(), names, [])) }
}

fn bytes(tensors: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Bytes>> {
    tensors.iter().map(|(name, tensor)| Ok((name.clone(), Bytes::of(tensor)?))).collect()
}

/// CRC-32 of names and elements.
fn checksum(tensors: &BTreeMap<String, Bytes>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for (name, bytes) in tensors {
        hasher.update(name.as_bytes());
        hasher.update(&bytes.data);
    }
    hasher.finalize()
}

/// The first field below `path` in which two JSON values differ, and the two as text.
fn difference(path: String, found: &Value, expected: &Value) -> Option<(String, String, String)> {
    let (Value::Object(a), Value::Object(b)) = (found, expected) else {
        return (found != expected).then(|| (path, found.to_string(), expected.to_string()));
    };
    let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    names.into_iter().find_map(|name| {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let field = |map: &serde_json::Map<_, _>| map.get(name).cloned().unwrap_or_default();
        difference(path, &field(a), &field(b))
    })
}
