//! The inputs of a pass over a dataset: images, or tokens or features that are computed once.

use std::ops::ControlFlow;

use tch::Tensor;

use super::prefix_cache::{Prefix, PrefixCache};
use super::team::Team;
use crate::backbone::Backbone;
use crate::data::{Augment, BatchConfig, Batches, ImageDataset, Order, PartialBatch};
use crate::error::Result;
use crate::ffi::send;
use crate::model::PetlModel;
use crate::nn::Noise;

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
        team: Team,
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
            let prefix = Prefix::new(model, dataset, config, cache, team.is_first(), watch)?;
            let is_stopped = team.any(prefix.is_none())?;
            let prefix = prefix.filter(|_| !is_stopped);
            return Ok(prefix.map(|prefix| Inputs::Tokens { prefix, labels }));
        }
        let features = features(model, dataset, config, team, watch)?;
        let labels = Tensor::f_from_slice(dataset.labels())?.f_to_device(config.device)?;
        Ok(features.map(|features| Inputs::Features { features, labels }))
    }

    /// Returns the number of images.
    pub(crate) fn len(&self) -> usize {
        match self {
            Inputs::Images(dataset, _) => dataset.len(),
            Inputs::Tokens { labels, .. } | Inputs::Features { labels, .. } => labels.numel(),
        }
    }

    /// Returns the labels of the images at `indices`.
    pub(crate) fn labels_at(&self, indices: &[usize]) -> Result<Tensor> {
        let labels = match self {
            Inputs::Images(dataset, _) => {
                let labels = indices.iter().map(|&index| dataset.labels()[index]);
                return Ok(Tensor::f_from_slice(&labels.collect::<Vec<i64>>())?);
            }
            Inputs::Tokens { labels, .. } | Inputs::Features { labels, .. } => labels,
        };
        let indices: Vec<i64> = indices.iter().map(|&index| index as i64).collect();
        let index = send(&Tensor::f_from_slice(&indices)?, labels.device())?;
        Ok(labels.f_index_select(0, &index)?)
    }

    /// Returns the batches of the images at `indices`, of the size given by `config`.
    pub(crate) fn batches(
        &self,
        config: BatchConfig,
        indices: Vec<usize>,
    ) -> Result<BatchIter<'_>> {
        // From the index on the CPU and that on the device.
        type Select<'a> = Box<dyn Fn(&Tensor, &Tensor) -> Result<Tensor> + 'a>;
        let (labels, select): (_, Select) = match self {
            Inputs::Images(dataset, augment) => {
                return Ok(Box::new(Batches::over(dataset, config, *augment, indices)?));
            }
            Inputs::Tokens { prefix, labels } => {
                (labels, Box::new(|index, _| prefix.select(index, labels.device())))
            }
            Inputs::Features { features, labels } => {
                (labels, Box::new(|_, index| Ok(features.f_index_select(0, index)?)))
            }
        };
        let chunks: Vec<Vec<i64>> = indices
            .chunks(config.batch_size.max(1))
            .map(|chunk| chunk.iter().map(|&index| index as i64).collect())
            .collect();
        Ok(Box::new(chunks.into_iter().map(move |chunk| {
            let own = Tensor::f_from_slice(&chunk)?;
            let index = send(&own, labels.device())?;
            Ok((select(&own, &index)?, labels.f_index_select(0, &index)?))
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

    /// Draws what [`Inputs::backward`] draws from libtorch's generator, in a process that has no
    /// rows of the batch.
    pub(crate) fn skip(&self) -> Result<()> {
        match self {
            Inputs::Images(..) | Inputs::Tokens { .. } => Noise::from_libtorch()?.leave(),
            Inputs::Features { .. } => {}
        }
        Ok(())
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

/// Computes the features `[N, C]` of every image, each process of `team` those of a part of them.
/// Returns `None` if `watch` returned `Break` in any process.
fn features<B: Backbone>(
    model: &PetlModel<B>,
    dataset: &ImageDataset,
    config: BatchConfig,
    team: Team,
    watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<Tensor>> {
    let config = BatchConfig { partial: PartialBatch::Keep, order: Order::Sequential, ..config };
    let own = team.share(dataset.len());
    let (mut features, mut done, mut is_stopped) = (Vec::new(), 0, false);
    for batch in Batches::over(dataset, config, None, own.clone().collect())? {
        let (images, labels) = batch?;
        features.push(tch::no_grad(|| model.features(&images, false))?);
        done += labels.numel();
        is_stopped = watch(done, own.len()).is_break();
        if is_stopped {
            break;
        }
    }
    if team.any(is_stopped)? {
        return Ok(None);
    }
    if team.is_alone() {
        return Ok(Some(Tensor::f_cat(&features, 0)?));
    }
    let options = (model.backbone().compute_kind(), config.device);
    let dim = model.backbone().feature_dim();
    let mut all = Tensor::f_zeros([dataset.len() as i64, dim], options)?;
    if !own.is_empty() {
        let mut rows = all.f_narrow(0, own.start as i64, own.len() as i64)?;
        rows.f_copy_(&Tensor::f_cat(&features, 0)?)?;
    }
    team.sum(&mut all)?;
    Ok(Some(all))
}
