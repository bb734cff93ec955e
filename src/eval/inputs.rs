//! What a step over a dataset reads: images, or features computed once.

use std::ops::ControlFlow;

use tch::Tensor;

use super::prefix_cache::{Prefix, PrefixCache};
use crate::backbone::Backbone;
use crate::data::{Augment, BatchConfig, Batches, ImageDataset, Order, PartialBatch};
use crate::error::Result;
use crate::model::PetlModel;

/// The inputs of a run. Where images are not augmented and nothing in front of the head is trained or drawn, each image's
/// features are computed once and stand for it; in front of a block, its tokens, if they are kept.
pub(crate) enum Inputs<'a> {
    /// Changed by the augmentation at each pass, if there is one.
    Images(&'a ImageDataset, Option<&'a Augment>),
    Tokens {
        prefix: Prefix,
        labels: Tensor,
    },
    Features {
        features: Tensor,
        labels: Tensor,
    },
}

/// One batch after the other: images, tokens or features, and labels.
type BatchIter<'a> = Box<dyn Iterator<Item = Result<(Tensor, Tensor)>> + 'a>;

impl<'a> Inputs<'a> {
    /// `config` says how images are normalized and how many are run at a time. `watch` is told
    /// how many images are done, of how many; `None` if it ends the work.
    pub(crate) fn new<B: Backbone>(
        model: &PetlModel<B>,
        dataset: &'a ImageDataset,
        config: BatchConfig,
        augment: Option<&'a Augment>,
        cache: Option<&PrefixCache>,
        watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Self>> {
        if augment.is_some() {
            return Ok(Some(Inputs::Images(dataset, augment)));
        }
        if !model.has_fixed_features() {
            let Some(cache) = cache.filter(|_| model.frozen_blocks().is_some()) else {
                return Ok(Some(Inputs::Images(dataset, None)));
            };
            let labels = Tensor::f_from_slice(dataset.labels())?.f_to_device(config.device)?;
            let prefix = Prefix::new(model, dataset, config, cache, watch)?;
            return Ok(prefix.map(|prefix| Inputs::Tokens { prefix, labels }));
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
            Inputs::Images(dataset, _) => dataset.len(),
            Inputs::Tokens { labels, .. } | Inputs::Features { labels, .. } => labels.numel(),
        }
    }

    /// One pass, in the order and the batches that `config` says.
    pub(crate) fn batches(&self, config: BatchConfig) -> Result<BatchIter<'_>> {
        type Select<'a> = Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>;
        let (labels, select): (_, Select) = match self {
            Inputs::Images(dataset, None) => return Ok(Box::new(Batches::new(dataset, config)?)),
            Inputs::Images(dataset, Some(augment)) => {
                return Ok(Box::new(Batches::augmented(dataset, config, augment)?));
            }
            Inputs::Tokens { prefix, labels } => {
                (labels, Box::new(|index| prefix.select(index, labels.device())))
            }
            Inputs::Features { features, labels } => {
                (labels, Box::new(|index| Ok(features.f_index_select(0, index)?)))
            }
        };
        let indices = config.indices(labels.numel())?;
        let chunks: Vec<Vec<i64>> = indices
            .chunks(config.batch_size)
            .map(|chunk| chunk.iter().map(|&index| index as i64).collect())
            .collect();
        Ok(Box::new(chunks.into_iter().map(move |chunk| {
            let index = Tensor::f_from_slice(&chunk)?.f_to_device(labels.device())?;
            Ok((select(&index)?, labels.f_index_select(0, &index)?))
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
            Inputs::Images(..) => model.forward(batch, train),
            Inputs::Tokens { prefix, .. } => model.forward_from(prefix.stream(batch), train),
            Inputs::Features { .. } => model.classify(batch),
        }
    }

    /// Adds the gradients of a batch's `loss` to the trainables'; logits and loss, detached.
    #[cfg(feature = "train")]
    pub(crate) fn backward<B: Backbone>(
        &self,
        model: &PetlModel<B>,
        batch: &Tensor,
        recompute: bool,
        loss: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        match self {
            Inputs::Images(..) if recompute => return model.backward_recomputed(batch, loss),
            Inputs::Tokens { prefix, .. } if recompute => {
                return model.backward_recomputed_from(prefix.stream(batch), loss);
            }
            _ => {}
        }
        let logits = self.logits(model, batch, true)?;
        let loss = loss(&logits)?;
        loss.f_backward()?;
        Ok((logits.f_detach()?, loss.f_detach()?))
    }
}
