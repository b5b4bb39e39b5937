//! One file a verb. Each turns typed arguments into a call of the libraries and prints what came back.

pub mod bench;
pub mod branches;
pub mod card;
pub mod chat;
mod common;
pub mod completions;
pub mod demo;
pub mod download;
pub mod eval;
mod fetch;
pub mod generate;
pub mod inspect;
pub mod man;
mod measurement;
pub mod push;
pub mod quantize;
pub mod report;
mod sampling;
pub mod serve;
pub mod synth;
pub mod table;
