//! Every command that reads images looks at them before it starts, and turns them as asked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use convpass::data::Orientation;
use convpass::model::AdapterInfo;
use convpass::train::RunRecord;

use crate::few_shot::Corners;
use crate::process::{BACKBONE, convpass, photos, run};

const CLASSES: [&str; 4] = ["east", "north", "south", "west"];

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/integration/fixtures").join(path)
}

/// A task `corners` with 12 training images, 4 for validation and 4 for the test. One training image
/// and one test image cannot be read, one is in both parts, and one is turned.
fn task(root: &Path) {
    let folder = root.join("corners");
    photos(&folder.join("images"), &CLASSES, 6, 0);
    let lists = [("train800.txt", 0..4), ("val200.txt", 4..5), ("train800val200.txt", 0..5)];
    for (name, numbers) in lists.into_iter().chain([("test.txt", 5..6)]) {
        let line = |(label, class): (usize, &&str), i| format!("images/{class}/{i}.png {label}\n");
        let lines = numbers
            .flat_map(|i| CLASSES.iter().enumerate().map(move |of_class| line(of_class, i)))
            .collect::<String>();
        fs::write(folder.join(name), lines).unwrap();
    }
    let image = |name: &str| folder.join("images").join(name);
    fs::write(image("east/1.png"), "no image").unwrap();
    fs::remove_file(image("west/5.png")).unwrap();
    fs::copy(image("south/0.png"), image("south/5.png")).unwrap();
    fs::copy(fixture("photos/exif_6.jpg"), image("north/0.png")).unwrap();
}

/// Runs a command that has to name the two images, each once, before it trains.
fn names_the_images(mut command: Command) {
    let (status, text) = run(&mut command);
    assert_eq!(status, Some(1), "{text}");
    let unreadable: Vec<_> = text.lines().filter(|l| l.starts_with("unreadable: ")).collect();
    assert_eq!(unreadable.len(), 2, "{text}");
    assert!(unreadable[0].contains("east/1.png") && unreadable[1].contains("west/5.png"), "{text}");
    assert!(text.contains("2 of 24 images cannot be read") && !text.contains("epoch"), "{text}");
}

#[test]
fn a_sweep_looks_at_all_images_before_its_first_run() {
    let root = tempfile::tempdir().unwrap();
    task(root.path());
    let sweep = |out: &str, flags: &[&str]| {
        let mut command = convpass("sweep");
        command.current_dir(root.path()).args(["--data", ".", "--tasks", "corners", "--out", out]);
        command.args(["--backbone", BACKBONE, "--methods", "linear", "--seeds", "0"]);
        command.args(["--epochs", "1", "--batch-size", "8", "--threads", "1", "--jobs", "1"]);
        command.args(flags);
        command
    };
    names_the_images(sweep("out", &[]));
    let runs = root.path().join("out/corners");
    assert!(!runs.exists());
    let grid = ["--skip-unreadable", "--grid", "lr=1e-3,1e-2"];
    let (status, text) = run(&mut sweep("out", &grid));
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("skipped 2 of 24 images"), "{text}");
    assert!(text.contains("1 test images are training images too"), "{text}");
    let record = |path: &str| RunRecord::load(root.path().join(path).join("run.json")).unwrap();
    let of_seed = record("out/corners/linear/seed-0");
    assert_eq!((of_seed.images.skipped, of_seed.images.orientation), (2, Orientation::Exif));
    let (status, text) = run(&mut sweep("out", &grid));
    assert!(status == Some(0) && text.matches("done before").count() == 3, "{text}");

    // Another reading of the images is another run.
    let stored = [&grid[..], &["--ignore-exif"]].concat();
    let (status, text) = run(&mut sweep("out", &stored));
    assert!(status == Some(1) && text.contains("--ignore-exif differs"), "{text}");
    let (status, text) = run(&mut sweep("stored", &stored));
    assert_eq!(status, Some(0), "{text}");
    let of_stored = record("stored/corners/linear/seed-0");
    assert_eq!(of_stored.images.orientation, Orientation::Stored);
    assert_ne!(of_stored.images.train_pixels, of_seed.images.train_pixels);
}

#[test]
fn a_search_looks_at_all_images_before_the_supernet() {
    let root = tempfile::tempdir().unwrap();
    task(root.path());
    let search = |out: &str, flags: &[&str]| {
        let mut command = convpass("search");
        command.current_dir(root.path()).args(["--data", ".", "--task", "corners", "--out", out]);
        command.args(["--supernet-epochs", "1", "--epochs", "1", "--generations", "1"]);
        command.args(["--population", "2", "--parents", "1", "--widths", "0,2"]);
        command.args(["--backbone", BACKBONE, "--batch-size", "8", "--threads", "1"]).args(flags);
        command
    };
    names_the_images(search("out", &[]));
    assert!(!root.path().join("out/search.json").exists());
    for (out, flags, orientation) in [
        ("turned", &["--skip-unreadable"][..], Orientation::Exif),
        ("stored", &["--skip-unreadable", "--ignore-exif"], Orientation::Stored),
    ] {
        let (status, text) = run(&mut search(out, flags));
        assert_eq!(status, Some(0), "{text}");
        assert!(text.contains("1 test images are training images too"), "{text}");
        let out = root.path().join(out);
        let info = AdapterInfo::read(out.join("adapter.safetensors")).unwrap();
        assert_eq!(info.backbone.unwrap().preprocessing.unwrap().orientation, orientation);
        let record = fs::read(out.join("search.json")).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        assert_eq!(record["skipped"], 2);
        assert_eq!(record["orientation"], serde_json::to_value(orientation).unwrap());
    }
    let adapter = |out: &str| fs::read(root.path().join(out).join("adapter.safetensors")).unwrap();
    assert!(adapter("turned") != adapter("stored"));
}

#[test]
fn few_shot_looks_at_the_targets_too() {
    let corners = Corners::new();
    let flags = ["--method", "linear", "--epochs", "1", "--shots", "2", "--seeds", "0"];
    let flags = [&flags[..], &["--augment", "none", "--target", "blue=blue"]].concat();
    fs::write(corners.at("blue/north/2.png"), "no image").unwrap();
    fs::copy(corners.at("photos/train/south/0.png"), corners.at("blue/south/1.png")).unwrap();
    corners.refused("out", &flags, "1 of 40 images cannot be read");
    let (_, text) = corners.few_shot("out", &flags);
    assert!(text.contains("unreadable: ") && text.contains("blue/north/2.png"), "{text}");
    assert!(!corners.at("out").exists());
    let text = corners.trained("out", &[&flags[..], &["--skip-unreadable"]].concat());
    assert!(text.contains("skipped 1 of 40 images"), "{text}");
    assert!(text.contains("1 blue images are training images too"), "{text}");
    assert!(text.contains("left out: ") && text.contains("some.txt"), "{text}");
    assert_eq!(corners.record("out/2shot-seed0").images.skipped, 1);
}

#[test]
fn zero_shot_looks_at_all_sets() {
    let root = tempfile::tempdir().unwrap();
    photos(&root.path().join("photos"), &CLASSES, 2, 0);
    photos(&root.path().join("blue"), &CLASSES[1..3], 3, 2);
    fs::write(root.path().join("names.txt"), CLASSES.join("\n")).unwrap();
    fs::write(root.path().join("blue/south/1.png"), "no image").unwrap();
    fs::write(root.path().join("blue/notes.txt"), "no photo").unwrap();
    fs::copy(fixture("photos/exif_6.jpg"), root.path().join("photos/east/0.png")).unwrap();
    let zero_shot = |flags: &[&str]| {
        let mut command = convpass("zero-shot");
        command.current_dir(root.path()).arg("--backbone");
        command.arg(fixture("clip/model/hugging_face.safetensors"));
        command.args(["--heads", "2", "--activation", "quick_gelu", "--text-heads", "2"]);
        command.arg("--tokenizer").arg(fixture("clip/tokenizer/tokenizer.json"));
        command.args(["--classes", "names.txt", "--data", "photos", "--target", "blue=blue"]);
        run(command.args(["--threads", "1"]).args(flags))
    };
    let (status, text) = zero_shot(&[]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("unreadable: ") && text.contains("blue/south/1.png"), "{text}");
    assert!(text.contains("1 of 14 images cannot be read"), "{text}");
    assert!(text.contains("notes.txt") && !text.contains("top-1"), "{text}");
    let (status, text) = zero_shot(&["--skip-unreadable", "--head-out", "turned.safetensors"]);
    assert_eq!(status, Some(0), "{text}");
    let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    assert!(line("data ").contains(" 8 ") && line("blue ").contains(" 5 "), "{text}");
    // The scale of the head comes from the images.
    zero_shot(&["--skip-unreadable", "--ignore-exif", "--head-out", "stored.safetensors"]);
    let head = |name: &str| fs::read(root.path().join(name)).unwrap();
    assert!(head("turned.safetensors") != head("stored.safetensors"));
}
