//! One run in several processes.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use convpass::train::RunRecord;
use tch::Tensor;

use crate::process::{finetune_digits, run, trained};

/// A port that no program listened on a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Sets the variables that a launcher sets.
fn place(command: &mut Command, rank: usize, size: usize, port: u16) {
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string());
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
}

/// Starts `finetune` of the digits in `size` processes with results in `out`.
fn start(size: usize, out: &Path, more: impl Fn(usize, &mut Command)) -> Vec<Child> {
    let port = free_port();
    let start = |rank: usize| {
        let mut command = finetune_digits(trained());
        command.args(["--threads", "1", "--process-timeout", "120", "--out"]).arg(out);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        place(&mut command, rank, size, port);
        more(rank, &mut command);
        command.spawn().unwrap()
    };
    (0..size).map(start).collect()
}

/// The exit code of each process, and what it printed.
fn ends(processes: Vec<Child>) -> Vec<(Option<i32>, String)> {
    let end = |process: Child| {
        let output = process.wait_with_output().unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        (output.status.code(), text.concat())
    };
    processes.into_iter().map(end).collect()
}

fn weights(folder: &Path) -> BTreeMap<String, Tensor> {
    let file = folder.join("adapter.safetensors");
    Tensor::read_safetensors(file).unwrap().into_iter().collect()
}

#[test]
fn two_processes_train_the_adapter_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let outcomes = ends(start(2, folder.path(), |_, _| {}));
    assert!(outcomes.iter().all(|(code, _)| *code == Some(0)), "{outcomes:?}");
    assert!(outcomes[0].1.contains("top-1"), "{}", outcomes[0].1);
    assert_eq!(outcomes[1].1, "");
    let one = trained().join("run");
    let (expected, found) = (weights(&one), weights(folder.path()));
    for (name, expected) in expected {
        let off = (&found[&name] - &expected).norm() / expected.norm();
        assert!(off.double_value(&[]) < 1e-5, "{name}: {off}");
    }
    let record = |folder: &Path| RunRecord::load(folder.join("run.json")).unwrap();
    let (expected, found) = (record(&one), record(folder.path()));
    assert_eq!(found.train, expected.train);
    assert_eq!((found.test_top1, found.test_split), (expected.test_top1, expected.test_split));
    let recall = |record: Option<convpass::eval::Scores>| record.unwrap().recall;
    assert_eq!(recall(found.test), recall(expected.test));
    let steps =
        |folder: &Path| fs::read_to_string(folder.join("log.jsonl")).unwrap().lines().count();
    assert_eq!(steps(folder.path()), steps(&one));
    // What is finished is not trained again, in no process.
    let again = ends(start(2, folder.path(), |_, _| {}));
    assert!(again.iter().all(|(code, _)| *code == Some(0)), "{again:?}");
    assert!(again[0].1.contains("finished before"), "{}", again[0].1);
}

#[test]
fn processes_with_other_settings_end_and_say_which() {
    let folder = tempfile::tempdir().unwrap();
    let other = |rank: usize, command: &mut Command| {
        command.args(["--weight-decay", if rank == 1 { "0.5" } else { "0.25" }]);
    };
    for (code, text) in ends(start(2, folder.path(), other)) {
        let expected = "rank 1 differs from rank 0: its train.weight_decay is 0.5 instead of 0.25";
        assert!(code == Some(1) && text.contains(expected), "{text}");
    }
    assert!(!folder.path().join("adapter.safetensors").exists());
}

#[test]
fn batches_of_a_step_are_in_the_record() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = finetune_digits(trained());
    command.args(["--batch-size", "25", "--accumulate", "2", "--out"]).arg(folder.path());
    let (code, text) = run(&mut command);
    assert_eq!(code, Some(0), "{text}");
    let record = RunRecord::load(folder.path().join("run.json")).unwrap();
    assert_eq!((record.train.batch_size, record.train.accumulate), (25, 2));
    // Two halves of each batch of the other run.
    let (expected, found) = (weights(&trained().join("run")), weights(folder.path()));
    for (name, expected) in expected {
        let off = (&found[&name] - &expected).norm() / expected.norm();
        assert!(off.double_value(&[]) < 1e-5, "{name}: {off}");
    }
}

#[test]
fn variables_without_a_use_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = finetune_digits(trained());
    command.arg("--out").arg(folder.path()).env("RANK", "0").env("WORLD_SIZE", "2");
    let (code, text) = run(&mut command);
    assert!(code == Some(1) && text.contains("MASTER_ADDR must be set"), "{text}");
}
