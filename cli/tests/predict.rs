//! Predictions: against the run, of odd files, and with a reader who stops.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use convpass::train::RunRecord;

use crate::process::{BACKBONE, convpass, copy_of_trained, run};

fn predict(folder: &Path) -> Command {
    let mut command = convpass("predict");
    command.current_dir(folder).args(["--adapter", "run"]);
    command
}

#[test]
fn predictions_agree_with_the_run_in_the_order_of_the_list() {
    let root = copy_of_trained();
    let list = fs::read_to_string(root.path().join("digits/test.txt")).unwrap();
    let (paths, labels): (Vec<_>, Vec<_>) =
        list.lines().map(|line| line.rsplit_once(' ').unwrap()).unzip();
    let mut command = predict(root.path());
    command.args(["--format", "csv", "--top", "1", "--batch-size", "60", "-"]);
    let mut process = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = process.stdin.take().unwrap();
    for path in &paths {
        writeln!(stdin, "digits/{path}\r\n").unwrap();
    }
    drop(stdin);
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("normalization: half, from run/run.json"), "{said}");
    assert!(said.contains("images: 32 x 32, from run/run.json"), "{said}");
    let mut rows = csv::Reader::from_reader(&*output.stdout);
    let rows: Vec<csv::StringRecord> = rows.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), paths.len());
    assert!(rows.iter().zip(&paths).all(|(row, path)| row[0] == format!("digits/{path}")));
    let right = rows.iter().zip(&labels).filter(|(row, label)| row[2] == ***label).count();
    let record = RunRecord::load(root.path().join("run/run.json")).unwrap();
    let top1 = 100.0 * right as f64 / paths.len() as f64;
    assert!((top1 - record.test_top1.unwrap()).abs() < 0.3, "{top1}");
}

/// A folder with one image among files that are none, an empty folder, and names of the classes.
fn with_odd_files() -> tempfile::TempDir {
    let root = copy_of_trained();
    let list = fs::read_to_string(root.path().join("digits/test.txt")).unwrap();
    let (image, _) = list.lines().next().unwrap().rsplit_once(' ').unwrap();
    let odd = root.path().join("odd/deeper");
    fs::create_dir_all(&odd).unwrap();
    fs::create_dir(root.path().join("empty")).unwrap();
    fs::write(odd.join("text.JPG"), "no image").unwrap();
    fs::write(odd.join("list.txt"), "not looked at").unwrap();
    fs::copy(root.path().join("digits").join(image), odd.join("a, \"b\".png")).unwrap();
    let names: String = (0..10).map(|n| format!("digit {n}\r\n")).collect();
    fs::write(root.path().join("classes.txt"), names).unwrap();
    root
}

#[test]
fn odd_files_are_named_among_good_ones() {
    let root = with_odd_files();
    let mut command = predict(root.path());
    command.args(["--format", "json", "--classes", "classes.txt", "odd", "nosuch.png", "empty"]);
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert_eq!(status.code(), Some(1));
    let said = String::from_utf8(stderr).unwrap();
    for part in [
        "text.JPG: not an image in one of the formats JPEG",
        "nosuch.png: ",
        "empty: no image below",
    ] {
        assert!(said.contains(part), "{said}");
    }
    assert!(!said.contains("list.txt"), "{said}");
    let line: serde_json::Value = serde_json::from_slice(&stdout).unwrap();
    assert_eq!(line["image"], "odd/deeper/a, \"b\".png");
    assert_eq!(line["predictions"].as_array().unwrap().len(), 3);
    assert!(line["predictions"][0]["class"].as_str().unwrap().starts_with("digit "));
}

#[test]
fn what_does_not_fit_is_refused_and_an_adapter_alone_is_enough() {
    let root = with_odd_files();
    let error = |flags: &[&str]| {
        let (status, text) = run(predict(root.path()).args(flags));
        assert_eq!(status, Some(1), "{text}");
        text
    };
    assert!(error(&["empty"]).contains("no image below"));
    assert!(error(&["--classes", "digits/val200.txt", "odd"]).contains("expected 10 lines"));
    assert!(error(&["--classes", "nosuch.txt", "odd"]).contains("nosuch.txt: No such file"));
    fs::rename(root.path().join("run/run.json"), root.path().join("run.json")).unwrap();
    assert!(error(&["odd"]).contains("--backbone is needed"));
    // The adapter itself says how images are prepared.
    let (_, text) = run(predict(root.path()).args(["--backbone", BACKBONE, "odd"]));
    assert!(text.contains("normalization: half, from run/adapter.safetensors"), "{text}");
}

#[cfg(unix)]
#[test]
fn whoever_reads_predictions_may_stop_reading() {
    let root = copy_of_trained();
    let mut command = predict(root.path());
    command.args(["--batch-size", "4", "digits"]);
    let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(process.stdout.take());
    let output = process.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && !said.contains("panicked"), "{said}");
}
