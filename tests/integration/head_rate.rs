//! The learning rate of the head: a parameter group of its own, a part of the config.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use convpass::train::{
    AdamW, FitOptions, Observer, RunCheckpoint, RunRecord, Silent, StepReport, fit_with,
};
use convpass::{Error, Method, PetlConfig, PetlModel, TrainConfig, fit};
use serde::Deserialize;
use tch::nn::{OptimizerConfig, Sgd};
use tch::{Device, Kind, Tensor, nn};

use crate::resume::bars;
use crate::support::{small_vit, train_config, weights};

#[derive(Deserialize)]
struct Golden {
    lrs: Vec<f64>,
    weight_decay: f64,
    head_lr_factor: f64,
    start: Vec<f64>,
    body: Vec<f64>,
    head: Vec<f64>,
}

#[test]
fn a_factor_is_a_parameter_group_of_pytorch() {
    let golden: Golden = serde_json::from_str(include_str!("fixtures/adamw/adamw.json")).unwrap();
    let vs = nn::VarStore::new(Device::Cpu);
    let start = Tensor::from_slice(&golden.start);
    let (body, head) =
        (vs.root().var_copy("body", &start), (vs.root() / "head").var_copy("weight", &start));
    let adamw = AdamW::new(&vs, golden.weight_decay).unwrap();
    let mut adamw = adamw.with_lr_factor("head.", golden.head_lr_factor).unwrap();
    for (step, lr) in golden.lrs.iter().enumerate() {
        let loss = ((&body * (step + 1) as f64).sin() * &head).sum(Kind::Double);
        adamw.backward_step(&loss, *lr).unwrap();
    }
    for (found, expected) in [(&body, &golden.body), (&head, &golden.head)] {
        // Variables are in f32.
        let gap = (found - Tensor::from_slice(expected)).abs().max().double_value(&[]);
        assert!(gap < 1e-6, "{gap}");
    }
    for factor in [-1.0, f64::NAN, f64::INFINITY] {
        let refused = AdamW::new(&vs, 0.0).unwrap().with_lr_factor("head.", factor);
        assert!(matches!(refused, Err(Error::Config { .. })), "{factor}");
    }
}

fn model() -> PetlModel {
    let config = PetlConfig { seed: 5, drop_path: 0.0, ..PetlConfig::new(Method::BitFit, 3) };
    PetlModel::new(small_vit(), &config).unwrap()
}

fn with_factor(head_lr_factor: f64) -> TrainConfig {
    TrainConfig { head_lr_factor, ..train_config(2, 4) }
}

#[test]
fn the_factor_changes_the_rate_of_the_head_alone() {
    let images = bars(12, 16, 0);
    let trained = |config: &TrainConfig, lr: f64| {
        let mut model = model();
        let schedule = move |_, _, _, _| lr;
        let options = FitOptions { schedule: Some(&schedule), ..FitOptions::default() };
        fit_with(&mut model, &images, None, config, options, &mut Silent).unwrap();
        weights(&model)
    };
    let before = weights(&model());
    let moved = |after: &BTreeMap<String, Tensor>| {
        let mut moved = [false; 2];
        for (name, weight) in after {
            moved[usize::from(name.starts_with("head."))] |= !weight.equal(&before[name]);
        }
        moved
    };
    assert_eq!(moved(&trained(&with_factor(0.0), 1e-2)), [true, false]);
    assert_eq!(moved(&trained(&with_factor(1.0), 1e-2)), [true, true]);
    // A rate that is 0 in f32 for the method, and not for the head.
    assert_eq!(moved(&trained(&with_factor(1e58), 1e-60)), [false, true]);
}

#[test]
fn the_factor_is_checked_and_recorded_and_earlier_records_have_none() {
    let images = bars(12, 16, 0);
    for factor in [-0.5, f64::NAN, f64::INFINITY] {
        let error = fit(&mut model(), &images, None, &with_factor(factor), &mut Silent);
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("TrainConfig.head_lr_factor must be finite"), "{error}");
    }
    let mut trained = model();
    let mut sgd = Sgd::default().build(trained.var_store(), 0.1).unwrap();
    let options = FitOptions { optimizer: Some(&mut sgd), ..FitOptions::default() };
    let refused = fit_with(&mut trained, &images, None, &with_factor(2.0), options, &mut Silent);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("head_lr_factor") && refused.contains("optimizer"), "{refused}");

    let config = with_factor(5.0);
    let fit = fit(&mut trained, &images, None, &config, &mut Silent).unwrap();
    let record = RunRecord::new("bars", "small", &trained, &config, &images, fit).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.json");
    record.save(&file).unwrap();
    assert_eq!(RunRecord::load(&file).unwrap().train.head_lr_factor, 5.0);
    let text = std::fs::read_to_string(&file).unwrap();
    let line = text.lines().find(|line| line.contains("head_lr_factor")).unwrap();
    std::fs::write(&file, text.replace(&format!("{line}\n"), "")).unwrap();
    assert_eq!(RunRecord::load(&file).unwrap().train.head_lr_factor, 1.0);
    // A config with one rate is written as before there were two.
    let one = serde_json::to_string(&train_config(2, 4)).unwrap();
    assert!(!one.contains("head_lr_factor"), "{one}");
}

/// Ends a run after so many steps.
struct After(usize);

impl Observer for After {
    fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
        self.0 -= 1;
        if self.0 == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn a_run_with_two_rates_continues_bit_for_bit() {
    let (images, config) = (bars(12, 16, 0), with_factor(5.0));
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = RunCheckpoint { path: folder.path().join("state"), every: 1 };
    let run = |observer: &mut dyn Observer| {
        let mut model = model();
        let options = FitOptions { checkpoint: Some(&checkpoint), ..FitOptions::default() };
        fit_with(&mut model, &images, None, &config, options, observer).unwrap();
        weights(&model)
    };
    run(&mut After(4));
    let continued = run(&mut Silent);
    let mut whole = model();
    fit(&mut whole, &images, None, &config, &mut Silent).unwrap();
    for (name, weight) in weights(&whole) {
        assert!(weight.equal(&continued[&name]), "{name}");
    }
}
