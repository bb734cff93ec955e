//! What a run promises: it learns, repeats bit for bit, selects as asked, and ends when told to.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use convpass::data::{BatchConfig, Batches, Order, PartialBatch};
use convpass::eval::{PrefixCache, evaluate};
use convpass::petl::ConvBypassVariant;
use convpass::train::{
    ClassWeights, CosineSchedule, Fit, FitOptions, Observer, RunCheckpoint, RunRecord, Selection,
    Silent, StepReport, fit_with,
};
use convpass::{
    Autocast, ConvBypassConfig, Error, ImageDataset, Method, Normalization, PetlConfig, PetlModel,
    TrainConfig, fit,
};
use ndarray::Array4;
use tch::nn::{OptimizerConfig, Sgd};
use tch::{Kind, Tensor, nn};

use crate::child;
use crate::support::{device, limit, small_vit, train_config, weights};

/// Two classes of 16x16 images: bright in the left half or in the right one.
fn halves(count: usize) -> ImageDataset {
    let images = Array4::from_shape_fn((count, 16, 16, 3), |(n, row, column, channel)| {
        let lit = (column < 8) == (n % 2 == 0);
        let noise = ((n * 31 + row * 17 + column * 7 + channel * 3) % 64) as u8;
        if lit { 160 + noise } else { noise }
    });
    let labels = (0..count).map(|n| (n % 2) as i64).collect();
    ImageDataset::from_arrays(images, labels, 2).unwrap()
}

fn model(method: Method) -> PetlModel {
    let backbone = small_vit();
    PetlModel::new(backbone, &PetlConfig { seed: 5, ..PetlConfig::new(method, 2) }).unwrap()
}

fn bypass() -> Method {
    Method::ConvBypass(ConvBypassConfig::default())
}

fn config(epochs: usize) -> TrainConfig {
    train_config(epochs, 8)
}

#[test]
fn every_method_learns_beside_an_unchanged_backbone() {
    let (train, test) = (halves(40), halves(20));
    for method in [Method::LinearProbe, bypass(), Method::Full] {
        let mut model = model(method.clone());
        let digest = model.backbone().digest();
        let run = fit(&mut model, &train, None, &config(10), &mut Silent).unwrap();
        assert_eq!(model.backbone().digest(), digest);
        assert_eq!((run.epochs.len(), run.selected_epoch, run.stopped), (10, Some(9), false));
        assert!(run.epochs[9].loss < run.epochs[0].loss);
        let go_on = &mut |_, _| ControlFlow::Continue(());
        let sums = evaluate(&model, &test, Normalization::Half, 7, go_on).unwrap();
        assert_eq!((sums.images, sums.correct), (20, (sums.top1() / 5.0).round() as usize));
    }
}

/// Each run is a process of its own: dropout and drop path draw from libtorch's one generator,
/// which the tests of this process share.
#[test]
fn a_seed_repeats_a_run_byte_for_byte() {
    const OUT: &str = "CONVPASS_TEST_RUN_TO";
    if let Some(out) = std::env::var_os(OUT) {
        // On several threads MKL promises no bits.
        tch::set_num_threads(1);
        let mut model = model(bypass());
        fit(&mut model, &halves(40), None, &config(3), &mut Silent).unwrap();
        return model.save_adapter(out).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str| {
        let out = folder.path().join(name);
        let status = child::test("training::a_seed_repeats_a_run_byte_for_byte")
            .env(OUT, &out)
            .status()
            .unwrap();
        assert!(status.success());
        std::fs::read(out).unwrap()
    };
    assert!(run("first") == run("second"));
}

/// Bypasses in the second of two blocks alone, and no dropout: a run draws nothing.
fn last_block() -> PetlModel {
    let bypass = ConvBypassConfig { dropout: 0.0, ..Default::default() };
    let method = ConvBypassVariant { blocks: Some(vec![0, 8]), ..bypass.into() };
    let model = model(Method::ConvBypassVariant(method));
    let config = PetlConfig { drop_path: 0.0, ..model.config().clone() };
    PetlModel::new(model.backbone().clone(), &config).unwrap()
}

#[test]
fn frozen_blocks_run_once_where_their_tokens_are_kept() {
    let (train, folder) = (halves(40), tempfile::tempdir().unwrap());
    let run = |config: TrainConfig| {
        let mut model = last_block();
        assert_eq!(model.frozen_blocks(), Some(1));
        fit(&mut model, &train, None, &config, &mut Silent).unwrap();
        weights(&model)
    };
    let kept = |folder: Option<&Path>, bf16| {
        let prefix = PrefixCache { folder: folder.map(Path::to_path_buf), bf16 };
        TrainConfig { prefix: Some(prefix), ..config(3) }
    };
    let whole = run(config(3));
    let gap = |found: &BTreeMap<String, Tensor>| gap(&whole, found);
    let files = || {
        let files = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap());
        files
            .map(|f| (f.file_name(), f.metadata().unwrap().modified().unwrap()))
            .collect::<Vec<_>>()
    };
    let in_memory = run(kept(None, false));
    assert!(gap(&in_memory) < limit(1e-4), "{}", gap(&in_memory));
    let rounded = gap(&run(kept(None, true)));
    assert!(rounded > 0.0 && rounded < 0.1, "{rounded}");
    assert_eq!(run(TrainConfig { recompute: true, ..kept(None, false) }), in_memory);

    assert_eq!(run(kept(Some(folder.path()), false)), in_memory);
    let first = files();
    assert_eq!(first.len(), 1);
    assert_eq!(run(kept(Some(folder.path()), false)), in_memory);
    assert_eq!(files(), first, "found again");
    // Another normalization and other pixels are other files; a cut one is made anew.
    let unit = Normalization::Unit;
    run(TrainConfig { normalization: unit, ..kept(Some(folder.path()), false) });
    assert_eq!(files().len(), 2);
    fit(&mut last_block(), &halves(41), None, &kept(Some(folder.path()), false), &mut Silent)
        .unwrap();
    assert_eq!(files().len(), 3);
    std::fs::write(folder.path().join(&first[0].0), [0; 10]).unwrap();
    assert_eq!(run(kept(Some(folder.path()), false)), in_memory);
    let nowhere = kept(Some(&folder.path().join(&first[0].0)), false);
    let error = fit(&mut last_block(), &train, None, &nowhere, &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn the_best_epoch_on_validation_is_kept() {
    let (train, val) = (halves(40), halves(20));
    let config = TrainConfig { selection: Selection::BestOnValidation, ..config(6) };
    let mut chosen = model(bypass());
    let run: Fit = fit(&mut chosen, &train, Some(&val), &config, &mut Silent).unwrap();
    let top1s: Vec<f64> = run.epochs.iter().map(|epoch| epoch.val_top1.unwrap()).collect();
    let best = top1s.iter().copied().fold(0.0, f64::max);
    let first_best = top1s.iter().position(|&top1| top1 == best).unwrap();
    assert_eq!(run.selected_epoch, Some(first_best));
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let again = evaluate(&chosen, &val, Normalization::Half, 8, go_on).unwrap();
    assert_eq!(again.top1(), best);
}

#[test]
fn validation_comes_as_often_as_asked_and_after_the_last_epoch() {
    let (train, val) = (halves(16), halves(8));
    let run = |validate_every| {
        let config = TrainConfig { validate_every, ..config(5) };
        // Without a draw: libtorch's generator is the whole process's.
        let mut model = last_block();
        let run = fit(&mut model, &train, Some(&val), &config, &mut Silent).unwrap();
        let seen: Vec<bool> = run.epochs.iter().map(|epoch| epoch.val_top1.is_some()).collect();
        (seen, weights(&model))
    };
    let (every, second) = (run(1), run(2));
    assert_eq!(every.0, [true; 5]);
    assert_eq!(second.0, [false, true, false, true, true]);
    assert_eq!(run(100).0, [false, false, false, false, true]);
    assert_eq!(every.1, second.1, "looking changes no weight");
    let config = TrainConfig { validate_every: 0, ..config(5) };
    let error = fit(&mut model(bypass()), &train, None, &config, &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error}");
}

/// Ends the run in the middle of its second epoch.
struct StopInSecondEpoch;

impl Observer for StopInSecondEpoch {
    fn step(&mut self, step: &StepReport) -> ControlFlow<()> {
        match (step.epoch, step.step) {
            (1, 2) => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

#[test]
fn an_observer_ends_a_run_and_the_weights_stay() {
    let (mut stopped, train) = (model(bypass()), halves(40));
    let before = weights(&stopped);
    let run = fit(&mut stopped, &train, None, &config(6), &mut StopInSecondEpoch).unwrap();
    assert_eq!((run.epochs.len(), run.selected_epoch, run.stopped), (1, None, true));
    assert_ne!(weights(&stopped), before);
}

#[test]
fn runs_that_cannot_be_are_refused() {
    let (train, mut model) = (halves(4), model(bypass()));
    let mut refused = |config: TrainConfig, train: &ImageDataset| {
        let error = fit(&mut model, train, None, &config, &mut Silent).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{error}");
    };
    refused(config(1), &train);
    refused(TrainConfig { batch_size: 0, ..config(1) }, &train);
    refused(TrainConfig { batch_size: 1, accumulate: 0, ..config(1) }, &train);
    let train = halves(8);
    refused(TrainConfig { selection: Selection::BestOnValidation, ..config(1) }, &train);
    refused(TrainConfig { weight_decay: f64::NAN, ..config(1) }, &train);
    let schedule = CosineSchedule { lr: -1.0, ..CosineSchedule::default() };
    refused(TrainConfig { schedule, ..config(1) }, &train);
    let images = Array4::zeros((8, 16, 16, 3));
    let three = ImageDataset::from_arrays(images, vec![2; 8], 3).unwrap();
    refused(config(1), &three);

    let small = ImageDataset::from_arrays(Array4::zeros((8, 8, 8, 3)), vec![0; 8], 2).unwrap();
    let error = fit(&mut model, &small, None, &config(1), &mut Silent).unwrap_err();
    assert!(matches!(error, Error::Input { .. }), "{error}");
}

#[test]
fn a_prefix_kept_under_autocast_is_not_taken_without() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = Some(PrefixCache { folder: Some(folder.path().to_path_buf()), bf16: false });
    let config = TrainConfig { prefix, ..config(1) };
    let kept = || {
        let petl = PetlConfig { drop_path: 0.0, ..PetlConfig::new(bypass(), 2) };
        let mut model = PetlModel::new(small_vit(), &petl).unwrap();
        fit(&mut model, &halves(16), None, &config, &mut Silent).unwrap();
        std::fs::read_dir(folder.path()).unwrap().count()
    };
    assert_eq!([kept(), kept()], [1, 1]);
    let _guard = Autocast::enter(device(), Kind::BFloat16).unwrap();
    assert_eq!([kept(), kept()], [2, 2]);
}

#[test]
fn a_record_is_read_back_as_it_was_written() {
    let mut model = model(Method::LinearProbe);
    let train = halves(16);
    let config = config(2);
    let fit = fit(&mut model, &train, None, &config, &mut Silent).unwrap();
    let record = RunRecord {
        version: "0.1.0".into(),
        task: "halves".into(),
        model: model.config().clone(),
        train: config,
        backbone: "random".into(),
        backbone_digest: model.backbone().digest(),
        precision: None,
        image_size: Some(train.image_size()),
        test_shorter_side: None,
        shots: None,
        train_split: train.split_hash().to_owned(),
        val_split: None,
        test_split: None,
        cross_validation: None,
        head_digest: None,
        adapter_digest: None,
        trainable_params: model.trainable_params(),
        fit,
        test_top1: Some(100.0),
        test: None,
        best_on_test: None,
        test_seconds: None,
        peak_rss_mb: convpass::train::peak_rss_mb(),
        images: convpass::train::ImagesRecord::default(),
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.json");
    record.save(&path).unwrap();
    assert_eq!(RunRecord::load(&path).unwrap(), record);
    std::fs::write(&path, "{\"version\": 1").unwrap();
    assert!(matches!(RunRecord::load(&path).unwrap_err(), Error::CorruptFile { .. }));
    let missing = RunRecord::load(folder.path().join("none.json")).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }));
}

/// Trains a linear probe, whose run draws nothing, and returns its weights.
fn probe(config: &TrainConfig, options: FitOptions) -> BTreeMap<String, Tensor> {
    let mut model = model(Method::LinearProbe);
    fit_with(&mut model, &halves(40), None, config, options, &mut Silent).unwrap();
    weights(&model)
}

fn gap(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) -> f64 {
    let gaps = a.iter().map(|(name, value)| (value - &b[name]).abs().max().double_value(&[]));
    gaps.fold(0.0, f64::max)
}

#[test]
fn parts_of_a_batch_add_up_to_the_batch() {
    let whole = probe(&config(3), FitOptions::default());
    for size in [1, 3, 8, 100] {
        let parts = TrainConfig { micro_batch_size: Some(size), ..config(3) };
        let found = gap(&probe(&parts, FitOptions::default()), &whole);
        assert!(found < limit(1e-5), "parts of {size}: {found}");
    }
    // Through the blocks too, with recompute and from the kept prefix.
    for recompute in [false, true] {
        let run = |micro_batch_size, prefix| {
            let mut model = last_block();
            let config = TrainConfig { micro_batch_size, recompute, prefix, ..self::config(2) };
            fit(&mut model, &halves(40), None, &config, &mut Silent).unwrap();
            weights(&model)
        };
        for prefix in [None, Some(PrefixCache { folder: None, bf16: false })] {
            let found = gap(&run(Some(3), prefix.clone()), &run(None, prefix));
            assert!(found < limit(2e-4), "recompute {recompute}: {found}");
        }
    }
}

#[test]
fn batches_of_a_step_add_up_to_one_batch() {
    let whole = probe(&config(3), FitOptions::default());
    let halves = TrainConfig { batch_size: 4, accumulate: 2, ..config(3) };
    let found = gap(&probe(&halves, FitOptions::default()), &whole);
    assert!(found < limit(1e-5), "{found}");
    // With parts of batches too.
    let parts = TrainConfig { micro_batch_size: Some(3), ..halves };
    let found = gap(&probe(&parts, FitOptions::default()), &whole);
    assert!(found < limit(1e-5), "{found}");
    // Records of earlier versions have no such field, and records without it do not change.
    let text = serde_json::to_string(&config(1)).unwrap();
    assert!(!text.contains("accumulate"), "{text}");
    assert_eq!(serde_json::from_str::<TrainConfig>(&text).unwrap(), config(1));
}

/// 40 images are 13 batches of 3 and one that is left out: steps of 12, 12, 12 and 3 images.
#[test]
fn a_last_step_with_fewer_batches_has_the_mean_of_its_images() {
    let weights_of_classes = vec![1.0, 3.0];
    let config = TrainConfig {
        batch_size: 3,
        accumulate: 4,
        class_weights: ClassWeights::Given(weights_of_classes.clone()),
        ..config(1)
    };
    let images = halves(40);
    let mut found = model(Method::LinearProbe);
    let mut sgd = Sgd::default().build(found.var_store(), 0.1).unwrap();
    let schedule = |_: usize, _: usize, _: usize, steps: usize| 0.1 * steps as f64;
    let options = FitOptions {
        optimizer: Some(&mut sgd),
        schedule: Some(&schedule),
        ..FitOptions::default()
    };
    fit_with(&mut found, &images, None, &config, options, &mut Silent).unwrap();

    let model = model(Method::LinearProbe);
    let mut sgd = Sgd::default().build(model.var_store(), 0.4).unwrap();
    let order = BatchConfig {
        batch_size: 12,
        partial: PartialBatch::Keep,
        order: Order::Shuffled { seed: config.seed, epoch: 0 },
        normalization: config.normalization,
        device: device(),
    };
    let class_weights =
        Tensor::from_slice(&weights_of_classes).to_device(device()).to_kind(Kind::Float);
    for (step, batch) in Batches::new(&images, order).unwrap().enumerate() {
        let (batch, labels) = batch.unwrap();
        let used = if step == 3 { 3 } else { 12 };
        let (batch, labels) = (batch.narrow(0, 0, used), labels.narrow(0, 0, used));
        let logits = model.forward(&batch, false).unwrap();
        let mean = tch::Reduction::Mean;
        let loss = logits.cross_entropy_loss(&labels, Some(&class_weights), mean, -100, 0.0);
        sgd.backward_step(&loss);
    }
    let gap = gap(&weights(&found), &weights(&model));
    assert!(gap < limit(1e-5), "{gap}");
}

#[test]
fn gradients_beyond_the_norm_are_scaled_down() {
    let with = |max_grad_norm| {
        let config = TrainConfig { max_grad_norm, ..config(1) };
        let model = model(Method::LinearProbe);
        let mut sgd = Sgd::default().build(model.var_store(), 0.1).unwrap();
        let mut model = model;
        let mut steps = Vec::new();
        let mut before = weights(&model);
        let options = FitOptions {
            optimizer: Some(&mut sgd),
            schedule: Some(&|_, _, _, _| 1.0),
            ..FitOptions::default()
        };
        fit_with(&mut model, &halves(8), None, &config, options, &mut Silent).unwrap();
        for (name, value) in weights(&model) {
            let before = before.remove(&name).unwrap();
            steps.push((value - before).square().sum(Kind::Double).double_value(&[]));
        }
        steps.iter().sum::<f64>().sqrt()
    };
    let free = with(None);
    assert!(free > 0.02, "{free}");
    assert!((with(Some(0.01)) - 0.01).abs() < 1e-6);
    assert!((with(Some(100.0)) - free).abs() < 1e-9);
    for limit in [0.0, f64::NAN] {
        let config = TrainConfig { max_grad_norm: Some(limit), ..config(1) };
        let mut model = model(Method::LinearProbe);
        let error = fit(&mut model, &halves(8), None, &config, &mut Silent).unwrap_err();
        assert!(error.to_string().contains("max_grad_norm"), "{error}");
    }
}

#[test]
fn an_optimizer_and_a_schedule_of_the_callers() {
    let plain = probe(&config(2), FitOptions::default());
    // The same rule handed in is the same run.
    let schedule = config(2).schedule;
    let own = FitOptions { schedule: Some(&schedule), ..FitOptions::default() };
    assert_eq!(gap(&probe(&config(2), own), &plain), 0.0);
    let constant = FitOptions { schedule: Some(&|_, _, _, _| 0.0), ..FitOptions::default() };
    assert_eq!(gap(&probe(&config(2), constant), &weights(&model(Method::LinearProbe))), 0.0);
    // tch's AdamW moves the weights alike, but its state cannot be stored.
    let mut model = model(Method::LinearProbe);
    let adamw = nn::AdamW { wd: 1e-4, ..nn::AdamW::default() };
    let mut optimizer = adamw.build(model.var_store(), 1e-3).unwrap();
    let options = FitOptions { optimizer: Some(&mut optimizer), ..FitOptions::default() };
    fit_with(&mut model, &halves(40), None, &config(2), options, &mut Silent).unwrap();
    assert!(gap(&weights(&model), &plain) < limit(1e-5));
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = RunCheckpoint { path: folder.path().join("state"), every: 1 };
    let options = FitOptions {
        optimizer: Some(&mut optimizer),
        checkpoint: Some(&checkpoint),
        ..FitOptions::default()
    };
    let error = fit_with(&mut model, &halves(40), None, &config(2), options, &mut Silent);
    assert!(matches!(error, Err(Error::Input { argument: "optimizer", .. })), "{error:?}");
    assert!(!checkpoint.path.exists());
}
