//! Codes and scales of a finished sweep, changed one after the other while the rest stays as it is.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::Array2;
use rayon::prelude::*;

use super::target::view;
use super::{CpuSweep, Row};
use crate::cpu::axpy;
use crate::ops::gptq_sweep::{GridSpec, Grouping, LOOP_WINDOW};
use crate::{Error, Result};

/// Rows that a thread takes at a time.
const STRIP: usize = 64;

pub(super) fn refine(
    sweep: &mut CpuSweep,
    target: &Array2<f32>,
    hessian: &Array2<f32>,
    rounds: usize,
) -> Result<()> {
    check(sweep, target, hessian)?;
    let columns = sweep.dims().1;
    let CpuSweep { rows, grouping, spec } = sweep;
    let places = grouping.places();
    let targets = target.as_slice().unwrap_or_default().par_chunks(STRIP * columns.max(1));
    rows.par_chunks_mut(STRIP).zip(targets).for_each(|(rows, target)| {
        let gradient = gradient(rows, target, hessian);
        let mut strip = Strip { rows, gradient, hessian };
        for _ in 0..rounds {
            strip.descend(grouping);
            places.iter().enumerate().for_each(|(group, places)| strip.refit(spec, group, places));
        }
    });
    Ok(())
}

/// `E H E^T + 2 E P^T` of each row.
pub(super) fn losses(
    sweep: &CpuSweep,
    weights: &Array2<f32>,
    hessian: &Array2<f32>,
    pull: Option<&Array2<f32>>,
) -> Result<Vec<f32>> {
    check(sweep, weights, hessian)?;
    if let Some(pull) = pull.filter(|pull| pull.dim() != weights.dim()) {
        return Err(Error::shape("sweep_losses pull", weights.dim(), pull.dim()));
    }
    let columns = sweep.dims().1.max(1);
    let strips = sweep.rows.par_chunks(STRIP).enumerate();
    let losses = strips.flat_map_iter(|(i, rows)| {
        let start = i * STRIP * columns;
        let part = |matrix: &Array2<f32>| -> Vec<f32> {
            matrix.as_slice().unwrap_or_default()[start..][..rows.len() * columns].to_vec()
        };
        let weights = part(weights);
        let gradient = gradient(rows, &weights, hessian);
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

fn check(sweep: &CpuSweep, weights: &Array2<f32>, hessian: &Array2<f32>) -> Result<()> {
    let (rows, columns) = sweep.dims();
    match (weights.dim(), hessian.dim()) == ((rows, columns), (columns, columns)) {
        true => Ok(()),
        false => {
            let expected = ((rows, columns), (columns, columns));
            Err(Error::shape("gptq_sweep target and Hessian", expected, (weights.dim(), hessian.dim())))
        }
    }
}

/// `(W - Q) H` of some rows.
fn gradient(rows: &[Row], target: &[f32], hessian: &Array2<f32>) -> Vec<f32> {
    let columns = hessian.ncols();
    let values = rows.iter().flat_map(|row| &row.weights);
    let difference: Vec<f32> = target.iter().zip(values).map(|(w, q)| w - q).collect();
    let mut gradient = vec![0.0; difference.len()];
    matmul(
        MatMut::from_row_major_slice_mut(&mut gradient, rows.len(), columns),
        Accum::Replace,
        MatRef::from_row_major_slice(&difference, rows.len(), columns),
        view(hessian),
        1.0,
        Par::Seq,
    );
    gradient
}

/// Some rows, with G = (W - Q) H of theirs.
struct Strip<'a> {
    rows: &'a mut [Row],
    gradient: Vec<f32>,
    hessian: &'a Array2<f32>,
}

impl Strip<'_> {
    /// Every code once, the others as they are at that moment.
    fn descend(&mut self, grouping: &Grouping) {
        let columns = self.hessian.ncols();
        for start in (0..columns).step_by(LOOP_WINDOW) {
            let width = LOOP_WINDOW.min(columns - start);
            let mut changes = vec![0.0; self.rows.len() * width];
            for (r, row) in self.rows.iter_mut().enumerate() {
                let gradient = &mut self.gradient[r * columns + start..][..width];
                let changes = &mut changes[r * width..][..width];
                for i in 0..width {
                    let place = start + i;
                    let h_row = &self.hessian.row(place).to_slice().unwrap_or_default()[start..][..width];
                    let change = row.nearer(grouping, place, gradient[i] / h_row[i]);
                    if change != 0.0 {
                        axpy(-change, h_row, gradient);
                        changes[i] = change;
                    }
                }
            }
            self.follow(&changes, start, width);
        }
    }

    /// `G -= D H` for the columns outside a block, D being the changes inside it.
    fn follow(&mut self, changes: &[f32], start: usize, width: usize) {
        let (rows, columns) = (self.rows.len(), self.hessian.ncols());
        let changes = MatRef::from_row_major_slice(changes, rows, width);
        let h = view(self.hessian);
        let mut g = MatMut::from_row_major_slice_mut(&mut self.gradient, rows, columns);
        for (first, count) in [(0, start), (start + width, columns - start - width)] {
            let h = h.submatrix(start, first, width, count);
            matmul(g.as_mut().subcols_mut(first, count), Accum::Add, changes, h, -1.0, Par::Seq);
        }
    }

    /// The scales of one group, the codes and all other groups as they are.
    fn refit(&mut self, spec: &GridSpec, group: usize, places: &[usize]) {
        let (rows, columns, width) = (self.rows.len(), self.hessian.ncols(), places.len());
        let codes: Vec<f32> = self.rows.iter().flat_map(|row| row.signed_codes(group, places)).collect();
        let h: Vec<f32> = places
            .iter()
            .flat_map(|place| self.hessian.row(*place).to_slice().unwrap_or_default())
            .copied()
            .collect();
        // k H of every row.
        let mut product = vec![0.0; rows * columns];
        matmul(
            MatMut::from_row_major_slice_mut(&mut product, rows, columns),
            Accum::Replace,
            MatRef::from_row_major_slice(&codes, rows, width),
            MatRef::from_row_major_slice(&h, width, columns),
            1.0,
            Par::Seq,
        );
        let strips = self.gradient.chunks_exact_mut(columns).zip(product.chunks_exact(columns));
        for ((row, codes), (gradient, product)) in
            self.rows.iter_mut().zip(codes.chunks_exact(width.max(1))).zip(strips)
        {
            let along = |values: &[f32]| -> f64 {
                places.iter().zip(codes).map(|(place, k)| values[*place] as f64 * *k as f64).sum()
            };
            let change = row.rescale(spec, group, places, along(gradient), along(product));
            if change != 0.0 {
                axpy(-change, product, gradient);
            }
        }
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
    fn signed_codes(&self, group: usize, places: &[usize]) -> Vec<f32> {
        let zero = self.grids[group].map_or(0.0, |grid| grid.zero);
        places.iter().map(|place| self.codes[*place] as f32 - zero).collect()
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
