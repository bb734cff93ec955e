//! Batches of a dataset: normalized tensors on a device, in order or shuffled with a seed.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use super::ahead::Ahead;
use super::augment::Augment;
use super::dataset::ImageDataset;
use super::transform::Normalization;
use crate::error::{Error, Result};
use crate::ffi::send;

/// The number of batches whose images are decoded or augmented in advance.
const BATCHES_AHEAD: usize = 2;

/// The order of a pass over a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The order of the list.
    Sequential,
    /// A random order that depends only on the seed and the epoch. Epoch k is the same on any
    /// machine, whether or not earlier epochs were run.
    Shuffled {
        /// The run's seed.
        seed: i64,
        /// The epoch, counted from 0.
        epoch: i64,
    },
}

/// What happens to the last images of a pass if they do not fill a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartialBatch {
    /// They are left out of this pass, as in the published training. If the dataset has fewer
    /// images than a batch, the pass has no batch: see [`Batches::num_batches`].
    Drop,
    /// They are returned as a smaller batch.
    Keep,
}

/// The settings of a pass over a dataset.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchConfig {
    /// The number of images in a batch.
    pub batch_size: usize,
    /// What happens to a last batch that is not full.
    pub partial: PartialBatch,
    /// The order of the images.
    pub order: Order,
    /// The normalization of the pixels.
    pub normalization: Normalization,
    /// The device of the tensors.
    pub device: Device,
}

impl BatchConfig {
    fn check(&self) -> Result<()> {
        if self.batch_size == 0 {
            return Err(Error::config("batch_size", "1 or more", 0));
        }
        Ok(())
    }

    /// Returns the indices of the images of a pass over `count` images, in the order of the pass.
    ///
    /// # Errors
    /// [`Error::Config`] if the batch size is 0.
    pub(crate) fn indices(&self, count: usize) -> Result<Vec<usize>> {
        self.check()?;
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

/// An iterator over the batches of one pass: `(images, labels)`, f32 `[B, 3, H, W]` and i64 `[B]`.
///
/// Threads decode and augment images at most two batches ahead, while the caller works on an
/// earlier batch. The result does not depend on the number of threads. If an image of a batch
/// cannot be decoded, the iterator returns an error for this batch and continues with the next one.
#[derive(Debug)]
pub struct Batches<'a> {
    dataset: &'a ImageDataset,
    config: BatchConfig,
    augment: Option<Augment>,
    indices: Vec<usize>,
    /// The position in `indices` of the first image of the next batch.
    next: usize,
    /// The images from `next` on that the threads have been asked for.
    ahead: Option<Ahead<Result<Vec<u8>>>>,
}

impl<'a> Batches<'a> {
    /// Starts a pass over `dataset`.
    ///
    /// # Errors
    /// [`Error::Config`] if the batch size is 0.
    pub fn new(dataset: &'a ImageDataset, config: BatchConfig) -> Result<Self> {
        Self::over(dataset, config, None, config.indices(dataset.len())?)
    }

    /// Starts a pass over the images at `indices`, in this order, in place of the order of `config`.
    pub(crate) fn over(
        dataset: &'a ImageDataset,
        config: BatchConfig,
        augment: Option<&Augment>,
        indices: Vec<usize>,
    ) -> Result<Self> {
        augment.map_or(Ok(()), Augment::validate)?;
        config.check()?;
        let augment = augment.cloned();
        Ok(Self { dataset, config, augment, indices, next: 0, ahead: None })
    }

    /// Starts a pass over `dataset` with augmented images.
    ///
    /// The augmentation is drawn with the seed and epoch of [`Order::Shuffled`]. With
    /// [`Order::Sequential`], seed and epoch are 0.
    ///
    /// # Errors
    /// The errors of [`Batches::new`]; [`Error::Config`] if the augmentation is invalid.
    pub fn augmented(
        dataset: &'a ImageDataset,
        config: BatchConfig,
        augment: &Augment,
    ) -> Result<Self> {
        Self::over(dataset, config, Some(augment), config.indices(dataset.len())?)
    }

    /// Returns the number of batches of the whole pass. It is 0 if [`PartialBatch::Drop`] leaves no
    /// batch.
    pub fn num_batches(&self) -> usize {
        self.indices.len().div_ceil(self.config.batch_size)
    }

    /// Returns the number of images of the whole pass.
    pub fn num_images(&self) -> usize {
        self.indices.len()
    }

    /// Returns the images from `next` to `end` and their labels as tensors.
    fn batch(&mut self, end: usize) -> Result<(Tensor, Tensor)> {
        let pixels = match (self.dataset.images(), &self.augment) {
            (Some(_), None) => self.kept(end)?,
            _ => self.made_ahead(end)?,
        };
        let labels = self.indices[self.next..end].iter().map(|&index| self.dataset.labels()[index]);
        let labels: Vec<i64> = labels.collect();
        let (rows, columns) = self.dataset.image_size();
        let device = self.config.device;
        let images =
            Tensor::f_from_slice(&pixels)?.f_view([labels.len() as i64, rows, columns, 3])?;
        let images = send(&images, device)?;
        let images = self.config.normalization.normalize(&images)?;
        Ok((images, send(&Tensor::f_from_slice(&labels)?, device)?))
    }

    /// Allocates memory for the pixels of the images from `next` to `end`.
    fn room(&self, end: usize) -> Result<Vec<u8>> {
        let (rows, columns) = self.dataset.image_size();
        let mut pixels = Vec::new();
        let bytes = (end - self.next).saturating_mul((rows * columns * 3) as usize);
        match pixels.try_reserve_exact(bytes) {
            Ok(()) => Ok(pixels),
            Err(e) => Err(Error::config("batch_size", "a size that fits in memory", e)),
        }
    }

    /// Returns the pixels of images that are in memory.
    fn kept(&self, end: usize) -> Result<Vec<u8>> {
        let mut pixels = self.room(end)?;
        for &index in &self.indices[self.next..end] {
            pixels.extend_from_slice(&self.dataset.pixels(index)?);
        }
        Ok(pixels)
    }

    /// Returns the pixels from the threads, and asks them for the images of the next batches.
    fn made_ahead(&mut self, end: usize) -> Result<Vec<u8>> {
        let mut pixels = self.room(end)?;
        let ahead = match &mut self.ahead {
            Some(ahead) => ahead,
            None => self.ahead.insert(start(self.dataset, &self.config, self.augment.clone())?),
        };
        let until = BATCHES_AHEAD.saturating_mul(self.config.batch_size).saturating_add(end);
        let ordered = self.next + ahead.len();
        for &index in self.indices.iter().take(until).skip(ordered) {
            ahead.order(index);
        }
        let mut first_error = None;
        // After an error the rest of the batch is taken too, so that the next call starts at the
        // next batch.
        for image in (self.next..end).filter_map(|_| ahead.take()) {
            match image {
                Ok(image) => pixels.extend_from_slice(&image),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        first_error.map_or(Ok(pixels), Err)
    }
}

/// Starts the threads that decode and augment the images of a pass.
fn start(
    dataset: &ImageDataset,
    config: &BatchConfig,
    augment: Option<Augment>,
) -> Result<Ahead<Result<Vec<u8>>>> {
    let source = dataset.source().clone();
    let pass = match config.order {
        Order::Shuffled { seed, epoch } => (seed, epoch),
        Order::Sequential => (0, 0),
    };
    let work = move |index| source.read(index, augment.as_ref(), pass);
    Ahead::new(dataset.threads(dataset.len()), work)
}

impl Iterator for Batches<'_> {
    type Item = Result<(Tensor, Tensor)>;

    fn next(&mut self) -> Option<Self::Item> {
        let end = self.next.saturating_add(self.config.batch_size).min(self.indices.len());
        if self.next == end {
            return None;
        }
        let batch = self.batch(end);
        self.next = end;
        Some(batch)
    }

    /// Skips batches. Their images are not decoded, except those that were decoded in advance.
    fn nth(&mut self, batches: usize) -> Option<Self::Item> {
        if batches > 0 {
            let skipped = batches.saturating_mul(self.config.batch_size);
            self.next = self.next.saturating_add(skipped).min(self.indices.len());
            self.ahead = None;
        }
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
    use std::num::NonZeroUsize;

    use ndarray::Array4;
    use tch::Kind;

    use super::*;
    use crate::data::{FileList, Resize};

    /// Creates `count` images. Every pixel of image i, and its label, are i.
    fn numbered(count: usize) -> ImageDataset {
        let images = Array4::from_shape_fn((count, 2, 3, 3), |(n, ..)| n as u8);
        ImageDataset::from_arrays(images, (0..count as i64).collect(), count as i64).unwrap()
    }

    fn config(batch_size: usize, partial: PartialBatch, order: Order) -> BatchConfig {
        let normalization = Normalization::Unit;
        BatchConfig { batch_size, partial, order, normalization, device: Device::Cpu }
    }

    /// Returns the labels of a pass, and checks that each image has the pixels of its label.
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
        // The values are fixed here so that a new version of a dependency cannot change runs
        // unnoticed.
        assert_eq!(first[..8], [38, 28, 11, 35, 29, 46, 3, 26]);
    }

    /// Creates the images of [`numbered`] as PNG files that are decoded in each pass.
    fn streamed(count: usize) -> (tempfile::TempDir, ImageDataset) {
        let folder = tempfile::tempdir().unwrap();
        let mut text = String::new();
        for i in 0..count {
            let image = image::RgbImage::from_pixel(3, 2, image::Rgb([i as u8; 3]));
            image.save(folder.path().join(format!("{i}.png"))).unwrap();
            text += &format!("{i}.png {i}\n");
        }
        let file = folder.path().join("list.txt");
        std::fs::write(&file, text).unwrap();
        let list = FileList::read(folder.path(), file, None).unwrap();
        let data = ImageDataset::stream(&list, Resize::bicubic((2, 3)).unwrap());
        (folder, data)
    }

    #[test]
    fn a_streamed_pass_is_the_one_over_memory() {
        let (_folder, data) = streamed(11);
        let kept = numbered(11);
        for threads in [1, 2, 300] {
            let data = data.clone().with_threads(NonZeroUsize::new(threads).unwrap());
            for batch_size in [1, 4, 11, 20] {
                for partial in [PartialBatch::Keep, PartialBatch::Drop] {
                    for order in [Order::Sequential, Order::Shuffled { seed: 3, epoch: 1 }] {
                        let config = config(batch_size, partial, order);
                        assert_eq!(pass(&data, config), pass(&kept, config));
                    }
                }
            }
        }
    }

    #[test]
    fn no_more_than_two_batches_are_ahead() {
        let (_folder, data) = streamed(40);
        let mut batches =
            Batches::new(&data, config(4, PartialBatch::Keep, Order::Sequential)).unwrap();
        let mut alive = Vec::new();
        assert!(batches.ahead.is_none(), "nothing is decoded before the first batch is asked for");
        while batches.next().is_some() {
            alive.push(batches.ahead.as_ref().unwrap().len());
        }
        assert_eq!(alive, [8, 8, 8, 8, 8, 8, 8, 8, 4, 0]);
    }

    #[test]
    fn a_bad_image_is_an_error_in_its_place() {
        let (folder, data) = streamed(12);
        for bad in ["5.png", "4.png"] {
            std::fs::write(folder.path().join(bad), b"no image").unwrap();
        }
        let config = config(3, PartialBatch::Keep, Order::Sequential);
        let batches: Vec<_> = Batches::new(&data, config).unwrap().collect();
        let good: Vec<_> = batches.iter().map(Result::is_ok).collect();
        assert_eq!(good, [true, false, true, true]);
        let Err(Error::Image { path, list: Some((_, 5)), .. }) = &batches[1] else { panic!() };
        assert!(path.ends_with("4.png"));
    }

    #[test]
    fn a_pass_can_be_taken_up_and_left_at_any_batch() {
        let (_folder, data) = streamed(11);
        let augment = Augment { flip: 0.5, ..Augment::few_shot() };
        for partial in [PartialBatch::Keep, PartialBatch::Drop] {
            let config = config(3, partial, Order::Shuffled { seed: 1, epoch: 2 });
            let pass = || Batches::augmented(&data, config, &augment).unwrap();
            let all: Vec<_> = pass().map(Result::unwrap).collect();
            for from in 0..6 {
                // `later` skips at once, `again` after a first batch, when others are decoded
                // ahead.
                let later: Vec<_> = pass().skip(from).map(Result::unwrap).collect();
                let mut batches = pass();
                batches.next();
                let again = batches.nth(from).map(Result::unwrap);
                assert_eq!(later.len(), all.len().saturating_sub(from));
                for ((a, b), (c, d)) in later.iter().zip(all.iter().skip(from)) {
                    assert!(a.equal(c) && b.equal(d));
                }
                assert_eq!(again.is_some(), from + 1 < all.len());
                if let Some((images, labels)) = again {
                    assert!(images.equal(&all[from + 1].0) && labels.equal(&all[from + 1].1));
                    assert_eq!(batches.len(), all.len() - from - 2);
                }
            }
        }
    }

    #[test]
    fn augmentation_depends_on_seed_epoch_and_image_alone() {
        let noise = |(n, y, x, c)| (n * 53 + y * 91 + x * 57 + c * 33) as u8;
        let images = Array4::from_shape_fn((9, 8, 8, 3), noise);
        let data = ImageDataset::from_arrays(images, (0..9).collect(), 9).unwrap();
        let by_label = |data: &ImageDataset, batch_size, seed, epoch| {
            let order = Order::Shuffled { seed, epoch };
            let config = config(batch_size, PartialBatch::Keep, order);
            let batches = Batches::augmented(data, config, &Augment::few_shot()).unwrap();
            let mut all = vec![None; 9];
            for (images, labels) in batches.map(Result::unwrap) {
                for (at, label) in Vec::<i64>::try_from(&labels).unwrap().into_iter().enumerate() {
                    let image = images.get(at as i64).contiguous().view([-1]);
                    all[label as usize] = Some(Vec::<f32>::try_from(image).unwrap());
                }
            }
            all
        };
        let first = by_label(&data, 2, 5, 1);
        let one = data.clone().with_threads(NonZeroUsize::MIN);
        assert_eq!(first, by_label(&one, 9, 5, 1));
        assert_ne!(first, by_label(&data, 2, 5, 2));
        assert_ne!(first, by_label(&data, 2, 6, 1));
        let bad = Augment { flip: 2.0, ..Augment::default() };
        let config = config(2, PartialBatch::Keep, Order::Sequential);
        assert!(matches!(Batches::augmented(&data, config, &bad), Err(Error::Config { .. })));
    }

    #[test]
    fn the_dropped_images_are_the_last_of_the_shuffled_order() {
        let data = numbered(10);
        let order = Order::Shuffled { seed: 1, epoch: 2 };
        let all = pass(&data, config(4, PartialBatch::Keep, order));
        assert_eq!(pass(&data, config(4, PartialBatch::Drop, order)), all[..8]);
    }
}
