//! The training loop.

use std::ops::ControlFlow;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::adamw::AdamW;
use super::schedule::CosineSchedule;
use crate::backbone::Backbone;
use crate::data::{BatchConfig, ImageDataset, Normalization, Order, PartialBatch};
use crate::error::{Error, Result};
use crate::eval::{Evaluation, Inputs, PrefixCache, check_classes, cross_entropy, evaluate_inputs};
use crate::model::PetlModel;
use crate::nn::seed_of;

/// Which epoch's weights a run ends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// The last epoch's.
    #[default]
    LastEpoch,
    /// The first of those with the best top-1 on the validation images. There is no selection on
    /// the test set here.
    BestOnValidation,
}

/// A run's hyper-parameters; the default is the paper's for VTAB-1k, with the normalization of
/// the published code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Passes over the training images.
    pub epochs: usize,
    /// Images a step; a last partial batch is dropped.
    pub batch_size: usize,
    /// The learning rate over the run.
    pub schedule: CosineSchedule,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// What the pixels become.
    pub normalization: Normalization,
    /// Seed of the order of the images, dropout and drop path.
    pub seed: i64,
    /// Which epoch's weights the run ends with.
    pub selection: Selection,
    /// Epochs from one pass over the validation images to the next; the last epoch has one.
    pub validate_every: usize,
    /// Whether each block is computed again in the backward pass
    /// ([`PetlModel::backward_recomputed`]): less memory, more time, the same gradients.
    pub recompute: bool,
    /// Where what the frozen blocks in front make of each image is kept, so that it is computed
    /// once; `None` to compute it in every step. There are such blocks where a method leaves out
    /// the first ones ([`PetlModel::frozen_blocks`]).
    pub prefix: Option<PrefixCache>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            epochs: 100,
            batch_size: 64,
            schedule: CosineSchedule::default(),
            weight_decay: 1e-4,
            normalization: Normalization::ImageNet,
            seed: 0,
            selection: Selection::LastEpoch,
            validate_every: 1,
            recompute: false,
            prefix: None,
        }
    }
}

/// One step, as it ends.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// From 0.
    pub epoch: usize,
    /// From 0, within the epoch.
    pub step: usize,
    /// Epochs of the run.
    pub epochs: usize,
    /// Steps an epoch.
    pub steps: usize,
    /// Images of this step.
    pub images: usize,
    /// The learning rate of this step.
    pub lr: f64,
    /// Mean cross entropy over the epoch so far.
    pub loss: f64,
    /// Top-1 in percent on training batches, dropout and drop path on, over the epoch so far.
    pub accuracy: f64,
}

/// One epoch, as it ends.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochReport {
    /// From 0.
    pub epoch: usize,
    /// The learning rate of its last step.
    pub lr: f64,
    /// Mean cross entropy on the training batches.
    pub loss: f64,
    /// Top-1 in percent on the training batches, dropout and drop path on.
    pub accuracy: f64,
    /// Top-1 in percent on the validation images, where there are any and the epoch has a pass
    /// over them.
    pub val_top1: Option<f64>,
    /// Seconds, validation included.
    pub seconds: f64,
}

/// Watches a run and may end it.
pub trait Observer {
    /// After each step; `Break` ends the run with the weights as they are.
    fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// After each batch of a pass without training: features computed once, or validation.
    /// `Break` ends the run.
    fn pass(&mut self, _label: &str, _done: usize, _images: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// After each epoch.
    fn epoch(&mut self, _epoch: &EpochReport) {}
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

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
    check(model, train, validation, config)?;
    let start = Instant::now();
    let (mut epochs, mut selected_epoch, mut stopped) = (Vec::new(), None, true);
    if let Some(mut run) = Run::new(model, train, validation, config, observer)? {
        stopped = !run.run(observer)?;
        selected_epoch = run.select(stopped)?;
        epochs = run.epochs;
    }
    Ok(Fit { epochs, selected_epoch, stopped, seconds: start.elapsed().as_secs_f64() })
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
        return Err(Error::config("batch_size", expected, config.batch_size));
    }
    if config.validate_every == 0 {
        return Err(Error::config("validate_every", "1 or more", 0));
    }
    if config.selection == Selection::BestOnValidation && validation.is_none() {
        return Err(Error::config(
            "selection",
            "last_epoch without validation images",
            "best_on_validation",
        ));
    }
    [Some(train), validation].into_iter().flatten().try_for_each(|set| check_classes(model, set))
}

struct Run<'a, B: Backbone> {
    model: &'a PetlModel<B>,
    inputs: Inputs<'a>,
    validation: Option<Inputs<'a>>,
    optimizer: AdamW,
    config: &'a TrainConfig,
    epochs: Vec<EpochReport>,
    best: Option<Snapshot>,
}

/// The best epoch on validation so far: each variable with a copy of what it was.
struct Snapshot {
    epoch: usize,
    top1: f64,
    weights: Vec<(Tensor, Tensor)>,
}

impl<'a, B: Backbone> Run<'a, B> {
    /// `None` if the observer ended it while features were computed.
    fn new(
        model: &'a PetlModel<B>,
        train: &'a ImageDataset,
        validation: Option<&'a ImageDataset>,
        config: &'a TrainConfig,
        observer: &mut dyn Observer,
    ) -> Result<Option<Self>> {
        let mut inputs = |set, label: &str| {
            let batches = batches(config, Order::Sequential, model.var_store().device());
            let mut watch = |done, images| observer.pass(label, done, images);
            Inputs::new(model, set, batches, config.prefix.as_ref(), &mut watch)
        };
        let Some(train_inputs) = inputs(train, "frozen blocks")? else { return Ok(None) };
        let validation = match validation {
            Some(set) => match inputs(set, "frozen blocks, validation")? {
                Some(inputs) => Some(inputs),
                None => return Ok(None),
            },
            None => None,
        };
        Ok(Some(Run {
            inputs: train_inputs,
            validation,
            optimizer: AdamW::new(model.var_store(), config.weight_decay)?,
            model,
            config,
            epochs: Vec::new(),
            best: None,
        }))
    }

    /// Every epoch; `false` if the observer ended the run.
    fn run(&mut self, observer: &mut dyn Observer) -> Result<bool> {
        for epoch in 0..self.config.epochs {
            let start = Instant::now();
            let ControlFlow::Continue(mut report) = self.epoch(epoch, observer)? else {
                return Ok(false);
            };
            let (done, every) = (epoch + 1, self.config.validate_every);
            let due = done.is_multiple_of(every) || done == self.config.epochs;
            if let Some(inputs) = self.validation.as_ref().filter(|_| due) {
                let Some(top1) = self.validate(inputs, observer)? else { return Ok(false) };
                report.val_top1 = Some(top1);
                self.consider(epoch, top1)?;
            }
            report.seconds = start.elapsed().as_secs_f64();
            observer.epoch(&report);
            self.epochs.push(report);
        }
        Ok(true)
    }

    fn epoch(
        &mut self,
        index: usize,
        observer: &mut dyn Observer,
    ) -> Result<ControlFlow<(), EpochReport>> {
        let Run { model, inputs, optimizer, config, .. } = self;
        let mut step = |batch: &Tensor, labels: &Tensor, lr| {
            optimizer.zero_grad()?;
            let loss = |logits: &Tensor| cross_entropy(logits, labels);
            let result = inputs.backward(model, batch, config.recompute, &loss)?;
            optimizer.step(lr)?;
            Ok(result)
        };
        epoch(inputs, index, config, model.var_store().device(), &mut step, observer)
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
        let better = self.best.as_ref().is_none_or(|best| top1 > best.top1);
        if self.config.selection == Selection::BestOnValidation && better {
            let variables = self.model.var_store().trainable_variables();
            let weights = variables
                .into_iter()
                .map(|variable| variable.f_detach_copy().map(|copy| (variable, copy)));
            self.best = Some(Snapshot { epoch, top1, weights: weights.collect::<Result<_, _>>()? });
        }
        Ok(())
    }

    /// Leaves the model with the best weights on validation, if the run selects so and has any,
    /// and says which epoch's weights the model holds.
    fn select(&mut self, stopped: bool) -> Result<Option<usize>> {
        let last = self.epochs.last().map(|report| report.epoch);
        let Some(best) = &mut self.best else { return Ok(last.filter(|_| !stopped)) };
        tch::no_grad(|| best.weights.iter_mut().try_for_each(|(v, value)| v.f_copy_(value)))?;
        Ok(Some(best.epoch))
    }
}

/// Makes a batch and its labels into logits `[B, K]` and their loss, and updates the weights at
/// a learning rate.
type Step<'a> = dyn FnMut(&Tensor, &Tensor, f64) -> Result<(Tensor, Tensor)> + 'a;

/// One pass over `inputs`: epoch `index` of the run that `config` says; `Break` if the observer
/// ended it.
pub(crate) fn epoch(
    inputs: &Inputs,
    index: usize,
    config: &TrainConfig,
    device: Device,
    take: &mut Step,
    observer: &mut dyn Observer,
) -> Result<ControlFlow<(), EpochReport>> {
    let order = Order::Shuffled { seed: config.seed, epoch: index as i64 };
    let steps = inputs.len() / config.batch_size;
    let (mut sum, mut lr) = (Evaluation::default(), 0.0);
    for (step, batch) in inputs.batches(batches(config, order, device))?.enumerate() {
        let (batch, labels) = batch?;
        lr = config.schedule.lr(index, step, config.epochs, steps);
        // By the step's number, so that a run can be taken up at any step.
        tch::manual_seed(seed_of(config.seed, (index * steps + step) as u64));
        let (logits, loss) = take(&batch, &labels, lr)?;
        sum.add(&logits, &labels, &loss)?;
        let report = StepReport {
            epoch: index,
            step,
            epochs: config.epochs,
            steps,
            images: labels.numel(),
            lr,
            loss: sum.loss(),
            accuracy: sum.top1(),
        };
        if observer.step(&report).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    let (loss, accuracy) = (sum.loss(), sum.top1());
    let report = EpochReport { epoch: index, lr, loss, accuracy, val_top1: None, seconds: 0.0 };
    Ok(ControlFlow::Continue(report))
}
