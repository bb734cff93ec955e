//! Which images of a run each process computes, step by step and pass by pass.

use std::ops::Range;

use super::config::TrainConfig;
use crate::error::{Error, Result};
use crate::eval::Team;
use crate::nn::Rows;

/// Divides the images of an epoch into steps, batches and passes, and each pass among the processes
/// of a run.
///
/// The order of the images, the batches and the passes are the same for any number of processes; a
/// process computes consecutive rows of each pass.
#[derive(Clone, Debug)]
pub(super) struct Sampler<'a> {
    pub(super) team: Team<'a>,
    /// Images of a batch, in all processes together.
    batch: usize,
    /// Images of a pass, in all processes together; the last one of a batch may have fewer.
    pass: usize,
    /// Batches of a step; the last step of an epoch may have fewer.
    accumulate: usize,
}

/// The part of a pass that one process computes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct OwnPart {
    /// The images of the pass among those of the batch that the process has read.
    pub(super) within: Range<usize>,
    /// The rows of the pass; `None` if the process computes the whole pass.
    pub(super) rows: Option<Rows>,
}

impl<'a> Sampler<'a> {
    /// # Errors
    /// [`Error::Config`] if a pass has fewer images than there are processes.
    pub(super) fn new(config: &TrainConfig, team: Team<'a>) -> Result<Self> {
        let (batch, micro) = (config.batch_size, config.micro_batch_size);
        let pass = micro.map_or(batch, |micro| micro.min(batch)).max(1);
        let field = if pass < batch { "micro_batch_size" } else { "batch_size" };
        if pass < team.size() {
            let expected = format!("at least {}, the number of processes", team.size());
            return Err(Error::config(field, expected, pass).in_config("TrainConfig"));
        }
        Ok(Sampler { team, batch, pass, accumulate: config.accumulate })
    }

    /// Returns the number of steps of an epoch of `images` images.
    pub(super) fn steps(&self, images: usize) -> usize {
        (images / self.batch).div_ceil(self.accumulate)
    }

    /// Returns the images of `step`, as positions in the order of an epoch of `images` images.
    pub(super) fn step(&self, step: usize, images: usize) -> Range<usize> {
        let batches = images / self.batch;
        let until = |step: usize| step.saturating_mul(self.accumulate).min(batches) * self.batch;
        until(step)..until(step + 1)
    }

    /// Returns the images that this process reads of an epoch with the `order` of all images in full
    /// batches.
    pub(super) fn own(&self, order: &[usize]) -> Vec<usize> {
        if self.team.is_alone() {
            return order.to_vec();
        }
        let parts = self.passes();
        let of_batch = |batch: &[usize]| -> Vec<usize> {
            let own = parts.iter().flat_map(|(start, length)| {
                let share = self.team.share(*length);
                batch[start + share.start..start + share.end].to_vec()
            });
            own.collect()
        };
        order.chunks_exact(self.batch).flat_map(of_batch).collect()
    }

    /// Returns how many images of a batch this process reads, at least 1.
    pub(super) fn own_batch(&self) -> usize {
        self.passes().iter().map(|(_, length)| self.team.share(*length).len()).sum()
    }

    /// Returns the part of this process of each pass over a batch.
    pub(super) fn parts(&self) -> Vec<OwnPart> {
        let mut read = 0;
        let part = |(_, length): (usize, usize)| {
            let share = self.team.share(length);
            let within = read..read + share.len();
            read = within.end;
            let (first, own, all) = (share.start as i64, share.len() as i64, length as i64);
            let rows = (!self.team.is_alone()).then_some(Rows { first, own, all });
            OwnPart { within, rows }
        };
        self.passes().into_iter().map(part).collect()
    }

    /// Returns start and length of each pass over a batch.
    fn passes(&self) -> Vec<(usize, usize)> {
        let starts = (0..self.batch).step_by(self.pass);
        starts.map(|start| (start, self.pass.min(self.batch - start))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone(batch_size: usize, micro: Option<usize>, accumulate: usize) -> Sampler<'static> {
        let config = TrainConfig {
            batch_size,
            micro_batch_size: micro,
            accumulate,
            ..TrainConfig::default()
        };
        Sampler::new(&config, Team::default()).unwrap()
    }

    #[test]
    fn one_process_computes_everything() {
        let sampler = alone(5, Some(2), 1);
        let order: Vec<usize> = (0..10).rev().collect();
        assert_eq!(sampler.own(&order), order);
        assert_eq!(sampler.own_batch(), 5);
        let within: Vec<_> = sampler.parts().into_iter().map(|part| part.within).collect();
        assert_eq!(within, [0..2, 2..4, 4..5]);
        assert!(sampler.parts().iter().all(|part| part.rows.is_none()));
        // A micro-batch that is larger than the batch is the batch.
        assert_eq!(alone(5, Some(9), 1).parts().len(), 1);
    }

    #[test]
    fn the_last_step_of_an_epoch_may_have_fewer_batches() {
        let sampler = alone(3, None, 4);
        // 19 images are six batches and one image that is left out.
        assert_eq!(sampler.steps(19), 2);
        assert_eq!((sampler.step(0, 19), sampler.step(1, 19)), (0..12, 12..18));
        assert_eq!(alone(3, None, 1).steps(19), 6);
        assert_eq!(alone(3, None, usize::MAX).step(0, 19), 0..18);
    }
}
