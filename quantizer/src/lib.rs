//! GPTQ: order, the algorithm, the sequential walk, branch plans, artifacts, their table,
//! their cards and who loads them.
//!
//! [`produce::produce`] makes one artifact; [`gptq::solve`] is the algorithm by itself.

#![forbid(unsafe_code)]

pub mod artifact;
pub mod card;
pub mod engines;
mod error;
pub mod gptq;
pub mod inspect;
mod order;
pub mod plan;
pub mod produce;
pub mod record;
pub mod sequential;
pub mod table;

pub use error::{Error, Result};
