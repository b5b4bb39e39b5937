//! What the conformance tests of all operations share: seeded inputs, the f64 comparison, the tolerances.

use crate::Dtype;

/// Largest normalised mean squared error, `sum (got - expected)^2 / sum expected^2`, of a backend in f32: rounding gives about 1e-14, a wrong element far more.
pub(crate) const NMSE_F32: f64 = 1e-11;

/// The same of a product whose inputs become integers of 16 bits: rounding them gives 2e-10 where they are uniform, 6e-10
/// where they are normal, and a gate or a second product a few times that.
pub(crate) const NMSE_FIXED: f64 = 1e-8;

/// The same of a backend with 16-bit activations, inputs rounded to them included.
pub(crate) const NMSE_HALF: f64 = 5e-4;

/// A GPU in each compute type. Tests that call this are ignored where the build saw no GPU.
pub(crate) fn gpus() -> Vec<crate::Cuda> {
    let types = [Dtype::F16, Dtype::BF16, Dtype::F32];
    let gpu = |dtype| crate::Cuda::new(0, dtype, None).unwrap_or_else(|error| panic!("{error}"));
    types.map(gpu).into()
}

/// What a GPU may miss the f64 reference by.
pub(crate) fn tolerance(gpu: &crate::Cuda) -> f64 {
    if gpu.dtype() == Dtype::F32 { NMSE_F32 } else { NMSE_HALF }
}

/// Deterministic values in (-1, 1), from a 64-bit linear congruential generator.
pub(crate) fn random(seed: u64, length: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    };
    next();
    (0..length).map(|_| next()).collect()
}

/// Fails when `got` is farther from the f64 reference than `tolerance`; prints the margin.
pub(crate) fn assert_close(risk: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{risk}: length");
    let error: f64 = got.iter().zip(expected).map(|(g, e)| (*g as f64 - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    let nmse = error / norm.max(f64::MIN_POSITIVE);
    println!("{risk}: nmse {nmse:.1e}, {:.0} times below the limit", tolerance / nmse.max(1e-30));
    assert!(nmse <= tolerance, "{risk}: nmse {nmse:.2e} above {tolerance:.0e}");
}

/// `x W^T` in f64: x `[m, k]`, w `[n, k]`.
pub(crate) fn matmul_f64(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let product = |m: usize, n: usize| (0..k).map(|i| x[m * k + i] as f64 * w[n * k + i] as f64).sum();
    (0..m * n).map(|i| product(i / n, i % n)).collect()
}
