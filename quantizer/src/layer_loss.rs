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
    let stages = |layer: &Layer<B>| layer.spec().stages();
    let mut sums: Vec<Vec<(f64, f64)>> =
        original.layers().iter().map(|layer| vec![(0.0, 0.0); stages(layer).len()]).collect();
    let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
    for group in windows.chunks((BATCH_TOKENS / longest.max(1)).max(1)) {
        let (ids, batch) = (group.concat(), Batch::fresh(group.iter().map(Vec::len)));
        let mut hidden = [original.embed(&ids)?, quantized.embed(&ids)?];
        for (layers, sums) in original.layers().iter().zip(quantized.layers()).zip(&mut sums) {
            hidden = through(original.backend(), layers.into(), hidden, &batch, sums)?;
        }
    }
    let losses = original.layers().iter().zip(sums).enumerate().flat_map(|(layer, (of, sums))| {
        let loss = move |(stage, (error, whole)): (&Stage, (f64, f64))| StageLoss {
            layer,
            stage: *stage,
            loss: error / whole,
        };
        stages(of).iter().zip(sums).map(loss)
    });
    Ok(losses.collect())
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
    for (stage, (error, whole)) in layers[0].spec().stages().iter().copied().zip(sums) {
        let mut outputs = Vec::with_capacity(2);
        for (layer, state) in layers.iter().zip(&mut states) {
            outputs.push(backend.to_vec(&layer.product(backend, stage, &state.input)?)?);
            *state = match stage.ends_block() {
                true => layer.rejoin(backend, stage, &state.input, state.hidden.clone())?,
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
