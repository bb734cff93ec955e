//! Every method on every backbone leaves no tensor behind, and computes what it computes on the
//! CPU.

use std::collections::BTreeMap;

use convpass::{
    Backbone, FrozenConvNeXt, FrozenSwin, FrozenViT, Method, PetlConfig, PetlModel, testing,
};
use convpass_accelerator::Accelerator;
use tch::{Device, Kind, Tensor};

use crate::child;
use crate::contract::{CLASSES, images, kept, methods, refused};
use crate::variants::Contract;

/// Runs `check` for every method with every backbone that has a place for it, on the CPU and on the
/// device.
fn on_both<B: Contract>(device: Device, check: impl Fn(&str, PetlModel<B>, PetlModel<B>)) {
    for (name, config) in B::variants() {
        let [cpu, other] = [Device::Cpu, device].map(|device| B::random(&config, device));
        for method in methods() {
            if refused(&method, &cpu).is_some() {
                continue;
            }
            let case = format!("{method:?} beside {name}");
            check(&case, model(&cpu, &method), model(&other, &method));
        }
    }
}

fn model<B: Contract>(backbone: &B, method: &Method) -> PetlModel<B> {
    let model =
        PetlModel::new(backbone.clone(), &PetlConfig::new(method.clone(), CLASSES)).unwrap();
    testing::disturb(&model).unwrap();
    model
}

/// A seeded training pass: the loss, and the gradients by name.
fn pass<B: Backbone>(model: &PetlModel<B>, device: Device) -> (f64, BTreeMap<String, Tensor>) {
    tch::manual_seed(11);
    let logits = model.forward(&images(6).to_device(device), true).unwrap();
    let labels = Tensor::arange(6, (Kind::Int64, device)).remainder(CLASSES);
    let loss = logits.cross_entropy_for_logits(&labels);
    loss.backward();
    let gradient = |(name, variable): (String, Tensor)| {
        let gradient = variable.grad();
        assert_eq!(gradient.device(), device, "{name}");
        (name, gradient.to_device(Device::Cpu))
    };
    let variables = model.var_store().variables();
    (loss.double_value(&[]), variables.into_iter().map(gradient).collect())
}

/// Returns the largest difference, divided by the largest value, or by `floor` if that is larger.
fn gap(found: &Tensor, expected: &Tensor, floor: f64) -> f64 {
    let difference = largest(&(found.to_device(Device::Cpu) - expected));
    if difference == 0.0 { 0.0 } else { difference / largest(expected).max(floor) }
}

fn largest(x: &Tensor) -> f64 {
    x.abs().max().double_value(&[])
}

#[test]
fn every_method_computes_the_same_as_on_the_cpu() {
    if !child::is_alone("accelerator::methods::every_method_computes_the_same_as_on_the_cpu") {
        return;
    }
    tch::set_num_threads(1);
    let accelerator = Accelerator::hold();
    let device = accelerator.device();
    fn check<B: Contract>(case: &str, cpu: PetlModel<B>, other: PetlModel<B>, device: Device) {
        let eval = |model: &PetlModel<B>, device: Device| {
            tch::no_grad(|| model.forward(&images(3).to_device(device), false)).unwrap()
        };
        let logits = eval(&other, device);
        assert_eq!(logits.device(), device, "{case}");
        let found = gap(&logits, &eval(&cpu, Device::Cpu), 0.0);
        assert!(found < 1e-4, "{case}: the logits differ by {found:e}");
        let ((loss, gradients), (expected_loss, expected)) =
            (pass(&other, device), pass(&cpu, Device::Cpu));
        assert!((loss / expected_loss - 1.0).abs() < 1e-4, "{case}: {loss}, not {expected_loss}");
        // A gradient far below the others is what is left of sums that cancel.
        let floor = 1e-3 * expected.values().map(largest).fold(0.0, f64::max);
        for (name, expected) in &expected {
            let found = gap(&gradients[name], expected, floor);
            assert!(found < 1e-4, "{case}: the gradient of {name} differs by {found:e}");
        }
    }
    on_both::<FrozenViT>(device, |case, cpu, other| check(case, cpu, other, device));
    on_both::<FrozenSwin>(device, |case, cpu, other| check(case, cpu, other, device));
    on_both::<FrozenConvNeXt>(device, |case, cpu, other| check(case, cpu, other, device));
}

#[test]
fn recomputed_passes_kept_prefixes_and_files_are_the_same() {
    if !child::is_alone(
        "accelerator::methods::recomputed_passes_kept_prefixes_and_files_are_the_same",
    ) {
        return;
    }
    tch::set_num_threads(1);
    let accelerator = Accelerator::hold();
    let device = accelerator.device();
    fn check<B: Contract>(case: &str, model: PetlModel<B>, device: Device) {
        let images = images(6).to_device(device);
        kept(case, testing::recomputes_the_same_gradients(&model, &images, |_| 1e-6));
        kept(case, testing::keeps_its_prefix(&model, &images));
        kept(case, testing::comes_back_from_its_file(&model, &images, None));
    }
    on_both::<FrozenViT>(device, |case, _, other| check(case, other, device));
    on_both::<FrozenSwin>(device, |case, _, other| check(case, other, device));
    on_both::<FrozenConvNeXt>(device, |case, _, other| check(case, other, device));
}
