//! `gptq synth`

use anyhow::Result;
use gptq_kernels::Dtype;
use gptq_runtime::config::ModelConfig;
use gptq_runtime::synth;

use super::table;
use crate::args::{DtypeArg, SynthArgs};
use crate::progress::Progress;

pub fn run(args: &SynthArgs) -> Result<()> {
    let config = table::config(&args.arch)?;
    let dtype = match args.dtype {
        Some(DtypeArg::F16) => Dtype::F16,
        Some(DtypeArg::Bf16) => Dtype::BF16,
        None => config.dtype,
    };
    let config = ModelConfig { dtype, ..config };
    let progress = std::sync::Mutex::new((None, 0));
    synth::write_checkpoint(&config, &args.out, args.seed, args.max_shard_size, &|done, total| {
        if let Ok(mut progress) = progress.lock() {
            let (bar, shown) = &mut *progress;
            let megabytes = done / 1_000_000;
            bar.get_or_insert_with(|| Progress::start("writing MB", total / 1_000_000))
                .advance(megabytes.saturating_sub(*shown));
            *shown = megabytes.max(*shown);
        }
    })?;
    note!("written to {}", args.out.display());
    Ok(())
}
