//! The text that build.rs reads and writes, without a build.

// What only `main` uses.
#![allow(dead_code)]

#[path = "../../build.rs"]
mod build;

use std::fs;

use build::*;

#[test]
fn reads_the_version_of_a_wheel_and_of_a_zip() {
    let wheel = "from typing import Optional\n\n__version__ = '2.13.0+cpu'\ndebug = False\n";
    assert_eq!(parse_version(wheel).as_deref(), Some("2.13.0+cpu"));
    assert_eq!(parse_version("2.12.1+cu130\n").as_deref(), Some("2.12.1+cu130"));
    assert_eq!(parse_version("debug = False\n"), None);
    assert_eq!(parse_version(""), None);
    assert_eq!(minor("2.13.0+cpu"), "2.13");
    assert_eq!(minor("2.9"), "2.9");
}

#[test]
fn wants_what_the_locked_torch_sys_binds() {
    let lock = "[[package]]\nname = \"torch-sys\"\nversion = \"0.25.3\"\nsource = \"..\"\n\n[[package]]\nname = \"zip\"\nversion = \"0.26.0\"\n";
    let locked = torch_sys_versions(lock);
    assert_eq!(locked, ["0.25.3"]);
    assert_eq!(versions_wanted(&locked), ["2.12"]);
    assert_eq!(versions_wanted(&[]), ["2.11", "2.12", "2.13"]);
}

#[test]
fn refuses_another_version_and_says_what_to_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let (lib, out) = (dir.path().join("torch/lib"), dir.path().join("target/out"));
    fs::create_dir_all(&lib).expect("a folder");
    fs::create_dir_all(&out).expect("a folder");
    let lock = "name = \"torch-sys\"\nversion = \"0.26.0\"\n";
    fs::write(dir.path().join("Cargo.lock"), lock).expect("a file");

    assert_eq!(
        check_version(&lib, &out, false),
        Ok(()),
        "a libtorch that does not say its version passes"
    );
    fs::write(dir.path().join("torch/version.py"), "__version__ = '2.13.1'\n").expect("a file");
    assert_eq!(check_version(&lib, &out, false), Ok(()));

    fs::write(dir.path().join("torch/version.py"), "__version__ = '2.12.0+cpu'\n").expect("a file");
    assert_eq!(check_version(&lib, &out, true), Ok(()));
    let message = check_version(&lib, &out, false).expect_err("the wrong version");
    for part in [
        "2.12.0+cpu",
        "2.13.x wanted",
        "make libtorch",
        "LIBTORCH to",
        "LIBTORCH_USE_PYTORCH=1",
        BYPASS,
    ] {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}
