//! Training: a loop that can be observed, stopped and resumed, the published schedule and optimizer,
//! logs, and the record of a run.

mod adamw;
mod batch_sum;
mod captured;
mod config;
mod fit;
mod gradients;
mod identity;
mod json_log;
mod loss;
mod observer;
mod optimizer;
mod pace;
#[cfg(feature = "progress")]
mod progress;
mod record;
mod run;
mod sampler;
mod schedule;
mod shared_state;
mod state;
#[cfg(feature = "tensorboard")]
mod tensorboard;
mod unread;

pub use adamw::AdamW;
pub use config::{Selection, TrainConfig};
pub use fit::{Fit, FitOptions, fit, fit_resumable, fit_with};
pub use json_log::JsonLog;
pub use loss::ClassWeights;
pub use observer::{EpochReport, Observer, RunStart, Silent, StepReport};
pub use optimizer::{Optimizer, Schedule, clip_grad_norm};
#[cfg(feature = "progress")]
pub use progress::Progress;
pub use record::{BestOnTest, CrossValidation, ImagesRecord, RunRecord, TriedRates, peak_rss_mb};
pub use schedule::{CosineSchedule, Stepped};
pub use state::RunCheckpoint;
#[cfg(feature = "tensorboard")]
pub use tensorboard::TensorBoard;
