//! The filters `int`, `float` and `round`.

use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error};

use super::python::{arguments, blank, failed};

pub(super) fn add_to(environment: &mut Environment) {
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("round", round);
}

/// The default where it is no number.
fn int(value: &Value, options: Rest<Value>) -> Result<Value, Error> {
    let [default, base] = arguments(&options, ["default", "base"])?;
    let default = if default.is_undefined() { Value::from(0) } else { default };
    let base = if base.is_undefined() { 10 } else { u32::try_from(base)? };
    if !(2..=36).contains(&base) {
        return Err(failed(format!("int: expected a base of 2 to 36, got {base}")));
    }
    let whole = |number: f64| number.is_finite().then(|| Value::from(number.trunc() as i128));
    let parsed = match (value.kind(), value.as_str()) {
        (_, Some(text)) => integer(text, base).map(Value::from).or_else(|| whole(number(text)?)),
        (ValueKind::Number, _) if value.is_integer() => Some(value.clone()),
        (ValueKind::Bool, _) => Some(Value::from(i64::from(value.is_true()))),
        (ValueKind::Number, _) => f64::try_from(value.clone()).ok().and_then(whole),
        _ => None,
    };
    // As small as it can be, so that it prints and compares like any other.
    Ok(parsed.map_or(default, |it| i64::try_from(it.clone()).map_or(it, Value::from)))
}

fn integer(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(blank).replace('_', "");
    let prefix = match base {
        2 => "0b",
        8 => "0o",
        16 => "0x",
        _ => "",
    };
    i128::from_str_radix(text.to_lowercase().trim_start_matches(prefix), base).ok()
}

fn number(text: &str) -> Option<f64> {
    text.trim_matches(blank).parse().ok()
}

fn float(value: &Value, options: Rest<Value>) -> Result<Value, Error> {
    let [default] = arguments(&options, ["default"])?;
    let default = if default.is_undefined() { Value::from(0.0) } else { default };
    let parsed = match (value.kind(), value.as_str()) {
        (_, Some(text)) => number(text),
        (ValueKind::Bool, _) => Some(f64::from(u8::from(value.is_true()))),
        (ValueKind::Number, _) => f64::try_from(value.clone()).ok(),
        _ => None,
    };
    Ok(parsed.map_or(default, Value::from))
}

/// Halves go to the even neighbour; an integer stays one.
fn round(value: &Value, options: Rest<Value>) -> Result<Value, Error> {
    let [precision, method] = arguments(&options, ["precision", "method"])?;
    let precision = if precision.is_undefined() { 0 } else { i32::try_from(precision)?.clamp(-300, 300) };
    let number = f64::try_from(value.clone())?;
    let scale = 10f64.powi(precision);
    let rounded = match method.as_str() {
        None | Some("common") if precision >= 0 => {
            format!("{number:.*}", precision as usize).parse().unwrap_or(number)
        }
        None | Some("common") => (number * scale).round_ties_even() / scale,
        Some("ceil") => return Ok(Value::from((number * scale).ceil() / scale)),
        Some("floor") => return Ok(Value::from((number * scale).floor() / scale)),
        Some(other) => return Err(failed(format!("round: expected common, ceil or floor, got {other}"))),
    };
    Ok(if value.is_integer() { Value::from(rounded as i64) } else { Value::from(rounded) })
}
