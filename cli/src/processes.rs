//! The processes that share a run, under torchrun, Slurm or by hand.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[cfg(feature = "distributed")]
pub use together::Processes;

#[cfg(not(feature = "distributed"))]
pub use alone::Processes;

/// The number of this process among those of its machine.
static LOCAL_RANK: AtomicUsize = AtomicUsize::new(0);
/// Whether another process prints what is the same in all of them.
static IS_QUIET: AtomicBool = AtomicBool::new(false);

/// Returns the number of this process among those of its machine, which is that of its GPU.
pub fn local_rank() -> usize {
    LOCAL_RANK.load(Ordering::Relaxed)
}

/// Returns whether another process prints what is the same in all of them.
pub fn is_quiet() -> bool {
    IS_QUIET.load(Ordering::Relaxed)
}

#[cfg(feature = "distributed")]
mod together {
    use std::ops::ControlFlow;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use anyhow::Result;
    use convpass::data::{ImageDataset, Normalization};
    use convpass::distributed::{Launch, ProcessGroup};
    use convpass::eval::{Evaluation, evaluate, evaluate_in};
    use convpass::{Backbone, PetlModel};
    use tch::{Device, Tensor};

    /// The processes that share a run; by default this one alone.
    #[derive(Debug, Default)]
    pub struct Processes {
        group: Option<ProcessGroup>,
    }

    impl Processes {
        /// Connects this process to the others, if the environment names any. `device` is asked
        /// after the place of this process is known.
        pub fn connect(device: impl FnOnce() -> Result<Device>, timeout: Duration) -> Result<Self> {
            let Some(launch) = Launch::from_env()? else { return Ok(Self::default()) };
            super::LOCAL_RANK.store(launch.local_rank, Ordering::Relaxed);
            super::IS_QUIET.store(launch.rank > 0, Ordering::Relaxed);
            let group = ProcessGroup::connect(&launch, device()?, timeout)?;
            Ok(Processes { group: Some(group) })
        }

        /// Returns the number of processes.
        pub fn count(&self) -> usize {
            self.group.as_ref().map_or(1, ProcessGroup::world_size)
        }

        /// Returns whether this process is the one that writes files.
        pub fn is_first(&self) -> bool {
            self.group.as_ref().is_none_or(|group| group.rank() == 0)
        }

        /// Returns the group for [`FitOptions`](convpass::train::FitOptions).
        pub fn group(&self) -> Option<&ProcessGroup> {
            self.group.as_ref()
        }

        /// Returns what the first process says.
        pub fn as_first(&self, says: bool) -> Result<bool> {
            let Some(group) = &self.group else { return Ok(says) };
            let mut said = Tensor::from_slice(&[i64::from(says)]);
            group.broadcast(&mut said, 0)?;
            Ok(said.f_int64_value(&[0])? == 1)
        }

        /// Evaluates `model`, each process on a part of the images; see
        /// [`evaluate`].
        pub fn evaluate<B: Backbone>(
            &self,
            model: &PetlModel<B>,
            images: &ImageDataset,
            normalization: Normalization,
            batch_size: usize,
            watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
        ) -> Result<Evaluation> {
            Ok(match &self.group {
                Some(group) => evaluate_in(group, model, images, normalization, batch_size, watch)?,
                None => evaluate(model, images, normalization, batch_size, watch)?,
            })
        }

        /// Tells the other processes why this one ends.
        pub fn leave(self, reason: &str) {
            if let Some(group) = self.group {
                group.leave(reason);
            }
        }
    }
}

#[cfg(not(feature = "distributed"))]
mod alone {
    use std::ops::ControlFlow;
    use std::time::Duration;

    use anyhow::{Result, bail};
    use convpass::data::{ImageDataset, Normalization};
    use convpass::eval::{Evaluation, evaluate};
    use convpass::{Backbone, PetlModel};
    use tch::Device;

    /// This process, which runs alone: the program was built without the feature `distributed`.
    #[derive(Debug, Default)]
    pub struct Processes;

    impl Processes {
        /// # Errors
        /// If the environment names other processes.
        pub fn connect(_: impl FnOnce() -> Result<Device>, _: Duration) -> Result<Self> {
            let size = |name: &str| std::env::var(name).ok().filter(|size| size.trim() != "1");
            let in_job = std::env::var_os("MASTER_ADDR").is_some();
            let of_slurm = || size("SLURM_NTASKS").filter(|_| in_job);
            match size("WORLD_SIZE").or_else(of_slurm) {
                Some(size) => bail!(
                    "the environment names {size} processes, but convpass was built without its \
                     feature `distributed`"
                ),
                None => Ok(Processes),
            }
        }

        /// Returns 1.
        pub fn count(&self) -> usize {
            1
        }

        /// Returns `true`.
        pub fn is_first(&self) -> bool {
            true
        }

        /// Returns `says`.
        pub fn as_first(&self, says: bool) -> Result<bool> {
            Ok(says)
        }

        /// Evaluates `model`; see [`evaluate`].
        pub fn evaluate<B: Backbone>(
            &self,
            model: &PetlModel<B>,
            images: &ImageDataset,
            normalization: Normalization,
            batch_size: usize,
            watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
        ) -> Result<Evaluation> {
            Ok(evaluate(model, images, normalization, batch_size, watch)?)
        }

        /// Nobody is told.
        pub fn leave(self, _: &str) {}
    }
}
