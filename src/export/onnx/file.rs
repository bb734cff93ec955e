//! Writes a graph as a file, or as a file and its data beside it.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use prost::Message;

use super::graph::not_exportable;
use super::proto::{GraphProto, ModelProto, OperatorSetId, TensorProto, TextEntry};
use super::{OnnxFiles, OnnxModel};
use crate::error::{Error, Result};
use crate::files::{write_atomically, write_atomically_with};

/// The largest size of a protobuf message, in bytes.
pub(super) const MAX_MESSAGE: usize = i32::MAX as usize;
/// Tensors of at least this many bytes are in the file beside the model, if there is one.
const MIN_EXTERNAL: usize = 1024;
/// The places of tensors in that file are multiples of the size of a page, so that runtimes can map
/// them into memory.
const PAGE: usize = 4096;
/// The version of the file format that came with the operators of [`OnnxModel::OPSET`].
const IR_VERSION: i64 = 8;

/// Writes `model` to `path`, and its tensors to a file beside it if a single file would have more
/// than `limit` bytes.
pub(super) fn write(model: &OnnxModel, path: &Path, limit: usize) -> Result<OnnxFiles> {
    if path.is_dir() {
        return Err(Error::io(path)(std::io::ErrorKind::IsADirectory.into()));
    }
    if size(model) <= limit {
        let tensors = model.graph.constants.iter().map(|(name, tensor)| embedded(name, tensor));
        let bytes = message(model, tensors.collect::<Result<_>>()?).encode_to_vec();
        // The graph itself needs some bytes, too.
        if bytes.len() <= limit {
            write_atomically(path, &bytes)?;
            return Ok(OnnxFiles { model: path.to_owned(), data: None });
        }
    }
    write_with_data(model, path)
}

/// Returns the bytes of the tensors.
fn size(model: &OnnxModel) -> usize {
    model.graph.constants.iter().map(|(_, tensor)| bytes_of(tensor)).sum()
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// Writes the large tensors to `PATH.data` and the rest to `path`.
///
/// A kill at any time leaves no model beside the data of another one: the old model is removed
/// before its data is replaced.
fn write_with_data(model: &OnnxModel, path: &Path) -> Result<OnnxFiles> {
    let data = data_path(path);
    let name = data.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.unwrap_or_default();
    let (mut place, mut tensors) = (0usize, Vec::new());
    for (tensor_name, tensor) in &model.graph.constants {
        if bytes_of(tensor) < MIN_EXTERNAL {
            tensors.push(embedded(tensor_name, tensor)?);
            continue;
        }
        place = place.next_multiple_of(PAGE);
        tensors.push(referred(tensor_name, tensor, &name, place));
        place += bytes_of(tensor);
    }
    let message = message(model, tensors).encode_to_vec();
    if message.len() > MAX_MESSAGE {
        let reason = format!("its graph alone needs {} bytes, more than a file has", message.len());
        return Err(not_exportable("the model", reason));
    }
    write_atomically_with(
        &data,
        |file| write_tensors(model, file),
        || match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
    )?;
    write_atomically(path, &message)?;
    Ok(OnnxFiles { model: path.to_owned(), data: Some(data) })
}

/// Writes the large tensors one after the other, each at the start of a page.
fn write_tensors(model: &OnnxModel, file: &mut dyn Write) -> std::io::Result<()> {
    let mut place = 0usize;
    for (_, tensor) in &model.graph.constants {
        if bytes_of(tensor) < MIN_EXTERNAL {
            continue;
        }
        let start = place.next_multiple_of(PAGE);
        file.write_all(&vec![0; start - place])?;
        file.write_all(&raw(tensor).map_err(std::io::Error::other)?)?;
        place = start + bytes_of(tensor);
    }
    Ok(())
}

/// Returns the path of the data beside a model: `PATH.data`.
fn data_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".data");
    PathBuf::from(name)
}

/// Returns the message of the whole model.
pub(super) fn message(model: &OnnxModel, initializer: Vec<TensorProto>) -> ModelProto {
    let entry =
        |(key, value): (&String, &String)| TextEntry { key: key.clone(), value: value.clone() };
    ModelProto {
        ir_version: IR_VERSION,
        producer_name: "convpass".to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        graph: Some(GraphProto {
            node: model.graph.nodes.clone(),
            name: "convpass".to_owned(),
            initializer,
            input: vec![model.input.clone()],
            output: vec![model.output.clone()],
        }),
        opset_import: vec![OperatorSetId { domain: String::new(), version: OnnxModel::OPSET }],
        metadata_props: model.metadata.iter().map(entry).collect(),
    }
}

fn empty(name: &str, tensor: &Tensor) -> TensorProto {
    let data_type =
        if tensor.kind() == Kind::Int64 { TensorProto::INT64 } else { TensorProto::FLOAT };
    TensorProto { dims: tensor.size(), data_type, name: name.to_owned(), ..TensorProto::default() }
}

/// Returns a tensor with its elements.
pub(super) fn embedded(name: &str, tensor: &Tensor) -> Result<TensorProto> {
    Ok(TensorProto { raw_data: Some(raw(tensor)?), ..empty(name, tensor) })
}

/// Returns a tensor whose elements are in the file `location` from the byte `place` on.
fn referred(name: &str, tensor: &Tensor, location: &str, place: usize) -> TensorProto {
    let entry = |key: &str, value: String| TextEntry { key: key.to_owned(), value };
    let external_data = vec![
        entry("location", location.to_owned()),
        entry("offset", place.to_string()),
        entry("length", bytes_of(tensor).to_string()),
    ];
    let data_location = Some(TensorProto::EXTERNAL);
    TensorProto { external_data, data_location, ..empty(name, tensor) }
}

/// Returns the elements in row-major order, little-endian.
fn raw(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.f_contiguous()?;
    let mut bytes = vec![0; bytes_of(&tensor)];
    if !bytes.is_empty() {
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    }
    Ok(bytes)
}
