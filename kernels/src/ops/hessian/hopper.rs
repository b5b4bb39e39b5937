//! The Hessian on Hopper: one launch for all tiles of the lower triangle.

use super::cuda::CudaMatrix;
use crate::cuda::{Arg, Cuda, CudaTensor, Launch, Rows};
use crate::{Device, Dtype, Result};

pub(crate) const SOURCE: &str = include_str!("hopper.cu");
const KERNEL: &str = "hessian_hopper";

/// Rows and columns of a cluster's tile, blocks of a cluster and threads of a block, tokens of a step, and the most tiles:
/// as in the kernel.
const TILE: usize = 256;
const BLOCKS: usize = 2;
const THREADS: u32 = 384;
const TOKENS: usize = 64;
const MOST_TILES: usize = 16384;

/// Bytes of a block's ring, and what aligning it may cost.
const RING: usize = 4 * 6 * TOKENS * 128;
const ALIGNMENT: usize = 1024;

/// The copy engine reads rows that begin at multiples of so many values.
const ALIGNED: usize = 8;

impl Cuda {
    /// Whether there is a kernel for a Hessian of this many features.
    pub(super) fn has_hessian_kernel(&self, size: usize) -> bool {
        self.is_hopper()
            && self.dtype() != Dtype::F32
            && size.is_multiple_of(ALIGNED)
            && tiles(size) <= MOST_TILES
    }

    /// Adds the products of `x`, which must be as wide as the Hessian.
    pub(super) fn accumulate_on_hopper(&self, hessian: &CudaMatrix, x: &CudaTensor) -> Result<()> {
        let (tokens, size) = self.shape(x);
        if tokens == 0 {
            return Ok(());
        }
        let launch =
            |clusters| Launch::grid(clusters, BLOCKS, 1, THREADS).cluster(BLOCKS).shared(ALIGNMENT + RING);
        let (clusters, tiles) = (self.clusters(KERNEL, &launch(1))?.max(1), tiles(size));
        let args = [
            Arg::Address(self.address(&hessian.values)),
            self.tensor_map(self.real(x)?, Rows { rows: tokens, heads: 1, head_dim: size }, TOKENS)?,
            Arg::Int(size as i32),
            Arg::Int(tokens as i32),
            Arg::Int(tiles as i32),
            Arg::Int(whole(tiles, clusters) as i32),
        ];
        self.launch(KERNEL, launch(clusters), &args)
    }
}

/// Tiles of the lower triangle.
fn tiles(size: usize) -> usize {
    let rows = size.div_ceil(TILE);
    rows * (rows + 1) / 2
}

/// Tiles that one cluster makes each: a round for every cluster, as long as what is left is more than a round, so that
/// it can be divided evenly.
fn whole(tiles: usize, clusters: usize) -> usize {
    (tiles / clusters).saturating_sub(1) * clusters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_divided_is_one_to_two_rounds_of_tiles() {
        for (size, expected) in [(2048, 0), (4096, 66), (5120, 132), (11008, 858)] {
            assert_eq!(whole(tiles(size), 66), expected, "{size} features");
        }
    }
}
