//! A folder of runs.

use std::io;
use std::path::{Path, PathBuf};

use super::bypass_view::BypassView;
use super::predictions::Predictions;
use crate::error::{Error, Result};
use convpass::train::RunRecord;

/// The file that marks the folder of a run.
const RECORD: &str = "run.json";
/// The largest depth at which folders are searched.
const MAX_DEPTH: usize = 16;

/// One run: a folder with `run.json`, and the files that were computed from its adapter later.
#[derive(Clone, Debug)]
pub struct FoundRun {
    /// The folder, relative to the searched folder.
    pub name: PathBuf,
    /// The folder.
    pub folder: PathBuf,
    /// The record.
    pub record: RunRecord,
    /// The predictions of the adapter on the test images, if [`Predictions::FILE`] exists.
    pub predictions: Option<Predictions>,
    /// The view of the bypasses, if [`BypassView::FILE`] exists.
    pub bypass_view: Option<BypassView>,
}

/// A file that could not be read, with the reason.
#[derive(Clone, Debug, PartialEq)]
pub struct BrokenFile {
    /// The file, relative to the searched folder.
    pub file: PathBuf,
    /// The reason.
    pub reason: String,
}

/// Returns the runs below a folder in the order of their paths, and the files that cannot be read.
pub(super) fn read(root: &Path) -> Result<(Vec<FoundRun>, Vec<BrokenFile>)> {
    let mut found = Found { root, runs: Vec::new(), broken: Vec::new(), first: None };
    found.visit(root, 0).map_err(Error::io(root))?;
    if found.runs.is_empty() {
        let message = format!("no {RECORD} in it or in a folder below it");
        let none = || Error::io(root)(io::Error::new(io::ErrorKind::NotFound, message));
        return Err(found.first.unwrap_or_else(none));
    }
    Ok((found.runs, found.broken))
}

struct Found<'a> {
    root: &'a Path,
    runs: Vec<FoundRun>,
    broken: Vec<BrokenFile>,
    /// The error of the first record that cannot be read.
    first: Option<Error>,
}

impl Found<'_> {
    /// Searches `folder`. Links are not followed, and hidden folders are skipped. An error means
    /// that `folder` itself cannot be read.
    fn visit(&mut self, folder: &Path, depth: usize) -> io::Result<()> {
        let mut entries = std::fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(|entry| entry.file_name());
        if folder.join(RECORD).is_file() {
            self.add(folder);
        }
        for entry in entries.iter().filter(|_| depth < MAX_DEPTH) {
            let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
            if entry.file_type()?.is_dir()
                && !is_hidden
                && let Err(error) = self.visit(&entry.path(), depth + 1)
            {
                self.tell(&entry.path(), &error.to_string());
            }
        }
        Ok(())
    }

    fn add(&mut self, folder: &Path) {
        match RunRecord::load(folder.join(RECORD)) {
            Ok(record) if !record.test_top1.is_none_or(|top1| (0.0..=100.0).contains(&top1)) => {
                self.tell(&folder.join(RECORD), "test_top1 must be within 0..=100");
            }
            Ok(record) => {
                let name = folder.strip_prefix(self.root).unwrap_or(folder).to_path_buf();
                let predictions =
                    self.extra(folder.join(Predictions::FILE), |file| Predictions::load(file));
                let bypass_view =
                    self.extra(folder.join(BypassView::FILE), |file| BypassView::load(file));
                let folder = folder.to_path_buf();
                self.runs.push(FoundRun { name, folder, record, predictions, bypass_view });
            }
            Err(error) => {
                let error = Error::from(error);
                self.tell(&folder.join(RECORD), &reason(&error));
                self.first.get_or_insert(error);
            }
        }
    }

    /// Loads a file that may not exist.
    fn extra<T>(&mut self, file: PathBuf, load: impl Fn(&Path) -> Result<T>) -> Option<T> {
        if !file.exists() {
            return None;
        }
        load(&file).map_err(|error| self.tell(&file, &reason(&error))).ok()
    }

    fn tell(&mut self, file: &Path, reason: &str) {
        let file = file.strip_prefix(self.root).unwrap_or(file).to_path_buf();
        self.broken.push(BrokenFile { file, reason: reason.to_owned() });
    }
}

/// Returns the error without the name of the file.
fn reason(error: &Error) -> String {
    match error {
        Error::Io { source, .. } => source.to_string(),
        Error::CorruptFile { reason, .. } => reason.clone(),
        Error::Library(convpass::Error::Io { source, .. }) => source.to_string(),
        Error::Library(convpass::Error::CorruptFile { reason, .. }) => reason.clone(),
        other => other.to_string(),
    }
}
