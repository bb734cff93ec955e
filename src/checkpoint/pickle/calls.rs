//! The opcodes that name and call functions and classes. None is ever run.

use super::machine::Machine;
use super::value::{Global, Id, Value, View};
use super::{MAX_KEY_BYTES, MAX_VALUES, Result};

/// The most arguments of a call that are looked at.
const MAX_ARGUMENTS: usize = 8;

impl Machine<'_> {
    pub(super) fn global(&mut self) -> Result<()> {
        let (module, name) = (self.line()?, self.line()?);
        self.push(Value::Global(Global::find(&module, &name)))
    }

    pub(super) fn stack_global(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        let global = Global::find(self.values.text(module)?, self.values.text(name)?);
        self.push(Value::Global(global))
    }

    /// Pushes the storage that `("storage", type, key, location, number of elements)` describes. In
    /// the old format there is a sixth item, which is `None`. Any other persistent object is
    /// foreign.
    pub(super) fn persistent_id(&mut self) -> Result<()> {
        let id = self.pop()?;
        let (class, key) = match *self.values.tuple(id)? {
            [tag, class, ..] if self.values.text(tag)? != "storage" => {
                let name = self.name_of(class);
                return self.push(Value::Foreign(name));
            }
            [_, class, key, _, _] => (class, key),
            [_, class, key, _, _, view] if matches!(self.values.get(view), Value::Opaque) => {
                (class, key)
            }
            _ => return Err("the pickle refers to an invalid storage".into()),
        };
        match self.values.get(class) {
            Value::Global(Global::Storage(element)) => {
                let key = self.values.text(key)?;
                if key.len() > MAX_KEY_BYTES {
                    return Err("the pickle has a storage key that is too long".into());
                }
                let storage = Value::Storage(element.clone(), key.to_owned());
                self.push(storage)
            }
            Value::Global(Global::Foreign(name)) => {
                let name = name.clone();
                self.push(Value::Foreign(name))
            }
            _ => Err("the pickle refers to an invalid storage".into()),
        }
    }

    /// Pushes the result of the call `[callee, arguments]`. A third item, keyword arguments, is not
    /// needed.
    pub(super) fn reduce(&mut self, call: &[Id]) -> Result<()> {
        let &[callee, arguments, ..] = call else { return Err("the pickle calls nothing".into()) };
        let arguments = self.first_items(arguments)?;
        self.call(callee, &arguments)
    }

    /// Returns the first items of a tuple, as many as any function that is known here reads.
    fn first_items(&self, tuple: Id) -> Result<Vec<Id>> {
        Ok(self.values.tuple(tuple)?.iter().take(MAX_ARGUMENTS).copied().collect())
    }

    /// Pushes the object of a class that two lines name, with the arguments above the last mark.
    pub(super) fn instance(&mut self) -> Result<()> {
        self.global()?;
        let callee = self.pop()?;
        let arguments = self.pop_to_mark()?;
        self.call(callee, &arguments)
    }

    /// Pushes the object of the class above the last mark, with the arguments above the class.
    pub(super) fn object(&mut self) -> Result<()> {
        match self.pop_to_mark()?[..] {
            [callee, ref arguments @ ..] => self.call(callee, arguments),
            [] => Err("the pickle calls nothing".into()),
        }
    }

    fn call(&mut self, callee: Id, arguments: &[Id]) -> Result<()> {
        let global = match self.values.get(callee) {
            Value::Global(global) => global,
            // What a foreign function returned is called.
            Value::Foreign(_) => return self.push_id(callee),
            _ => return Err("the pickle calls a value other than a function".into()),
        };
        match (global, arguments) {
            (Global::Dict, &[pairs]) => {
                let pairs = self.pairs(pairs)?;
                self.push(Value::Dict(pairs))
            }
            (Global::Dict, _) => self.push(Value::Dict(Vec::new())),
            (Global::Size, &[dims]) => self.push_id(dims),
            (Global::RebuildParameter, &[tensor, ..]) => self.push_id(tensor),
            (Global::RebuildFromType, &[function, _, inner, _]) => {
                let inner = self.first_items(inner)?;
                match self.values.get(function) {
                    Value::Global(Global::RebuildTensor) => self.tensor(&inner),
                    _ => self.push(Value::Foreign("a subclass of torch.Tensor".to_owned())),
                }
            }
            (Global::RebuildTensor, _) => self.tensor(arguments),
            (Global::Foreign(_), _) => {
                let name = self.name_of(callee);
                self.push(Value::Foreign(name))
            }
            _ => Err("the pickle calls a function with wrong arguments".into()),
        }
    }

    /// Pushes the tensor that `[storage, offset, shape, strides, ..]` describes. A tensor of a
    /// storage that is not known is foreign.
    fn tensor(&mut self, arguments: &[Id]) -> Result<()> {
        let &[storage, offset, shape, strides, ..] = arguments else {
            return Err("the pickle calls a function with wrong arguments".into());
        };
        let (element, key) = match self.values.get(storage) {
            Value::Storage(element, key) => (element.clone(), key.clone()),
            Value::Foreign(_) => return self.push_id(storage),
            _ => return Err("the pickle makes a tensor of a value other than a storage".into()),
        };
        let view = View {
            element,
            key,
            offset: self.values.int(offset)?,
            shape: self.values.dims(shape)?,
            strides: self.values.dims(strides)?,
        };
        self.push(Value::Tensor(view))
    }

    /// Returns the pairs in a list of pairs, from which a dict is made; none for any other value.
    fn pairs(&mut self, list: Id) -> Result<Vec<(Id, Id)>> {
        let pair = |&id: &Id| match self.values.get(id) {
            Value::Tuple(pair) | Value::List(pair) => Some((*pair.first()?, *pair.get(1)?)),
            _ => None,
        };
        let pairs: Vec<(Id, Id)> = match self.values.get(list) {
            Value::Dict(items) => items.clone(),
            Value::List(items) => items.iter().filter_map(pair).collect(),
            _ => Vec::new(),
        };
        // A few bytes can refer to a long list again and again.
        self.copied = self.copied.saturating_add(pairs.len());
        if self.copied > MAX_VALUES {
            return Err("the pickle has too many values".into());
        }
        Ok(pairs)
    }

    /// Returns the name of a foreign class or object.
    fn name_of(&self, id: Id) -> String {
        match self.values.get(id) {
            Value::Global(Global::Foreign(name)) | Value::Foreign(name) => name.clone(),
            _ => "an object of another class".to_owned(),
        }
    }

    /// Drops the state of an object: the attributes of a dict (`_metadata` of a state dict), and
    /// everything that a foreign object holds.
    pub(super) fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.values.get(self.top()?) {
            Value::Dict(_) | Value::Tensor(_) | Value::Foreign(_) => Ok(()),
            _ => Err("the pickle sets attributes of a value that has none".into()),
        }
    }
}
