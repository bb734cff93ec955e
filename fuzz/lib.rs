//! What the fuzz targets call: the readers of the library, and the plans of the command.

pub mod readers;

// The command is no library, so its reader of plans is compiled a second time here.
#[allow(dead_code, missing_docs)]
#[path = "../cli/src/error.rs"]
mod error;
#[allow(dead_code, missing_docs)]
#[path = "../cli/src/failure.rs"]
mod failure;
#[allow(dead_code, missing_docs, unused_imports)]
#[path = "../cli/src/plan/mod.rs"]
mod plan;

/// Reads a plan of a sweep and asks for each of its runs, of a small plan.
pub fn plan(input: &[u8]) -> bool {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = folder.path().join("plan.toml");
    std::fs::write(&path, input).expect("a temporary file can be written");
    let Ok(plan) = plan::SweepPlan::read(&path) else { return false };
    for method in &plan.methods {
        for setting in method.settings().iter().take(100) {
            plan.run(method, setting, "cifar", 100, 0).expect("a plan that is read can be run");
        }
    }
    true
}
