//! Codes and scales of a finished sweep, changed one after the other while the rest stays as it is.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::Array2;
use rayon::prelude::*;

use super::target::view;
use super::{CpuSweep, Row};
use crate::cpu::axpy;
use crate::error::expect;
use crate::ops::gptq_sweep::{GridSpec, Grouping, SweepRefine};
use crate::{Cpu, Error, Result};

/// Rows that a thread takes at a time.
const STRIP: usize = 64;

impl SweepRefine for Cpu {
    fn sweep_refine(
        &self,
        sweep: &mut CpuSweep,
        target: &Array2<f32>,
        hessian: &Array2<f32>,
        rounds: usize,
    ) -> Result<()> {
        check(sweep, target, hessian)?;
        let columns = sweep.dims().1;
        let CpuSweep { rows, grouping, spec } = sweep;
        let ((windows, whole), places) = (grouping.windows(), grouping.places());
        let targets = target.as_slice().unwrap_or_default().par_chunks(STRIP * columns.max(1));
        rows.par_chunks_mut(STRIP).zip(targets).for_each(|(rows, target)| {
            let missing = missing(rows, target);
            let mut strip = Strip { rows, missing, hessian };
            for _ in 0..rounds {
                for window in &windows {
                    strip.descend(grouping, window, whole.then_some(spec));
                }
                for (group, places) in places.iter().enumerate().filter(|_| !whole) {
                    strip.refit_alone(spec, group, places);
                }
            }
        });
        Ok(())
    }

    fn sweep_losses(
        &self,
        sweep: &CpuSweep,
        weights: &Array2<f32>,
        hessian: &Array2<f32>,
        pull: Option<&Array2<f32>>,
    ) -> Result<Vec<f32>> {
        check(sweep, weights, hessian)?;
        expect("sweep_losses pull", weights.dim(), pull.map_or(weights.dim(), Array2::dim))?;
        let columns = sweep.dims().1.max(1);
        let strips = sweep.rows.par_chunks(STRIP).enumerate();
        let losses = strips.flat_map_iter(|(i, rows)| {
            let start = i * STRIP * columns;
            let part = |matrix: &Array2<f32>| -> Vec<f32> {
                matrix.as_slice().unwrap_or_default()[start..][..rows.len() * columns].to_vec()
            };
            let weights = part(weights);
            let gradient = product(&missing(rows, &weights), rows.len(), view(hessian));
            let pull = pull.map(part);
            rows.iter()
                .enumerate()
                .map(move |(r, row)| {
                    let here = r * columns..(r + 1) * columns;
                    let pull = pull.as_ref().map(|pull| &pull[here.clone()]);
                    let term = |(j, (w, g)): (usize, (&f32, &f32))| {
                        let pull = pull.map_or(0.0, |pull| 2.0 * pull[j] as f64);
                        (w - row.weights[j]) as f64 * (*g as f64 + pull)
                    };
                    let pairs = weights[here.clone()].iter().zip(&gradient[here.clone()]);
                    pairs.enumerate().map(term).sum::<f64>() as f32
                })
                .collect::<Vec<_>>()
        });
        Ok(losses.collect())
    }

    fn sweep_copy(&self, sweep: &CpuSweep) -> Result<CpuSweep> {
        Ok(sweep.clone())
    }

    fn sweep_take_rows(&self, sweep: &mut CpuSweep, from: &CpuSweep, rows: Range<usize>) -> Result<()> {
        let (dims, other) = (sweep.dims(), from.dims());
        if dims != other || rows.end > dims.0 || rows.start > rows.end {
            return Err(Error::shape("sweep_take_rows", (dims, "rows of both"), (other, rows)));
        }
        sweep.rows[rows.clone()].clone_from_slice(&from.rows[rows]);
        Ok(())
    }
}

fn check(sweep: &CpuSweep, weights: &Array2<f32>, hessian: &Array2<f32>) -> Result<()> {
    let (rows, columns) = sweep.dims();
    let got = (weights.dim(), hessian.dim());
    expect("gptq_sweep target and Hessian", ((rows, columns), (columns, columns)), got)
}

/// `E = W - Q` of some rows.
fn missing(rows: &[Row], target: &[f32]) -> Vec<f32> {
    let mut missing = Vec::with_capacity(target.len());
    let mut rest = target;
    for row in rows {
        let (target, after) = rest.split_at(row.weights.len());
        missing.extend(target.iter().zip(&row.weights).map(|(w, q)| w - q));
        rest = after;
    }
    missing
}

/// `a h` for some rows a.
fn product(a: &[f32], rows: usize, h: MatRef<f32>) -> Vec<f32> {
    let mut product = vec![0.0; rows * h.ncols()];
    let result = MatMut::from_row_major_slice_mut(&mut product, rows, h.ncols());
    let a = MatRef::from_row_major_slice(a, rows, h.nrows());
    matmul(result, Accum::Replace, a, h, 1.0, Par::Seq);
    product
}

/// Some rows, with E = W - Q of theirs.
struct Strip<'a> {
    rows: &'a mut [Row],
    missing: Vec<f32>,
    hessian: &'a Array2<f32>,
}

impl Strip<'_> {
    /// Every code of a window once, the others as they are at that moment; then, where groups lie inside of it, their
    /// scales.
    fn descend(&mut self, grouping: &Grouping, window: &Range<usize>, groups_inside: Option<&GridSpec>) {
        let (columns, width) = (self.hessian.ncols(), window.len());
        let mut gradient =
            product(&self.missing, self.rows.len(), view(self.hessian).subcols(window.start, width));
        for (r, row) in self.rows.iter_mut().enumerate() {
            let gradient = &mut gradient[r * width..][..width];
            let missing = &mut self.missing[r * columns + window.start..][..width];
            for i in 0..width {
                let place = window.start + i;
                let h_row = &self.hessian.row(place).to_slice().unwrap_or_default()[window.clone()];
                let change = row.nearer(grouping, place, gradient[i] / h_row[i]);
                if change != 0.0 {
                    axpy(-change, h_row, gradient);
                    missing[i] -= change;
                }
            }
        }
        let Some(spec) = groups_inside else { return };
        let (mut first, columns) = (0, window.clone().collect::<Vec<_>>());
        for run in grouping.group_of[window.clone()].chunk_by(|a, b| a == b) {
            let own = first..first + run.len();
            first = own.end;
            self.refit(spec, run[0] as usize, own, &columns, &mut gradient);
        }
    }

    /// The scales of one group, wherever it lies.
    fn refit_alone(&mut self, spec: &GridSpec, group: usize, places: &[usize]) {
        let all: Vec<usize> = (0..self.hessian.ncols()).collect();
        let h = self.taken(&all, places);
        let h = MatRef::from_row_major_slice(&h, all.len(), places.len());
        let mut gradient = product(&self.missing, self.rows.len(), h);
        self.refit(spec, group, 0..places.len(), places, &mut gradient);
    }

    /// The scales of one group, the codes and all other groups as they are. `gradient` is G of some columns, of which the
    /// group's are the `own`; it follows.
    fn refit(
        &mut self,
        spec: &GridSpec,
        group: usize,
        own: Range<usize>,
        columns: &[usize],
        gradient: &mut [f32],
    ) {
        let (rows, width, places) = (self.rows.len(), columns.len(), &columns[own.clone()]);
        let mut codes = Vec::with_capacity(rows * own.len());
        self.rows.iter().for_each(|row| codes.extend(row.signed_codes(group, places)));
        let h = self.taken(places, columns);
        let k_h = product(&codes, rows, MatRef::from_row_major_slice(&h, own.len(), width));
        let sums = gradient.chunks_exact_mut(width.max(1)).zip(k_h.chunks_exact(width.max(1)));
        let missing = self.missing.chunks_exact_mut(self.hessian.ncols());
        let codes = codes.chunks_exact(own.len().max(1));
        for (((row, missing), codes), (gradient, k_h)) in
            self.rows.iter_mut().zip(missing).zip(codes).zip(sums)
        {
            let along = |values: &[f32]| -> f64 {
                values[own.clone()].iter().zip(codes).map(|(value, k)| *value as f64 * *k as f64).sum()
            };
            let change = row.rescale(spec, group, places, along(gradient), along(k_h));
            if change != 0.0 {
                axpy(-change, k_h, gradient);
                places.iter().zip(codes).for_each(|(place, k)| missing[*place] -= change * k);
            }
        }
    }

    /// `H[rows, columns]`
    fn taken(&self, rows: &[usize], columns: &[usize]) -> Vec<f32> {
        let row = |row: &usize| self.hessian.row(*row).to_slice().unwrap_or_default();
        let mut taken = Vec::with_capacity(rows.len() * columns.len());
        rows.iter().map(row).for_each(|row| taken.extend(columns.iter().map(|column| row[*column])));
        taken
    }
}

impl Row {
    /// Takes the code of the value nearest to the present one plus `step`, and returns how the value changes.
    fn nearer(&mut self, grouping: &Grouping, place: usize, step: f32) -> f32 {
        let Some(grid) = self.grids[grouping.group_of[place] as usize] else { return 0.0 };
        let code = grid.code(self.weights[place] + step);
        if code == self.codes[place] as f32 {
            return 0.0;
        }
        let change = grid.value(code) - self.weights[place];
        (self.codes[place], self.weights[place]) = (code as u8, grid.value(code));
        change
    }

    /// Codes of a group less its zero point.
    fn signed_codes(&self, group: usize, places: &[usize]) -> impl Iterator<Item = f32> {
        let zero = self.grids[group].map_or(0.0, |grid| grid.zero);
        places.iter().map(move |place| self.codes[*place] as f32 - zero)
    }

    /// Changes the scale of a group by `slope / curvature`, as far as it can be stored, and returns by how much.
    fn rescale(
        &mut self,
        spec: &GridSpec,
        group: usize,
        places: &[usize],
        slope: f64,
        curvature: f64,
    ) -> f32 {
        let Some(mut grid) = self.grids[group].filter(|_| curvature > 0.0) else { return 0.0 };
        let scale = spec.stored(grid.scale as f64 + slope / curvature);
        let change = scale as f64 - grid.scale as f64;
        // The loss falls by 2 slope change - curvature change^2.
        let gains = change * (2.0 * slope - curvature * change) > 0.0;
        if !gains || !scale.is_finite() || scale.is_sign_negative() != grid.scale.is_sign_negative() {
            return 0.0;
        }
        grid.scale = scale;
        places.iter().for_each(|place| self.weights[*place] = grid.value(self.codes[*place] as f32));
        self.grids[group] = Some(grid);
        change as f32
    }
}
