//! Runs on one task.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use convpass::model::AdapterInfo;
use convpass::train::RunRecord;

use crate::process::{BACKBONE, convpass, finetune_digits, run, trained};

/// A kill at any time leaves a state from which the same command continues to the same adapter.
#[test]
fn a_killed_run_continues_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("run.state.safetensors");
    let command = || {
        let mut command = finetune_digits(trained());
        command.args(["--checkpoint-every", "1", "--out"]).arg(folder.path());
        command
    };
    let mut process = command().spawn().unwrap();
    while !state.exists() && process.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(5));
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(state.exists() && !folder.path().join("run.json").exists());
    let (status, text) = run(&mut command());
    assert_eq!(status, Some(0), "{text}");
    let adapter = |folder: &Path| fs::read(folder.join("adapter.safetensors")).unwrap();
    assert!(adapter(folder.path()) == adapter(&trained().join("run")));
    assert!(!state.exists());
    // Each step is in the log once.
    let log = fs::read_to_string(folder.path().join("log.jsonl")).unwrap();
    let whole = fs::read_to_string(trained().join("run/log.jsonl")).unwrap();
    assert_eq!(log.lines().count(), whole.lines().count());
}

#[test]
fn names_of_classes_and_the_preprocessing_are_in_the_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let digits = folder.path().join("digits");
    fs::create_dir(&digits).unwrap();
    for entry in fs::read_dir(trained().join("digits")).unwrap() {
        let entry = entry.unwrap();
        std::os::unix::fs::symlink(entry.path(), digits.join(entry.file_name())).unwrap();
    }
    let names: Vec<String> = (0..10).map(|digit| format!("digit {digit}")).collect();
    fs::write(digits.join("classes.txt"), names.join("\n") + "\n\n").unwrap();
    let mut command = convpass("finetune");
    command.current_dir(folder.path()).args(["--data", ".", "--task", "digits", "--epochs", "1"]);
    command.args(["--backbone", BACKBONE, "--normalization", "half", "--method", "linear"]);
    command.args(["--select", "trial"]).arg("--head").arg(trained().join("run"));
    let (status, text) = run(&mut command);
    assert_eq!(status, Some(0), "{text}");
    let out = folder.path().join("runs/digits-linear_probe");
    let info = AdapterInfo::read(out.join("adapter.safetensors")).unwrap();
    assert_eq!(info.class_names, Some(names));
    let preprocessing = info.backbone.unwrap().preprocessing.unwrap();
    assert_eq!((preprocessing.image_size, preprocessing.mean), ((32, 32), [0.5; 3]));
    let record = RunRecord::load(out.join("run.json")).unwrap();
    assert!(record.head_digest.is_some() && record.test_top1.is_none());
}
