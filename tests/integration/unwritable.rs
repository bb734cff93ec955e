//! Places where writing fails: an error names the path, nothing is half-written, and the old files
//! stay.
//!
//! The faults are real ones, in a child process. Namespaces make them act on root as well.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use convpass::checkpoint::TensorFile;
use convpass::data::decode_image;
use convpass::export::{MergedWeights, OnnxModel, WeightNames};
use convpass::model::PeftOptions;
use convpass::train::{Observer, RunCheckpoint, StepReport, fit_resumable};
use convpass::{AdapterInfo, Error, FileList, LoraConfig, Method, PetlConfig, PetlModel, Result};

use crate::resume::bars;
use crate::support::{small_vit, train_config};

/// What makes writing fail in a folder.
struct Fault {
    /// The kind of the I/O error, as `Debug` writes it.
    kind: &'static str,
    /// The arguments of `unshare`, which gives the process namespaces of its own; none where the
    /// fault does not need them.
    namespaces: &'static [&'static str],
    /// A shell script. `$1` is the folder, and `$2` is one with the files that are to be in it.
    script: &'static str,
}

const FAULTS: [Fault; 4] = [
    Fault {
        kind: "StorageFull",
        namespaces: &["--mount", "--map-root-user"],
        script: r#"mount -t tmpfs -o size=1m tmpfs "$1" && cp -r "$2"/. "$1" || exit 77
            cat /dev/zero >"$1"/filler 2>/dev/null"#,
    },
    Fault {
        kind: "FileTooLarge",
        namespaces: &[],
        script: r#"cp -r "$2"/. "$1" || exit 77
            trap '' XFSZ; ulimit -f 0"#,
    },
    Fault {
        kind: "ReadOnlyFilesystem",
        namespaces: &["--mount", "--map-root-user"],
        script: r#"mount -t tmpfs tmpfs "$1" && cp -r "$2"/. "$1" || exit 77
            mount -o remount,ro "$1" || exit 77"#,
    },
    Fault {
        kind: "PermissionDenied",
        // In a namespace that does not know the user, root has to keep to the permissions as well.
        namespaces: &["--user"],
        script: r#"cp -r "$2"/. "$1" || exit 77
            find "$1" -type d -exec chmod a-w {} +"#,
    },
];

/// The variable that tells the child the kind of the error, where it is to write, and where the
/// same files are once more.
const CHILD: &str = "CONVPASS_TEST_FAULT";
/// A list that is there from the start.
const LIST: &str = "images.csv";
const TEST: &str = "unwritable::where_writing_fails_the_old_files_stay";

#[test]
fn where_writing_fails_the_old_files_stay() {
    if let Ok(told) = std::env::var(CHILD) {
        let told: Vec<&str> = told.split('\n').collect();
        return writing_fails(told[0], Path::new(told[1]), Path::new(told[2]));
    }
    let before = tempfile::tempdir().unwrap();
    std::fs::write(before.path().join(LIST), "path,label\na.png,0\nb.png,1\n").unwrap();
    for (name, result) in write_all(before.path()) {
        assert!(result.is_ok(), "{name}: {result:?}");
    }
    for fault in &FAULTS {
        in_child(fault, before.path());
    }
}

/// Runs this test in a child process with the fault. Where the system gives no namespaces, the
/// faults that need them are left out.
fn in_child(fault: &Fault, before: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = match fault.namespaces {
        [] => Command::new("sh"),
        namespaces => {
            let mut command = Command::new("unshare");
            command.args(namespaces).arg("sh");
            command
        }
    };
    let script = format!("{}\nshift 2\nexec \"$@\"", fault.script);
    command.arg("-c").arg(script).arg("sh").arg(folder.path()).arg(before);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", TEST, "--nocapture"]);
    let told = format!("{}\n{}\n{}", fault.kind, folder.path().display(), before.display());
    let output = command.env(CHILD, told).output();
    let text = match &output {
        Ok(output) => [&output.stdout[..], &output.stderr].concat(),
        Err(error) => error.to_string().into_bytes(),
    };
    // So that the folder can be removed again.
    let writable = Command::new("chmod").args(["-R", "u+w"]).arg(folder.path()).status();
    assert!(writable.unwrap().success());
    let text = String::from_utf8_lossy(&text);
    let left_out = !fault.namespaces.is_empty() && !text.contains("running 1 test");
    assert!(left_out || text.contains("1 passed"), "{}: {text}", fault.kind);
    if left_out {
        eprintln!("left out: {} ({text})", fault.kind);
    }
}

/// Tries everything that writes, in a folder where writing fails.
fn writing_fails(kind: &str, folder: &Path, before: &Path) {
    for (name, result) in write_all(folder) {
        match result {
            Err(Error::Io { path, source }) => {
                assert!(path.starts_with(folder), "{name}: {}", path.display());
                assert_eq!(format!("{:?}", source.kind()), kind, "{name}: {source}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    if kind == "PermissionDenied" {
        reading_fails(&folder.join("adapter.safetensors"));
    }
    let mut found = files(folder);
    found.remove(Path::new("filler"));
    let expected = files(before);
    assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
    for (name, bytes) in &expected {
        assert!(found[name] == *bytes, "{} is another", name.display());
    }
}

/// Takes the permission to read a file away for a moment.
fn reading_fails(file: &Path) {
    let before = std::fs::metadata(file).unwrap().permissions();
    std::fs::set_permissions(file, Permissions::from_mode(0o000)).unwrap();
    let is_refused = |error: &Error| {
        matches!(error, Error::Io { path, source }
            if path == file && source.kind() == ErrorKind::PermissionDenied)
    };
    for error in [
        TensorFile::open(file).unwrap_err(),
        AdapterInfo::read(file).unwrap_err(),
        PetlModel::load_adapter(small_vit(), file).unwrap_err(),
        FileList::read("", file, None).unwrap_err(),
        decode_image(file).unwrap_err(),
    ] {
        assert!(is_refused(&error), "{error:?}");
    }
    std::fs::set_permissions(file, before).unwrap();
}

/// The config of an adapter for PEFT cannot be written, because a folder has its name.
#[test]
fn tensors_for_peft_stay_where_their_config_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let save = |seed| {
        let config = PetlConfig { seed, ..PetlConfig::new(Method::Lora(LoraConfig::default()), 3) };
        let model = PetlModel::new(small_vit(), &config).unwrap();
        model.save_peft(folder.path(), &PeftOptions::default())
    };
    save(1).unwrap();
    let config = folder.path().join("adapter_config.json");
    std::fs::remove_file(&config).unwrap();
    std::fs::create_dir(&config).unwrap();
    let before = files(folder.path());
    let error = save(2).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == config), "{error}");
    assert!(files(folder.path()) == before);
    std::fs::remove_dir(&config).unwrap();
    save(2).unwrap();
    assert!(files(folder.path()) != before);
}

/// Returns the content of each file below `folder` by its path there.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![folder.to_path_buf()]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let bytes = std::fs::read(&path).unwrap();
                found.insert(path.strip_prefix(folder).unwrap().to_path_buf(), bytes);
            }
        }
    }
    found
}

/// Ends a run after its first step.
struct OneStep;

impl Observer for OneStep {
    fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
        ControlFlow::Break(())
    }
}

/// Tries everything that writes, and returns the name and the result of each.
fn write_all(folder: &Path) -> Vec<(&'static str, Result<()>)> {
    let lora = PetlConfig::new(Method::Lora(LoraConfig::default()), 3);
    let mut model = PetlModel::new(small_vit(), &lora).unwrap();
    let weights = MergedWeights::new(&model, WeightNames::Timm).unwrap();
    let onnx = OnnxModel::new(&model).unwrap();
    let list = FileList::read("", folder.join(LIST), None).unwrap();
    let checkpoint = RunCheckpoint { path: folder.join("state"), every: 1 };
    let (images, config) = (bars(8, 16, 0), train_config(2, 4));
    vec![
        ("an adapter", model.save_adapter(folder.join("adapter.safetensors"))),
        ("an adapter for PEFT", model.save_peft(folder.join("peft"), &PeftOptions::default())),
        ("weights", weights.save(folder.join("merged.safetensors"))),
        ("an ONNX file", onnx.save(folder.join("model.onnx")).map(drop)),
        ("an ONNX file with data", onnx.save_with_data(folder.join("large.onnx")).map(drop)),
        ("a list", list.save(folder.join(LIST))),
        (
            "the state of a run",
            fit_resumable(&mut model, &images, None, &config, &checkpoint, &mut OneStep).map(drop),
        ),
    ]
}
