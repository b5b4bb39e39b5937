//! Python's methods on mappings and lists, as far as they change nothing.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::limits::{charge, measure};
use super::python::{arguments, failed, pairs, str_of};
use super::text_methods::Text;

/// A method call on a value that is no function's own.
pub(super) fn call(_: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::String | ValueKind::Seq | ValueKind::Iterable, _) if method == "sliced" => {
            sliced(value, args)
        }
        (_, Some(text)) => Text(text).call(method, args),
        (ValueKind::Map, _) => of_map(value, method, args),
        (ValueKind::Seq | ValueKind::Iterable, _) => of_list(value, method, args),
        _ => unknown(),
    }
}

fn unknown() -> Result<Value, Error> {
    Err(Error::from(ErrorKind::UnknownMethod))
}

/// `value[start:stop:step]`, whose parts may be none.
fn sliced(value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [start, stop, step] = arguments(args, ["start", "stop", "step"])?;
    let bound = |it: Value| if it.is_none() { Ok(None) } else { i64::try_from(it).map(Some) };
    let (start, stop, step) = (bound(start)?, bound(stop)?, bound(step)?.unwrap_or(1));
    if step == 0 {
        return Err(failed("slice step cannot be zero"));
    }
    if let Some(text) = value.as_str() {
        charge(text.len().saturating_mul(8))?;
        let chars: Vec<char> = text.chars().collect();
        return Ok(places(chars.len(), start, stop, step).map(|at| chars[at]).collect::<String>().into());
    }
    let items = value.try_iter()?.map(|item| charge(32).map(|()| item)).collect::<Result<Vec<_>, _>>()?;
    Ok(places(items.len(), start, stop, step).map(|at| items[at].clone()).collect())
}

/// The places of a slice of so many items, as Python counts them.
fn places(length: usize, start: Option<i64>, stop: Option<i64>, step: i64) -> impl Iterator<Item = usize> {
    let length = length as i64;
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let place = |at: i64| if at < 0 { at.saturating_add(length) } else { at }.clamp(low, high);
    let (from, to) = if step > 0 { (low, high) } else { (high, low) };
    let (from, to) = (start.map_or(from, place), stop.map_or(to, place));
    let next = move |at: &i64| at.checked_add(step);
    let is_in = move |at: &i64| if step > 0 { *at < to } else { *at > to };
    std::iter::successors(Some(from), next).take_while(is_in).map(|at| at as usize)
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
            charge(map.len().unwrap_or(0).saturating_mul(64))?;
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
    if matches!(method, "count" | "index") {
        measure(list)?;
    }
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
