//! Against naive f64: the router, and a whole mixture, by one product or expert by expert.

use super::*;
use crate::ops::gated::tests::{ALL, activated};
use crate::packing::Scales;
use crate::testing::{NMSE_F32, NMSE_FIXED, assert_close, random, tolerance};
use crate::{Cpu, Dtype, Quantized};

/// Experts and weights of one token.
fn route_f64(scores: &[f32], bias: Option<&[f32]>, routing: &Routing) -> Vec<(usize, f64)> {
    let exponentials = scores.iter().map(|s| f64::from(*s).exp());
    let total: f64 = exponentials.clone().sum();
    let p: Vec<f64> = match routing.scores {
        RouterScores::Softmax => exponentials.map(|e| e / total).collect(),
        RouterScores::Sigmoid => scores.iter().map(|s| 1.0 / (1.0 + (-f64::from(*s)).exp())).collect(),
    };
    let mut chooses: Vec<f64> =
        (0..p.len()).map(|i| p[i] + bias.map_or(0.0, |bias| bias[i].into())).collect();
    let best = |values: &[f64], count: usize| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
        order.truncate(count);
        order
    };
    if routing.groups > 1 {
        let size = routing.experts / routing.groups;
        let sum = |group: &[f64]| best(group, 2).iter().map(|i| group[*i]).sum();
        let sums: Vec<f64> = chooses.chunks(size).map(sum).collect();
        let kept = best(&sums, routing.groups_kept);
        let dropped = (0..p.len()).filter(|i| !kept.contains(&(i / size)));
        dropped.for_each(|i| chooses[i] = f64::NEG_INFINITY);
    }
    let chosen = best(&chooses, routing.per_token);
    let total: f64 = if routing.renormalise { chosen.iter().map(|e| p[*e]).sum() } else { 1.0 };
    chosen.into_iter().map(|e| (e, p[e] / total * f64::from(routing.factor))).collect()
}

fn routing(experts: usize, per_token: usize, scores: RouterScores) -> Routing {
    Routing { experts, per_token, scores, renormalise: false, groups: 1, groups_kept: 1, factor: 1.0 }
}

fn routes_conform(device: &impl Experts) {
    let softmax = |experts, per_token| routing(experts, per_token, RouterScores::Softmax);
    let sigmoid = |experts, per_token| routing(experts, per_token, RouterScores::Sigmoid);
    for (risk, tokens, step, biased, routing) in [
        ("the best two of eight", 40, 0.0, false, Routing { renormalise: true, ..softmax(8, 2) }),
        ("one token, weights as they are", 1, 0.0, false, softmax(60, 4)),
        ("many experts", 33, 0.0, false, Routing { renormalise: true, ..softmax(128, 8) }),
        ("all experts", 3, 0.0, false, softmax(5, 5)),
        ("one expert", 3, 0.0, false, softmax(1, 1)),
        ("equal scores", 50, 0.5, false, softmax(64, 6)),
        ("a bias chooses, and does not weigh", 20, 0.0, true, sigmoid(32, 4)),
        (
            "groups",
            70,
            0.0,
            true,
            Routing { renormalise: true, groups: 8, groups_kept: 3, factor: 2.5, ..sigmoid(256, 8) },
        ),
        (
            "equal groups, and fewer experts kept than chosen",
            20,
            0.5,
            false,
            Routing { renormalise: true, groups: 4, groups_kept: 1, ..sigmoid(16, 6) },
        ),
        ("groups of one", 9, 0.0, false, Routing { groups: 6, groups_kept: 4, ..softmax(6, 2) }),
    ] {
        let experts = routing.experts;
        let mut scores: Vec<f32> = random(3, tokens * experts).iter().map(|x| 4.0 * x).collect();
        if step > 0.0 {
            scores.iter_mut().for_each(|x| *x = (*x / step).round() * step);
        }
        let bias = biased.then(|| random(4, experts));
        let wide = |x: &[f32]| device.wide_tensor(x.to_vec(), (x.len() / experts, experts)).unwrap();
        let bias_tensor = bias.as_ref().map(|bias| wide(bias));
        let routes = device.route(&wide(&scores), bias_tensor.as_ref(), &routing).unwrap();
        let got = device.routes(&routes).unwrap();
        let expected: Vec<_> =
            scores.chunks(experts).flat_map(|row| route_f64(row, bias.as_deref(), &routing)).collect();
        let chosen = |routes: &mut dyn Iterator<Item = usize>| routes.collect::<Vec<_>>();
        assert_eq!(
            chosen(&mut got.iter().map(|route| route.expert as usize)),
            chosen(&mut expected.iter().map(|route| route.0)),
            "{risk}"
        );
        let weights: Vec<f32> = got.iter().map(|route| route.weight).collect();
        let expected: Vec<f64> = expected.iter().map(|route| route.1).collect();
        assert_close(risk, &weights, &expected, NMSE_F32);
        for wrong in [
            Routing { experts: experts + 1, ..routing },
            Routing { per_token: experts + 1, ..routing },
            Routing { per_token: 0, ..routing },
            Routing { groups: experts + 1, ..routing },
            Routing { groups_kept: routing.groups + 1, ..routing },
        ] {
            assert!(device.route(&wide(&scores), None, &wrong).is_err(), "{risk}: {wrong:?}");
        }
    }
}

fn rows_conform(device: &impl Experts, tolerance: f64) {
    let (tokens, width) = (9, 37);
    let (x, b) = (random(1, tokens * width), random(2, tokens * width));
    let tensor = |x: &[f32]| device.tensor(x.to_vec(), (x.len() / width, width)).unwrap();
    let value = |x: &[f32], i: usize| f64::from(x[i]);

    let weights = random(3, tokens);
    let expected: Vec<f64> = (0..x.len()).map(|i| value(&x, i) * value(&weights, i / width)).collect();
    let y = device.weigh_rows(&tensor(&x), &weights).unwrap();
    assert_close("a weight for each row", &device.to_vec(&y).unwrap(), &expected, tolerance);
    assert!(device.weigh_rows(&tensor(&x), &weights[1..]).is_err(), "a row without a weight");

    let gates: Vec<f32> = random(4, tokens).iter().map(|x| 6.0 * x).collect();
    let sigmoid = |row: usize| 1.0 / (1.0 + (-value(&gates, row)).exp());
    let expected: Vec<f64> = (0..x.len()).map(|i| value(&x, i) + sigmoid(i / width) * value(&b, i)).collect();
    let gate = device.wide_tensor(gates.clone(), (tokens, 1)).unwrap();
    let y = device.add_gated(&tensor(&x), &tensor(&b), &gate).unwrap();
    assert_close("a gate for each row", &device.to_vec(&y).unwrap(), &expected, tolerance);
    let other = device.wide_tensor(gates.clone(), (1, tokens)).unwrap();
    assert!(device.add_gated(&tensor(&x), &tensor(&b), &other).is_err(), "gates in one row");

    let rows = [7, 0, 4];
    let part = &b[..3 * width];
    let mut expected: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    for (i, row) in rows.into_iter().enumerate() {
        for j in 0..width {
            expected[row as usize * width + j] += value(&weights, i) * value(part, i * width + j);
        }
    }
    let mut y = tensor(&x);
    device.scatter_add(&mut y, &tensor(part), &rows, &weights[..3]).unwrap();
    assert_close("rows added to some", &device.to_vec(&y).unwrap(), &expected, tolerance);
    device.scatter_add(&mut y, &device.tensor(vec![], (0, width)).unwrap(), &[], &[]).unwrap();
    assert_close("no rows added", &device.to_vec(&y).unwrap(), &expected, tolerance);
    let mut y = tensor(&x);
    assert!(device.scatter_add(&mut y, &tensor(part), &[0, 1, 9], &weights[..3]).is_err(), "a row beyond");
    assert!(device.scatter_add(&mut y, &tensor(part), &rows[..2], &weights[..2]).is_err(), "a row too many");
}

/// How the weights of a mixture are kept.
#[derive(Clone, Copy, Debug)]
enum Kept {
    Dense(Dtype),
    /// Bits, features of a group, whether groups are scattered, and whether f16 holds the scales.
    Quantized(u32, usize, bool, bool),
}

/// One weight of an expert.
struct Weight {
    kept: Kind,
    /// `[out, in]`
    values: Vec<f32>,
}

enum Kind {
    /// Bytes of the parts that are stacked.
    Dense(Dtype, Vec<Vec<u8>>),
    Quantized(PackedLinear<'static>),
}

impl Weight {
    /// `[out, in]`, of which the parts are stacked; values around 1 / sqrt(in).
    fn new(kept: Kept, parts: &[usize], k: usize, seed: u64) -> Self {
        let n: usize = parts.iter().sum();
        match kept {
            Kept::Dense(dtype) => {
                let stored = |x: &f32| store(x / (k as f32).sqrt(), dtype);
                let (bytes, values): (Vec<_>, Vec<_>) = random(seed, n * k).iter().map(stored).unzip();
                let mut rest = &bytes[..];
                let part = |rows: &usize| rest.split_off(..rows * k).unwrap_or_default().concat();
                Self { kept: Kind::Dense(dtype, parts.iter().map(part).collect()), values }
            }
            Kept::Quantized(bits, group, scattered, narrow) => {
                let max = (1u32 << bits) - 1;
                let group_of = |i: usize| {
                    if scattered { (i * 37 + seed as usize) % k / group } else { i / group }
                };
                let groups = k.div_ceil(group);
                let code = |x: &f32| ((x + 1.0) * 0.5 * max as f32).round() as u8;
                let unit = 2.0 / (max as f32 * (k as f32).sqrt());
                let scale = |x: &f32| half::f16::from_f32(unit * (x.abs() + 0.3).copysign(*x)).to_f32();
                let zero = |x: &f32| 1 + (x.abs() * (max - 1) as f32) as u8;
                let mut solved = Quantized {
                    bits,
                    codes: random(seed, n * k).iter().map(code).collect(),
                    scales: random(seed + 1, groups * n).iter().map(scale).collect(),
                    zeros: random(seed + 2, groups * n).iter().map(zero).collect(),
                    g_idx: (0..k).map(|i| group_of(i) as u32).collect(),
                    losses: vec![0.0; n],
                };
                let mut packed = PackedLinear::pack(&solved, 1).unwrap();
                if !narrow {
                    solved.scales.iter_mut().for_each(|scale| *scale = *scale * 0.987_654_3 + 1e-8);
                    packed.scales = Scales::exact(solved.scales.clone());
                    assert!(matches!(packed.scales, Scales::F32(_)));
                }
                Self { kept: Kind::Quantized(packed), values: solved.dequantized() }
            }
        }
    }

    /// The parts of a dense weight of `k` features.
    fn parts(&self, k: usize) -> Vec<HostTensor<'_>> {
        match &self.kept {
            Kind::Dense(dtype, parts) => {
                let dims = |bytes: &[u8]| vec![bytes.len() / dtype.size() / k, k];
                parts.iter().map(|part| HostTensor::new(*dtype, dims(part), part).unwrap()).collect()
            }
            Kind::Quantized(_) => vec![],
        }
    }

    fn host<'a>((weight, parts): (&'a Self, &'a Vec<HostTensor<'a>>)) -> HostExpert<'a> {
        match &weight.kept {
            Kind::Dense(..) => HostExpert::Dense(parts),
            Kind::Quantized(packed) => HostExpert::Quantized(packed),
        }
    }
}

/// Those of all experts.
fn parts(weights: &[Weight], k: usize) -> Vec<Vec<HostTensor<'_>>> {
    weights.iter().map(|weight| weight.parts(k)).collect()
}

/// A value's bytes, and what it is worth then.
fn store(x: f32, dtype: Dtype) -> (Vec<u8>, f32) {
    match dtype {
        Dtype::F16 => (half::f16::from_f32(x).to_le_bytes().to_vec(), half::f16::from_f32(x).to_f32()),
        Dtype::BF16 => (half::bf16::from_f32(x).to_le_bytes().to_vec(), half::bf16::from_f32(x).to_f32()),
        Dtype::F32 => (x.to_le_bytes().to_vec(), x),
    }
}

/// The mixture as a caller has it where the device has no product for all experts.
fn expert_by_expert<D: Experts>(
    device: &D,
    x: &D::Tensor,
    routes: &[Route],
    per_token: usize,
    (gate_up, down): (&[HostExpert], &[HostExpert]),
    activation: Activation,
) -> D::Tensor {
    let (tokens, hidden) = device.shape(x);
    let mut y = device.tensor(vec![0.0; tokens * hidden], (tokens, hidden)).unwrap();
    let product = |x: &D::Tensor, weight: &HostExpert| match weight {
        HostExpert::Dense(parts) => device.matmul(x, &device.weight(parts, &[]).unwrap()).unwrap(),
        HostExpert::Quantized(packed) => {
            device.quant_matmul(x, &device.quant_weight(packed).unwrap()).unwrap()
        }
    };
    for (expert, (gate_up, down)) in gate_up.iter().zip(down).enumerate() {
        let mine = routes.iter().enumerate().filter(|(_, route)| route.expert as usize == expert);
        let (rows, weights): (Vec<u32>, Vec<f32>) =
            mine.map(|(i, route)| ((i / per_token) as u32, route.weight)).unzip();
        if rows.is_empty() {
            continue;
        }
        let x = device.gather_rows(x, &rows).unwrap();
        let x = device.gated(&product(&x, gate_up), activation).unwrap();
        device.scatter_add(&mut y, &product(&x, down), &rows, &weights).unwrap();
    }
    y
}

/// A mixture, its input, and what it makes of it in f64.
struct Mixture {
    gate_up: Vec<Weight>,
    down: Vec<Weight>,
    hidden: usize,
    middle: usize,
    routing: Routing,
    activation: Activation,
    /// `[tokens, experts]`
    scores: Vec<f32>,
    /// `[tokens, hidden]`
    x: Vec<f32>,
}

impl Mixture {
    fn new(
        tokens: usize,
        (experts, per_token): (usize, usize),
        (hidden, middle): (usize, usize),
        kept: Kept,
    ) -> Self {
        let weights = |parts: &[usize], k: usize, seed: u64| {
            (0..experts as u64).map(|e| Weight::new(kept, parts, k, seed + 7 * e)).collect()
        };
        Self {
            gate_up: weights(&[middle, middle], hidden, 10),
            down: weights(&[hidden], middle, 1000),
            hidden,
            middle,
            routing: Routing { renormalise: true, ..routing(experts, per_token, RouterScores::Softmax) },
            activation: Activation::Silu,
            scores: random(5, tokens * experts).iter().map(|x| 3.0 * x).collect(),
            x: random(6, tokens * hidden),
        }
    }

    fn expected(&self) -> Vec<f64> {
        let tokens = self.x.chunks(self.hidden).zip(self.scores.chunks(self.routing.experts));
        tokens.flat_map(|(x, scores)| self.token(x, scores)).collect()
    }

    fn token(&self, x: &[f32], scores: &[f32]) -> Vec<f64> {
        let dot = |x: &[f64], row: &[f32]| -> f64 { x.iter().zip(row).map(|(x, w)| x * f64::from(*w)).sum() };
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let mut y = vec![0.0; self.hidden];
        for (e, weight) in route_f64(scores, None, &self.routing) {
            let up: Vec<f64> = self.gate_up[e].values.chunks(self.hidden).map(|row| dot(&x, row)).collect();
            let (gates, up) = up.split_at(self.middle);
            let products: Vec<f64> =
                gates.iter().zip(up).map(|(gate, up)| activated(*gate, self.activation) * up).collect();
            let rows = self.down[e].values.chunks(self.middle);
            y.iter_mut().zip(rows).for_each(|(y, row)| *y += weight * dot(&products, row));
        }
        y
    }

    /// By one product for all experts where the device has it, else expert by expert.
    fn on<D: Experts>(&self, device: &D) -> D::Tensor {
        let (gate_up, down) = (parts(&self.gate_up, self.hidden), parts(&self.down, self.middle));
        let gate_up: Vec<_> = self.gate_up.iter().zip(&gate_up).map(Weight::host).collect();
        let down: Vec<_> = self.down.iter().zip(&down).map(Weight::host).collect();
        let (experts, tokens) = (self.routing.experts, self.x.len() / self.hidden);
        let scores = device.wide_tensor(self.scores.clone(), (tokens, experts)).unwrap();
        let routes = device.route(&scores, None, &self.routing).unwrap();
        let x = device.tensor(self.x.clone(), (tokens, self.hidden)).unwrap();
        match device.expert_weights(&gate_up, &down).unwrap() {
            Some(weights) => device.experts(&x, &routes, &weights, self.activation).unwrap(),
            None => {
                let (routes, per_token) = (device.routes(&routes).unwrap(), self.routing.per_token);
                expert_by_expert(device, &x, &routes, per_token, (&gate_up, &down), self.activation)
            }
        }
    }
}

fn mixtures_conform(device: &impl Experts, tolerance: f64) {
    let scattered = |bits, group| Kept::Quantized(bits, group, true, true);
    let in_order = |bits, group| Kept::Quantized(bits, group, false, true);
    for (risk, tokens, experts, per_token, hidden, middle, kept) in [
        ("one token", 1, 8, 2, 128, 96, in_order(4, 32)),
        ("one token, act-order", 1, 8, 3, 128, 192, scattered(4, 64)),
        ("several steps of features", 3, 4, 2, 640, 320, scattered(4, 128)),
        ("dense, one token", 1, 6, 2, 128, 64, Kept::Dense(Dtype::F16)),
        ("dense, of another type", 5, 6, 2, 64, 72, Kept::Dense(Dtype::BF16)),
        ("dense, many tokens", 300, 6, 2, 128, 64, Kept::Dense(Dtype::F16)),
        ("dense, widths that are no tiles", 20, 3, 2, 76, 52, Kept::Dense(Dtype::F16)),
        ("dense, odd widths", 9, 3, 1, 37, 21, Kept::Dense(Dtype::F32)),
        ("tiles of several experts", 100, 8, 4, 128, 96, in_order(4, 64)),
        ("experts without a token", 3, 64, 2, 64, 64, in_order(4, 64)),
        ("more rows of an expert than a tile has", 500, 2, 1, 128, 64, scattered(4, 32)),
        ("one expert for all", 70, 1, 1, 64, 64, in_order(4, 16)),
        ("two bits", 40, 4, 2, 128, 64, scattered(2, 32)),
        ("three bits", 33, 4, 2, 128, 96, scattered(3, 32)),
        ("three bits, many tokens", 150, 4, 2, 128, 96, scattered(3, 64)),
        ("eight bits", 33, 4, 2, 128, 96, scattered(8, 128)),
        ("a short last group", 33, 4, 2, 72, 104, in_order(4, 32)),
        ("a short last group, act-order", 33, 4, 2, 72, 104, scattered(4, 32)),
        ("groups of less than a run", 5, 4, 2, 128, 64, scattered(4, 16)),
        ("no groups", 33, 4, 2, 96, 64, in_order(4, 192)),
        ("scales that f16 does not hold", 12, 4, 2, 128, 64, Kept::Quantized(4, 64, true, false)),
        ("many tokens, in parts", 2100, 16, 4, 64, 32, in_order(4, 32)),
    ] {
        let mixture = Mixture::new(tokens, (experts, per_token), (hidden, middle), kept);
        let got = device.to_vec(&mixture.on(device)).unwrap();
        assert_close(risk, &got, &mixture.expected(), tolerance);
    }
    for activation in ALL {
        let sizes = ((8, 2), (64, 96));
        let mixture = Mixture { activation, ..Mixture::new(40, sizes.0, sizes.1, in_order(4, 32)) };
        let got = device.to_vec(&mixture.on(device)).unwrap();
        assert_close(&format!("{activation:?}"), &got, &mixture.expected(), tolerance);
    }
}

#[test]
fn agrees_with_f64_on_the_cpu() {
    routes_conform(&Cpu::new());
    rows_conform(&Cpu::new(), NMSE_F32);
    mixtures_conform(&Cpu::new(), NMSE_FIXED);
}

#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn agrees_with_f64_on_cuda() {
    crate::testing::gpus().iter().for_each(|gpu| {
        routes_conform(gpu);
        rows_conform(gpu, tolerance(gpu));
        mixtures_conform(gpu, tolerance(gpu));
    });
}
