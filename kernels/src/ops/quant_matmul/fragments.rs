//! Weights in the order of the tensor cores' fragments, and every product with them.

use std::sync::{Arc, OnceLock};

use cudarc::driver::CudaSlice;

use super::cuda::StoredWeight;
use super::{check, hopper, medium_m, small_m};
use crate::cuda::{Args, Cuda, CudaOrder, CudaTensor, Launch, PANEL_ROWS};
use crate::ops::matmul::cuda::{CudaWeight, SMALL_M_OUTPUTS};
use crate::packing::PackedLinear;
use crate::{Activation, Add, Device, Dtype, MatMul, Norm, Result};

pub(crate) const SOURCE: &str = include_str!("fragments.cu");

/// Outputs of a tile that are gates, each followed by as many that they gate.
pub(super) const GATES: usize = SMALL_M_OUTPUTS / 2;

/// Name of the product for more rows than the kernels take, and for weights that they do not take.
pub(super) const DEQUANTIZED: &str = "dequantize + cuBLAS";

/// A weight repacked for small-M GEMMs.
pub(crate) struct Fragments {
    /// `[out / 16, chunks, 32 lanes, 4 words]`
    pub(super) codes: Arc<CudaSlice<u32>>,
    /// `[out / 16, groups, 8, 2]`: scale and zero point in one word.
    pub(super) grids: CudaSlice<u32>,
    /// Features with groups in one run each, and in panels where those are taken.
    pub(super) order: Option<CudaOrder>,
    /// In the order of the tiles' rows.
    pub(super) bias: Option<CudaTensor>,
    /// Of a code here: codes of 2 and 3 bits take 4, so that every width has the kernels of these.
    pub(super) bits: u32,
    /// `(out, in)`
    pub(super) dims: (usize, usize),
    /// A gate and what it gates, eight outputs each in a tile.
    pub(super) gated: bool,
    pub(super) groups: usize,
    pub(super) group_size: usize,
    /// How each kernel goes through the groups: for up to eight rows, where there is such a way,
    small_m: Option<small_m::Tiling>,
    /// for up to 64,
    pub(super) medium_m: medium_m::Tiling,
    /// and on Hopper for rows in panels.
    panels: Option<hopper::Tiling>,
    /// The codes that are read after these.
    pub(super) next: OnceLock<Arc<CudaSlice<u32>>>,
}

/// What multiplies some rows by a weight.
enum Way {
    SmallM(small_m::Tiling),
    Hopper(hopper::Tiling),
    MediumM,
    Dequantized,
}

/// Features of a chunk.
pub(super) fn chunk(bits: u32) -> usize {
    256 / bits as usize
}

/// Of a weight with gates: the order in which what they gate is wanted.
#[derive(Clone, Copy)]
pub(crate) struct Gates<'a> {
    pub order: Option<&'a CudaOrder>,
}

/// What goes into a product, and what is done with what comes out.
#[derive(Clone, Copy, Default)]
pub(super) struct Around<'a> {
    pub norm: Option<Norm<'a, CudaTensor>>,
    pub residual: Option<&'a CudaTensor>,
    /// Of a weight with gates: what is done with them. Without it they are left in runs of [`GATES`], each followed by
    /// what it gates.
    pub activation: Option<Activation>,
    /// In which a gated product comes.
    pub order: Option<&'a CudaOrder>,
}

impl Fragments {
    /// Repacks what the file holds; `None` for shapes that the kernels do not take. `gates` says that the first half of the
    /// outputs are gates of the second.
    pub fn new(
        gpu: &Cuda,
        packed: &PackedLinear,
        stored: &StoredWeight,
        gates: Option<Gates>,
    ) -> Result<Option<Self>> {
        let order = order_of(&packed.g_idx);
        let (groups, (n, k), bits) = (packed.groups(), stored.dims, stored.bits.max(4));
        let group_size = k.div_ceil(groups.max(1));
        let regular =
            |(place, feature): (usize, &u32)| packed.g_idx[*feature as usize] as usize == place / group_size;
        let fits = !stored.wide_scales
            && n.is_multiple_of(2 * SMALL_M_OUTPUTS)
            && k.is_multiple_of(chunk(bits))
            && order.iter().enumerate().all(regular)
            && gpu.dtype() != Dtype::F32;
        let medium_m = medium_m::Tiling::of(bits, k, groups, group_size).filter(|_| fits);
        let Some(medium_m) = medium_m else { return Ok(None) };
        let features = gpu.upload(&order)?;
        let result_features =
            gates.and_then(|gates| gates.order).map_or(0, |order| order.features_of_rows(gpu));
        let words = n * k * bits as usize / 32;
        let (codes, grids) = (gpu.alloc::<u32>(words)?, gpu.alloc::<u32>(groups * n)?);
        let args = Args::new([gpu.address(&codes), gpu.address(&stored.qweight), gpu.address(&features)])
            .ints([k, n, bits as usize, stored.bits as usize, usize::from(gates.is_some())])
            .addresses([result_features]);
        gpu.launch("repack_codes", Launch::threads(words), &args)?;
        let args = Args::new([gpu.address(&grids), gpu.address(&stored.scales), gpu.address(&stored.qzeros)])
            .ints([groups, n, stored.bits as usize, stored.zero_offset as usize])
            .ints([usize::from(gates.is_some())])
            .addresses([result_features]);
        gpu.launch("repack_grids", Launch::threads(groups * n), &args)?;
        let panels = hopper::Tiling::of(gpu, bits, stored.dims, (groups, group_size))?;
        let bias = packed.bias.as_ref().map(|bias| match gates {
            Some(gates) => interleaved(bias, gates.order),
            None => bias.clone(),
        });
        Ok(Some(Self {
            codes: Arc::new(codes),
            grids,
            order: CudaOrder::new(gpu, order, panels.map(|_| bits))?,
            bias: bias.map(|bias| gpu.tensor(bias, (1, n))).transpose()?,
            bits,
            dims: (n, k),
            gated: gates.is_some(),
            groups,
            group_size,
            small_m: small_m::Tiling::of(bits, k, groups, group_size),
            medium_m,
            panels,
            next: OnceLock::new(),
        }))
    }

    /// What multiplies so many rows.
    fn way(&self, rows: usize) -> Way {
        match (rows, self.small_m, self.panels) {
            (1..=small_m::ROWS, Some(tiling), _) => Way::SmallM(tiling),
            (_, _, Some(tiling)) if PANEL_ROWS.contains(&rows) => Way::Hopper(tiling),
            (..=medium_m::ROWS, ..) => Way::MediumM,
            _ => Way::Dequantized,
        }
    }

    /// Name of the kernel for so many rows.
    pub(super) fn kernel_name(&self, rows: usize) -> &'static str {
        match self.way(rows) {
            Way::SmallM(_) => "small_m",
            Way::Hopper(_) => "hopper",
            Way::MediumM => "medium_m",
            Way::Dequantized => DEQUANTIZED,
        }
    }

    /// The product, as one kernel where there is one for so many rows.
    pub(super) fn product(&self, gpu: &Cuda, x: &CudaTensor, around: Around) -> Result<CudaTensor> {
        check(gpu.shape(x), self.dims.1)?;
        let ordered = |x: &CudaTensor| match around.norm {
            Some(norm) => gpu.rms_norm_in_order(x, norm, self.order.as_ref()),
            None => gpu.in_order(x, self.order.as_ref()),
        };
        let y = match self.way(gpu.shape(x).0) {
            Way::SmallM(tiling) => return self.small_m(gpu, x, around, tiling),
            Way::Hopper(tiling) => return self.hopper(gpu, &ordered(x)?, around, tiling),
            Way::MediumM => self.medium_m(gpu, &ordered(x)?)?,
            Way::Dequantized => gpu.matmul(&ordered(x)?.said_to_be_in(None), &self.dequantized(gpu)?)?,
        };
        let y = match around.activation {
            Some(activation) => gpu.gated_in_order(&y, GATES, activation, around.order)?,
            None => y,
        };
        around.residual.map_or(Ok(y.clone()), |residual| gpu.add(residual, &y))
    }

    /// The residual and the product.
    pub(super) fn product_added(
        &self,
        gpu: &Cuda,
        x: &CudaTensor,
        residual: CudaTensor,
    ) -> Result<CudaTensor> {
        match self.way(gpu.shape(x).0) {
            Way::Dequantized => {
                check(gpu.shape(x), self.dims.1)?;
                let x = gpu.in_order(x, self.order.as_ref())?.said_to_be_in(None);
                gpu.matmul_add(&x, &self.dequantized(gpu)?, residual)
            }
            _ => self.product(gpu, x, Around { residual: Some(&residual), ..Around::default() }),
        }
    }

    /// `[out, in]`, input features in the order of the groups, outputs in that of the tiles' rows.
    fn dequantized(&self, gpu: &Cuda) -> Result<CudaWeight> {
        let (n, k) = self.dims;
        let values = gpu.alloc::<u8>(n * k * gpu.dtype().size())?;
        let args = Args::new([gpu.address(&values), gpu.address(&self.codes), gpu.address(&self.grids)])
            .ints([k, n, self.bits as usize, self.group_size]);
        // Eight features of two outputs each.
        gpu.launch("dequantize_fragments", Launch::threads(n * k / 16), &args)?;
        Ok(CudaWeight::new(values.into(), self.dims, false, self.bias.clone()))
    }
}

/// Features sorted by group, each group in file order.
pub(crate) fn order_of(g_idx: &[u32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..g_idx.len() as u32).collect();
    order.sort_by_key(|feature| g_idx[*feature as usize]);
    order
}

/// One value an output, gates and then what they gate, in the order of the tiles' rows.
fn interleaved(values: &[f32], order: Option<&CudaOrder>) -> Vec<f32> {
    let (gates, gated) = values.split_at(values.len() / 2);
    let in_order = |values: &[f32]| match order {
        Some(order) => order.features().iter().map(|feature| values[*feature as usize]).collect(),
        None => values.to_vec(),
    };
    let (gates, gated) = (in_order(gates), in_order(gated));
    gates.chunks(GATES).zip(gated.chunks(GATES)).flat_map(|(a, b)| [a, b].concat()).collect()
}
