//! The product with 9 and more rows on Hopper, from fragments and panels of activations.

use super::fragments::{Around, Fragments, chunk};
use crate::cuda::{Args, Cuda, CudaTensor, Launch, Layout, PANEL_ROWS, PANEL_TILE};
use crate::ops::add;
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("hopper.cu");
pub(crate) const STORE_SOURCE: &str = include_str!("hopper_store.cu");

/// Chunks of a stage, stages, outputs of a block, and its threads: as in the kernel.
const STAGE_CHUNKS: usize = 2;
const STAGES: usize = 4;
const OUTPUTS: usize = 192;
const THREADS: u32 = 416;

/// The most tokens of a block, with which it needs the most memory, and the most tiles of so many.
const MOST_TOKENS: usize = *PANEL_TILE.end();
const MOST_TILES: usize = PANEL_ROWS.end().div_ceil(MOST_TOKENS);

/// What aligning a block's shared memory may cost.
const ALIGNMENT: usize = 1024;

/// Most blocks of a cluster on every GPU of the kind, and the stages whose time a block's start and end take.
const MOST_SPLITS: usize = 8;
const BESIDE: usize = 6;

/// How the kernel goes through a weight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiling {
    /// Grids of a stage.
    grids: usize,
    /// Where a stage has one grid, `2^shift` stages share it.
    shift: usize,
    /// Blocks that divide the features of the same outputs, for each number of tiles of tokens.
    splits: [u8; MOST_TILES],
}

impl Tiling {
    /// `None` where the GPU has no such kernel, or the kernel no way through groups that
    /// [`super::medium_m::Tiling`] has one for.  dims: `(out, in)`
    pub fn of(
        gpu: &Cuda,
        bits: u32,
        (n, k): (usize, usize),
        (groups, group_size): (usize, usize),
    ) -> Result<Option<Self>> {
        let per_group = group_size / chunk(bits);
        let (grids, shift) = match groups {
            _ if !gpu.is_hopper() || !k.is_multiple_of(STAGE_CHUNKS * chunk(bits)) => return Ok(None),
            1 => (1, 30),
            _ if per_group == 0 && bits != 4 => return Ok(None),
            _ if per_group == 0 => (4, 0),
            _ if per_group < STAGE_CHUNKS => (2, 0),
            _ => (1, (per_group / STAGE_CHUNKS).ilog2() as usize),
        };
        let kernel = kernel(bits, MOST_TOKENS, grids);
        let mut at_once = [0; MOST_SPLITS];
        for (splits, at_once) in (1..).zip(&mut at_once) {
            *at_once = gpu.clusters(kernel, &launch(bits, n, (MOST_TOKENS, 1), splits))?;
        }
        let splits =
            std::array::from_fn(|i| splits(n, i + 1, k / (STAGE_CHUNKS * chunk(bits)), at_once) as u8);
        Ok(Some(Self { grids, shift, splits }))
    }
}

/// As many as make the busiest multiprocessor's work least.  at_once: clusters of 1, 2, ... blocks that run at a time
fn splits(n: usize, tiles: usize, stages: usize, at_once: [usize; MOST_SPLITS]) -> usize {
    let work = |(splits, at_once): (usize, usize)| {
        let rounds = (n.div_ceil(OUTPUTS) * tiles).div_ceil(at_once.max(1));
        (rounds * (stages.div_ceil(splits) + BESIDE + splits / 2), splits)
    };
    (1..).zip(at_once).map(work).min().map_or(1, |(_, splits)| splits)
}

/// The kernel's launch for `n` outputs and tiles of so many tokens.
fn launch(bits: u32, n: usize, (tokens, tiles): (usize, usize), splits: usize) -> Launch {
    let activations = 2 * tokens * STAGE_CHUNKS * chunk(bits);
    let stage = activations + OUTPUTS / 16 * 512 * STAGE_CHUNKS;
    let sums = 4 * tokens * (OUTPUTS + 4);
    Launch::grid(n.div_ceil(OUTPUTS), splits, tiles, THREADS)
        .shared(ALIGNMENT + (STAGES * stage).max(sums))
        .early()
        .mostly_shared()
        .cluster(splits)
}

impl Fragments {
    /// x: in panels
    pub(super) fn hopper(
        &self,
        gpu: &Cuda,
        x: &CudaTensor,
        around: Around,
        tiling: Tiling,
    ) -> Result<CudaTensor> {
        let ((n, k), rows, gated) = (self.dims, gpu.shape(x).0, around.activation.is_some());
        let room = Layout::of(gpu, x.order(), rows).panel_tokens;
        let (tokens, tiles) = (room.min(MOST_TOKENS), room.div_ceil(MOST_TOKENS));
        let (y, result) = gpu.new_tensor_in((rows, if gated { n / 2 } else { n }), around.order)?;
        if let Some(residual) = around.residual {
            add::check(gpu.shape(residual), gpu.shape(&y))?;
        }
        let args =
            Args::new([gpu.values(&y)?, gpu.values(x)?, gpu.address(&self.codes), gpu.address(&self.grids)])
                .addresses([gpu.real_or_none(self.bias.as_ref())?])
                .addresses([gpu.real_or_none(around.residual)?])
                .ints([if gated { result.lane_shift } else { 0 }, result.panel_tokens])
                .and(around.activation.unwrap_or_default().gate())
                .ints([room, rows, k, n, self.groups, tiling.shift]);
        let launch = launch(self.bits, n, (tokens, tiles), tiling.splits[tiles - 1].into());
        gpu.launch(kernel(self.bits, tokens, tiling.grids), launch, &args)?;
        Ok(y)
    }
}

/// The kernels of one way through the groups, by tokens.
macro_rules! kernels {
    ($bits:literal, $grids:literal) => {
        [
            concat!("hopper_quant_", $bits, "_16_", $grids),
            concat!("hopper_quant_", $bits, "_32_", $grids),
            concat!("hopper_quant_", $bits, "_64_", $grids),
            concat!("hopper_quant_", $bits, "_128_", $grids),
        ]
    };
}

fn kernel(bits: u32, tokens: usize, grids: usize) -> &'static str {
    let all: [&'static str; 4] = match (bits, grids) {
        (4, 1) => kernels!(4, 1),
        (4, 2) => kernels!(4, 2),
        (4, _) => kernels!(4, 4),
        (_, 1) => kernels!(8, 1),
        (_, _) => kernels!(8, 2),
    };
    all[tokens.ilog2() as usize - 4]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an H200 says of clusters of one to eight blocks, and the counts that were the fastest of those tried on it.
    #[test]
    fn features_are_divided_only_where_that_is_faster() {
        let at_once = [132, 66, 39, 30, 22, 17, 15, 15];
        for (product, n, k, fastest) in [
            ("qkv", 12288, 4096, 2),
            ("o", 4096, 4096, 5),
            ("gate_up", 22016, 4096, 1),
            ("down", 4096, 11008, 5),
        ] {
            assert_eq!(splits(n, 1, k / (STAGE_CHUNKS * chunk(4)), at_once), fastest, "{product}");
        }
        assert_eq!(splits(4096, 4, 4096 / (STAGE_CHUNKS * chunk(4)), at_once), 1, "tiles fill the GPU");
    }
}
