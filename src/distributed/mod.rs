//! Several processes that work on one run, on one or many machines, connected by torch.distributed.
//!
//! The processes are started by torchrun, by Slurm or by hand; [`Launch`] reads what those set in
//! the environment, and [`ProcessGroup`] connects the processes.
//! A training loop calls the operations of the group.

mod group;
mod launch;
mod peers;

pub use group::ProcessGroup;
pub use launch::Launch;
