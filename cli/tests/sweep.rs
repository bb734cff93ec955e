//! A plan that is stopped, continues, and refuses what is of another run.

use std::fs;
use std::path::Path;

use convpass::train::RunRecord;

use crate::process::{convpass, run};

const PLAN: &str = r#"
tasks = ["digits", "absent"]
seeds = [0, 1]
trials = 2

[train]
normalization = "half"
epochs = 2
warmup_epochs = 0
batch_size = 50

[[methods]]
label = "Linear probe"
method = { name = "linear_probe" }
grid = { lr = [1e-3, 1e-1] }

[[methods]]
label = "BitFit"
head = "Linear probe"
method = { name = "bit_fit" }
train = { epochs = 1 }
grid = { lr = [0, 1e-3] }
"#;

/// Runs the plan in a folder, with more flags.
fn run_plan(folder: &Path, flags: &[&str]) -> (Option<i32>, String) {
    let mut command = convpass("sweep");
    command.args(["--plan", "plan.toml", "--out", "out", "--threads", "1"]).args(flags);
    run(command.current_dir(folder))
}

#[test]
fn a_plan_selects_on_validation_skips_what_is_done_and_keeps_what_is_another() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("plan.toml"), PLAN).unwrap();
    let (status, text) = run_plan(root.path(), &[]);
    assert_eq!(status, Some(1), "one task is missing: {text}");
    assert!(text.contains("absent is left out") && text.contains("train800val200.txt"), "{text}");
    assert!(text.contains("tasks missing: 1, runs failed: 0"), "{text}");
    assert!(text.contains("in neither G nor A: digits"), "{text}");

    // Trials never see the test images, and start from the head of a trial.
    let out = root.path().join("out/digits");
    let record = |path: &str| RunRecord::load(out.join(path).join("run.json")).unwrap();
    let trial = record("bitfit/trials/lr=0");
    assert_eq!((trial.test_split, trial.test_top1), (None, None));
    assert!(trial.val_split.is_some());
    let results = fs::read(root.path().join("out/results.json")).unwrap();
    let results: serde_json::Value = serde_json::from_slice(&results).unwrap();
    let selected = &results["selected"][0];
    assert_eq!(
        (&selected["task"], &selected["method"]),
        (&"digits".into(), &"Linear probe".into())
    );
    // The first of the best.
    let trials = selected["trials"].as_array().unwrap();
    let top1 = |trial: &serde_json::Value| trial["val_top1"].as_f64().unwrap();
    let best = trials.iter().map(top1).fold(0.0, f64::max);
    let chosen = trials.iter().find(|trial| top1(trial) == best).unwrap();
    assert_eq!(selected["setting"], chosen["setting"]);
    let probe = match selected["setting"]["lr"].as_f64().unwrap() {
        0.1 => record("linear-probe/trials/lr=0.1"),
        _ => record("linear-probe/trials/lr=0.001"),
    };
    // At a learning rate of 0 what is left is the head that it started from.
    assert_eq!(trial.fit.epochs[0].val_top1, probe.fit.epochs[1].val_top1);
    let csv = fs::read_to_string(root.path().join("out/results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 4, "{csv}");

    // All is done; a cut record is not taken for one, and is not written over.
    let (_, text) = run_plan(root.path(), &[]);
    assert_eq!(text.matches("done before").count(), 8, "{text}");
    let cut = out.join("bitfit/seed-1/run.json");
    fs::write(&cut, "{\"version\"").unwrap();
    fs::remove_file(out.join("bitfit/seed-0/adapter.safetensors")).unwrap();
    let (_, text) = run_plan(root.path(), &[]);
    assert_eq!(text.matches("done before").count(), 6, "{text}");
    assert!(text.contains("left as it is") && text.contains("runs failed: 1"), "{text}");
    assert_eq!(fs::read_to_string(&cut).unwrap(), "{\"version\"");
    assert!(out.join("bitfit/seed-0/adapter.safetensors").exists());

    // Another setting of the user's: named, and only moved when told to.
    let (_, text) = run_plan(root.path(), &["--normalization", "unit"]);
    assert!(text.contains("train.normalization: \"half\", planned is \"unit\""), "{text}");
    let (_, text) = run_plan(root.path(), &["--set-aside", "--also-best-on-test", "1"]);
    assert!(out.join("bitfit/.seed-1.before-1/run.json").exists(), "{text}");
    assert!(
        text.contains("chosen on what it reports") && text.contains("runs failed: 0"),
        "{text}"
    );
    let seen = record("bitfit/seed-1");
    assert!(seen.fit.epochs.iter().all(|epoch| epoch.val_top1.is_none()));
    assert!(seen.best_on_test.unwrap().top1 >= seen.test_top1.unwrap());
}

#[test]
fn a_plan_with_a_slip_is_refused_before_anything_runs() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("plan.toml"), PLAN.replace("lr = [1e-3, 1e-1]", "rank = [1, 2]"))
        .unwrap();
    let (status, text) = run_plan(root.path(), &[]);
    assert!(status == Some(1) && text.contains("plan.toml:12: "), "{text}");
    let mut both = convpass("sweep");
    let (status, text) = run(both.args(["--plan", "plan.toml", "--lr", "1e-3"]));
    assert!(status == Some(2) && text.contains("cannot be used with"), "{text}");
    assert!(!root.path().join("out").exists());
}
