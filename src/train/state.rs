//! The state file of a run, from which an interrupted run continues.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::batch_sum::BatchSum;
use super::config::TrainConfig;
use super::gradients::give_gradient;
use super::identity::{difference, keep_known_pixels};
use super::observer::EpochReport;
use super::optimizer::Optimizer;
use super::sampler::Sampler;
use crate::backbone::Backbone;
use crate::checkpoint::TensorFile;
use crate::error::{Error, Result};
use crate::files::{remove_unfinished, write_atomically};
use crate::model::{Bytes, PetlModel, encode};

/// The one metadata key.
const KEY: &str = "convpass_run";

/// The state file of a run, and how often it is written.
///
/// This is not part of [`TrainConfig`], because it does not change what is computed: an interrupted
/// run and an uninterrupted one have the same record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunCheckpoint {
    /// The file. With AdamW it is three times the size of the trainables, and four times if the best
    /// epoch on validation is selected.
    pub path: PathBuf,
    /// Steps from one write to the next. The end of each epoch is written too.
    pub every: usize,
}

/// A point between two steps of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Cursor {
    /// Number of finished epochs.
    pub(super) epoch: usize,
    /// Number of steps taken in the epoch after them.
    pub(super) step: usize,
    /// Loss and accuracy over these steps.
    pub(super) sum: BatchSum,
}

/// The progress of a run, apart from the tensors of its model and its optimizer.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Reached {
    #[serde(rename = "place")]
    pub(super) cursor: Cursor,
    pub(super) epochs: Vec<EpochReport>,
    pub(super) best: Option<Best>,
    /// Seconds of the run.
    pub(super) seconds: f64,
    /// Seconds of the unfinished epoch.
    pub(super) epoch_seconds: f64,
}

/// The best epoch on validation so far.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Best {
    pub(super) epoch: usize,
    pub(super) top1: f64,
    /// Its weights by name. They are stored among the tensors of the file.
    #[serde(skip)]
    pub(super) weights: BTreeMap<String, Tensor>,
}

/// The metadata of a state file.
#[derive(Serialize, Deserialize)]
struct Info<R> {
    run: Value,
    reached: R,
    /// The variables that have had no gradient so far.
    without_gradient: BTreeSet<String>,
    /// Checksum of the tensors.
    checksum: u32,
}

/// The state file of one run.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    every: usize,
    run: Value,
    /// Steps since the last write.
    since: usize,
}

impl StateFile {
    /// Creates the state file of the run with the [`identity`] `run`. A half-written file that a
    /// killed process left beside it is removed.
    ///
    /// # Errors
    /// [`Error::Config`] if `every` is 0, [`Error::Io`] if the folder does not exist.
    pub(super) fn new(checkpoint: &RunCheckpoint, run: Value) -> Result<Self> {
        if checkpoint.every == 0 {
            return Err(Error::config("every", "1 step or more", 0));
        }
        remove_unfinished(&checkpoint.path)?;
        let path = checkpoint.path.clone();
        Ok(StateFile { path, every: checkpoint.every, run, since: 0 })
    }

    /// Counts a step and returns whether the state is to be written.
    pub(super) fn is_due(&mut self) -> bool {
        self.since += 1;
        self.since >= self.every
    }

    /// Writes the state. At any moment the file is the old one or the new one, never a part.
    pub(super) fn save(
        &mut self,
        variables: &BTreeMap<String, Tensor>,
        optimizer: &dyn Optimizer,
        reached: &Reached,
    ) -> Result<()> {
        let best = reached.best.iter().flat_map(|best| keyed("best", &best.weights));
        let tensors = stored(variables, optimizer)?.into_iter().chain(best);
        let tensors = bytes(&tensors.collect())?;
        let without_gradient = without_gradient(variables)?;
        let checksum = checksum(&tensors);
        let info = Info { run: self.run.clone(), reached, without_gradient, checksum };
        let text = serde_json::to_string(&info).map_err(|e| Error::io(&self.path)(e.into()))?;
        write_atomically(&self.path, &encode(&self.path, &tensors, (KEY, &text))?)?;
        self.since = 0;
        Ok(())
    }

    /// Restores variables and optimizer from the file, for a run over `images` images in each epoch.
    /// Returns `None` and changes nothing if there is no file.
    ///
    /// # Errors
    /// [`Error::OtherRun`] with the first field that differs from the file's run; the errors of
    /// [`TensorFile::open`]; [`Error::CorruptFile`] if the file is damaged. Nothing is changed then.
    pub(super) fn load(
        &self,
        variables: &BTreeMap<String, Tensor>,
        optimizer: &mut dyn Optimizer,
        config: &TrainConfig,
        sampler: &Sampler,
        images: usize,
    ) -> Result<Option<Reached>> {
        let file = match TensorFile::open_file(self.path.clone()) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Ok(None);
            }
            file => file?,
        };
        let mut info = info(&file)?;
        keep_known_pixels(&mut info.run, &self.run);
        if let Some((field, found, expected)) = difference(String::new(), &info.run, &self.run) {
            return Err(Error::OtherRun { file: self.path.clone(), field, expected, found });
        }
        let corrupt = |reason: &str| Error::corrupt(&self.path, reason);
        let steps = sampler.steps(images);
        if !info.reached.is_possible(config, sampler, images) {
            return Err(corrupt("its counts of epochs, steps and images contradict each other"));
        }
        let done = info.reached.cursor.epoch * steps + info.reached.cursor.step;
        if i32::try_from(done).is_err() {
            return Err(corrupt("more steps than can be counted"));
        }
        let targets = stored(variables, optimizer)?;
        let best = info.reached.best.iter().flat_map(|_| keyed("best", variables));
        let mut values = read(
            &file,
            targets
                .iter()
                .map(|(n, t)| (n.clone(), t.size()))
                .chain(best.map(|(name, variable)| (name, variable.size()))),
        )?;
        if checksum(&bytes(&values)?) != info.checksum {
            return Err(corrupt("its tensors do not match their checksum"));
        }
        if let Some(best) = &mut info.reached.best {
            for name in variables.keys() {
                let value = values.remove(&key("best", name));
                best.weights.extend(value.map(|value| (name.clone(), value)));
            }
        }
        for (name, variable) in variables {
            if !info.without_gradient.contains(name) {
                give_gradient(variable)?;
            }
        }
        for (name, mut target) in targets {
            if let Some(value) = values.get(&name) {
                tch::no_grad(|| target.f_copy_(value))?;
            }
        }
        optimizer.resume(done)?;
        Ok(Some(info.reached))
    }
}

/// Returns the names of the variables that have had no gradient so far.
pub(super) fn without_gradient(variables: &BTreeMap<String, Tensor>) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for (name, variable) in variables {
        if !variable.f_grad()?.defined() {
            names.insert(name.clone());
        }
    }
    Ok(names)
}

/// Returns the trainables of a model in the order of their names.
pub(super) fn sorted_variables<B: Backbone>(model: &PetlModel<B>) -> BTreeMap<String, Tensor> {
    model.var_store().variables().into_iter().collect()
}

impl Reached {
    /// Returns whether a run of `config` can reach this point.
    fn is_possible(&self, config: &TrainConfig, sampler: &Sampler, images: usize) -> bool {
        let steps = sampler.steps(images);
        let Cursor { epoch, step, sum } = self.cursor;
        let is_last = epoch == config.epochs;
        epoch == self.epochs.len()
            && self.epochs.iter().enumerate().all(|(index, report)| report.epoch == index)
            && (epoch < config.epochs && step <= steps || is_last && step == 0)
            && sum.images == sampler.step(step, images).start
            && sum.correct <= sum.images
            && self.best.as_ref().is_none_or(|best| best.epoch < epoch)
    }
}

/// Returns the tensors of variables and optimizer by their names in the file.
pub(super) fn stored(
    variables: &BTreeMap<String, Tensor>,
    optimizer: &dyn Optimizer,
) -> Result<BTreeMap<String, Tensor>> {
    Ok(keyed("weight", variables).chain(optimizer.state()?).collect())
}

fn keyed<'a>(
    group: &'a str,
    tensors: &'a BTreeMap<String, Tensor>,
) -> impl Iterator<Item = (String, Tensor)> + 'a {
    tensors.iter().map(move |(name, tensor)| (key(group, name), tensor.shallow_clone()))
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

/// Reads all tensors of the file, which must have exactly these names and shapes.
fn read(
    file: &TensorFile,
    expected: impl Iterator<Item = (String, Vec<i64>)>,
) -> Result<BTreeMap<String, Tensor>> {
    let path = || file.path().to_path_buf();
    let mut values = BTreeMap::new();
    for (name, expected) in expected {
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
    let names: Vec<String> =
        file.names().filter(|name| !values.contains_key(*name)).map(str::to_owned).collect();
    if names.is_empty() { Ok(values) } else { Err(Error::unexpected(path(), names, [])) }
}

pub(super) fn bytes(tensors: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Bytes>> {
    tensors.iter().map(|(name, tensor)| Ok((name.clone(), Bytes::of(tensor)?))).collect()
}

/// Returns the CRC-32 of names and elements.
pub(super) fn checksum(tensors: &BTreeMap<String, Bytes>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for (name, bytes) in tensors {
        hasher.update(name.as_bytes());
        hasher.update(&bytes.data);
    }
    hasher.finalize()
}
