//! The stack machine that runs the opcodes of a pickle.

use std::collections::HashMap;

use super::value::{Arena, Id, Value};
use super::{MAX_VALUES, PickleError, Result};

/// The stack machine that runs the opcodes of a pickle.
#[derive(Default)]
pub(in crate::checkpoint) struct Machine<'a> {
    input: &'a [u8],
    pub(super) values: Arena,
    stack: Vec<Id>,
    memo: HashMap<u64, Id>,
    /// Number of items of dicts that were copied from other values.
    pub(super) copied: usize,
}

impl<'a> Machine<'a> {
    /// Runs a pickle up to STOP. Returns its values, the id of the value on top of the stack, and
    /// the input after the pickle.
    pub(in crate::checkpoint) fn run(pickle: &'a [u8]) -> Result<(Arena, Id, &'a [u8])> {
        let mut machine = Machine { input: pickle, ..Machine::default() };
        loop {
            match machine.take(1)?[0] {
                b'.' => return machine.pop().map(|top| (machine.values, top, machine.input)),
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
            b'2' => self.top().and_then(|top| self.push_id(top)),            // DUP
            b'}' => self.push(Value::Dict(Vec::new())),                      // EMPTY_DICT
            b']' | 0x8f => self.push(Value::List(Vec::new())),               // EMPTY_LIST, EMPTY_SET
            b')' => self.push(Value::Tuple(Vec::new())),                     // EMPTY_TUPLE
            b'd' => self.pop_to_mark().and_then(|all| self.dict(&all)),      // DICT
            b'l' | 0x91 => self.pop_to_mark().and_then(|all| self.push(Value::List(all))), // LIST, FROZENSET
            b't' => self.pop_to_mark().and_then(|items| self.tuple(items)),  // TUPLE
            0x85 => self.pop_last(1).and_then(|items| self.tuple(items)),    // TUPLE1
            0x86 => self.pop_last(2).and_then(|items| self.tuple(items)),    // TUPLE2
            0x87 => self.pop_last(3).and_then(|items| self.tuple(items)),    // TUPLE3
            b'a' => self.pop_last(1).and_then(|items| self.append(items)),   // APPEND
            b'e' | 0x90 => self.pop_to_mark().and_then(|all| self.append(all)), // APPENDS, ADDITEMS
            b's' => self.pop_last(2).and_then(|pair| self.set_items(&pair)), // SETITEM
            b'u' => self.pop_to_mark().and_then(|all| self.set_items(&all)), // SETITEMS
            b'q' => self.number(1).and_then(|slot| self.remember(slot)),     // BINPUT
            b'r' => self.number(4).and_then(|slot| self.remember(slot)),     // LONG_BINPUT
            b'p' => self.decimal().and_then(|slot| self.remember(slot)),     // PUT
            0x94 => self.remember(self.memo.len() as u64),                   // MEMOIZE
            b'h' => self.number(1).and_then(|slot| self.recall(slot)),       // BINGET
            b'j' => self.number(4).and_then(|slot| self.recall(slot)),       // LONG_BINGET
            b'g' => self.decimal().and_then(|slot| self.recall(slot)),       // GET
            b'Q' => self.persistent_id(),                                    // BINPERSID
            b'c' => self.global(),                                           // GLOBAL
            0x93 => self.stack_global(),                                     // STACK_GLOBAL
            b'R' | 0x81 => self.pop_last(2).and_then(|call| self.reduce(&call)), // REDUCE, NEWOBJ
            0x92 => self.pop_last(3).and_then(|call| self.reduce(&call)),    // NEWOBJ_EX
            b'i' => self.instance(),                                         // INST
            b'o' => self.object(),                                           // OBJ
            b'b' => self.build(),                                            // BUILD
            _ => self.scalar(opcode),
        }
    }

    /// Runs an opcode that pushes a number or a string.
    #[rustfmt::skip]
    fn scalar(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            b'N' => self.push(Value::Opaque),                                // NONE
            0x88 | 0x89 => self.push(Value::Bool(opcode == 0x88)),           // NEWTRUE, NEWFALSE
            b'J' => self.signed(4),                                          // BININT
            b'K' => self.unsigned(1),                                        // BININT1
            b'M' => self.unsigned(2),                                        // BININT2
            0x8a => self.long(1),                                            // LONG1
            0x8b => self.long(4),                                            // LONG4
            b'I' | b'L' => self.text_int(),                                  // INT, LONG
            b'G' => self.opaque(8),                                          // BINFLOAT
            b'F' => self.line().and_then(|_| self.push(Value::Opaque)),      // FLOAT
            0x8c => self.string(1),                                          // SHORT_BINUNICODE
            b'X' => self.string(4),                                          // BINUNICODE
            0x8d => self.string(8),                                          // BINUNICODE8
            b'V' | b'S' => self.text_string(),                               // UNICODE, STRING
            b'U' => self.bytes(1),                                           // SHORT_BINSTRING
            b'C' => self.bytes(1),                                           // SHORT_BINBYTES
            b'T' => self.bytes(4),                                           // BINSTRING
            b'B' => self.bytes(4),                                           // BINBYTES
            0x8e | 0x96 => self.bytes(8),                                    // BINBYTES8, BYTEARRAY8
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

    pub(super) fn line(&mut self) -> Result<String> {
        let end = self.input.iter().position(|&b| b == b'\n').ok_or("the pickle is cut off")?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    /// Reads a line with a number, as the first version of pickle writes memo slots.
    fn decimal(&mut self) -> Result<u64> {
        self.line()?.parse().map_err(|_| "the pickle has an invalid memo slot".into())
    }

    // The stack.

    pub(super) fn push(&mut self, value: Value) -> Result<()> {
        let id = self.values.add(value)?;
        self.push_id(id)
    }

    pub(super) fn push_id(&mut self, id: Id) -> Result<()> {
        if self.stack.len() == MAX_VALUES {
            return Err("the pickle has too many values".into());
        }
        self.stack.push(id);
        Ok(())
    }

    pub(super) fn pop(&mut self) -> Result<Id> {
        Ok(self.stack.pop().ok_or("the pickle pops from an empty stack")?)
    }

    pub(super) fn top(&self) -> Result<Id> {
        Ok(*self.stack.last().ok_or("the pickle reads from an empty stack")?)
    }

    /// Pops the last `count` values and returns them in the order in which they were pushed.
    pub(super) fn pop_last(&mut self, count: usize) -> Result<Vec<Id>> {
        let start = self.stack.len().checked_sub(count);
        Ok(self.stack.split_off(start.ok_or("the pickle pops from an empty stack")?))
    }

    pub(super) fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
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

    fn long(&mut self, width: usize) -> Result<()> {
        match self.length(width)? {
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

    /// Pushes the integer or boolean in a line of text; a placeholder if it is too large.
    fn text_int(&mut self) -> Result<()> {
        let line = self.line()?;
        match line.trim_end_matches('L').parse() {
            Ok(value) => self.push(Value::Int(value)),
            Err(_) => self.push(Value::Opaque),
        }
    }

    /// Pushes the string in a line of text, without its quotes. Escapes are not resolved, because
    /// no name of a tensor needs one.
    fn text_string(&mut self) -> Result<()> {
        let line = self.line()?;
        self.push(Value::Str(line.trim_matches(['\'', '"']).to_owned()))
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
            // The items of an object of another class are not needed.
            Value::Foreign(_) => {}
            _ => return Err("the pickle appends to a value other than a list".into()),
        }
        Ok(())
    }

    fn dict(&mut self, items: &[Id]) -> Result<()> {
        self.push(Value::Dict(Vec::new()))?;
        self.set_items(items)
    }

    /// Sets items of the dict on top of the stack. An object of another class that has items is a
    /// dict, too.
    fn set_items(&mut self, new: &[Id]) -> Result<()> {
        let (pairs, rest) = new.as_chunks::<2>();
        let top = self.top()?;
        let value = self.values.get_mut(top);
        if let Value::Foreign(_) = value {
            *value = Value::Dict(Vec::new());
        }
        match value {
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
}
