//! The grid of a group by sweeping copies of its columns.

use std::ops::Range;

use super::{CudaSweep, SQUARE};
use crate::cuda::{Args, Cuda, Launch};
use crate::{Error, LOOP_WINDOW, Result};

/// Bytes of what one warp keeps beside the window's part of U: errors of 32 candidates, weights of two rows.
const WARP: usize = 4 * LOOP_WINDOW * (33 + 2);
const MOST_WARPS: usize = 8;

/// The parts of a block that share a group.
pub(super) fn runs(group_of: &[u32], block: &Range<usize>) -> Vec<Range<usize>> {
    let mut start = block.start;
    let runs = group_of[block.clone()].chunk_by(|a, b| a == b);
    runs.map(|run| {
        start += run.len();
        start - run.len()..start
    })
    .collect()
}

impl Cuda {
    /// Sets the grids of the group that begins at `start`, if one does. `u` is the address of the factor.
    pub(super) fn search(&self, sweep: &CudaSweep, u: u64, start: usize) -> Result<()> {
        let (group_of, (rows, columns)) = (&sweep.grouping.group_of, sweep.dims());
        let group = group_of[start];
        if start > 0 && group_of[start - 1] == group {
            return Ok(());
        }
        let count = group_of[start..].iter().take_while(|other| **other == group).count();
        let warps = (self.shared_memory().saturating_sub(SQUARE) / WARP).min(MOST_WARPS);
        if warps == 0 {
            let problem = format!("a block needs {} KB of shared memory", (SQUARE + WARP) >> 10);
            return Err(Error::cuda("the loop search of grids", problem));
        }
        let args = Args::new([self.address(&sweep.scales), self.address(&sweep.zeros)])
            .addresses([self.address(&sweep.weights), u])
            .ints([rows, columns, start, count, group as usize])
            .and(sweep.spec.arg());
        let launch = Launch::blocks(rows.div_ceil(2 * warps), 32 * warps as u32);
        self.launch("sweep_search", launch.shared(SQUARE + warps * WARP), &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_cut_where_groups_change() {
        let groups = [0, 0, 1, 1, 1, 2, 2];
        assert_eq!(runs(&groups, &(0..7)), [0..2, 2..5, 5..7]);
        assert_eq!(runs(&groups, &(3..6)), [3..5, 5..6]);
    }
}
