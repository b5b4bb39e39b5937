//! JSON in a template: lists and mappings that print as Python's do.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, Value};
use serde_json::Value as Json;

use super::python::Repr;

/// A value for the template, mappings in the order of the text they were read from.
pub(super) fn value_of(json: &Json) -> Value {
    match json {
        Json::Array(items) => Value::from_object(List(items.iter().map(value_of).collect())),
        Json::Object(fields) => {
            let keys = fields.keys().map(|key| Value::from(key.as_str())).collect();
            let fields = fields.iter().map(|(key, field)| (key.clone(), value_of(field))).collect();
            Value::from_object(Dict { keys, fields })
        }
        scalar => Value::from_serialize(scalar),
    }
}

#[derive(Debug)]
struct List(Vec<Value>);

impl Object for List {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.0.len())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Repr(&Value::from_dyn_object(self.clone())), f)
    }
}

#[derive(Debug)]
struct Dict {
    keys: Vec<Value>,
    fields: HashMap<String, Value>,
}

impl Object for Dict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.fields.get(key).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.keys.clone())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Repr(&Value::from_dyn_object(self.clone())), f)
    }
}
