//! Typed access to the keys of a JSON object, with errors that name file, key, expected and got.

use std::path::Path;

use gptq_input::short;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Bytes of a config at most. Known ones have some KB; descriptions that list every module of a model of experts come to
/// some hundred. What is parsed takes up to thirty times as much memory.
const MOST_BYTES: u64 = 4 << 20;

/// Reads and parses a JSON file. A key that stands twice with two values is refused.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let bytes = gptq_input::read(path, MOST_BYTES).map_err(Error::io(path))?;
    gptq_input::parse(&bytes).map_err(|problem| Error::Json { path: path.into(), problem })
}

/// A JSON object and where it came from. `null` counts as absent unless a method says otherwise.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
    /// Keys above this object, as `rope_scaling.`; empty at the top.
    parent: &'a str,
}

impl<'a> Fields<'a> {
    pub fn new(value: &'a Value, path: &'a Path, parent: &'a str) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, path, parent }),
            other => Err(Error::Config {
                path: path.into(),
                key: if parent.is_empty() { "top level" } else { parent.trim_end_matches('.') }.into(),
                expected: "an object".into(),
                got: shown(Some(other)),
            }),
        }
    }

    /// An object that is already known to be one.
    pub fn of_map(map: &'a Map<String, Value>, path: &'a Path, parent: &'a str) -> Self {
        Self { map, path, parent }
    }

    /// Whether the key is there at all, `null` included.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// All keys, those with `null` included.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.map.keys().map(String::as_str)
    }

    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn object(&self, key: &str, parent: &'a str) -> Result<Option<Fields<'a>>> {
        self.value(key).map(|value| Fields::new(value, self.path, parent)).transpose()
    }

    pub fn integer(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a whole number, 0 or more", |value| value.as_u64()?.try_into().ok())
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub fn string(&self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a string", Value::as_str)
    }

    /// The value, or an error that says that the key is missing.
    pub fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.invalid(key, "a value"))
    }

    /// An error about what stands under `key`.
    pub fn invalid(&self, key: &str, expected: impl Into<String>) -> Error {
        Error::Config {
            path: self.path.into(),
            key: format!("{}{key}", self.parent),
            expected: expected.into(),
            got: shown(self.map.get(key)),
        }
    }

    pub fn path(&self) -> &'a Path {
        self.path
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.invalid(key, expected))
    }
}

/// A value on one line, long ones cut short.
pub(crate) fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".into(), |value| short(&value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_wrong_type_is_named_and_long_values_are_cut() {
        let value = json!({ "bits": "x".repeat(500), "deep": 1.5 });
        let fields = Fields::new(&value, Path::new("dir/config.json"), "rope.").unwrap();
        let message = fields.integer("bits").unwrap_err().to_string();
        assert!(
            message.starts_with("dir/config.json: rope.bits: expected a whole number, 0 or more, got \"xxx")
        );
        assert!(message.len() < 250, "{message}");
        assert!(fields.integer("deep").is_err(), "a fraction is no size");
        assert_eq!(fields.integer("absent").unwrap(), None);
    }

    #[test]
    fn an_array_is_no_config() {
        let message = Fields::new(&json!([1]), Path::new("c"), "").err().unwrap().to_string();
        assert_eq!(message, "c: top level: expected an object, got [1]");
    }
}
