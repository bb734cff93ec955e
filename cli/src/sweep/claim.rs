//! Which process makes a run. Several processes, on one machine or on several that share the folder
//! of the results, work on one plan.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use fs4::fs_std::FileExt;

use crate::files::write_atomically;
use crate::run_folder::FolderLock;

/// The folder of the claims, in the folder of the results. They are not in the folders of the runs,
/// which may be moved aside.
const CLAIMS: &str = ".claims";

/// The name of the file in the folder of the claims that tells which plan is worked on.
const PLAN: &str = "plan.sha256";

/// Shares the folder of the results with the processes that work on the plan with the digest `plan`.
/// `moves` says whether this process may move the runs of other plans aside.
///
/// # Errors
/// If processes work there on another plan, or if others work there at all and `moves` is set.
pub(super) fn share(out: &Path, plan: &str, moves: bool) -> Result<FolderLock> {
    let file = out.join(CLAIMS).join(PLAN);
    let (lock, is_alone) = FolderLock::share(out, || {
        std::fs::create_dir_all(out.join(CLAIMS)).with_context(|| out.display().to_string())?;
        Ok(write_atomically(&file, plan.as_bytes())?)
    })?;
    let found = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    if found != plan {
        bail!(
            "{}: another process works in this folder on another plan, with other settings or on \
             another backbone; wait for it, or choose another --out",
            out.display()
        );
    }
    if moves && !is_alone {
        bail!("{}: --set-aside needs a folder in which no other process works", out.display());
    }
    Ok(lock)
}

/// A run that no other process makes until the value is dropped, or until this process ends in any
/// way: the claim is a lock of the file system.
pub struct Claim {
    _file: File,
}

impl Claim {
    /// Claims the run whose folder is `run`, a folder below `out`. Returns `None` if another process
    /// has claimed it.
    ///
    /// On a file system without locks every claim succeeds; [`FolderLock`] has warned of that.
    pub fn take(out: &Path, run: &Path) -> Result<Option<Self>> {
        let path = file_of(out, run);
        let claim = || -> std::io::Result<Option<Self>> {
            std::fs::create_dir_all(path.parent().unwrap_or(out))?;
            let mut file =
                File::options().create(true).truncate(false).read(true).write(true).open(&path)?;
            match file.try_lock_exclusive() {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                Err(error) => return Err(error),
            }
            file.set_len(0)?;
            write!(file, "{}, process {}", host(), std::process::id())?;
            Ok(Some(Claim { _file: file }))
        };
        claim().with_context(|| path.display().to_string())
    }

    /// Returns the machine and the process that has claimed the run, or `None` if none has.
    pub fn holder(out: &Path, run: &Path) -> Result<Option<String>> {
        let path = file_of(out, run);
        let read = || -> std::io::Result<Option<String>> {
            let mut file = match File::open(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                file => file?,
            };
            match FileExt::try_lock_shared(&file) {
                Ok(true) => return Ok(None),
                Ok(false) => {}
                Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(None),
                Err(error) => return Err(error),
            }
            let mut holder = String::new();
            file.read_to_string(&mut holder)?;
            Ok(Some(holder))
        };
        read().with_context(|| path.display().to_string())
    }
}

fn file_of(out: &Path, run: &Path) -> PathBuf {
    out.join(CLAIMS).join(run.strip_prefix(out).unwrap_or(run))
}

/// Returns the name of this machine.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.map_or_else(|_| "a machine without a name".to_owned(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_shared_by_processes_of_one_plan() {
        let out = tempfile::tempdir().unwrap();
        let out = out.path();
        let first = share(out, "one", true).unwrap();
        let second = share(out, "one", false).unwrap();
        let refused = |plan, moves| share(out, plan, moves).map(drop).unwrap_err().to_string();
        assert!(refused("other", false).contains("another plan"));
        assert!(refused("one", true).contains("--set-aside"));
        drop((first, second));
        let _alone = share(out, "other", true).unwrap();
    }

    #[test]
    fn one_holds_a_claim_until_it_is_dropped() {
        let out = tempfile::tempdir().unwrap();
        let (out, run) = (out.path(), out.path().join("digits/lora/seed-0"));
        assert_eq!(Claim::holder(out, &run).unwrap(), None);
        let claim = Claim::take(out, &run).unwrap().unwrap();
        assert!(Claim::take(out, &run).unwrap().is_none());
        let holder = Claim::holder(out, &run).unwrap().unwrap();
        assert!(holder.ends_with(&format!("process {}", std::process::id())), "{holder}");
        let other = out.join("digits/lora/trials/lr=0.1");
        assert!(Claim::take(out, &other).unwrap().is_some());
        drop(claim);
        assert_eq!(Claim::holder(out, &run).unwrap(), None);
        assert!(Claim::take(out, &run).unwrap().is_some());
    }
}
