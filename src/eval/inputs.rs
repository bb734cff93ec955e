//! The inputs of a pass over a dataset: images, or tokens or features that are computed once.

use std::ops::ControlFlow;

use tch::Tensor;

use super::prefix_cache::{Prefix, PrefixCache};
use crate::backbone::Backbone;
use crate::data::{Augment, BatchConfig, Batches, ImageDataset, Order, PartialBatch};
use crate::error::Result;
use crate::model::PetlModel;

/// The inputs of a run.
///
/// Without augmentation, the frozen part at the beginning of a model needs to run only once for
/// each image. If everything in front of the head is frozen and deterministic, the features replace
/// the images. If only the first blocks are, and a [`PrefixCache`] is given, the tokens behind
/// these blocks replace the images.
pub(crate) enum Inputs<'a> {
    /// Images. Each pass applies the augmentation, if there is one.
    Images(&'a ImageDataset, Option<&'a Augment>),
    /// The tokens behind the frozen blocks.
    Tokens { prefix: Prefix, labels: Tensor },
    /// The features in front of the head.
    Features { features: Tensor, labels: Tensor },
}

/// An iterator over batches. An item is (images, tokens or features; labels).
type BatchIter<'a> = Box<dyn Iterator<Item = Result<(Tensor, Tensor)>> + 'a>;

impl<'a> Inputs<'a> {
    /// Creates the inputs, and computes the tokens or features of every image if they are used.
    ///
    /// The computation uses the normalization, batch size and device of `config`. `watch` is called
    /// with the number of processed images and the number of all images. Returns `None` if it
    /// returns `Break`.
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

    /// Returns the number of images.
    pub(crate) fn len(&self) -> usize {
        match self {
            Inputs::Images(dataset, _) => dataset.len(),
            Inputs::Tokens { labels, .. } | Inputs::Features { labels, .. } => labels.numel(),
        }
    }

    /// Returns the batches of one pass, in the order and of the size given by `config`.
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

    /// Returns the logits of a batch from [`Inputs::batches`].
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

    /// Computes the `loss` of a batch and adds its gradients to those of the trainable parameters.
    /// Returns the logits and the loss, both detached.
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
