//! `report`, `search`, `zero-shot` and `audit`, each run once.

use std::fs;
use std::path::{Path, PathBuf};

use convpass::Method;

use crate::process::{BACKBONE, convpass, copy_of_trained, photos, run, trained};

#[test]
fn a_report_looks_at_the_test_images_once() {
    let root = copy_of_trained();
    let report = || {
        let mut command = convpass("report");
        command.current_dir(root.path()).args(["run", "--data", ".", "--no-png"]);
        run(command.args(["--backbone", BACKBONE]))
    };
    let (status, text) = report();
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("797 images") && text.contains("Linear probe"), "{text}");
    let page = fs::read_to_string(root.path().join("run/report/index.html")).unwrap();
    assert!(page.contains("digits"));
    assert!(root.path().join("run/predictions.json").exists());
    let (_, text) = report();
    assert!(!text.contains("797 images"), "{text}");
}

#[test]
fn a_search_leaves_a_method_and_its_adapter() {
    let root = tempfile::tempdir().unwrap();
    let mut command = convpass("search");
    command.current_dir(root.path()).arg("--data").arg(trained()).args(["--task", "digits"]);
    command.args(["--supernet-epochs", "1", "--epochs", "1", "--generations", "1"]);
    command.args([
        "--population",
        "2",
        "--parents",
        "1",
        "--widths",
        "0,2",
        "--backbone",
        BACKBONE,
    ]);
    command.args(["--normalization", "half", "--batch-size", "200"]);
    let (status, text) = run(&mut command);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("trained anew") && text.contains("% on the test images"), "{text}");
    let out = root.path().join("runs/digits-search");
    let method: Method = fs::read_to_string(out.join("method.json")).unwrap().parse().unwrap();
    assert_eq!(method.name(), "compose");
    assert!(out.join("adapter.safetensors").exists() && out.join("search.json").exists());
}

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/integration/fixtures/clip").join(path)
}

/// The golden CLIP is untrained: what it says of a photo does not matter.
#[test]
fn class_names_classify_and_become_a_head() {
    let root = tempfile::tempdir().unwrap();
    let classes = ["east", "north", "south", "west"];
    photos(&root.path().join("photos"), &classes, 2, 0);
    photos(&root.path().join("blue"), &classes[1..3], 3, 2);
    fs::write(root.path().join("names.txt"), classes.join("\n")).unwrap();
    let clip = |subcommand: &str| {
        let mut command = convpass(subcommand);
        command.current_dir(root.path()).arg("--backbone");
        command.arg(fixture("model/hugging_face.safetensors"));
        command.args(["--heads", "2", "--activation", "quick_gelu"]);
        command
    };
    let mut command = clip("zero-shot");
    command.arg("--tokenizer").arg(fixture("tokenizer/tokenizer.json")).args(["--text-heads", "2"]);
    command.args(["--classes", "names.txt", "--data", "photos", "--target", "blue=blue"]);
    let (status, text) = run(command.args(["--head-out", "head.safetensors"]));
    assert_eq!(status, Some(0), "{text}");
    let line = |name: &str| text.lines().find(|line| line.contains(name)).unwrap_or_default();
    assert!(line("data ").contains(" 8 ") && line("blue ").contains(" 6 "), "{text}");
    let mut command = clip("few-shot");
    command.args(["--data", "photos", "--test", "photos", "--head", "head.safetensors"]);
    command.args(["--shots", "1", "--seeds", "0", "--epochs", "1", "--augment", "none"]);
    let (status, text) = run(&mut command);
    assert_eq!(status, Some(0), "{text}");
    assert!(root.path().join("runs/photos-conv_bypass-few-shot/results.csv").exists());
}

#[test]
fn inspect_says_where_each_setting_comes_from() {
    let told = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/integration/fixtures/told");
    let inspect = |case: &str| run(convpass("inspect").arg(told.join(case)));
    let (status, text) = inspect("timm_quickgelu");
    assert_eq!(status, Some(0), "{text}");
    let line = |name: &str| text.lines().find(|line| line.contains(name)).unwrap_or_default();
    assert!(line("activation").contains("QuickGelu"), "{text}");
    assert!(line("activation").contains("vit_base_patch16_clip_quickgelu_224"), "{text}");
    assert!(line("preprocessing.mean").contains("config.json"), "{text}");
    assert!(line("tensors used").contains("2 skipped"), "{text}");
    let (_, text) =
        run(convpass("inspect").arg(told.join("open_clip_clipa")).args(["--eps", "1e-3"]));
    assert!(text.contains("AverageThenNorm") && text.contains("open_clip_config.json"), "{text}");
    assert!(text.contains("given by the caller"), "{text}");
    let json = run(convpass("inspect").arg(told.join("hf_msn")).args(["--format", "json"])).1;
    let found: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(found["settings"][1]["value"], "1e-6", "{json}");
    let bare = tempfile::tempdir().unwrap();
    let file = bare.path().join("model.safetensors");
    fs::copy(told.join("hf_relu/model.safetensors"), &file).unwrap();
    let (status, text) = run(convpass("inspect").arg(&file));
    assert!(status == Some(1) && text.contains("num_heads") && text.contains("--heads"), "{text}");
}

#[test]
fn an_audit_counts_as_published() {
    let (status, text) = run(convpass("audit").args(["--format", "csv"]));
    assert_eq!(status, Some(0), "{text}");
    let line = text.lines().find(|line| line.contains(",conv_bypass h=8,")).unwrap();
    assert!(line.starts_with("vit_base_patch16_224,") && line.contains(",327552,"), "{line}");
    let (status, text) = run(convpass("audit").args(["--preset", "none"]));
    assert!(status == Some(1) && text.contains("vit_base_patch16_224"), "{text}");
}
