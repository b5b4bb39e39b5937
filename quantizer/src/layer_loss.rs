//! How far the outputs of every stage of an artifact are from those of its checkpoint, on any text.

use gptq_kernels::{Backend, Batch};
use gptq_runtime::layout::Stage;
use gptq_runtime::model::{Layer, Model, State};

use crate::Result;

/// Tokens that go through the layers together, if windows are shorter.
const BATCH_TOKENS: usize = 2048;

/// `sum |W x_f - Q x|^2 / sum |W x_f|^2` of one stage: x_f is its input in the checkpoint, x in the artifact.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StageLoss {
    pub layer: usize,
    pub stage: Stage,
    pub loss: f64,
}

/// Walks both models side by side. Windows may be of any length, each on its own.
pub fn stage_losses<B: Backend>(
    original: &Model<B>,
    quantized: &Model<B>,
    windows: &[Vec<u32>],
) -> Result<Vec<StageLoss>> {
    let stages = original.layers().len() * Stage::ALL.len();
    let mut sums = vec![(0.0, 0.0); stages];
    let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
    for group in windows.chunks((BATCH_TOKENS / longest.max(1)).max(1)) {
        let (ids, batch) = (group.concat(), Batch::fresh(group.iter().map(Vec::len)));
        let mut hidden = [original.embed(&ids)?, quantized.embed(&ids)?];
        for (i, layers) in original.layers().iter().zip(quantized.layers()).enumerate() {
            let sums = &mut sums[i * Stage::ALL.len()..][..Stage::ALL.len()];
            hidden = through(original.backend(), layers.into(), hidden, &batch, sums)?;
        }
    }
    let loss = |(i, (error, whole)): (usize, (f64, f64))| StageLoss {
        layer: i / Stage::ALL.len(),
        stage: Stage::ALL[i % Stage::ALL.len()],
        loss: error / whole,
    };
    Ok(sums.into_iter().enumerate().map(loss).collect())
}

/// Takes both hidden states through one layer and adds up squares of each stage: of the difference, and of the original.
fn through<B: Backend>(
    backend: &B,
    layers: [&Layer<B>; 2],
    hidden: [B::Tensor; 2],
    batch: &Batch,
    sums: &mut [(f64, f64)],
) -> Result<[B::Tensor; 2]> {
    let [of_original, of_quantized] = hidden;
    let mut states = [layers[0].enter(backend, of_original)?, layers[1].enter(backend, of_quantized)?];
    for (stage, (error, whole)) in Stage::ALL.into_iter().zip(sums) {
        let mut outputs = Vec::with_capacity(2);
        for (layer, state) in layers.iter().zip(&mut states) {
            outputs.push(backend.to_vec(&layer.product(backend, stage, &state.input)?)?);
            *state = match stage.ends_block() {
                true => layer.rejoin(backend, stage, &state.input, &state.hidden)?,
                false => State {
                    input: layer.follow(backend, stage, &state.input, batch)?,
                    hidden: state.hidden.clone(),
                },
            };
        }
        for (original, quantized) in outputs[0].iter().zip(&outputs[1]) {
            *error += f64::from(original - quantized).powi(2);
            *whole += f64::from(*original).powi(2);
        }
    }
    Ok(states.map(|state| state.hidden))
}
