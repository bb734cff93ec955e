//! Several processes that work on one run, on one or many machines, connected by torch.distributed.
//!
//! The processes are started by torchrun, by Slurm or by hand; [`Launch`] reads what those set in
//! the environment, and [`ProcessGroup`] connects the processes.
//! [`fit_with`](crate::train::fit_with) and [`evaluate_in`](crate::eval::evaluate_in) accept a group,
//! and a training loop of your own can call its operations. docs/scaling.md has the commands.

mod group;
mod launch;
mod peers;

pub use group::ProcessGroup;
pub use launch::Launch;
