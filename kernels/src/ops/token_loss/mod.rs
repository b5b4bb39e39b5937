//! What a model's logits are worth: the loss of the true next token, and the distance to another model's.

mod cpu;
pub(crate) mod cuda;

use crate::error::expect;
use crate::{Device, Error, Result};

/// One token's distance between two models.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// Kullback-Leibler divergence `sum_i p_i (ln p_i - ln q_i)` in nats, p being the reference's.
    pub kl: f32,
    /// Both models put the same token first.
    pub same_top1: bool,
}

/// Losses over the vocabulary, with the sum in at least f32 and the largest logit taken out first.
pub trait TokenLoss: Device {
    /// `loss[t] = ln sum_i exp(logits[t, i]) - logits[t, targets[t]]`, nats.  logits: `[tokens, vocab]`
    fn token_loss(&self, logits: &Self::Tensor, targets: &[u32]) -> Result<Vec<f32>>;

    /// The distance of `logits` from `reference`, token by token.  Both: `[tokens, vocab]`
    fn divergence(&self, reference: &Self::Tensor, logits: &Self::Tensor) -> Result<Vec<Divergence>>;
}

/// A target for every row, inside the vocabulary.
pub(crate) fn check_targets(logits: (usize, usize), targets: &[u32]) -> Result<()> {
    expect("token_loss targets", logits.0, targets.len())?;
    match targets.iter().find(|&&t| t as usize >= logits.1) {
        Some(t) => Err(Error::shape("token_loss target", format!("below {}", logits.1), t)),
        None => Ok(()),
    }
}

/// Both must have one row a token over the same vocabulary.
pub(crate) fn check_pair(reference: (usize, usize), logits: (usize, usize)) -> Result<()> {
    expect("divergence", reference, logits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use crate::testing::random;

    fn log_softmax(row: &[f32]) -> Vec<f64> {
        let largest = row.iter().fold(f64::MIN, |a, b| a.max(*b as f64));
        let total: f64 = row.iter().map(|x| (*x as f64 - largest).exp()).sum();
        row.iter().map(|x| *x as f64 - largest - total.ln()).collect()
    }

    fn conforms(device: &impl TokenLoss) {
        for (risk, vocab, scale) in
            [("small vocabulary", 5, 1.0), ("odd vocabulary", 1001, 8.0), ("large logits", 64, 300.0)]
        {
            let p: Vec<f32> = random(1, 3 * vocab).iter().map(|x| x * scale).collect();
            let q: Vec<f32> = p.iter().zip(random(2, 3 * vocab)).map(|(p, noise)| p + 0.3 * noise).collect();
            let targets = [0, vocab as u32 / 2, vocab as u32 - 1];
            let (tp, tq) = (
                device.wide_tensor(p.clone(), (3, vocab)).unwrap(),
                device.wide_tensor(q.clone(), (3, vocab)).unwrap(),
            );
            let losses = device.token_loss(&tq, &targets).unwrap();
            let distances = device.divergence(&tp, &tq).unwrap();
            for t in 0..3 {
                let (p, q) = (log_softmax(&p[t * vocab..][..vocab]), log_softmax(&q[t * vocab..][..vocab]));
                let loss = -q[targets[t] as usize];
                // f32 logits carry about 1e-7 of their size.
                assert!(
                    (losses[t] as f64 - loss).abs() <= 2e-6 * (scale as f64 + loss),
                    "{risk}: loss {loss} {}",
                    losses[t]
                );
                let kl: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
                assert!(
                    (distances[t].kl as f64 - kl).abs() <= 3e-6 * (1.0 + scale as f64),
                    "{risk}: {kl} {:?}",
                    distances[t]
                );
                let top = |x: &[f64]| (0..vocab).fold(0, |best, i| if x[i] > x[best] { i } else { best });
                assert_eq!(distances[t].same_top1, top(&p) == top(&q), "{risk}");
            }
            assert!(
                device.token_loss(&tq, &[0, 0, vocab as u32]).is_err(),
                "{risk}: a target past the vocabulary"
            );
            assert!(device.token_loss(&tq, &[0]).is_err(), "{risk}: too few targets");
        }
    }

    #[test]
    fn agrees_with_f64_on_the_cpu() {
        conforms(&Cpu::new());
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn agrees_with_f64_on_cuda() {
        crate::testing::gpus().iter().for_each(conforms);
    }
}
