//! The corpus of the fuzz targets through the functions that they call, so that what a fuzzer found
//! stays mended.

use std::path::PathBuf;

#[path = "../../fuzz/readers.rs"]
mod readers;

use readers::READERS;

use crate::support::root;

/// The committed inputs of a reader, each with its name.
fn inputs(reader: &str) -> Vec<(String, Vec<u8>)> {
    let folder = root().join("fuzz/corpus").join(reader);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    let named = |file: PathBuf| {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        (format!("{reader}/{name}"), std::fs::read(&file).unwrap())
    };
    files.into_iter().map(named).collect()
}

/// A seed that is refused would lead a fuzzer no further than the first check.
#[test]
fn every_seed_is_read() {
    for (reader, read) in READERS {
        let inputs = inputs(reader);
        let seeds = inputs.iter().filter(|(name, _)| name.contains("/seed_"));
        let refused: Vec<_> =
            seeds.filter(|(_, input)| !read(input)).map(|(name, _)| name).collect();
        assert!(refused.is_empty(), "{refused:?}");
    }
}

#[test]
fn what_the_fuzzers_found_and_every_seed_cut_short_is_read_or_refused() {
    for (reader, read) in READERS {
        for (name, input) in inputs(reader) {
            let ends = (0..=8).map(|part| input.len() * part / 8);
            for end in ends {
                let done = std::panic::catch_unwind(|| read(&input[..end]));
                assert!(done.is_ok(), "{name}, its first {end} bytes");
            }
        }
    }
}
