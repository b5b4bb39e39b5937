//! Rotary position embedding of q and k (Su et al. 2021), with the per-head norm that Qwen3 puts before it.

mod cpu;
pub(crate) mod cuda;

use crate::{Batch, Device, Error, Result};

/// How the columns of a stage's `q|k|v` output are read.
#[derive(Clone, Debug)]
pub struct RopeShape<T> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// `[1, head_dim / 2]`: angle per position; or a row for each sequence of the batch, where scaling depends on their
    /// lengths.
    pub inv_freq: T,
    /// Norms of q and k per head, where the model has them.
    pub norms: Option<QkNorm<T>>,
}

/// Per-head RMS norms of q and k: weights `[1, head_dim]`.
#[derive(Clone, Debug)]
pub struct QkNorm<T> {
    pub q: T,
    pub k: T,
    pub eps: f32,
}

/// Splits `qkv` into q, k and v and rotates q and k, pairing feature `i` with `i + head_dim / 2`:
/// `(a, b) -> (a cos - b sin, b cos + a sin)` with angle `position * inv_freq[i]`.
/// qkv: `[tokens, (heads + 2 kv_heads) head_dim]`, result: q `[tokens, heads head_dim]`, k and v
/// `[tokens, kv_heads head_dim]`
pub trait Rope: Device {
    fn rope(
        &self,
        qkv: &Self::Tensor,
        batch: &Batch,
        shape: &RopeShape<Self::Tensor>,
    ) -> Result<[Self::Tensor; 3]>;
}

/// `qkv` must have a row for every token and a column for every head's feature.
pub(crate) fn check<T>(
    qkv: (usize, usize),
    frequencies: (usize, usize),
    batch: &Batch,
    shape: &RopeShape<T>,
) -> Result<()> {
    let expected = (batch.rows(), (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    if qkv != expected {
        return Err(Error::shape("rope", expected, qkv));
    }
    let sequences = batch.sequences.len();
    if frequencies.1 != shape.head_dim / 2 || ![1, sequences].contains(&frequencies.0) {
        let expected = format!("1 or {sequences} rows of {}", shape.head_dim / 2);
        return Err(Error::shape("rope frequencies", expected, frequencies));
    }
    Ok(())
}

/// For each token of the batch, the row of frequencies that turns it.
pub(crate) fn frequency_rows(batch: &Batch, rows: usize) -> Vec<u32> {
    let row = |sequence: usize| if rows == 1 { 0 } else { sequence as u32 };
    let sequences = batch.sequences.iter().enumerate();
    sequences.flat_map(|(i, sequence)| std::iter::repeat_n(row(i), sequence.rows)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use crate::testing::{NMSE_F32, assert_close, random, tolerance};

    fn rotate(head: &[f64], position: usize, inv_freq: &[f32]) -> Vec<f64> {
        let half = head.len() / 2;
        let turned = |i: usize| {
            // The angle is formed in f32, as the models were trained.
            let (sin, cos) = ((position as f32 * inv_freq[i % half]) as f64).sin_cos();
            if i < half { head[i] * cos - head[i + half] * sin } else { head[i] * cos + head[i - half] * sin }
        };
        (0..head.len()).map(turned).collect()
    }

    fn normed(head: &[f32], weight: Option<&[f32]>) -> Vec<f64> {
        let Some(weight) = weight else { return head.iter().map(|x| *x as f64).collect() };
        let mean = head.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / head.len() as f64;
        head.iter().zip(weight).map(|(x, w)| *x as f64 * *w as f64 / (mean + 1e-6).sqrt()).collect()
    }

    fn conforms(device: &impl Rope, tolerance: f64) {
        for (risk, heads, kv_heads, head_dim, norms, tables) in [
            ("all heads have their own keys", 4, 4, 16, false, 1),
            ("grouped queries", 6, 2, 32, false, 1),
            ("norm before rotation", 2, 1, 64, true, 1),
            ("frequencies of each sequence's own", 2, 2, 32, false, 2),
        ] {
            let mut batch = Batch::fresh([3, 2]);
            batch.sequences[1].context = 1000;
            let positions = [0, 1, 2, 1000, 1001];
            let width = (heads + 2 * kv_heads) * head_dim;
            let qkv = random(7, 5 * width);
            let half = head_dim / 2;
            let frequency = |i: usize| [0.5f32, 0.9][i / half].powi((i % half) as i32);
            let inv_freq: Vec<f32> = (0..tables * half).map(frequency).collect();
            let weights = [random(8, head_dim), random(9, head_dim)];
            let mut expected = [vec![], vec![], vec![]];
            for (t, (row, position)) in qkv.chunks(width).zip(positions).enumerate() {
                let inv_freq = &inv_freq[if t < 3 { 0 } else { (tables - 1) * half }..][..half];
                for (h, head) in row.chunks(head_dim).enumerate() {
                    let part = (h >= heads) as usize + (h >= heads + kv_heads) as usize;
                    let weight = (norms && part < 2).then(|| &weights[part][..]);
                    let head = normed(head, weight);
                    expected[part].extend(if part < 2 { rotate(&head, position, inv_freq) } else { head });
                }
            }
            let tensor = |values: &[f32]| device.tensor(values.to_vec(), (1, values.len())).unwrap();
            let shape = RopeShape {
                heads,
                kv_heads,
                head_dim,
                inv_freq: device.wide_tensor(inv_freq.clone(), (tables, half)).unwrap(),
                norms: norms.then(|| QkNorm { q: tensor(&weights[0]), k: tensor(&weights[1]), eps: 1e-6 }),
            };
            let qkv = device.tensor(qkv, (5, width)).unwrap();
            for (got, expected) in device.rope(&qkv, &batch, &shape).unwrap().iter().zip(&expected) {
                assert_close(risk, &device.to_vec(got).unwrap(), expected, tolerance);
            }
            assert!(
                device.rope(&qkv, &Batch::fresh([4]), &shape).is_err(),
                "{risk}: rows without a position"
            );
        }
    }

    #[test]
    fn agrees_with_f64_on_the_cpu() {
        conforms(&Cpu::new(), NMSE_F32);
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn agrees_with_f64_on_cuda() {
        crate::testing::cards().iter().for_each(|card| conforms(card, tolerance(card)));
    }
}
