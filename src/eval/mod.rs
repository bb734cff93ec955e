//! Evaluation.

mod evaluate;
mod inputs;

pub(crate) use evaluate::evaluate_inputs;
pub use evaluate::{Evaluation, evaluate};
pub(crate) use inputs::Inputs;
