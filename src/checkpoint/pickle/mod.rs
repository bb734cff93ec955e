//! Reads the subset of pickle that a state dict consists of, without running any code.
//!
//! All values are in one arena and refer to each other by index, so a deeply nested pickle needs no
//! recursion. Each opcode adds at most one value, and [`MAX_VALUES`] limits the number of values.

mod state_dict;
mod value;

use std::collections::HashMap;

pub(super) use state_dict::state_dict;
pub(super) use value::View;
use value::{Arena, Global, Id, Value};

/// The most values that a pickle may make. It is enough for ten thousand tensors.
const MAX_VALUES: usize = 1 << 18;
/// The next three limits bound what each tensor copies. A few bytes of a pickle can refer many
/// times to a long string or tuple; with the limits, memory stays in proportion to the file.
const MAX_KEY_BYTES: usize = 64;
const MAX_NAME_BYTES: usize = 1 << 10;
const MAX_DIMS: usize = 16;

/// The reason why a pickle is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PickleError {
    /// It names code that a state dict does not need.
    Global(String),
    /// It is cut off, contradicts itself, or uses an opcode that no state dict needs.
    Corrupt(String),
}

impl From<&str> for PickleError {
    fn from(reason: &str) -> Self {
        PickleError::Corrupt(reason.to_owned())
    }
}

type Result<T> = std::result::Result<T, PickleError>;

/// The stack machine that runs the opcodes of a pickle.
#[derive(Default)]
struct Machine<'a> {
    input: &'a [u8],
    values: Arena,
    stack: Vec<Id>,
    memo: HashMap<u64, Id>,
}

impl<'a> Machine<'a> {
    /// Runs a pickle up to STOP. Returns its values and the id of the value on top of the stack.
    fn run(pickle: &'a [u8]) -> Result<(Arena, Id)> {
        let mut machine = Machine { input: pickle, ..Machine::default() };
        loop {
            match machine.take(1)?[0] {
                b'.' => return machine.pop().map(|top| (machine.values, top)),
                opcode => machine.step(opcode)?,
            }
        }
    }

    /// Runs one opcode. The comments give the names of the opcodes in Python's `pickletools`.
    #[rustfmt::skip]
    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => self.take(1).map(drop),                                  // PROTO
            0x95 => self.take(8).map(drop),                                  // FRAME
            b'(' => self.push(Value::Mark),                                  // MARK
            b'0' => self.pop().map(drop),                                    // POP
            b'1' => self.pop_to_mark().map(drop),                            // POP_MARK
            b'N' => self.push(Value::Opaque),                                // NONE
            0x88 | 0x89 => self.push(Value::Opaque),                         // NEWTRUE, NEWFALSE
            b'J' => self.signed(4),                                          // BININT
            b'K' => self.unsigned(1),                                        // BININT1
            b'M' => self.unsigned(2),                                        // BININT2
            0x8a => self.long(),                                             // LONG1
            b'G' => self.opaque(8),                                          // BINFLOAT
            0x8c => self.string(1),                                          // SHORT_BINUNICODE
            b'X' => self.string(4),                                          // BINUNICODE
            0x8d => self.string(8),                                          // BINUNICODE8
            b'U' => self.bytes(1),                                           // SHORT_BINSTRING
            b'C' => self.bytes(1),                                           // SHORT_BINBYTES
            b'T' => self.bytes(4),                                           // BINSTRING
            b'B' => self.bytes(4),                                           // BINBYTES
            0x8e => self.bytes(8),                                           // BINBYTES8
            b'}' => self.push(Value::Dict(Vec::new())),                      // EMPTY_DICT
            b']' => self.push(Value::List(Vec::new())),                      // EMPTY_LIST
            b')' => self.push(Value::Tuple(Vec::new())),                     // EMPTY_TUPLE
            b't' => self.pop_to_mark().and_then(|items| self.tuple(items)),  // TUPLE
            0x85 => self.pop_last(1).and_then(|items| self.tuple(items)),    // TUPLE1
            0x86 => self.pop_last(2).and_then(|items| self.tuple(items)),    // TUPLE2
            0x87 => self.pop_last(3).and_then(|items| self.tuple(items)),    // TUPLE3
            b'a' => self.pop_last(1).and_then(|items| self.append(items)),   // APPEND
            b'e' => self.pop_to_mark().and_then(|items| self.append(items)), // APPENDS
            b's' => self.pop_last(2).and_then(|pair| self.set_items(&pair)), // SETITEM
            b'u' => self.pop_to_mark().and_then(|all| self.set_items(&all)), // SETITEMS
            b'q' => self.number(1).and_then(|slot| self.remember(slot)),     // BINPUT
            b'r' => self.number(4).and_then(|slot| self.remember(slot)),     // LONG_BINPUT
            0x94 => self.remember(self.memo.len() as u64),                   // MEMOIZE
            b'h' => self.number(1).and_then(|slot| self.recall(slot)),       // BINGET
            b'j' => self.number(4).and_then(|slot| self.recall(slot)),       // LONG_BINGET
            b'Q' => self.persistent_id(),                                    // BINPERSID
            b'c' => self.global(),                                           // GLOBAL
            0x93 => self.stack_global(),                                     // STACK_GLOBAL
            b'R' => self.reduce(),                                           // REDUCE
            b'b' => self.build(),                                            // BUILD
            _ => Err(PickleError::Corrupt(format!("pickle opcode {opcode:#04x} is not supported"))),
        }
    }

    // Reading the input.

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.input.split_at_checked(count).ok_or("the pickle is cut off")?;
        self.input = rest;
        Ok(taken)
    }

    /// Reads a little-endian unsigned number of `width` bytes, at most 8.
    fn number(&mut self, width: usize) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes[..width].copy_from_slice(self.take(width)?);
        Ok(u64::from_le_bytes(bytes))
    }

    fn length(&mut self, width: usize) -> Result<usize> {
        usize::try_from(self.number(width)?).map_err(|_| "the pickle is cut off".into())
    }

    fn line(&mut self) -> Result<String> {
        let end = self.input.iter().position(|&b| b == b'\n').ok_or("the pickle is cut off")?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    // The stack.

    fn push(&mut self, value: Value) -> Result<()> {
        let id = self.values.add(value)?;
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Result<()> {
        if self.stack.len() == MAX_VALUES {
            return Err("the pickle has too many values".into());
        }
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        Ok(self.stack.pop().ok_or("the pickle pops from an empty stack")?)
    }

    fn top(&self) -> Result<Id> {
        Ok(*self.stack.last().ok_or("the pickle reads from an empty stack")?)
    }

    /// Pops the last `count` values and returns them in the order in which they were pushed.
    fn pop_last(&mut self, count: usize) -> Result<Vec<Id>> {
        let start = self.stack.len().checked_sub(count);
        Ok(self.stack.split_off(start.ok_or("the pickle pops from an empty stack")?))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let is_mark = |&id: &Id| matches!(self.values.get(id), Value::Mark);
        let mark = self.stack.iter().rposition(is_mark).ok_or("the pickle lacks a mark")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    // The opcodes. `width` is the number of bytes of the number that follows the opcode.

    fn unsigned(&mut self, width: usize) -> Result<()> {
        let value = self.number(width)? as i64;
        self.push(Value::Int(value))
    }

    /// Pushes a two's complement integer of `width` bytes, at most 8. Zero bytes stand for 0.
    fn signed(&mut self, width: usize) -> Result<()> {
        let bytes = self.take(width)?;
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut value = if negative { [0xff; 8] } else { [0; 8] };
        value[..width].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(value)))
    }

    fn long(&mut self) -> Result<()> {
        match self.length(1)? {
            width @ 0..=8 => self.signed(width),
            // No dimension is this large, but a hash or a seed can be.
            width => self.opaque(width),
        }
    }

    fn string(&mut self, width: usize) -> Result<()> {
        let len = self.length(width)?;
        let text = std::str::from_utf8(self.take(len)?);
        let text = text.map_err(|_| "the pickle has a string that is not UTF-8")?.to_owned();
        self.push(Value::Str(text))
    }

    fn bytes(&mut self, width: usize) -> Result<()> {
        let len = self.length(width)?;
        self.opaque(len)
    }

    /// Skips the next `len` bytes, which hold a value that is not needed, and pushes a placeholder.
    fn opaque(&mut self, len: usize) -> Result<()> {
        self.take(len)?;
        self.push(Value::Opaque)
    }

    fn tuple(&mut self, items: Vec<Id>) -> Result<()> {
        self.push(Value::Tuple(items))
    }

    fn append(&mut self, new: Vec<Id>) -> Result<()> {
        let top = self.top()?;
        match self.values.get_mut(top) {
            Value::List(items) => items.extend(new),
            _ => return Err("the pickle appends to a value other than a list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, new: &[Id]) -> Result<()> {
        let (pairs, rest) = new.as_chunks::<2>();
        let top = self.top()?;
        match self.values.get_mut(top) {
            Value::Dict(items) if rest.is_empty() => {
                items.extend(pairs.iter().map(|&[key, value]| (key, value)));
                Ok(())
            }
            _ => Err("the pickle sets items of a value other than a dict".into()),
        }
    }

    fn remember(&mut self, slot: u64) -> Result<()> {
        if self.memo.len() == MAX_VALUES {
            return Err("the pickle has too many values".into());
        }
        self.memo.insert(slot, self.top()?);
        Ok(())
    }

    fn recall(&mut self, slot: u64) -> Result<()> {
        let id = *self.memo.get(&slot).ok_or("the pickle reads an empty memo slot")?;
        self.push_id(id)
    }

    fn global(&mut self) -> Result<()> {
        let (module, name) = (self.line()?, self.line()?);
        self.push(Value::Global(Global::find(&module, &name)?))
    }

    fn stack_global(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        let global = Global::find(self.values.text(module)?, self.values.text(name)?)?;
        self.push(Value::Global(global))
    }

    /// Pushes the storage that `("storage", type, key, location, number of elements)` describes.
    fn persistent_id(&mut self) -> Result<()> {
        let id = self.pop()?;
        let &[tag, class, key, _, _] = self.values.tuple(id)? else {
            return Err("the pickle refers to an invalid storage".into());
        };
        match (self.values.text(tag)?, self.values.get(class)) {
            ("storage", Value::Global(Global::Storage(element))) => {
                let key = self.values.text(key)?;
                if key.len() > MAX_KEY_BYTES {
                    return Err("the pickle has a storage key that is too long".into());
                }
                let storage = Value::Storage(element.clone(), key.to_owned());
                self.push(storage)
            }
            _ => Err("the pickle refers to an invalid storage".into()),
        }
    }

    /// Pushes the result of calling the global on the stack with the arguments on top of it.
    fn reduce(&mut self) -> Result<()> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let arguments = self.values.tuple(arguments)?;
        let Value::Global(global) = self.values.get(callee) else {
            return Err("the pickle calls a value other than a function".into());
        };
        match (global, arguments) {
            (Global::OrderedDict, []) => self.push(Value::Dict(Vec::new())),
            (Global::Size, &[dims]) => self.push_id(dims),
            (Global::RebuildParameter, &[tensor, ..]) => self.push_id(tensor),
            (Global::RebuildTensor, &[storage, offset, shape, strides, ..]) => {
                let Value::Storage(element, key) = self.values.get(storage) else {
                    return Err("the pickle makes a tensor of a value other than a storage".into());
                };
                let view = View {
                    element: element.clone(),
                    key: key.clone(),
                    offset: self.values.int(offset)?,
                    shape: self.values.dims(shape)?,
                    strides: self.values.dims(strides)?,
                };
                self.push(Value::Tensor(view))
            }
            _ => Err("the pickle calls a function with wrong arguments".into()),
        }
    }

    /// Drops the attributes of a dict (`_metadata` of a state dict), which are not needed.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.values.get(self.top()?) {
            Value::Dict(_) => Ok(()),
            _ => Err("the pickle sets attributes of a value other than a dict".into()),
        }
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
            (b"\x8a\x08\xfe\xff\xff\xff\xff\xff\xff\xff.", Value::Int(-2)),
            (b"\x8a\x05\x00\x00\x00\x00\x01.", Value::Int(1 << 32)),
            (b"J\xfe\xff\xff\xff.", Value::Int(-2)),
        ] {
            let (values, id) = Machine::run(bytes).unwrap();
            assert_eq!(format!("{:?}", values.get(id)), format!("{value:?}"));
        }
    }
}
