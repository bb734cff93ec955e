//! The search for a width per block and method within a parameter budget, as NOAH does it (Zhang
//! et al., arXiv 2206.04673): a supernet whose subnets share weights, and an evolution over them.

mod evolution;
mod space;
mod supernet;

pub use evolution::{Candidate, Evolution, EvolutionConfig, evolve};
pub use space::{SearchModule, SearchSpace, Widths};
pub use supernet::Supernet;
