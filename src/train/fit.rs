//! The training loop.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::adamw::AdamW;
use super::config::{Selection, TrainConfig};
use super::observer::{EpochReport, Observer, RunStart, StepReport};
use super::optimizer::{Optimizer, Schedule, check_max_norm, clip_grad_norm, zero_grad};
use super::state::{Best, Cursor, Owned, Reached, RunCheckpoint, StateFile, sorted_variables};
use crate::backbone::Backbone;
use crate::data::{Augment, BatchConfig, ImageDataset, Order, PartialBatch};
use crate::error::{Error, Result};
use crate::eval::{Inputs, check_classes, cross_entropy, evaluate_inputs};
use crate::model::PetlModel;
use crate::nn::seed_of;

/// The outcome of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// The finished epochs.
    pub epochs: Vec<EpochReport>,
    /// The epoch whose weights the model holds; `None` if the observer ended the run within an
    /// epoch, so that the weights are those of that moment.
    pub selected_epoch: Option<usize>,
    /// Whether the observer ended the run.
    pub stopped: bool,
    /// Seconds of the whole run.
    pub seconds: f64,
}

/// The parts of a run that a caller may replace. The default replaces none.
#[derive(Default)]
pub struct FitOptions<'a> {
    /// The state file, from which an interrupted run continues; `None` keeps no state.
    pub checkpoint: Option<&'a RunCheckpoint>,
    /// The optimizer; `None` is [`AdamW`] with the weight decay of the [`TrainConfig`].
    pub optimizer: Option<&'a mut dyn Optimizer>,
    /// The learning rate of each step; `None` is the schedule of the [`TrainConfig`].
    pub schedule: Option<&'a dyn Schedule>,
}

impl fmt::Debug for FitOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FitOptions")
            .field("checkpoint", &self.checkpoint)
            .field("optimizer", &self.optimizer.is_some())
            .field("schedule", &self.schedule.is_some())
            .finish()
    }
}

/// Trains `model` in place on `train`.
///
/// The same seed gives the same weights, bit for bit, on one machine and with one number of threads.
/// For this, libtorch's generator, which the whole process shares, is seeded at each step from the
/// seed and the number of the step; two runs at the same time in one process do not repeat. If
/// nothing before the head is trained or drawn (a linear probe without drop path), the features of
/// each image are computed once.
///
/// # Errors
/// [`Error::Config`] for hyper-parameters that do not fit the data: fewer images than a batch, no
/// validation images to select on, labels beyond the head; the errors of the data and of libtorch.
pub fn fit<B: Backbone>(
    model: &mut PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
    observer: &mut dyn Observer,
) -> Result<Fit> {
    fit_with(model, train, validation, config, FitOptions::default(), observer)
}

/// Trains as [`fit`](fn@fit) does and keeps the state of the run in a file, from which the same call
/// continues. After a kill at most `checkpoint.every` steps are repeated; after the observer ended
/// the run, none. The final weights equal those of an uninterrupted run, bit for bit.
///
/// The file remains after the run, in case the caller is killed before it has saved the adapter: a
/// call that finds the state of a finished run trains nothing. Remove the file once the adapter is
/// saved.
///
/// # Errors
/// The errors of [`fit`](fn@fit); [`Error::OtherRun`] if the file belongs to a run with another
/// model, config, backbone, autocast, initial weights or data; [`Error::CorruptFile`] or
/// [`Error::UnknownFormat`] if it is damaged or no state file; [`Error::Io`] if it cannot be
/// written. A refused file is left unchanged, and so is the model.
pub fn fit_resumable<B: Backbone>(
    model: &mut PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
    checkpoint: &RunCheckpoint,
    observer: &mut dyn Observer,
) -> Result<Fit> {
    let options = FitOptions { checkpoint: Some(checkpoint), ..FitOptions::default() };
    fit_with(model, train, validation, config, options, observer)
}

/// Trains as [`fit`](fn@fit) does, with an optimizer, a schedule or a state file of the caller's.
///
/// ```no_run
/// use convpass::train::{FitOptions, Silent, TrainConfig, fit_with};
/// use tch::nn::{OptimizerConfig, Sgd};
/// # use convpass::{AnyBackbone, PetlModel, Result, data::ImageDataset};
///
/// # fn run(model: &mut PetlModel<AnyBackbone>, images: &ImageDataset) -> Result<()> {
/// let mut sgd = Sgd { momentum: 0.9, ..Sgd::default() }.build(model.var_store(), 0.1)?;
/// let options = FitOptions {
///     optimizer: Some(&mut sgd),
///     schedule: Some(&|epoch, _step, _epochs, _steps| 0.1 * 0.97f64.powi(epoch as i32)),
///     ..FitOptions::default()
/// };
/// fit_with(model, images, None, &TrainConfig::default(), options, &mut Silent)?;
/// # Ok(())
/// # }
/// ```
///
/// A state file records only that the optimizer or the schedule is the caller's: pass the same ones
/// again to continue.
///
/// # Errors
/// The errors of [`fit_resumable`]; [`Error::Input`] for a state file with an optimizer that cannot
/// be resumed; the errors of the optimizer.
pub fn fit_with<B: Backbone>(
    model: &mut PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
    options: FitOptions,
    observer: &mut dyn Observer,
) -> Result<Fit> {
    check(model, train, validation, config)?;
    let started = Instant::now();
    let FitOptions { checkpoint, optimizer, schedule } = options;
    let owned = Owned { optimizer: optimizer.is_some(), schedule: schedule.is_some() };
    let mut adamw = AdamW::new(model.var_store(), config.weight_decay)?;
    let optimizer = optimizer.unwrap_or(&mut adamw);
    let variables = sorted_variables(model);
    let steps = train.len() / config.batch_size;
    let file = checkpoint
        .map(|checkpoint| StateFile::new(checkpoint, owned, model, train, validation, config))
        .transpose()?;
    let reached = match &file {
        Some(file) => file.load(&variables, optimizer, config, steps)?.unwrap_or_default(),
        None => Reached::default(),
    };
    let Cursor { epoch, step, .. } = reached.cursor;
    let (epochs, seconds) = (config.epochs, reached.seconds);
    observer.start(&RunStart { epoch, step, epochs, steps, seconds });
    let clock = Clock { before: seconds, started };
    let schedule = schedule.unwrap_or(&config.schedule);
    let mut run = Run {
        model,
        config,
        variables,
        optimizer,
        schedule,
        reached,
        file,
        clock,
        epoch_clock: clock,
    };
    let stopped = !run.train(train, validation, observer)?;
    let selected_epoch = run.select(stopped)?;
    Ok(Fit { epochs: run.reached.epochs, selected_epoch, stopped, seconds: run.clock.seconds() })
}

/// Seconds since an instant, added to the seconds before it.
#[derive(Clone, Copy)]
struct Clock {
    before: f64,
    started: Instant,
}

impl Clock {
    fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }
}

/// Checks that `config` fits the model and the images.
fn check<B: Backbone>(
    model: &PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
) -> Result<()> {
    config.schedule.validate()?;
    if config.batch_size == 0 || config.batch_size > train.len() {
        let expected = format!("from 1 to the {} training images", train.len());
        return Err(
            Error::config("batch_size", expected, config.batch_size).in_config("TrainConfig")
        );
    }
    if config.micro_batch_size == Some(0) {
        return Err(Error::config("micro_batch_size", "1 or more", 0).in_config("TrainConfig"));
    }
    if let Some(max_norm) = config.max_grad_norm {
        check_max_norm(max_norm).map_err(|error| error.in_config("TrainConfig"))?;
    }
    if config.validate_every == 0 {
        return Err(Error::config("validate_every", "1 or more", 0).in_config("TrainConfig"));
    }
    if let Some(augment) = &config.augment {
        augment.validate()?;
        if config.prefix.is_some() {
            return Err(Error::config("prefix", "none where images are augmented", "one")
                .in_config("TrainConfig"));
        }
    }
    if config.selection == Selection::BestOnValidation && validation.is_none() {
        return Err(Error::config(
            "selection",
            "last_epoch without validation images",
            "best_on_validation",
        )
        .in_config("TrainConfig"));
    }
    [Some(train), validation].into_iter().flatten().try_for_each(|set| check_classes(model, set))
}

struct Run<'a, B: Backbone> {
    model: &'a PetlModel<B>,
    config: &'a TrainConfig,
    variables: BTreeMap<String, Tensor>,
    optimizer: &'a mut dyn Optimizer,
    schedule: &'a dyn Schedule,
    reached: Reached,
    file: Option<StateFile>,
    clock: Clock,
    epoch_clock: Clock,
}

impl<B: Backbone> Run<'_, B> {
    /// Runs the remaining epochs. Returns `false` if the observer ended the run.
    fn train(
        &mut self,
        train: &ImageDataset,
        validation: Option<&ImageDataset>,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        if self.reached.cursor.epoch >= self.config.epochs {
            return Ok(true);
        }
        let Some(inputs) =
            self.inputs(train, self.config.augment.as_ref(), "frozen blocks", observer)?
        else {
            return Ok(false);
        };
        let validation = match validation {
            Some(set) => match self.inputs(set, None, "frozen blocks, validation", observer)? {
                Some(inputs) => Some(inputs),
                None => return Ok(false),
            },
            None => None,
        };
        while self.reached.cursor.epoch < self.config.epochs {
            if !self.epoch(&inputs, validation.as_ref(), observer)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns what each step reads; `None` if the observer ended the run while it was computed.
    fn inputs<'i>(
        &self,
        set: &'i ImageDataset,
        augment: Option<&'i Augment>,
        label: &str,
        observer: &mut dyn Observer,
    ) -> Result<Option<Inputs<'i>>> {
        let batches = self.batches(Order::Sequential, PartialBatch::Drop);
        let mut watch = |done, images| observer.pass(label, done, images);
        Inputs::new(self.model, set, batches, augment, self.config.prefix.as_ref(), &mut watch)
    }

    fn batches(&self, order: Order, partial: PartialBatch) -> BatchConfig {
        let TrainConfig { batch_size, normalization, .. } = *self.config;
        BatchConfig {
            batch_size,
            partial,
            order,
            normalization,
            device: self.model.var_store().device(),
        }
    }

    /// Runs the rest of an epoch and its validation. Returns `false` if the observer ended the run.
    fn epoch(
        &mut self,
        inputs: &Inputs,
        validation: Option<&Inputs>,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        self.epoch_clock = Clock { before: self.reached.epoch_seconds, started: Instant::now() };
        let ControlFlow::Continue(mut report) = self.steps(inputs, observer)? else {
            return Ok(false);
        };
        let (done, every) = (report.epoch + 1, self.config.validate_every);
        let due = done.is_multiple_of(every) || done == self.config.epochs;
        if let Some(inputs) = validation.filter(|_| due) {
            let Some(top1) = self.validate(inputs, observer)? else {
                self.save()?;
                return Ok(false);
            };
            report.val_top1 = Some(top1);
            self.consider(report.epoch, top1)?;
        }
        report.seconds = self.epoch_clock.seconds();
        observer.epoch(&report);
        self.reached.epochs.push(report);
        self.reached.cursor = Cursor { epoch: report.epoch + 1, ..Cursor::default() };
        self.reached.epoch_seconds = 0.0;
        self.save()?;
        Ok(true)
    }

    /// Takes the remaining steps of an epoch; `Break` if the observer ended the run.
    fn steps(
        &mut self,
        inputs: &Inputs,
        observer: &mut dyn Observer,
    ) -> Result<ControlFlow<(), EpochReport>> {
        let Cursor { epoch, step: first, .. } = self.reached.cursor;
        let (epochs, count) = (self.config.epochs, inputs.len() / self.config.batch_size);
        let order = Order::Shuffled { seed: self.config.seed, epoch: epoch as i64 };
        let batches = inputs.batches(self.batches(order, PartialBatch::Drop))?.skip(first);
        let mut lr = self.schedule.lr(epoch, count.saturating_sub(1), epochs, count);
        for (step, batch) in (first..).zip(batches) {
            let (batch, labels) = batch?;
            lr = self.schedule.lr(epoch, step, epochs, count);
            // By the step's number, so that a run can be resumed at any step.
            tch::manual_seed(seed_of(self.config.seed, (epoch * count + step) as u64));
            let (logits, loss) = self.backward(inputs, &batch, &labels)?;
            self.optimizer.step(lr)?;
            let Cursor { step: next, sum, .. } = &mut self.reached.cursor;
            sum.add(&logits, &labels, &loss)?;
            *next = step + 1;
            let (images, loss, accuracy) = (labels.numel(), sum.loss(), sum.top1());
            let report =
                StepReport { epoch, step, epochs, steps: count, images, lr, loss, accuracy };
            let flow = observer.step(&report);
            self.taken(step + 1 == count, flow.is_break())?;
            if flow.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        let sum = self.reached.cursor.sum;
        let (loss, accuracy) = (sum.loss(), sum.top1());
        let (val_top1, seconds) = (None, 0.0);
        Ok(ControlFlow::Continue(EpochReport { epoch, lr, loss, accuracy, val_top1, seconds }))
    }

    /// Leaves the gradients of a batch's mean loss in the trainables, and returns its logits `[B, K]`
    /// and the loss, detached.
    fn backward(
        &self,
        inputs: &Inputs,
        batch: &Tensor,
        labels: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        zero_grad(self.variables.values())?;
        let images = labels.numel() as i64;
        let part = self.config.micro_batch_size.map_or(images, |size| images.min(size as i64));
        let (mut logits, mut losses) = (Vec::new(), Vec::new());
        for first in (0..images).step_by(part.max(1) as usize) {
            let length = part.min(images - first);
            let batch = batch.f_narrow(0, first, length)?;
            let labels = labels.f_narrow(0, first, length)?;
            let share = length as f64 / images as f64;
            let loss = |logits: &Tensor| -> Result<Tensor> {
                let mean = cross_entropy(logits, &labels)?;
                if length == images { Ok(mean) } else { Ok(mean.f_mul_scalar(share)?) }
            };
            let (part, loss) = inputs.backward(self.model, &batch, self.config.recompute, &loss)?;
            logits.push(part);
            losses.push(loss);
        }
        if let Some(max_norm) = self.config.max_grad_norm {
            let _norm = clip_grad_norm(self.variables.values(), max_norm)?;
        }
        Ok((Tensor::f_cat(&logits, 0)?, Tensor::f_stack(&losses, 0)?.f_sum(losses[0].kind())?))
    }

    /// Writes the state after a step if it is due or the run ends. The end of an epoch is written
    /// later, with the epoch's report.
    fn taken(&mut self, last: bool, ends: bool) -> Result<()> {
        self.reached.epoch_seconds = self.epoch_clock.seconds();
        let due = self.file.as_mut().is_some_and(StateFile::is_due);
        if ends || due && !last { self.save() } else { Ok(()) }
    }

    /// Writes the state, if there is a state file.
    fn save(&mut self) -> Result<()> {
        self.reached.seconds = self.clock.seconds();
        match &mut self.file {
            Some(file) => file.save(&self.variables, &*self.optimizer, &self.reached),
            None => Ok(()),
        }
    }

    /// Returns the top-1 accuracy in percent; `None` if the observer ended the run.
    fn validate(&self, inputs: &Inputs, observer: &mut dyn Observer) -> Result<Option<f64>> {
        let config = self.batches(Order::Sequential, PartialBatch::Keep);
        let mut watch = |done, images| observer.pass("validation", done, images);
        let evaluation = evaluate_inputs(self.model, inputs, config, &mut watch)?;
        Ok((evaluation.images == inputs.len()).then(|| evaluation.top1()))
    }

    /// Copies the weights if the run selects on validation and they are the best so far.
    fn consider(&mut self, epoch: usize, top1: f64) -> Result<()> {
        let better = self.reached.best.as_ref().is_none_or(|best| top1 > best.top1);
        if self.config.selection == Selection::BestOnValidation && better {
            let weights = self.variables.iter();
            let weights =
                weights.map(|(name, variable)| Ok((name.clone(), variable.f_detach_copy()?)));
            let weights = weights.collect::<Result<_>>()?;
            self.reached.best = Some(Best { epoch, top1, weights });
        }
        Ok(())
    }

    /// Copies the best weights on validation into the model, if there are any, and returns the epoch
    /// whose weights the model holds.
    fn select(&mut self, stopped: bool) -> Result<Option<usize>> {
        let last = self.reached.epochs.last().map(|report| report.epoch);
        let Some(best) = &self.reached.best else { return Ok(last.filter(|_| !stopped)) };
        for (name, variable) in &self.variables {
            if let Some(value) = best.weights.get(name) {
                tch::no_grad(|| variable.shallow_clone().f_copy_(value))?;
            }
        }
        Ok(Some(best.epoch))
    }
}
