//! Logits of every position, for comparison with other programs:
//! `cargo run --release --example logits -- MODEL OUT.safetensors ID...`
//!
//! OUT holds `logits`, f32 `[tokens, vocab]`, computed on the CPU.

use std::path::Path;

use gptq_kernels::{Batch, Cpu, Device};
use gptq_runtime::model::{Model, ModelFiles};
use safetensors::{Dtype, tensor::TensorView};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, out, ids @ ..] = &args[..] else { anyhow::bail!("usage: logits MODEL OUT.safetensors ID...") };
    let ids = ids.iter().map(|id| id.parse()).collect::<Result<Vec<u32>, _>>()?;
    let model = Model::load(Cpu::new(), &ModelFiles::open(Path::new(dir))?)?;
    let hidden = model.forward(&ids, &Batch::fresh([ids.len()]), None)?;
    let logits = model.backend().to_vec(&model.logits(&hidden, 0..ids.len())?)?;
    let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![ids.len(), model.config.vocab_size], &bytes)?;
    safetensors::serialize_to_file([("logits", view)], None, Path::new(out))?;
    Ok(())
}
