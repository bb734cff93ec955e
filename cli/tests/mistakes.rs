//! What goes wrong with a run: numbers that are not finite, a folder that is taken, a killed run.

use std::fs::{self, File};
use std::time::Duration;

use convpass::train::RunRecord;
use fs4::fs_std::FileExt;

use crate::process::{BACKBONE, convpass, copy_of_trained, finetune_digits, run, trained};

#[test]
fn a_run_that_diverges_leaves_no_adapter_and_has_its_own_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = finetune_digits(trained());
    command.args(["--lr", "1e38", "--weight-decay", "1e3", "--out"]).arg(folder.path());
    let (status, text) = run(&mut command);
    assert_eq!(status, Some(3), "{text}");
    assert!(text.contains("diverged at step") && text.contains("lower learning rate"), "{text}");
    assert!(!folder.path().join("adapter.safetensors").exists());
    assert!(!folder.path().join("run.json").exists());
}

/// A plan in which one of two trials diverges.
#[test]
fn a_trial_that_diverges_is_never_selected() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = convpass("sweep");
    command.arg("--data").arg(trained()).args(["--tasks", "digits", "--methods", "linear"]);
    command.args(["--backbone", BACKBONE, "--grid", "lr=1e38,1e-1"]);
    command.args([
        "--seeds",
        "0",
        "--epochs",
        "4",
        "--normalization",
        "half",
        "--batch-size",
        "50",
    ]);
    let (status, text) = run(command.arg("--out").arg(folder.path()));
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("diverged") && text.contains("runs failed: 1"), "{text}");
    let results = fs::read_to_string(folder.path().join("results.csv")).unwrap();
    assert!(results.lines().count() == 2 && results.contains("lr=0.1"), "{results}");
}

#[test]
fn a_finished_run_is_not_overwritten() {
    let folder = copy_of_trained();
    let (adapter, out) = (folder.path().join("run/adapter.safetensors"), folder.path().join("run"));
    let before = fs::read(&adapter).unwrap();
    let command = |extra: &[&str]| {
        let mut command = finetune_digits(folder.path());
        command.args(extra).arg("--out").arg(&out);
        run(&mut command)
    };
    let (status, text) = command(&[]);
    assert!(status == Some(0) && text.contains("finished before"), "{text}");
    let (status, text) = command(&["--epochs", "3"]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("train.epochs: 20") && text.contains("--force"), "{text}");
    assert!(fs::read(&adapter).unwrap() == before);
    let (status, text) = command(&["--epochs", "3", "--force"]);
    assert_eq!(status, Some(0), "{text}");
    assert!(fs::read(&adapter).unwrap() != before);
    let record = RunRecord::load(out.join("run.json")).unwrap();
    assert_eq!(record.train.epochs, 3);
    // The scores are in the record, beside the top-1 that earlier versions had.
    let scores = record.test.unwrap();
    assert!(Some(scores.top1) == record.test_top1 && scores.recall.len() == 10);
}

#[test]
fn an_adapter_beside_the_record_of_another_run_is_refused() {
    let folder = copy_of_trained();
    let out = folder.path().join("run");
    let mut command = finetune_digits(folder.path());
    let other = folder.path().join("other");
    let (status, text) = run(command.args(["--epochs", "1", "--out"]).arg(&other));
    assert_eq!(status, Some(0), "{text}");
    fs::copy(other.join("adapter.safetensors"), out.join("adapter.safetensors")).unwrap();
    let image = folder.path().join("digits/images/test/000000.png");
    let mut command = convpass("predict");
    let (status, text) = run(command.arg("--adapter").arg(&out).arg(image));
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("is not the adapter that"), "{text}");
}

#[test]
fn a_folder_that_another_process_uses_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let lock = File::create(folder.path().join(".lock")).unwrap();
    assert!(lock.try_lock_exclusive().unwrap());
    let out = || {
        let mut command = finetune_digits(trained());
        command.args(["--epochs", "1", "--out"]).arg(folder.path());
        command
    };
    let (status, text) = run(&mut out());
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("another process of convpass"), "{text}");
    // The lock ends with its process, also if it was killed.
    drop(lock);
    fs::write(folder.path().join(".run.json.abc.tmp"), "half").unwrap();
    let (status, text) = run(&mut out());
    assert_eq!(status, Some(0), "{text}");
    assert!(!folder.path().join(".run.json.abc.tmp").exists());
}

#[test]
fn flags_out_of_range_are_refused_by_name() {
    for (flag, value) in [("--threads", "5000"), ("--batch-size", "0"), ("--batch-size", "9999999")]
    {
        let (status, text) = run(finetune_digits(trained()).args([flag, value]));
        assert!(status == Some(2) && text.contains(flag), "{text}");
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = finetune_digits(trained());
    command.args(["--image-size", "8000", "--batch-size", "700", "--out"]).arg(folder.path());
    let (status, text) = run(&mut command);
    assert!(status == Some(1) && text.contains("needs at least"), "{text}");
    let (status, text) = run(finetune_digits(trained())
        .args(["--seed", "-1", "--epochs", "1", "--out"])
        .arg(folder.path()));
    assert_eq!(status, Some(0), "{text}");
}

/// Two interrupts end the program at once, without a crash.
#[cfg(unix)]
#[test]
fn a_second_interrupt_ends_at_once() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let mut command = finetune_digits(trained());
    command.args(["--method", "convpass", "--epochs", "500", "--out"]).arg(folder.path());
    let mut process = command.spawn().unwrap();
    let log = folder.path().join("log.jsonl");
    while fs::metadata(&log).map_or(0, |log| log.len()) == 0
        && process.try_wait().unwrap().is_none()
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..2 {
        let killed = std::process::Command::new("kill")
            .args(["-INT", &process.id().to_string()])
            .status()
            .unwrap();
        assert!(killed.success());
        std::thread::sleep(Duration::from_millis(20));
    }
    let status = process.wait().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(130), None));
}
