//! The values of a pickle, and the arena that holds them.

use super::{MAX_DIMS, MAX_VALUES, PickleError, Result};
use crate::checkpoint::entry::ElementType;

/// Index of a value in the arena.
pub(super) type Id = usize;

#[derive(Clone, Debug)]
pub(super) enum Value {
    /// A value that is not needed, such as a float or `None`.
    Opaque,
    Mark,
    Int(i64),
    Str(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(ElementType, String),
    Tensor(View),
}

/// A tensor in a pickle, which is a view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::checkpoint) struct View {
    pub(in crate::checkpoint) element: ElementType,
    /// Key of the storage, whose record is `data/<key>`.
    pub(in crate::checkpoint) key: String,
    pub(in crate::checkpoint) offset: i64,
    pub(in crate::checkpoint) shape: Vec<i64>,
    pub(in crate::checkpoint) strides: Vec<i64>,
}

/// The classes and functions that a pickle may name.
#[derive(Clone, Debug)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Storage(ElementType),
}

impl Global {
    /// Returns the global `module.name`.
    ///
    /// # Errors
    /// [`PickleError::Global`] if a state dict does not need this global.
    pub(super) fn find(module: &str, name: &str) -> Result<Self> {
        let other = |size| ElementType::Other(name.trim_end_matches("Storage").into(), Some(size));
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "Size") => Global::Size,
            ("torch", "DoubleStorage") => Global::Storage(ElementType::F64),
            ("torch", "FloatStorage") => Global::Storage(ElementType::F32),
            ("torch", "HalfStorage") => Global::Storage(ElementType::F16),
            ("torch", "BFloat16Storage") => Global::Storage(ElementType::Bf16),
            ("torch", "LongStorage" | "ComplexFloatStorage") => Global::Storage(other(8)),
            ("torch", "IntStorage") => Global::Storage(other(4)),
            ("torch", "ShortStorage") => Global::Storage(other(2)),
            ("torch", "CharStorage" | "ByteStorage" | "BoolStorage") => Global::Storage(other(1)),
            _ => return Err(PickleError::Global(format!("{module}.{name}"))),
        })
    }
}

/// All values of a pickle. They refer to each other by index.
#[derive(Debug, Default)]
pub(super) struct Arena(Vec<Value>);

impl Arena {
    /// Adds a value and returns its index.
    ///
    /// # Errors
    /// Returns an error if there are already [`MAX_VALUES`] values.
    pub(super) fn add(&mut self, value: Value) -> Result<Id> {
        if self.0.len() == MAX_VALUES {
            return Err("the pickle has too many values".into());
        }
        self.0.push(value);
        Ok(self.0.len() - 1)
    }

    pub(super) fn get(&self, id: Id) -> &Value {
        &self.0[id]
    }

    pub(super) fn get_mut(&mut self, id: Id) -> &mut Value {
        &mut self.0[id]
    }

    pub(super) fn text(&self, id: Id) -> Result<&str> {
        match self.get(id) {
            Value::Str(text) => Ok(text),
            _ => Err("the pickle lacks a string where one is expected".into()),
        }
    }

    pub(super) fn int(&self, id: Id) -> Result<i64> {
        match *self.get(id) {
            Value::Int(value) => Ok(value),
            _ => Err("the pickle lacks an integer where one is expected".into()),
        }
    }

    pub(super) fn tuple(&self, id: Id) -> Result<&[Id]> {
        match self.get(id) {
            Value::Tuple(items) => Ok(items),
            _ => Err("the pickle lacks a tuple where one is expected".into()),
        }
    }

    /// Returns a shape or strides: the integers of a tuple.
    pub(super) fn dims(&self, id: Id) -> Result<Vec<i64>> {
        let dims = self.tuple(id)?;
        if dims.len() > MAX_DIMS {
            return Err("the pickle has a tensor with too many dimensions".into());
        }
        dims.iter().map(|&id| self.int(id)).collect()
    }

    /// Returns the pairs of a dict; empty for any other value.
    pub(super) fn items(&self, id: Id) -> &[(Id, Id)] {
        match self.get(id) {
            Value::Dict(items) => items,
            _ => &[],
        }
    }
}
