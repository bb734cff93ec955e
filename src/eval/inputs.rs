//! What a step over a dataset reads: images, or features computed once.

use std::ops::ControlFlow;

use tch::Tensor;

use crate::backbone::Backbone;
use crate::data::{BatchConfig, Batches, ImageDataset, Order, PartialBatch};
use crate::error::Result;
use crate::model::PetlModel;

/// The inputs of a run. Where nothing in front of the head is trained or drawn, each image's
/// features are computed once and stand for it.
pub(crate) enum Inputs<'a> {
    Images(&'a ImageDataset),
    Features { features: Tensor, labels: Tensor },
}

/// One batch after the other: images or features, and labels.
type BatchIter<'a> = Box<dyn Iterator<Item = Result<(Tensor, Tensor)>> + 'a>;

impl<'a> Inputs<'a> {
    /// `config` says how images are normalized and how many are run at a time. `watch` is told
    /// how many images are done, of how many; `None` if it ends the work.
    pub(crate) fn new<B: Backbone>(
        model: &PetlModel<B>,
        dataset: &'a ImageDataset,
        config: BatchConfig,
        watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Self>> {
        if !model.has_fixed_features() {
            return Ok(Some(Inputs::Images(dataset)));
        }
        let config =
            BatchConfig { partial: PartialBatch::Keep, order: Order::Sequential, ..config };
        let (mut features, mut labels, mut done) = (Vec::new(), Vec::new(), 0);
        for batch in Batches::new(dataset, config)? {
            let (images, batch_labels) = batch?;
            features.push(tch::no_grad(|| model.features(&images, false))?);
            done += batch_labels.numel();
            labels.push(batch_labels);
            if watch(done, dataset.len()).is_break() {
                return Ok(None);
            }
        }
        Ok(Some(Inputs::Features {
            features: Tensor::f_cat(&features, 0)?,
            labels: Tensor::f_cat(&labels, 0)?,
        }))
    }

    /// Number of images.
    pub(crate) fn len(&self) -> usize {
        match self {
            Inputs::Images(dataset) => dataset.len(),
            Inputs::Features { labels, .. } => labels.numel(),
        }
    }

    /// One pass, in the order and the batches that `config` says.
    pub(crate) fn batches(&self, config: BatchConfig) -> Result<BatchIter<'_>> {
        let (features, labels) = match self {
            Inputs::Images(dataset) => return Ok(Box::new(Batches::new(dataset, config)?)),
            Inputs::Features { features, labels } => (features, labels),
        };
        let indices = config.indices(labels.numel())?;
        let chunks: Vec<Vec<i64>> = indices
            .chunks(config.batch_size)
            .map(|chunk| chunk.iter().map(|&index| index as i64).collect())
            .collect();
        Ok(Box::new(chunks.into_iter().map(move |chunk| {
            let index = Tensor::f_from_slice(&chunk)?.f_to_device(features.device())?;
            Ok((features.f_index_select(0, &index)?, labels.f_index_select(0, &index)?))
        })))
    }

    /// Logits of a batch that [`Inputs::batches`] gave.
    pub(crate) fn logits<B: Backbone>(
        &self,
        model: &PetlModel<B>,
        batch: &Tensor,
        train: bool,
    ) -> Result<Tensor> {
        match self {
            Inputs::Images(_) => model.forward(batch, train),
            Inputs::Features { .. } => model.classify(batch),
        }
    }
}
