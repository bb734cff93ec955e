//! The part of pickle that a state dict is made of, read without running any of it.
//!
//! Values live in one arena and refer to each other by index, so a deeply nested pickle costs no
//! recursion. Each opcode adds at most one value, and [`MAX_VALUES`] bounds them all.

use std::collections::{BTreeMap, HashMap};

use super::entry::ElementType;

/// Enough for tens of thousands of tensors.
const MAX_VALUES: usize = 1 << 20;

/// Why a pickle is not read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PickleError {
    /// It names code outside of what a state dict needs.
    Global(String),
    /// It is cut off, contradicts itself or uses an opcode that no state dict needs.
    Corrupt(String),
}

impl From<&str> for PickleError {
    fn from(reason: &str) -> Self {
        PickleError::Corrupt(reason.to_owned())
    }
}

type Result<T> = std::result::Result<T, PickleError>;

/// A tensor as the pickle describes it: a view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) element: ElementType,
    /// Name of the storage's record, `data/<key>`.
    pub(super) key: String,
    pub(super) offset: i64,
    pub(super) shape: Vec<i64>,
    pub(super) strides: Vec<i64>,
}

/// Index of a value in the arena.
type Id = usize;

#[derive(Clone, Debug)]
enum Value {
    /// Something that a state dict may hold and nobody reads.
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

/// What a pickle may name.
#[derive(Clone, Debug)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Storage(ElementType),
}

impl Global {
    fn find(module: &str, name: &str) -> Result<Self> {
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

/// The tensors of a pickled state dict by name.
///
/// Tensors of the outermost dict win. Where it has none, the one dict of tensors that it holds
/// under `state_dict`, `model` or `model_state` is taken. Values other than tensors are left out.
pub(super) fn state_dict(pickle: &[u8]) -> Result<BTreeMap<String, View>> {
    let mut machine = Machine { input: pickle, ..Machine::default() };
    let top = machine.run()?;
    let tensors = machine.tensors(top);
    if !tensors.is_empty() {
        return Ok(tensors);
    }
    let mut nested = ["state_dict", "model", "model_state"]
        .into_iter()
        .filter_map(|key| machine.item(top, key))
        .map(|id| machine.tensors(id))
        .filter(|tensors| !tensors.is_empty());
    match (nested.next(), nested.next()) {
        (Some(tensors), None) => Ok(tensors),
        (None, _) => Err("holds no state dict: no tensor by name, neither at the top nor under \
                          state_dict, model or model_state"
            .into()),
        _ => Err("holds more than one state dict".into()),
    }
}

#[derive(Default)]
struct Machine<'a> {
    input: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    /// Runs to STOP and gives the value on top.
    fn run(&mut self) -> Result<Id> {
        loop {
            match self.byte()? {
                b'.' => return self.pop(),
                opcode => self.step(opcode)?,
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => self.take(1).map(drop),                 // PROTO
            0x95 => self.take(8).map(drop),                 // FRAME
            b'(' => self.push(Value::Mark),                 // MARK
            b'0' => self.pop().map(drop),                   // POP
            b'1' => self.pop_to_mark().map(drop),           // POP_MARK
            b'N' | 0x88 | 0x89 => self.push(Value::Opaque), // NONE, NEWTRUE, NEWFALSE
            b'J' | b'K' | b'M' | 0x8a => self.integer(opcode),
            b'G' => {
                self.take(8)?; // BINFLOAT
                self.push(Value::Opaque)
            }
            b'X' | 0x8c | 0x8d => self.string(opcode),
            b'U' | b'T' | b'B' | b'C' | 0x8e => self.bytes(opcode),
            b'}' => self.push(Value::Dict(Vec::new())), // EMPTY_DICT
            b']' => self.push(Value::List(Vec::new())), // EMPTY_LIST
            b')' => self.push(Value::Tuple(Vec::new())), // EMPTY_TUPLE
            b't' => {
                let items = self.pop_to_mark()?; // TUPLE
                self.push(Value::Tuple(items))
            }
            0x85..=0x87 => self.small_tuple(usize::from(opcode - 0x84)),
            b'a' => {
                let item = self.pop()?; // APPEND
                self.append(vec![item])
            }
            b'e' => {
                let items = self.pop_to_mark()?; // APPENDS
                self.append(items)
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?); // SETITEM
                self.set_items(&[key, value])
            }
            b'u' => {
                let items = self.pop_to_mark()?; // SETITEMS
                self.set_items(&items)
            }
            b'q' | b'r' | 0x94 => self.remember(opcode),
            b'h' | b'j' => self.recall(opcode),
            b'Q' => self.persistent_id(),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?); // GLOBAL
                self.push_global(&module, &name)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?); // STACK_GLOBAL
                let (module, name) = (self.text(module)?.to_owned(), self.text(name)?.to_owned());
                self.push_global(&module, &name)
            }
            b'R' => self.reduce(),
            b'b' => self.build(),
            _ => Err(PickleError::Corrupt(format!("pickle opcode {opcode:#04x} is not read"))),
        }
    }

    // Input.

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let (taken, rest) = self.input.split_at_checked(count).ok_or("the pickle is cut off")?;
        self.input = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    /// A little-endian unsigned number of `width` bytes, at most 8.
    fn unsigned(&mut self, width: usize) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes[..width].copy_from_slice(self.take(width)?);
        Ok(u64::from_le_bytes(bytes))
    }

    fn length(&mut self, width: usize) -> Result<usize> {
        usize::try_from(self.unsigned(width)?).map_err(|_| "the pickle is cut off".into())
    }

    fn line(&mut self) -> Result<String> {
        let end = self.input.iter().position(|&b| b == b'\n').ok_or("the pickle is cut off")?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    // Stack.

    fn push(&mut self, value: Value) -> Result<()> {
        if self.values.len() == MAX_VALUES {
            return Err("the pickle has too many values".into());
        }
        self.values.push(value);
        self.push_id(self.values.len() - 1)
    }

    fn push_id(&mut self, id: Id) -> Result<()> {
        if self.stack.len() == MAX_VALUES {
            return Err("the pickle has too many values".into());
        }
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        Ok(self.stack.pop().ok_or("the pickle takes from an empty stack")?)
    }

    fn top(&self) -> Result<Id> {
        Ok(*self.stack.last().ok_or("the pickle looks at an empty stack")?)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let is_mark = |&id: &Id| matches!(self.values[id], Value::Mark);
        let mark = self.stack.iter().rposition(is_mark).ok_or("the pickle misses a mark")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn text(&self, id: Id) -> Result<&str> {
        match &self.values[id] {
            Value::Str(text) => Ok(text),
            _ => Err("the pickle has no string where one belongs".into()),
        }
    }

    fn int(&self, id: Id) -> Result<i64> {
        match self.values[id] {
            Value::Int(value) => Ok(value),
            _ => Err("the pickle has no integer where one belongs".into()),
        }
    }

    fn ints(&self, id: Id) -> Result<Vec<i64>> {
        self.tuple(id)?.iter().map(|&id| self.int(id)).collect()
    }

    fn tuple(&self, id: Id) -> Result<&[Id]> {
        match &self.values[id] {
            Value::Tuple(items) => Ok(items),
            _ => Err("the pickle has no tuple where one belongs".into()),
        }
    }

    // Opcodes.

    fn integer(&mut self, opcode: u8) -> Result<()> {
        let value = match opcode {
            b'J' => i64::from(self.unsigned(4)? as u32 as i32), // BININT
            b'K' => self.unsigned(1)? as i64,                   // BININT1
            b'M' => self.unsigned(2)? as i64,                   // BININT2
            _ => match self.length(1)? {
                0 => 0, // LONG1, in two's complement
                width @ 1..=8 => {
                    let unused = 64 - 8 * width as u32;
                    ((self.unsigned(width)? << unused) as i64) >> unused
                }
                // No dimension is that large; a hash or a seed may be.
                width => {
                    self.take(width)?;
                    return self.push(Value::Opaque);
                }
            },
        };
        self.push(Value::Int(value))
    }

    fn string(&mut self, opcode: u8) -> Result<()> {
        let len = match opcode {
            0x8c => self.length(1)?, // SHORT_BINUNICODE
            b'X' => self.length(4)?, // BINUNICODE
            _ => self.length(8)?,    // BINUNICODE8
        };
        let text = std::str::from_utf8(self.take(len)?);
        let text = text.map_err(|_| "the pickle has a string that is not UTF-8")?.to_owned();
        self.push(Value::Str(text))
    }

    fn bytes(&mut self, opcode: u8) -> Result<()> {
        let len = match opcode {
            b'U' | b'C' => self.length(1)?, // SHORT_BINSTRING, SHORT_BINBYTES
            b'T' | b'B' => self.length(4)?, // BINSTRING, BINBYTES
            _ => self.length(8)?,           // BINBYTES8
        };
        self.take(len)?;
        self.push(Value::Opaque)
    }

    fn small_tuple(&mut self, len: usize) -> Result<()> {
        let start = self.stack.len().checked_sub(len);
        let items = self.stack.split_off(start.ok_or("the pickle takes from an empty stack")?);
        self.push(Value::Tuple(items))
    }

    fn append(&mut self, new: Vec<Id>) -> Result<()> {
        match self.top().map(|id| &mut self.values[id])? {
            Value::List(items) => items.extend(new),
            _ => return Err("the pickle appends to what is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, new: &[Id]) -> Result<()> {
        let (pairs, rest) = new.as_chunks::<2>();
        match self.top().map(|id| &mut self.values[id])? {
            Value::Dict(items) if rest.is_empty() => {
                items.extend(pairs.iter().map(|&[key, value]| (key, value)));
                Ok(())
            }
            _ => Err("the pickle sets items of what is no dict".into()),
        }
    }

    fn remember(&mut self, opcode: u8) -> Result<()> {
        let slot = match opcode {
            b'q' => self.unsigned(1)? as u32, // BINPUT
            b'r' => self.unsigned(4)? as u32, // LONG_BINPUT
            _ => self.memo.len() as u32,      // MEMOIZE
        };
        if self.memo.len() == MAX_VALUES {
            return Err("the pickle has too many values".into());
        }
        self.memo.insert(slot, self.top()?);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<()> {
        let width = if opcode == b'h' { 1 } else { 4 }; // BINGET, LONG_BINGET
        let slot = self.unsigned(width)? as u32;
        let id = *self.memo.get(&slot).ok_or("the pickle recalls what it never kept")?;
        self.push_id(id)
    }

    fn push_global(&mut self, module: &str, name: &str) -> Result<()> {
        self.push(Value::Global(Global::find(module, name)?))
    }

    /// BINPERSID of `("storage", type, key, location, number of elements)`.
    fn persistent_id(&mut self) -> Result<()> {
        let id = self.pop()?;
        let &[tag, class, key, _, _] = self.tuple(id)? else {
            return Err("the pickle refers to what is no storage".into());
        };
        match (self.text(tag)?, &self.values[class]) {
            ("storage", Value::Global(Global::Storage(element))) => {
                let storage = Value::Storage(element.clone(), self.text(key)?.to_owned());
                self.push(storage)
            }
            _ => Err("the pickle refers to what is no storage".into()),
        }
    }

    /// REDUCE: the value that the global on the stack makes of its arguments.
    fn reduce(&mut self) -> Result<()> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let arguments = self.tuple(arguments)?;
        let Value::Global(global) = &self.values[callee] else {
            return Err("the pickle calls what is no function".into());
        };
        match (global, arguments) {
            (Global::OrderedDict, []) => self.push(Value::Dict(Vec::new())),
            (Global::Size, &[dims]) => self.push_id(dims),
            (Global::RebuildParameter, &[tensor, ..]) => self.push_id(tensor),
            (Global::RebuildTensor, &[storage, offset, shape, strides, ..]) => {
                let Value::Storage(element, key) = &self.values[storage] else {
                    return Err("the pickle makes a tensor of what is no storage".into());
                };
                let view = View {
                    element: element.clone(),
                    key: key.clone(),
                    offset: self.int(offset)?,
                    shape: self.ints(shape)?,
                    strides: self.ints(strides)?,
                };
                self.push(Value::Tensor(view))
            }
            _ => Err("the pickle calls a function with wrong arguments".into()),
        }
    }

    /// BUILD sets attributes (`_metadata` of a state dict), which nobody reads.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.values[self.top()?] {
            Value::Dict(_) => Ok(()),
            _ => Err("the pickle sets attributes of what is no dict".into()),
        }
    }

    // Results.

    fn items(&self, dict: Id) -> &[(Id, Id)] {
        match &self.values[dict] {
            Value::Dict(items) => items,
            _ => &[],
        }
    }

    fn item(&self, dict: Id, key: &str) -> Option<Id> {
        let found = self.items(dict).iter().rfind(|(id, _)| self.text(*id) == Ok(key));
        found.map(|&(_, value)| value)
    }

    fn tensors(&self, dict: Id) -> BTreeMap<String, View> {
        let named = |&(key, value): &(Id, Id)| match (&self.values[key], &self.values[value]) {
            (Value::Str(name), Value::Tensor(view)) => Some((name.clone(), view.clone())),
            _ => None,
        };
        self.items(dict).iter().filter_map(named).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_global_is_named_and_not_run() {
        let pickle = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.";
        assert_eq!(state_dict(pickle), Err(PickleError::Global("posix.system".into())));
    }

    #[test]
    fn deep_nesting_and_endless_values_are_errors() {
        let deep = [vec![b')'], vec![0x85; 1 << 19], vec![b'.']].concat();
        assert!(matches!(state_dict(&deep), Err(PickleError::Corrupt(_))));
        for opcode in [b'N', b'('] {
            let many = vec![opcode; MAX_VALUES + 2];
            assert!(matches!(state_dict(&many), Err(PickleError::Corrupt(_))));
        }
        let recalled = [b"Nq\x00".to_vec(), b"h\x00".repeat(MAX_VALUES + 1)].concat();
        assert!(matches!(state_dict(&recalled), Err(PickleError::Corrupt(_))));
    }

    #[test]
    fn long_integers_are_signed() {
        for (bytes, value) in [
            (&b"\x8a\x00."[..], Value::Int(0)),
            (b"\x8a\x01\xff.", Value::Int(-1)),
            (b"\x8a\x05\x00\x00\x00\x00\x01.", Value::Int(1 << 32)),
            (b"J\xfe\xff\xff\xff.", Value::Int(-2)),
        ] {
            let mut machine = Machine { input: bytes, ..Machine::default() };
            let id = machine.run().unwrap();
            assert_eq!(format!("{:?}", machine.values[id]), format!("{value:?}"));
        }
    }
}
