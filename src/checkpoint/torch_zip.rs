//! The zip container of `torch.save`: a pickle of names and views, and one record for each storage.
//!
//! This crate reads it itself, because libtorch's reader is available here only for TorchScript
//! archives, not for state dicts. No well-maintained small crate reads it either.

use std::collections::BTreeMap;

use super::content::Content;
use super::entry::{Entry, Stored};
use super::pickle::{self, PickleError, View};
use super::tensor_file::Index;

/// The largest `data.pkl` that is read. The pickle of a state dict has a few hundred bytes for each
/// tensor.
pub(super) const MAX_PICKLE: usize = 64 << 20;

/// Returns the folder of the archive that has a `data.pkl`, with its slash; `None` if this is not
/// an archive of `torch.save`.
pub(super) fn recognizes(entries: &BTreeMap<String, Stored>) -> Option<String> {
    entries.keys().find_map(|name| {
        let folder = name.strip_suffix("data.pkl")?;
        (folder.is_empty() || folder.ends_with('/')).then(|| folder.to_owned())
    })
}

/// Reads the pickle and finds the record of each tensor.
pub(super) fn read(
    file: &dyn Content,
    zip: &BTreeMap<String, Stored>,
    folder: &str,
) -> Result<Index, PickleError> {
    if zip.contains_key(&format!("{folder}constants.pkl")) {
        let reason = "a TorchScript archive; torch.save its state_dict() instead";
        return Err(PickleError::Corrupt(reason.into()));
    }
    if let Some(order) = zip.get(&format!("{folder}byteorder"))
        && order.head(file, 8).map_err(PickleError::Corrupt)? != b"little"
    {
        return Err("its byte order is not little-endian".into());
    }
    let record = &zip[&format!("{folder}data.pkl")];
    if record.size() > MAX_PICKLE {
        return Err("its data.pkl is too large".into());
    }
    let pickle = record.bytes(file).map_err(PickleError::Corrupt)?;
    let found = pickle::weights(&pickle)?;
    let mut entries = BTreeMap::new();
    for (name, view) in found.tensors {
        let stored = zip.get(&format!("{folder}data/{}", view.key)).cloned();
        let entry = stored
            .ok_or_else(|| format!("storage {} is not in the file", view.key))
            .and_then(|stored| entry(view, stored))
            .map_err(|e| PickleError::Corrupt(format!("tensor {name}: {e}")))?;
        entries.insert(name, entry);
    }
    Ok(Index { entries, metadata: BTreeMap::new(), keys: found.keys })
}

/// Returns the entry of the tensor that is this view of a storage.
pub(super) fn entry(view: View, stored: Stored) -> Result<Entry, String> {
    if view.shape.len() != view.strides.len() {
        return Err(format!(
            "shape {:?} and strides {:?} differ in length",
            view.shape, view.strides
        ));
    }
    let offset = usize::try_from(view.offset).map_err(|_| "its offset is negative")?;
    let size = view.element.size().ok_or("its element size is unknown")?;
    Ok(Entry {
        strides: (!is_row_major(&view.shape, &view.strides)).then_some(view.strides),
        shape: view.shape,
        element: view.element,
        skip: offset.checked_mul(size).ok_or("its offset lies outside the storage")?,
        big_endian: false,
        // torch can be told to write no checksums; it then writes wrong ones.
        stored: Stored { crc: None, ..stored },
    })
}

/// Returns whether the elements are in row-major order. The stride along a dimension of size one
/// does not matter.
fn is_row_major(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1i64;
    shape.iter().zip(strides).rev().all(|(&dim, &stride)| {
        let fits = dim == 1 || stride == expected;
        expected = expected.saturating_mul(dim.max(1));
        fits
    })
}
