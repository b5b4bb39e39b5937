//! What all readers of files from anywhere share: a file is opened only where it is a plain one, read only up to the size
//! that its kind can have, and what it says is shortened before it becomes part of a message. Libraries that parse such files
//! run under a [`guard`].

#![forbid(unsafe_code)]

mod file;
pub mod guard;
mod json;
mod short;

pub use file::{open, read};
pub use json::{Distinct, parse};
pub use short::{short, short_line, short_path, short_to};
