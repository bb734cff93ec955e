//! The search for a width per block and method within a parameter budget, as NOAH does it (Zhang
//! et al., arXiv 2206.04673): a supernet whose subnets share weights, and an evolution over them.

mod command;
mod evolution;
mod space;
mod supernet;
#[cfg(test)]
mod tests;

pub use command::{SearchArgs, run};
use evolution::{Evolution, EvolutionConfig, evolve};
use space::{SearchModule, SearchSpace, Widths};
use supernet::Supernet;
