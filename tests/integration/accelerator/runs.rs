//! Runs on the device: training, resuming, evaluation, divergence, files and autocast.

use std::ops::ControlFlow;

use convpass::data::Normalization;
use convpass::eval::evaluate;
use convpass::train::{
    CosineSchedule, Observer, RunCheckpoint, Selection, Silent, StepReport, Stepped, fit_resumable,
};
use convpass::{
    Autocast, ConvBypassConfig, Error, FrozenViT, ImageDataset, LoraConfig, Method, PetlConfig,
    PetlModel, TrainConfig,
};
use convpass_accelerator::Accelerator;
use tch::{Device, Kind};

use crate::child;
use crate::resume::bars;
use crate::support::{small_vit, train_config};

fn model(device: Device, method: &Method) -> PetlModel {
    let backbone = FrozenViT::random(small_vit().config(), 3, device).unwrap();
    let config = PetlConfig { seed: 5, ..PetlConfig::new(method.clone(), 3) };
    PetlModel::new(backbone, &config).unwrap()
}

fn bypass() -> Method {
    Method::ConvBypass(ConvBypassConfig::default())
}

/// Ends a run after a number of steps.
struct StopAfter(usize);

impl Observer for StopAfter {
    fn reads_step(&mut self, _steps_done: usize) -> bool {
        false
    }

    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        assert!(step.loss.is_nan() && step.accuracy.is_nan(), "nobody reads them");
        if step.steps_done() == self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// Trains, evaluates and saves; returns the losses of the epochs, the accuracy and the adapter.
fn run(device: Device, method: &Method, stops: &[usize]) -> (Vec<f64>, f64, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let (train, validation): (ImageDataset, ImageDataset) = (bars(31, 16, 0), bars(12, 16, 1));
    let config = TrainConfig { selection: Selection::BestOnValidation, ..train_config(3, 7) };
    let checkpoint = RunCheckpoint { path: folder.path().join("run.state"), every: 2 };
    for &stop in stops {
        let mut model = model(device, method);
        let fit = fit_resumable(
            &mut model,
            &train,
            Some(&validation),
            &config,
            &checkpoint,
            &mut StopAfter(stop),
        );
        assert!(fit.unwrap().stopped);
    }
    let mut model = model(device, method);
    let fit =
        fit_resumable(&mut model, &train, Some(&validation), &config, &checkpoint, &mut Silent)
            .unwrap();
    let losses = fit.epochs.iter().map(|epoch| epoch.loss).collect();
    let mut watch = |_, _| ControlFlow::Continue(());
    let result = evaluate(&model, &validation, Normalization::Half, 5, &mut watch).unwrap();
    let file = folder.path().join("adapter.safetensors");
    model.save_adapter(&file).unwrap();
    // The file does not depend on the device.
    let again = PetlModel::load_adapter(small_vit(), &file).unwrap();
    let on_cpu = evaluate(&again, &validation, Normalization::Half, 5, &mut watch).unwrap();
    assert_eq!((on_cpu.images, on_cpu.top1()), (result.images, result.top1()));
    (losses, result.top1(), std::fs::read(file).unwrap())
}

#[test]
fn a_run_is_that_of_the_cpu_and_resumes_to_the_same_bytes() {
    if !child::is_alone("accelerator::runs::a_run_is_that_of_the_cpu_and_resumes_to_the_same_bytes")
    {
        return;
    }
    tch::set_num_threads(1);
    let device = Accelerator::hold().device();
    for method in [bypass(), Method::Lora(LoraConfig::default()), Method::LinearProbe] {
        let (losses, top1, adapter) = run(device, &method, &[]);
        let (expected, expected_top1, _) = run(Device::Cpu, &method, &[]);
        assert_eq!(losses.len(), expected.len());
        for (loss, expected) in losses.iter().zip(&expected) {
            assert!((loss - expected).abs() < 1e-3, "{method:?}: {losses:?}, not {expected:?}");
        }
        assert!((top1 - expected_top1).abs() < 10.0, "{method:?}: {top1}, not {expected_top1}");
        let resumed = run(device, &method, &[3, 9]);
        assert!(resumed == (losses, top1, adapter), "{method:?}");
    }
}

/// Though nobody reads the loss of a step, and the steps after it are computed before it is known.
#[test]
fn a_run_that_diverges_names_its_step() {
    if !child::is_alone("accelerator::runs::a_run_that_diverges_names_its_step") {
        return;
    }
    let device = Accelerator::hold().device();
    let schedule = CosineSchedule {
        lr: 1e18,
        warmup_lr: 1e18,
        warmup_epochs: 0,
        stepped: Stepped::EachStep,
        ..CosineSchedule::default()
    };
    let config = TrainConfig { schedule, ..train_config(2, 7) };
    let fails = |device, observer: &mut dyn Observer| {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = RunCheckpoint { path: folder.path().join("run.state"), every: 100 };
        let mut model = model(device, &bypass());
        let train = bars(31, 16, 0);
        let error = fit_resumable(&mut model, &train, None, &config, &checkpoint, observer);
        assert!(!checkpoint.path.exists(), "a state of weights that are not finite");
        match error.unwrap_err() {
            Error::Diverged { epoch, step, lr, what, .. } => (epoch, step, lr, what),
            other => panic!("{other}"),
        }
    };
    struct Reads;
    impl Observer for Reads {}
    let expected = fails(Device::Cpu, &mut Reads);
    assert_eq!(expected.3, "the loss is");
    assert_eq!(fails(device, &mut Reads), expected);
    assert_eq!(fails(device, &mut Silent), expected);
}

#[test]
fn autocast_computes_products_in_few_bits() {
    if !child::is_alone("accelerator::runs::autocast_computes_products_in_few_bits") {
        return;
    }
    let accelerator = Accelerator::hold();
    let device = accelerator.device();
    for method in [bypass(), Method::Lora(LoraConfig::default())] {
        let model = model(device, &method);
        convpass::testing::disturb(&model).unwrap();
        let images = crate::support::waves(&[4, 3, 16, 16]).to_device(device);
        let logits = || model.forward(&images, true).unwrap();
        tch::manual_seed(3);
        let expected = logits();
        for kind in [Kind::BFloat16, Kind::Half] {
            let _guard = Autocast::enter(device, kind).unwrap();
            tch::manual_seed(3);
            let (found, counts) = accelerator.count(logits);
            assert_eq!(counts.waits(), 0, "{counts:?}");
            let gap = (&found - &expected).abs().max().double_value(&[])
                / expected.abs().max().double_value(&[]);
            assert!(0.0 < gap && gap < 0.05, "{method:?} in {kind:?}: {gap}");
            found.to_kind(Kind::Float).square().sum(Kind::Float).backward();
            for (name, variable) in model.var_store().variables() {
                assert!(variable.grad().defined(), "{name}");
                assert_eq!(
                    (variable.grad().kind(), variable.grad().device()),
                    (Kind::Float, device)
                );
            }
        }
    }
}
