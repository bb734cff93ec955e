//! The `.npz` container: a zip archive of `.npy` arrays, stored or deflated.

use std::collections::BTreeMap;

use super::content::Content;
use super::entry::{Entry, Stored, numel};
use super::npy::{self, Header};
use super::tensor_file::Index;

/// Returns whether a zip archive with these entries is an npz file.
pub(super) fn recognizes(entries: &BTreeMap<String, Stored>) -> bool {
    entries.keys().any(|name| name.ends_with(".npy"))
}

/// The segment of the names of arrays that hold all blocks of a model, in big_vision's files.
const STACKED: &str = "encoderblock";

/// The most blocks that a model has.
const MAX_BLOCKS: i64 = 1024;

/// Reads the header of each array. The name of an array is the name of its entry without `.npy`. An
/// array that holds all blocks of a model is read as one array for each block.
pub(super) fn read(file: &dyn Content, zip: BTreeMap<String, Stored>) -> Result<Index, String> {
    let mut entries = BTreeMap::new();
    for (path, stored) in zip {
        let Some(name) = path.strip_suffix(".npy") else { continue };
        let entry = array(file, stored).map_err(|e| format!("array {name}: {e}"))?;
        entries.extend(unstacked(name, entry));
    }
    Ok(Index { entries, metadata: BTreeMap::new(), keys: Vec::new() })
}

/// Returns an array under its own name or, if its first dimension counts the blocks of a model, its
/// parts under the names of the blocks: `encoderblock_0/..` for `encoderblock/..`.
fn unstacked(name: &str, entry: Entry) -> Vec<(String, Entry)> {
    let Some(at) = name.split('/').position(|segment| segment == STACKED) else {
        return vec![(name.to_owned(), entry)];
    };
    let (count, size) = match (entry.shape.first(), entry.element.size()) {
        (Some(&count), Some(size)) if (1..=MAX_BLOCKS).contains(&count) => (count, size),
        _ => return vec![(name.to_owned(), entry)],
    };
    let step = match &entry.strides {
        Some(strides) => strides[0] as usize,
        None => numel(&entry.shape).unwrap_or_default() / count as usize,
    };
    let part = |block: i64| {
        let segments = name.split('/').enumerate().map(|(place, segment)| {
            if place == at { format!("{STACKED}_{block}") } else { segment.to_owned() }
        });
        let name = segments.collect::<Vec<_>>().join("/");
        let entry = Entry {
            shape: entry.shape[1..].to_vec(),
            strides: entry.strides.as_ref().map(|strides| strides[1..].to_vec()),
            skip: entry.skip + block as usize * step * size,
            ..entry.clone()
        };
        (name, entry)
    };
    (0..count).map(part).collect()
}

fn array(file: &dyn Content, stored: Stored) -> Result<Entry, String> {
    let header = Header::parse(&stored.head(file, npy::MAX_HEADER)?)?;
    let entry = Entry {
        strides: header.strides(),
        element: header.element,
        shape: header.shape,
        skip: header.len,
        big_endian: header.big_endian,
        stored,
    };
    let data = entry.stored.size().saturating_sub(entry.skip);
    match entry.element.size() {
        Some(size) if numel(&entry.shape).and_then(|n| n.checked_mul(size)) != Some(data) => {
            Err(format!("shape {:?} of {} does not fit {data} bytes", entry.shape, entry.element))
        }
        _ => Ok(entry),
    }
}
