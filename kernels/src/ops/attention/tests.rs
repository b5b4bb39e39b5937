//! Against a naive f64 reference, whichever way a sequence is fed; steps on a GPU against their parts on the CPU.

use super::kv_cache::quantize;
use super::*;
use crate::testing::{NMSE_F32, assert_close, random, tolerance};
use crate::{Cpu, Cuda, Dtype, Pairing, QueryGrowth, SequenceRows};

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
                let score = dot * shape.scale as f64;
                shape.soft_cap.map_or(score, |cap| cap as f64 * (score / cap as f64).tanh()).exp()
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
    let shape = |heads, kv_heads, head_dim, window| AttentionShape {
        window,
        ..AttentionShape::new(heads, kv_heads, head_dim)
    };
    let scaled = AttentionShape { scale: 0.3, ..AttentionShape::new(4, 2, 64) };
    // Scores reach about half the cap, where it bends them.
    let capped = |heads, kv_heads, head_dim, window| AttentionShape {
        soft_cap: Some(2.0),
        scale: 0.3,
        ..shape(heads, kv_heads, head_dim, window)
    };
    vec![
        Case { risk: "scores scaled by another factor", shape: scaled, lengths: [40, 129] },
        Case { risk: "two sequences do not see each other", shape: shape(2, 2, 16, None), lengths: [5, 3] },
        Case { risk: "grouped queries", shape: shape(6, 2, 32, None), lengths: [20, 17] },
        Case { risk: "a tail after whole tiles", shape: shape(2, 1, 64, None), lengths: [131, 64] },
        Case { risk: "a head size without tensor cores", shape: shape(2, 1, 40, None), lengths: [33, 70] },
        Case { risk: "several tiles", shape: shape(2, 2, 128, None), lengths: [700, 389] },
        Case { risk: "grouped queries, wide heads", shape: shape(4, 1, 128, None), lengths: [300, 64] },
        Case { risk: "few rows over several tiles", shape: shape(2, 1, 128, None), lengths: [180, 151] },
        Case { risk: "several tiles of narrow heads", shape: shape(2, 1, 64, None), lengths: [513, 257] },
        Case { risk: "a window over tiles", shape: shape(2, 2, 128, Some(150)), lengths: [650, 130] },
        Case {
            risk: "more tiles than a GPU has multiprocessors",
            shape: shape(40, 8, 128, None),
            lengths: [260, 70],
        },
        Case { risk: "the same, narrow heads", shape: shape(48, 8, 64, None), lengths: [260, 130] },
        Case { risk: "sliding window", shape: shape(4, 4, 16, Some(7)), lengths: [150, 6] },
        Case { risk: "heads of 256", shape: shape(4, 2, 256, None), lengths: [300, 65] },
        Case { risk: "heads of 256, a window", shape: shape(2, 1, 256, Some(40)), lengths: [200, 33] },
        Case { risk: "capped scores", shape: capped(2, 1, 64, None), lengths: [150, 64] },
        Case { risk: "capped scores of wide heads", shape: capped(2, 2, 128, None), lengths: [700, 130] },
        Case {
            risk: "capped scores of heads of 256",
            shape: capped(2, 1, 256, Some(64)),
            lengths: [190, 129],
        },
        Case { risk: "capped scores without tensor cores", shape: capped(2, 1, 40, None), lengths: [33, 70] },
    ]
}

/// Keys or values as a cache keeps them.
fn kept(x: &[f32], head_dim: usize, dtype: KvDtype) -> Vec<f32> {
    let head = |x: &[f32]| -> Vec<f32> {
        let mut codes = vec![0; head_dim];
        let scale = quantize(x, &mut codes);
        codes.iter().map(|code| *code as f32 * scale).collect()
    };
    match dtype {
        KvDtype::Auto => x.to_vec(),
        KvDtype::Int8 => x.chunks_exact(head_dim).flat_map(head).collect(),
    }
}

/// Both sequences of a case, each on its own.
fn references([q, k, v]: [&[f32]; 3], lengths: [usize; 2], shape: &AttentionShape) -> Vec<f64> {
    let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let one = |start: usize, length: usize| {
        let part = |x: &[f32], width: usize| x[start * width..(start + length) * width].to_vec();
        reference(&part(q, wide), &part(k, narrow), &part(v, narrow), length, shape)
    };
    [one(0, lengths[0]), one(lengths[0], lengths[1])].concat()
}

/// With codes the reference sees what `quantize` makes of the same keys and values. In f32 a backend makes the same
/// codes, bit for bit; in 16 bits keys and values are rounded before, so that some codes are off by one. They are about
/// one in thirty, with an error of a step where numbers are 70 steps large: 7e-6 of the square.
fn conforms(device: &impl Attention, tolerance: f64) {
    for Case { risk, shape, lengths } in cases() {
        let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let total: usize = lengths.iter().sum();
        let (q, k, v) = (random(1, total * wide), random(2, total * narrow), random(3, total * narrow));
        let tensor = |x: &[f32], width: usize| device.tensor(x.to_vec(), (x.len() / width, width)).unwrap();
        let qkv = [tensor(&q, wide), tensor(&k, narrow), tensor(&v, narrow)];
        let y = device.attention(&qkv, &Batch::fresh(lengths), &shape, None).unwrap();
        let expected = references([&q, &k, &v], lengths, &shape);
        assert_close(risk, &device.to_vec(&y).unwrap(), &expected, tolerance);
        let thirds: Cuts = |n| vec![0, n / 3, 2 * n / 3, n];
        let all_but_one: Cuts = |n| vec![0, n - 2, n - 1, n];
        let one_of_both: Cuts =
            |n| if n % 2 == 0 { vec![0, n - 2, n - 1, n] } else { vec![0, n / 3, n / 2, n] };
        for dtype in [KvDtype::Auto, KvDtype::Int8] {
            let seen = [&k, &v].map(|x| kept(x, shape.head_dim, dtype));
            let expected = references([&q, &seen[0], &seen[1]], lengths, &shape);
            for cuts in [thirds, all_but_one, one_of_both] {
                let fed = ([&q[..], &k, &v], lengths, cuts);
                paged_steps_agree(device, risk, (&shape, dtype), fed, &expected, tolerance);
            }
        }
    }
}

/// Where a sequence of this length is cut into three steps.
type Cuts = fn(usize) -> Vec<usize>;

fn cache<D: Attention>(device: &D, blocks: usize, shape: &AttentionShape, dtype: KvDtype) -> D::KvCache {
    let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
    device.kv_caches(1, KvShape { blocks, kv_heads, head_dim, dtype }).unwrap().remove(0)
}

/// The same sequences, fed in three steps through a cache whose blocks lie in a scattered order.
fn paged_steps_agree(
    device: &impl Attention,
    risk: &str,
    (shape, dtype): (&AttentionShape, KvDtype),
    ([q, k, v], lengths, cuts): ([&[f32]; 3], [usize; 2], Cuts),
    expected: &[f64],
    tolerance: f64,
) {
    let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let each = lengths[0].max(lengths[1]).div_ceil(KV_BLOCK_ROWS) as u32;
    let blocks =
        [(0..each).map(|b| b * 2).collect::<Vec<u32>>(), (0..each).rev().map(|b| b * 2 + 1).collect()];
    let mut cache = cache(device, 2 * each as usize, shape, dtype);
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
        let risk = format!("{risk}, {dtype:?}, paged, step {step}");
        assert_close(&risk, &device.to_vec(&y).unwrap(), &part, tolerance);
    }
}

/// What is done with heads before they attend.
#[derive(Clone, Copy)]
struct Turning {
    norms: bool,
    /// Norms over all heads together.
    whole: bool,
    turned: Option<usize>,
    neighbours: bool,
    stretch: f32,
    grows: bool,
    /// Sequences have frequencies of their own.
    own: bool,
}

const PLAIN: Turning = Turning {
    norms: false,
    whole: false,
    turned: None,
    neighbours: false,
    stretch: 1.0,
    grows: false,
    own: false,
};

/// One layer with its cache, from the product on.
struct Steps<D: Attention> {
    device: D,
    shape: AttentionShape,
    rope: RopeShape<D::Tensor>,
    cache: D::KvCache,
}

impl<D: Attention> Steps<D> {
    fn new(device: &D, shape: AttentionShape, turning: Turning, dtype: KvDtype) -> Self {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let bases: &[f32] = if turning.own { &[0.7, 0.5] } else { &[0.7] };
        let powers = |base: &f32| (0..head_dim / 2).map(|i| base.powi(i as i32)).collect::<Vec<_>>();
        let inv_freq: Vec<f32> = bases.iter().flat_map(powers).collect();
        let vector = |seed, width| device.tensor(random(seed, width), (1, width)).unwrap();
        let (q_width, k_width) = match turning.whole {
            true => (heads * head_dim, kv_heads * head_dim),
            false => (head_dim, head_dim),
        };
        let inv_freq = device.wide_tensor(inv_freq, (bases.len(), head_dim / 2)).unwrap();
        let rope = RopeShape {
            norms: (turning.norms || turning.whole).then(|| crate::QkNorm {
                q: vector(8, q_width),
                k: vector(9, k_width),
                eps: 1e-6,
            }),
            turned: turning.turned.unwrap_or(head_dim),
            pairing: if turning.neighbours { Pairing::Neighbours } else { Pairing::Halves },
            stretch: turning.stretch,
            query_growth: turning.grows.then_some(QueryGrowth { beta: 0.2, original: 30 }),
            ..RopeShape::halves(heads, kv_heads, head_dim, inv_freq)
        };
        Self { device: device.clone(), shape, rope, cache: cache(device, 160, &shape, dtype) }
    }

    fn attend(&mut self, qkv: Vec<f32>, batch: &Batch) -> Vec<f32> {
        let rows = batch.rows();
        let width = qkv.len() / rows;
        let qkv = self.device.tensor(qkv, (rows, width)).unwrap();
        let cache = Some(&mut self.cache);
        let y = self.device.rope_attention(&qkv, batch, &self.rope, &self.shape, cache, None).unwrap();
        self.device.to_vec(&y).unwrap()
    }

    /// What is made of two new tokens each after contexts of these lengths, the second of which sees the first; and then of
    /// one token of one sequence beside several of the other, in turns.
    fn after(&mut self, contexts: [usize; 2]) -> Vec<f32> {
        let width = (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim;
        let blocks = [(0..80).rev().collect::<Vec<u32>>(), (80..160).collect()];
        let sequence = |i: usize, rows, context| SequenceRows { rows, context, blocks: blocks[i].clone() };
        let before: Vec<_> =
            (0..2).filter(|i| contexts[*i] > 0).map(|i| sequence(i, contexts[i], 0)).collect();
        if !before.is_empty() {
            let before = Batch { sequences: before };
            self.attend(random(7, before.rows() * width), &before);
        }
        let mut seen = contexts;
        let mut step = |rows: [usize; 2]| {
            let sequences = (0..2).map(|i| sequence(i, rows[i], seen[i])).collect();
            seen = [seen[0] + rows[0], seen[1] + rows[1]];
            self.attend(random(77 + seen[0] as u64, (rows[0] + rows[1]) * width), &Batch { sequences })
        };
        [[1, 1], [1, 1], [1, 67], [67, 1]].map(&mut step).concat()
    }
}

/// Steps of one token each from the product on, against the parts one by one on the CPU.
fn steps_agree_with_the_cpu(gpu: &Cuda) {
    let norms = Turning { norms: true, ..PLAIN };
    let part = Turning { turned: Some(24), stretch: 1.2, ..PLAIN };
    let neighbours = Turning { neighbours: true, norms: true, ..PLAIN };
    let grows = Turning { grows: true, ..PLAIN };
    let all = Turning { turned: Some(64), neighbours: true, grows: true, norms: true, stretch: 0.9, ..PLAIN };
    for (risk, heads, kv_heads, head_dim, window, turning, cap, contexts) in [
        ("the first token", 4, 4, 32, None, PLAIN, None, [0, 0]),
        ("grouped queries", 8, 2, 64, None, PLAIN, None, [37, 300]),
        ("several rounds of keys", 4, 4, 128, None, PLAIN, None, [1100, 127]),
        ("six blocks a head", 20, 4, 64, None, PLAIN, None, [200, 31]),
        ("one block a head", 200, 8, 16, None, PLAIN, None, [5, 129]),
        ("many blocks, and rounds of keys", 136, 4, 128, None, PLAIN, None, [300, 99]),
        ("many blocks of narrow heads", 136, 8, 32, None, PLAIN, None, [600, 15]),
        ("a window", 4, 2, 128, Some(100), PLAIN, None, [700, 99]),
        ("many blocks and a window", 136, 4, 64, Some(77), PLAIN, None, [500, 60]),
        ("norms of heads", 4, 2, 64, None, norms, None, [40, 515]),
        ("an odd head", 2, 1, 40, None, PLAIN, None, [3, 70]),
        ("a part of the head, stretched", 4, 2, 64, None, part, None, [40, 515]),
        ("neighbours", 8, 4, 128, None, neighbours, None, [90, 300]),
        ("queries grow", 4, 2, 32, None, grows, None, [140, 29]),
        ("capped scores", 4, 2, 128, Some(120), PLAIN, Some(1.5), [300, 90]),
        ("everything, many blocks", 136, 4, 128, None, all, Some(2.0), [300, 99]),
        ("norms over all heads", 6, 2, 64, None, Turning { whole: true, ..PLAIN }, None, [40, 300]),
        ("heads of 256", 4, 2, 256, Some(90), part, Some(1.5), [200, 31]),
        ("frequencies of each sequence", 4, 2, 64, None, Turning { own: true, ..PLAIN }, None, [40, 300]),
    ] {
        // Another factor than the usual one for some, so that no path has its own.
        let scale = if turning.norms { 0.2 } else { 1.0 / (head_dim as f32).sqrt() };
        let plain = AttentionShape::new(heads, kv_heads, head_dim);
        let shape = AttentionShape { window, scale, soft_cap: cap, ..plain };
        for dtype in [KvDtype::Auto, KvDtype::Int8] {
            let expected = Steps::new(&Cpu::new(), shape, turning, dtype).after(contexts);
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            let got = Steps::new(gpu, shape, turning, dtype).after(contexts);
            assert_close(&format!("{risk}, {dtype:?}"), &got, &expected, step_tolerance(gpu, dtype));
        }
    }
}

/// Keys come from sines that a GPU has to a last place or two, about 1e-7. Of codes up to 127 that lets one in ten
/// thousand fall to the other side, with an error of a step where numbers are 70 steps large: 2e-8 of the square.
fn step_tolerance(gpu: &Cuda, dtype: KvDtype) -> f64 {
    match (gpu.dtype(), dtype) {
        (Dtype::F32, KvDtype::Int8) => 1e-7,
        _ => tolerance(gpu),
    }
}

#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_step_from_the_product_on_agrees_with_its_parts() {
    crate::testing::gpus().iter().for_each(steps_agree_with_the_cpu);
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

#[test]
fn a_context_without_a_cache_a_missing_block_and_another_head_are_refused() {
    let shape = AttentionShape::new(1, 1, 2);
    let cache = KvShape { blocks: 4, kv_heads: 1, head_dim: 2, dtype: KvDtype::Auto };
    let mut batch = Batch::fresh([1]);
    batch.sequences[0].context = 16;
    batch.sequences[0].blocks = vec![0];
    assert!(check([(1, 2); 3], &batch, &shape, None).is_err());
    assert!(check([(1, 2); 3], &batch, &shape, Some(&cache)).is_err());
    batch.sequences[0].blocks = vec![0, 4];
    assert!(check([(1, 2); 3], &batch, &shape, Some(&cache)).is_err());
    batch.sequences[0].blocks = vec![0, 3];
    assert!(check([(1, 2); 3], &batch, &shape, Some(&cache)).is_ok());
    let other = KvShape { kv_heads: 2, head_dim: 1, ..cache };
    assert!(check([(1, 2); 3], &batch, &shape, Some(&other)).is_err());
}

const ODD_HEAD: KvShape = KvShape { blocks: 1, kv_heads: 1, head_dim: 20, dtype: KvDtype::Int8 };

#[test]
fn codes_of_an_odd_head_are_refused() {
    assert!(Cpu::new().kv_caches(1, ODD_HEAD).is_err());
}

#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn codes_of_an_odd_head_are_refused_on_cuda() {
    crate::testing::gpus().iter().for_each(|gpu| assert!(gpu.kv_caches(1, ODD_HEAD).is_err()));
}
