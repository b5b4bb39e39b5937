//! The product with 9 to 128 rows on Hopper, from fragments and panels of activations.

use super::fragments::{Around, Fragments, chunk};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch, Layout};
use crate::ops::add;
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("hopper.cu");

/// Chunks of a stage, stages, outputs of a block, and its threads: as in the kernel.
const STAGE_CHUNKS: usize = 2;
const STAGES: usize = 4;
const OUTPUTS: usize = 192;
const THREADS: u32 = 416;

/// What aligning a block's shared memory may cost.
const ALIGNMENT: usize = 1024;

/// Most blocks of a cluster on every card of the kind, and the stages whose time a block's start and end take.
const MOST_SPLITS: usize = 8;
const BESIDE: usize = 6;

/// Grids of a stage, and the logarithm of the stages that share one where there is only one. `None` where the
/// kernel has no way through the groups of a matrix that [`super::few_rows::Plan`] has one for.
pub(super) fn plan(bits: u32, k: usize, groups: usize, group_size: usize) -> Option<(usize, i32)> {
    let per_group = group_size / chunk(bits);
    match groups {
        _ if !k.is_multiple_of(STAGE_CHUNKS * chunk(bits)) => None,
        1 => Some((1, 30)),
        _ if per_group == 0 => (bits == 4).then_some((4, 0)),
        _ if per_group < STAGE_CHUNKS => Some((2, 0)),
        _ => Some((1, (per_group / STAGE_CHUNKS).ilog2() as i32)),
    }
}

/// Blocks that divide the features of the same outputs: as many as make the busiest multiprocessor's work least.
/// `clusters` says how many groups of so many blocks run at a time.
fn splits(n: usize, stages: usize, clusters: impl Fn(usize) -> Result<usize>) -> Result<usize> {
    let outputs = n.div_ceil(OUTPUTS);
    let mut best = (usize::MAX, 1);
    for splits in 1..=MOST_SPLITS {
        let rounds = outputs.div_ceil(clusters(splits)?.max(1));
        best = best.min((rounds * (stages.div_ceil(splits) + BESIDE + splits / 2), splits));
    }
    Ok(best.1)
}

impl Fragments {
    /// x: in panels
    pub(super) fn hopper(
        &self,
        card: &Cuda,
        x: &CudaTensor,
        around: Around,
        (grids, shift): (usize, i32),
    ) -> Result<CudaTensor> {
        let ((n, k), rows) = (self.dims, card.shape(x).0);
        let tokens = Layout::of(card, x.order(), rows).panel_tokens;
        let (y, result) = card.new_tensor_in((rows, if self.gated { n / 2 } else { n }), around.order)?;
        if let Some(residual) = around.residual {
            add::check(card.shape(residual), card.shape(&y))?;
        }
        let features = STAGE_CHUNKS * chunk(self.bits);
        let stage = 2 * tokens * features + OUTPUTS / 16 * 512 * STAGE_CHUNKS;
        let sums = 4 * tokens * (OUTPUTS + 4);
        let kernel = kernel(self.bits, tokens, grids);
        let launch = |splits: usize| {
            Launch::grid(n.div_ceil(OUTPUTS), splits, 1, THREADS)
                .shared(ALIGNMENT + (STAGES * stage).max(sums))
                .early()
                .mostly_shared()
                .cluster(splits)
        };
        let splits = match self.splits.get() {
            Some(splits) => *splits,
            None => splits(n, k / features, |splits| card.clusters(kernel, &launch(splits)))?,
        };
        let _ = self.splits.set(splits);
        let args = [
            Arg::Address(card.values(&y)?),
            Arg::Address(card.values(x)?),
            Arg::Address(card.address(&self.codes)),
            Arg::Address(card.address(&self.grids)),
            Arg::Address(self.bias.as_ref().map_or(Ok(0), |bias| card.real(bias))?),
            Arg::Address(around.residual.map_or(Ok(0), |residual| card.real(residual))?),
            Arg::Int(if self.gated { result.lane_shift as i32 } else { 0 }),
            Arg::Int(result.panel_tokens as i32),
            Arg::Int(rows as i32),
            Arg::Int(k as i32),
            Arg::Int(n as i32),
            Arg::Int(self.groups as i32),
            Arg::Int(shift),
        ];
        card.launch(kernel, launch(splits), &args)?;
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
