//! The `.npz` container: a zip archive of `.npy` arrays, stored or deflated.

use std::collections::BTreeMap;

use super::entry::{Entry, Stored, numel};
use super::npy::{self, Header};
use super::tensor_file::Index;

/// Returns whether a zip archive with these entries is an npz file.
pub(super) fn recognizes(entries: &BTreeMap<String, Stored>) -> bool {
    entries.keys().any(|name| name.ends_with(".npy"))
}

/// Reads the header of each array. The name of an array is the name of its entry without `.npy`.
pub(super) fn read(file: &[u8], zip: BTreeMap<String, Stored>) -> Result<Index, String> {
    let mut entries = BTreeMap::new();
    for (path, stored) in zip {
        let Some(name) = path.strip_suffix(".npy") else { continue };
        let entry = array(file, stored).map_err(|e| format!("array {name}: {e}"))?;
        entries.insert(name.to_owned(), entry);
    }
    Ok(Index { entries, metadata: BTreeMap::new(), keys: Vec::new() })
}

fn array(file: &[u8], stored: Stored) -> Result<Entry, String> {
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
