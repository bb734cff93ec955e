//! Makes the program search for libtorch at run time in the folder where it was at build time.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=DEP_CONVPASS_LIBTORCH_LIB");
    let Some(lib) = std::env::var_os("DEP_CONVPASS_LIBTORCH_LIB").map(PathBuf::from) else {
        return;
    };
    // The launcher reads this variable when it is compiled.
    println!("cargo:rustc-env=CONVPASS_LIBTORCH_LIB={}", lib.display());
    // If libtorch lies inside the checkout, its path is relative to the program, so that the
    // checkout can be moved.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
    let checkout = manifest.parent().and_then(|checkout| checkout.canonicalize().ok());
    let inside =
        checkout.and_then(|checkout| lib.strip_prefix(checkout).ok().map(Path::to_path_buf));
    if let (Some(inside), true) = (inside, cfg!(target_os = "linux")) {
        for up in ["../..", "../../.."] {
            println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/{up}/{}", inside.display());
        }
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
