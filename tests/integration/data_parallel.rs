//! A run in several processes has the result of a run in one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use convpass::backbone::SwinConfig;
use convpass::data::Augment;
use convpass::distributed::ProcessGroup;
use convpass::eval::{PrefixCache, evaluate, evaluate_in};
use convpass::petl::{AdaptFormerConfig, AdapterConfig, FactConfig, RepAdapterConfig, VptConfig};
use convpass::train::{
    ClassWeights, FitOptions, Observer, RunCheckpoint, Selection, Silent, StepReport, fit_with,
};
use convpass::{
    AnyBackbone, ConvBypassConfig, FrozenSwin, ImageDataset, LoraConfig, Method, PetlConfig,
    PetlModel, TrainConfig,
};
use tch::{Device, Tensor};

use crate::resume::{bars, in_last_block};
use crate::support::{small_vit_on, train_config, weights};
use crate::team::{Team, is_member, said, say};

/// The settings of a run.
struct Case {
    name: &'static str,
    method: Method,
    drop_path: f64,
    config: TrainConfig,
    swin: bool,
}

impl Case {
    fn new(name: &'static str, method: Method, drop_path: f64, config: TrainConfig) -> Self {
        Case { name, method, drop_path, config, swin: false }
    }
}

fn bypass(dropout: f64) -> Method {
    Method::ConvBypass(ConvBypassConfig { dropout, ..ConvBypassConfig::default() })
}

/// Every way to draw, to read and to sum.
fn cases() -> Vec<Case> {
    let config = || train_config(2, 7);
    let best = TrainConfig {
        selection: Selection::BestOnValidation,
        class_weights: ClassWeights::Balanced,
        label_smoothing: 0.1,
        ..config()
    };
    let parts = TrainConfig { micro_batch_size: Some(4), accumulate: 2, ..config() };
    let clipped = TrainConfig { max_grad_norm: Some(0.5), recompute: true, ..config() };
    let prefix = TrainConfig { prefix: Some(PrefixCache::default()), ..config() };
    let augment = TrainConfig { augment: Some(Augment::few_shot()), ..config() };
    // In most steps no process, or one alone, has a sample that is kept.
    let sparse = train_config(2, 3);
    let adapter = AdapterConfig { dropout: 0.3, ..Default::default() };
    let prompts = VptConfig { dropout: 0.3, ..Default::default() };
    let fact = FactConfig { dropout: 0.3, ..Default::default() };
    let rep = RepAdapterConfig { dropout: 0.3, ..Default::default() };
    let lora = LoraConfig { rank: 2, ..Default::default() };
    let beside = AdaptFormerConfig { dropout: 0.3, ..Default::default() };
    let both = vec![Method::Lora(lora), Method::AdaptFormer(beside)];
    vec![
        Case::new("bypass", bypass(0.2), 0.3, best),
        Case::new("parts of batches", bypass(0.1), 0.2, parts),
        Case::new("drop path of 0.95", bypass(0.1), 0.95, sparse),
        Case::new("probe", Method::LinearProbe, 0.0, config()),
        Case::new("kept prefix", in_last_block(2, 0.2), 0.2, prefix),
        Case::new("adapter, computed twice", Method::Adapter(adapter), 0.3, clipped),
        Case::new("prompts", Method::Vpt(prompts), 0.3, augment),
        Case::new("fact", Method::Fact(fact), 0.3, config()),
        Case::new("two methods", Method::Compose { methods: both }, 0.3, config()),
        Case { swin: true, ..Case::new("windows", Method::RepAdapter(rep), 0.3, config()) },
    ]
}

fn model(case: &Case) -> PetlModel<AnyBackbone> {
    let backbone = if case.swin {
        let config = SwinConfig {
            image_size: (16, 16),
            patch_size: 2,
            embed_dim: 16,
            depths: vec![2, 2],
            num_heads: vec![2, 4],
            window_sizes: vec![(4, 4), (4, 4)],
            ..SwinConfig::default()
        };
        FrozenSwin::random(&config, 3, Device::Cpu).unwrap().into()
    } else {
        small_vit_on(Device::Cpu).into()
    };
    let config = PetlConfig {
        seed: 5,
        drop_path: case.drop_path,
        ..PetlConfig::new(case.method.clone(), 3)
    };
    PetlModel::new(backbone, &config).unwrap()
}

fn connect() -> ProcessGroup {
    let group = ProcessGroup::from_env(Device::Cpu, Duration::from_secs(240));
    group.unwrap().expect("the variables are set")
}

/// Runs a case of the test `name` in `size` processes.
fn all_succeed(name: &str, folder: &Path, case: &str, size: usize) {
    let team = Team::start(name, folder, case, size, |_| true);
    let outcomes = team.wait(Duration::from_secs(480), |_| true);
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let log = std::fs::read_to_string(folder.join(format!("{rank}.log"))).unwrap();
        assert!(outcome, "rank {rank} of {size}: {log}");
    }
}

fn images() -> (ImageDataset, ImageDataset) {
    (bars(31, 16, 0), bars(10, 16, 1))
}

/// Runs every case, alone without a group, and writes the results.
fn member(folder: &Path, group: Option<&ProcessGroup>) {
    tch::set_num_threads(1);
    let (train, val) = images();
    let mut report = String::new();
    for case in cases() {
        let mut model = model(&case);
        let options = FitOptions { group, ..FitOptions::default() };
        let fit = fit_with(&mut model, &train, Some(&val), &case.config, options, &mut Silent);
        let fit = fit.unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let all = &mut |_, _| ControlFlow::Continue(());
        let normalization = case.config.normalization;
        let test = match group {
            Some(group) => evaluate_in(group, &model, &val, normalization, 4, all),
            None => evaluate(&model, &val, normalization, 4, all),
        };
        let test = test.unwrap();
        let counts = (test.images, test.correct, test.recall());
        let losses: Vec<String> =
            fit.epochs.iter().map(|epoch| format!("{:.4}", epoch.loss)).collect();
        let hits: Vec<_> = fit.epochs.iter().map(|e| (e.accuracy, e.val_top1)).collect();
        writeln!(report, "{} {counts:?} {losses:?} {hits:?}", case.name).unwrap();
        if group.is_none_or(|group| group.rank() == 0) {
            let weights: Vec<(String, Tensor)> = weights(&model).into_iter().collect();
            Tensor::write_safetensors(&weights, folder.join(case.name)).unwrap();
        }
    }
    say(folder, group.map_or(0, ProcessGroup::rank), &report);
}

#[test]
fn several_processes_train_what_one_trains() {
    if let Some((folder, case)) = is_member() {
        let group = (case != "alone").then(connect);
        return member(&folder, group.as_ref());
    }
    let run = |size: usize| {
        let folder = tempfile::tempdir().unwrap();
        let case = if size == 1 { "alone" } else { "together" };
        let name = "data_parallel::several_processes_train_what_one_trains";
        all_succeed(name, folder.path(), case, size);
        folder
    };
    let alone = run(1);
    for size in [2, 3] {
        let together = run(size);
        for rank in 0..size {
            assert_eq!(said(together.path(), rank), said(alone.path(), 0), "rank {rank} of {size}");
        }
        for case in cases() {
            let read = |folder: &Path| -> BTreeMap<String, Tensor> {
                Tensor::read_safetensors(folder.join(case.name)).unwrap().into_iter().collect()
            };
            let found = read(together.path());
            for (name, expected) in read(alone.path()) {
                let found = &found[&name];
                // Relative to the whole tensor: AdamW makes a step of a gradient near 0, whatever its
                // size, so that single elements are further apart.
                let off = (found - &expected).norm().double_value(&[]);
                let off = off / expected.norm().double_value(&[]).max(1e-3);
                assert!(off <= 1e-5, "{} of {size}: {name}: {off:e}", case.name);
            }
        }
    }
}

/// Asks to end the run after some steps.
struct StopAfter(usize);

impl Observer for StopAfter {
    fn step(&mut self, _: &StepReport) -> ControlFlow<()> {
        self.0 = self.0.saturating_sub(1);
        if self.0 == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// A run that keeps its state in the folder; rank 1 asks to end it after `stop` steps.
fn resumable(folder: &Path, stop: usize) {
    tch::set_num_threads(1);
    let group = connect();
    let best = TrainConfig { selection: Selection::BestOnValidation, ..train_config(3, 7) };
    let case = Case::new("bypass", bypass(0.2), 0.3, best);
    let (train, val) = images();
    let mut model = model(&case);
    let checkpoint = RunCheckpoint { path: folder.join("run.state"), every: 2 };
    let options =
        FitOptions { group: Some(&group), checkpoint: Some(&checkpoint), ..FitOptions::default() };
    let mut observer = StopAfter(if group.rank() == 1 { stop } else { usize::MAX });
    let fit = fit_with(&mut model, &train, Some(&val), &case.config, options, &mut observer);
    let fit = fit.unwrap();
    say(folder, group.rank(), &format!("{} {}", fit.stopped, fit.epochs.len()));
    if group.rank() == 0 {
        model.save_adapter(folder.join("adapter.safetensors")).unwrap();
    }
}

#[test]
fn a_run_that_one_process_ends_goes_on_in_all() {
    if let Some((folder, case)) = is_member() {
        return resumable(&folder, case.parse().unwrap());
    }
    let (whole, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let name = "data_parallel::a_run_that_one_process_ends_goes_on_in_all";
    all_succeed(name, whole.path(), "1000", 2);
    // An epoch has four steps; all processes end after the step behind the sixth.
    all_succeed(name, stopped.path(), "6", 2);
    for rank in 0..2 {
        assert_eq!(said(stopped.path(), rank), "true 1");
    }
    all_succeed(name, stopped.path(), "1000", 2);
    let read = |folder: &Path| std::fs::read(folder.join("adapter.safetensors")).unwrap();
    assert!(read(whole.path()) == read(stopped.path()));
    for rank in 0..2 {
        assert_eq!(said(stopped.path(), rank), "false 3");
    }
    // With another number of processes, where the sums are of another order.
    let other = tempfile::tempdir().unwrap();
    all_succeed(name, other.path(), "6", 2);
    all_succeed(name, other.path(), "1000", 3);
    let weights = |folder: &Path| -> BTreeMap<String, Tensor> {
        let file = folder.join("adapter.safetensors");
        Tensor::read_safetensors(file).unwrap().into_iter().collect()
    };
    let found = weights(other.path());
    for (name, expected) in weights(whole.path()) {
        let off = (&found[&name] - &expected).norm().double_value(&[]);
        let off = off / expected.norm().double_value(&[]).max(1e-3);
        assert!(off <= 1e-5, "{name}: {off:e}");
    }
}

/// Runs that cannot be, in every process for the same reason.
fn refused(folder: &Path) {
    let group = connect();
    let (train, _) = images();
    let mut errors = Vec::new();
    let mut run = |config: TrainConfig, seed: i64| {
        let petl = PetlConfig { seed, ..PetlConfig::new(bypass(0.1), 3) };
        let mut model = PetlModel::new(small_vit_on(Device::Cpu), &petl).unwrap();
        let options = FitOptions { group: Some(&group), ..FitOptions::default() };
        let error = fit_with(&mut model, &train, None, &config, options, &mut Silent).unwrap_err();
        errors.push(error.to_string());
    };
    let other = i64::from(group.rank() == 1);
    run(train_config(1, 1), 5);
    run(TrainConfig { micro_batch_size: Some(1), ..train_config(1, 7) }, 5);
    run(TrainConfig { weight_decay: other as f64, ..train_config(1, 7) }, 5);
    run(train_config(1, 7), other);
    say(folder, group.rank(), &errors.join("\n"));
}

#[test]
fn processes_that_differ_are_told_in_what() {
    if let Some((folder, _)) = is_member() {
        return refused(&folder);
    }
    let folder = tempfile::tempdir().unwrap();
    all_succeed("data_parallel::processes_that_differ_are_told_in_what", folder.path(), "", 2);
    let expected = [
        "TrainConfig.batch_size must be at least 2, the number of processes, found 1",
        "TrainConfig.micro_batch_size must be at least 2, the number of processes, found 1",
        "rank 1 differs from rank 0: its train.weight_decay is 1.0 instead of 0.0",
        "rank 1 differs from rank 0: its model.seed is 1 instead of 0",
    ];
    for rank in 0..2 {
        assert_eq!(said(folder.path(), rank).lines().collect::<Vec<_>>(), expected);
    }
}
