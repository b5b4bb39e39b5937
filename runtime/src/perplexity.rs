//! Perplexity by the protocol of the GPTQ paper, and the distance between two models.

use gptq_kernels::{Backend, Batch, KV_BLOCK_ROWS, KvDtype, SequenceRows};

use crate::model::{KvCaches, Model};
use crate::{Error, Result};

/// Rows whose logits exist at once: 256 rows of a vocabulary of 150,000 are 150 MB.
const LOGIT_ROWS: usize = 256;

/// Tokens of one forward pass, if windows are shorter.
const BATCH_TOKENS: usize = 2048;

/// What one evaluation found, with the protocol it followed.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// `exp(mean loss)` of tokens 2 to `ctx` of every window.
    pub perplexity: f64,
    pub windows: usize,
    pub ctx: usize,
    pub tokens_scored: usize,
    /// Against the baseline, where there is one.
    pub comparison: Option<Comparison>,
}

/// Means over the same scored tokens.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Comparison {
    /// Perplexity of the baseline itself.
    pub baseline_perplexity: f64,
    /// Mean Kullback-Leibler divergence from the baseline, nats a token.
    pub kl_divergence: f64,
    /// Share of tokens where both models put the same token first.
    pub top1_agreement: f64,
}

/// Evaluates `model` on windows of equal length, each on its own; `progress` is told the windows done. Keys and values
/// are seen as the model's caches keep them.
pub fn evaluate<B: Backend>(
    model: &Model<B>,
    baseline: Option<&Model<B>>,
    windows: &[Vec<u32>],
    progress: &mut dyn FnMut(usize),
) -> Result<Evaluation> {
    let ctx = windows.first().map_or(0, Vec::len);
    if ctx < 2 || windows.iter().any(|w| w.len() != ctx) {
        return Err(Error::Windows { windows: windows.len(), ctx });
    }
    if let Some(baseline) = baseline.filter(|b| b.config.vocab_size != model.config.vocab_size) {
        return Err(Error::Vocabulary {
            model: model.config.vocab_size,
            baseline: baseline.config.vocab_size,
        });
    }
    let mut sums = Sums::default();
    let at_once = (BATCH_TOKENS / ctx).max(1);
    let mut pass = Pass::new(model, at_once, ctx)?;
    let mut reference = baseline.map(|baseline| Pass::new(baseline, at_once, ctx)).transpose()?;
    for group in windows.chunks(at_once) {
        score(&mut pass, reference.as_mut(), group, &mut sums)?;
        progress(group.len());
    }
    let tokens = windows.len() * (ctx - 1);
    let mean = |sum: f64| sum / tokens as f64;
    let comparison = baseline.map(|_| Comparison {
        baseline_perplexity: mean(sums.baseline_loss).exp(),
        kl_divergence: mean(sums.kl),
        top1_agreement: mean(sums.same_top1 as f64),
    });
    let perplexity = mean(sums.loss).exp();
    Ok(Evaluation { perplexity, windows: windows.len(), ctx, tokens_scored: tokens, comparison })
}

#[derive(Default)]
struct Sums {
    loss: f64,
    baseline_loss: f64,
    kl: f64,
    same_top1: usize,
}

/// A model, and the cache through which its keys and values go where they do not stay as they are.
struct Pass<'a, B: Backend> {
    model: &'a Model<B>,
    caches: Option<KvCaches<B>>,
    /// Blocks of a window.
    blocks: usize,
}

impl<'a, B: Backend> Pass<'a, B> {
    fn new(model: &'a Model<B>, windows: usize, ctx: usize) -> Result<Self> {
        let blocks = ctx.div_ceil(KV_BLOCK_ROWS);
        let caches = match model.kv_dtype() {
            KvDtype::Auto => None,
            KvDtype::Int8 => Some(model.kv_caches(windows * blocks)?),
        };
        Ok(Self { model, caches, blocks })
    }

    /// The last hidden states of all windows.
    fn forward(&mut self, windows: &[Vec<u32>]) -> Result<B::Tensor> {
        let ids = windows.concat();
        let mut batch = Batch::fresh(windows.iter().map(Vec::len));
        if self.caches.is_some() {
            let of = |window: usize| (window * self.blocks) as u32..((window + 1) * self.blocks) as u32;
            let with_blocks = |(window, sequence)| SequenceRows { blocks: of(window).collect(), ..sequence };
            batch.sequences = batch.sequences.into_iter().enumerate().map(with_blocks).collect();
        }
        self.model.forward(&ids, &batch, self.caches.as_mut())
    }
}

fn score<B: Backend>(
    pass: &mut Pass<B>,
    reference: Option<&mut Pass<B>>,
    windows: &[Vec<u32>],
    sums: &mut Sums,
) -> Result<()> {
    let (model, backend) = (pass.model, pass.model.backend());
    let ids = windows.concat();
    let hidden = pass.forward(windows)?;
    let reference = match reference {
        Some(reference) => Some((reference.model, reference.forward(windows)?)),
        None => None,
    };
    let ctx = windows[0].len();
    for start in (0..windows.len()).map(|w| w * ctx) {
        for first in (start..start + ctx - 1).step_by(LOGIT_ROWS) {
            let rows = first..(first + LOGIT_ROWS).min(start + ctx - 1);
            let targets = &ids[rows.start + 1..rows.end + 1];
            let logits = model.logits(&hidden, rows.clone())?;
            sums.loss += total(backend.token_loss(&logits, targets)?);
            if let Some((baseline, hidden)) = &reference {
                let expected = baseline.logits(hidden, rows)?;
                sums.baseline_loss += total(backend.token_loss(&expected, targets)?);
                for distance in backend.divergence(&expected, &logits)? {
                    sums.kl += distance.kl as f64;
                    sums.same_top1 += distance.same_top1 as usize;
                }
            }
        }
    }
    Ok(())
}

fn total(losses: Vec<f32>) -> f64 {
    losses.into_iter().map(f64::from).sum()
}

#[cfg(test)]
mod tests {
    use gptq_kernels::Cpu;

    use super::*;
    use crate::engine::tests::{folder, model};

    const CTX: usize = 40;

    /// Mean loss of a window that is fed token by token, as a text that is written.
    fn one_by_one(model: &Model<Cpu>, window: &[u32]) -> f64 {
        let blocks = CTX.div_ceil(KV_BLOCK_ROWS);
        let mut caches = model.kv_caches(blocks).unwrap();
        let mut loss = |context: usize| {
            let sequence = SequenceRows { rows: 1, context, blocks: (0..blocks as u32).collect() };
            let batch = Batch { sequences: vec![sequence] };
            let hidden = model.forward(&window[context..=context], &batch, Some(&mut caches)).unwrap();
            let logits = model.logits(&hidden, 0..1).unwrap();
            total(
                gptq_kernels::TokenLoss::token_loss(model.backend(), &logits, &[window[context + 1]])
                    .unwrap(),
            )
        };
        (0..CTX - 1).map(&mut loss).sum::<f64>() / (CTX - 1) as f64
    }

    #[test]
    fn windows_see_keys_and_values_as_a_text_that_is_written_does() {
        let folder = folder();
        let windows: Vec<Vec<u32>> =
            (0..3).map(|w| (0..CTX as u32).map(|i| (i * i + 31 * w) % 96).collect()).collect();
        let exact = model(folder.path());
        let int8 = model(folder.path()).with_kv_dtype(KvDtype::Int8);
        let measured = evaluate(&int8, Some(&exact), &windows, &mut |_| ()).unwrap();
        let written =
            windows.iter().map(|window| one_by_one(&int8, window)).sum::<f64>() / windows.len() as f64;
        // A sum in another order may let a code fall to the other side; far less than what codes change.
        let (apart, cost) = (measured.perplexity.ln() - written, measured.comparison.unwrap());
        println!("{apart:.1e} apart; {cost:?}");
        assert!(apart.abs() < 1e-6, "{apart:.1e}");
        // A random model's tokens are all about as likely, whatever it sees.
        assert!(cost.kl_divergence > 1e-9 && cost.kl_divergence < 1e-2, "{cost:?}");
        let same = evaluate(&exact, Some(&exact), &windows, &mut |_| ()).unwrap().comparison.unwrap();
        assert_eq!(same.kl_divergence, 0.0);
    }
}
