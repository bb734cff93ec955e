//! Evaluation.

mod evaluate;
mod inputs;
mod prefix_cache;
mod subset;

#[cfg(feature = "train")]
pub(crate) use evaluate::number;
pub use evaluate::{Evaluation, evaluate};
pub(crate) use evaluate::{check_classes, cross_entropy, evaluate_inputs};
pub(crate) use inputs::Inputs;
pub use prefix_cache::PrefixCache;
pub use subset::{ClassSubset, evaluate_logits};
