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

/// Runs the test of this name in a process of its own, and fails as it does. Returns whether this
/// is that process, so that a test begins with `if !child::is_alone(NAME) { return }`.
///
/// For tests that draw from libtorch's generator, or count its threads: the tests of one process
/// share both.
pub fn is_alone(name: &str) -> bool {
    const CHILD: &str = "CONVPASS_TEST_ALONE";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let child = test(name).env(CHILD, "").output().unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && text.contains("1 passed"), "{text}");
    false
}
