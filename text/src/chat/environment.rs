//! The engine, set up as `transformers` sets up its own.

use std::fmt::Write;

use chrono::Local;
use minijinja::value::Value;
use minijinja::{Environment, Error};

use super::limits::charge;
use super::python::{failed, str_of};
use super::{filters, methods, operations};

/// Blanks as `trim_blocks` and `lstrip_blocks` leave them, values printed as Python prints them, nothing escaped.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, _, value| {
        let text = str_of(value);
        charge(text.len())?;
        out.write_str(&text).map_err(Error::from)
    });
    // It would print all that there is.
    environment.remove_global("debug");
    operations::add_to(&mut environment);
    filters::add_to(&mut environment);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(failed(str_of(message)))
}

/// The local time, formatted as C's strftime does.
fn strftime_now(format: &str) -> Result<String, Error> {
    const LONGEST: usize = 256;
    if format.len() > LONGEST {
        return Err(failed(format!("strftime_now: expected a format of at most {LONGEST} bytes")));
    }
    let mut text = String::new();
    match write!(text, "{}", Local::now().format(format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(failed(format!("`{format}` is no strftime format"))),
    }
}
