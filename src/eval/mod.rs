//! Evaluation of models on datasets.

mod evaluate;
#[cfg(feature = "train")]
mod inputs;
mod loss;
mod metrics;
#[cfg(feature = "train")]
mod prefix_cache;
mod subset;
#[cfg(feature = "train")]
mod team;
mod vote;

pub use evaluate::evaluate;
#[cfg(all(feature = "distributed", feature = "train"))]
pub use evaluate::evaluate_in;
#[cfg(feature = "train")]
pub(crate) use evaluate::{check_classes, evaluate_inputs};
#[cfg(feature = "train")]
pub(crate) use inputs::Inputs;
#[cfg(feature = "train")]
pub(crate) use loss::{cross_entropy_sum, cross_entropy_with};
pub use metrics::{Evaluation, Scores};
#[cfg(feature = "train")]
pub use prefix_cache::PrefixCache;
pub use subset::{ClassSubset, evaluate_logits};
#[cfg(feature = "train")]
pub(crate) use team::Team;
pub use vote::{predictions, vote};
