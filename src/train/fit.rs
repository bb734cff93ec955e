//! Training: the functions that run the training loop, and its outcome.

use std::fmt;
use std::rc::Rc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::adamw::AdamW;
use super::captured::{CudaGraphs, Graphs, check_captured};
use super::config::{Selection, TrainConfig};
use super::identity::{Owned, difference, identity};
use super::loss::Loss;
use super::observer::{EpochReport, Observer, RunStart};
use super::optimizer::{Optimizer, Schedule, check_max_norm};
use super::run::{Clock, Run};
use super::sampler::Sampler;
use super::shared_state::share;
use super::state::{Cursor, RunCheckpoint, StateFile, sorted_variables};
use super::unread::Unread;
use crate::backbone::Backbone;
use crate::data::ImageDataset;
use crate::error::{Error, Result};
use crate::eval::{Team, check_classes};
use crate::model::PetlModel;
use crate::nn::DynamicInt8;

/// What the names of the head's variables start with.
const HEAD: &str = "head.";

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
    /// The optimizer; `None` is [`AdamW`] with the weight decay and the factor of the head's learning
    /// rate of the [`TrainConfig`].
    pub optimizer: Option<&'a mut dyn Optimizer>,
    /// The learning rate of each step; `None` is the schedule of the [`TrainConfig`].
    pub schedule: Option<&'a dyn Schedule>,
    /// The processes that share the run. Each calls the function with equal arguments, and each
    /// batch is divided among them; the result is that of one process up to rounding. Rank 0 alone
    /// reads and writes the state file. `None` runs in this process alone.
    #[cfg(feature = "distributed")]
    pub group: Option<&'a crate::distributed::ProcessGroup>,
}

impl<'a> FitOptions<'a> {
    fn team(&self) -> Team<'a> {
        #[cfg(feature = "distributed")]
        return Team::new(self.group);
        #[cfg(not(feature = "distributed"))]
        Team::default()
    }
}

impl fmt::Debug for FitOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FitOptions")
            .field("checkpoint", &self.checkpoint)
            .field("optimizer", &self.optimizer.is_some())
            .field("schedule", &self.schedule.is_some())
            .field("processes", &self.team().size())
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
/// validation images to select on, labels beyond the head; [`Error::Diverged`] if the loss, the
/// logits of validation images or the weights are NaN or infinite; [`Error::CaptureDiffers`] if a
/// replay with [`TrainConfig::cuda_graph`] computes something else; the errors of the data and of
/// libtorch. After [`Error::Diverged`] the weights of the model may not be finite; a state file
/// ([`fit_resumable`]) still holds finite ones.
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
    fit_by(model, train, validation, config, options, observer, &CudaGraphs)
}

/// Trains as [`fit_with`] does; `graphs` capture the steps, if the config asks for it.
pub(super) fn fit_by<B: Backbone>(
    model: &mut PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
    options: FitOptions,
    observer: &mut dyn Observer,
    graphs: &dyn Graphs,
) -> Result<Fit> {
    check(model, train, validation, config)?;
    let started = Instant::now();
    let team = options.team();
    if config.cuda_graph {
        check_captured(model, config, team, graphs)?;
    }
    let sampler = Sampler::new(config, team)?;
    let FitOptions { checkpoint, optimizer, schedule, .. } = options;
    let owned = Owned { optimizer: optimizer.is_some(), schedule: schedule.is_some() };
    owned.check(config)?;
    let adamw = AdamW::new(model.var_store(), config.weight_decay)?;
    let mut adamw = adamw.with_lr_factor(HEAD, config.head_lr_factor)?;
    let optimizer = optimizer.unwrap_or(&mut adamw);
    let variables = sorted_variables(model);
    let steps = sampler.steps(train.len());
    let mut file = None;
    if checkpoint.is_some() || !team.is_alone() {
        let run = identity(owned, model, train, validation, config)?;
        agree(team, &run)?;
        let checkpoint = checkpoint.filter(|_| team.is_first());
        file = checkpoint.map(|checkpoint| StateFile::new(checkpoint, run)).transpose()?;
    }
    let found = match &file {
        Some(file) => file.load(&variables, optimizer, config, &sampler, train.len())?,
        None => None,
    };
    let reached = share(team, found, &variables, optimizer, steps)?;
    let Cursor { epoch, step, .. } = reached.cursor;
    let (epochs, seconds) = (config.epochs, reached.seconds);
    observer.start(&RunStart { epoch, step, epochs, steps, seconds });
    let clock = Clock { before: seconds, started };
    let schedule = schedule.unwrap_or(&config.schedule);
    let (classes, device) = (model.config().num_classes, model.var_store().device());
    let mut run = Run {
        model,
        config,
        loss: Rc::new(Loss::new(config, train, classes, device)?),
        variables,
        optimizer,
        schedule,
        graphs,
        reached,
        file,
        clock,
        epoch_clock: clock,
        steps_per_epoch: steps,
        sampler,
        stopping: false,
        lr: 0.0,
        unread: Unread::default(),
    };
    let stopped = !run.train(train, validation, observer)?;
    run.check_weights()?;
    let selected_epoch = run.select(stopped)?;
    Ok(Fit { epochs: run.reached.epochs, selected_epoch, stopped, seconds: run.clock.seconds() })
}

/// Checks that every process of `team` has the run of rank 0.
fn agree(team: Team, run: &Value) -> Result<()> {
    team.compare(&run.to_string(), |expected, found| {
        let value = |text: &str| serde_json::from_str(text).unwrap_or(Value::Null);
        let (field, found, expected) = difference(String::new(), &value(found), &value(expected))?;
        Some((field, expected, found))
    })
}

/// Checks that `config` fits the model and the images.
fn check<B: Backbone>(
    model: &PetlModel<B>,
    train: &ImageDataset,
    validation: Option<&ImageDataset>,
    config: &TrainConfig,
) -> Result<()> {
    config.schedule.validate()?;
    if DynamicInt8::is_on() {
        return Err(Error::config("precision", "a precision with gradients", "int8-dynamic"));
    }
    if config.batch_size == 0 || config.batch_size > train.len() {
        let expected = format!("from 1 to the {} training images", train.len());
        return Err(
            Error::config("batch_size", expected, config.batch_size).in_config("TrainConfig")
        );
    }
    if config.accumulate == 0 {
        return Err(Error::config("accumulate", "1 or more", 0).in_config("TrainConfig"));
    }
    if config.micro_batch_size == Some(0) {
        return Err(Error::config("micro_batch_size", "1 or more", 0).in_config("TrainConfig"));
    }
    if let Some(max_norm) = config.max_grad_norm {
        check_max_norm(max_norm).map_err(|error| error.in_config("TrainConfig"))?;
    }
    let factor = config.head_lr_factor;
    if !(factor.is_finite() && factor >= 0.0) {
        return Err(Error::config("head_lr_factor", "finite and not negative", factor)
            .in_config("TrainConfig"));
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
    if !(0.0..1.0).contains(&config.label_smoothing) {
        return Err(Error::config("label_smoothing", "within 0..1", config.label_smoothing)
            .in_config("TrainConfig"));
    }
    let weights = config.class_weights.check(model.config().num_classes);
    weights.map_err(|error| error.in_config("TrainConfig"))?;
    [Some(train), validation].into_iter().flatten().try_for_each(|set| check_classes(model, set))
}
