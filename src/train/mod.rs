//! Training: the published schedule and optimizer, a loop that can be watched and stopped, and
//! the record of a run.

mod adamw;
mod fit;
mod plan;
mod progress;
mod record;
mod schedule;

pub use adamw::AdamW;
pub use fit::{EpochReport, Fit, Observer, Selection, Silent, StepReport, TrainConfig, fit};
pub(crate) use fit::{check, epoch};
pub use plan::{
    Plan, PlanMethod, PlannedRun, RunSettings, Setting, Trial, best_trial, published_choice,
};
pub use progress::Progress;
pub use record::{BestOnTest, RunRecord, peak_rss_mb};
pub use schedule::{CosineSchedule, Stepped};
