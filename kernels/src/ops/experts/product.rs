//! Products of all experts of a layer at once, on a GPU.

use cudarc::driver::CudaSlice;

use super::HostExpert;
use super::cuda::{CudaRoutes, MOST_EXPERTS};
use crate::cuda::{Args, Bytes, Cuda, CudaTensor, Launch};
use crate::error::expect;
use crate::ops::matmul::check_parts;
use crate::ops::quant_matmul::fragments::order_of;
use crate::packing::{PackedLinear, Scales};
use crate::{Activation, Device, Dtype, Error, Gated, HostTensor, Result};

pub(crate) const SOURCE: &str = include_str!("product.cu");

/// Outputs of a block, and its threads: as in the kernel.
const OUTPUTS: usize = 64;
const THREADS: u32 = 256;

/// Pairs of a token and an expert in a tile: few, and where there are more of each expert, many.
const FEW: usize = 16;
const MANY: usize = 64;

/// Bytes of what lies between the products, for as many tokens as are taken at once. So few in tests that there are
/// several parts.
const BETWEEN: usize = if cfg!(test) { 1 << 20 } else { 512 << 20 };

/// The weights of all experts of a layer.
pub struct CudaExperts {
    gate_up: Stack,
    down: Stack,
    experts: usize,
}

/// The same weight of all experts: `struct ExpertWeights` of the kernels.
struct Stack {
    /// Values in the compute type, or codes.
    values: Bytes,
    coded: Option<Coded>,
    /// `(out, in)`
    dims: (usize, usize),
}

/// What codes mean.
struct Coded {
    bits: u32,
    zeros: CudaSlice<u32>,
    scales: CudaSlice<u8>,
    wide_scales: bool,
    group_of: CudaSlice<u32>,
    /// Feature at each place, where groups do not lie in one run each.
    feature: Option<CudaSlice<u32>>,
    groups: usize,
    group_size: usize,
    zero_offset: u8,
}

/// Pairs sorted by expert, in tiles.
struct Sorted {
    pairs: Bytes,
    tiles: Bytes,
    /// Tiles at most, and pairs of one.
    most: usize,
    tile: usize,
}

impl CudaExperts {
    pub fn new(gpu: &Cuda, gate_up: &[HostExpert], down: &[HostExpert]) -> Result<Option<Self>> {
        let experts = gate_up.len();
        expect("experts", experts, down.len())?;
        let ([Some(up), Some(after)], true) =
            ([Alike::of(gate_up)?, Alike::of(down)?], experts <= MOST_EXPERTS)
        else {
            return Ok(None);
        };
        let (dims, down_dims) = (up.dims(), after.dims());
        if down_dims != (dims.1, dims.0 / 2) || !dims.0.is_multiple_of(2) {
            return Err(Error::shape("down of an expert", (dims.1, dims.0 / 2), down_dims));
        }
        Ok(Some(Self { gate_up: up.upload(gpu)?, down: after.upload(gpu)?, experts }))
    }

    pub fn forward(
        &self,
        gpu: &Cuda,
        x: &CudaTensor,
        routes: &CudaRoutes,
        activation: Activation,
    ) -> Result<CudaTensor> {
        let (tokens, hidden) = gpu.shape(x);
        expect("experts", (routes.tokens, self.gate_up.dims.1), (tokens, hidden))?;
        if routes.of != self.experts {
            return Err(Error::shape("routes", format!("to {} experts", self.experts), routes.of));
        }
        let y = gpu.new_tensor((tokens, hidden))?;
        let of_token =
            routes.per_token * (self.gate_up.dims.0 + self.down.dims.1 + hidden) * gpu.dtype().size();
        let together = (BETWEEN / of_token).max(FEW);
        for first in (0..tokens).step_by(together) {
            let rows = first..(first + together).min(tokens);
            let part = gpu.rows(&y, rows.clone())?;
            self.some(gpu, &part, &gpu.rows(x, rows)?, (routes, first), activation)?;
        }
        Ok(y)
    }

    /// What is made of some tokens, whose choices are those from token `first` on.
    fn some(
        &self,
        gpu: &Cuda,
        y: &CudaTensor,
        x: &CudaTensor,
        (routes, first): (&CudaRoutes, usize),
        activation: Activation,
    ) -> Result<()> {
        let ((tokens, hidden), per_token) = (gpu.shape(x), routes.per_token);
        let from = (4 * first * per_token) as u64;
        let sorted = self.sort(gpu, gpu.arrived(&routes.experts)? + from, tokens * per_token)?;
        let gates = self.gate_up.product(gpu, x, &sorted, per_token)?;
        let products = gpu.gated(&gates, activation)?;
        let parts = self.down.product(gpu, &products, &sorted, 1)?;
        let args = Args::new([gpu.real(y)?, gpu.real(&parts)?, gpu.arrived(&routes.weights)? + from])
            .ints([per_token, hidden]);
        gpu.launch("sum_experts", Launch::blocks(tokens, THREADS).early(), &args)
    }

    fn sort(&self, gpu: &Cuda, experts_of: u64, pairs: usize) -> Result<Sorted> {
        let many = gpu.dtype() != Dtype::F32 && pairs > FEW * self.experts;
        let tile = if many { MANY } else { FEW };
        let most = pairs / tile + self.experts.min(pairs);
        let sorted = Sorted { pairs: gpu.scratch(4 * pairs)?, tiles: gpu.scratch(16 * most)?, most, tile };
        let addresses = [gpu.arrived(&sorted.pairs)?, gpu.arrived(&sorted.tiles)?, experts_of];
        let args = Args::new(addresses).ints([pairs, self.experts, tile, most]);
        gpu.launch("expert_tiles", Launch::blocks(1, 1024).early(), &args)?;
        Ok(sorted)
    }
}

impl Stack {
    /// A row for every pair, from row `pair / share` of x.
    fn product(&self, gpu: &Cuda, x: &CudaTensor, sorted: &Sorted, share: usize) -> Result<CudaTensor> {
        let (n, k) = self.dims;
        let y = gpu.new_tensor((gpu.shape(x).0 * share, n))?;
        let coded = self.coded.as_ref();
        let args = Args::new([gpu.real(&y)?, gpu.real(x)?, gpu.arrived(&self.values)?])
            .addresses(coded.map_or([0; 4], |coded| coded.addresses(gpu)))
            .ints([k, n])
            .ints(coded.map_or([0; 4], Coded::numbers))
            .addresses([gpu.arrived(&sorted.pairs)?, gpu.arrived(&sorted.tiles)?])
            .ints([share]);
        let kernel = kernel(coded.map(|coded| coded.bits), sorted.tile == MANY);
        gpu.launch(kernel, Launch::grid(sorted.most, n.div_ceil(OUTPUTS), 1, THREADS).early(), &args)?;
        Ok(y)
    }
}

fn kernel(bits: Option<u32>, many: bool) -> &'static str {
    match (bits, many) {
        (None, false) => "expert_product_dense_1",
        (None, true) => "expert_product_dense_4",
        (Some(2), false) => "expert_product_2_1",
        (Some(2), true) => "expert_product_2_4",
        (Some(3), false) => "expert_product_3_1",
        (Some(3), true) => "expert_product_3_4",
        (Some(4), false) => "expert_product_4_1",
        (Some(4), true) => "expert_product_4_4",
        (Some(_), false) => "expert_product_8_1",
        (Some(_), true) => "expert_product_8_4",
    }
}

/// The same weight of all experts in host memory, found to be alike.
enum Alike<'a> {
    /// Every expert's parts in turn, and `(out, in)` of an expert.
    Dense(Vec<HostTensor<'a>>, (usize, usize)),
    Quantized(Vec<&'a PackedLinear<'a>>),
}

/// What must be the same of all experts' codes.
fn format(packed: &PackedLinear) -> (u32, usize, usize, usize, u8, bool) {
    let wide_scales = matches!(packed.scales, Scales::F32(_));
    let dims = (packed.out_features, packed.in_features);
    (packed.bits, dims.0, dims.1, packed.groups(), packed.zero_offset, wide_scales)
}

impl<'a> Alike<'a> {
    /// `None` where they are not.
    fn of(experts: &[HostExpert<'a>]) -> Result<Option<Self>> {
        let (mut packed, mut dense) = (Vec::new(), Vec::new());
        for expert in experts {
            match *expert {
                HostExpert::Quantized(linear) => packed.push(linear),
                HostExpert::Dense(parts) => dense.push(parts),
            }
        }
        if let (Some(first), true) = (packed.first(), dense.is_empty()) {
            packed.iter().try_for_each(|linear| linear.check())?;
            let alike = |linear: &&PackedLinear| linear.bias.is_none() && format(linear) == format(first);
            return Ok(packed.iter().all(alike).then_some(Self::Quantized(packed)));
        }
        let dims = dense.iter().map(|parts| check_parts(parts, &[])).collect::<Result<Vec<_>>>()?;
        let alike = packed.is_empty() && dims.iter().all(|other| *other == dims[0]);
        let parts = || dense.into_iter().flatten().cloned().collect();
        Ok(dims.first().filter(|_| alike).map(|dims| Self::Dense(parts(), *dims)))
    }

    fn dims(&self) -> (usize, usize) {
        match self {
            Self::Dense(_, dims) => *dims,
            Self::Quantized(packed) => (packed[0].out_features, packed[0].in_features),
        }
    }

    fn upload(&self, gpu: &Cuda) -> Result<Stack> {
        let dims = self.dims();
        match self {
            Self::Dense(parts, _) => Ok(Stack { values: gpu.upload_real(parts)?, coded: None, dims }),
            Self::Quantized(packed) => {
                let (coded, values) = Coded::upload(gpu, packed)?;
                Ok(Stack { values, coded: Some(coded), dims })
            }
        }
    }
}

impl Coded {
    fn addresses(&self, gpu: &Cuda) -> [u64; 4] {
        let feature = self.feature.as_ref().map_or(0, |feature| gpu.address(feature));
        [gpu.address(&self.zeros), gpu.address(&self.scales), gpu.address(&self.group_of), feature]
    }

    fn numbers(&self) -> [usize; 4] {
        [self.groups, self.group_size, self.zero_offset.into(), self.wide_scales.into()]
    }

    /// With the codes, whose groups lie in one run each.
    fn upload(gpu: &Cuda, packed: &[&PackedLinear]) -> Result<(Self, Bytes)> {
        let (bits, _, k, groups, zero_offset, wide_scales) = format(packed[0]);
        let orders: Vec<Vec<u32>> = packed.iter().map(|linear| order_of(&linear.g_idx)).collect();
        let in_order =
            orders.iter().all(|order| order.iter().zip(0..).all(|(feature, place)| *feature == place));
        let grouped = packed.iter().zip(&orders).flat_map(|(linear, order)| {
            order.iter().map(|feature| linear.g_idx[*feature as usize]).collect::<Vec<_>>()
        });
        let group_of: Vec<u32> = grouped.collect();
        let size = k.div_ceil(groups);
        let regular =
            group_of.chunks(k).all(|groups| groups.iter().enumerate().all(|(i, g)| *g as usize == i / size));
        let zeros: Vec<&[u32]> = packed.iter().map(|linear| &linear.qzeros[..]).collect();
        let scales: Vec<&[u8]> = packed.iter().map(|linear| linear.scales.bytes()).collect();
        let feature = if in_order { None } else { Some(gpu.upload(&orders.concat())?) };
        let codes = match &feature {
            None => {
                let pieces: Vec<_> = packed.iter().flat_map(|linear| linear.qweight_pieces()).collect();
                let bytes: Vec<&[u8]> = pieces.iter().map(|piece| bytemuck::cast_slice(piece)).collect();
                gpu.upload_bytes(&bytes)?
            }
            Some(feature) => ordered_codes(gpu, packed, feature)?.into(),
        };
        let coded = Self {
            bits,
            zeros: gpu.upload_parts(&zeros)?,
            scales: gpu.upload_parts(&scales)?,
            wide_scales,
            group_of: gpu.upload(&group_of)?,
            feature,
            groups,
            group_size: if regular { size } else { 0 },
            zero_offset,
        };
        Ok((coded, codes))
    }
}

/// Codes of every expert with its features in an order of its own.
fn ordered_codes(gpu: &Cuda, packed: &[&PackedLinear], feature: &CudaSlice<u32>) -> Result<CudaSlice<u8>> {
    let (bits, n, k, ..) = format(packed[0]);
    let words = k * bits as usize / 32 * n;
    let codes = gpu.alloc::<u8>(4 * words * packed.len())?;
    for (i, linear) in packed.iter().enumerate() {
        let stored = gpu.upload_parts(&linear.qweight_pieces().collect::<Vec<_>>())?;
        let args = Args::new([gpu.address(&codes) + (4 * words * i) as u64, gpu.address(&stored)])
            .addresses([gpu.address(feature) + (4 * k * i) as u64])
            .ints([k, n, bits as usize]);
        gpu.launch("order_codes", Launch::threads(words), &args)?;
    }
    Ok(codes)
}
