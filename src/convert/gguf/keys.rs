//! Typed access to the metadata of a GGUF file.

use super::{
    reader::{Gguf, Value},
    settings::shown,
};
use crate::error::{Error, Result};

impl Gguf {
    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        let shown = shown(value);
        self.bad(format!("{key} is {shown}, expected {expected}"))
    }

    /// A text, if the key is there.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, other, "a text")),
        }
    }

    /// A whole number of at least 0, if the key is there.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Int(n)) if (0..1 << 40).contains(&n) => Ok(Some(n as usize)),
            // One value per layer, all the same.
            Some(Value::Ints(all)) if all.first().is_some_and(|&n| n >= 0 && all.iter().all(|&m| m == n)) => {
                Ok(Some(all[0] as usize))
            }
            Some(other) => Err(self.wrong(key, other, "one whole number")),
        }
    }

    /// A whole number of at least 1 that the file must have.
    pub fn size(&self, key: &str) -> Result<usize> {
        match self.count(key)? {
            Some(n) if n > 0 => Ok(n),
            Some(_) => Err(self.bad(format!("{key} is 0, expected a positive number"))),
            None => Err(self.bad(format!("the metadata key {key} is missing"))),
        }
    }

    /// A finite number, if the key is there.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Float(x)) if x.is_finite() => Ok(Some(x)),
            Some(&Value::Int(n)) => Ok(Some(n as f64)),
            Some(other) => Err(self.wrong(key, other, "a finite number")),
        }
    }

    /// A truth value, if the key is there.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    /// A list of texts, if the key is there.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(other) => Err(self.wrong(key, other, "a list of texts")),
        }
    }
}
