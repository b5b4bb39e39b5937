//! How near the quantized stream ends to the unquantized one.

use gptq_kernels::Backend;
use gptq_runtime::model::{Head, ModelFiles};
use serde::{Deserialize, Serialize};

use super::activation_cache::{ActivationCache, Pass, Touched};
use crate::Result;

/// Rows whose scores exist at once: 256 rows of a vocabulary of 150,000 are 150 MB.
const LOGIT_ROWS: usize = 256;

/// How near the quantized model is to its checkpoint: means over the tokens that were held out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    pub sequences: usize,
    pub tokens: usize,
    /// Mean Kullback-Leibler divergence from the unquantized model, nats a token.
    pub kl_divergence: f64,
    /// Share of tokens after which both put the same token first.
    pub top1_agreement: f64,
}

/// Of activations that stand behind the last layer.
pub(super) fn measure<B: Backend>(
    backend: &B,
    files: &ModelFiles,
    activations: &mut ActivationCache<B>,
) -> Result<Option<Agreement>> {
    if activations.layout().streams < 2 || !activations.layout().holds_out {
        return Ok(None);
    }
    let head = Head::load(backend, files)?;
    let mut sum = Agreement::default();
    let pass = Pass { reads: Touched::Hidden, writes: Touched::Hidden, held_out_only: true };
    activations.each(backend, pass, &mut |chunk, mut streams| {
        let mut normed = Vec::with_capacity(streams.len());
        for hidden in streams.iter_mut().filter_map(|parts| parts.hidden.take()) {
            normed.push(head.norm(backend, &hidden)?);
        }
        let [quantized, original] = &normed[..] else { return Ok(streams) };
        let rows = backend.shape(quantized).0;
        for start in (0..rows).step_by(LOGIT_ROWS) {
            let part = start..(start + LOGIT_ROWS).min(rows);
            let [expected, scores] = [original, quantized].map(|of| head.logits(backend, of, part.clone()));
            for distance in backend.divergence(&expected?, &scores?)? {
                sum.kl_divergence += f64::from(distance.kl);
                sum.top1_agreement += f64::from(u8::from(distance.same_top1));
            }
        }
        sum.sequences += chunk.batch.sequences.len();
        sum.tokens += rows;
        Ok(streams)
    })?;
    let mean = |total: f64| total / sum.tokens.max(1) as f64;
    let (kl_divergence, top1_agreement) = (mean(sum.kl_divergence), mean(sum.top1_agreement));
    Ok((sum.tokens > 0).then_some(Agreement { kl_divergence, top1_agreement, ..sum }))
}
