//! Quantizes a model folder with the library and measures what it cost:
//! `cargo run --release --example quantize -- MODEL OUT TEXT.txt`

use std::ops::ControlFlow;
use std::path::Path;

use gptq_calibration::dataset::{self, DatasetRoots, DatasetSpec, Join};
use gptq_calibration::sampling::{SampleRequest, Sampling};
use gptq_kernels::Cpu;
use gptq_quantizer::gptq::{GptqParams, Method};
use gptq_quantizer::measure::Measuring;
use gptq_quantizer::produce::{Job, Source, produce};
use gptq_quantizer::recipe::Preset;
use gptq_quantizer::sequential::ActivationCache;
use gptq_runtime::model::ModelFiles;
use gptq_runtime::quant_config::QuantConfig;
use gptq_text::tokenizer::Tokenizer;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, text] = &args[..] else { anyhow::bail!("usage: quantize MODEL OUT TEXT") };
    let (dir, out) = (Path::new(model), Path::new(out));

    // Text to token sequences.
    let spec: DatasetSpec = text.parse()?;
    let (text, tokenizer) = (dataset::load(&spec, &DatasetRoots::from_env())?, Tokenizer::load(dir)?);
    let request = SampleRequest { samples: 8, seq_len: 256, sampling: Sampling::Random, seed: 0 };
    let sequences = text.sample(&tokenizer, Join::Lines, &request)?.ids;

    // Checkpoint to artifact.
    let device = Cpu::new();
    let files = ModelFiles::open(dir)?;
    let quant = QuantConfig { bits: 4, group_size: Some(64), damp_percent: 0.1, ..QuantConfig::default() };
    let params = GptqParams::new(quant, Method::Gptq, Preset::default().recipe());
    let source = Source::check(model, dir, &files)?;
    let job = Job::new(&source, &params, &sequences, out);
    let activations = ActivationCache::embed(&device, &files, &sequences, params.layout())?;
    let mut log = produce(&device, &job, activations, &mut |_| {})?;
    println!("total loss {:.4} in {:.1} s", log.total_loss(), log.seconds);

    // What it cost, on the same text (use another one for honest figures). The figures go into the artifact's log and onto
    // its card.
    let windows = text.windows(&tokenizer, Join::Paper, 256, Some(8))?;
    let measuring = Measuring::new(&device, &files, &text.name, windows.join.name(), windows.ids);
    measuring.complete(out, &ModelFiles::open(out)?, &mut log, &mut |_| ControlFlow::Continue(()))?;
    println!("{:#?}", log.evaluation);
    Ok(())
}
