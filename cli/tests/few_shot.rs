//! Few-shot runs and what they reach on other sets.

use std::fs;
use std::path::{Path, PathBuf};

use convpass::train::RunRecord;

use crate::process::{BACKBONE, convpass, photos, run};

const CLASSES: [&str; 4] = ["east", "north", "south", "west"];
const PROBE: [&str; 6] = ["--method", "linear", "--augment", "none", "--epochs", "20"];
const TARGETS: [&str; 4] =
    ["--target", "blue=blue", "--target", "some=photos/test/some.txt:some-classes.txt"];

/// A folder of photos and of runs on them.
pub struct Corners(tempfile::TempDir);

impl Corners {
    pub fn new() -> Self {
        let corners = Corners(tempfile::tempdir().unwrap());
        let at = |path| corners.at(path);
        photos(&at("photos/train"), &CLASSES, 5, 0);
        photos(&at("photos/test"), &CLASSES, 3, 0);
        photos(&at("blue"), &["south", "north"], 4, 2);
        fs::write(at("photos/test/some.txt"), "west/0.png 0\neast/1.png 1\n").unwrap();
        fs::write(at("some-classes.txt"), "3\n0\n").unwrap();
        corners
    }

    pub fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub fn few_shot(&self, out: &str, flags: &[&str]) -> (Option<i32>, String) {
        let mut command = convpass("few-shot");
        command.args(["--data", "photos/train", "--test", "photos/test", "--backbone", BACKBONE]);
        command.args(["--normalization", "half", "--out", out]);
        for [flag, values] in [["--shots", "2,4"], ["--seeds", "0,3"]] {
            if !flags.contains(&flag) {
                command.args([flag, values]);
            }
        }
        command.args(["--lr", "3e-2", "--name", "corners", "--batch-size", "8"]).args(flags);
        run(command.current_dir(self.0.path()))
    }

    pub fn record(&self, path: &str) -> RunRecord {
        RunRecord::load(self.at(path).join("run.json")).unwrap()
    }

    /// Runs that have to succeed.
    pub fn trained(&self, out: &str, flags: &[&str]) -> String {
        let (status, text) = self.few_shot(out, flags);
        assert_eq!(status, Some(0), "{text}");
        text
    }

    pub fn refused(&self, out: &str, flags: &[&str], part: &str) {
        let (status, text) = self.few_shot(out, flags);
        assert!(status == Some(1) && text.contains(part), "{text}");
    }
}

#[test]
fn few_shot_runs_start_from_heads_and_are_measured_on_other_sets() {
    let corners = Corners::new();
    a_probe_is_trained(&corners);
    runs_start_from_its_heads(&corners);
    targets_are_measured_once(&corners);
    predict_prepares_images_as_the_test_did(&corners);
    what_does_not_fit_is_named(&corners);
}

fn a_probe_is_trained(corners: &Corners) {
    let text = corners.trained("probe", &PROBE);
    assert!(text.contains("4 a class: top-1 "), "{text}");
    let trained = corners.record("probe/4shot-seed3");
    let (task, side) = (trained.task.as_str(), trained.test_shorter_side);
    assert_eq!((task, side), ("corners, 4 a class", Some(36)));
    assert_eq!(trained.fit.epochs.len(), 20);
    let folder = corners.at("probe/4shot-seed3");
    let files = ["train.txt", "log.jsonl", "adapter.safetensors"];
    assert!(files.iter().all(|name| folder.join(name).exists()));
}

/// At a learning rate of next to nothing, the head is the one that each run started from.
fn runs_start_from_its_heads(corners: &Corners) {
    let still = ["--method", "bitfit", "--protocol", "domain_generalization", "--epochs", "1"];
    let rate = ["--lr", "1e-12", "--test-resize", "36", "--head", "probe"];
    corners.trained("tuned", &[&still[..], &rate].concat());
    for run in ["2shot-seed0", "2shot-seed3", "4shot-seed0", "4shot-seed3"] {
        let tuned = corners.record(&format!("tuned/{run}"));
        let probe = corners.record(&format!("probe/{run}"));
        assert_eq!(tuned.test_top1, probe.test_top1, "{run}");
        assert!(tuned.head_digest.is_some() && tuned.train.weight_decay == 0.0);
    }
}

/// A new target is measured and nothing is trained anew; then everything is known.
fn targets_are_measured_once(corners: &Corners) {
    let csv = || fs::read_to_string(corners.at("probe/results.csv")).unwrap();
    let flags = [&PROBE[..], &TARGETS].concat();
    let text = corners.trained("probe", &flags);
    assert_eq!(text.matches("done before").count(), 4, "{text}");
    assert!(text.contains("4 a class: blue "), "{text}");
    let known = csv();
    assert!(known.starts_with("shots,seed,images,test_top1,blue,some\n2,0,8,"), "{known}");
    let text = corners.trained("probe", &flags);
    // The test photos are drawn as the training photos are, which a warning says.
    assert!(text.contains("12 test images are training images too"), "{text}");
    let is_progress = |line: &str| line.contains("images") && !line.starts_with("warning");
    assert!(!text.lines().any(is_progress) && csv() == known, "{text}");
    // Other images under the same names are another set.
    let measured = || fs::read_to_string(corners.at("probe/4shot-seed3/measured.json")).unwrap();
    let before = measured();
    fs::copy(corners.at("photos/test/west/0.png"), corners.at("blue/north/0.png")).unwrap();
    corners.trained("probe", &flags);
    assert_ne!(measured(), before);
}

fn predict_prepares_images_as_the_test_did(corners: &Corners) {
    let mut predict = convpass("predict");
    predict.args(["--adapter", "probe/4shot-seed3", "--format", "csv", "--top", "1"]);
    let (status, text) = run(predict.arg("photos/test").current_dir(corners.at("")));
    assert_eq!(status, Some(0), "{text}");
    // The adapter knows the names of the classes.
    let class = |path: &str| {
        Path::new(path).parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned()
    };
    let rows = text.lines().filter(|line| line.starts_with("photos/test/"));
    let fields = rows.map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let right = fields.filter(|row| row[3] == class(&row[0])).count();
    let trained = corners.record("probe/4shot-seed3");
    assert_eq!(100.0 * right as f64 / 12.0, trained.test_top1.unwrap(), "{text}");
}

fn what_does_not_fit_is_named(corners: &Corners) {
    let another = [&PROBE[..4], &["--epochs", "3"]].concat();
    corners.refused("probe", &another, "train.epochs: 20, planned is 3");
    photos(&corners.at("odd"), &["south"], 1, 1);
    fs::rename(corners.at("odd/south"), corners.at("odd/up")).unwrap();
    for (flags, part) in [
        (&["--target", "a=blue", "--target", "a=blue"][..], "two sets are called a"),
        (&["--target", "odd=odd"], "found up"),
        (&["--target", "seed=blue"], "already has a column called seed"),
        (&["--head", "nowhere"], "--head nowhere"),
        (&["--head", "probe", "--seeds", "5"], "2shot-seed5"),
        (&["--shots", "2", "--seeds", "0,0"], "given twice"),
        (&["--shots", "6"], "6"),
        (&["--test-resize", "5"], "--test-resize"),
    ] {
        corners.refused("x", flags, part);
    }
    fs::write(corners.at("names.txt"), "one\ntwo\n").unwrap();
    corners.refused("x", &["--classes", "names.txt"], "east");
    let lists = ["--data", "photos/test/some.txt", "--test", "photos/test/some.txt"];
    fs::write(corners.at("names.txt"), "one\n").unwrap();
    corners.refused("x", &[&lists[..], &["--classes", "names.txt"]].concat(), "some.txt");
    assert!(!corners.at("x").exists());
}
