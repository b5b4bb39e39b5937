//! `gptq serve`, with the flags and environment names of text-generation-inference's launcher.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{DeviceArgs, KvDtypeArg};

/// Serve a model over HTTP: text-generation-inference's API and OpenAI's
#[derive(Args)]
#[command(after_help = "Examples:
  gptq serve --model-id ./gptq-demo/main --port 3000
  gptq serve --model-id user/model-GPTQ:gptq-4bit-32g-actorder_True --hostname 0.0.0.0 --api-key KEY")]
pub struct ServeArgs {
    /// Model folder, hub id, or hub-id:branch
    #[arg(long, env = "MODEL_ID")]
    pub model_id: String,

    /// Branch of the hub id
    #[arg(long, env = "REVISION")]
    pub revision: Option<String>,

    /// Model name in the API [default: the hub id, or the last part of the folder's path]
    #[arg(long, env = "SERVED_MODEL_NAME", value_name = "NAME")]
    pub served_model_name: Option<String>,

    /// Address to listen on; 0.0.0.0 accepts connections from other machines. Not read from HOSTNAME, which shells set
    #[arg(long, default_value = "127.0.0.1")]
    pub hostname: String,

    /// Port to listen on; 0 takes a free one
    #[arg(short, long, env = "PORT", default_value_t = 3000)]
    pub port: u16,

    /// Quantization that the model must have
    #[arg(long, env = "QUANTIZE", value_enum)]
    pub quantize: Option<QuantizeKind>,

    /// System message for conversations that have none
    #[arg(long, env = "DEFAULT_SYSTEM", value_name = "TEXT")]
    pub default_system: Option<String>,

    /// Maximum number of prompt tokens
    #[arg(long, env = "MAX_INPUT_TOKENS")]
    pub max_input_tokens: Option<usize>,

    /// Deprecated name of --max-input-tokens
    #[arg(long, env = "MAX_INPUT_LENGTH", conflicts_with = "max_input_tokens")]
    pub max_input_length: Option<usize>,

    /// Maximum number of tokens of a prompt with its answer (default: the model's context length, at most 4096)
    #[arg(long, env = "MAX_TOTAL_TOKENS")]
    pub max_total_tokens: Option<usize>,

    /// Maximum number of prompt tokens in one forward pass [default: 4096 on a GPU, 512 on a CPU]
    #[arg(long, env = "MAX_BATCH_PREFILL_TOKENS")]
    pub max_batch_prefill_tokens: Option<usize>,

    /// Chunked prefill: maximum number of tokens in a step that both decodes and computes long prompts; larger steps make
    /// tokens of running requests later, prompts of up to 512 tokens are not split [default: 1024 on a GPU, 128 on a CPU]
    #[arg(long, env = "PREFILL_CHUNK_TOKENS")]
    pub prefill_chunk_tokens: Option<usize>,

    /// Capacity of the KV cache in tokens [default: as --cuda-memory-fraction allows; four times --max-total-tokens on
    /// a CPU]
    #[arg(long, env = "MAX_BATCH_TOTAL_TOKENS")]
    pub max_batch_total_tokens: Option<usize>,

    /// Fraction of the GPU's free memory for weights, activations and KV cache
    #[arg(
        long,
        env = "CUDA_MEMORY_FRACTION",
        default_value_t = 0.9,
        conflicts_with = "max_batch_total_tokens"
    )]
    pub cuda_memory_fraction: f64,

    /// Type of keys and values in the KV cache
    #[arg(long, env = "KV_CACHE_DTYPE", value_enum, default_value_t = KvDtypeArg::Auto)]
    pub kv_cache_dtype: KvDtypeArg,

    /// Disable prefix caching
    #[arg(long, env = "NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,

    /// Maximum number of concurrent requests; more are refused with 429
    #[arg(long, env = "MAX_CONCURRENT_REQUESTS", default_value_t = 128)]
    pub max_concurrent_requests: usize,

    /// Maximum number of prompts in one request to /v1/completions
    #[arg(long, env = "MAX_CLIENT_BATCH_SIZE", default_value_t = 4)]
    pub max_client_batch_size: usize,

    /// Maximum of best_of and n
    #[arg(long, env = "MAX_BEST_OF", default_value_t = 2)]
    pub max_best_of: usize,

    #[arg(long, env = "MAX_STOP_SEQUENCES", default_value_t = 4)]
    pub max_stop_sequences: usize,

    /// Maximum number of top tokens reported for each token, at most 64
    #[arg(long, env = "MAX_TOP_N_TOKENS", default_value_t = 5,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=64))]
    pub max_top_n_tokens: usize,

    /// API key; clients must send `Authorization: Bearer KEY`
    #[arg(long, env = "API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,

    /// File whose first line is the API key
    #[arg(long, env = "API_KEY_FILE", conflicts_with = "api_key")]
    pub api_key_file: Option<PathBuf>,

    /// Routes that need no API key, separated by commas: health, page (the chat page), docs, info, models, metrics; or none
    #[arg(long, env = "OPEN_ROUTES", value_enum, value_delimiter = ',', value_name = "ROUTES",
        default_values_t = [OpenRouteArg::Health, OpenRouteArg::Page, OpenRouteArg::Docs])]
    pub open_routes: Vec<OpenRouteArg>,

    /// Allowed CORS origin, as SCHEME://HOST; may be given several times. * allows all origins
    #[arg(long, env = "CORS_ALLOW_ORIGIN", value_delimiter = ',', value_name = "ORIGIN")]
    pub cors_allow_origin: Vec<String>,

    /// Allowed Host header beside the names of this machine, as gptq.example or gptq.example:3000; may be given several
    /// times. * allows any [default: none on 127.0.0.1 and ::1, against DNS rebinding; any elsewhere]
    #[arg(long, env = "ALLOWED_HOSTS", value_delimiter = ',', value_name = "HOST")]
    pub allowed_hosts: Vec<String>,

    /// Maximum size of a request body in bytes
    #[arg(long, env = "PAYLOAD_LIMIT", default_value_t = 2_000_000)]
    pub payload_limit: usize,

    /// Timeout in seconds for receiving a request's headers, and then its body, and for a client that does not read
    #[arg(long, env = "READ_TIMEOUT", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub read_timeout: u64,

    /// Log in JSON
    #[arg(long, env = "JSON_OUTPUT")]
    pub json_output: bool,

    #[command(flatten)]
    pub device: DeviceArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QuantizeKind {
    Gptq,
}

/// A route that may be open without the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OpenRouteArg {
    Health,
    Page,
    Docs,
    Info,
    Models,
    Metrics,
    None,
}
