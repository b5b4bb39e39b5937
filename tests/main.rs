//! The one integration binary: the crates together, and the program as a user runs it.

mod golden_gptq;
mod golden_logits;
mod support;
