//! The metrics of an evaluation against scikit-learn's, and numbers that are not finite.

use std::ops::ControlFlow;

use convpass::eval::{Evaluation, evaluate};
use convpass::train::{ClassWeights, RunCheckpoint, Silent, fit_resumable};
use convpass::{
    ConvBypassConfig, Error, ImageDataset, Method, Normalization, PetlConfig, PetlModel,
    TrainConfig, fit,
};
use ndarray::Array4;
use serde::Deserialize;
use tch::Tensor;

use crate::support::{small_vit, train_config};

#[derive(Deserialize)]
struct Case {
    classes: i64,
    labels: Vec<i64>,
    logits: Vec<f64>,
    top1: f64,
    top5: Option<f64>,
    balanced_accuracy: f64,
    macro_f1: f64,
    recall: Vec<Option<f64>>,
    ece: f64,
    loss: f64,
}

fn close(name: &str, found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-12, "{name}: {found}, expected {expected}");
}

#[test]
fn metrics_equal_those_of_scikit_learn() {
    let cases: Vec<Case> =
        serde_json::from_str(include_str!("fixtures/metrics/metrics.json")).unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let logits = Tensor::from_slice(&case.logits).view([-1, case.classes]);
        let labels = Tensor::from_slice(&case.labels);
        // In two batches, the second of another size.
        let (images, first) = (labels.size()[0], labels.size()[0] * 2 / 3);
        let mut evaluation = Evaluation::default();
        for (start, length) in [(0, first), (first, images - first)] {
            if length > 0 {
                let part = |t: &Tensor| t.narrow(0, start, length);
                evaluation.add(&part(&logits), &part(&labels)).unwrap();
            }
        }
        let scores = evaluation.scores();
        close("top-1", scores.top1 / 100.0, case.top1);
        assert_eq!(scores.top5.is_some(), case.top5.is_some());
        close("top-5", scores.top5.unwrap_or(0.0) / 100.0, case.top5.unwrap_or(0.0));
        close("balanced", scores.balanced_accuracy / 100.0, case.balanced_accuracy);
        close("macro F1", scores.macro_f1 / 100.0, case.macro_f1);
        close("calibration", scores.ece / 100.0, case.ece);
        close("loss", evaluation.loss(), case.loss);
        assert_eq!(scores.recall.len(), case.recall.len());
        for (found, expected) in scores.recall.iter().zip(&case.recall) {
            assert_eq!(found.is_some(), expected.is_some());
            close("recall", found.unwrap_or(0.0) / 100.0, expected.unwrap_or(0.0));
        }
    }
}

#[test]
fn logits_that_are_not_finite_are_wrong_answers() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let logits = Tensor::from_slice(&[nan, 0.0, 0.0, inf, 1.0, 0.0, nan, nan]).view([4, 2]);
    let mut evaluation = Evaluation::default();
    evaluation.add(&logits, &Tensor::from_slice(&[0i64, 1, 0, 1])).unwrap();
    assert_eq!((evaluation.images, evaluation.correct, evaluation.not_finite), (4, 1, 3));
    assert_eq!(evaluation.scores().recall, [Some(50.0), Some(0.0)]);
    assert!(evaluation.loss().is_nan());
    for (logits, labels) in [
        (Tensor::from_slice(&[0f32, 1.0]).view([1, 2]), Tensor::from_slice(&[2i64])),
        (Tensor::from_slice(&[0f32, 1.0]).view([1, 2]), Tensor::from_slice(&[0i64, 1])),
        (Tensor::from_slice(&[0f32, 1.0, 2.0]).view([1, 3]), Tensor::from_slice(&[0i64])),
        (Tensor::from_slice(&[0f32, 1.0]), Tensor::from_slice(&[0i64, 1])),
    ] {
        let refused = evaluation.add(&logits, &labels).unwrap_err();
        assert!(matches!(refused, Error::Input { .. }), "{refused}");
    }
}

/// Two classes of grey images, of which the first has `few` images and the second `many`.
fn greys(few: usize, many: usize) -> ImageDataset {
    let value = |n: usize| if n < few { 60 } else { 180 } + (n * 7 % 40) as u8;
    let images = Array4::from_shape_fn((few + many, 16, 16, 3), |(n, ..)| value(n));
    let labels = (0..few + many).map(|n| i64::from(n >= few)).collect();
    ImageDataset::from_arrays(images, labels, 2).unwrap()
}

fn model() -> PetlModel {
    let method = Method::ConvBypass(ConvBypassConfig::default());
    PetlModel::new(small_vit(), &PetlConfig { seed: 5, ..PetlConfig::new(method, 2) }).unwrap()
}

#[test]
fn a_run_that_diverges_is_an_error_and_keeps_its_last_good_state() {
    let (images, folder) = (greys(16, 16), tempfile::tempdir().unwrap());
    let mut config = train_config(3, 8);
    config.schedule.lr = 1e30;
    config.schedule.warmup_epochs = 1;
    let path = folder.path().join("state.safetensors");
    let state = RunCheckpoint { path: path.clone(), every: 1 };
    let mut model = model();
    let error = fit_resumable(&mut model, &images, None, &config, &state, &mut Silent).unwrap_err();
    let Error::Diverged { lr, .. } = error else { panic!("{error}") };
    assert!(lr > 1e20, "{error}");
    assert!(error.to_string().contains("lower learning rate"), "{error}");
    let kept = convpass::checkpoint::TensorFile::open(&path).unwrap();
    for name in kept.names() {
        let tensor = kept.tensor(name).unwrap();
        assert!(tensor.isfinite().all().int64_value(&[]) == 1, "{name}");
    }
}

#[test]
fn weights_that_are_not_finite_are_neither_saved_nor_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let (good, bad) = (folder.path().join("good"), folder.path().join("bad"));
    let model = model();
    model.save_adapter(&good).unwrap();
    let name = "blocks.0.adapter_attn.adapter_conv.bias";
    let variable = model.var_store().variables()[name].shallow_clone();
    let _filled = tch::no_grad(|| variable.shallow_clone().fill_(f64::NAN));
    let error = model.save_adapter(&bad).unwrap_err();
    let Error::NotFinite { name: found, count, .. } = &error else { panic!("{error}") };
    assert_eq!((found.as_str(), *count), (name, variable.numel() as i64));
    assert!(!bad.exists());

    // As another program might have written it.
    let file = convpass::checkpoint::TensorFile::open(&good).unwrap();
    let mut bytes = std::fs::read(&good).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    drop(file);
    std::fs::write(&bad, bytes).unwrap();
    let error = PetlModel::load_adapter(small_vit(), &bad).unwrap_err();
    assert!(matches!(error, Error::NotFinite { count: 1, .. }), "{error}");
}

#[test]
fn class_weights_and_smoothing_change_the_loss_as_pytorch_says() {
    let images = greys(4, 28);
    let model = || {
        let method = Method::ConvBypass(ConvBypassConfig::default());
        let config = PetlConfig { drop_path: 0.0, ..PetlConfig::new(method, 2) };
        PetlModel::new(small_vit(), &config).unwrap()
    };
    let loss = |change: &dyn Fn(&mut TrainConfig)| {
        let mut config = train_config(1, 32);
        config.schedule.lr = 0.0;
        config.schedule.min_lr = 0.0;
        config.schedule.warmup_lr = 0.0;
        change(&mut config);
        let mut model = model();
        let run = fit(&mut model, &images, None, &config, &mut Silent).unwrap();
        run.epochs[0].loss
    };
    let untrained = model();
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let mean = |set: &ImageDataset, go_on: &mut dyn FnMut(usize, usize) -> ControlFlow<()>| {
        evaluate(&untrained, set, Normalization::Half, 32, go_on).unwrap().loss()
    };
    let (few, many) = (mean(&single(&images, 0), go_on), mean(&single(&images, 1), go_on));
    let equal = loss(&|_| {});
    assert!((equal - (4.0 * few + 28.0 * many) / 32.0).abs() < 1e-5);
    let balanced = loss(&|config| config.class_weights = ClassWeights::Balanced);
    assert!((balanced - (few + many) / 2.0).abs() < 1e-5, "{balanced} {few} {many}");
    let given = |weights: Vec<f64>| {
        move |config: &mut TrainConfig| config.class_weights = ClassWeights::Given(weights.clone())
    };
    let first = loss(&given(vec![2.0, 0.0]));
    assert!((first - few).abs() < 1e-5);
    // In parts of a batch, the parts have unequal shares.
    let parts = loss(&|config| {
        config.class_weights = ClassWeights::Balanced;
        config.micro_batch_size = Some(5);
    });
    assert!((parts - balanced).abs() < 1e-5, "{parts} {balanced}");
    let smooth = loss(&|config| config.label_smoothing = 0.2);
    assert!((smooth - equal).abs() > 1e-4);
    for wrong in [vec![1.0], vec![0.0, 0.0], vec![-1.0, 1.0], vec![f64::NAN, 1.0]] {
        let mut config = train_config(1, 32);
        given(wrong)(&mut config);
        let refused = fit(&mut model(), &images, None, &config, &mut Silent).unwrap_err();
        assert!(matches!(refused, Error::Config { .. }), "{refused}");
    }
}

/// The images of one class.
fn single(set: &ImageDataset, class: i64) -> ImageDataset {
    let chosen: Vec<usize> = (0..set.len()).filter(|&n| set.labels()[n] == class).collect();
    let images = set.images().unwrap().select(ndarray::Axis(0), &chosen);
    ImageDataset::from_arrays(images, vec![class; chosen.len()], 2).unwrap()
}
