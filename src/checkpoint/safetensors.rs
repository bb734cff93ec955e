//! The safetensors container, read with the header parser of the `safetensors` crate.

use std::collections::BTreeMap;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::content::{Content, bytes};
use super::entry::{ElementType, Entry, Stored};
use super::tensor_file::Index;

/// Returns whether a file that begins with `start` looks like safetensors: a header length of eight
/// bytes, then a JSON object.
pub(super) fn recognizes(start: &[u8]) -> bool {
    start.get(LENGTH_BYTES) == Some(&b'{')
}

/// The bytes of the length of the header.
const LENGTH_BYTES: usize = size_of::<u64>();
/// The longest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// Reads the header of a safetensors file.
pub(super) fn read(file: &dyn Content) -> Result<Index, String> {
    let mut length = [0; LENGTH_BYTES];
    length.copy_from_slice(&bytes(file, &(0..LENGTH_BYTES))?);
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(format!("its header has {length} bytes, but at most {MAX_HEADER} are allowed"));
    }
    let data = LENGTH_BYTES + length as usize;
    let header = bytes(file, &(LENGTH_BYTES..data)).map_err(|_| "its header is cut off")?;
    // This checks that the tensors follow each other without gaps.
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|e| format!("its header: {e}"))?;
    let end = data.checked_add(metadata.data_len());
    if end != Some(file.len()) {
        let (stated, found) = (metadata.data_len(), file.len() - data);
        return Err(format!("its header states {stated} bytes of tensors, but it has {found}"));
    }
    let mut entries = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let entry = Entry {
            element: element(info.dtype),
            shape: shape(&info.shape)
                .ok_or_else(|| format!("tensor {name}: a dimension does not fit 63 bits"))?,
            strides: None,
            stored: Stored { at: data + start..data + end, crc: None, inflated: None },
            skip: 0,
            big_endian: false,
        };
        entries.insert(name, entry);
    }
    let metadata = metadata.metadata().clone().unwrap_or_default().into_iter().collect();
    Ok(Index { entries, metadata, keys: Vec::new() })
}

fn shape(dims: &[usize]) -> Option<Vec<i64>> {
    dims.iter().map(|&dim| dim.try_into().ok()).collect()
}

fn element(dtype: Dtype) -> ElementType {
    match dtype {
        Dtype::F64 => ElementType::F64,
        Dtype::F32 => ElementType::F32,
        Dtype::F16 => ElementType::F16,
        Dtype::BF16 => ElementType::Bf16,
        // The header parser has already compared the shape with the number of bytes.
        other => ElementType::Other(format!("{other:?}"), None),
    }
}
