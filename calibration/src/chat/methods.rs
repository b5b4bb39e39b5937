//! Python's methods on mappings and lists, as far as they change nothing.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::python::{arguments, failed, pairs, str_of};
use super::text_methods::Text;

/// A method call on a value that is no function's own.
pub(super) fn call(_: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.kind(), value.as_str()) {
        (_, Some(text)) => Text(text).call(method, args),
        (ValueKind::Map, _) => of_map(value, method, args),
        (ValueKind::Seq | ValueKind::Iterable, _) => of_list(value, method, args),
        _ => unknown(),
    }
}

fn unknown() -> Result<Value, Error> {
    Err(Error::from(ErrorKind::UnknownMethod))
}

fn of_map(map: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match method {
        "get" => {
            let [key, default] = arguments(args, ["key", "default"])?;
            let or_none = if default.is_undefined() { Value::from(()) } else { default };
            Ok(map.as_object().and_then(|object| object.get_value(&key)).unwrap_or(or_none))
        }
        _ => {
            let [] = arguments(args, [])?;
            match method {
                "keys" => Ok(pairs(map).into_iter().map(|(key, _)| key).collect()),
                "values" => Ok(pairs(map).into_iter().map(|(_, value)| value).collect()),
                "items" => {
                    Ok(pairs(map).into_iter().map(|(key, value)| Value::from(vec![key, value])).collect())
                }
                "copy" => Ok(map.clone()),
                _ => unknown(),
            }
        }
    }
}

fn of_list(list: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match method {
        "count" => {
            let [item] = arguments(args, ["value"])?;
            Ok(Value::from(list.try_iter()?.filter(|it| *it == item).count()))
        }
        "index" => {
            let [item] = arguments(args, ["value"])?;
            let found = list.try_iter()?.position(|it| it == item);
            found.map(Value::from).ok_or_else(|| failed(format!("{} is not in list", str_of(&item))))
        }
        "copy" => {
            let [] = arguments(args, [])?;
            Ok(list.clone())
        }
        _ => unknown(),
    }
}
