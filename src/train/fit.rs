//! The training loop.

use std::ops::ControlFlow;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::adamw::AdamW;
use super::config::{Selection, TrainConfig};
use super::observer::{EpochReport, Observer, RunStart, StepReport};
use super::state::{Best, Place, Reached, RunCheckpoint, StateFile};
use crate::backbone::Backbone;
use crate::data::{Augment, BatchConfig, ImageDataset, Order, PartialBatch};
use crate::error::{Error, Result};
use crate::eval::{Inputs, check_classes, cross_entropy, evaluate_inputs};
use crate::model::PetlModel;
use crate::nn::seed_of;

/// How a run went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// The epochs that were finished.
    pub epochs: Vec<EpochReport>,
    /// The epoch whose weights the model holds; `None` if the run was ended within an epoch and
    /// the weights are of that moment.
    pub selected_epoch: Option<usize>,
    /// Whether the observer ended the run.
    pub stopped: bool,
    /// Seconds of the whole run.
    pub seconds: f64,
}

/// Trains `model` in place on `train`.
///
/// The same seed gives the same weights, bit for bit, on one machine and thread count: libtorch's
/// generator, which the whole process shares, is seeded anew at each step from the seed and the
/// step's number. Runs side by side in one process draw from it in turn and do not repeat. Where
/// nothing before the head is trained or drawn (a linear probe without drop path), each image's
/// features are computed once.
///
/// # Errors
/// [`Error::Config`] for hyper-parameters that make no run (fewer images than a batch, labels
/// beyond the head, no validation images to select on); what the data and libtorch report.
pub fn fit<B: Backbone>(
    model: &mut PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
    observer: &mut dyn Observer,
) -> Result<Fit> {
    run(model, train, validation, config, None, observer)
}

/// As [`fit`](fn@fit), with the run's state in a file from which the same call goes on: after a
/// kill at most `checkpoint.every` steps are taken again, and after the observer ended the run
/// none. The final weights are those of an uninterrupted run, bit for bit.
///
/// The file stays when the run has ended, for a caller that is killed before it has saved what
/// came of it; a call that finds the state of a finished run trains nothing. Whoever has saved
/// that removes it.
///
/// # Errors
/// As [`fit`](fn@fit); [`Error::OtherRun`] if the file is of a run with another model, config,
/// backbone, autocast, start or data; [`Error::CorruptFile`], [`Error::UnknownFormat`] and their
/// like if it is damaged or no such file; [`Error::Io`] if it cannot be written. A file that is
/// refused is left as it is, and so is the model.
pub fn fit_resumable<B: Backbone>(
    model: &mut PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
    checkpoint: &RunCheckpoint,
    observer: &mut dyn Observer,
) -> Result<Fit> {
    run(model, train, validation, config, Some(checkpoint), observer)
}

fn run<B: Backbone>(
    model: &PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
    checkpoint: Option<&RunCheckpoint>,
    observer: &mut dyn Observer,
) -> Result<Fit> {
    check(model, train, validation, config)?;
    let started = Instant::now();
    let steps = train.len() / config.batch_size;
    let mut optimizer = AdamW::new(model.var_store(), config.weight_decay)?;
    let file = checkpoint
        .map(|checkpoint| StateFile::new(checkpoint, model, train, validation, config))
        .transpose()?;
    let reached = match &file {
        Some(file) => file.load(&mut optimizer, config, steps)?.unwrap_or_default(),
        None => Reached::default(),
    };
    let Place { epoch, step, .. } = reached.place;
    let (epochs, seconds) = (config.epochs, reached.seconds);
    observer.start(&RunStart { epoch, step, epochs, steps, seconds });
    let clock = Clock { before: seconds, started };
    let mut run = Run { model, config, optimizer, reached, file, clock, epoch_clock: clock };
    let stopped = !run.train(train, validation, observer)?;
    let selected_epoch = run.select(stopped)?;
    Ok(Fit { epochs: run.reached.epochs, selected_epoch, stopped, seconds: run.clock.seconds() })
}

/// Seconds since an instant, and those before it.
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

fn batches(config: &TrainConfig, order: Order, device: Device) -> BatchConfig {
    BatchConfig {
        batch_size: config.batch_size,
        partial: PartialBatch::Drop,
        order,
        normalization: config.normalization,
        device,
    }
}

/// Checks that there is a run of `config` on these images.
pub(crate) fn check<B: Backbone>(
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
    optimizer: AdamW,
    reached: Reached,
    file: Option<StateFile>,
    clock: Clock,
    epoch_clock: Clock,
}

impl<B: Backbone> Run<'_, B> {
    /// Every epoch that is left; `false` if the observer ended the run.
    fn train(
        &mut self,
        train: &ImageDataset,
        validation: Option<&ImageDataset>,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        if self.reached.place.epoch >= self.config.epochs {
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
        while self.reached.place.epoch < self.config.epochs {
            if !self.epoch(&inputs, validation.as_ref(), observer)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `None` if the observer ended the run while features were computed.
    fn inputs<'i>(
        &self,
        set: &'i ImageDataset,
        augment: Option<&'i Augment>,
        label: &str,
        observer: &mut dyn Observer,
    ) -> Result<Option<Inputs<'i>>> {
        let batches = batches(self.config, Order::Sequential, self.model.var_store().device());
        let mut watch = |done, images| observer.pass(label, done, images);
        Inputs::new(self.model, set, batches, augment, self.config.prefix.as_ref(), &mut watch)
    }

    /// What is left of an epoch; `false` if the observer ended the run.
    fn epoch(
        &mut self,
        inputs: &Inputs,
        validation: Option<&Inputs>,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        self.epoch_clock = Clock { before: self.reached.epoch_seconds, started: Instant::now() };
        let (place, config) = (self.reached.place, self.config);
        let device = self.model.var_store().device();
        let mut steps = Steps { run: self, inputs };
        let report = epoch(inputs, place, config, device, &mut steps, observer)?;
        let ControlFlow::Continue(mut report) = report else { return Ok(false) };
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
        self.reached.place = Place { epoch: report.epoch + 1, ..Place::default() };
        self.reached.epoch_seconds = 0.0;
        self.save()?;
        Ok(true)
    }

    /// Writes the state, if it is kept.
    fn save(&mut self) -> Result<()> {
        self.reached.seconds = self.clock.seconds();
        match &mut self.file {
            Some(file) => file.save(&self.optimizer, &self.reached),
            None => Ok(()),
        }
    }

    /// Top-1 in percent; `None` if the observer ended the run.
    fn validate(&self, inputs: &Inputs, observer: &mut dyn Observer) -> Result<Option<f64>> {
        let config = BatchConfig {
            partial: PartialBatch::Keep,
            ..batches(self.config, Order::Sequential, self.model.var_store().device())
        };
        let mut watch = |done, images| observer.pass("validation", done, images);
        let evaluation = evaluate_inputs(self.model, inputs, config, &mut watch)?;
        Ok((evaluation.images == inputs.len()).then(|| evaluation.top1()))
    }

    /// Keeps a copy of the weights if they are the best so far and the run selects so.
    fn consider(&mut self, epoch: usize, top1: f64) -> Result<()> {
        let better = self.reached.best.as_ref().is_none_or(|best| top1 > best.top1);
        if self.config.selection == Selection::BestOnValidation && better {
            let slots = self.optimizer.slots().iter();
            let weights = slots.map(|slot| Ok((slot.name.clone(), slot.variable.f_detach_copy()?)));
            let weights = weights.collect::<Result<_>>()?;
            self.reached.best = Some(Best { epoch, top1, weights });
        }
        Ok(())
    }

    /// Leaves the model with the best weights on validation, if the run selects so and has any,
    /// and says which epoch's weights the model holds.
    fn select(&mut self, stopped: bool) -> Result<Option<usize>> {
        let last = self.reached.epochs.last().map(|report| report.epoch);
        let Some(best) = &self.reached.best else { return Ok(last.filter(|_| !stopped)) };
        for slot in self.optimizer.slots() {
            if let Some(value) = best.weights.get(&slot.name) {
                tch::no_grad(|| slot.variable.shallow_clone().f_copy_(value))?;
            }
        }
        Ok(Some(best.epoch))
    }
}

/// What is done at the steps of an epoch.
pub(crate) trait Take {
    /// Makes a batch and its labels into logits `[B, K]` and their loss, and updates the weights
    /// at a learning rate.
    fn take(&mut self, batch: &Tensor, labels: &Tensor, lr: f64) -> Result<(Tensor, Tensor)>;

    /// After that, with where the run is, and whether it ends there.
    fn taken(&mut self, _place: Place, _ends: bool) -> Result<()> {
        Ok(())
    }
}

impl<F: FnMut(&Tensor, &Tensor, f64) -> Result<(Tensor, Tensor)>> Take for F {
    fn take(&mut self, batch: &Tensor, labels: &Tensor, lr: f64) -> Result<(Tensor, Tensor)> {
        self(batch, labels, lr)
    }
}

struct Steps<'r, 'a, B: Backbone> {
    run: &'r mut Run<'a, B>,
    inputs: &'r Inputs<'r>,
}

impl<B: Backbone> Take for Steps<'_, '_, B> {
    fn take(&mut self, batch: &Tensor, labels: &Tensor, lr: f64) -> Result<(Tensor, Tensor)> {
        let Run { model, config, optimizer, .. } = &mut *self.run;
        optimizer.zero_grad()?;
        let loss = |logits: &Tensor| cross_entropy(logits, labels);
        let result = self.inputs.backward(model, batch, config.recompute, &loss)?;
        optimizer.step(lr)?;
        Ok(result)
    }

    fn taken(&mut self, place: Place, ends: bool) -> Result<()> {
        let run = &mut *self.run;
        run.reached.place = place;
        run.reached.epoch_seconds = run.epoch_clock.seconds();
        let due = run.file.as_mut().is_some_and(StateFile::is_due);
        // The end of the epoch is written once its report is made.
        let last = (place.step + 1) * run.config.batch_size > self.inputs.len();
        if ends || due && !last { run.save() } else { Ok(()) }
    }
}

/// What is left of a pass over `inputs`, in the run that `config` says; `Break` if the observer
/// ended it.
pub(crate) fn epoch(
    inputs: &Inputs,
    mut place: Place,
    config: &TrainConfig,
    device: Device,
    steps: &mut dyn Take,
    observer: &mut dyn Observer,
) -> Result<ControlFlow<(), EpochReport>> {
    let epoch = place.epoch;
    let order = Order::Shuffled { seed: config.seed, epoch: epoch as i64 };
    let count = inputs.len() / config.batch_size;
    let lr_at = |step| config.schedule.lr(epoch, step, config.epochs, count);
    for batch in inputs.batches(batches(config, order, device))?.skip(place.step) {
        let (batch, labels) = batch?;
        let lr = lr_at(place.step);
        // By the step's number, so that a run can be taken up at any step.
        tch::manual_seed(seed_of(config.seed, (epoch * count + place.step) as u64));
        let (logits, loss) = steps.take(&batch, &labels, lr)?;
        place.sum.add(&logits, &labels, &loss)?;
        let report = StepReport {
            epoch,
            step: place.step,
            epochs: config.epochs,
            steps: count,
            images: labels.numel(),
            lr,
            loss: place.sum.loss(),
            accuracy: place.sum.top1(),
        };
        place.step += 1;
        let flow = observer.step(&report);
        steps.taken(place, flow.is_break())?;
        if flow.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    let (lr, loss, accuracy) = (lr_at(count.saturating_sub(1)), place.sum.loss(), place.sum.top1());
    Ok(ControlFlow::Continue(EpochReport {
        epoch,
        lr,
        loss,
        accuracy,
        val_top1: None,
        seconds: 0.0,
    }))
}
