//! The safetensors container, read with the header parser of the `safetensors` crate.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};

use super::entry::{ElementType, Entry, Stored};
use super::tensor_file::Index;

/// Returns whether `file` looks like safetensors: a header length of eight bytes, then a JSON
/// object.
pub(super) fn recognizes(file: &[u8]) -> bool {
    file.get(8) == Some(&b'{')
}

/// Reads the header of a safetensors file.
pub(super) fn read(file: &[u8]) -> Result<Index, String> {
    let (header, metadata) = SafeTensors::read_metadata(file).map_err(|e| e.to_string())?;
    let data = header + size_of::<u64>();
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
