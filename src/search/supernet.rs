//! One model that holds every mix of a space: a narrower one reads a part of its weights.

use std::ops::ControlFlow;
use std::time::Instant;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use super::space::{SearchSpace, Widths};
use crate::backbone::{Backbone, FrozenViT};
use crate::data::ImageDataset;
use crate::error::{Error, Result};
use crate::eval::{Inputs, cross_entropy};
use crate::model::{PetlConfig, PetlModel};
use crate::train::{AdamW, Fit, Observer, Place, RunStart, TrainConfig, check, epoch};

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
    /// [`Error::Config`] if the space is another backbone's, or for a number of classes that no
    /// head has.
    pub fn new(backbone: B, space: SearchSpace, num_classes: i64, seed: i64) -> Result<Self> {
        let config = PetlConfig::new(space.method(&space.widest())?, num_classes);
        let model = PetlModel::new(backbone, &PetlConfig { seed, ..config })?;
        Ok(Supernet { model, space })
    }

    /// The widest mix itself.
    pub fn model(&self) -> &PetlModel<B> {
        &self.model
    }

    /// What it holds.
    pub fn space(&self) -> &SearchSpace {
        &self.space
    }

    /// The model of these widths, with copies of its part of the weights.
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

    /// Trains in place on `train`: each step draws widths, every one alike, and trains their
    /// part. What [`fit`](fn@crate::fit) says of seeds holds here too.
    ///
    /// # Errors
    /// As [`fit`](fn@crate::fit).
    pub fn train(
        &mut self,
        train: &ImageDataset,
        config: &TrainConfig,
        observer: &mut dyn Observer,
    ) -> Result<Fit> {
        check(&self.model, train, None, config)?;
        let (start, inputs) = (Instant::now(), Inputs::Images(train, config.augment.as_ref()));
        let mut optimizer = AdamW::new(self.model.var_store(), config.weight_decay)?;
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed as u64);
        let mut step = |images: &Tensor, labels: &Tensor, lr| {
            let subnet = self.subnet(&self.space.sample(&mut rng))?;
            let logits = subnet.forward(images, true)?;
            let loss = cross_entropy(&logits, labels)?;
            loss.f_backward()?;
            optimizer.backward_step(&self.stand_in(&subnet)?, lr)?;
            Ok((logits, loss))
        };
        let (device, mut epochs) = (self.model.var_store().device(), Vec::new());
        let steps = train.len() / config.batch_size;
        observer.start(&RunStart { epochs: config.epochs, steps, ..RunStart::default() });
        for index in 0..config.epochs {
            let start = Instant::now();
            let place = Place { epoch: index, ..Place::default() };
            let report = epoch(&inputs, place, config, device, &mut step, observer)?;
            let ControlFlow::Continue(mut report) = report else { break };
            report.seconds = start.elapsed().as_secs_f64();
            observer.epoch(&report);
            epochs.push(report);
        }
        let stopped = epochs.len() < config.epochs;
        let selected_epoch = epochs.len().checked_sub(1).filter(|_| !stopped);
        Ok(Fit { epochs, selected_epoch, stopped, seconds: start.elapsed().as_secs_f64() })
    }

    /// A scalar whose gradient is the subnet's, in the subnet's part of the weights, and zero in
    /// the rest of each tensor.
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

    /// Each variable of the subnet with its part of the supernet's of that name.
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

/// The first `sides[d]` entries of `tensor` along each dimension d: a view.
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
    use crate::backbone::ViTConfig;
    use crate::petl::{AdaptFormerConfig, ConvBypassConfig, Method};
    use crate::search::SearchModule;
    use crate::train::{CosineSchedule, Silent, Stepped};

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
        // Nothing at its start, where half of the matrices are zero.
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

    /// The gradients of a pass in evaluation, by variable.
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

    /// The plain twin: the supernet with what feeds from the rest set to zero.
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
        assert!(matches!(error, Error::Config { .. }), "{error}");
    }
}
