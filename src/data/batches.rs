//! A dataset as batches of normalized tensors on a device, in order or shuffled from a seed.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use super::dataset::ImageDataset;
use super::transform::Normalization;
use crate::error::{Error, Result};

/// The order of a pass over a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As the list has it.
    Sequential,
    /// Shuffled. Seed and epoch alone decide, so that epoch k is the same whether or not epochs
    /// before it were run, on any machine.
    Shuffled {
        /// The run's seed.
        seed: i64,
        /// The epoch, from 0.
        epoch: i64,
    },
}

/// What becomes of the last images where they fill no batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartialBatch {
    /// Left out of this pass, as in the published training. No batch at all is left where there are
    /// fewer images than a batch holds: see [`Batches::num_batches`].
    Drop,
    /// Handed out as a smaller batch.
    Keep,
}

/// How batches are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchConfig {
    /// Images a batch.
    pub batch_size: usize,
    /// What happens to a last batch that is not full.
    pub partial: PartialBatch,
    /// The order of the images.
    pub order: Order,
    /// What the pixels become.
    pub normalization: Normalization,
    /// Where the tensors are.
    pub device: Device,
}

impl BatchConfig {
    /// Which of `count` images a pass hands out, in its order.
    ///
    /// # Errors
    /// [`Error::Config`] for a batch size of 0.
    pub(crate) fn indices(&self, count: usize) -> Result<Vec<usize>> {
        if self.batch_size == 0 {
            return Err(Error::config("batch_size", "1 or more", 0));
        }
        let mut indices: Vec<usize> = (0..count).collect();
        if let Order::Shuffled { seed, epoch } = self.order {
            let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
            rng.set_stream(epoch as u64);
            indices.shuffle(&mut rng);
        }
        if self.partial == PartialBatch::Drop {
            indices.truncate(count / self.batch_size * self.batch_size);
        }
        Ok(indices)
    }
}

/// One pass over a dataset: `(images, labels)`, f32 `[B, 3, H, W]` and i64 `[B]`.
#[derive(Debug)]
pub struct Batches<'a> {
    dataset: &'a ImageDataset,
    config: BatchConfig,
    indices: Vec<usize>,
    next: usize,
}

impl<'a> Batches<'a> {
    /// A pass over `dataset`.
    ///
    /// # Errors
    /// [`Error::Config`] for a batch size of 0.
    pub fn new(dataset: &'a ImageDataset, config: BatchConfig) -> Result<Self> {
        let indices = config.indices(dataset.len())?;
        Ok(Self { dataset, config, indices, next: 0 })
    }

    /// The number of batches of the whole pass; 0 where dropping the partial one leaves none.
    pub fn num_batches(&self) -> usize {
        self.indices.len().div_ceil(self.config.batch_size)
    }

    /// The number of images of the whole pass.
    pub fn num_images(&self) -> usize {
        self.indices.len()
    }

    fn batch(&self, indices: &[usize]) -> Result<(Tensor, Tensor)> {
        let (rows, columns) = self.dataset.image_size();
        let mut pixels = Vec::with_capacity(indices.len() * (rows * columns * 3) as usize);
        let mut labels = Vec::with_capacity(indices.len());
        for &index in indices {
            if let Some(image) = self.dataset.pixels(index) {
                pixels.extend_from_slice(image);
                labels.push(self.dataset.labels()[index]);
            }
        }
        let device = self.config.device;
        let images = Tensor::f_from_slice(&pixels)?
            .f_view([labels.len() as i64, rows, columns, 3])?
            .f_to_device(device)?;
        let images = self.config.normalization.normalize(&images)?;
        Ok((images, Tensor::f_from_slice(&labels)?.f_to_device(device)?))
    }
}

impl Iterator for Batches<'_> {
    type Item = Result<(Tensor, Tensor)>;

    fn next(&mut self) -> Option<Self::Item> {
        let end = self.next.saturating_add(self.config.batch_size).min(self.indices.len());
        let indices = self.indices.get(self.next..end).filter(|indices| !indices.is_empty())?;
        let batch = self.batch(indices);
        self.next = end;
        Some(batch)
    }

    /// Leaves `n` batches out, unmade.
    fn nth(&mut self, n: usize) -> Option<Self::Item> {
        let skipped = n.saturating_mul(self.config.batch_size);
        self.next = self.next.saturating_add(skipped).min(self.indices.len());
        self.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = (self.indices.len() - self.next).div_ceil(self.config.batch_size);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Batches<'_> {}

#[cfg(test)]
mod tests {
    use ndarray::Array4;
    use tch::Kind;

    use super::*;

    /// `count` images; every pixel of image i and its label are i.
    fn numbered(count: usize) -> ImageDataset {
        let images = Array4::from_shape_fn((count, 2, 3, 3), |(n, ..)| n as u8);
        ImageDataset::from_arrays(images, (0..count as i64).collect(), count as i64).unwrap()
    }

    fn config(batch_size: usize, partial: PartialBatch, order: Order) -> BatchConfig {
        let normalization = Normalization::Unit;
        BatchConfig { batch_size, partial, order, normalization, device: Device::Cpu }
    }

    /// The labels of a pass, after a check that each image goes with its label.
    fn pass(dataset: &ImageDataset, config: BatchConfig) -> Vec<i64> {
        let batches = Batches::new(dataset, config).unwrap();
        let mut seen = Vec::new();
        for batch in batches {
            let (images, labels) = batch.unwrap();
            assert_eq!((images.kind(), labels.kind()), (Kind::Float, Kind::Int64));
            assert_eq!(images.size(), [labels.size()[0], 3, 2, 3]);
            for (image, label) in Vec::<i64>::try_from(&labels).unwrap().into_iter().enumerate() {
                let expected =
                    Tensor::full([3, 2, 3], label as f64 / 255.0, (Kind::Float, Device::Cpu));
                assert!(images.get(image as i64).allclose(&expected, 1e-6, 1e-7, false));
                seen.push(label);
            }
        }
        seen
    }

    #[test]
    fn in_order_with_the_partial_batch_kept_or_dropped() {
        let data = numbered(10);
        let keep = config(4, PartialBatch::Keep, Order::Sequential);
        let drop = config(4, PartialBatch::Drop, Order::Sequential);
        assert_eq!(pass(&data, keep), (0..10).collect::<Vec<_>>());
        assert_eq!(pass(&data, drop), (0..8).collect::<Vec<_>>());
        let mut batches = Batches::new(&data, keep).unwrap();
        assert_eq!((batches.num_batches(), batches.num_images(), batches.len()), (3, 10, 3));
        batches.next();
        assert_eq!((batches.num_batches(), batches.len()), (3, 2));
        assert_eq!(Batches::new(&data, drop).unwrap().num_batches(), 2);
        let none = config(11, PartialBatch::Drop, Order::Sequential);
        assert_eq!(Batches::new(&data, none).unwrap().num_batches(), 0);
        assert!(pass(&data, none).is_empty());
        let huge = config(usize::MAX, PartialBatch::Keep, Order::Sequential);
        assert_eq!(pass(&data, huge).len(), 10);
        let zero = Batches::new(&data, config(0, PartialBatch::Keep, Order::Sequential));
        assert!(matches!(zero, Err(Error::Config { .. })));
    }

    #[test]
    fn shuffling_depends_on_seed_and_epoch_alone() {
        let data = numbered(50);
        let order = |seed, epoch| {
            pass(&data, config(8, PartialBatch::Keep, Order::Shuffled { seed, epoch }))
        };
        let first = order(42, 0);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        assert_eq!(first, order(42, 0));
        assert_ne!(first, order(42, 1));
        assert_ne!(first, order(43, 0));
        assert_ne!(order(42, 1), order(43, 0));
        // Written down, so that a new version of a dependency cannot change runs unnoticed.
        assert_eq!(first[..8], [38, 28, 11, 35, 29, 46, 3, 26]);
    }

    #[test]
    fn the_dropped_images_are_the_last_of_the_shuffled_order() {
        let data = numbered(10);
        let order = Order::Shuffled { seed: 1, epoch: 2 };
        let all = pass(&data, config(4, PartialBatch::Keep, order));
        assert_eq!(pass(&data, config(4, PartialBatch::Drop, order)), all[..8]);
    }
}
