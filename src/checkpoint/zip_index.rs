//! Reads the entries of a zip archive as ranges of the file.

use std::collections::BTreeMap;
use zip::{CompressionMethod, ZipArchive};

use super::content::{Content, reader};
use super::entry::{Stored, check_ratio};

/// Returns whether a file that begins with `start` has the signature of a zip archive.
pub(super) fn recognizes(start: &[u8]) -> bool {
    start.starts_with(b"PK\x03\x04") || start.starts_with(b"PK\x05\x06")
}

/// Returns the entries by name. Each one lies within the file, overlaps no other one, and is no
/// larger after inflating than its compressed bytes allow.
pub(super) fn read(file: &dyn Content) -> Result<BTreeMap<String, Stored>, String> {
    let mut archive = ZipArchive::new(reader(file, 0..file.len())).map_err(|e| e.to_string())?;
    let mut entries = BTreeMap::new();
    let mut ranges = Vec::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(|e| e.to_string())?;
        let name = entry.name().to_owned();
        let in_entry = |reason: &str| format!("zip entry {name}: {reason}");
        let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
        let (start, len) = start
            .zip(usize::try_from(entry.compressed_size()).ok())
            .ok_or_else(|| in_entry("its offset or its size is not readable"))?;
        let end = start.checked_add(len).filter(|&end| end <= file.len());
        let at = start..end.ok_or_else(|| in_entry("it lies outside the file"))?;
        let size = usize::try_from(entry.size()).map_err(|_| in_entry("it is too large"))?;
        let inflated = match entry.compression() {
            _ if entry.encrypted() => return Err(in_entry("it is encrypted")),
            CompressionMethod::STORE if size == len => None,
            CompressionMethod::STORE => {
                return Err(in_entry("it is not compressed, but its two sizes differ"));
            }
            CompressionMethod::DEFLATE => {
                check_ratio(len, size).map_err(|e| in_entry(&e))?;
                Some(size)
            }
            other => return Err(in_entry(&format!("the compression {other:?} is not supported"))),
        };
        ranges.push(at.clone());
        entries.insert(name, Stored { at, crc: Some(entry.crc32()), inflated });
    }
    ranges.sort_by_key(|at| (at.start, at.end));
    if ranges.windows(2).any(|pair| pair[0].end > pair[1].start) {
        Err("zip entries overlap".into())
    } else {
        Ok(entries)
    }
}
