//! Files that another process cuts, writes to, replaces or removes while they are open.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use convpass::checkpoint::TensorFile;
use convpass::eval::PrefixCache;
use convpass::train::{Observer, Silent, StepReport, fit};
use convpass::{AnyBackbone, Error, OpenOptions, PetlConfig, PetlModel, TrainConfig};
use tch::Device;

use crate::golden::fixtures;
use crate::resume::{bars, in_last_block};
use crate::support::{small_vit, train_config};

/// A copy of the small backbone of the fixtures in a folder of its own.
fn copied() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vit.safetensors");
    fs::copy(fixtures().join("adapter_0_1/vit.safetensors"), &file).unwrap();
    (folder, file)
}

/// Checks that the error is about the content of `file`, for a reason that contains `word`.
fn is_corrupt(error: &Error, file: &Path, word: &str) {
    let is_so = matches!(error, Error::CorruptFile { file: named, reason }
        if named == file && reason.contains(word));
    assert!(is_so, "{error}");
}

/// A mapped file would end the process here with SIGBUS.
#[test]
fn a_checkpoint_that_is_cut_while_it_is_open_is_an_error() {
    for (file, cut) in [
        ("adapter_0_1/vit.safetensors", 0),
        ("adapter_0_1/vit.safetensors", 5000),
        ("containers/stored.npz", 600),
        ("containers/deflated.npz", 1),
        ("containers/nested.pt", 1),
        ("containers/old.pt", 1000),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        fs::copy(fixtures().join(file), &path).unwrap();
        let opened = TensorFile::open(&path).unwrap();
        let whole = fs::metadata(&path).unwrap().len();
        fs::File::options().write(true).open(&path).unwrap().set_len(cut).unwrap();
        for name in opened.names() {
            is_corrupt(&opened.tensor(name).unwrap_err(), &path, "while it was open");
        }
        // Longer than before, it is another file as well.
        fs::File::options().write(true).open(&path).unwrap().set_len(whole + 1).unwrap();
        let name = opened.names().next().unwrap();
        is_corrupt(&opened.tensor(name).unwrap_err(), &path, "while it was open");
    }
}

#[test]
fn a_checkpoint_that_is_written_over_in_place_is_an_error() {
    let (_folder, path) = copied();
    let opened = TensorFile::open(&path).unwrap();
    let name = opened.names().next().unwrap();
    assert!(opened.tensor(name).is_ok());
    let bytes = fs::read(&path).unwrap();
    // Some file systems count the time of a change in steps of many milliseconds.
    let later = SystemTime::now() + Duration::from_secs(5);
    fs::write(&path, bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
    is_corrupt(&opened.tensor(name).unwrap_err(), &path, "changed while it was open");
    assert!(TensorFile::open(&path).unwrap().tensor(name).is_ok());
}

#[test]
fn a_checkpoint_that_is_replaced_or_removed_stays_the_one_that_was_opened() {
    let (folder, path) = copied();
    let opened = TensorFile::open(&path).unwrap();
    let name = opened.names().next().unwrap();
    let before = opened.tensor(name).unwrap();
    let other = folder.path().join("other");
    fs::write(&other, b"something else").unwrap();
    fs::rename(&other, &path).unwrap();
    assert_eq!(opened.tensor(name).unwrap(), before);
    fs::remove_file(&path).unwrap();
    assert_eq!(opened.tensor(name).unwrap(), before);
    assert!(matches!(TensorFile::open(&path), Err(Error::Io { path: named, .. }) if named == path));
}

/// Another process cuts and restores the file as fast as it can while this one opens it.
#[test]
fn a_checkpoint_that_changes_all_the_time_is_opened_or_refused() {
    let (_folder, path) = copied();
    let bytes = fs::read(&path).unwrap();
    let two_heads = OpenOptions { num_heads: Some(2), ..OpenOptions::default() };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                fs::write(&path, &bytes[..bytes.len() / 3]).unwrap();
                fs::write(&path, &bytes).unwrap();
            }
        });
        for _ in 0..200 {
            if let Err(error) = AnyBackbone::open_with(&path, &two_heads, Device::Cpu) {
                assert!(error.to_string().contains("vit.safetensors"), "{error}");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// Cuts the file of the kept tokens after the first step of a run.
struct Cutter {
    folder: PathBuf,
    cut: Option<PathBuf>,
}

impl Observer for Cutter {
    fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
        let mut files = fs::read_dir(&self.folder).unwrap().map(|file| file.unwrap().path());
        let file = files.find(|file| file.extension().is_some_and(|end| end == "tokens")).unwrap();
        fs::File::options().write(true).open(&file).unwrap().set_len(100).unwrap();
        self.cut = Some(file);
        ControlFlow::Continue(())
    }
}

#[test]
fn kept_tokens_that_are_cut_during_a_run_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let config = PetlConfig { drop_path: 0.0, ..PetlConfig::new(in_last_block(2, 0.0), 3) };
    let mut model = PetlModel::new(small_vit(), &config).unwrap();
    let prefix = PrefixCache { folder: Some(folder.path().to_path_buf()), bf16: false };
    let train = TrainConfig { prefix: Some(prefix), ..train_config(2, 4) };
    let mut cutter = Cutter { folder: folder.path().to_path_buf(), cut: None };
    let error = fit(&mut model, &bars(12, 16, 0), None, &train, &mut cutter).unwrap_err();
    let cut = cutter.cut.unwrap();
    is_corrupt(&error, &cut, "while it was open");
    // The next run makes the file anew.
    fit(&mut model, &bars(12, 16, 0), None, &train, &mut Silent).unwrap();
}
