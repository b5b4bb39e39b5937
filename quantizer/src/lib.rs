//! GPTQ: order, the algorithm, the sequential walk, branch plans, artifacts, their table,
//! their cards and which engines load them.
//!
//! [`produce::produce`] makes one artifact; [`gptq::solve`] is the algorithm by itself.

#![forbid(unsafe_code)]

pub mod artifact;
pub mod card;
pub mod engines;
mod error;
pub mod gptq;
pub mod guard;
pub mod inspect;
pub mod layer_loss;
pub mod measure;
pub mod moments;
mod order;
pub mod plan;
pub mod produce;
pub mod publish;
pub mod recipe;
pub mod record;
pub mod report;
pub mod sequential;
pub mod spread;
pub mod table;

/// Version of the arithmetic, to be raised by every change after which equal inputs may end in other bytes or figures. No
/// run goes on with what another version began.
pub const NUMERICS: u32 = 4;

pub use error::{Error, Result};
