//! The one integration binary: the crates together, and the program as a user runs it.

mod artifacts;
mod chat;
mod cli;
mod families;
mod folders_as_found;
mod going_on;
mod golden_gptq;
mod golden_logits;
mod hostile_files;
mod hub;
mod interruption;
mod kv_cache;
mod manual;
mod model_folder;
mod on_gpu;
mod paper;
mod program;
mod quality;
mod recipe;
mod refusals;
mod serve;
mod streams;
mod support;
mod texts;
