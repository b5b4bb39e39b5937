//! Errors of solved columns on their way to the columns after them: block by block to those of the same strip, to the rest of
//! the matrix by one product a strip.

use std::ops::Range;

use cudarc::driver::CudaSlice;

use super::CudaSweep;
use crate::Result;
use crate::cuda::{Cuda, Operand};

/// Columns of a strip.
const COLUMNS: usize = 512;

pub(super) struct Strip {
    /// `[rows, columns]`
    errors: CudaSlice<f32>,
    pub columns: Range<usize>,
}

impl Cuda {
    /// A strip that begins with a block. It ends where a group does, since grids are found from weights that all errors
    /// before have reached.
    pub(super) fn strip(&self, sweep: &CudaSweep, block: &Range<usize>) -> Result<Strip> {
        let group_of = &sweep.grouping.group_of;
        let ends = |end: &usize| {
            sweep.grids_known || group_of.get(*end).is_none_or(|next| *next != group_of[end - 1])
        };
        let longest = (block.start + COLUMNS).min(group_of.len());
        let end = (block.end..=longest).rev().find(ends).unwrap_or(block.end);
        let columns = block.start..end;
        Ok(Strip { errors: self.alloc(sweep.rows * columns.len())?, columns })
    }

    /// Errors of a strip from a column on.
    pub(super) fn errors(&self, strip: &Strip, column: usize) -> Operand {
        let errors = Operand::wide(self.address(&strip.errors), strip.columns.len());
        errors.part(0, column - strip.columns.start)
    }

    /// `W[:, to] -= E U[from, to]`, where E begins with the errors of the first column of `from`.
    pub(super) fn spread(
        &self,
        sweep: &CudaSweep,
        (u, errors): (Operand, Operand),
        from: Range<usize>,
        to: Range<usize>,
    ) -> Result<()> {
        let weights = Operand::wide(self.address(&sweep.weights), sweep.dims().1);
        let operands = [u.part(from.start, to.start), errors, weights.part(0, to.start)];
        self.gemm_wide((to.len(), sweep.rows, from.len()), (-1.0, 1.0), operands)
    }
}
