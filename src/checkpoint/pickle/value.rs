//! The values of a pickle, and the arena that holds them.

use std::collections::HashMap;

use super::{MAX_DIMS, MAX_VALUES, Result};
use crate::checkpoint::entry::ElementType;

/// Index of a value in the arena.
pub(in crate::checkpoint) type Id = usize;

#[derive(Clone, Debug)]
pub(in crate::checkpoint) enum Value {
    /// A value that is not needed, such as a float or `None`.
    Opaque,
    Mark,
    Bool(bool),
    Int(i64),
    Str(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(ElementType, String),
    Tensor(View),
    /// An object of a class that a state dict does not need, with the name of the class. It was not
    /// made.
    Foreign(String),
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

/// The classes and functions that a pickle names.
#[derive(Clone, Debug)]
pub(in crate::checkpoint) enum Global {
    /// A dict or a subclass of it from the standard library.
    Dict,
    RebuildTensor,
    /// A function that returns its first argument, a tensor.
    RebuildParameter,
    /// A function that calls its first argument with the arguments in its third one.
    RebuildFromType,
    Size,
    Storage(ElementType),
    /// Any other class or function, which is never called, by its full name.
    Foreign(String),
}

/// The most bytes of the name of a foreign class that are kept.
const MAX_CLASS_BYTES: usize = 128;

impl Global {
    /// Returns the global `module.name`.
    pub(super) fn find(module: &str, name: &str) -> Self {
        let other = |size| ElementType::Other(name.trim_end_matches("Storage").into(), Some(size));
        match (module, name) {
            ("collections", "OrderedDict" | "defaultdict" | "Counter") => Global::Dict,
            ("builtins" | "__builtin__", "dict") => Global::Dict,
            ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                Global::RebuildParameter
            }
            ("torch._tensor", "_rebuild_from_type_v2") => Global::RebuildFromType,
            ("torch", "Size") => Global::Size,
            ("torch", "DoubleStorage") => Global::Storage(ElementType::F64),
            ("torch", "FloatStorage") => Global::Storage(ElementType::F32),
            ("torch", "HalfStorage") => Global::Storage(ElementType::F16),
            ("torch", "BFloat16Storage") => Global::Storage(ElementType::Bf16),
            ("torch", "ComplexDoubleStorage") => Global::Storage(other(16)),
            ("torch", "LongStorage" | "ComplexFloatStorage") => Global::Storage(other(8)),
            ("torch", "IntStorage" | "QInt32Storage") => Global::Storage(other(4)),
            ("torch", "ShortStorage") => Global::Storage(other(2)),
            ("torch", "CharStorage" | "ByteStorage" | "BoolStorage") => Global::Storage(other(1)),
            ("torch", "QInt8Storage" | "QUInt8Storage") => Global::Storage(other(1)),
            _ => Global::Foreign(format!("{}.{}", start_of(module), start_of(name))),
        }
    }
}

/// Returns the start of a name, at most half of [`MAX_CLASS_BYTES`].
fn start_of(name: &str) -> &str {
    let end = (0..=name.len().min(MAX_CLASS_BYTES / 2)).rev().find(|&at| name.is_char_boundary(at));
    &name[..end.unwrap_or(0)]
}

/// All values of a pickle. They refer to each other by index.
#[derive(Debug, Default)]
pub(in crate::checkpoint) struct Arena(Vec<Value>);

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

    pub(in crate::checkpoint) fn get(&self, id: Id) -> &Value {
        &self.0[id]
    }

    pub(super) fn get_mut(&mut self, id: Id) -> &mut Value {
        &mut self.0[id]
    }

    pub(in crate::checkpoint) fn text(&self, id: Id) -> Result<&str> {
        match self.get(id) {
            Value::Str(text) => Ok(text),
            _ => Err("the pickle lacks a string where one is expected".into()),
        }
    }

    /// Returns the bytes of an element of each storage by its key; `None` if they are unknown.
    pub(in crate::checkpoint) fn storages(&self) -> HashMap<&str, Option<usize>> {
        let mut found = HashMap::new();
        for value in &self.0 {
            if let Value::Storage(element, key) = value {
                found.insert(key.as_str(), element.size());
            }
        }
        found
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
    pub(in crate::checkpoint) fn items(&self, id: Id) -> &[(Id, Id)] {
        match self.get(id) {
            Value::Dict(items) => items,
            _ => &[],
        }
    }
}
