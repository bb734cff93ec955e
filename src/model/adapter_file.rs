//! Reads and writes adapter files: the trainable weights as safetensors, with the metadata that is
//! needed to rebuild the model.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};
use tch::{Device, Kind, Tensor, nn};

use super::adapter_info::{AdapterInfo, KEY};
use super::low_bit::{self, LowBit};
use super::petl_model::PetlConfig;
use crate::backbone::Backbone;
use crate::checkpoint::{LoadReport, TensorFile, check_finite};
use crate::error::{Error, Result};
use crate::files::write_atomically;

/// Checks that the file has as many bytes of weights as its config requires, before anything is
/// allocated.
pub(super) fn check_size<B: Backbone>(
    file: &TensorFile,
    config: &PetlConfig,
    backbone: &B,
) -> Result<()> {
    config.validate()?;
    let bytes = |name: &str| {
        let numel = file.shape(name)?.iter().fold(1, |n: i64, &side| n.saturating_mul(side));
        // Codes have one byte each; every other tensor is f32 or converted to f32.
        Some(if name == low_bit::CODES { numel } else { numel.saturating_mul(4) })
    };
    let found = file.names().filter_map(bytes).fold(0, i64::saturating_add);
    let corrupt = |asked: String| {
        let reason = format!("its config asks for {asked} bytes of weights, but it has {found}");
        Error::corrupt(file.path(), reason)
    };
    let Some(method) = config.method.stored_bytes(&backbone.shape(), found)? else {
        return Err(corrupt(format!("more than {found}")));
    };
    let head = config.num_classes.saturating_mul(backbone.feature_dim().saturating_add(1));
    let expected = method.saturating_add(head.saturating_mul(4));
    if expected == found { Ok(()) } else { Err(corrupt(expected.to_string())) }
}

/// Writes every variable of `vs` to `path` atomically, unless one of them is not finite.
pub(super) fn save(
    path: &Path,
    vs: &nn::VarStore,
    low_bit: &LowBit,
    info: &AdapterInfo,
) -> Result<()> {
    let variables: BTreeMap<String, Tensor> = vs.variables().into_iter().collect();
    let mut tensors = BTreeMap::new();
    for (name, variable) in &variables {
        check_finite(path, name, variable)?;
    }
    for (name, variable) in variables.iter().filter(|(name, _)| !low_bit.contains(name)) {
        tensors.insert(name.clone(), Bytes::of(variable)?);
    }
    if !low_bit.is_empty() {
        let encoded = low_bit.encode(&variables)?;
        tensors.extend(encoded.map(|(name, bytes)| (name.to_owned(), bytes)));
    }
    let text = serde_json::to_string(info).map_err(|e| Error::io(path)(e.into()))?;
    write_atomically(path, &encode(path, &tensors, (KEY, &text))?)
}

/// Returns the bytes of a safetensors file with `tensors` and one metadata entry. `path` is only
/// used in errors.
pub(crate) fn encode(
    path: &Path,
    tensors: &BTreeMap<String, Bytes>,
    (key, text): (&str, &str),
) -> Result<Vec<u8>> {
    let views = tensors
        .iter()
        .map(|(name, bytes)| Ok((name, bytes.view(path)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([(key.to_owned(), text.to_owned())]);
    serialize(views, Some(metadata)).map_err(|e| Error::io(path)(std::io::Error::other(e)))
}

/// Copies the tensors of `file` into the variables of `vs`: either all or none.
pub(super) fn load(
    file: &TensorFile,
    vs: &nn::VarStore,
    low_bit: &mut LowBit,
) -> Result<LoadReport> {
    let path = file.path();
    let variables: BTreeMap<String, Tensor> = vs.variables().into_iter().collect();
    let coded = if !low_bit.is_empty() && file.contains(low_bit::CODES) {
        low_bit.decode(file, &variables)?
    } else {
        BTreeMap::new()
    };
    let has_place = |name: &str| match name {
        low_bit::CODES | low_bit::STATISTICS => !coded.is_empty(),
        name => variables.contains_key(name) && !coded.contains_key(name),
    };
    let unexpected: Vec<String> =
        file.names().filter(|name| !has_place(name)).map(str::to_owned).collect();
    if !unexpected.is_empty() {
        let missing = variables.keys().map(String::as_str).filter(|name| !file.contains(name));
        return Err(Error::unexpected(path, unexpected, missing));
    }
    let mut values = low_bit.values(&coded)?;
    for (name, variable) in variables.iter().filter(|(name, _)| !coded.contains_key(*name)) {
        let expected = variable.size();
        let Some(found) = file.shape(name) else {
            let (file, name) = (path.to_path_buf(), name.clone());
            return Err(Error::MissingTensor { file, name, expected });
        };
        if !same_shape(&expected, found) {
            let (file, name, found) = (path.to_path_buf(), name.clone(), found.to_vec());
            return Err(Error::ShapeMismatch { file, name, expected, found });
        }
        values.insert(name.clone(), file.tensor(name)?.f_reshape(&expected)?);
    }
    for (name, value) in &values {
        check_finite(path, name, value)?;
    }
    tch::no_grad(|| {
        let mut pairs = variables.iter().zip(values.values());
        pairs.try_for_each(|((_, variable), value)| variable.shallow_clone().f_copy_(value))
    })?;
    low_bit.set_loaded(coded, &variables)?;
    let applied = file.names().map(str::to_owned).collect();
    Ok(LoadReport { applied, ..LoadReport::default() })
}

/// Compares shapes. A 1x1 convolution `[out, in, 1, 1]` is a matrix `[out, in]`, and a file may
/// have either shape.
fn same_shape(expected: &[i64], found: &[i64]) -> bool {
    match found.split_at_checked(expected.len()) {
        Some((head, tail)) => head == expected && tail.iter().all(|&side| side == 1),
        None => false,
    }
}

/// The dtype, the shape and the bytes of a tensor in a file.
pub(crate) struct Bytes {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Bytes {
    pub(crate) fn of(variable: &Tensor) -> Result<Self> {
        let (dtype, kind) = match variable.f_kind()? {
            Kind::Half => (Dtype::F16, Kind::Half),
            Kind::BFloat16 => (Dtype::BF16, Kind::BFloat16),
            Kind::Double => (Dtype::F64, Kind::Double),
            _ => (Dtype::F32, Kind::Float),
        };
        let values = variable.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(kind)?;
        let values = values.f_contiguous()?;
        let mut data = vec![0; values.numel() * kind.elt_size_in_bytes()];
        values.f_copy_data_u8(&mut data, values.numel())?;
        let shape = values.size().iter().map(|&side| side as usize).collect();
        Ok(Bytes { dtype, shape, data })
    }

    fn view(&self, path: &Path) -> Result<TensorView<'_>> {
        TensorView::new(self.dtype, self.shape.clone(), &self.data)
            .map_err(|e| Error::io(path)(std::io::Error::other(e)))
    }
}
