//! Finds libtorch and starts `convpass-program`, which is linked with it.
//!
//! A program that is linked with libtorch does not start at all if libtorch was moved, and the
//! loader does not say what to do. The launcher is not linked with libtorch, so it always starts.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The folder of libtorch's libraries when this program was built.
const BUILT: Option<&str> = option_env!("CONVPASS_LIBTORCH_LIB");

/// The environment variable with the folders that the loader searches first.
const SEARCHED: &str =
    if cfg!(target_os = "macos") { "DYLD_LIBRARY_PATH" } else { "LD_LIBRARY_PATH" };

fn main() -> ExitCode {
    match libtorch().and_then(|folder| start(&folder)) {
        Ok(code) => code,
        Err(reason) => {
            eprintln!("error: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the folder of libtorch's libraries. If LIBTORCH is set, it is that folder or its `lib`.
/// Otherwise it is the folder of the build, else `.libtorch` in the checkout that holds this
/// program.
fn libtorch() -> Result<PathBuf, String> {
    let is_there = |folder: &PathBuf| {
        ["libtorch_cpu.so", "libtorch_cpu.dylib"].iter().any(|name| folder.join(name).is_file())
    };
    if let Some(root) = std::env::var_os("LIBTORCH").map(PathBuf::from) {
        let found = [root.join("lib"), root.clone()].into_iter().find(is_there);
        return found.ok_or_else(|| {
            format!(
                "LIBTORCH is {}, but neither that folder nor its lib holds libtorch",
                root.display()
            )
        });
    }
    let program = std::env::current_exe().unwrap_or_default();
    let built = BUILT.map(PathBuf::from);
    let near = program.ancestors().nth(3).map(|checkout| checkout.join(".libtorch/torch/lib"));
    built.into_iter().chain(near).find(is_there).ok_or_else(|| {
        let lost = match BUILT {
            Some(built) => {
                format!("libtorch is no longer in {built}, where it was when convpass was built")
            }
            None => "libtorch was not found".to_owned(),
        };
        format!(
            "{lost}; set LIBTORCH to the folder of an unpacked libtorch of the same version, or to \
             the `torch` folder of an installed PyTorch"
        )
    })
}

/// Runs `convpass-program` in place of this process; its loader searches the folder `libtorch`
/// first.
fn start(libtorch: &Path) -> Result<ExitCode, String> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let program = own.with_file_name(format!("convpass-program{}", std::env::consts::EXE_SUFFIX));
    let mut folders = vec![libtorch.to_path_buf()];
    folders.extend(std::env::var_os(SEARCHED).iter().flat_map(std::env::split_paths));
    let folders: OsString = std::env::join_paths(folders).map_err(|e| e.to_string())?;
    let mut command = Command::new(&program);
    command.args(std::env::args_os().skip(1)).env(SEARCHED, folders);
    run(command).map_err(|e| format!("{}: {e}", program.display()))
}

#[cfg(unix)]
fn run(mut command: Command) -> std::io::Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    Err(command.exec())
}

#[cfg(not(unix))]
fn run(mut command: Command) -> std::io::Result<ExitCode> {
    let code = command.status()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
