//! `y = x W^T + bias` for any weight that can give its rows as f32: dense halves and GPTQ codes share it.

use std::ops::Range;

use super::dense::{DenseRow, dots};
use super::{Isa, Parts, each_row, multiply, team};
use faer::{Accum, MatRef};

/// Up to this many input rows a weight row is widened and used at once; above, a chunk of rows is
/// widened and handed to the blocked product.
pub(crate) const GEMV_ROWS: usize = 8;

/// Elements of the widened chunk (8 MiB): it stays in the last cache, and an embedding of 150,000 rows never exists in
/// f32 as a whole.
const CHUNK: usize = 2 << 20;

/// Output rows a thread takes at a time when every row is a dot product.
const GEMV_TASK: usize = 32;

/// A weight matrix `[out, in]` that can write its rows as f32.
pub(crate) trait RowSource: Sync {
    fn dims(&self) -> (usize, usize);

    /// Row `row`, as it is stored.
    fn row(&self, row: usize) -> DenseRow<'_>;

    /// Writes row `row`, `in` values.
    fn write_row(&self, row: usize, out: &mut [f32]);

    /// Rows that lie in memory as f32 already, so that nothing need be copied.
    fn borrow_rows(&self, _rows: Range<usize>) -> Option<&[f32]> {
        None
    }
}

/// `y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]`; x: `[rows, in]` row-major, result `[rows, out]`.
pub(crate) fn linear(x: &[f32], rows: usize, weight: &impl RowSource, bias: Option<&[f32]>) -> Vec<f32> {
    let (out_features, _) = weight.dims();
    let mut y = match bias {
        Some(bias) => bias.repeat(rows),
        None => vec![0.0; rows * out_features],
    };
    if rows <= GEMV_ROWS {
        add_dots(x, rows, weight, &mut y);
    } else {
        add_product(x, rows, weight, &mut y);
    }
    y
}

fn add_dots(x: &[f32], rows: usize, weight: &impl RowSource, y: &mut [f32]) {
    let out_features = weight.dims().0;
    let parts = Parts::of(y);
    team::for_each(out_features.div_ceil(GEMV_TASK), |task| {
        for n in task * GEMV_TASK..((task + 1) * GEMV_TASK).min(out_features) {
            let mut sums = [0.0; GEMV_ROWS];
            dots(weight.row(n), x, &mut sums[..rows], Isa::best());
            for (m, sum) in sums[..rows].iter().enumerate() {
                // SAFETY: an output is written by the task that has its row.
                let y = unsafe { parts.part(m * out_features + n, 1) };
                y[0] += sum;
            }
        }
    });
}

fn add_product(x: &[f32], rows: usize, weight: &impl RowSource, y: &mut [f32]) {
    let (out_features, in_features) = weight.dims();
    let x = MatRef::from_row_major_slice(x, rows, in_features);
    let chunk_rows = match weight.borrow_rows(0..0) {
        Some(_) => out_features.max(1),
        None => (CHUNK / in_features.max(1)).max(1),
    };
    let mut buffer = Vec::new();
    for start in (0..out_features).step_by(chunk_rows) {
        let span = start..(start + chunk_rows).min(out_features);
        let length = span.len();
        let w = match weight.borrow_rows(span.clone()) {
            Some(w) => w,
            None => {
                buffer.resize(length * in_features, 0.0);
                each_row(&mut buffer, in_features, |n, out| weight.write_row(start + n, out));
                &buffer[..]
            }
        };
        let w = MatRef::from_row_major_slice(w, length, in_features);
        multiply(&mut y[start..], out_features, Accum::Add, x, w.transpose());
    }
}
