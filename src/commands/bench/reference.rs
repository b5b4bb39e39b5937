//! `gptq bench reference`: what the error that GPTQ leaves comes to at real shapes, against rounding to nearest and
//! against the same algorithm written plainly in f64.

use anyhow::{Result, anyhow};
use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, MatRef, Side};
use gptq_kernels::packing::PackedLinear;
use gptq_kernels::{Backend, Dtype, HostTensor};
use gptq_quantizer::gptq::{GptqParams, Method, StageWeights, solve};
use gptq_quantizer::moments::Evidence;
use gptq_quantizer::plan::Branch;
use gptq_runtime::config::ModelConfig;
use gptq_runtime::layout::{self, LinearGroup, LinearSpec};
use half::f16;
use rayon::prelude::*;
use serde::Serialize;

use crate::args::ReferenceBenchArgs;
use crate::commands::common::{self, Chosen};
use crate::commands::table;
use crate::output;
use crate::progress::Progress;

/// Directions that the inputs mostly lie in, of all their features.
const RANK: usize = 256;

/// Tokens whose inputs exist at once.
const TILE: usize = 4096;

pub fn run(args: &ReferenceBenchArgs) -> Result<()> {
    let config = table::config(&args.arch)?;
    let (device, rows) = match common::device(args.device, &config)? {
        Chosen::Cpu(cpu) => measure(&cpu, args, &config)?,
        Chosen::Gpu(gpu) => measure(&gpu, args, &config)?,
    };
    if args.json {
        return Ok(output::json(&rows)?);
    }
    let ReferenceBenchArgs { layers, arch, tokens, .. } = args;
    say!("{layers} layers of {arch}, 4-bit 128g act-order, {tokens} correlated inputs, on {device}\n")?;
    say!("layer  linear                   GPTQ / RTN    GPTQ / f64 GPTQ    codes equal")?;
    for Row { layer, linear, against_rtn, against_f64, codes_equal } in &rows {
        let equal = 100.0 * codes_equal;
        say!("{layer:>5}  {linear:<18} {against_rtn:>16.4} {against_f64:>18.5} {equal:>12.2} %")?;
    }
    Ok(())
}

/// One linear: objectives `sum (w - q) H (w - q)^T` of the sampled rows, as ratios.
#[derive(Serialize)]
struct Row {
    layer: usize,
    linear: String,
    against_rtn: f64,
    against_f64: f64,
    /// Share of codes that the f64 reference finds too.
    codes_equal: f64,
}

/// The device's name, and the linears of all layers.
fn measure<B: Backend>(
    device: &B,
    args: &ReferenceBenchArgs,
    config: &ModelConfig,
) -> Result<(String, Vec<Row>)> {
    let mut rows = Vec::new();
    let groups = layout::layer(config, 0).groups;
    let mut progress = Progress::start("solving", (args.layers * groups.len()) as u64);
    for layer in 0..args.layers {
        for (place, group) in groups.iter().enumerate() {
            progress.message(&format!("layer {layer}, {}", group.role.name()));
            let seed = (layer * groups.len() + place) as u64 * 1000;
            rows.extend(solve_group(device, args, (layer, group), seed)?);
            progress.advance(1);
        }
    }
    Ok((device.name(), rows))
}

fn solve_group<B: Backend>(
    device: &B,
    args: &ReferenceBenchArgs,
    (layer, group): (usize, &LinearGroup),
    seed: u64,
) -> Result<Vec<Row>> {
    let (specs, width) = (&group.linears, group.dims().1);
    let mut hessian = device.hessian(width)?;
    accumulate_inputs(device, &mut hessian, width, args.tokens, seed)?;
    let evidence = Evidence::of(hessian);
    let weights: Vec<Vec<f16>> = specs
        .iter()
        .zip(seed + 10..)
        .map(|(linear, seed)| {
            let values = normal(seed, linear.out_features * linear.in_features);
            values.into_par_iter().map(|x| f16::from_f32(0.02 * x)).collect()
        })
        .collect();
    let solved = |method| {
        let params = GptqParams { method, ..card() };
        let tensors = specs.iter().zip(&weights).map(|(linear, values)| {
            let shape = vec![linear.out_features, linear.in_features];
            HostTensor::new(Dtype::F16, shape, bytemuck::cast_slice(values))
        });
        let weights = StageWeights::read(device, &tensors.collect::<Result<Vec<_>, _>>()?, &[])?;
        let evidence = (method == Method::Gptq).then_some(&evidence);
        let solved = solve(device, &weights, evidence, &params)?;
        anyhow::Ok(device.collect(solved.packed)?)
    };
    let (gptq, rtn) = (solved(Method::Gptq)?, solved(Method::Rtn)?);
    let reference = Reference::new(&device.matrix_to_vec(&evidence.solving.hessian)?, width, 0.1)?;
    let mut first = 0;
    let mut rows = Vec::new();
    for (linear, weights) in specs.iter().zip(&weights) {
        let sample = first..first + args.rows.next_multiple_of(8).min(linear.out_features);
        let weights: Vec<f64> = weights[..sample.len() * width].iter().map(|w| w.to_f32() as f64).collect();
        let solved = [&gptq.rows(sample.clone())?, &rtn.rows(sample)?];
        rows.push(compare(layer, linear, &weights, solved, &reference));
        first += linear.out_features;
    }
    Ok(rows)
}

/// Of the card's main branch, which the reference solves.
fn card() -> GptqParams {
    Branch::new("main".into(), 4, Some(GROUP)).params()
}

fn compare(
    layer: usize,
    linear: &LinearSpec,
    weights: &[f64],
    [gptq, rtn]: [&PackedLinear; 2],
    reference: &Reference,
) -> Row {
    let values = |packed: &PackedLinear| packed.dequantized().into_iter().map(f64::from).collect::<Vec<_>>();
    let solved: Vec<_> = weights.par_chunks(linear.in_features).map(|row| reference.solve(row)).collect();
    let (codes, exact): (Vec<Vec<u8>>, Vec<Vec<f64>>) = solved.into_iter().unzip();
    let loss = |values: &[f64]| reference.objective(weights, values);
    let own = loss(&values(gptq));
    let codes = codes.concat();
    let equal = gptq.codes().iter().zip(&codes).filter(|(a, b)| a == b).count();
    Row {
        layer,
        linear: linear.module.clone(),
        against_rtn: own / loss(&values(rtn)),
        against_f64: own / loss(&exact.concat()),
        codes_equal: equal as f64 / codes.len() as f64,
    }
}

/// Adds inputs that mostly lie in few directions, with features of very different size, as in trained models.
fn accumulate_inputs<B: Backend>(
    device: &B,
    hessian: &mut B::Matrix,
    width: usize,
    tokens: usize,
    seed: u64,
) -> Result<()> {
    let sizes: Vec<f32> = normal(seed, width).into_iter().map(|x| (0.7 * x).exp()).collect();
    let mixing = normal(seed + 1, width * RANK);
    let mixing =
        mixing.chunks(RANK).zip(&sizes).flat_map(|(row, size)| row.iter().map(move |x| x * size / 16.0));
    let mixing = device.weight_from_f32(mixing.collect(), (width, RANK), None)?;
    for (start, seed) in (0..tokens).step_by(TILE).zip((seed + 100)..) {
        let rows = TILE.min(tokens - start);
        let shared = device.tensor(normal(2 * seed, rows * RANK), (rows, RANK))?;
        let mut own = normal(2 * seed + 1, rows * width);
        own.par_chunks_mut(width)
            .for_each(|row| row.iter_mut().zip(&sizes).for_each(|(x, size)| *x *= 0.3 * size));
        let own = device.tensor(own, (rows, width))?;
        device.accumulate(hessian, &device.add(&device.matmul(&shared, &mixing)?, &own)?)?;
    }
    Ok(())
}

/// About normally distributed values: the sum of four uniform ones, scaled to variance 1.
fn normal(seed: u64, count: usize) -> Vec<f32> {
    let uniform = |i: u64| {
        let mut x = (i + 1).wrapping_add(seed << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    let value = |i: usize| {
        let bits = uniform(i as u64);
        let sum: f32 = (0..4).map(|part| (bits >> (16 * part) & 0xFFFF) as f32 / 65535.0 - 0.5).sum();
        sum * 3f32.sqrt()
    };
    (0..count).into_par_iter().map(value).collect()
}

/// The paper's algorithm, column by column in f64: 4 bits, symmetric grids of 128 columns, act-order.
struct Reference {
    hessian: Mat<f64>,
    order: Vec<usize>,
    /// `U^T` for the upper triangular U with `U^T U = (H + damp)^-1`, in sweep order: a row of U lies in one piece.
    turned: Mat<f64>,
}

const GROUP: usize = 128;

impl Reference {
    /// `lower` holds at least the lower triangle of the Hessian, row-major.
    fn new(lower: &[f32], size: usize, damp_percent: f64) -> Result<Self> {
        let at = |i: usize, j: usize| lower[i.max(j) * size + i.min(j)] as f64;
        let hessian = Mat::from_fn(size, size, at);
        let mut order: Vec<usize> = (0..size).collect();
        order.sort_by(|a, b| at(*b, *b).total_cmp(&at(*a, *a)));
        let damp = damp_percent * (0..size).map(|i| at(i, i)).sum::<f64>() / size as f64;
        let damped =
            Mat::from_fn(size, size, |i, j| at(order[i], order[j]) + if i == j { damp } else { 0.0 });
        let failed = |_| anyhow!("the f64 Hessian is not positive definite");
        let inverse = damped.llt(Side::Lower).map_err(failed)?.inverse();
        let turned = inverse.llt(Side::Lower).map_err(failed)?.L().to_owned();
        Ok(Self { hessian, order, turned })
    }

    /// Codes and values of one row, input features in the checkpoint's order.
    fn solve(&self, row: &[f64]) -> (Vec<u8>, Vec<f64>) {
        let size = self.order.len();
        let mut w: Vec<f64> = self.order.iter().map(|i| row[*i]).collect();
        let (mut codes, mut values, mut scale) = (vec![0; size], vec![0.0; size], 0.0);
        for i in 0..size {
            if i % GROUP == 0 {
                let group = &w[i..(i + GROUP).min(size)];
                let largest = group.iter().fold(0.0, |top: f64, w| top.max(w.abs()));
                scale = f16::from_f64(2.0 * largest / 15.0).to_f64();
            }
            let code = ((w[i] / scale).round_ties_even() + 8.0).clamp(0.0, 15.0);
            let value = (code - 8.0) * scale;
            let u = &self.turned.col_as_slice(i)[i..];
            let error = (w[i] - value) / u[0];
            for (w, u) in w[i + 1..].iter_mut().zip(&u[1..]) {
                *w -= error * u;
            }
            (codes[self.order[i]], values[self.order[i]]) = (code as u8, value);
        }
        (codes, values)
    }

    /// `sum (w - q) H (w - q)^T` over the rows.
    fn objective(&self, weights: &[f64], values: &[f64]) -> f64 {
        let size = self.order.len();
        let difference: Vec<f64> = weights.iter().zip(values).map(|(w, q)| w - q).collect();
        let rows = MatRef::from_row_major_slice(&difference, difference.len() / size, size);
        let product = rows * &self.hessian;
        (0..rows.nrows()).map(|i| (0..size).map(|j| product[(i, j)] * rows[(i, j)]).sum::<f64>()).sum()
    }
}
