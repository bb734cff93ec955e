//! Compiles the device against the libtorch that torch-sys found.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=src/device.cpp");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let lib =
        PathBuf::from(std::env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys exports it"));
    let root = std::env::var_os("LIBTORCH_INCLUDE").map(PathBuf::from);
    let root = root.unwrap_or_else(|| lib.parent().unwrap_or(&lib).to_path_buf());
    let include = root.join("include");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").warnings(false).file("src/device.cpp");
    build.include(include.join("torch/csrc/api/include")).include(include);
    build.compile("convpass_accelerator");
}
