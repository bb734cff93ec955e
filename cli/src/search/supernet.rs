//! The supernet: one model that holds every mix of a space. A narrower mix reads a part of its
//! weights.

use std::time::Instant;

use convpass::backbone::{Backbone, FrozenViT};
use convpass::data::{BatchConfig, Batches, ImageDataset, Order, PartialBatch};
use convpass::model::{PetlConfig, PetlModel};
use convpass::train::{EpochReport, Fit, Observer, RunStart, Selection, StepReport, TrainConfig};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::nn::{AdamW, Optimizer, OptimizerConfig};
use tch::{Kind, Tensor};

use super::space::{SearchSpace, Widths};
use crate::error::{Error, Result};

/// The widest mix of a space and a head. A subnet of width k has the first k rows, columns or
/// prompts of each of its tensors; the head is shared.
#[derive(Debug)]
pub struct Supernet<B: Backbone = FrozenViT> {
    model: PetlModel<B>,
    space: SearchSpace,
}

impl<B: Backbone> Supernet<B> {
    /// Puts the widest mix of `space` beside `backbone`, with the paper's drop path.
    ///
    /// # Errors
    /// [`Error::Config`] if the space is for another backbone, or the number of classes is not
    /// valid.
    pub fn new(backbone: B, space: SearchSpace, num_classes: i64, seed: i64) -> Result<Self> {
        let config = PetlConfig::new(space.method(&space.widest())?, num_classes);
        let model = PetlModel::new(backbone, &PetlConfig { seed, ..config })?;
        Ok(Supernet { model, space })
    }

    /// Returns the model of the widest mix.
    #[cfg(test)]
    pub fn model(&self) -> &PetlModel<B> {
        &self.model
    }

    /// Returns the space of the supernet.
    pub fn space(&self) -> &SearchSpace {
        &self.space
    }

    /// Returns the model of these widths, with copies of its part of the supernet's weights.
    ///
    /// # Errors
    /// [`Error::Config`] if the widths are not of the space.
    pub fn subnet(&self, widths: &Widths) -> Result<PetlModel<B>> {
        let method = self.space.method(widths)?;
        let config = PetlConfig { method, ..self.model.config().clone() };
        let subnet = PetlModel::new(self.model.backbone().clone(), &config)?;
        let mut parts = self.parts(&subnet)?;
        tch::no_grad(|| parts.iter_mut().try_for_each(|(own, part)| own.f_copy_(part)))?;
        Ok(subnet)
    }

    /// Trains the supernet in place on `train`. Each step draws widths, all equally likely, and
    /// trains the part of the weights that they select. The same seed gives the same weights on one
    /// machine.
    ///
    /// # Errors
    /// [`Error::Config`] for settings that a supernet does not support, or if there are fewer
    /// images than a batch; errors of the data and of libtorch.
    pub fn train(
        &mut self,
        train: &ImageDataset,
        config: &TrainConfig,
        observer: &mut dyn Observer,
    ) -> Result<Fit> {
        check(config, train)?;
        let start = Instant::now();
        let mut optimizer = AdamW { wd: config.weight_decay, ..AdamW::default() }
            .build(self.model.var_store(), config.schedule.lr)?;
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed as u64);
        let steps = train.len() / config.batch_size;
        observer.start(&RunStart { epochs: config.epochs, steps, ..RunStart::default() });
        let mut epochs = Vec::new();
        for index in 0..config.epochs {
            let report = self.epoch(index, train, config, &mut optimizer, &mut rng, observer)?;
            let Some(report) = report else { break };
            observer.epoch(&report);
            epochs.push(report);
        }
        let stopped = epochs.len() < config.epochs;
        let selected_epoch = epochs.len().checked_sub(1).filter(|_| !stopped);
        Ok(Fit { epochs, selected_epoch, stopped, seconds: start.elapsed().as_secs_f64() })
    }

    /// Trains for one pass over the images. Returns `None` if the observer ended the run.
    fn epoch(
        &self,
        epoch: usize,
        train: &ImageDataset,
        config: &TrainConfig,
        optimizer: &mut Optimizer,
        rng: &mut ChaCha8Rng,
        observer: &mut dyn Observer,
    ) -> Result<Option<EpochReport>> {
        let (start, steps) = (Instant::now(), train.len() / config.batch_size);
        let batches = BatchConfig {
            batch_size: config.batch_size,
            partial: PartialBatch::Drop,
            order: Order::Shuffled { seed: config.seed, epoch: epoch as i64 },
            normalization: config.normalization,
            device: self.model.var_store().device(),
        };
        let batches = match &config.augment {
            Some(augment) => Batches::augmented(train, batches, augment)?,
            None => Batches::new(train, batches)?,
        };
        let (mut lr, mut loss_sum, mut correct, mut images) = (0.0, 0.0, 0, 0);
        for (step, batch) in batches.enumerate() {
            let (batch, labels) = batch?;
            lr = config.schedule.lr(epoch, step, config.epochs, steps);
            // The seed of a step depends on its number, so that the seed alone determines dropout
            // and drop path.
            tch::manual_seed(config.seed.wrapping_mul(1 << 20) + (epoch * steps + step) as i64);
            let (logits, loss) = self.step(&batch, &labels, rng)?;
            optimizer.set_lr(lr);
            optimizer.step();
            let count = labels.numel();
            loss_sum += loss.f_double_value(&[])? * count as f64;
            let right = logits.f_argmax(-1, false)?.f_eq_tensor(&labels)?.f_sum(Kind::Int64)?;
            correct += right.f_int64_value(&[])?;
            images += count;
            let (loss, accuracy) = means(loss_sum, correct, images);
            let epochs = config.epochs;
            let report =
                StepReport { epoch, step, epochs, steps, images: count, lr, loss, accuracy };
            if observer.step(&report).is_break() {
                return Ok(None);
            }
        }
        let (loss, accuracy) = means(loss_sum, correct, images);
        let seconds = start.elapsed().as_secs_f64();
        Ok(Some(EpochReport { epoch, lr, loss, accuracy, val_top1: None, seconds }))
    }

    /// Draws a subnet and sets its gradients in the supernet's weights. Returns the logits and the
    /// loss.
    fn step(
        &self,
        images: &Tensor,
        labels: &Tensor,
        rng: &mut ChaCha8Rng,
    ) -> Result<(Tensor, Tensor)> {
        let subnet = self.subnet(&self.space.sample(rng))?;
        let logits = subnet.forward(images, true)?;
        let loss = cross_entropy(&logits, labels)?;
        loss.f_backward()?;
        for mut variable in self.model.var_store().trainable_variables() {
            variable.zero_grad();
        }
        self.stand_in(&subnet)?.f_backward()?;
        Ok((logits.f_detach()?, loss.f_detach()?))
    }

    /// Returns a scalar whose gradient with respect to the supernet's weights is that of the subnet
    /// in the subnet's part, and zero in the rest of each tensor.
    fn stand_in(&self, subnet: &PetlModel<B>) -> Result<Tensor> {
        let mut sum = Tensor::f_zeros([0i64; 0], (Kind::Float, subnet.var_store().device()))?;
        for (own, part) in self.parts(subnet)? {
            let gradient = own.f_grad()?;
            if gradient.defined() {
                sum = sum.f_add(&part.f_mul(&gradient)?.f_sum(Kind::Float)?)?;
            }
        }
        Ok(sum)
    }

    /// Returns each variable of the subnet with its part of the supernet's variable of the same
    /// name.
    fn parts(&self, subnet: &PetlModel<B>) -> Result<Vec<(Tensor, Tensor)>> {
        let whole = self.model.var_store().variables();
        let part = |(name, own): (String, Tensor)| {
            let Some(whole) = whole.get(&name) else {
                return Err(Error::config("widths", "those of the supernet", name));
            };
            let part = leading_part(whole, &own.size())?;
            Ok((own, part))
        };
        subnet.var_store().variables().into_iter().map(part).collect()
    }
}

/// Checks that a supernet supports the settings and that there are enough images for a batch.
fn check(config: &TrainConfig, train: &ImageDataset) -> Result<()> {
    let unsupported = [
        ("recompute", config.recompute),
        ("cuda_graph", config.cuda_graph),
        ("prefix", config.prefix.is_some()),
        ("validate_every", config.validate_every != TrainConfig::default().validate_every),
        ("selection", config.selection != Selection::LastEpoch),
    ];
    if let Some((field, _)) = unsupported.into_iter().find(|(_, is_set)| *is_set) {
        return Err(Error::config(field, "the default for a supernet", "another value"));
    }
    if config.batch_size == 0 || train.len() < config.batch_size {
        let expected = format!("from 1 to the {} images", train.len());
        return Err(Error::config("batch_size", expected, config.batch_size));
    }
    Ok(())
}

/// Returns the mean loss and top-1 in percent.
fn means(loss_sum: f64, correct: i64, images: usize) -> (f64, f64) {
    let images = images.max(1) as f64;
    (loss_sum / images, 100.0 * correct as f64 / images)
}

fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let mean = tch::Reduction::Mean;
    Ok(logits.f_cross_entropy_loss(labels, None::<&Tensor>, mean, -100, 0.0)?)
}

/// Returns a view of the first `sides[d]` entries of `tensor` along each dimension d.
fn leading_part(tensor: &Tensor, sides: &[i64]) -> Result<Tensor> {
    let mut sides = (0..).zip(sides);
    sides.try_fold(tensor.shallow_clone(), |part, (dim, &side)| Ok(part.f_narrow(dim, 0, side)?))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ndarray::Array4;
    use tch::Device;

    use super::*;
    use crate::search::SearchModule;
    use convpass::backbone::ViTConfig;
    use convpass::petl::{AdaptFormerConfig, ConvBypassConfig, Method};
    use convpass::train::{CosineSchedule, Silent, Stepped};

    fn supernet(modules: Vec<SearchModule>) -> Supernet {
        let vit = ViTConfig {
            image_size: (16, 16),
            patch_size: 4,
            embed_dim: 16,
            depth: 3,
            num_heads: 2,
            mlp_dim: 32,
            ..ViTConfig::default()
        };
        let backbone = FrozenViT::random(&vit, 3, Device::Cpu).unwrap();
        let space = SearchSpace::new(modules, &backbone.shape()).unwrap();
        let supernet = Supernet::new(backbone, space, 4, 5).unwrap();
        // At the start half of the matrices are zero; the tests need other values.
        tch::no_grad(|| {
            for (name, mut variable) in supernet.model.var_store().variables() {
                let phase = name.bytes().map(f64::from).sum::<f64>();
                let count = variable.numel() as i64;
                let wave = Tensor::arange(count, (Kind::Float, Device::Cpu)) + phase;
                variable.copy_(&(wave.sin() * 0.3).reshape(variable.size()));
            }
        });
        supernet
    }

    fn every_module() -> Vec<SearchModule> {
        let convpass = Method::ConvBypass(ConvBypassConfig::default());
        let more = [Method::AdaptFormer(AdaptFormerConfig::default()), convpass];
        let more = more.map(|method| SearchModule { method, widths: vec![0, 2, 6] });
        SearchModule::noah().into_iter().chain(more).collect()
    }

    fn batch() -> (Tensor, Tensor) {
        let images = Tensor::linspace(-1.0, 1.0, 4 * 3 * 256, (Kind::Float, Device::Cpu));
        (images.sin().reshape([4, 3, 16, 16]), Tensor::from_slice(&[0i64, 1, 2, 3]))
    }

    /// Returns the gradients of a pass in evaluation mode, by variable.
    fn gradients(model: &PetlModel) -> BTreeMap<String, Tensor> {
        let (images, labels) = batch();
        let logits = model.forward(&images, false).unwrap();
        cross_entropy(&logits, &labels).unwrap().backward();
        let variables = model.var_store().variables().into_iter();
        variables.map(|(name, variable)| (name, variable.grad())).collect()
    }

    fn clear_gradients(model: &PetlModel) {
        for variable in model.var_store().trainable_variables() {
            let _zeroed = variable.grad().detach_().zero_();
        }
    }

    #[test]
    fn the_widest_subnet_is_the_supernet() {
        let supernet = supernet(every_module());
        let subnet = supernet.subnet(&supernet.space().widest()).unwrap();
        let (images, _) = batch();
        let logits = |model: &PetlModel| model.forward(&images, false).unwrap();
        assert_eq!(logits(&subnet), logits(supernet.model()));
        let direct = gradients(supernet.model());
        clear_gradients(supernet.model());
        let own = gradients(&subnet);
        supernet.stand_in(&subnet).unwrap().backward();
        for (name, variable) in supernet.model().var_store().variables() {
            assert_eq!(own[&name], direct[&name], "{name}");
            assert_eq!(variable.grad(), direct[&name], "{name}");
        }
    }

    #[test]
    fn gradients_arrive_in_the_part_that_was_used_and_nowhere_else() {
        let supernet = supernet(every_module());
        let _filled = gradients(supernet.model());
        for seed in 0..5 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let subnet = supernet.subnet(&supernet.space().sample(&mut rng)).unwrap();
            let mut own = gradients(&subnet);
            clear_gradients(supernet.model());
            supernet.stand_in(&subnet).unwrap().backward();
            for (name, variable) in supernet.model().var_store().variables() {
                let rest = variable.grad().copy();
                if let Some(gradient) = own.remove(&name) {
                    let mut part = leading_part(&rest, &gradient.size()).unwrap();
                    assert_eq!(part, gradient, "{name}");
                    let _zeroed = part.zero_();
                }
                assert_eq!(rest.abs().sum(Kind::Float).double_value(&[]), 0.0, "{name}");
            }
            assert!(own.is_empty());
        }
    }

    /// The naive twin of a subnet is the supernet whose other weights are zero.
    #[test]
    fn a_subnet_is_the_supernet_without_the_rest() {
        let modules = SearchModule::noah().into_iter().take(2).collect();
        let supernet = supernet(modules);
        let widths = Widths(vec![vec![5, 0, 1], vec![1, 10, 0]]);
        let subnet = supernet.subnet(&widths).unwrap();
        let own = subnet.var_store().variables();
        tch::no_grad(|| {
            for (name, mut variable) in supernet.model().var_store().variables() {
                let kept = variable.zeros_like();
                if let Some(own) = own.get(&name) {
                    leading_part(&kept, &own.size()).unwrap().copy_(own);
                }
                variable.copy_(&kept);
            }
        });
        let (images, _) = batch();
        let expected = supernet.model().forward(&images, false).unwrap();
        let found = subnet.forward(&images, false).unwrap();
        let gap = (found - &expected).abs().max() / expected.abs().max();
        assert!(gap.double_value(&[]) < 1e-5, "{gap:?}");
    }

    #[test]
    fn with_no_width_at_all_the_head_is_left() {
        let supernet = supernet(SearchModule::noah());
        let subnet = supernet.subnet(&supernet.space().narrowest()).unwrap();
        assert_eq!(subnet.config().method, Method::LinearProbe);
        let names: Vec<_> = subnet.var_store().variables().into_keys().collect();
        assert_eq!((names.len(), subnet.trainable_params().method), (2, 0));
    }

    #[test]
    fn it_learns_beside_an_unchanged_backbone() {
        let mut supernet = supernet(SearchModule::noah());
        let digest = supernet.model().backbone().digest();
        let images = Array4::from_shape_fn((40, 16, 16, 3), |(n, row, column, _)| {
            if (column / 4) == n % 4 { 200 + (row % 8) as u8 } else { 20 }
        });
        let labels = (0..40).map(|n| n % 4).collect();
        let train = ImageDataset::from_arrays(images, labels, 4).unwrap();
        let schedule = CosineSchedule {
            lr: 1e-2,
            warmup_epochs: 1,
            stepped: Stepped::EachStep,
            ..CosineSchedule::default()
        };
        let config = TrainConfig { epochs: 12, batch_size: 8, schedule, ..TrainConfig::default() };
        let fit = supernet.train(&train, &config, &mut Silent).unwrap();
        assert_eq!(supernet.model().backbone().digest(), digest);
        assert_eq!((fit.epochs.len(), fit.selected_epoch, fit.stopped), (12, Some(11), false));
        assert!(fit.epochs[11].loss < fit.epochs[0].loss);
        let too_large = TrainConfig { batch_size: 41, ..config };
        let error = supernet.train(&train, &too_large, &mut Silent).unwrap_err();
        assert!(error.is_config(), "{error}");
    }
}
