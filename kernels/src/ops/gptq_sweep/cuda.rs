//! The sweep on a GPU.

mod pack;
mod refine;
mod search;
mod strip;
mod target;

use std::ops::Range;

use cudarc::driver::CudaSlice;
use half::f16;

use super::{GptqSweep, GridKind, GridSpec, Grouping, stacked_dims};
use crate::cuda::{Arg, Args, Bytes, Cuda, Launch, Operand};
use crate::ops::hessian::cuda::CudaMatrix;
use crate::ops::matmul::cuda::CudaWeight;
use crate::ops::quant_matmul::cuda::StoredWeight;
use crate::packing::{PackedLinear, Scales, ZeroOffset};
use crate::{Dtype, Error, HostTensor, Result};
use strip::Strip;

pub(crate) const GRID_SOURCE: &str = include_str!("grid.cu");
pub(crate) const SOURCE: &str = include_str!("gptq_sweep.cu");
pub(crate) const PACK_SOURCE: &str = include_str!("pack.cu");
pub(crate) const SEARCH_SOURCE: &str = include_str!("loop_search.cu");
pub(crate) const REFINE_SOURCE: &str = include_str!("refine.cu");

/// Bytes of shared memory of the kernels whose threads have a row each: a square of 128 columns with the inverse of its
/// diagonal, and what a warp keeps of its rows.
const SQUARE: usize = size_of::<f32>() * 128 * (128 + 1);
const WARP: usize = size_of::<f32>() * 128 * 33;

/// Weights on the GPU as the checkpoint has them.
pub struct CudaSource {
    parts: Vec<SourcePart>,
    in_features: usize,
}

struct SourcePart {
    /// `[rows, in]`
    bytes: Bytes,
    dtype: Dtype,
    rows: usize,
}

/// A solved matrix on the GPU.
pub struct CudaPacked {
    weight: StoredWeight,
    g_idx: Vec<u32>,
}

/// One sweep on the GPU; matrices are `[rows, in]` in sweep order.
pub struct CudaSweep {
    weights: CudaSlice<f32>,
    codes: CudaSlice<u8>,
    losses: CudaSlice<f32>,
    scales: CudaSlice<f32>,
    zeros: CudaSlice<u8>,
    group_of: CudaSlice<u32>,
    group_end: CudaSlice<u32>,
    order: CudaSlice<u32>,
    rows: usize,
    grids_known: bool,
    grouping: Grouping,
    spec: GridSpec,
    /// Solved in part.
    strip: Option<Strip>,
}

impl GptqSweep for Cuda {
    type Source = CudaSource;
    type Sweep = CudaSweep;
    type Packed = CudaPacked;

    fn sweep_source(&self, weights: &[HostTensor]) -> Result<CudaSource> {
        let (_, in_features) = stacked_dims(weights)?;
        let part = |weight: &HostTensor| -> Result<SourcePart> {
            let rows = weight.dims2()?.0;
            Ok(SourcePart { bytes: self.upload_bytes(&[weight.bytes])?, dtype: weight.dtype, rows })
        };
        Ok(CudaSource { parts: weights.iter().map(part).collect::<Result<_>>()?, in_features })
    }

    fn sweep_start(
        &self,
        source: &CudaSource,
        dead: &[u32],
        grouping: &Grouping,
        spec: &GridSpec,
    ) -> Result<CudaSweep> {
        let k = source.in_features;
        grouping.check(k)?;
        let rows: usize = source.parts.iter().map(|part| part.rows).sum();
        let sweep = CudaSweep {
            weights: self.alloc(rows * k)?,
            codes: self.alloc(rows * k)?,
            losses: self.zeros(rows)?,
            scales: self.alloc(grouping.groups * rows)?,
            zeros: self.alloc(grouping.groups * rows)?,
            group_of: self.upload(&grouping.group_of)?,
            group_end: self.upload(&group_ends(&grouping.group_of))?,
            order: self.upload(&grouping.order)?,
            rows,
            grids_known: (grouping.groups == 1 && spec.kind != GridKind::Loop) || grouping.static_groups,
            grouping: grouping.clone(),
            spec: *spec,
            strip: None,
        };
        self.gather(&sweep, source)?;
        // A grid for the whole row is found before dead features are cleared, as the paper's code does.
        if grouping.groups == 1 && spec.kind != GridKind::Loop {
            self.grids(&sweep)?;
        }
        self.clear(&sweep, dead)?;
        if grouping.static_groups && (grouping.groups > 1 || spec.kind == GridKind::Loop) {
            self.grids(&sweep)?;
        }
        Ok(sweep)
    }

    fn sweep_block(
        &self,
        sweep: &mut CudaSweep,
        factor: Option<&CudaMatrix>,
        block: Range<usize>,
    ) -> Result<()> {
        let Some(u) = factor else {
            let errors = self.alloc::<f32>(sweep.rows * block.len())?;
            let errors = Operand::wide(self.address(&errors), block.len());
            return self.solve(sweep, 0, errors, &block, sweep.grids_known);
        };
        let (u, columns) = (Operand::wide(self.address(&u.values), sweep.dims().1), sweep.dims().1);
        let strip = match sweep.strip.take() {
            Some(strip) if block.end <= strip.columns.end => strip,
            before => {
                if let Some(strip) = before {
                    let Range { start, end } = strip.columns;
                    let operands = (u, self.errors(&strip, start));
                    self.spread(sweep, operands, start..block.start, end..columns)?;
                }
                self.strip(sweep, &block)?
            }
        };
        let Range { start, end } = strip.columns;
        let from = |column: usize| (u, self.errors(&strip, column));
        let searched = sweep.spec.kind == GridKind::Loop && !sweep.grids_known;
        let whole = [block.clone()];
        let runs = if searched { search::runs(&sweep.grouping.group_of, &block) } else { whole.to_vec() };
        for run in runs {
            if searched {
                self.search(sweep, u.address, run.start)?;
            }
            let errors = self.errors(&strip, run.start);
            self.solve(sweep, u.address, errors, &run, searched || sweep.grids_known)?;
            self.spread(sweep, from(run.start), run.clone(), run.end..block.end)?;
        }
        self.spread(sweep, from(block.start), block.clone(), block.end..end)?;
        if block.end == end {
            return self.spread(sweep, from(start), start..end, end..columns);
        }
        sweep.strip = Some(strip);
        Ok(())
    }

    fn sweep_pack(
        &self,
        sweep: CudaSweep,
        zero_offset: ZeroOffset,
        bias: Option<Vec<f32>>,
    ) -> Result<(CudaPacked, Vec<f32>)> {
        let (groups, bits) = (sweep.grouping.groups, sweep.spec.bits);
        let dims = (sweep.rows, sweep.grouping.order.len());
        let g_idx = sweep.grouping.g_idx();
        let weight = StoredWeight {
            qweight: self.pack_codes(&sweep)?,
            qzeros: self.pack_zeros(&sweep, zero_offset)?,
            scales: self.alloc(size_of::<f16>() * groups * dims.0)?,
            wide_scales: false,
            g_idx: self.upload(&g_idx)?,
            bits,
            zero_offset,
            dims,
            bias,
        };
        let args =
            Args::new([self.address(&weight.scales), self.address(&sweep.scales)]).ints([groups * dims.0]);
        self.launch("store_scales", Launch::threads(groups * dims.0), &args)?;
        let losses = self.download(&sweep.losses.slice(..dims.0))?;
        Ok((CudaPacked { weight, g_idx }, losses))
    }

    fn packed_weight(&self, packed: &CudaPacked) -> Result<CudaWeight> {
        self.dequantize(&packed.weight)
    }

    fn collect(&self, packed: CudaPacked) -> Result<PackedLinear<'static>> {
        let CudaPacked { weight, g_idx } = packed;
        let bytes: Vec<u8> = self.download_aside(&weight.scales)?;
        let scales: Vec<f16> = bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
        if scales.iter().any(|scale| !scale.is_finite()) {
            let why = "beyond f16";
            return Err(Error::Unrepresentable { op: "pack", value: "a scale".into(), why });
        }
        Ok(PackedLinear {
            bits: weight.bits,
            in_features: weight.dims.1,
            out_features: weight.dims.0,
            qweight: vec![self.download_aside(&weight.qweight)?.into()],
            qzeros: self.download_aside(&weight.qzeros)?,
            scales: Scales::F16(scales),
            g_idx,
            zero_offset: weight.zero_offset,
            bias: weight.bias,
        })
    }
}

impl CudaSweep {
    /// `(out, in)`
    fn dims(&self) -> (usize, usize) {
        (self.rows, self.grouping.order.len())
    }
}

impl Cuda {
    /// Solves the columns of `run`, whose errors are columns of `errors` from its first on.
    fn solve(
        &self,
        sweep: &CudaSweep,
        u: u64,
        errors: Operand,
        run: &Range<usize>,
        grids_known: bool,
    ) -> Result<()> {
        let args = Args::new([self.address(&sweep.weights), self.address(&sweep.codes), errors.address])
            .addresses([self.address(&sweep.losses), self.address(&sweep.scales), self.address(&sweep.zeros)])
            .addresses([u, self.address(&sweep.group_of), self.address(&sweep.group_end)])
            .ints([sweep.rows, sweep.dims().1, run.start, run.len(), errors.stride])
            .ints([usize::from(grids_known)])
            .and(sweep.spec.arg());
        self.launch("sweep_block", self.by_rows(sweep.rows)?, &args)
    }

    /// A thread a row: as few warps a block as give every multiprocessor one block, at least the four that load a square fast.
    fn by_rows(&self, rows: usize) -> Result<Launch> {
        let wanted = rows.div_ceil(32).div_ceil(self.multiprocessors()).clamp(4, 8);
        let warps = wanted.min(self.shared_memory().saturating_sub(SQUARE) / WARP);
        if warps == 0 {
            let problem = format!("a block needs {} KB of shared memory", (SQUARE + WARP) >> 10);
            return Err(Error::cuda("the sweep", problem));
        }
        let launch = Launch::blocks(rows.div_ceil(32 * warps), 32 * warps as u32);
        Ok(launch.shared(SQUARE + warps * WARP))
    }

    fn gather(&self, sweep: &CudaSweep, source: &CudaSource) -> Result<()> {
        let k = source.in_features;
        let mut target = self.address(&sweep.weights);
        for part in &source.parts {
            let args = Args::new([target, self.arrived(&part.bytes)?, self.address(&sweep.order)])
                .ints([k, part.dtype as usize]);
            self.launch("sweep_gather", Launch::blocks(part.rows, 256), &args)?;
            target += 4 * (part.rows * k) as u64;
        }
        Ok(())
    }

    fn clear(&self, sweep: &CudaSweep, dead: &[u32]) -> Result<()> {
        if dead.is_empty() {
            return Ok(());
        }
        let order = &sweep.grouping.order;
        let cleared: Vec<u8> = order.iter().map(|i| dead.contains(i) as u8).collect();
        let cleared = self.upload(&cleared)?;
        let args = Args::new([self.address(&sweep.weights), self.address(&cleared)]).ints([order.len()]);
        self.launch("sweep_clear", Launch::blocks(sweep.rows, 256), &args)
    }

    /// All grids from the weights as they are.
    fn grids(&self, sweep: &CudaSweep) -> Result<()> {
        let Grouping { group_of, groups, order, .. } = &sweep.grouping;
        let mut members: Vec<u32> = (0..order.len() as u32).collect();
        members.sort_by_key(|place| group_of[*place as usize]);
        let starts: Vec<u32> = (0..=*groups as u32)
            .map(|g| members.partition_point(|place| group_of[*place as usize] < g) as u32)
            .collect();
        let widest = starts.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
        let (members, starts) = (self.upload(&members)?, self.upload(&starts)?);
        let args = Args::new([self.address(&sweep.scales), self.address(&sweep.zeros)])
            .addresses([self.address(&sweep.weights), self.address(&members), self.address(&starts)])
            .ints([order.len(), sweep.rows])
            .and(sweep.spec.arg());
        let launch = Launch::grid(sweep.rows, *groups, 1, 32).shared(4 * widest as usize);
        self.launch("sweep_static_grids", launch, &args)
    }
}

impl GridSpec {
    fn arg(&self) -> Arg {
        let Self { bits, sym, kind, min_zero, f16_scales } = *self;
        Arg::Spec([bits as i32, sym as i32, kind as i32, min_zero as i32, f16_scales as i32])
    }
}

/// Where the run of equal groups that holds each place ends.
fn group_ends(group_of: &[u32]) -> Vec<u32> {
    let mut ends = vec![group_of.len() as u32; group_of.len()];
    for place in (1..group_of.len()).rev() {
        ends[place - 1] = if group_of[place - 1] == group_of[place] { ends[place] } else { place as u32 };
    }
    ends
}
