//! Reads an index of shards as Hugging Face writes it: `{"weight_map": {NAME: FILE, ..}}`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::TensorFile;
use crate::error::{Error, Result};

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// Returns whether the file name of `path` is that of an index of shards.
pub(super) fn is_index(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(".index.json"))
}

/// Returns what a file is that is one of several shards, as its name says and no index was opened.
pub(super) fn one_of_several(file: &TensorFile) -> Option<String> {
    let name = file.path().file_stem()?.to_string_lossy().into_owned();
    let (before, of) = name.rsplit_once("-of-")?;
    let (_, number) = before.rsplit_once('-')?;
    let (of, number) = (of.parse::<u32>().ok()?, number.parse::<u32>().ok()?);
    (of > 1).then(|| {
        format!("shard {number} of {of} of a model; open the folder or the index of the shards")
    })
}

/// Returns the paths of the shards that the index at `path` lists, and for each tensor the number
/// of its shard.
///
/// # Errors
/// [`Error::Io`] if the index cannot be read; [`Error::CorruptFile`] if it is not a valid index or
/// names a shard outside its folder.
pub(super) fn read(path: &Path) -> Result<(Vec<PathBuf>, BTreeMap<String, usize>)> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let index: ShardIndex =
        serde_json::from_slice(&text).map_err(|e| Error::corrupt(path, e.to_string()))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let (mut shards, mut numbers, mut places) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    for (name, shard) in index.weight_map {
        if Path::new(&shard).file_name() != Some(shard.as_ref()) {
            let reason = format!(
                "{name} is in {shard}, which is not a file name in the folder of the index"
            );
            return Err(Error::corrupt(path, reason));
        }
        let number = *numbers.entry(shard).or_insert_with_key(|shard| {
            shards.push(folder.join(shard));
            shards.len() - 1
        });
        places.insert(name, number);
    }
    if shards.is_empty() {
        return Err(Error::corrupt(path, "the index lists no tensor"));
    }
    Ok((shards, places))
}
