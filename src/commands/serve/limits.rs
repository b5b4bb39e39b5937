//! What requests may ask for and what the engine may take, from the flags.

use std::time::Duration;

use anyhow::{Result, ensure};
use gptq_runtime::config::ModelConfig;
use gptq_runtime::engine::{CacheSize, EngineLimits, PrefillLimits};
use gptq_server::ServerLimits;

use crate::args::ServeArgs;
use crate::commands::common::DeviceKind;

pub struct Limits {
    pub server: ServerLimits,
    pub engine: RequestedLimits,
}

/// Limits of an engine, as far as they are known before the device is.
pub struct RequestedLimits {
    max_total_tokens: usize,
    max_batch_prefill_tokens: Option<usize>,
    prefill_chunk_tokens: Option<usize>,
    cache: CacheSize,
    max_running: usize,
    prefix_cache: bool,
}

/// The flags, and what is good for the device where they leave it open.
pub fn prefill_limits(kind: DeviceKind, most: Option<usize>, chunk: Option<usize>) -> PrefillLimits {
    let usual = match kind {
        DeviceKind::Cpu => PrefillLimits::CPU,
        DeviceKind::Gpu => PrefillLimits::GPU,
    };
    let alone = most.unwrap_or(usual.alone);
    PrefillLimits { alone, beside: chunk.unwrap_or(usual.beside).min(alone) }
}

impl RequestedLimits {
    pub fn limits(&self, kind: DeviceKind) -> EngineLimits {
        EngineLimits {
            max_total_tokens: self.max_total_tokens,
            prefill: prefill_limits(kind, self.max_batch_prefill_tokens, self.prefill_chunk_tokens),
            cache: self.cache,
            max_running: self.max_running,
            prefix_cache: self.prefix_cache,
        }
    }
}

impl Limits {
    pub fn new(args: &ServeArgs, config: &ModelConfig) -> Result<Self> {
        let context = config.context_length();
        let by_length = config.rope_scaling.longest_unscaled(config.max_position_embeddings).is_some();
        let total = args.max_total_tokens.unwrap_or(context.min(4096));
        ensure!((2..=context).contains(&total), "--max-total-tokens: expected 2 to {context}, got {total}");
        let input = args.max_input_tokens.or(args.max_input_length).unwrap_or(total - 1);
        ensure!((1..total).contains(&input), "--max-input-tokens: expected 1 to {}, got {input}", total - 1);
        for (flag, number) in [
            ("--max-concurrent-requests", Some(args.max_concurrent_requests)),
            ("--max-client-batch-size", Some(args.max_client_batch_size)),
            ("--max-batch-prefill-tokens", args.max_batch_prefill_tokens),
            ("--prefill-chunk-tokens", args.prefill_chunk_tokens),
        ] {
            ensure!(number != Some(0), "{flag}: expected 1 or more, got 0");
        }
        Ok(Self {
            server: ServerLimits {
                max_concurrent_requests: args.max_concurrent_requests.min(1 << 20),
                max_best_of: args.max_best_of,
                max_stop_sequences: args.max_stop_sequences,
                max_client_batch_size: args.max_client_batch_size,
                max_top_n_tokens: args.max_top_n_tokens,
                max_input_tokens: input,
                max_total_tokens: total,
                payload_limit: args.payload_limit,
                read_timeout: Duration::from_secs(args.read_timeout),
            },
            engine: RequestedLimits {
                max_total_tokens: total,
                max_batch_prefill_tokens: args.max_batch_prefill_tokens,
                prefill_chunk_tokens: args.prefill_chunk_tokens,
                cache: cache(args, total)?,
                max_running: args.max_concurrent_requests,
                // Where frequencies depend on a sequence's length, another one's keys do not fit.
                prefix_cache: !args.no_prefix_cache && !by_length,
            },
        })
    }
}

fn cache(args: &ServeArgs, total: usize) -> Result<CacheSize> {
    let (share, least) = (args.cuda_memory_fraction, total.next_multiple_of(16));
    ensure!(
        share > 0.0 && share <= 1.0,
        "--cuda-memory-fraction: expected above 0 and at most 1, got {share}"
    );
    match args.max_batch_total_tokens {
        None => Ok(CacheSize::Share(share)),
        Some(tokens) => {
            ensure!(tokens >= least, "--max-batch-total-tokens: expected at least {least}, got {tokens}");
            Ok(CacheSize::Tokens(tokens))
        }
    }
}
