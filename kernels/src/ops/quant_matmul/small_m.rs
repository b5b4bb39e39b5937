//! The product with up to eight rows, and with what surrounds it in a model, as one kernel.

use super::fragments::{Around, Fragments, chunk};
use crate::cuda::{Args, Cuda, CudaTensor, Launch, Layout, PANEL_ROWS};
use crate::ops::matmul::cuda::SMALL_M_OUTPUTS;
use crate::ops::{add, rms_norm};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("small_m.cu");
pub(crate) const FUSED_SOURCE: &str = include_str!("small_m_fused.cu");

/// Most rows: from the next on they may come in panels.
pub(super) const ROWS: usize = *PANEL_ROWS.start() - 1;

/// Chunks of a portion, and portions that a warp has on their way: as in the kernel.
const PORTION: usize = 4;
const DEPTH: usize = 2;

/// Most rows of which a chunk's two groups can have sums of their own, as in the kernel.
const PAIRED_ROWS: usize = 4;

/// A normed input lies in shared memory: at most so many bytes, on Hopper, which has more, twice as many. Every block
/// norms all rows, so that many are normed once, by a kernel of its own.
const NORMED_BYTES: usize = 16 << 10;

/// Features of a gap behind each portion of a normed input, as in the kernel.
const GAP: usize = 8;

/// How the kernel goes through the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Grids of a portion.
    grids: usize,
    /// `2^shift` portions share a grid, where a portion has only one.
    shift: usize,
}

impl Tiling {
    /// `None` where the kernel has no way through the groups of this matrix.
    pub fn of(bits: u32, k: usize, groups: usize, group_size: usize) -> Option<Self> {
        let (portion, per_group) = (PORTION * chunk(bits), group_size / chunk(bits));
        let (grids, shift) = match groups {
            _ if !k.is_multiple_of(portion) => return None,
            1 => (1, 30),
            _ if 2 * group_size == chunk(bits) && bits != 4 => return None,
            _ if 2 * group_size == chunk(bits) => (2 * PORTION, 0),
            _ if per_group > PORTION => (1, (per_group / PORTION).ilog2() as usize),
            _ => (PORTION / per_group.max(1), 0),
        };
        Some(Self { grids, shift })
    }
}

fn kernel(bits: u32, grids: usize, rows: usize) -> &'static str {
    match (bits, grids) {
        (4, 1) => "small_m_quant_4_1",
        (4, 2) => "small_m_quant_4_2",
        (4, 4) => "small_m_quant_4_4",
        (4, _) if rows <= PAIRED_ROWS => "small_m_quant_4_8_paired",
        (4, _) => "small_m_quant_4_8",
        (_, 1) => "small_m_quant_8_1",
        (_, 2) => "small_m_quant_8_2",
        (_, _) => "small_m_quant_8_4",
    }
}

impl Fragments {
    /// x: up to [`ROWS`] rows
    pub(super) fn small_m(
        &self,
        gpu: &Cuda,
        x: &CudaTensor,
        around: Around,
        Tiling { grids, shift }: Tiling,
    ) -> Result<CudaTensor> {
        let ((n, k), rows) = (self.dims, gpu.shape(x).0);
        // And tiles times rows whose sums wait, as in the kernel: most other GPUs have 99 KB of shared memory a block.
        let (warps, waiting) = if gpu.is_hopper() { (16, 16) } else { (12, 8) };
        let here = rows * k * gpu.dtype().size();
        let fused = here <= if gpu.is_hopper() { 2 * NORMED_BYTES } else { NORMED_BYTES };
        let (x, norm) = match around.norm {
            Some(norm) if fused => (x.clone(), Some(norm)),
            Some(norm) => (gpu.rms_norm_in_order(x, norm, self.order.as_ref())?, None),
            None => (gpu.in_order(x, self.order.as_ref())?, None),
        };
        if let Some(norm) = norm {
            rms_norm::check((rows, k), gpu.shape(norm.weight))?;
        }
        let width = if around.activation.is_some() { n / 2 } else { n };
        let y = gpu.new_tensor((rows, width))?;
        if let Some(residual) = around.residual {
            add::check(gpu.shape(residual), gpu.shape(&y))?;
        }
        let order = Layout::of(gpu, self.order.as_ref().filter(|_| norm.is_some()), rows);
        let (next, next_bytes) = self.next.get().map_or((0, 0), |next| (gpu.address(next), 4 * next.len()));
        let args = Args::new([gpu.real(&y)?, if norm.is_some() { gpu.real(&x)? } else { gpu.values(&x)? }])
            .addresses([gpu.real_or_none(norm.map(|norm| norm.weight))?, order.places])
            .floats([norm.map_or(0.0, |norm| norm.eps)])
            .addresses([gpu.address(&self.codes), gpu.address(&self.grids)])
            .addresses([gpu.real_or_none(self.bias.as_ref())?])
            .addresses([gpu.real_or_none(around.residual)?])
            .ints([usize::from(around.activation.is_some())])
            .and(around.activation.unwrap_or_default().gate())
            .ints([rows, k, n, self.groups, shift, usize::from(norm.is_some())])
            .addresses([next])
            .long(next_bytes);
        let rings = warps * DEPTH * (512 * PORTION + 64 * grids);
        // In two places.
        let sums = 2 * 4 * waiting * warps * SMALL_M_OUTPUTS;
        let gaps = GAP * ((k / (PORTION * chunk(self.bits))) | 1) * gpu.dtype().size();
        let blocks = (n / SMALL_M_OUTPUTS).min(gpu.multiprocessors());
        let launch = Launch::blocks(blocks, 32 * warps as u32)
            .shared(rings + sums + if norm.is_some() { here + rows * gaps } else { 0 })
            .early()
            .mostly_shared();
        gpu.launch(kernel(self.bits, grids, rows), launch, &args)?;
        Ok(y.said_to_be_in(around.order))
    }
}
