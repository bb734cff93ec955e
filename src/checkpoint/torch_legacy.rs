//! The format of `torch.save` before PyTorch 1.6: pickles, and then the bytes of each storage.
//!
//! A file consists of a pickled magic number, a pickled version, a pickle about the machine, the
//! pickled object, the pickled list of the keys of its storages, and for each key the number of
//! elements (8 bytes) and the elements.

use std::collections::BTreeMap;

use super::entry::Stored;
use super::pickle::{Arena, Id, Machine, PickleError, StateDict, Value, state_dict};
use super::tensor_file::Index;
use super::torch_zip::entry;

/// The magic number as `torch.save` pickles it, without the two bytes for the version of pickle.
const MAGIC: &[u8] = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

/// Returns whether `file` starts with the magic number.
pub(super) fn recognizes(file: &[u8]) -> bool {
    file.first() == Some(&0x80) && file.get(2..).is_some_and(|rest| rest.starts_with(MAGIC))
}

/// Reads the pickles and finds the elements of each tensor.
pub(super) fn read(file: &[u8]) -> Result<Index, PickleError> {
    let (_, _, rest) = Machine::run(file)?;
    let (_, _, rest) = Machine::run(rest)?;
    let (machine, about, rest) = Machine::run(rest)?;
    if little_endian(&machine, about) == Some(false) {
        return Err("its byte order is not little-endian".into());
    }
    let (values, top, rest) = Machine::run(rest)?;
    let StateDict { tensors, keys } = state_dict(&values, top)?;
    let (listed, list, rest) = Machine::run(rest)?;
    let stored = storages(&values, (&listed, list), file.len() - rest.len(), rest)?;
    let mut entries = BTreeMap::new();
    for (name, view) in tensors {
        let stored = stored.get(view.key.as_str()).cloned();
        let entry = stored
            .ok_or_else(|| format!("storage {} is not in the file", view.key))
            .and_then(|stored| entry(view, stored))
            .map_err(|e| PickleError::Corrupt(format!("tensor {name}: {e}")))?;
        entries.insert(name, entry);
    }
    Ok(Index { entries, metadata: BTreeMap::new(), keys })
}

fn little_endian(values: &Arena, about: Id) -> Option<bool> {
    let found =
        values.items(about).iter().find(|(key, _)| values.text(*key) == Ok("little_endian"));
    match values.get(found?.1) {
        Value::Bool(little) => Some(*little),
        _ => None,
    }
}

/// Returns where the elements of each storage are. `bytes` start at the offset `at` of the file.
fn storages<'a>(
    values: &Arena,
    (listed, list): (&'a Arena, Id),
    mut at: usize,
    mut bytes: &[u8],
) -> Result<BTreeMap<&'a str, Stored>, PickleError> {
    let Value::List(keys) = listed.get(list) else {
        return Err("the keys of its storages are not a list".into());
    };
    let sizes = values.storages();
    let mut found = BTreeMap::new();
    for &key in keys {
        let key = listed.text(key)?;
        let size = sizes.get(key).copied().flatten().ok_or("a storage has no known dtype")?;
        let (count, rest) =
            bytes.split_first_chunk::<8>().ok_or("the file ends before a storage")?;
        let len = usize::try_from(u64::from_le_bytes(*count)).ok();
        let len = len.and_then(|count| count.checked_mul(size));
        let (_, rest) = len
            .and_then(|len| rest.split_at_checked(len))
            .ok_or("the file ends within a storage")?;
        let start = at + 8;
        at = start + (bytes.len() - 8 - rest.len());
        found.insert(key, Stored { at: start..at, crc: None, inflated: None });
        bytes = rest;
    }
    Ok(found)
}
