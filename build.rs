//! Build script: passes the folder of libtorch on to the linker, the loader and dependent crates,
//! rejects a libtorch that this version of `tch` does not support, and compiles the C++ code in src/ffi.
//!
//! torch-sys finds and links libtorch; this script reads the folder that torch-sys exports.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// Each minor release of `tch` and torch-sys with the libtorch release that it binds.
pub(crate) const PAIRS: [(&str, &str); 3] = [("0.24", "2.11"), ("0.25", "2.12"), ("0.26", "2.13")];

/// Disables the version check if it is set to any value. torch-sys reads the same variable.
pub(crate) const BYPASS: &str = "LIBTORCH_BYPASS_VERSION_CHECK";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed={BYPASS}");
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() {
        return;
    }
    // torch-sys exports this variable on Linux and macOS. Windows has no rpath: its loader searches
    // PATH.
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    let Some(lib) = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from) else { return };
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let is_bypassed = env::var_os(BYPASS).is_some();
    let result = check_version(&lib, &out_dir, is_bypassed).and_then(|()| hand_on(&lib, &out_dir));
    if let Err(message) = result {
        eprintln!("error: {message}");
        std::process::exit(1);
    }
    compile(lib.parent().unwrap_or(&lib));
}

/// Compiles the code that uses parts of libtorch with a C++ interface only. torch-sys needs the
/// same compiler and headers.
pub(crate) fn compile(libtorch: &Path) {
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let root = env::var_os("LIBTORCH_INCLUDE").map_or(libtorch.to_path_buf(), PathBuf::from);
    let include = root.join("include");
    let source = |name: &str| {
        let file = format!("src/ffi/{name}.cpp");
        println!("cargo:rerun-if-changed={file}");
        println!("cargo:rerun-if-changed=src/ffi/caught.h");
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").warnings(false).file(file);
        build.include(include.join("torch/csrc/api/include")).include(&include);
        build
    };
    source("torch").compile("convpass_torch");
    source("linear").compile("convpass_linear");
    // Elsewhere libtorch_cuda is not loaded by name.
    let is_linux = env::var_os("CARGO_CFG_TARGET_OS").is_some_and(|os| os == "linux");
    if env::var_os("CARGO_FEATURE_CUDA").is_some() && is_linux {
        source("cuda_graph").compile("convpass_cuda_graph");
    }
    if env::var_os("CARGO_FEATURE_DISTRIBUTED").is_some() {
        // The headers of gloo, which libtorch is compiled with and does not ship.
        println!("cargo:rerun-if-changed=src/ffi/gloo");
        let mut build = source("distributed");
        build.include("src/ffi/gloo").define("USE_DISTRIBUTED", None).define("USE_C10D_GLOO", None);
        build.compile("convpass_distributed");
    }
}

/// Passes the folder of libtorch on to the linker, the loader and dependent crates.
pub(crate) fn hand_on(lib: &Path, out_dir: &Path) -> Result<(), String> {
    let lib = lib.canonicalize().map_err(|e| not_found(lib, &e))?;
    // The build.rs of a direct dependent reads this as DEP_CONVPASS_LIBTORCH_LIB.
    println!("cargo:libtorch_lib={}", lib.display());
    // For this crate's own tests, examples and benches, so that they also start outside cargo.
    for path in run_paths(&lib) {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{path}");
    }
    // Link arguments do not reach dependents. However, for `cargo run` and `cargo test`, cargo puts
    // every link-search folder inside the target folder on the loader's path, and a symlink counts
    // as inside.
    let link = out_dir.join("libtorch");
    let root = lib.parent().unwrap_or(&lib);
    symlink(root, &link).map_err(|e| format!("{}: cannot create: {e}", link.display()))?;
    let search = if root == lib { link } else { link.join(lib.file_name().unwrap_or_default()) };
    println!("cargo:rustc-link-search=native={}", search.display());
    Ok(())
}

/// Returns the folders in which the loader searches for libtorch when a program of this checkout
/// starts. If libtorch lies inside the checkout, paths relative to the program come first, so that
/// a checkout can be moved. The last entry is the current absolute path of libtorch.
pub(crate) fn run_paths(lib: &Path) -> Vec<String> {
    let checkout = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
    let mut paths = Vec::new();
    let checkout = checkout.canonicalize().ok().filter(|_| cfg!(target_os = "linux"));
    if let Some(inside) = checkout.and_then(|checkout| lib.strip_prefix(checkout).ok()) {
        // Relative paths for target/release, target/release/examples and
        // target/TRIPLE/release/examples.
        let up = ["../..", "../../..", "../../../.."];
        paths.extend(up.map(|up| format!("$ORIGIN/{up}/{}", inside.display())));
    }
    paths.push(lib.display().to_string());
    paths
}

/// Makes `link` a symlink to `target` and replaces an older link.
pub(crate) fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    match fs::remove_file(link) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(target, link)?;
    Ok(())
}

/// Compares the version of libtorch with the version that torch-sys binds in this build.
///
/// A libtorch that does not state its version passes; those of distributions may not state it.
pub(crate) fn check_version(lib: &Path, out_dir: &Path, is_bypassed: bool) -> Result<(), String> {
    let root = lib.parent().unwrap_or(lib);
    let Some((file, found)) = version_found(root) else { return Ok(()) };
    println!("cargo:rerun-if-changed={}", file.display());
    let wanted = versions_wanted(&locked_torch_sys(out_dir));
    if is_bypassed || wanted.iter().any(|w| minor(&found) == *w) {
        return Ok(());
    }
    Err(wrong_version(&file, &found, &wanted))
}

/// Returns the file that states the version of libtorch, and the version: `version.py` of a wheel
/// or `build-version` of a zip file.
pub(crate) fn version_found(root: &Path) -> Option<(PathBuf, String)> {
    ["version.py", "build-version"].iter().find_map(|name| {
        let file = root.join(name);
        let version = parse_version(&fs::read_to_string(&file).ok()?)?;
        Some((file, version))
    })
}

/// Returns `2.13.0+cpu` from the line `__version__ = '2.13.0+cpu'`, or from a file that holds only
/// the version.
pub(crate) fn parse_version(text: &str) -> Option<String> {
    let assigned = text.lines().find_map(|l| l.strip_prefix("__version__ = "));
    let version = assigned.unwrap_or(text).trim().trim_matches(['\'', '"']);
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.to_string())
}

/// Returns the major and minor part of a version, such as `2.13` of `2.13.0+cpu`.
pub(crate) fn minor(version: &str) -> &str {
    let end = version.match_indices('.').nth(1).map_or(version.len(), |(i, _)| i);
    &version[..end]
}

/// Returns the libtorch releases that the versions in `torch_sys` bind, or all known releases if no
/// version is known.
pub(crate) fn versions_wanted(torch_sys: &[String]) -> Vec<&'static str> {
    let of = |keep: &dyn Fn(&str) -> bool| -> Vec<&'static str> {
        PAIRS.iter().filter(|(sys, _)| keep(sys)).map(|(_, torch)| *torch).collect()
    };
    let known = of(&|sys| torch_sys.iter().any(|v| minor(v) == sys));
    if known.is_empty() { of(&|_| true) } else { known }
}

/// Returns the torch-sys versions in the nearest Cargo.lock above the build folder.
///
/// Cargo does not tell a build script the versions of its dependencies. If the target folder is
/// outside of the workspace, there is no lock file above it, and the result is empty.
pub(crate) fn locked_torch_sys(out_dir: &Path) -> Vec<String> {
    let lock = out_dir.ancestors().map(|dir| dir.join("Cargo.lock")).find(|file| file.is_file());
    let Some(lock) = lock else { return Vec::new() };
    println!("cargo:rerun-if-changed={}", lock.display());
    torch_sys_versions(&fs::read_to_string(lock).unwrap_or_default())
}

/// Returns the `version` lines that follow `name = "torch-sys"` in the text of a Cargo.lock.
pub(crate) fn torch_sys_versions(lock: &str) -> Vec<String> {
    let lines: Vec<&str> = lock.lines().map(str::trim).collect();
    lines
        .windows(2)
        .filter(|pair| pair[0] == r#"name = "torch-sys""#)
        .filter_map(|pair| pair[1].strip_prefix("version = "))
        .map(|version| version.trim_matches('"').to_string())
        .collect()
}

pub(crate) fn wrong_version(file: &Path, found: &str, wanted: &[&str]) -> String {
    format!(
        "found libtorch {found} ({}), {} wanted\n{}\nor set {BYPASS}=1 to build against it anyway",
        file.display(),
        wanted.iter().map(|w| format!("{w}.x")).collect::<Vec<_>>().join(" or "),
        ways(wanted.last().unwrap_or(&"")),
    )
}

pub(crate) fn not_found(lib: &Path, e: &io::Error) -> String {
    format!("{}: cannot find libtorch here: {e}\n{}", lib.display(), ways(PAIRS[PAIRS.len() - 1].1))
}

/// Describes how to get libtorch `version`.
pub(crate) fn ways(version: &str) -> String {
    format!(
        "Get libtorch in one of three ways:\n\
         - in a checkout of convpass, unset LIBTORCH and run `make libtorch`;\n\
         - set LIBTORCH to the folder of an unpacked libtorch {version}.x, or to the `torch` folder that \
         `pip install torch=={version}.0` makes;\n\
         - set LIBTORCH_USE_PYTORCH=1 to use the PyTorch {version}.x of the `python3` on your PATH.\n\
         With none of them set, the feature `download-libtorch` fetches it during the build."
    )
}
