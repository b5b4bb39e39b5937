//! Of the load test.

use clap::Args;

use super::super::values::{DeviceArgs, KvDtypeArg};

/// Load test of a running server, or of MODEL with and without HTTP: throughput, latencies, complete streams
///
/// Each client streams one answer after another. Prompts are random words of the given number of tokens, so that nothing
/// is found in a cache, unless --shared-prefix is given. With MODEL the same requests go straight to an engine, token
/// ids in and out, and then to another engine over /generate_stream of its own server on 127.0.0.1; with
/// --shared-prefix once more to one without a prefix cache. Ends with an error where a stream that had begun did not
/// end as it should.
#[derive(Args)]
pub struct ServeBenchArgs {
    /// Model folder or hub id to measure HTTP against (default: load on the server at --url alone)
    pub model: Option<String>,

    /// Base URL of the server
    #[arg(long, default_value = "http://127.0.0.1:3000", conflicts_with = "model")]
    pub url: String,

    /// Sent as `Authorization: Bearer KEY`
    #[arg(long, env = "API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,

    /// Concurrent clients
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub clients: u32,

    /// Seconds during which new requests are sent
    #[arg(long, default_value_t = 10.0)]
    pub seconds: f64,

    /// Maximum number of requests
    #[arg(long)]
    pub requests: Option<usize>,

    /// Number of tokens to generate for each request
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,

    /// Prompt length in tokens
    #[arg(long, default_value_t = 64)]
    pub prompt_tokens: usize,

    /// Length of a prefix that all prompts share, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub shared_prefix: usize,

    /// Rounds with and without HTTP; medians are reported
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,

    /// Type of keys and values in MODEL's KV cache
    #[arg(long, value_enum, default_value_t = KvDtypeArg::Auto, requires = "model")]
    pub kv_cache_dtype: KvDtypeArg,

    /// Disable prefix caching in MODEL's engine
    #[arg(long, requires = "model")]
    pub no_prefix_cache: bool,

    /// 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,

    /// Fraction of streams that the client disconnects from, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    pub abandon: f64,

    /// Seed of prompts, sampling and disconnects
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}
