//! This very program again, for what needs a process of its own.

use std::process::Command;

/// A process that runs one test alone.
pub fn test(name: &str) -> Command {
    // The file at this program's path may have been built anew since.
    let program = if cfg!(target_os = "linux") {
        "/proc/self/exe".into()
    } else {
        std::env::current_exe().unwrap()
    };
    let mut command = Command::new(program);
    command.args(["--exact", name]);
    command
}
