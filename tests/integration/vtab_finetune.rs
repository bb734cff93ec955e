//! The example `vtab_finetune` as a process: what one task leaves behind, and what it refuses.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use convpass::data::bundled::{self, BundledTask};
use convpass::train::RunRecord;
use convpass::{FrozenViT, PetlModel};
use tch::Device;

/// The program, built as this test was.
fn program() -> Command {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let program = BUILT.get_or_init(|| {
        // <target>/<profile>/deps/<this test>
        let test = std::env::current_exe().unwrap();
        let profile = test.ancestors().nth(2).unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        // With the features of the whole workspace, as `make test` builds it: nothing is built anew.
        cargo.args(["build", "--quiet", "--workspace", "--example", "vtab_finetune"]);
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        cargo.arg("--target-dir").arg(profile.parent().unwrap());
        assert!(cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success());
        profile.join("examples/vtab_finetune")
    });
    Command::new(program)
}

/// A run on the digits in `root`, with more flags.
fn finetune(root: &Path, flags: &[&str]) -> Output {
    let mut command = program();
    command.args(["--data", "data", "--task", "digits", "--backbone", "vit.safetensors"]);
    command.args(["--lr", "1e-2", "--normalization", "half"]);
    command.args(["--batch-size", "50", "--threads", "1"]).args(flags);
    command.current_dir(root).output().unwrap()
}

#[test]
fn one_task_leaves_an_adapter_and_a_record() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    bundled::write(root.join("data"), BundledTask::Digits, 32, 0).unwrap();
    bundled::write_backbone(root.join("vit.safetensors")).unwrap();
    for out in ["first", "second"] {
        let done = finetune(root, &["--method", "linear", "--epochs", "20", "--out", out]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let mut names: Vec<_> = std::fs::read_dir(root.join(out))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["adapter.safetensors", "run.json"]);
    }
    let adapter = |out: &str| std::fs::read(root.join(out).join("adapter.safetensors")).unwrap();
    assert!(adapter("first") == adapter("second"), "the same command, the same bytes");

    let record = RunRecord::load(root.join("first/run.json")).unwrap();
    assert_eq!((record.task.as_str(), record.backbone.as_str()), ("digits", "vit.safetensors"));
    assert_eq!(record.train.schedule.warmup_epochs, 2);
    assert!(record.test_top1.unwrap() > 60.0, "{:?}", record.test_top1);
    let backbone = FrozenViT::open(root.join(record.backbone), Device::Cpu).unwrap();
    let model = PetlModel::load_adapter(backbone, root.join("first/adapter.safetensors")).unwrap();
    assert_eq!(model.config(), &record.model);
}

#[test]
fn a_method_that_there_is_not_is_refused_with_the_names() {
    let root = tempfile::tempdir().unwrap();
    bundled::write(root.path().join("data"), BundledTask::Digits, 32, 0).unwrap();
    bundled::write_backbone(root.path().join("vit.safetensors")).unwrap();
    let refused = finetune(root.path(), &["--method", "lra", "--out", "out"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("`lora`"), "{said}");
    assert!(!root.path().join("out").exists());
}
