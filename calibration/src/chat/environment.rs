//! The engine, set up as `transformers` sets up its own.

use std::fmt::Write;

use chrono::Local;
use minijinja::value::Value;
use minijinja::{Environment, Error};

use super::python::{failed, str_of};
use super::{filters, methods};

/// Blanks as `trim_blocks` and `lstrip_blocks` leave them, values printed as Python prints them, nothing escaped.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, _, value| out.write_str(&str_of(value)).map_err(Error::from));
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
    let mut text = String::new();
    match write!(text, "{}", Local::now().format(format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(failed(format!("`{format}` is no strftime format"))),
    }
}
