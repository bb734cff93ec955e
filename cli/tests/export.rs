//! `export`: what it writes, and what it refuses.

use std::fs;
use std::path::Path;
use std::process::Command;

use convpass::{ConvBypassConfig, FrozenViT, Method, PetlConfig, PetlModel};
use tch::Device;

use crate::process::{BACKBONE, convpass, copy_of_trained, run};

fn export(folder: &Path) -> Command {
    let mut command = convpass("export");
    command.current_dir(folder);
    command
}

#[test]
fn a_run_becomes_an_onnx_file_or_weights() {
    let root = copy_of_trained();
    let path = |name: &str| root.path().join(name);
    let of_run = || {
        let mut command = export(root.path());
        command.args(["--adapter", "run"]);
        command
    };
    let (status, text) = run(of_run().args(["--out", "model.onnx"]));
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("model.onnx: ONNX, operators of version 17"), "{text}");
    let bytes = fs::read(path("model.onnx")).unwrap();
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    // The run normalized with 0.5.
    assert!(holds(r#""mean":[0.5,0.5,0.5]"#) && holds("logits"));
    // Nothing is overwritten unless it is asked for, and the bytes are the same each time.
    let (status, text) = run(of_run().args(["--out", "model.onnx"]));
    assert!(status == Some(1) && text.contains("--force"), "{text}");
    let (status, text) = run(of_run().args(["--out", "model.onnx", "--force"]));
    assert_eq!(status, Some(0), "{text}");
    assert!(bytes == fs::read(path("model.onnx")).unwrap());
    let (status, text) = run(of_run().args(["--out", "split.onnx", "--external-data"]));
    assert!(status == Some(0) && text.contains("split.onnx.data"), "{text}");
    assert!(path("split.onnx.data").exists());
    let timm = ["--format", "safetensors", "--names", "timm", "--out", "timm.safetensors"];
    let (status, text) = run(of_run().args(timm));
    assert!(status == Some(0) && text.contains("VisionTransformer"), "{text}");
    let opened = FrozenViT::open(path("timm.safetensors"), Device::Cpu).unwrap();
    let original = FrozenViT::open(BACKBONE, Device::Cpu).unwrap();
    assert_eq!(opened.digest(), original.digest(), "a probe leaves the backbone as it is");
    let (status, text) =
        run(export(root.path()).args(["--backbone", BACKBONE, "--out", "features.onnx"]));
    assert_eq!(status, Some(0), "{text}");
}

#[test]
fn what_cannot_be_exported_is_said_and_nothing_is_written() {
    let root = copy_of_trained();
    let backbone = FrozenViT::open(BACKBONE, Device::Cpu).unwrap();
    let method = Method::ConvBypass(ConvBypassConfig::default());
    let model = PetlModel::new(backbone, &PetlConfig::new(method, 10)).unwrap();
    model.save_adapter(root.path().join("bypass.safetensors")).unwrap();
    let other = convpass::ViTConfig { depth: 1, embed_dim: 64, num_heads: 1, ..Default::default() };
    let other = FrozenViT::random(&other, 0, Device::Cpu).unwrap();
    let model = PetlModel::new(other, &PetlConfig::new(Method::LinearProbe, 10)).unwrap();
    model.save_adapter(root.path().join("other.safetensors")).unwrap();
    fs::create_dir(root.path().join("folder")).unwrap();
    let files = fs::read_dir(root.path()).unwrap().count();
    let timm = ["--format", "safetensors", "--names", "timm"];
    let beside = ["--backbone", BACKBONE, "--normalization", "half"];
    for (flags, part) in [
        (vec!["--adapter", "none", "--out", "x"], "none"),
        (vec!["--adapter", "digits/classes.txt", "--out", "x"], "classes.txt"),
        (vec!["--adapter", "bypass.safetensors", "--out", "x"], "--backbone is needed"),
        (
            [&["--adapter", "bypass.safetensors", "--out", "x"], &beside[..], &timm].concat(),
            "conv_bypass cannot be exported as weights under timm's names",
        ),
        (
            [&["--adapter", "other.safetensors", "--out", "x"], &beside[..]].concat(),
            "another backbone",
        ),
        (vec!["--adapter", "run", "--out", "folder"], "it is a folder"),
        (
            vec!["--adapter", "run", "--out", "run/adapter.safetensors", "--force"],
            "read from this file",
        ),
        (vec!["--adapter", "run", "--out", "nowhere/x.onnx"], "nowhere"),
    ] {
        let (status, text) = run(export(root.path()).args(&flags));
        assert!(status == Some(1) && text.contains(part), "{flags:?}: {text}");
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), files);
}
