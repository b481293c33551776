//! The state dict among what a pickle holds.

use super::machine::{MAX_DEPTH, Machine, Outcome, TensorRef, Value};

/// Tensors by name, and the names of what stands beside their dictionary.
pub type StateDict = (Vec<(String, TensorRef)>, Vec<String>);

impl Machine<'_> {
    /// The tensors of a state dict, or of the one below `state_dict`, `model_state_dict`, `model` or `module`; and the names
    /// of what stands beside that one.
    pub fn state_dict(&self, value: Value) -> Outcome<StateDict> {
        self.state_dict_below(value, MAX_DEPTH)
    }

    fn state_dict_below(&self, value: Value, depth: usize) -> Outcome<StateDict> {
        let Value::Dict(dict) = value else { return Err("it holds no dictionary of tensors".into()) };
        let is_tensor = |v: &Value| matches!(v, Value::Tensor(_));
        let entries = &self.dicts[dict];
        if !entries.iter().any(|(_, v)| is_tensor(v)) {
            // A dictionary may hold itself.
            let inner = |name: &&str| match self.item(value, name) {
                Some(Value::Dict(inner)) if depth > 0 => {
                    let tensors =
                        self.dicts[inner].iter().any(|(_, v)| matches!(v, Value::Tensor(_) | Value::Other(_)));
                    tensors.then_some((name.to_string(), inner))
                }
                _ => None,
            };
            let found: Vec<_> =
                ["state_dict", "model_state_dict", "model", "module"].iter().filter_map(inner).collect();
            match &found[..] {
                [] => {}
                [(name, inner)] => {
                    let (tensors, mut beside) = self.state_dict_below(Value::Dict(*inner), depth - 1)?;
                    let others = entries.iter().filter_map(|(key, _)| match key {
                        Value::Text(key) => self.texts.get(*key).filter(|key| *key != name).cloned(),
                        _ => None,
                    });
                    beside.extend(others);
                    return Ok((tensors, beside));
                }
                [(a, _), (b, _), ..] => {
                    return Err(format!("it holds two dictionaries of tensors, '{a}' and '{b}'"));
                }
            }
            let other =
                entries.iter().find_map(|e| if let (_, Value::Other(i)) = e { Some(self.quoted(*i)) } else { None });
            let found = other.map_or(String::new(), |what| format!(", but {what}"));
            return Err(format!("it holds no dictionary of tensors{found}"));
        }
        let entry = |&(key, value): &(Value, Value)| {
            let Value::Text(key) = key else { return Err("a key of its dictionary is no text".to_owned()) };
            let key = self.name(key)?;
            match value {
                Value::Tensor(t) => Ok((key.to_owned(), self.tensors[t].clone())),
                Value::Other(what) => Err(format!("'{key}' is {}, expected a tensor", self.quoted(what))),
                _ => Err(format!("'{key}' is no tensor")),
            }
        };
        Ok((entries.iter().map(entry).collect::<Outcome<_>>()?, Vec::new()))
    }
}
