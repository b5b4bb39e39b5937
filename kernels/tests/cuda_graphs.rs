//! A captured step of a mixture of experts, with every factor that a model may put around it.
//!
//! In a process of its own: a synchronisation of the whole GPU by another test, as dropping a cuBLAS handle causes, ends a
//! graph.

use gptq_kernels::packing::PackedLinear;
use gptq_kernels::{
    Activation, Add, Batch, Cuda, Device, Dtype, Experts, HostExpert, MatMul, Quantized, Result,
    RouterScores, Routing, Scale,
};

const TOKENS: usize = 3;
const HIDDEN: usize = 128;
const MIDDLE: usize = 96;
const EXPERTS: usize = 8;

/// Values in (-1, 1).
fn values(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 + seed * 101) % 199) as f32 / 100.0 - 0.99).collect()
}

/// Four bits, groups of 32 scattered features.
fn packed(n: usize, k: usize, seed: usize) -> PackedLinear<'static> {
    let groups = k / 32;
    let solved = Quantized {
        bits: 4,
        codes: (0..n * k).map(|i| ((i * 7 + seed) % 16) as u8).collect(),
        scales: values(seed, groups * n).iter().map(|x| half::f16::from_f32(x / 64.0).to_f32()).collect(),
        zeros: vec![8; groups * n],
        g_idx: (0..k).map(|i| (i * 37 % k / 32) as u32).collect(),
        losses: vec![0.0; n],
    };
    PackedLinear::pack(&solved, 1).unwrap()
}

#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_step_with_experts_is_replayed_on_cuda() {
    let gate_up: Vec<_> = (0..EXPERTS).map(|e| packed(2 * MIDDLE, HIDDEN, e)).collect();
    let down: Vec<_> = (0..EXPERTS).map(|e| packed(HIDDEN, MIDDLE, 100 + e)).collect();
    let gate_up: Vec<_> = gate_up.iter().map(HostExpert::Quantized).collect();
    let down: Vec<_> = down.iter().map(HostExpert::Quantized).collect();
    let routing = Routing {
        experts: EXPERTS,
        per_token: 2,
        scores: RouterScores::Softmax,
        renormalise: true,
        groups: 1,
        groups_kept: 1,
        factor: 1.0,
    };
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
        let gpu = Cuda::new(0, dtype, None).unwrap();
        let weights = gpu.expert_weights(&gate_up, &down).unwrap().expect("a product of all experts");
        let router = values(20, EXPERTS * HIDDEN);
        let router = gpu.weight_from_f32(router, (EXPERTS, HIDDEN), None).unwrap();
        let gate = gpu.weight_from_f32(values(21, HIDDEN), (1, HIDDEN), None).unwrap();
        let x = gpu.tensor(values(22, TOKENS * HIDDEN), (TOKENS, HIDDEN)).unwrap();
        let mut step = || -> Result<_> {
            let x = gpu.scale(&x, 0.5)?;
            let scores = gpu.cap_scores(&gpu.logits(&x, &router)?, 2.0, Some(30.0))?;
            let routes = gpu.route(&scores, None, &routing)?;
            let y = gpu.experts(&x, &routes, &weights, Activation::Silu)?;
            let y = gpu.add_gated(&y, &x, &gpu.logits(&x, &gate)?)?;
            gpu.add(&gpu.add_scaled(&x, &y, 0.25)?, &x)
        };
        let expected = gpu.to_vec(&step().unwrap()).unwrap();
        let batch = Batch::fresh([TOKENS]);
        let graph = gpu.capture(&batch, &mut step).unwrap().expect("a graph");
        for _ in 0..3 {
            let y = gpu.replay(&graph, &batch).unwrap().expect("the shape that was captured");
            assert_eq!(gpu.to_vec(&y).unwrap(), expected, "{dtype:?}");
        }
    }
}
