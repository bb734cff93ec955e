//! The processes that share the work of a run.

use std::marker::PhantomData;
use std::ops::Range;

use tch::Tensor;

#[cfg(feature = "distributed")]
use crate::distributed::ProcessGroup;
use crate::error::Result;

/// The processes that share the work of a run; by default this process alone. Without the feature
/// `distributed` it always is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Team<'a> {
    #[cfg(feature = "distributed")]
    group: Option<&'a ProcessGroup>,
    _group: PhantomData<&'a ()>,
}

#[cfg(feature = "distributed")]
impl<'a> Team<'a> {
    pub(crate) fn new(group: Option<&'a ProcessGroup>) -> Self {
        Team { group, _group: PhantomData }
    }

    pub(crate) fn size(self) -> usize {
        self.group.map_or(1, ProcessGroup::world_size)
    }

    pub(crate) fn rank(self) -> usize {
        self.group.map_or(0, ProcessGroup::rank)
    }

    /// Replaces `tensor` by its sum over the processes.
    pub(crate) fn sum(self, tensor: &mut Tensor) -> Result<()> {
        self.group.map_or(Ok(()), |group| group.all_reduce(tensor))
    }

    /// Replaces `tensor` by that of rank 0.
    pub(crate) fn broadcast(self, tensor: &mut Tensor) -> Result<()> {
        self.group.map_or(Ok(()), |group| group.broadcast(tensor, 0))
    }

    /// Returns the numbers of every process.
    pub(crate) fn gather(self, numbers: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        match self.group {
            Some(group) => group.gather(&numbers),
            None => Ok(vec![numbers]),
        }
    }

    /// Compares the `value` of every process with that of rank 0. `difference` returns the field in
    /// which two values differ, with what rank 0 and the other have there.
    pub(crate) fn compare(
        self,
        value: &str,
        difference: impl Fn(&str, &str) -> Option<(String, String, String)>,
    ) -> Result<()> {
        self.group.map_or(Ok(()), |group| group.compare(value, difference))
    }
}

#[cfg(not(feature = "distributed"))]
impl Team<'_> {
    pub(crate) fn size(self) -> usize {
        1
    }

    pub(crate) fn rank(self) -> usize {
        0
    }

    pub(crate) fn sum(self, _tensor: &mut Tensor) -> Result<()> {
        Ok(())
    }

    pub(crate) fn broadcast(self, _tensor: &mut Tensor) -> Result<()> {
        Ok(())
    }

    pub(crate) fn gather(self, numbers: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        Ok(vec![numbers])
    }

    pub(crate) fn compare(
        self,
        _value: &str,
        _difference: impl Fn(&str, &str) -> Option<(String, String, String)>,
    ) -> Result<()> {
        Ok(())
    }
}

impl Team<'_> {
    /// Returns whether this process works alone.
    pub(crate) fn is_alone(self) -> bool {
        self.size() == 1
    }

    /// Returns whether this is rank 0, the one that writes files.
    pub(crate) fn is_first(self) -> bool {
        self.rank() == 0
    }

    /// Returns which of `count` things in a row this process works on. The first ranks have one more
    /// if `count` is not a multiple of the number of processes.
    pub(crate) fn share(self, count: usize) -> Range<usize> {
        share(self.rank(), self.size(), count)
    }

    /// Returns whether `said` is true in any process.
    pub(crate) fn any(self, said: bool) -> Result<bool> {
        if self.is_alone() {
            return Ok(said);
        }
        let mut sum = Tensor::f_from_slice(&[f32::from(u8::from(said))])?;
        self.sum(&mut sum)?;
        Ok(sum.f_double_value(&[0])? > 0.0)
    }
}

fn share(rank: usize, size: usize, count: usize) -> Range<usize> {
    let (each, more) = (count / size, count % size);
    let start = rank * each + rank.min(more);
    start..start + each + usize::from(rank < more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once() {
        for size in 1..6 {
            for count in 0..20 {
                let shares: Vec<_> = (0..size).map(|rank| share(rank, size, count)).collect();
                let all: Vec<usize> = shares.iter().cloned().flatten().collect();
                assert_eq!(all, (0..count).collect::<Vec<_>>());
                let lengths = shares.iter().map(ExactSizeIterator::len);
                assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
            }
        }
    }

    #[test]
    fn a_process_alone_has_everything() {
        let team = Team::default();
        assert!(team.is_alone() && team.is_first() && team.any(true).unwrap());
        assert_eq!(team.share(7), 0..7);
    }
}
