//! Config, checkpoint, model, generation and perplexity of Llama-family models

pub mod checkpoint;
pub mod config;
pub mod engine;
mod error;
pub mod generate;
pub mod generation_config;
pub mod layout;
pub mod model;
pub mod perplexity;
pub mod quant_config;
pub mod sampling;
pub mod soundness;
pub mod synth;

pub use error::{Error, Result};
