//! The training loop.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::Instant;

use tch::Tensor;

use super::captured::{Captured, Graphs};
use super::config::{Selection, TrainConfig};
use super::gradients::StepSum;
use super::loss::Loss;
use super::observer::{EpochReport, Observer, StepReport};
use super::optimizer::{Optimizer, Schedule, clip_grad_norm};
use super::sampler::Sampler;
use super::state::{Best, Cursor, Reached, StateFile};
use super::unread::{ReadStep, Unread};
use crate::backbone::Backbone;
use crate::data::{Augment, BatchConfig, ImageDataset, Order, PartialBatch};
use crate::error::{Error, Result};
use crate::eval::{Inputs, evaluate_inputs};
use crate::model::PetlModel;
use crate::nn::seed_of;

/// Seconds since an instant, added to the seconds before it.
#[derive(Clone, Copy)]
pub(super) struct Clock {
    pub(super) before: f64,
    pub(super) started: Instant,
}

impl Clock {
    pub(super) fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }
}

/// The order of the images of an epoch, and batches of inputs and labels.
type OrderAndBatches<'a> = (Vec<usize>, Box<dyn Iterator<Item = Result<(Tensor, Tensor)>> + 'a>);

/// A run in progress.
pub(super) struct Run<'a, B: Backbone> {
    pub(super) model: &'a PetlModel<B>,
    pub(super) config: &'a TrainConfig,
    pub(super) loss: Rc<Loss>,
    pub(super) variables: BTreeMap<String, Tensor>,
    pub(super) optimizer: &'a mut dyn Optimizer,
    pub(super) schedule: &'a dyn Schedule,
    /// What a step is captured with, if the config asks for it.
    pub(super) graphs: &'a dyn Graphs,
    pub(super) reached: Reached,
    pub(super) file: Option<StateFile>,
    pub(super) clock: Clock,
    pub(super) epoch_clock: Clock,
    pub(super) steps_per_epoch: usize,
    pub(super) sampler: Sampler<'a>,
    /// Whether an observer of this process asked to end a run of several processes. They end it
    /// together after the next step.
    pub(super) stopping: bool,
    /// The learning rate of the last step.
    pub(super) lr: f64,
    /// The steps whose losses are not in [`Reached`] yet.
    pub(super) unread: Unread,
}

impl<'a, B: Backbone> Run<'a, B> {
    /// Runs the remaining epochs. Returns `false` if the observer ended the run.
    pub(super) fn train(
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
        let mut captured = self.captured()?;
        while self.reached.cursor.epoch < self.config.epochs {
            if !self.epoch(&inputs, validation.as_ref(), captured.as_mut(), observer)? {
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
        let (prefix, team) = (self.config.prefix.as_ref(), self.sampler.team);
        Inputs::new(self.model, set, batches, augment, prefix, team, &mut watch)
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
    fn epoch<'i>(
        &mut self,
        inputs: &'i Inputs<'i>,
        validation: Option<&Inputs>,
        captured: Option<&mut Captured<'i>>,
        observer: &mut dyn Observer,
    ) -> Result<bool>
    where
        'a: 'i,
    {
        self.epoch_clock = Clock { before: self.reached.epoch_seconds, started: Instant::now() };
        let ControlFlow::Continue(mut report) = self.steps(inputs, captured, observer)? else {
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
    fn steps<'i>(
        &mut self,
        inputs: &'i Inputs<'i>,
        mut captured: Option<&mut Captured<'i>>,
        observer: &mut dyn Observer,
    ) -> Result<ControlFlow<(), EpochReport>>
    where
        'a: 'i,
    {
        let Cursor { epoch, step: first, .. } = self.reached.cursor;
        let (epochs, count) = (self.config.epochs, self.steps_per_epoch);
        let (order, mut batches) = self.epoch_batches(inputs, epoch, first)?;
        let mut lr = self.schedule.lr(epoch, count.saturating_sub(1), epochs, count);
        for step in first..count {
            let images = &order[self.sampler.step(step, inputs.len())];
            lr = self.schedule.lr(epoch, step, epochs, count);
            // By the step's number, so that a run can be resumed at any step.
            tch::manual_seed(seed_of(self.config.seed, (epoch * count + step) as u64));
            let captured = captured.as_deref_mut();
            let StepSum { values, is_stopped } =
                self.gradients(inputs, &mut batches, images, captured)?;
            if let Some(max_norm) = self.config.max_grad_norm {
                let _norm = clip_grad_norm(self.variables.values(), max_norm)?;
            }
            let images = images.len();
            self.unread.push(step, images, lr, values);
            let is_read = self.unread.is_on_cpu() || observer.reads_step(epoch * count + step + 1);
            if is_read {
                self.read_steps()?;
            }
            self.optimizer.step(lr)?;
            self.lr = lr;
            let Cursor { step: next, sum, .. } = &mut self.reached.cursor;
            *next = step + 1;
            let (loss, accuracy) =
                if is_read { (sum.loss(), sum.top1()) } else { (f64::NAN, f64::NAN) };
            let report =
                StepReport { epoch, step, epochs, steps: count, images, lr, loss, accuracy };
            self.stopping |= observer.step(&report).is_break();
            let ends = if self.sampler.team.is_alone() { self.stopping } else { is_stopped };
            self.taken(step + 1 == count, ends)?;
            if ends {
                return Ok(ControlFlow::Break(()));
            }
        }
        self.read_steps()?;
        let sum = self.reached.cursor.sum;
        let (loss, accuracy) = (sum.loss(), sum.top1());
        let (val_top1, seconds) = (None, 0.0);
        Ok(ControlFlow::Continue(EpochReport { epoch, lr, loss, accuracy, val_top1, seconds }))
    }

    /// Adds the losses of the steps that were not read to those of the epoch.
    ///
    /// # Errors
    /// [`Error::Diverged`] with the first step whose loss is not finite.
    fn read_steps(&mut self) -> Result<()> {
        let Cursor { epoch, sum, .. } = &mut self.reached.cursor;
        for ReadStep { step, images, lr, loss, correct } in self.unread.read()? {
            if !loss.is_finite() {
                return Err(Error::Diverged { epoch: *epoch, step, lr, what: "the loss is" });
            }
            sum.add(images, correct, loss);
        }
        Ok(())
    }

    /// Returns the order of all images of an epoch, and the batches of this process from the step
    /// `first` on.
    fn epoch_batches<'i>(
        &self,
        inputs: &'i Inputs,
        epoch: usize,
        first: usize,
    ) -> Result<OrderAndBatches<'i>> {
        let order = Order::Shuffled { seed: self.config.seed, epoch: epoch as i64 };
        let mut config = self.batches(order, PartialBatch::Drop);
        let order = config.indices(inputs.len())?;
        config.batch_size = self.sampler.own_batch();
        let batches = inputs.batches(config, self.sampler.own(&order))?;
        let taken = self.sampler.step(first, inputs.len()).start / self.config.batch_size;
        Ok((order, Box::new(batches.skip(taken))))
    }

    /// Writes the state after a step if it is due or the run ends. The end of an epoch is written
    /// later, with the epoch's report.
    fn taken(&mut self, last: bool, ends: bool) -> Result<()> {
        self.reached.epoch_seconds = self.epoch_clock.seconds();
        let due = self.file.as_mut().is_some_and(StateFile::is_due);
        if ends || due && !last { self.save() } else { Ok(()) }
    }

    /// Writes the state, if there is a state file. Weights that are not finite are never written.
    fn save(&mut self) -> Result<()> {
        self.read_steps()?;
        if self.file.is_some() {
            self.check_weights()?;
        }
        self.reached.seconds = self.clock.seconds();
        match &mut self.file {
            Some(file) => file.save(&self.variables, &*self.optimizer, &self.reached),
            None => Ok(()),
        }
    }

    /// Returns an error if a trained weight is NaN or infinite.
    pub(super) fn check_weights(&self) -> Result<()> {
        for variable in self.variables.values() {
            if !variable.f_isfinite()?.f_all()?.f_int64_value(&[])?.eq(&1) {
                return Err(self.diverged("a trained weight is"));
            }
        }
        Ok(())
    }

    /// Returns the error of a run in which `what` NaN or infinite after the last step.
    fn diverged(&self, what: &'static str) -> Error {
        let Cursor { epoch, step, .. } = self.reached.cursor;
        // After the end of an epoch the cursor is at the start of the next one.
        let steps = self.steps_per_epoch;
        let last = (epoch * steps + step).saturating_sub(1);
        let (epoch, step) = (last / steps.max(1), last % steps.max(1));
        Error::Diverged { epoch, step, lr: self.lr, what }
    }

    /// Returns the top-1 accuracy in percent; `None` if the observer ended the run.
    fn validate(&self, inputs: &Inputs, observer: &mut dyn Observer) -> Result<Option<f64>> {
        let config = self.batches(Order::Sequential, PartialBatch::Keep);
        let mut watch = |done, images| observer.pass("validation", done, images);
        let evaluation =
            evaluate_inputs(self.model, inputs, config, self.sampler.team, &mut watch)?;
        if evaluation.not_finite > 0 {
            return Err(self.diverged("logits of validation images are"));
        }
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
    pub(super) fn select(&mut self, stopped: bool) -> Result<Option<usize>> {
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
