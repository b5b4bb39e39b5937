//! Of the benchmarks of one model: steps, prompts, products, loading.

use clap::Args;

use super::super::values::{DeviceArgs, KvCacheArgs};
use super::at_least_one;

/// Decoding: tokens per second by batch size, beside memory bandwidth
///
/// Every step takes the likeliest token of each sequence; keys and values of the starting context are zeros.
#[derive(Args)]
pub struct DecodeBenchArgs {
    /// Model folder or hub id
    pub model: String,

    /// Number of tokens to generate in each sequence
    #[arg(long, default_value_t = 128)]
    pub tokens: usize,

    /// Context length at the first step
    #[arg(long, default_value_t = 0)]
    pub context: usize,

    /// Batch sizes, measured one after the other
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = at_least_one)]
    pub batch: Vec<usize>,

    /// 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,

    /// Smallest set of tokens with this much probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,

    /// Keep this many tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,

    #[command(flatten)]
    pub kv_cache: KvCacheArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// Prefill: prompt tokens per second, beside the GEMM speed of the device
#[derive(Args)]
pub struct PrefillBenchArgs {
    /// Model folder or hub id
    pub model: String,

    /// Prompt lengths; each prompt is one forward pass
    #[arg(long, value_delimiter = ',', default_value = "512,2048", value_parser = at_least_one)]
    pub tokens: Vec<usize>,

    #[command(flatten)]
    pub kv_cache: KvCacheArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// Single matrix products of a decoding step, beside memory bandwidth and GEMM speed
///
/// Each is the mean over all layers, whose weights are read in turn, so that none is in a cache.
#[derive(Args)]
pub struct MatmulBenchArgs {
    /// Model folder or hub id
    pub model: String,

    /// Rows of activations (M of the GEMM)
    #[arg(long, value_delimiter = ',', default_value = "1,8,64", value_parser = at_least_one)]
    pub tokens: Vec<usize>,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// Loading: seconds from files to the first token
#[derive(Args)]
pub struct LoadBenchArgs {
    /// Model folder or hub id
    pub model: String,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}
