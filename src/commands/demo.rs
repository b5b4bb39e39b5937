//! `gptq demo`: the whole story on the model that is built into the program.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use gptq_calibration::dataset::Dataset;
use gptq_kernels::Cpu;
use gptq_quantizer::artifact::OutMode;
use gptq_quantizer::plan::Plan;
use gptq_quantizer::recipe::Preset;
use gptq_quantizer::table;
use gptq_runtime::generate::{GenerateParams, Session};
use gptq_runtime::sampling::SamplingParams;
use gptq_text::tokenizer::Tokenizer;

use super::branches::Work;
use super::common::{self, Calibration, DeviceKind};
use super::eval::Protocol;
use super::generate::{Output, complete};
use super::measurement::Measurement;
use crate::args::{CalibrationArgs, DemoArgs, JoinArg, SamplingArg};

/// The built-in model: a Llama of 4 million parameters, trained on Wikipedia text.
const MODEL: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../assets/demo4m/config.json")),
    ("model.safetensors", include_bytes!("../../assets/demo4m/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../assets/demo4m/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../assets/demo4m/tokenizer_config.json")),
];

/// Text sampled from that model itself, so that it can be shipped with it.
const TRAIN: &[u8] = include_bytes!("../../assets/demo4m/text/train-00000-of-00001.parquet");
const TEST: &[u8] = include_bytes!("../../assets/demo4m/text/test-00000-of-00001.parquet");

/// Name of the folder, inside the output, that gets the model itself.
const MODEL_FOLDER: &str = "demo4m";

const DEFAULT_OUT: &str = "gptq-demo";
const PROMPT: &str = "The city";

/// Long enough for stable Hessians of a model of this size, short enough for a quarter of a minute on two cores.
pub const CALIBRATION: CalibrationArgs = CalibrationArgs {
    dataset: String::new(),
    text_field: None,
    join: JoinArg::Raw,
    samples: Some(12),
    seq_len: Some(512),
    seed: 0,
    sampling: SamplingArg::Random,
};

pub fn run(args: &DemoArgs) -> Result<()> {
    let started = Instant::now();
    let out = args.out.clone().unwrap_or(PathBuf::from(DEFAULT_OUT));
    prepare(&out, args.force)?;
    let model = out.join(MODEL_FOLDER);
    write_model(&model)?;
    note!("Six GPTQ branches of a built-in Llama (4.4 million parameters), in {}", out.display());
    let train = train_text();
    let calibration = Calibration::from_dataset(&CALIBRATION, &train, &model, DeviceKind::Cpu)?;
    let measurement = Measurement {
        dataset: test_text(),
        protocol: Protocol { join: JoinArg::Raw, ctx: 512, max_windows: Some(8) },
    };
    let device = Cpu::new();
    let work = Work {
        model: MODEL_FOLDER,
        dir: &model,
        out: &out,
        mode: OutMode::Force,
        max_shard_size: None,
        calibration: &calibration,
        measurement: Some(&measurement),
        device: device.clone(),
        stop: &AtomicBool::new(false),
    };
    let rows = work.make_all(&Plan::card(Preset::default()))?;
    say!("{}", table::to_terminal(&rows))?;
    if let Some(row) = rows.first() {
        let windows = measurement.protocol.max_windows.unwrap_or(0);
        let fp16 = row.baseline_perplexity.unwrap_or(f64::NAN);
        say!(
            "fp16 has perplexity {fp16:.3}; all on up to {windows} windows of 512 tokens the model never saw.\n"
        )?;
    }
    say!("main continues \"{PROMPT}\":\n  {}\n", sample_text(&device, &out.join("main"))?)?;
    print_next_steps(&out, started.elapsed().as_secs_f64())
}

/// The demo's folder may hold an earlier demo, but nothing else is ever replaced without being asked to.
fn prepare(out: &Path, force: bool) -> Result<()> {
    let empty = std::fs::read_dir(out).map_or(true, |mut entries| entries.next().is_none());
    let earlier = out.join(MODEL_FOLDER).join("config.json").exists();
    let ours = force && earlier;
    if !empty && !ours {
        bail!(
            "{}: expected a new or empty folder, or --force and an earlier demo, got other files",
            out.display()
        );
    }
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())
}

/// Lays the built-in model out as an ordinary model folder.
pub fn write_model(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    for (name, bytes) in MODEL {
        let path = dir.join(name);
        let temporary = dir.join(format!(".{name}.partial"));
        std::fs::write(&temporary, bytes).with_context(|| temporary.display().to_string())?;
        std::fs::rename(&temporary, &path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The built-in calibration text.
pub fn train_text() -> Dataset {
    Dataset::from_parquet_bytes("demo4m-text:train", TRAIN)
}

/// The built-in text that calibration does not see.
pub fn test_text() -> Dataset {
    Dataset::from_parquet_bytes("demo4m-text:test", TEST)
}

fn sample_text(device: &Cpu, dir: &Path) -> Result<String> {
    let model = common::load_model(device, dir)?;
    let tokenizer = Tokenizer::load(dir)?;
    // As the snippet of a publisher's card has it.
    let sampling =
        SamplingParams { temperature: 0.7, top_p: 0.95, top_k: 40, repetition_penalty: 1.1, seed: 1 };
    let params = GenerateParams::new(60, model.config.eos_token_ids.clone(), sampling);
    let mut out = Output::silent();
    complete(&mut Session::new(&model, 0), &tokenizer, &tokenizer.encode(PROMPT, true)?, &params, &mut out)?;
    Ok(format!("{PROMPT}{}", out.text.trim_end().replace('\n', "\n  ")))
}

fn print_next_steps(out: &Path, seconds: f64) -> Result<()> {
    let out = out.display();
    say!("Done in {seconds:.1} s. The artifacts are in {out}/<branch>. Next:")?;
    say!("  gptq inspect {out}/main")?;
    say!("  gptq generate {out}/main --prompt \"The river\" --max-new-tokens 80")?;
    say!("  gptq table causallm-7b                      # what the branches of a 7B model will weigh")?;
    say!("  gptq branches YOUR_MODEL --out branches     # the same for a model of yours")?;
    Ok(())
}
