//! Perplexity by the protocol of the GPTQ paper, and the distance between two models.

use std::ops::{ControlFlow, Range};

use gptq_kernels::{Backend, Batch, Cpu, Device, KV_BLOCK_ROWS, KvDtype, SequenceRows, TokenLoss};

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
    /// Squares of the differences between both models' logits, as a share of the baseline's squares; where it ran on
    /// the processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_nmse: Option<f64>,
}

/// What a model is compared with.
pub enum Baseline<'a, B: Backend> {
    /// A model on the same device.
    Beside(&'a Model<B>),
    /// One on the processor, in f32. Where it is the same model, the distance is what the device makes of it.
    OnCpu(&'a Model<Cpu>),
}

impl<B: Backend> Baseline<'_, B> {
    fn vocab_size(&self) -> usize {
        match self {
            Self::Beside(model) => model.config.vocab_size,
            Self::OnCpu(model) => model.config.vocab_size,
        }
    }
}

/// Evaluates `model` on windows of equal length, each on its own; `progress` is told the windows done, and may end the
/// work with [`Error::Stopped`]. Keys and values are seen as the model's caches keep them.
pub fn evaluate<B: Backend>(
    model: &Model<B>,
    baseline: Option<Baseline<B>>,
    windows: &[Vec<u32>],
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Evaluation> {
    let ctx = windows.first().map_or(0, Vec::len);
    if ctx < 2 || windows.iter().any(|w| w.len() != ctx) {
        return Err(Error::Windows { windows: windows.len(), ctx });
    }
    let vocab = model.config.vocab_size;
    if let Some(baseline) = baseline.as_ref().map(Baseline::vocab_size).filter(|baseline| *baseline != vocab)
    {
        return Err(Error::Vocabulary { model: vocab, baseline });
    }
    let mut sums = Sums::default();
    let at_once = (BATCH_TOKENS / ctx).max(1);
    let mut pass = Pass::new(model, at_once, ctx)?;
    let mut reference = match &baseline {
        Some(Baseline::Beside(model)) => Some(Reference::Beside(Pass::new(model, at_once, ctx)?)),
        Some(Baseline::OnCpu(model)) => Some(Reference::OnCpu(Pass::new(model, at_once, ctx)?)),
        None => None,
    };
    for group in windows.chunks(at_once) {
        score(&mut pass, reference.as_mut(), group, &mut sums)?;
        if progress(group.len()).is_break() {
            return Err(Error::Stopped);
        }
    }
    let tokens = windows.len() * (ctx - 1);
    let mean = |sum: f64| sum / tokens as f64;
    let comparison = baseline.map(|_| Comparison {
        baseline_perplexity: mean(sums.baseline_loss).exp(),
        kl_divergence: mean(sums.kl),
        top1_agreement: mean(sums.same_top1 as f64),
        logit_nmse: sums.squares.map(|(error, of_baseline)| error / of_baseline),
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
    /// Of the differences between logits, and of the baseline's logits.
    squares: Option<(f64, f64)>,
}

impl Sums {
    /// Both sets of logits on one device, for the tokens that came.
    fn compare<D: TokenLoss>(
        &mut self,
        device: &D,
        expected: &D::Tensor,
        logits: &D::Tensor,
        targets: &[u32],
    ) -> Result<()> {
        self.baseline_loss += total(device.token_loss(expected, targets)?);
        for distance in device.divergence(expected, logits)? {
            self.kl += distance.kl as f64;
            self.same_top1 += distance.same_top1 as usize;
        }
        Ok(())
    }

    /// Both sets of logits on the host.
    fn add_squares(&mut self, expected: &[f32], logits: &[f32]) {
        let (error, of_baseline) = self.squares.get_or_insert_default();
        for (expected, got) in expected.iter().zip(logits) {
            *error += (*got as f64 - *expected as f64).powi(2);
            *of_baseline += (*expected as f64).powi(2);
        }
    }
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

/// The baseline's passes over the same windows.
enum Reference<'a, B: Backend> {
    Beside(Pass<'a, B>),
    OnCpu(Pass<'a, Cpu>),
}

/// Adds up how far some rows are from the baseline: which, the model's own logits, and the tokens that came.
type Compare<'a, T> = Box<dyn FnMut(Range<usize>, &T, &[u32], &mut Sums) -> Result<()> + 'a>;

impl<B: Backend> Reference<'_, B> {
    fn over<'a>(&'a mut self, windows: &[Vec<u32>], backend: &'a B) -> Result<Compare<'a, B::Tensor>> {
        Ok(match self {
            Self::Beside(pass) => {
                let hidden = pass.forward(windows)?;
                Box::new(move |rows, logits, targets, sums| {
                    sums.compare(backend, &pass.model.logits(&hidden, rows)?, logits, targets)
                })
            }
            Self::OnCpu(pass) => {
                let hidden = pass.forward(windows)?;
                Box::new(move |rows, logits, targets, sums| {
                    let (cpu, expected) = (pass.model.backend(), pass.model.logits(&hidden, rows)?);
                    let values = backend.to_vec(logits)?;
                    sums.add_squares(&cpu.to_vec(&expected)?, &values);
                    sums.compare(cpu, &expected, &cpu.tensor(values, cpu.shape(&expected))?, targets)
                })
            }
        })
    }
}

fn score<B: Backend>(
    pass: &mut Pass<B>,
    reference: Option<&mut Reference<B>>,
    windows: &[Vec<u32>],
    sums: &mut Sums,
) -> Result<()> {
    let (model, backend) = (pass.model, pass.model.backend());
    let ids = windows.concat();
    let hidden = pass.forward(windows)?;
    let mut compare = reference.map(|reference| reference.over(windows, backend)).transpose()?;
    let ctx = windows[0].len();
    for start in (0..windows.len()).map(|w| w * ctx) {
        for first in (start..start + ctx - 1).step_by(LOGIT_ROWS) {
            let rows = first..(first + LOGIT_ROWS).min(start + ctx - 1);
            let targets = &ids[rows.start + 1..rows.end + 1];
            let logits = model.logits(&hidden, rows.clone())?;
            sums.loss += total(backend.token_loss(&logits, targets)?);
            if let Some(compare) = &mut compare {
                compare(rows, &logits, targets, sums)?;
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
        let measured =
            evaluate(&int8, Some(Baseline::Beside(&exact)), &windows, &mut |_| ControlFlow::Continue(()))
                .unwrap();
        let written =
            windows.iter().map(|window| one_by_one(&int8, window)).sum::<f64>() / windows.len() as f64;
        // A sum in another order may let a code fall to the other side; far less than what codes change.
        let (apart, cost) = (measured.perplexity.ln() - written, measured.comparison.unwrap());
        println!("{apart:.1e} apart; {cost:?}");
        assert!(apart.abs() < 1e-6, "{apart:.1e}");
        // A random model's tokens are all about as likely, whatever it sees.
        assert!(cost.kl_divergence > 1e-9 && cost.kl_divergence < 1e-2, "{cost:?}");
        let same =
            evaluate(&exact, Some(Baseline::Beside(&exact)), &windows, &mut |_| ControlFlow::Continue(()))
                .unwrap()
                .comparison
                .unwrap();
        assert_eq!(same.kl_divergence, 0.0);
    }

    #[test]
    fn a_baseline_on_the_processor_is_the_one_beside_and_tells_how_far_logits_are_apart() {
        let folder = folder();
        let windows: Vec<Vec<u32>> = vec![(0..CTX as u32).map(|i| (i * i) % 96).collect()];
        let exact = model(folder.path());
        let int8 = model(folder.path()).with_kv_dtype(KvDtype::Int8);
        let compared =
            |baseline| evaluate(&int8, Some(baseline), &windows, &mut |_| ControlFlow::Continue(())).unwrap();
        let beside = compared(Baseline::Beside(&exact)).comparison.unwrap();
        let on_cpu = compared(Baseline::OnCpu(&exact)).comparison.unwrap();
        let blocks = CTX.div_ceil(KV_BLOCK_ROWS);
        let logits = |model: &Model<Cpu>| {
            let mut caches = model.kv_caches(blocks).unwrap();
            let sequence = SequenceRows { rows: CTX, context: 0, blocks: (0..blocks as u32).collect() };
            let batch = Batch { sequences: vec![sequence] };
            let hidden = model.forward(&windows[0], &batch, Some(&mut caches)).unwrap();
            model.backend().to_vec(&model.logits(&hidden, 0..CTX - 1).unwrap()).unwrap()
        };
        let (expected, got) = (logits(&exact), logits(&int8));
        let error: f64 = expected.iter().zip(&got).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let nmse = error / expected.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        println!("{nmse:.2e}, {on_cpu:?}");
        let found = on_cpu.logit_nmse.unwrap();
        assert!(nmse > 0.0 && (found / nmse - 1.0).abs() < 1e-3, "{found:.3e} for {nmse:.3e}");
        assert_eq!(Comparison { logit_nmse: None, ..on_cpu }, beside);
    }
}
