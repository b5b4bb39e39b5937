mod refine;
mod search;
mod target;

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef};
use ndarray::Array2;
use rayon::prelude::*;

use super::grid::Grid;
use super::{GptqSweep, GridKind, GridSpec, Grouping, Quantized, stacked_dims};
use crate::cpu::{all_cores, axpy};
use crate::packing::{PackedLinear, ZeroOffset};
use crate::{Cpu, Error, HostTensor, QuantMatMul, Result};
use search::Search;

/// Weights `[out, in]` in the checkpoint's order.
pub struct CpuSource {
    values: Vec<f32>,
    in_features: usize,
}

/// One sweep on the CPU; rows are independent and lie apart, so that threads take rows.
#[derive(Clone)]
pub struct CpuSweep {
    rows: Vec<Row>,
    grouping: Grouping,
    spec: GridSpec,
}

/// One output row in sweep order.
#[derive(Clone)]
struct Row {
    /// Of solved columns the values of their codes.
    weights: Vec<f32>,
    codes: Vec<u8>,
    /// One grid a group; `None` until the sweep enters it.
    grids: Vec<Option<Grid>>,
    loss: f64,
}

impl GptqSweep for Cpu {
    type Source = CpuSource;
    type Sweep = CpuSweep;
    type Packed = PackedLinear<'static>;

    fn sweep_source(&self, weights: &[HostTensor]) -> Result<CpuSource> {
        let (_, in_features) = stacked_dims(weights)?;
        Ok(CpuSource { values: weights.iter().flat_map(HostTensor::to_f32).collect(), in_features })
    }

    fn sweep_start(
        &self,
        source: &CpuSource,
        dead: &[u32],
        grouping: &Grouping,
        spec: &GridSpec,
    ) -> Result<CpuSweep> {
        grouping.check(source.in_features)?;
        let rows = source.values.par_chunks_exact(source.in_features.max(1));
        let rows = rows.map(|row| Row::new(row, dead, grouping, spec)).collect();
        Ok(CpuSweep { rows, grouping: grouping.clone(), spec: *spec })
    }

    fn sweep_block(
        &self,
        sweep: &mut CpuSweep,
        factor: Option<&Array2<f32>>,
        block: Range<usize>,
    ) -> Result<()> {
        let CpuSweep { rows, grouping, spec } = sweep;
        match factor {
            Some(u) => {
                let searches = match spec.kind {
                    GridKind::Loop => Search::of_block(grouping, u, &block),
                    GridKind::Absmax | GridKind::Mse => vec![],
                };
                let errors: Vec<f32> = rows
                    .par_iter_mut()
                    .flat_map_iter(|row| row.solve(grouping, spec, (u, &searches), block.clone()))
                    .collect();
                move_errors(rows, &errors, u, block);
            }
            None => rows.par_iter_mut().for_each(|row| row.round(grouping, spec, block.clone())),
        }
        Ok(())
    }

    fn sweep_pack(
        &self,
        sweep: CpuSweep,
        zero_offset: ZeroOffset,
        bias: Option<Vec<f32>>,
    ) -> Result<(PackedLinear<'static>, Vec<f32>)> {
        let solved = sweep.finish()?;
        let packed = PackedLinear { bias, ..PackedLinear::pack(&solved, zero_offset)? };
        Ok((packed, solved.losses))
    }

    fn packed_weight(&self, packed: &PackedLinear) -> Result<Self::Weight> {
        self.dense_weight(packed)
    }

    fn collect(&self, packed: PackedLinear<'static>) -> Result<PackedLinear<'static>> {
        Ok(packed)
    }
}

impl CpuSweep {
    /// `(out, in)`
    fn dims(&self) -> (usize, usize) {
        (self.rows.len(), self.grouping.order.len())
    }

    fn finish(self) -> Result<Quantized> {
        let Self { rows, grouping, spec } = self;
        let codes = rows.par_iter().flat_map_iter(|row| row.codes_in_file_order(&grouping)).collect();
        let grids = || (0..grouping.groups).flat_map(|g| rows.iter().map(move |row| row.grids[g]));
        if grids().any(|grid| grid.is_none()) {
            return Err(Error::shape("gptq_sweep", "every column solved", "a group without a grid"));
        }
        Ok(Quantized {
            bits: spec.bits,
            codes,
            scales: grids().flatten().map(|grid| grid.scale).collect(),
            zeros: grids().flatten().map(|grid| grid.zero as u8).collect(),
            g_idx: grouping.g_idx(),
            losses: rows.iter().map(|row| row.loss as f32).collect(),
        })
    }
}

impl Row {
    fn new(row: &[f32], dead: &[u32], grouping: &Grouping, spec: &GridSpec) -> Self {
        let mut row = row.to_vec();
        // A grid for the whole row is found before dead features are cleared, as the paper's code does.
        let first = grouping.groups == 1 && spec.kind != GridKind::Loop;
        let whole = first.then(|| spec.find(&row));
        dead.iter().for_each(|i| row[*i as usize] = 0.0);
        let weights: Vec<f32> = grouping.order.iter().map(|i| row[*i as usize]).collect();
        let mut grids = vec![whole; grouping.groups];
        if grouping.static_groups && whole.is_none() {
            let mut members = vec![Vec::new(); grouping.groups];
            weights.iter().zip(&grouping.group_of).for_each(|(w, g)| members[*g as usize].push(*w));
            grids = members.iter().map(|weights| Some(spec.find(weights))).collect();
        }
        Self { codes: vec![0; weights.len()], weights, grids, loss: 0.0 }
    }

    /// The grid of column `i`, found from the weights as they are now when the sweep enters its group.
    fn grid(&mut self, grouping: &Grouping, spec: &GridSpec, i: usize, searches: &[Search]) -> Grid {
        let group = grouping.group_of[i];
        let weights = &self.weights[i..];
        *self.grids[group as usize].get_or_insert_with(|| {
            let width = grouping.group_of[i..].iter().take_while(|g| **g == group).count();
            match Search::starting_at(searches, i) {
                Some(search) => search.least_swept(spec, &weights[..width]),
                None => spec.find(&weights[..width]),
            }
        })
    }

    /// Solves one block and returns the errors that the columns after it must make up for.
    fn solve(
        &mut self,
        grouping: &Grouping,
        spec: &GridSpec,
        (u, searches): (&Array2<f32>, &[Search]),
        block: Range<usize>,
    ) -> Vec<f32> {
        let mut errors = Vec::with_capacity(block.len());
        for i in block.clone() {
            let grid = self.grid(grouping, spec, i, searches);
            let u_row = &u.row(i).to_slice().unwrap_or_default()[i..block.end];
            let code = grid.code(self.weights[i]);
            let error = (self.weights[i] - grid.value(code)) / u_row[0];
            (self.codes[i], self.weights[i]) = (code as u8, grid.value(code));
            self.loss += 0.5 * (error as f64).powi(2);
            axpy(-error, &u_row[1..], &mut self.weights[i + 1..block.end]);
            errors.push(error);
        }
        errors
    }

    fn round(&mut self, grouping: &Grouping, spec: &GridSpec, block: Range<usize>) {
        for i in block {
            let grid = self.grid(grouping, spec, i, &[]);
            let code = grid.code(self.weights[i]);
            self.loss += 0.5 * ((self.weights[i] - grid.value(code)) as f64).powi(2);
            (self.codes[i], self.weights[i]) = (code as u8, grid.value(code));
        }
    }

    fn codes_in_file_order(&self, grouping: &Grouping) -> Vec<u8> {
        let mut codes = vec![0; self.codes.len()];
        self.codes.iter().zip(&grouping.order).for_each(|(code, i)| codes[*i as usize] = *code);
        codes
    }
}

/// `W[:, after] -= E U[block, after]`, a strip of rows at a time.
fn move_errors(rows: &mut [Row], errors: &[f32], u: &Array2<f32>, block: Range<usize>) {
    const STRIP: usize = 256;
    let (size, after) = (u.nrows(), u.nrows() - block.end);
    if after == 0 {
        return;
    }
    let u = MatRef::from_row_major_slice(u.as_slice().unwrap_or_default(), size, size);
    let u = u.submatrix(block.start, block.end, block.len(), after);
    let mut update = vec![0.0; STRIP * after];
    for (rows, errors) in rows.chunks_mut(STRIP).zip(errors.chunks(STRIP * block.len())) {
        let errors = MatRef::from_row_major_slice(errors, rows.len(), block.len());
        let target = MatMut::from_row_major_slice_mut(&mut update[..rows.len() * after], rows.len(), after);
        matmul(target, Accum::Replace, errors, u, 1.0, all_cores());
        rows.par_iter_mut().zip(update.par_chunks_exact(after)).for_each(|(row, update)| {
            axpy(-1.0, update, &mut row.weights[block.end..]);
        });
    }
}
