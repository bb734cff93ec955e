use serde_json::json;

use super::*;
use crate::error::Error;
use convpass::model::TrainableParams;
use convpass::petl::{ConvBypassConfig, ConvInit, SubLayers};
use convpass::train::{Fit, RunRecord, Stepped};

const PLAN: &str = r#"
tasks = ["cifar", "own"]
seeds = [3, 4]
trials = 4

[train]
epochs = 20
lr = 2e-3
stepped = "each_step"

[[methods]]
label = "Linear probe"
method = { name = "linear_probe" }
train = { epochs = 50 }
grid = { lr = [1e-3, 1e-2, 1e-1, 1] }

[[methods]]
label = "Convpass, attention"
method = { name = "conv_bypass", sub_layers = "attention", bottleneck_dim = 16 }
published = true
head = "Linear probe"
grid = { scale = [0.1, 10], lr = [1e-3, 4e-3] }
"#;

#[test]
fn the_head_has_its_own_rate_if_a_plan_says_so() {
    let text =
        PLAN.replace("grid = { scale = [0.1, 10], lr", "grid = { head_lr = [2e-2, 8e-3], lr");
    let plan = read(&text).unwrap();
    let factor = |method: usize, setting: usize| {
        let method = &plan.methods[method];
        plan.run(method, &method.settings()[setting], "own", 7, 4).unwrap().1.head_lr_factor
    };
    // head_lr=0.02 with lr=0.001 and 0.004, then head_lr=0.008 with both.
    let found = [0, 1, 2, 3].map(|setting| factor(1, setting));
    assert_eq!(found, [20.0, 5.0, 8.0, 2.0]);
    assert_eq!(factor(0, 0), 1.0);
}

fn read(text: &str) -> Result<SweepPlan> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plan.toml");
    std::fs::write(&file, text).unwrap();
    SweepPlan::read(file)
}

#[test]
fn a_plan_says_every_run() {
    let plan = read(PLAN).unwrap();
    let [probe, convpass] = &plan.methods[..] else { panic!("{plan:?}") };
    assert_eq!((plan.seeds.len(), probe.settings().len(), convpass.settings().len()), (2, 4, 4));
    let settings: Vec<_> = convpass.settings().iter().map(Setting::to_string).collect();
    let expected =
        ["lr=0.001, scale=0.1", "lr=0.001, scale=10", "lr=0.004, scale=0.1", "lr=0.004, scale=10"];
    assert_eq!(settings, expected);
    assert_eq!(convpass.settings()[1].folder(), "lr=0.001,scale=10");
    assert_eq!(convpass.folder(), "convpass--attention");
    assert!(plan.has_trials(probe) && plan.has_trials(convpass));

    let (model, train) = plan.run(convpass, &convpass.settings()[3], "own", 7, 4).unwrap();
    let expected = ConvBypassConfig {
        sub_layers: SubLayers::Attention,
        bottleneck_dim: 16,
        scale: 10.0,
        ..ConvBypassConfig::default()
    };
    assert_eq!(model.method, Method::ConvBypass(expected));
    assert_eq!((model.num_classes, model.seed, model.drop_path), (7, 4, 0.1));
    assert_eq!((train.epochs, train.schedule.lr, train.seed), (20, 4e-3, 4));
    assert_eq!((train.schedule.warmup_epochs, train.schedule.stepped), (2, Stepped::EachStep));

    let (model, train) = plan.run(probe, &probe.settings()[3], "own", 7, 3).unwrap();
    assert_eq!((train.epochs, train.schedule.lr, model.drop_path), (50, 1.0, 0.0));
}

#[test]
fn published_choices_are_the_tasks_and_the_grid_comes_after() {
    let mut method = PlanMethod::new("Convpass", Method::ConvBypass(ConvBypassConfig::default()));
    method.published = true;
    let plan = SweepPlan { methods: vec![method], ..SweepPlan::default() };
    plan.validate().unwrap();
    let chosen = |method: &PlanMethod, task: &str| {
        let (model, _) = plan.run(method, &method.settings()[0], task, 2, 0).unwrap();
        let Method::ConvBypass(config) = model.method else { panic!("{model:?}") };
        (config.scale, config.conv_init)
    };
    let mut method = plan.methods[0].clone();
    assert_eq!(chosen(&method, "svhn"), (100.0, ConvInit::XavierUniform));
    assert_eq!(chosen(&method, "eurosat"), (10.0, ConvInit::Identity));
    assert_eq!(chosen(&method, "own"), (1.0, ConvInit::Identity));
    method.grid.insert("scale".to_owned(), vec![json!(0.5)]);
    assert_eq!(chosen(&method, "svhn"), (0.5, ConvInit::XavierUniform));
    assert!(!plan.has_trials(&method));
}

#[test]
fn what_is_wrong_is_named_with_its_line() {
    let cases = [
        ("seeds = [3, 4]", "seeds = [3, 3]", 1, "3 twice"),
        ("seeds", "seed", 3, "unknown field `seed`"),
        ("epochs = 20", "epochs = \"many\"", 7, "invalid type"),
        ("epochs = 20", "epochs = -1", 7, "invalid value"),
        ("[train]", "[train", 6, ""),
        ("\"cifar\"", "\"../cifar\"", 1, "names of folders"),
        ("linear_probe\"", "linear_prob\"", 13, "linear_prob"),
        ("lr = [1e-3, 1e-2, 1e-1, 1]", "rank = [1, 2, 3, 4]", 11, "found rank"),
        ("lr = [1e-3, 1e-2, 1e-1, 1]", "lr = [1e-3]", 11, "the plan's 4 combinations"),
        ("lr = [1e-3, 1e-2, 1e-1, 1]", "lr = [1, 2, 3, \"x\"]", 11, "grid.lr"),
        ("lr = [1e-3, 1e-2, 1e-1, 1]", "lr = [1, 2, 3, -3]", 11, "not negative"),
        ("lr = [1e-3, 1e-2, 1e-1, 1]", "lr = [1, 2, 3, 3]", 11, "differ"),
        ("head = \"Linear probe\"", "head = \"Linear\"", 17, "takes no head"),
        ("head = \"Linear probe\"", "heads = \"Linear probe\"", 21, "unknown field `heads`"),
        ("Convpass, attention", "linear-probe", 17, "label"),
        ("bottleneck_dim = 16", "bottleneck_dim = 0", 17, "bottleneck_dim"),
        ("bottleneck_dim = 16", "bottleneck = 16", 19, "bottleneck"),
        ("scale = [0.1, 10]", "name = [\"lora\", \"ssf\"]", 17, "found name"),
    ];
    for (old, new, at, about) in cases {
        assert!(PLAN.contains(old), "{old}");
        let error = read(&PLAN.replacen(old, new, 1)).unwrap_err();
        let Error::PlanLine { file, line, reason } = &error else { panic!("{error:?}") };
        assert!(file.ends_with("plan.toml"));
        assert!(reason.contains(about) && *line == at, "{new}: {error}");
    }
    assert!(matches!(SweepPlan::read("no/such/plan.toml").unwrap_err(), Error::Io { .. }));
    let none = SweepPlan::default().validate().unwrap_err();
    assert!(matches!(none, Error::Config { .. }), "{none}");
    for length in 0..PLAN.len() {
        // A plan that is cut off anywhere is a shorter plan or an error, never a panic.
        let _ = read(&PLAN[..length]);
    }
}

/// The corpus of the fuzz target `plan`: each seed is a plan whose runs are all possible.
#[test]
fn the_corpus_of_the_fuzzer_is_read_or_refused() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/plan");
    for entry in std::fs::read_dir(folder).unwrap() {
        let file = entry.unwrap().path();
        let read = SweepPlan::read(&file);
        let is_seed = file.file_name().unwrap().to_string_lossy().starts_with("seed_");
        assert!(read.is_ok() || !is_seed, "{}: {read:?}", file.display());
        for method in read.iter().flat_map(|plan| &plan.methods) {
            for setting in method.settings() {
                read.as_ref().unwrap().run(method, &setting, "cifar", 100, 0).unwrap();
            }
        }
    }
}

#[test]
fn a_grid_larger_than_anyone_waits_for_is_refused_before_it_is_made() {
    let mut method = PlanMethod::new("LoRA", Method::Lora(Default::default()));
    for field in ["lr", "weight_decay", "alpha", "rank", "drop_path", "epochs"] {
        method.grid.insert(field.to_owned(), (1..=1000).map(|n| json!(n)).collect());
    }
    let plan = SweepPlan { methods: vec![method], ..SweepPlan::default() };
    assert!(matches!(plan.validate().unwrap_err(), Error::Config { .. }));
}

#[test]
fn the_first_of_the_best_trials_is_chosen() {
    let trial =
        |lr: f64, val_top1| Trial { setting: Setting([("lr".into(), json!(lr))].into()), val_top1 };
    let trials = [trial(1.0, 40.0), trial(2.0, 50.0), trial(3.0, 50.0), trial(4.0, f64::NAN)];
    assert_eq!(best_trial(&trials), Some(&trials[1]));
    assert_eq!(best_trial(&[]), None);
}

#[test]
fn a_record_of_another_run_is_told_by_field() {
    let plan = read(PLAN).unwrap();
    let convpass = &plan.methods[1];
    let (model, train) = plan.run(convpass, &convpass.settings()[0], "own", 7, 3).unwrap();
    let planned = PlannedRun {
        task: "own".into(),
        model: model.clone(),
        train: train.clone(),
        backbone_digest: "ab".into(),
        precision: None,
        image_size: (32, 32),
        test_shorter_side: None,
        train_split: "cd".into(),
        val_split: None,
        test_split: Some("ef".into()),
        head_digest: None,
        cross_validation: None,
    };
    let fit = Fit { epochs: Vec::new(), selected_epoch: None, stopped: false, seconds: 1.0 };
    let record = RunRecord {
        version: "0.0.1".into(),
        task: "own".into(),
        model,
        train: TrainConfig { recompute: true, cuda_graph: true, validate_every: 7, ..train },
        backbone: "elsewhere".into(),
        backbone_digest: "ab".into(),
        precision: None,
        image_size: Some((32, 32)),
        test_shorter_side: None,
        shots: None,
        train_split: "cd".into(),
        val_split: None,
        test_split: Some("ef".into()),
        head_digest: None,
        adapter_digest: None,
        cross_validation: None,
        trainable_params: TrainableParams::new(1, 1, 1),
        fit,
        test_top1: Some(1.0),
        test: None,
        best_on_test: None,
        test_seconds: None,
        peak_rss_mb: None,
        images: Default::default(),
    };
    assert_eq!(planned.differences(&record), [""; 0]);
    let mut other = record.clone();
    other.train.schedule.lr = 0.5;
    other.model.method = Method::Lora(Default::default());
    other.backbone_digest = "xy".into();
    other.head_digest = Some("12".into());
    other.precision = Some("autocast-bf16".into());
    let text = planned.differences(&other).join("\n");
    for part in [
        "train.schedule.lr: 0.5, planned is 0.001",
        "model.method.name: \"lora\", planned is \"conv_bypass\"",
        "model.method.rank: 8, planned is null",
        "backbone_digest: \"xy\", planned is \"ab\"",
        "head_digest: \"12\", planned is null",
        "precision: \"autocast-bf16\", planned is null",
    ] {
        assert!(text.contains(part), "{text}");
    }
}
