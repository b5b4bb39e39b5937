use super::*;
use crate::Cpu;
use crate::testing::random;

fn params(temperature: f32) -> RowSampling {
    RowSampling { temperature, ..RowSampling::likeliest() }
}

/// Random numbers for draws, as `random` has them for everything else.
fn places(seed: u64, count: usize) -> Vec<u64> {
    random(seed, count).iter().map(|x| ((f64::from(*x) + 1.0) / 2.0 * 2f64.powi(64)) as u64).collect()
}

/// The tokens that can be drawn and their shares, likeliest first, in f64 and by sorting; and how near any decision was,
/// as a share of the mass: what is nearer than rounding may go either way.
fn shares(row: &[f32], params: &RowSampling) -> (Vec<(u32, f64)>, f64) {
    let mut logits: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
    for change in &params.changes {
        let logit = &mut logits[change.id as usize];
        *logit += f64::from(change.added);
        *logit *= f64::from(change.repeated).powi(if *logit > 0.0 { -1 } else { 1 });
    }
    let largest = logits.iter().copied().fold(f64::MIN, f64::max);
    let octaves = |logit: f64| (largest - logit) * std::f64::consts::LOG2_E / f64::from(params.temperature);
    let mut tokens: Vec<(u32, f64, f64)> =
        (0..).zip(logits).map(|(id, logit)| (id, octaves(logit), 0.0)).collect();
    tokens.retain(|token| token.1 < f64::from(OCTAVES));
    tokens.iter_mut().for_each(|token| token.2 = (-token.1).exp2());
    tokens.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    tokens.truncate(if params.top_k > 0 { params.top_k } else { tokens.len() });
    let mut nearest = keep(&mut tokens, params.top_p);
    let farthest = -f64::from(params.min_p).log2();
    // How near a token was to being kept, or not: whether it is decided by rounding.
    let edge = tokens.iter().filter(|token| token.1 > 0.0).map(|token| (token.1 - farthest).abs() * token.2);
    nearest = edge.fold(nearest, f64::min);
    tokens.retain(|token| token.1 <= farthest);
    if params.typical_p < 1.0 {
        let total: f64 = tokens.iter().map(|token| token.2).sum();
        let mean = tokens.iter().map(|token| token.1 * token.2).sum::<f64>() / total;
        tokens.sort_by(|a, b| (a.1 - mean).abs().total_cmp(&(b.1 - mean).abs()).then(a.0.cmp(&b.0)));
        nearest = nearest.min(keep(&mut tokens, params.typical_p));
    }
    tokens.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    let total: f64 = tokens.iter().map(|token| token.2).sum();
    (tokens.iter().map(|token| (token.0, token.2 / total)).collect(), nearest)
}

/// Keeps the first tokens that have a share of the mass together.
fn keep(tokens: &mut Vec<(u32, f64, f64)>, share: f32) -> f64 {
    let total: f64 = tokens.iter().map(|token| token.2).sum();
    let (mut sum, mut nearest, mut kept) = (0.0, 1.0f64, 0);
    while share < 1.0 && kept < tokens.len() && sum / total < f64::from(share) {
        sum += tokens[kept].2;
        nearest = nearest.min((sum / total - f64::from(share)).abs());
        kept += 1;
    }
    tokens.truncate(if share < 1.0 { kept } else { tokens.len() });
    nearest
}

/// Nearer than this a decision depends on how weights are rounded: to 2^-24 of their size.
const ROUNDING: f64 = 3e-7;

fn conforms(device: &impl Sample) {
    let changes = |vocab: usize| -> Vec<Change> {
        let ids = (0..vocab as u32).step_by(3);
        ids.map(|id| Change { id, added: (id % 7) as f32 - 3.0, repeated: 1.0 + (id % 2) as f32 * 0.3 })
            .collect()
    };
    for (risk, vocab, spread, wanted) in [
        ("temperature alone", 1000, 6.0, params(0.8)),
        ("all weigh nearly the same", 5000, 0.01, params(1.0)),
        ("several blocks", 152_064, 20.0, params(1.3)),
        ("one token", 1, 1.0, params(1.0)),
        ("fewer tokens than blocks", 5, 2.0, params(1.0)),
        ("hardly any temperature", 3000, 8.0, params(1e-3)),
        ("top k", 32_003, 9.0, RowSampling { top_k: 40, ..params(0.7) }),
        ("top k of all", 50, 3.0, RowSampling { top_k: 50, ..params(1.0) }),
        ("top k beyond what weighs anything", 500, 60.0, RowSampling { top_k: 400, ..params(0.5) }),
        ("top p", 32_000, 8.0, RowSampling { top_p: 0.9, ..params(1.0) }),
        ("top p of few", 32_000, 40.0, RowSampling { top_p: 0.9, ..params(1.0) }),
        (
            "typical of few",
            152_064,
            30.0,
            RowSampling { top_k: 20, top_p: 0.9, typical_p: 0.5, ..params(1.2) },
        ),
        ("hardly any top p", 700, 3.0, RowSampling { top_p: 1e-6, ..params(1.0) }),
        ("top p of top k", 152_064, 12.0, RowSampling { top_k: 50, top_p: 0.8, ..params(1.5) }),
        ("min p", 32_000, 8.0, RowSampling { min_p: 0.02, ..params(1.0) }),
        ("min p of nearly all", 3000, 2.0, RowSampling { min_p: 0.1, ..params(1.4) }),
        ("min p that keeps the likeliest", 900, 9.0, RowSampling { min_p: 1.0, ..params(1.0) }),
        ("min p of top k", 32_003, 9.0, RowSampling { top_k: 200, min_p: 0.05, ..params(0.9) }),
        (
            "min p that keeps less than top p",
            5000,
            5.0,
            RowSampling { top_p: 0.95, min_p: 0.2, ..params(1.0) },
        ),
        (
            "min p that keeps more than top p",
            5000,
            5.0,
            RowSampling { top_p: 0.3, min_p: 1e-4, ..params(1.0) },
        ),
        ("typical of min p", 2000, 5.0, RowSampling { typical_p: 0.6, min_p: 0.01, ..params(1.0) }),
        (
            "typical of min p of few",
            9000,
            30.0,
            RowSampling { top_k: 60, typical_p: 0.6, min_p: 0.01, ..params(1.2) },
        ),
        ("typical", 900, 4.0, RowSampling { typical_p: 0.4, ..params(1.0) }),
        (
            "typical of top p of top k",
            4000,
            6.0,
            RowSampling { top_k: 300, top_p: 0.95, typical_p: 0.6, ..params(1.0) },
        ),
        ("changes", 2000, 5.0, RowSampling { changes: changes(2000), ..params(0.9) }),
        (
            "changes and everything",
            20_000,
            7.0,
            RowSampling { top_k: 99, top_p: 0.9, changes: changes(20_000), ..params(1.1) },
        ),
    ] {
        let rows = 12;
        let values: Vec<f32> = random(7, rows * vocab).iter().map(|x| x * spread).collect();
        let logits = device.wide_tensor(values.clone(), (rows, vocab)).unwrap();
        let sampling: Vec<RowSampling> =
            places(11, rows).into_iter().map(|random| RowSampling { random, ..wanted.clone() }).collect();
        let got = device.sampled_tokens(&device.sample(&logits, &sampling).unwrap()).unwrap();
        assert_eq!(device.to_vec(&logits).unwrap(), values, "{risk}: the scores are left as they were");
        let mut sure = 0;
        for ((row, params), got) in values.chunks(vocab).zip(&sampling).zip(got) {
            let got = got.unwrap();
            let (shares, mut nearest) = shares(row, params);
            let (mut sum, mut expected) = (0.0, None);
            for (id, share) in shares {
                sum += share;
                nearest = nearest.min((sum - params.random as f64 / 2f64.powi(64)).abs());
                expected = expected.or((sum > params.random as f64 / 2f64.powi(64)).then_some(id));
            }
            if nearest > ROUNDING {
                sure += 1;
                assert_eq!(Some(got.id), expected, "{risk}");
            }
            let largest = row.iter().copied().fold(f32::MIN, f32::max);
            let total: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
            let logprob = f64::from(row[got.id as usize] - largest) - total.ln();
            assert!((f64::from(got.logprob) - logprob).abs() < 1e-4, "{risk}: {} for {logprob}", got.logprob);
        }
        println!("{risk}: {sure} of {rows} sampling are beyond rounding");
        assert!(2 * sure >= rows, "{risk}: the reference decides too little");
    }
}

/// Equal scores and no scores, the likeliest token, and rows that want different things.
fn keeps_to_its_word(device: &impl Sample) {
    let sample = |values: Vec<f32>, vocab: usize, sampling: &[RowSampling]| {
        let logits = device.wide_tensor(values, (sampling.len(), vocab)).unwrap();
        let sampled = device.sampled_tokens(&device.sample(&logits, sampling).unwrap()).unwrap();
        sampled.into_iter().map(|sampled| sampled.map(|sampled| sampled.id)).collect::<Vec<_>>()
    };
    let likeliest = RowSampling::likeliest();
    assert_eq!(sample(vec![1.0, 3.0, 3.0, f32::NAN], 4, std::slice::from_ref(&likeliest)), [Some(1)]);
    assert_eq!(sample(vec![-5.0, f32::NEG_INFINITY, f32::INFINITY], 3, &[params(1.0)]), [Some(0)]);
    assert_eq!(sample(vec![1.0, 1.0 + 1e-6], 2, &[params(1e-44)]), [Some(1)], "temperatures near zero");
    let nothing = vec![f32::NAN, f32::NEG_INFINITY, 1.0, 2.0];
    assert_eq!(sample(nothing, 2, &[params(1.0), likeliest.clone()]), [None, Some(1)]);
    let equal =
        |share: f64, top_k| RowSampling { random: (share * 2f64.powi(64)) as u64, top_k, ..params(1.0) };
    let sampling: Vec<RowSampling> =
        [(0.0, 0), (0.501, 0), (0.999_999, 0), (0.999_999, 3)].map(|(u, k)| equal(u, k)).into();
    let ids = sample(vec![2.5; 4 * 4000], 4000, &sampling);
    assert_eq!(ids, [Some(0), Some(2004), Some(3999), Some(2)], "of equal ones the smaller ids are likelier");
    let penalty = |repeated, added| RowSampling {
        changes: vec![Change { id: 0, added, repeated }],
        ..likeliest.clone()
    };
    let values = vec![3.0, 2.0, -1.0, -1.5, 3.0, 2.0];
    let sampling = [penalty(2.0, 0.0), penalty(2.0, 0.0), penalty(1.0, -1.5)];
    assert_eq!(sample(values, 2, &sampling), [Some(1); 3], "the penalty works on either sign");
    let never = Change { id: 0, added: f32::NEG_INFINITY, repeated: 1.0 };
    for (temperature, repeated) in [(0.0, 1.0), (1.0, 1.0), (0.0, 1.3), (1.0, 1.3)] {
        let changes = vec![Change { repeated, ..never }];
        let forbidden = RowSampling { random: 0, changes, ..params(temperature) };
        assert_eq!(sample(vec![9.0, 1.0], 2, &[forbidden]), [Some(1)], "an id that is forbidden");
    }
    let wrong =
        RowSampling { changes: vec![Change { id: 9, added: 0.0, repeated: 1.0 }], ..likeliest.clone() };
    let logits = device.wide_tensor(vec![0.0; 9], (1, 9)).unwrap();
    for sampling in [
        vec![wrong],
        vec![params(-1.0)],
        vec![params(f32::NAN)],
        vec![RowSampling { top_p: 0.0, ..params(1.0) }],
        vec![],
        vec![RowSampling { min_p: 1.5, ..params(1.0) }],
        vec![RowSampling { min_p: f32::NAN, ..params(1.0) }],
    ] {
        assert!(device.sample(&logits, &sampling).is_err(), "{sampling:?}");
    }
}

fn follows_the_probabilities(device: &impl Sample) {
    let rows = 20_000;
    let logits = [1f32.ln(), 2f32.ln(), 7f32.ln()].repeat(rows);
    let logits = device.wide_tensor(logits, (rows, 3)).unwrap();
    let sampling: Vec<RowSampling> =
        places(5, rows).into_iter().map(|random| RowSampling { random, ..params(1.0) }).collect();
    let sampled = device.sampled_tokens(&device.sample(&logits, &sampling).unwrap()).unwrap();
    for (id, expected) in [0.1, 0.2, 0.7].into_iter().enumerate() {
        let count = sampled.iter().flatten().filter(|sampled| sampled.id as usize == id).count();
        // Four standard deviations of 20,000 draws.
        assert!((count as f64 / rows as f64 - expected).abs() < 0.014, "{count} of {rows} for {expected}");
    }
}

#[test]
fn agrees_with_f64_on_the_cpu() {
    conforms(&Cpu::new());
    keeps_to_its_word(&Cpu::new());
    follows_the_probabilities(&Cpu::new());
}

#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn agrees_with_f64_on_cuda() {
    for gpu in crate::testing::gpus() {
        conforms(&gpu);
        keeps_to_its_word(&gpu);
        follows_the_probabilities(&gpu);
    }
}

/// However many blocks share a row: weights are integers, and their sums do not depend on the order.
#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_card_samples_what_the_cpu_draws() {
    for gpu in crate::testing::gpus() {
        for (rows, vocab) in [(1, 152_064), (3, 32_000), (40, 9_999), (100, 32_768), (200, 1000)] {
            let values: Vec<f32> = random(rows as u64, rows * vocab).iter().map(|x| 9.0 * x).collect();
            let ids = |device: &dyn Fn(&[RowSampling]) -> Vec<Option<SampledToken>>| -> Vec<Option<u32>> {
                let sampling = places(vocab as u64, rows).into_iter().enumerate().map(|(i, random)| {
                    let (top_k, top_p) = ([0, 7, 300][i % 3], [1.0, 0.9][i % 2]);
                    let (min_p, typical_p) = ([0.0, 0.03][i / 3 % 2], [1.0, 1.0, 0.5][i / 2 % 3]);
                    RowSampling { random, top_k, top_p, min_p, typical_p, ..params(0.9) }
                });
                let sampled = device(&sampling.collect::<Vec<_>>());
                sampled.into_iter().map(|sampled| sampled.map(|sampled| sampled.id)).collect()
            };
            let cpu = Cpu::new();
            let on_cpu = cpu.wide_tensor(values.clone(), (rows, vocab)).unwrap();
            let on_gpu = gpu.wide_tensor(values, (rows, vocab)).unwrap();
            let by_cpu =
                ids(&|sampling| cpu.sampled_tokens(&cpu.sample(&on_cpu, sampling).unwrap()).unwrap());
            let by_gpu =
                ids(&|sampling| gpu.sampled_tokens(&gpu.sample(&on_gpu, sampling).unwrap()).unwrap());
            assert_eq!(by_gpu, by_cpu, "{rows} rows of {vocab}");
        }
    }
}
