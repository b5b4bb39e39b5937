//! Causal self-attention over a ragged batch, with or without a paged KV cache (Vaswani et al. 2017;
//! grouped queries: Ainslie et al. 2023; sliding window: Jiang et al. 2023).

mod cpu;
pub(crate) mod cuda;
pub(crate) mod step;

use crate::batch::KV_BLOCK_ROWS;
use crate::{Batch, Error, Result, Rope, RopeShape};

/// The heads of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads / kv_heads` query heads share one.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// A token sees itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
}

/// `y[t, h] = sum_s softmax_s(q[t, h] . k[s, h'] / sqrt(head_dim)) v[s, h']` over the tokens `s <= t` of t's
/// own sequence, `h' = h / (heads / kv_heads)`.
/// q: `[tokens, heads head_dim]`, k, v: `[tokens, kv_heads head_dim]`, result: like q
pub trait Attention: Rope {
    /// Keys and values of one layer, in blocks of [`KV_BLOCK_ROWS`] rows.
    type KvCache: Send;

    /// An empty cache of `blocks` blocks for keys and values of `kv_width` features.
    fn kv_cache(&self, blocks: usize, kv_width: usize) -> Result<Self::KvCache>;

    /// Attends; with a cache, first appends k and v to each sequence's blocks, then sees them and what was
    /// there before. Without one every sequence must start at context 0.
    fn attention(
        &self,
        qkv: &[Self::Tensor; 3],
        batch: &Batch,
        shape: &AttentionShape,
        cache: Option<&mut Self::KvCache>,
    ) -> Result<Self::Tensor>;

    /// [`Rope::rope`], then [`Self::attention`]; the result may come in the order that the next weight wants.
    /// qkv: `[tokens, (heads + 2 kv_heads) head_dim]`
    fn rope_attention(
        &self,
        qkv: &Self::Tensor,
        batch: &Batch,
        rope: &RopeShape<Self::Tensor>,
        shape: &AttentionShape,
        cache: Option<&mut Self::KvCache>,
        _order: Option<&Self::Order>,
    ) -> Result<Self::Tensor> {
        self.attention(&self.rope(qkv, batch, rope)?, batch, shape, cache)
    }
}

/// Widths and rows must fit the batch; blocks must exist for every token that is seen.
pub(crate) fn check(
    dims: [(usize, usize); 3],
    batch: &Batch,
    shape: &AttentionShape,
    cache_blocks: Option<usize>,
) -> Result<()> {
    let (rows, d) = (batch.rows(), shape.head_dim);
    let kv = (rows, shape.kv_heads * d);
    let expected = [(rows, shape.heads * d), kv, kv];
    if dims != expected {
        return Err(Error::shape("attention", expected, dims));
    }
    if shape.kv_heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
        return Err(Error::shape(
            "attention heads",
            "a multiple of the kv heads",
            (shape.heads, shape.kv_heads),
        ));
    }
    for sequence in &batch.sequences {
        let length = sequence.context + sequence.rows;
        let Some(blocks) = cache_blocks else {
            if sequence.context > 0 {
                return Err(Error::shape("attention without a cache", "context 0", sequence.context));
            }
            continue;
        };
        if sequence.blocks.len() * KV_BLOCK_ROWS < length {
            return Err(Error::shape(
                "attention blocks",
                length.div_ceil(KV_BLOCK_ROWS),
                sequence.blocks.len(),
            ));
        }
        if let Some(block) = sequence.blocks.iter().find(|&&b| b as usize >= blocks) {
            return Err(Error::shape("attention block", format!("below {blocks}"), block));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NMSE_F32, assert_close, random, tolerance};
    use crate::{Cpu, SequenceRows};

    /// Attention of the last `rows` tokens of one sequence, in f64, the score matrix written out.
    fn reference(q: &[f32], k: &[f32], v: &[f32], rows: usize, shape: &AttentionShape) -> Vec<f64> {
        let (d, width) = (shape.head_dim, shape.kv_heads * shape.head_dim);
        let length = k.len() / width;
        let mut y = vec![0.0; q.len()];
        for t in 0..rows {
            let position = length - rows + t;
            let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for h in 0..shape.heads {
                let kv = h / (shape.heads / shape.kv_heads) * d;
                let query = &q[(t * shape.heads + h) * d..][..d];
                let score = |s: usize| {
                    let dot: f64 = (0..d).map(|i| query[i] as f64 * k[s * width + kv + i] as f64).sum();
                    (dot / (d as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = (first..=position).map(score).collect();
                let total: f64 = scores.iter().sum();
                for (s, score) in (first..).zip(&scores) {
                    for i in 0..d {
                        y[(t * shape.heads + h) * d + i] += score / total * v[s * width + kv + i] as f64;
                    }
                }
            }
        }
        y
    }

    struct Case {
        risk: &'static str,
        shape: AttentionShape,
        lengths: [usize; 2],
    }

    fn cases() -> Vec<Case> {
        let shape = |heads, kv_heads, head_dim, window| AttentionShape { heads, kv_heads, head_dim, window };
        vec![
            Case {
                risk: "two sequences do not see each other",
                shape: shape(2, 2, 16, None),
                lengths: [5, 3],
            },
            Case { risk: "grouped queries", shape: shape(6, 2, 32, None), lengths: [20, 17] },
            Case { risk: "a tail after whole tiles", shape: shape(2, 1, 64, None), lengths: [131, 64] },
            Case {
                risk: "a head size without tensor cores",
                shape: shape(2, 1, 40, None),
                lengths: [33, 70],
            },
            Case { risk: "several tiles", shape: shape(2, 2, 128, None), lengths: [700, 389] },
            Case { risk: "grouped queries, wide heads", shape: shape(4, 1, 128, None), lengths: [300, 64] },
            Case { risk: "several tiles of narrow heads", shape: shape(2, 1, 64, None), lengths: [513, 257] },
            Case { risk: "a window over tiles", shape: shape(2, 2, 128, Some(150)), lengths: [650, 130] },
            Case { risk: "sliding window", shape: shape(4, 4, 16, Some(7)), lengths: [150, 6] },
        ]
    }

    fn conforms(device: &impl Attention, tolerance: f64) {
        for Case { risk, shape, lengths } in cases() {
            let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
            let total: usize = lengths.iter().sum();
            let (q, k, v) = (random(1, total * wide), random(2, total * narrow), random(3, total * narrow));
            let mut expected = Vec::new();
            let mut start = 0;
            for length in lengths {
                let part = |x: &[f32], width: usize| x[start * width..(start + length) * width].to_vec();
                expected.extend(reference(
                    &part(&q, wide),
                    &part(&k, narrow),
                    &part(&v, narrow),
                    length,
                    &shape,
                ));
                start += length;
            }
            let tensor =
                |x: &[f32], width: usize| device.tensor(x.to_vec(), (x.len() / width, width)).unwrap();
            let qkv = [tensor(&q, wide), tensor(&k, narrow), tensor(&v, narrow)];
            let y = device.attention(&qkv, &Batch::fresh(lengths), &shape, None).unwrap();
            assert_close(risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
            let thirds: Cuts = |n| vec![0, n / 3, 2 * n / 3, n];
            let all_but_one: Cuts = |n| vec![0, n - 2, n - 1, n];
            for cuts in [thirds, all_but_one] {
                paged_steps_agree(device, risk, &shape, ([&q, &k, &v], lengths, cuts), &expected, tolerance);
            }
        }
    }

    /// Where a sequence of this length is cut into three steps.
    type Cuts = fn(usize) -> Vec<usize>;

    /// The same sequences, fed in three steps through a cache whose blocks lie in a scattered order.
    fn paged_steps_agree(
        device: &impl Attention,
        risk: &str,
        shape: &AttentionShape,
        ([q, k, v], lengths, cuts): ([&[f32]; 3], [usize; 2], Cuts),
        expected: &[f64],
        tolerance: f64,
    ) {
        let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let each = lengths[0].max(lengths[1]).div_ceil(KV_BLOCK_ROWS) as u32;
        let blocks =
            [(0..each).map(|b| b * 2).collect::<Vec<u32>>(), (0..each).rev().map(|b| b * 2 + 1).collect()];
        let mut cache = device.kv_cache(2 * each as usize, narrow).unwrap();
        for step in 0..3 {
            let spans: Vec<_> = lengths.iter().map(|n| cuts(*n)[step]..cuts(*n)[step + 1]).collect();
            let starts = [0, lengths[0]];
            let gather = |x: &[f32], width: usize| {
                let rows: Vec<f32> = spans
                    .iter()
                    .zip(starts)
                    .flat_map(|(span, start)| {
                        x[(start + span.start) * width..(start + span.end) * width].to_vec()
                    })
                    .collect();
                device.tensor(rows.clone(), (rows.len() / width, width)).unwrap()
            };
            let qkv = [gather(q, wide), gather(k, narrow), gather(v, narrow)];
            let sequences = spans
                .iter()
                .zip(&blocks)
                .map(|(span, blocks)| SequenceRows {
                    rows: span.len(),
                    context: span.start,
                    blocks: blocks.clone(),
                })
                .collect();
            let y = device.attention(&qkv, &Batch { sequences }, shape, Some(&mut cache)).unwrap();
            let part: Vec<f64> = spans
                .iter()
                .zip(starts)
                .flat_map(|(span, start)| {
                    expected[(start + span.start) * wide..(start + span.end) * wide].to_vec()
                })
                .collect();
            assert_close(
                &format!("{risk}, paged, step {step}"),
                &device.to_vec(&y).unwrap(),
                &part,
                tolerance,
            );
        }
    }

    /// Steps of one token each from the product on, against the parts one by one on the CPU.
    fn steps_agree_with_the_cpu(device: &impl Attention, tolerance: f64) {
        for (risk, heads, kv_heads, head_dim, window, norms, contexts) in [
            ("the first token", 4, 4, 32, None, false, [0, 0]),
            ("grouped queries", 8, 2, 64, None, false, [37, 300]),
            ("several rounds of keys", 4, 4, 128, None, false, [1100, 127]),
            ("one block a head", 200, 8, 16, None, false, [5, 129]),
            ("many blocks, and rounds of keys", 136, 4, 128, None, false, [300, 99]),
            ("a window", 4, 2, 128, Some(100), false, [700, 99]),
            ("norms of heads", 4, 2, 64, None, true, [40, 515]),
            ("an odd head", 2, 1, 40, None, false, [3, 70]),
        ] {
            let shape = AttentionShape { heads, kv_heads, head_dim, window };
            let width = (heads + 2 * kv_heads) * head_dim;
            let inv_freq: Vec<f32> = (0..head_dim / 2).map(|i| 0.7f32.powi(i as i32)).collect();
            let history = contexts.map(|n| random(n as u64, n.max(1) * width));
            let step = random(77, 2 * width);
            let norm_weights = [random(8, head_dim), random(9, head_dim)];
            let run = |device: &dyn Fn(&[f32], &Batch) -> Vec<f32>| {
                for i in 0..2 {
                    let mut before = batch(contexts, [0, 0]);
                    before.sequences = vec![before.sequences[i].clone()];
                    if contexts[i] > 0 {
                        device(&history[i], &before);
                    }
                }
                device(&step, &batch([1, 1], contexts))
            };
            fn batch(rows: [usize; 2], contexts: [usize; 2]) -> Batch {
                let blocks = [(0..80).rev().collect::<Vec<u32>>(), (80..160).collect()];
                let sequence = |i: usize| SequenceRows {
                    rows: rows[i],
                    context: contexts[i],
                    blocks: blocks[i].clone(),
                };
                Batch { sequences: vec![sequence(0), sequence(1)] }
            }
            fn steps<D: Attention>(
                device: &D,
                shape: AttentionShape,
                (inv_freq, norms): (&[f32], Option<&[Vec<f32>; 2]>),
            ) -> impl Fn(&[f32], &Batch) -> Vec<f32> {
                let cache =
                    std::cell::RefCell::new(device.kv_cache(160, shape.kv_heads * shape.head_dim).unwrap());
                let vector = |x: &[f32]| device.tensor(x.to_vec(), (1, x.len())).unwrap();
                let rope = RopeShape {
                    heads: shape.heads,
                    kv_heads: shape.kv_heads,
                    head_dim: shape.head_dim,
                    inv_freq: device.wide_tensor(inv_freq.to_vec(), (1, inv_freq.len())).unwrap(),
                    norms: norms.map(|[q, k]| crate::QkNorm { q: vector(q), k: vector(k), eps: 1e-6 }),
                };
                let device = device.clone();
                move |qkv, batch| {
                    let qkv = device.tensor(qkv.to_vec(), (batch.rows(), qkv.len() / batch.rows())).unwrap();
                    let mut cache = cache.borrow_mut();
                    let y =
                        device.rope_attention(&qkv, batch, &rope, &shape, Some(&mut cache), None).unwrap();
                    device.to_vec(&y).unwrap()
                }
            }
            let norms = norms.then_some(&norm_weights);
            let expected = run(&steps(&Cpu::new(), shape, (&inv_freq, norms)));
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            assert_close(risk, &run(&steps(device, shape, (&inv_freq, norms))), &expected, tolerance);
        }
    }

    #[test]
    fn a_step_from_the_product_on_agrees_with_its_parts() {
        crate::testing::cards().iter().for_each(|card| steps_agree_with_the_cpu(card, tolerance(card)));
    }

    #[test]
    fn agrees_with_f64_on_the_cpu() {
        conforms(&Cpu::new(), NMSE_F32);
    }

    #[test]
    fn agrees_with_f64_on_cuda() {
        crate::testing::cards().iter().for_each(|card| conforms(card, tolerance(card)));
    }

    #[test]
    fn a_context_without_a_cache_and_a_missing_block_are_refused() {
        let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 2, window: None };
        let mut batch = Batch::fresh([1]);
        batch.sequences[0].context = 16;
        batch.sequences[0].blocks = vec![0];
        assert!(check([(1, 2); 3], &batch, &shape, None).is_err());
        assert!(check([(1, 2); 3], &batch, &shape, Some(4)).is_err());
        batch.sequences[0].blocks = vec![0, 4];
        assert!(check([(1, 2); 3], &batch, &shape, Some(4)).is_err());
    }
}
