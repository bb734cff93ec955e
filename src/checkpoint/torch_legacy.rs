//! The format of `torch.save` before PyTorch 1.6: pickles, and then the bytes of each storage.
//!
//! A file consists of a pickled magic number, a pickled version, a pickle about the machine, the
//! pickled object, the pickled list of the keys of its storages, and for each key the number of
//! elements (8 bytes) and the elements.

use std::collections::BTreeMap;

use super::content::{Content, start};
use super::entry::Stored;
use super::pickle::{Arena, Id, Machine, PickleError, StateDict, Value, state_dict};
use super::tensor_file::Index;
use super::torch_zip::{MAX_PICKLE, entry};

/// The magic number as `torch.save` pickles it, without the two bytes for the version of pickle.
const MAGIC: &[u8] = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

/// Returns whether a file that begins with `start` has the magic number.
pub(super) fn recognizes(start: &[u8]) -> bool {
    start.first() == Some(&0x80) && start.get(2..).is_some_and(|rest| rest.starts_with(MAGIC))
}

/// The bytes at the start of a file that are read first. They hold the pickles of most files.
const FIRST: usize = 1 << 20;

/// Reads the pickles and finds the elements of each tensor.
pub(super) fn read(file: &dyn Content) -> Result<Index, PickleError> {
    // The length of the pickles is not known before they are read.
    let mut count = FIRST;
    loop {
        let bytes = start(file, count).map_err(PickleError::Corrupt)?;
        match pickles(file, &bytes) {
            Err(_) if bytes.len() < file.len().min(MAX_PICKLE) => count *= 4,
            result => return result,
        }
    }
}

/// Reads the pickles in `bytes`, the start of the file.
fn pickles(file: &dyn Content, bytes: &[u8]) -> Result<Index, PickleError> {
    let (_, _, rest) = Machine::run(bytes)?;
    let (_, _, rest) = Machine::run(rest)?;
    let (machine, about, rest) = Machine::run(rest)?;
    if little_endian(&machine, about) == Some(false) {
        return Err("its byte order is not little-endian".into());
    }
    let (values, top, rest) = Machine::run(rest)?;
    let StateDict { tensors, keys } = state_dict(&values, top)?;
    let (listed, list, rest) = Machine::run(rest)?;
    let stored = storages(&values, (&listed, list), bytes.len() - rest.len(), file)?;
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

/// Returns where the elements of each storage are. The first one is at the offset `at` of the file.
fn storages<'a>(
    values: &Arena,
    (listed, list): (&'a Arena, Id),
    mut at: usize,
    file: &dyn Content,
) -> Result<BTreeMap<&'a str, Stored>, PickleError> {
    let Value::List(keys) = listed.get(list) else {
        return Err("the keys of its storages are not a list".into());
    };
    let sizes = values.storages();
    let mut found = BTreeMap::new();
    for &key in keys {
        let key = listed.text(key)?;
        let size = sizes.get(key).copied().flatten().ok_or("a storage has no known dtype")?;
        let mut count = [0; 8];
        file.read_at(at, &mut count).map_err(|_| "the file ends before a storage")?;
        let start = at + count.len();
        let len = usize::try_from(u64::from_le_bytes(count)).ok();
        let end = len.and_then(|count| count.checked_mul(size)?.checked_add(start));
        at = end.filter(|&end| end <= file.len()).ok_or("the file ends within a storage")?;
        found.insert(key, Stored { at: start..at, crc: None, inflated: None });
    }
    Ok(found)
}
