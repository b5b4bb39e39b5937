//! Grids, targets and refinement against plain loops in f64.

use super::*;
use crate::testing::{assert_close, random};
use crate::{Backend, Cpu, Dtype, Hessian};

/// A weight, and second moments of correlated inputs.
struct Case {
    weights: Vec<f32>,
    rows: usize,
    columns: usize,
    /// `[tokens, columns]`
    x: Vec<f32>,
}

mod target;

const TOKENS: usize = 400;
const DAMP: f32 = 8.0;

impl Case {
    fn new(rows: usize, columns: usize) -> Self {
        let noise = random(7, TOKENS * columns);
        let shared = random(8, TOKENS * 5);
        let mixing = random(9, 5 * columns);
        let value = |i: usize| {
            let (t, j) = (i / columns, i % columns);
            let mixed: f32 = (0..5).map(|k| shared[t * 5 + k] * mixing[k * columns + j]).sum();
            mixed + 0.4 * noise[i]
        };
        let weights = random(10, rows * columns).iter().map(|w| w * w * w).collect();
        Self { weights, rows, columns, x: (0..TOKENS * columns).map(value).collect() }
    }

    fn hessian<D: Hessian>(&self, device: &D) -> D::Matrix {
        let mut hessian = device.hessian(self.columns).unwrap();
        let x = device.tensor(self.x.clone(), (TOKENS, self.columns)).unwrap();
        device.accumulate(&mut hessian, &x).unwrap();
        hessian
    }

    fn order(&self) -> Vec<u32> {
        let columns = self.columns as u32;
        (0..columns).map(|i| (i * 37 + 5) % columns).collect()
    }

    fn grouping(&self, group_size: usize) -> Grouping {
        let group_of = (0..self.columns).map(|place| (place / group_size) as u32).collect();
        let groups = self.columns.div_ceil(group_size);
        Grouping { order: self.order(), group_of, groups, static_groups: false }
    }

    fn start<B: Backend>(&self, backend: &B, grouping: &Grouping, spec: &GridSpec) -> B::Sweep {
        let shape = vec![self.rows, self.columns];
        let weight = HostTensor::new(Dtype::F32, shape, bytemuck::cast_slice(&self.weights)).unwrap();
        let source = backend.sweep_source(&[weight]).unwrap();
        backend.sweep_start(&source, &[], grouping, spec).unwrap()
    }
}

fn spec(bits: u32, sym: bool) -> GridSpec {
    GridSpec { bits, sym, kind: GridKind::Loop, min_zero: 1, f16_scales: true }
}

fn wide(values: Vec<f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

/// `E H E^T + 2 E P^T` of each row, plainly.
fn losses(e: &[f64], h: &[f64], p: &[f64], columns: usize) -> Vec<f64> {
    let rows = e.chunks(columns).zip(p.chunks(columns));
    let loss = |(e, p): (&[f64], &[f64])| -> f64 {
        let along = |i: usize| e.iter().zip(&h[i * columns..]).map(|(e, h)| e * h).sum::<f64>();
        (0..columns).map(|i| e[i] * (along(i) + 2.0 * p[i])).sum()
    };
    rows.map(loss).collect()
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// The share of groups in which the scale is that of a search in f64 on the same weights, and their losses' ratio.
fn search_agrees<B: Backend>(backend: &B, bits: u32, sym: bool, group_size: usize) {
    let (case, spec) = (Case::new(24, 2 * group_size), spec(bits, sym));
    let grouping = case.grouping(group_size);
    let u = backend.inverse_cholesky(&case.hessian(backend), &grouping.order, DAMP).unwrap();
    let mut sweep = case.start(backend, &grouping, &spec);
    let wide_u = wide(backend.matrix_to_vec(&u).unwrap());
    let before = backend.matrix_to_vec(&backend.sweep_weights(&sweep).unwrap()).unwrap();
    for start in (0..group_size).step_by(LOOP_WINDOW) {
        backend.sweep_block(&mut sweep, Some(&u), start..(start + LOOP_WINDOW).min(group_size)).unwrap();
    }
    let after = backend.matrix_to_vec(&backend.sweep_weights(&sweep).unwrap()).unwrap();
    let mut equal = 0;
    for row in 0..case.rows {
        let place = row * case.columns;
        let weights = &before[place..place + group_size];
        let candidates = spec.candidates(weights);
        let errors: Vec<f32> =
            candidates.iter().map(|grid| swept(grid, weights, &wide_u, case.columns) as f32).collect();
        let best = candidates[grid::least(&errors)];
        let on_grid = |q: &f32| (q / best.scale - (q / best.scale).round()).abs() < 1e-3;
        equal += after[place..place + group_size].iter().all(on_grid) as usize;
    }
    println!("{bits} bits, sym {sym}, groups of {group_size}: {equal} of {} rows", case.rows);
    assert!(equal + 1 >= case.rows, "{bits} bits, sym {sym}, groups of {group_size}: {equal}");
}

/// `sum ((w - q) / U_ii)^2` of a sweep in windows.
fn swept(grid: &grid::Grid, weights: &[f32], u: &[f64], size: usize) -> f64 {
    let mut sum = 0.0;
    for start in (0..weights.len()).step_by(LOOP_WINDOW) {
        let end = (start + LOOP_WINDOW).min(weights.len());
        let mut w: Vec<f64> = weights[start..end].iter().map(|w| *w as f64).collect();
        for i in 0..w.len() {
            let row = &u[(start + i) * size + start..];
            let error = (w[i] - grid.value(grid.code(w[i] as f32)) as f64) / row[i];
            sum += error * error;
            (i + 1..w.len()).for_each(|j| w[j] -= error * row[j]);
        }
    }
    sum
}

#[test]
fn windows_hold_whole_groups_where_they_can() {
    let windows = |group_of: Vec<u32>, groups| {
        Grouping { order: vec![], group_of, groups, static_groups: false }.windows()
    };
    let runs = |sizes: &[usize]| -> Vec<u32> {
        sizes.iter().zip(0..).flat_map(|(size, group)| vec![group; *size]).collect()
    };
    assert_eq!(windows(runs(&[96, 40, 88, 128]), 4), (vec![0..96, 96..224, 224..352], true));
    assert_eq!(windows(runs(&[64, 130]), 2), (vec![0..128, 128..194], false));
    assert_eq!(windows([runs(&[64, 8]), runs(&[64])].concat(), 2), (vec![0..128, 128..136], false));
}

#[test]
fn the_search_takes_the_scale_whose_own_sweep_costs_least() {
    for (bits, sym, group_size) in
        [(4, true, 32), (4, true, 128), (3, false, 64), (2, true, 40), (8, true, 300)]
    {
        search_agrees(&Cpu::new(), bits, sym, group_size);
    }
}

fn solve<B: Backend>(backend: &B, case: &Case, grouping: &Grouping, spec: &GridSpec) -> B::Sweep {
    let u = backend.inverse_cholesky(&case.hessian(backend), &grouping.order, DAMP).unwrap();
    let mut sweep = case.start(backend, grouping, spec);
    for start in (0..case.columns).step_by(LOOP_WINDOW) {
        let block = start..(start + LOOP_WINDOW).min(case.columns);
        backend.sweep_block(&mut sweep, Some(&u), block).unwrap();
    }
    sweep
}

/// A round of refinement of one row, plainly: values of the row's codes afterwards.
fn refined(codes: &mut [f64], scales: &mut [f64], w: &[f64], h: &[f64], groups: &Grouping, spec: &GridSpec) {
    let size = w.len();
    let zero = 2f64.powi(spec.bits as i32 - 1);
    let group = |j: usize| groups.group_of[j] as usize;
    let gradient = |codes: &[f64], scales: &[f64], j: usize| -> f64 {
        (0..size).map(|i| (w[i] - (codes[i] - zero) * scales[group(i)]) * h[i * size + j]).sum()
    };
    let (windows, whole) = groups.windows();
    let all_groups = groups.places();
    let refit = |codes: &[f64], scales: &mut [f64], g: usize| {
        let places = &all_groups[g];
        let k = |j: usize| codes[j] - zero;
        let slope: f64 = places.iter().map(|j| k(*j) * gradient(codes, scales, *j)).sum();
        let curvature: f64 = places
            .iter()
            .flat_map(|i| places.iter().map(move |j| (*i, *j)))
            .map(|(i, j)| k(i) * k(j) * h[i * size + j])
            .sum();
        let scale = spec.stored(scales[g] + slope / curvature) as f64;
        let change = scale - scales[g];
        if change * (2.0 * slope - curvature * change) > 0.0 && scale * scales[g] > 0.0 {
            scales[g] = scale;
        }
    };
    for window in windows {
        for j in window.clone() {
            let scale = scales[group(j)];
            let t = (codes[j] - zero) * scale + gradient(codes, scales, j) / h[j * size + j];
            codes[j] = ((t / scale).round_ties_even() + zero).clamp(0.0, 2.0 * zero - 1.0);
        }
        if whole {
            let inside = groups.group_of[window].chunk_by(|a, b| a == b);
            inside.for_each(|run| refit(codes, scales, run[0] as usize));
        }
    }
    if !whole {
        (0..groups.groups).for_each(|g| refit(codes, scales, g));
    }
}

fn refinement_agrees<B: Backend>(backend: &B, group_size: usize, scattered: bool, rough: f32) {
    let (case, spec) = (Case::new(32, 256), spec(3, true));
    let mut grouping = case.grouping(group_size);
    if scattered {
        grouping.static_groups = true;
        grouping.group_of = grouping.order.iter().map(|feature| feature / group_size as u32).collect();
    }
    let mut sweep = solve(backend, &case, &grouping, &spec);
    let target = backend.sweep_weights(&case.start(backend, &grouping, &spec)).unwrap();
    let damped = backend.damped(&case.hessian(backend), &grouping.order, DAMP).unwrap();
    let copy = backend.sweep_copy(&sweep).unwrap();
    let quantized = |sweep| backend.collect(backend.sweep_pack(sweep, 1, None).unwrap().0).unwrap();
    let first = quantized(backend.sweep_copy(&sweep).unwrap());
    let before = backend.sweep_losses(&sweep, &target, &damped, None).unwrap();
    backend.sweep_refine(&mut sweep, &target, &damped, 2).unwrap();
    let after = backend.sweep_losses(&sweep, &target, &damped, None).unwrap();
    for (before, after) in before.iter().zip(&after) {
        assert!(*after <= before * (1.0 + rough), "groups of {group_size}: {before} became {after}");
    }
    let (h, w) =
        (wide(backend.matrix_to_vec(&damped).unwrap()), wide(backend.matrix_to_vec(&target).unwrap()));
    let (codes, scales) = (first.codes(), first.scales.to_f32());
    let mut plain = Vec::new();
    for n in 0..case.rows {
        let place = |j: &u32| codes[n * case.columns + *j as usize] as f64;
        let mut codes: Vec<f64> = grouping.order.iter().map(place).collect();
        let mut scales: Vec<f64> = (0..grouping.groups).map(|g| scales[g * case.rows + n] as f64).collect();
        let w = &w[n * case.columns..][..case.columns];
        for _ in 0..2 {
            refined(&mut codes, &mut scales, w, &h, &grouping, &spec);
        }
        let e = (0..case.columns).map(|j| w[j] - (codes[j] - 4.0) * scales[grouping.group_of[j] as usize]);
        plain.push(losses(&e.collect::<Vec<_>>(), &h, &vec![0.0; case.columns], case.columns)[0]);
    }
    let (ours, plain, start): (f64, f64, f64) =
        (wide(after).iter().sum(), plain.iter().sum(), wide(before).iter().sum());
    println!("groups of {group_size}: {start:.4}, then {ours:.4}; in f64 {plain:.4}");
    assert!(ours < start && (ours / plain - 1.0).abs() < 2e-3, "{start}, {ours}, {plain}");
    let changed = quantized(backend.sweep_copy(&sweep).unwrap());
    backend.sweep_take_rows(&mut sweep, &copy, 3..9).unwrap();
    let mixed = quantized(sweep);
    let row =
        |packed: &PackedLinear, n: usize| packed.dequantized()[n * case.columns..][..case.columns].to_vec();
    for n in 0..case.rows {
        let expected = if (3..9).contains(&n) { &first } else { &changed };
        assert_eq!(row(&mixed, n), row(expected, n), "row {n}");
    }
}

#[test]
fn refinement_lowers_every_loss_as_plain_loops_do() {
    for (group_size, scattered) in [(32, false), (96, false), (128, false), (256, false), (64, true)] {
        refinement_agrees(&Cpu::new(), group_size, scattered, 1e-5);
    }
}

/// What the file says is what the reader computes with, also where scales are negative.
fn negative_scales_are_read<B: Backend>(backend: &B, tolerance: f64) {
    for (bits, sym) in [(2, true), (3, true), (4, true), (8, true), (4, false)] {
        let (case, spec) = (Case::new(64, 256), spec(bits, sym));
        let grouping = case.grouping(64);
        let sweep = solve(backend, &case, &grouping, &spec);
        let values = backend.matrix_to_vec(&backend.sweep_weights(&sweep).unwrap()).unwrap();
        let (packed, _) = backend.sweep_pack(sweep, 1, None).unwrap();
        let dense = backend.packed_weight(&packed).unwrap();
        let packed = backend.collect(packed).unwrap();
        let negative = packed.scales.to_f32().iter().filter(|scale| **scale < 0.0).count();
        assert!(!sym || negative > 64, "{negative} of {} scales are negative", packed.scales.len());
        let mut by_feature = vec![0.0; values.len()];
        for (i, value) in values.iter().enumerate() {
            let (n, feature) = (i / case.columns, grouping.order[i % case.columns] as usize);
            by_feature[n * case.columns + feature] = *value;
        }
        assert_eq!(packed.dequantized(), by_feature, "{bits} bits");
        let weight = backend.quant_weight(&packed).unwrap();
        for tokens in [1, 4, 40] {
            let x = &case.x[..tokens * case.columns];
            let expected = crate::testing::matmul_f64(x, &by_feature, (tokens, case.rows, case.columns));
            let x = backend.tensor(x.to_vec(), (tokens, case.columns)).unwrap();
            for y in [backend.quant_matmul(&x, &weight).unwrap(), backend.matmul(&x, &dense).unwrap()] {
                let risk = format!("{bits} bits, sym {sym}, {tokens} tokens");
                assert_close(&risk, &backend.to_vec(&y).unwrap(), &expected, tolerance);
            }
        }
    }
}

#[test]
fn negative_scales_are_read_as_they_were_solved() {
    negative_scales_are_read(&Cpu::new(), crate::testing::NMSE_FIXED);
}

mod on_cuda {
    use super::*;
    use crate::testing::{gpus, tolerance};
    use crate::{Cuda, Dtype};

    /// The solver works in f32 whatever the compute type is; with this one its inputs are those of the CPU.
    fn gpu() -> Cuda {
        Cuda::new(0, Dtype::F32, None).unwrap()
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn the_search_takes_the_scale_whose_own_sweep_costs_least() {
        for (bits, sym, group_size) in
            [(4, true, 32), (4, true, 128), (3, false, 64), (2, true, 40), (8, true, 300), (4, false, 130)]
        {
            search_agrees(&gpu(), bits, sym, group_size);
        }
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn the_target_is_the_least_squares_solution() {
        target::the_target_solves_its_equation(&gpu(), 1e-6);
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn refinement_lowers_every_loss_as_plain_loops_do() {
        for (group_size, scattered) in [(32, false), (96, false), (128, false), (256, false), (64, true)] {
            refinement_agrees(&gpu(), group_size, scattered, 1e-3);
        }
    }

    #[test]
    #[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
    fn negative_scales_are_read_as_they_were_solved() {
        gpus().iter().for_each(|gpu| negative_scales_are_read(gpu, tolerance(gpu)));
    }
}
