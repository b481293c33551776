//! A pickle machine that knows dictionaries, lists, tuples, texts, numbers and PyTorch's tensors. Everything else becomes
//! [`Value::Other`], which nothing is made of. Values live in arenas: no recursion, however deep a file nests them.
//!
//! Opcodes: `pickletools` of Python.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Read},
};

/// Bytes of one pickle stream. A model of a thousand tensors takes some hundred thousand.
const MAX_BYTES: u64 = 1 << 25;

/// Characters of a name: of a class, a storage, a tensor. A few bytes of a pickle can repeat a name that it remembers.
const MAX_NAME: usize = 1000;

/// Axes of a tensor: a few bytes can repeat a shape.
const MAX_AXES: usize = 16;

/// Arguments of a call that are looked at.
const MAX_ARGUMENTS: usize = 16;

/// Dictionaries around a state dict.
pub(super) const MAX_DEPTH: usize = 4;

/// A storage as the pickle describes it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct StorageRef {
    /// `torch.FloatStorage`.
    pub class: String,
    /// Its name in the file.
    pub key: String,
    pub elements: u64,
}

/// A tensor as the pickle describes it: a view of storage number `storage`, in elements.
#[derive(Clone, Debug)]
pub(super) struct TensorRef {
    pub storage: usize,
    pub offset: u64,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// What lies on the stack; the numbers are places in the machine's arenas.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    Mark,
    None,
    Bool(bool),
    Int(i64),
    Text(usize),
    /// A tuple or a list.
    List(usize),
    Dict(usize),
    /// `module.name`, as a text.
    Global(usize),
    Storage(usize),
    Tensor(usize),
    /// Anything else; the text says what.
    Other(usize),
}

pub(super) type Outcome<T> = Result<T, String>;

pub(super) struct Machine<'a> {
    reader: BufReader<&'a File>,
    at: u64,
    len: u64,
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
    pub(super) texts: Vec<String>,
    lists: Vec<Vec<Value>>,
    pub(super) dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<StorageRef>,
    known: HashMap<StorageRef, usize>,
    pub(super) tensors: Vec<TensorRef>,
}

impl<'a> Machine<'a> {
    /// A machine over at most `len` bytes.
    pub fn new(reader: BufReader<&'a File>, len: u64) -> Self {
        Machine {
            reader,
            at: 0,
            len: len.min(MAX_BYTES),
            stack: Vec::new(),
            memo: HashMap::new(),
            texts: Vec::new(),
            lists: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            known: HashMap::new(),
            tensors: Vec::new(),
        }
    }

    /// Bytes that were read.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Runs one pickle to its end and returns what it made.
    pub fn run(&mut self) -> Outcome<Value> {
        self.stack.clear();
        self.memo.clear();
        loop {
            let at = self.at;
            let [code] = self.array()?;
            if code == b'.' {
                return self.pop();
            }
            self.step(code).map_err(|what| format!("{what} (opcode {code:#04x} at byte {at} of its pickle)"))?;
        }
    }

    fn step(&mut self, code: u8) -> Outcome<()> {
        let value = match code {
            0x80 => return self.array::<1>().map(drop),
            0x95 => return self.array::<8>().map(drop),
            b'(' => Value::Mark,
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(u8::from_le_bytes(self.array()?).into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            0x8a => self.long()?,
            b'G' => {
                let number = f64::from_be_bytes(self.array()?);
                self.other(format!("the number {number}"))
            }
            b'X' => self.text(4)?,
            0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'T' | b'B' => self.bytes(4)?,
            b'U' | b'C' => self.bytes(1)?,
            b'c' => {
                let name = format!("{}.{}", self.line()?, self.line()?);
                self.global(name)?
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(name), Value::Text(module)) = (name, module) else {
                    return Err("a global without a name".into());
                };
                let (module, name) = (self.name(module)?, self.name(name)?);
                self.global(format!("{module}.{name}"))?
            }
            b')' | b']' => self.list(Vec::new()),
            b'}' | 0x8f => self.dict(Vec::new()),
            b't' | b'l' => {
                let items = self.pop_to_mark()?;
                self.list(items)
            }
            0x85..=0x87 => {
                let count = usize::from(code - 0x84);
                let from = self.stack.len().checked_sub(count).ok_or("the stack is empty")?;
                let items = self.stack.split_off(from);
                self.list(items)
            }
            b'd' => {
                let items = self.pop_to_mark()?;
                self.dict(pairs(&items)?)
            }
            b'q' | b'r' | 0x94 => {
                let key = match code {
                    b'q' => u8::from_le_bytes(self.array()?).into(),
                    b'r' => u32::from_le_bytes(self.array()?),
                    _ => self.memo.len() as u32,
                };
                let last = self.last()?;
                self.memo.insert(key, last);
                return Ok(());
            }
            b'h' | b'j' => {
                let key = match code {
                    b'h' => u8::from_le_bytes(self.array()?).into(),
                    _ => u32::from_le_bytes(self.array()?),
                };
                *self.memo.get(&key).ok_or_else(|| format!("nothing is remembered as {key}"))?
            }
            b'a' => {
                let item = self.pop()?;
                return self.extend(vec![item]);
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                return self.extend(items);
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                return self.set(vec![(key, value)]);
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                return self.set(pairs(&items)?);
            }
            b'0' => return self.pop().map(drop),
            b'1' => return self.pop_to_mark().map(drop),
            b'2' => self.last()?,
            // The attributes of an object, such as a state dict's `_metadata`.
            b'b' => return self.pop().map(drop),
            b'Q' => {
                let id = self.pop()?;
                self.storage(id)?
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(callable, arguments)?
            }
            _ => return Err("an unknown instruction".into()),
        };
        self.stack.push(value);
        Ok(())
    }

    /// What a call would make, without calling anything.
    fn call(&mut self, callable: Value, arguments: Value) -> Outcome<Value> {
        let Value::Global(global) = callable else { return Ok(self.other("the result of a call".into())) };
        let name = self.texts[global].clone();
        let arguments: Vec<Value> = match arguments {
            Value::List(i) => self.lists[i].iter().take(MAX_ARGUMENTS).copied().collect(),
            _ => return Err("a call without arguments".into()),
        };
        match (name.as_str(), &arguments[..]) {
            ("collections.OrderedDict" | "builtins.dict", []) => Ok(self.dict(Vec::new())),
            (
                "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor",
                &[Value::Storage(storage), Value::Int(offset), shape, strides, ..],
            ) => {
                let (shape, strides) = (self.extents(shape)?, self.extents(strides)?);
                let offset = u64::try_from(offset).map_err(|_| format!("a tensor begins at element {offset}"))?;
                self.tensors.push(TensorRef { storage, offset, shape, strides });
                Ok(Value::Tensor(self.tensors.len() - 1))
            }
            (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                &[tensor @ Value::Tensor(_), ..],
            ) => Ok(tensor),
            // A subclass of Tensor: function, type, arguments, state.
            ("torch._tensor._rebuild_from_type_v2", &[function @ Value::Global(inner), _, arguments, ..])
                if self.texts[inner] != name =>
            {
                self.call(function, arguments)
            }
            _ => Ok(Value::Other(global)),
        }
    }

    /// `("storage", class, key, device, elements)`.
    fn storage(&mut self, id: Value) -> Outcome<Value> {
        let Value::List(id) = id else { return Err("an unknown kind of storage".into()) };
        let &[Value::Text(kind), Value::Global(class), Value::Text(key), _, Value::Int(elements), ..] =
            &self.lists[id][..]
        else {
            return Err("an unknown kind of storage".into());
        };
        if self.texts[kind] != "storage" {
            return Err(format!("an unknown kind of storage, '{}'", self.texts[kind]));
        }
        let elements = u64::try_from(elements).map_err(|_| format!("a storage of {elements} elements"))?;
        let storage = StorageRef { class: self.texts[class].clone(), key: self.name(key)?.to_owned(), elements };
        // Views of one storage describe it again.
        let next = self.storages.len();
        let place = *self.known.entry(storage.clone()).or_insert(next);
        if place == next {
            self.storages.push(storage);
        }
        Ok(Value::Storage(place))
    }

    fn extents(&self, list: Value) -> Outcome<Vec<usize>> {
        let Value::List(list) = list else { return Err("a tensor without a shape".into()) };
        let extent = |v: &Value| match *v {
            Value::Int(n) => usize::try_from(n).map_err(|_| format!("an extent or stride of {n}")),
            _ => Err("a shape that is no list of numbers".to_owned()),
        };
        let list = &self.lists[list];
        if list.len() > MAX_AXES {
            return Err(format!("a tensor of {} axes", list.len()));
        }
        list.iter().map(extent).collect()
    }

    /// The value of a dictionary's key.
    pub fn item(&self, dict: Value, name: &str) -> Option<Value> {
        let Value::Dict(dict) = dict else { return None };
        let found = self.dicts[dict].iter().find(|(k, _)| matches!(k, Value::Text(k) if self.texts[*k] == name));
        found.map(|&(_, value)| value)
    }

    /// The texts of a list of texts.
    pub fn texts(&self, list: Value) -> Option<Vec<String>> {
        let Value::List(list) = list else { return None };
        let text = |v: &Value| if let Value::Text(i) = v { Some(self.texts[*i].clone()) } else { None };
        self.lists[list].iter().map(text).collect()
    }

    /// Whether a value is the long number with these bytes.
    pub fn is_number(&self, value: Value, bytes: &[u8]) -> bool {
        matches!(value, Value::Other(what) if self.texts[what] == long_text(bytes))
    }

    pub fn into_storages(self) -> Vec<StorageRef> {
        self.storages
    }

    fn long(&mut self) -> Outcome<Value> {
        let [len] = self.array()?;
        let bytes = self.take(len.into())?;
        if bytes.len() > 8 {
            return Ok(self.other(long_text(&bytes)));
        }
        let mut all = [if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 }; 8];
        all[..bytes.len()].copy_from_slice(&bytes);
        Ok(Value::Int(i64::from_le_bytes(all)))
    }

    fn text(&mut self, prefix: u64) -> Outcome<Value> {
        let bytes = self.prefixed(prefix)?;
        let text = String::from_utf8(bytes).map_err(|_| "a text is not UTF-8")?;
        Ok(Value::Text(self.keep(text)))
    }

    fn bytes(&mut self, prefix: u64) -> Outcome<Value> {
        let bytes = self.prefixed(prefix)?;
        // Python 2 wrote texts this way.
        Ok(match String::from_utf8(bytes) {
            Ok(text) => Value::Text(self.keep(text)),
            Err(_) => self.other("a string of bytes".into()),
        })
    }

    fn prefixed(&mut self, prefix: u64) -> Outcome<Vec<u8>> {
        let mut len = [0; 8];
        let bytes = self.take(prefix)?;
        len[..bytes.len()].copy_from_slice(&bytes);
        self.take(u64::from_le_bytes(len))
    }

    fn line(&mut self) -> Outcome<String> {
        let mut line = Vec::new();
        loop {
            match self.array()? {
                [b'\n'] => return String::from_utf8(line).map_err(|_| "a name is not UTF-8".into()),
                [byte] => line.push(byte),
            }
        }
    }

    fn global(&mut self, name: String) -> Outcome<Value> {
        match name.len() <= 2 * MAX_NAME {
            true => Ok(Value::Global(self.keep(name))),
            false => Err(format!("a name of {} bytes", name.len())),
        }
    }

    /// A description as it is, the name of a class in quotes.
    pub(super) fn quoted(&self, what: usize) -> String {
        let text = &self.texts[what];
        if text.contains(' ') { text.clone() } else { format!("'{text}'") }
    }

    /// A text that is used as a name.
    pub(super) fn name(&self, text: usize) -> Outcome<&str> {
        let name = &self.texts[text];
        if name.len() <= MAX_NAME { Ok(name) } else { Err(format!("a name of {} bytes", name.len())) }
    }

    fn keep(&mut self, text: String) -> usize {
        self.texts.push(text);
        self.texts.len() - 1
    }

    fn other(&mut self, what: String) -> Value {
        Value::Other(self.keep(what))
    }

    fn list(&mut self, items: Vec<Value>) -> Value {
        self.lists.push(items);
        Value::List(self.lists.len() - 1)
    }

    fn dict(&mut self, items: Vec<(Value, Value)>) -> Value {
        self.dicts.push(items);
        Value::Dict(self.dicts.len() - 1)
    }

    fn extend(&mut self, items: Vec<Value>) -> Outcome<()> {
        match self.last()? {
            Value::List(list) => self.lists[list].extend(items),
            // A set.
            Value::Dict(_) | Value::Other(_) => {}
            other => return Err(format!("items for {other:?}, which is no list")),
        }
        Ok(())
    }

    fn set(&mut self, items: Vec<(Value, Value)>) -> Outcome<()> {
        match self.last()? {
            Value::Dict(dict) => self.dicts[dict].extend(items),
            Value::Other(_) => {}
            other => return Err(format!("items for {other:?}, which is no dictionary")),
        }
        Ok(())
    }

    fn last(&self) -> Outcome<Value> {
        self.stack.last().copied().ok_or_else(|| "the stack is empty".into())
    }

    fn pop(&mut self) -> Outcome<Value> {
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn pop_to_mark(&mut self) -> Outcome<Vec<Value>> {
        let mark = self.stack.iter().rposition(|v| *v == Value::Mark).ok_or("a mark is missing")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn array<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn take(&mut self, len: u64) -> Outcome<Vec<u8>> {
        if len > self.len - self.at {
            return Err(format!("{len} bytes are claimed where {} are left", self.len - self.at));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Outcome<()> {
        if bytes.len() as u64 > self.len - self.at {
            return Err("its pickle is cut short, or longer than 32 MiB".into());
        }
        self.reader.read_exact(bytes).map_err(|e| e.to_string())?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

fn pairs(items: &[Value]) -> Outcome<Vec<(Value, Value)>> {
    match items.as_chunks::<2>() {
        (pairs, []) => Ok(pairs.iter().map(|&[k, v]| (k, v)).collect()),
        _ => Err("a key without a value".into()),
    }
}

fn long_text(bytes: &[u8]) -> String {
    format!("the number with the bytes {bytes:x?}")
}
