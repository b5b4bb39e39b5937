//! Rotary position embedding of q and k (Su et al. 2021), of all features of a head or of its first ones, with the norms
//! that some models put before it.

mod cpu;
pub(crate) mod cuda;

use crate::error::expect;
use crate::{Batch, Device, Error, Result};

/// How the columns of a stage's `q|k|v` output are read.
#[derive(Clone, Debug)]
pub struct RopeShape<T> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Features of a head that are turned, the first ones; `head_dim` where all are.
    pub turned: usize,
    pub pairing: Pairing,
    /// `[1, head_dim / 2]`: angle per position of each pair, of which the first `turned / 2` count; or a row for each
    /// sequence of the batch, where scaling depends on their lengths.
    pub inv_freq: T,
    /// What sines and cosines are multiplied by; 1 where the model asks for nothing else.
    pub stretch: f32,
    /// Norms of q and k, where the model has them.
    pub norms: Option<QkNorm<T>>,
    /// Queries that grow with their position, where the model has them.
    pub query_growth: Option<QueryGrowth>,
}

impl<T> RopeShape<T> {
    /// All features are turned, in two halves; nothing else is done.
    pub fn halves(heads: usize, kv_heads: usize, head_dim: usize, inv_freq: T) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            turned: head_dim,
            pairing: Pairing::Halves,
            inv_freq,
            stretch: 1.0,
            norms: None,
            query_growth: None,
        }
    }
}

impl<T> RopeShape<T> {
    /// Whether the norms of q and of k are of all heads together.
    pub(crate) fn whole_norms<D: Device<Tensor = T>>(&self, device: &D) -> [bool; 2] {
        let whole = |weight: &T| device.shape(weight).1 > self.head_dim;
        self.norms.as_ref().map_or([false; 2], |norms| [whole(&norms.q), whole(&norms.k)])
    }
}

/// Which two features are turned together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Feature `i` with `i + turned / 2`.
    Halves,
    /// Feature `2 i` with `2 i + 1`.
    Neighbours,
}

/// Queries are multiplied by `1 + beta ln(1 + floor(position / original))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    pub beta: f32,
    /// Positions up to this one leave them as they are.
    pub original: usize,
}

/// Of models whose queries do not grow.
pub(crate) const NO_GROWTH: QueryGrowth = QueryGrowth { beta: 0.0, original: 1 };

impl QueryGrowth {
    pub(crate) fn factor(self, position: usize) -> f32 {
        1.0 + self.beta * (1.0 + (position / self.original) as f32).ln()
    }
}

/// RMS norms of q and k: weights `[1, head_dim]` for norms of each head; `[1, heads head_dim]` and
/// `[1, kv_heads head_dim]` for norms over all heads together.
#[derive(Clone, Debug)]
pub struct QkNorm<T> {
    pub q: T,
    pub k: T,
    pub eps: f32,
}

/// Splits `qkv` into q, k and v, norms q and k and rotates them, every pair of features as [`Pairing`] says:
/// `(a, b) -> stretch (a cos - b sin, b cos + a sin)` with angle `position * inv_freq[i]`. Features keep their places.
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

/// `qkv` must have a row for every token and a column for every head's feature; frequencies, norms and what is turned
/// must fit the heads.
pub(crate) fn check<D: Device>(
    device: &D,
    qkv: &D::Tensor,
    batch: &Batch,
    shape: &RopeShape<D::Tensor>,
) -> Result<()> {
    let d = shape.head_dim;
    expect("rope", (batch.rows(), (shape.heads + 2 * shape.kv_heads) * d), device.shape(qkv))?;
    if !d.is_multiple_of(2) || !shape.turned.is_multiple_of(2) || shape.turned > d {
        return Err(Error::shape(
            "rope",
            format!("an even number of turned features up to {d}"),
            shape.turned,
        ));
    }
    let (frequencies, sequences) = (device.shape(&shape.inv_freq), batch.sequences.len());
    if frequencies.1 != d / 2 || ![1, sequences].contains(&frequencies.0) {
        let expected = format!("1 or {sequences} rows of {}", d / 2);
        return Err(Error::shape("rope frequencies", expected, frequencies));
    }
    for (weight, heads) in shape.norms.iter().flat_map(|n| [(&n.q, shape.heads), (&n.k, shape.kv_heads)]) {
        let weight = device.shape(weight);
        if ![(1, d), (1, heads * d)].contains(&weight) {
            return Err(Error::shape("rope norm", format!("1 row of {d} or {}", heads * d), weight));
        }
    }
    match shape.query_growth {
        Some(QueryGrowth { original: 0, .. }) => Err(Error::shape("query growth", "original positions", 0)),
        _ => Ok(()),
    }
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

    fn rotate(head: &[f64], position: usize, inv_freq: &[f32], case: &Case) -> Vec<f64> {
        let mut y = head.to_vec();
        for (i, frequency) in inv_freq.iter().enumerate().take(case.turned / 2) {
            let (a, b) = match case.pairing {
                Pairing::Halves => (i, i + case.turned / 2),
                Pairing::Neighbours => (2 * i, 2 * i + 1),
            };
            // The angle is formed in f32, as the models were trained.
            let (sin, cos) = ((position as f32 * frequency) as f64).sin_cos();
            let stretch = case.stretch as f64;
            y[a] = stretch * (head[a] * cos - head[b] * sin);
            y[b] = stretch * (head[b] * cos + head[a] * sin);
        }
        y
    }

    fn normed(x: &[f32], weight: Option<&[f32]>) -> Vec<f64> {
        let Some(weight) = weight else { return x.iter().map(|x| *x as f64).collect() };
        let norm = |x: &[f32]| -> Vec<f64> {
            let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / x.len() as f64;
            x.iter().zip(weight).map(|(x, w)| *x as f64 * *w as f64 / (mean + 1e-6).sqrt()).collect()
        };
        x.chunks(weight.len()).flat_map(norm).collect()
    }

    #[derive(Clone, Copy)]
    struct Case {
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        turned: usize,
        pairing: Pairing,
        stretch: f32,
        /// Of each head, or of all heads together.
        norms: Option<Norms>,
        growth: Option<QueryGrowth>,
        /// Rows of frequencies.
        tables: usize,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Norms {
        Heads,
        Whole,
    }

    fn cases() -> Vec<(&'static str, Case)> {
        let plain = |heads, kv_heads, head_dim| Case {
            heads,
            kv_heads,
            head_dim,
            turned: head_dim,
            pairing: Pairing::Halves,
            stretch: 1.0,
            norms: None,
            growth: None,
            tables: 1,
        };
        let growth = Some(QueryGrowth { beta: 0.1, original: 300 });
        let neighbours = Pairing::Neighbours;
        vec![
            ("all heads have their own keys", plain(4, 4, 16)),
            ("grouped queries", plain(6, 2, 32)),
            ("norm before rotation", Case { norms: Some(Norms::Heads), ..plain(2, 1, 64) }),
            ("frequencies of each sequence's own", Case { tables: 2, ..plain(2, 2, 32) }),
            ("neighbours are turned", Case { pairing: neighbours, ..plain(3, 1, 32) }),
            ("a part of the head", Case { turned: 24, ..plain(4, 2, 32) }),
            ("an odd number of pairs", Case { turned: 6, ..plain(2, 1, 20) }),
            ("neighbours in a part of the head", Case { turned: 32, pairing: neighbours, ..plain(4, 2, 64) }),
            ("nothing is turned", Case { turned: 0, norms: Some(Norms::Heads), ..plain(2, 1, 32) }),
            ("stretched sines, a part as it is", Case { stretch: 1.19, turned: 24, ..plain(2, 1, 32) }),
            ("a norm over all heads", Case { norms: Some(Norms::Whole), ..plain(6, 2, 32) }),
            ("a norm over many features", Case { norms: Some(Norms::Whole), ..plain(32, 8, 128) }),
            (
                "a norm of heads, neighbours, a part, tables",
                Case {
                    norms: Some(Norms::Heads),
                    pairing: neighbours,
                    turned: 8,
                    tables: 2,
                    ..plain(4, 2, 16)
                },
            ),
            ("queries grow", Case { growth, ..plain(4, 2, 128) }),
            (
                "everything at once",
                Case {
                    growth,
                    stretch: 0.8,
                    turned: 40,
                    pairing: neighbours,
                    norms: Some(Norms::Whole),
                    ..plain(4, 2, 80)
                },
            ),
        ]
    }

    fn conforms(device: &impl Rope, tolerance: f64) {
        for (risk, case) in cases() {
            let Case { heads, kv_heads, head_dim, tables, .. } = case;
            let mut batch = Batch::fresh([3, 2]);
            batch.sequences[1].context = 1000;
            let positions = [0, 1, 2, 1000, 1001];
            let width = (heads + 2 * kv_heads) * head_dim;
            let qkv = random(7, 5 * width);
            let half = head_dim / 2;
            let frequency = |i: usize| [0.5f32, 0.9][i / half].powi((i % half) as i32);
            let inv_freq: Vec<f32> = (0..tables * half).map(frequency).collect();
            let norm_width =
                |heads| if case.norms == Some(Norms::Whole) { heads * head_dim } else { head_dim };
            let weights = [random(8, norm_width(heads)), random(9, norm_width(kv_heads))];
            let mut expected = [vec![], vec![], vec![]];
            for (t, (row, position)) in qkv.chunks(width).zip(positions).enumerate() {
                let inv_freq = &inv_freq[if t < 3 { 0 } else { (tables - 1) * half }..][..half];
                let (q, kv) = row.split_at(heads * head_dim);
                let (k, v) = kv.split_at(kv_heads * head_dim);
                for (part, x) in [q, k].into_iter().enumerate() {
                    let x = normed(x, case.norms.map(|_| &weights[part][..]));
                    let growth = case.growth.filter(|_| part == 0);
                    let factor = growth.map_or(1.0, |growth| {
                        1.0 + growth.beta as f64 * (1.0 + (position / growth.original) as f64).ln()
                    });
                    let heads = x.chunks(head_dim).flat_map(|head| rotate(head, position, inv_freq, &case));
                    expected[part].extend(heads.map(|x| x * factor));
                }
                expected[2].extend(v.iter().map(|x| *x as f64));
            }
            let tensor = |values: &[f32]| device.tensor(values.to_vec(), (1, values.len())).unwrap();
            let inv_freq = device.wide_tensor(inv_freq, (tables, half)).unwrap();
            let shape = RopeShape {
                turned: case.turned,
                pairing: case.pairing,
                stretch: case.stretch,
                norms: case.norms.map(|_| QkNorm {
                    q: tensor(&weights[0]),
                    k: tensor(&weights[1]),
                    eps: 1e-6,
                }),
                query_growth: case.growth,
                ..RopeShape::halves(heads, kv_heads, head_dim, inv_freq)
            };
            let qkv = device.tensor(qkv, (5, width)).unwrap();
            for (got, expected) in device.rope(&qkv, &batch, &shape).unwrap().iter().zip(&expected) {
                assert_close(risk, &device.to_vec(got).unwrap(), expected, tolerance);
            }
            assert!(
                device.rope(&qkv, &Batch::fresh([4]), &shape).is_err(),
                "{risk}: rows without a position"
            );
            let odd = RopeShape { turned: 3, ..shape.clone() };
            assert!(device.rope(&qkv, &batch, &odd).is_err(), "{risk}: a feature without another");
            let (q, k) = (tensor(&weights[0][1..]), tensor(&weights[1]));
            let narrow = RopeShape { norms: Some(QkNorm { q, k, eps: 1e-6 }), ..shape };
            assert!(device.rope(&qkv, &batch, &narrow).is_err(), "{risk}: a norm of another width");
        }
    }

    #[test]
    fn agrees_with_f64_on_the_cpu() {
        conforms(&Cpu::new(), NMSE_F32);
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn agrees_with_f64_on_cuda() {
        crate::testing::gpus().iter().for_each(|gpu| conforms(gpu, tolerance(gpu)));
    }
}
