//! What a template's operators are written as, and the engine's own filters, tests and functions, all of which pay for
//! what they do.

use std::sync::LazyLock;

use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, State, filters, functions};

use super::limits::{charge, measure};
use super::python::{failed, str_of, width};

/// Filters of the engine that call no others.
const PLAIN: [&str; 17] = [
    "upper",
    "lower",
    "capitalize",
    "escape",
    "e",
    "split",
    "lines",
    "reverse",
    "min",
    "max",
    "sort",
    "unique",
    "groupby",
    "dictsort",
    "sum",
    "chain",
    "zip",
];

/// Its tests that compare.
const COMPARING: [&str; 19] = [
    "eq",
    "equalto",
    "==",
    "ne",
    "!=",
    "lt",
    "lessthan",
    "<",
    "le",
    "<=",
    "gt",
    "greaterthan",
    ">",
    "ge",
    ">=",
    "in",
    "sameas",
    "startingwith",
    "endingwith",
];

static ENGINE: LazyLock<Environment> = LazyLock::new(Environment::new);

pub(super) fn add_to(environment: &mut Environment) {
    environment.add_function("summed", |values: Rest<Value>| fold(&values, add));
    environment.add_function("multiplied", |values: Rest<Value>| fold(&values, multiply));
    environment.add_function("joined", joined);
    environment.add_filter("measured", |value: Value| measure(&value).map(|()| value));
    environment.add_function("range", |lower: isize, upper: Option<isize>, step: Option<isize>| {
        let range = functions::range(lower, upper, step)?;
        measure(&range).map(|()| range)
    });
    for name in PLAIN {
        environment.add_filter(name, move |args: Rest<Value>| {
            args.iter().try_for_each(measure)?;
            ENGINE.empty_state().apply_filter(name, &args)
        });
    }
    for name in COMPARING {
        environment.add_test(name, move |args: Rest<Value>| {
            args.iter().try_for_each(measure)?;
            ENGINE.empty_state().perform_test(name, &args)
        });
    }
    for name in ["batch", "slice"] {
        environment.add_filter(name, move |args: Rest<Value>| {
            args.iter().try_for_each(measure)?;
            // Groups of so many items, or so many groups, filled up.
            charge(width(args.get(1).unwrap_or(&Value::from(0)))?.saturating_mul(32))?;
            ENGINE.empty_state().apply_filter(name, &args)
        });
    }
    environment.add_filter("pprint", |value: &Value| str_of(value));
    environment.add_filter("format", |state: &State, format: &Value, args: Rest<Value>| {
        charge_format(format.as_str().unwrap_or_default(), &args)?;
        filters::format(state, format, args)
    });
    add_selecting(environment);
}

/// Filters that call others, or tests.
fn add_selecting(environment: &mut Environment) {
    use filters::{map, reject, rejectattr, select, selectattr};
    type Name = Option<String>;
    environment
        .add_filter("map", |state: &State, value: Value, args: Rest<Value>| map(state, listed(value)?, args));
    environment.add_filter("select", |state: &State, value: Value, test: Name, args: Rest<Value>| {
        select(state, listed(value)?, test.map(Into::into), args)
    });
    environment.add_filter("reject", |state: &State, value: Value, test: Name, args: Rest<Value>| {
        reject(state, listed(value)?, test.map(Into::into), args)
    });
    environment.add_filter(
        "selectattr",
        |state: &State, value: Value, name: String, test: Name, args: Rest<Value>| {
            selectattr(state, listed(value)?, name.into(), test.map(Into::into), args)
        },
    );
    environment.add_filter(
        "rejectattr",
        |state: &State, value: Value, name: String, test: Name, args: Rest<Value>| {
            rejectattr(state, listed(value)?, name.into(), test.map(Into::into), args)
        },
    );
}

/// A sequence whose items are paid for, one by one where it makes them while it is gone through.
fn listed(value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| charge(32).map(|()| item));
            items.collect::<Result<Vec<_>, _>>().map(Value::from)
        }
        _ => charge(value.len().unwrap_or(0).saturating_mul(32)).map(|()| value),
    }
}

fn fold(values: &[Value], operation: fn(&Value, &Value) -> Result<Value, Error>) -> Result<Value, Error> {
    match values {
        [first, rest @ ..] => rest.iter().try_fold(first.clone(), |left, right| operation(&left, right)),
        [] => Ok(Value::UNDEFINED),
    }
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// Both as floats, where one of them is.
fn floats(a: &Value, b: &Value) -> Option<(f64, f64)> {
    let number = |it: &Value| match it.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(it.is_true()))),
        ValueKind::Number => f64::try_from(it.clone()).ok(),
        _ => None,
    };
    let is_float = |it: &Value| it.kind() == ValueKind::Number && !it.is_integer();
    if is_float(a) || is_float(b) { number(a).zip(number(b)) } else { None }
}

fn integers(a: &Value, b: &Value) -> Option<(i128, i128)> {
    let integer = |it: &Value| match it.kind() {
        ValueKind::Bool => Some(i128::from(it.is_true())),
        ValueKind::Number if it.is_integer() => i128::try_from(it.clone()).ok(),
        _ => None,
    };
    integer(a).zip(integer(b))
}

fn number(value: i128) -> Value {
    i64::try_from(value).map_or_else(|_| Value::from(value), Value::from)
}

fn unsupported(operator: char, a: &Value, b: &Value) -> Error {
    let (a, b) = (a.kind(), b.kind());
    failed(format!("tried to use {operator} operator on unsupported types {a} and {b}"))
}

fn add(a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        charge(a.len() + b.len())?;
        return Ok(Value::from([a, b].concat()));
    }
    if is_list(a) && is_list(b) {
        let items = a.try_iter()?.chain(b.try_iter()?).map(|item| charge(32).map(|()| item));
        return items.collect::<Result<Vec<_>, _>>().map(Value::from);
    }
    if let Some((a, b)) = floats(a, b) {
        return Ok(Value::from(a + b));
    }
    let sum = integers(a, b).ok_or_else(|| unsupported('+', a, b))?;
    sum.0.checked_add(sum.1).map(number).ok_or_else(|| failed("a sum that is too large"))
}

fn multiply(a: &Value, b: &Value) -> Result<Value, Error> {
    let repeated = |it: &Value| it.as_str().is_some() || is_list(it);
    let (what, times) = if repeated(b) { (b, a) } else { (a, b) };
    if repeated(what) {
        let times = times.clone();
        let times = i64::try_from(times).map_err(|_| unsupported('*', a, b))?.max(0) as usize;
        if let Some(text) = what.as_str() {
            charge(text.len().saturating_mul(times))?;
            return Ok(Value::from(text.repeat(times)));
        }
        let items: Vec<Value> = listed(what.clone())?.try_iter()?.collect();
        charge(items.len().saturating_mul(32).saturating_mul(times))?;
        let all = std::iter::repeat_n(items, if what.len() == Some(0) { 0 } else { times });
        return Ok(all.flatten().collect());
    }
    if let Some((a, b)) = floats(a, b) {
        return Ok(Value::from(a * b));
    }
    let product = integers(a, b).ok_or_else(|| unsupported('*', a, b))?;
    product.0.checked_mul(product.1).map(number).ok_or_else(|| failed("a product that is too large"))
}

/// The texts of values, one after the other.
fn joined(values: Rest<Value>) -> Result<String, Error> {
    let mut out = String::new();
    for value in values.iter() {
        let text = str_of(value);
        charge(text.len())?;
        out += &text;
    }
    Ok(out)
}

/// Pays for the widths and precisions in a format, which are all the digits in it, and for its values.
pub(super) fn charge_format(format: &str, args: &[Value]) -> Result<(), Error> {
    const WIDEST: usize = 9999;
    charge(format.len())?;
    args.iter().try_for_each(measure)?;
    for digits in format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty()) {
        match digits.trim_start_matches('0').parse().unwrap_or(if digits.bytes().all(|it| it == b'0') {
            0
        } else {
            usize::MAX
        }) {
            width if width <= WIDEST => charge(width)?,
            _ => return Err(failed(format!("format: expected a width of at most {WIDEST}"))),
        }
    }
    Ok(())
}
