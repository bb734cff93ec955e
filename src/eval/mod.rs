//! Evaluation of models on datasets.

mod evaluate;
#[cfg(feature = "train")]
mod inputs;
#[cfg(feature = "train")]
mod prefix_cache;
mod subset;

pub use evaluate::{Evaluation, evaluate};
#[cfg(feature = "train")]
pub(crate) use evaluate::{check_classes, cross_entropy, evaluate_inputs, number};
#[cfg(feature = "train")]
pub(crate) use inputs::Inputs;
#[cfg(feature = "train")]
pub use prefix_cache::PrefixCache;
pub use subset::{ClassSubset, evaluate_logits};
