//! A training step that a GPU replays trains what the step itself trains. On a machine without one
//! the same tests show that the flag is refused.

use std::collections::BTreeMap;

use convpass::petl::{AdaptFormerConfig, FactConfig, LoraConfig, VptConfig};
use convpass::train::{Fit, Selection, Silent};
use convpass::{
    Autocast, ConvBypassConfig, Error, Method, PetlConfig, PetlModel, Result, TrainConfig, fit,
};
use tch::{Device, Kind, Tensor};

use crate::resume::bars;
use crate::support::{device, small_vit, small_vit_on, train_config, weights};

fn bypass(dropout: f64) -> Method {
    Method::ConvBypass(ConvBypassConfig { dropout, ..Default::default() })
}

/// Methods without a bias of the keys, whose gradient is rounding alone: AdamW makes whole steps of
/// it, and two runs on a GPU need not round alike.
fn methods() -> [Method; 7] {
    [
        bypass(0.0),
        Method::LinearProbe,
        Method::LayerNorm,
        Method::AdaptFormer(AdaptFormerConfig { dropout: 0.0, ..Default::default() }),
        Method::Lora(LoraConfig::default()),
        Method::Fact(FactConfig { dropout: 0.0, ..Default::default() }),
        Method::Vpt(VptConfig { dropout: 0.0, ..Default::default() }),
    ]
}

fn model(method: Method) -> PetlModel {
    let config = PetlConfig { seed: 5, drop_path: 0.0, ..PetlConfig::new(method, 3) };
    PetlModel::new(small_vit(), &config).unwrap()
}

/// Three epochs of three steps, with validation, clipping and a last partial batch.
fn config(cuda_graph: bool) -> TrainConfig {
    TrainConfig {
        cuda_graph,
        max_grad_norm: Some(0.3),
        selection: Selection::BestOnValidation,
        ..train_config(3, 4)
    }
}

fn run(model: &mut PetlModel, config: &TrainConfig) -> Result<Fit> {
    fit(model, &bars(14, 16, 0), Some(&bars(9, 16, 1)), config, &mut Silent)
}

/// The largest difference of a weight, relative to the norm of the weight.
fn gap(found: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) -> f64 {
    let norm = |tensor: &Tensor| tensor.to_kind(Kind::Double).norm().double_value(&[]);
    let gaps = expected
        .iter()
        .map(|(name, weight)| norm(&(&found[name] - weight)) / norm(weight).max(f64::MIN_POSITIVE));
    gaps.fold(0.0, f64::max)
}

/// Trains with and without the graph where there is a GPU, and expects the weights within `limit`
/// of each other; expects the refusal elsewhere.
fn trains_alike(method: &Method, change: &dyn Fn(&mut TrainConfig), limit: f64) {
    let mut with_graph = config(true);
    change(&mut with_graph);
    let mut captured = model(method.clone());
    let start = weights(&captured);
    let found = run(&mut captured, &with_graph);
    if !matches!(device(), Device::Cuda(_)) {
        assert_refused(found);
        return assert_eq!(weights(&captured), start);
    }
    let mut plain = model(method.clone());
    let expected = run(&mut plain, &TrainConfig { cuda_graph: false, ..with_graph }).unwrap();
    let (found, name) = (found.unwrap(), method.name());
    let gap = gap(&weights(&captured), &weights(&plain));
    assert!(gap <= limit, "{name}: {gap:e}");
    assert_ne!(weights(&captured), start, "{name}: nothing was learnt");
    assert_eq!(found.selected_epoch, expected.selected_epoch, "{name}");
    for (found, expected) in found.epochs.iter().zip(&expected.epochs) {
        assert!((found.loss - expected.loss).abs() <= limit * expected.loss, "{name}");
    }
}

fn assert_refused(found: Result<Fit>) {
    let refused = found.unwrap_err();
    let Error::Config { config: Some("TrainConfig"), field, expected, found, .. } = &refused else {
        panic!("{refused}");
    };
    assert_eq!(field, "cuda_graph");
    assert_eq!(expected, "false for a model that is not on a CUDA device");
    assert!(found.starts_with("a model on "), "{found}");
}

#[test]
fn replays_train_the_same_weights() {
    for method in methods() {
        trains_alike(&method, &|_| {}, 1e-5);
    }
}

#[test]
fn replays_train_the_same_weights_with_weighted_classes_and_without_clipping() {
    let change = |config: &mut TrainConfig| {
        config.max_grad_norm = None;
        config.label_smoothing = 0.1;
        config.class_weights = convpass::train::ClassWeights::Balanced;
    };
    trains_alike(&bypass(0.0), &change, 1e-5);
}

#[test]
fn replays_train_under_autocast() {
    let _guard = (device() != Device::Cpu)
        .then(|| Autocast::enter(device(), Kind::BFloat16))
        .and_then(Result::ok);
    trains_alike(&bypass(0.0), &|_| {}, 1e-2);
}

/// A graph belongs to one run: a second one on the same model captures its own.
#[test]
fn a_model_can_be_trained_again() {
    if !matches!(device(), Device::Cuda(_)) {
        return assert_refused(run(&mut model(bypass(0.0)), &config(true)));
    }
    let trained = |cuda_graph| {
        let mut model = model(bypass(0.0));
        run(&mut model, &config(cuda_graph)).unwrap();
        run(&mut model, &config(cuda_graph)).unwrap();
        weights(&model)
    };
    let gap = gap(&trained(true), &trained(false));
    assert!(gap <= 1e-5, "{gap:e}");
}

/// What stands in the way of a graph is named wherever the test runs.
#[test]
fn a_step_that_cannot_be_captured_is_refused() {
    let refused =
        |model: &mut PetlModel, config: TrainConfig| run(model, &config).unwrap_err().to_string();
    for (config, expected) in [
        (
            TrainConfig { accumulate: 2, ..config(true) },
            "TrainConfig.accumulate must be 1 with cuda_graph, found 2",
        ),
        (
            TrainConfig { recompute: true, ..config(true) },
            "TrainConfig.recompute must be false with cuda_graph, found true",
        ),
    ] {
        assert_eq!(refused(&mut model(bypass(0.0)), config), expected);
    }
    let settings = PetlConfig { drop_path: 0.1, ..PetlConfig::new(bypass(0.0), 3) };
    let mut dropping = PetlModel::new(small_vit(), &settings).unwrap();
    let text = refused(&mut dropping, config(true));
    assert!(text.starts_with("PetlConfig.drop_path must be 0 with cuda_graph"), "{text}");
    let on_cpu = PetlConfig { drop_path: 0.0, ..PetlConfig::new(bypass(0.0), 3) };
    let mut on_cpu = PetlModel::new(small_vit_on(Device::Cpu), &on_cpu).unwrap();
    assert_refused(run(&mut on_cpu, &config(true)));
    // A draw of the method is found by the first pass, so it takes a GPU to get there.
    if matches!(device(), Device::Cuda(_)) {
        let text = refused(&mut model(bypass(0.1)), config(true));
        assert!(text.starts_with("dropout must be 0 with cuda_graph"), "{text}");
    }
}
