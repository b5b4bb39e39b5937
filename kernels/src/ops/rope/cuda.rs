use super::{NO_GROWTH, Pairing, Rope, RopeShape, check, frequency_rows};
use crate::cuda::{Args, Cuda, CudaTensor, Launch};
use crate::{Batch, Device, Result};

pub(crate) const SOURCE: &str = include_str!("rope.cu");

/// Features of a head whose sixteenths are a number of lanes that a warp is divided into.
const HALVES: [usize; 5] = [32, 64, 128, 256, 512];

impl Rope for Cuda {
    fn rope(
        &self,
        qkv: &CudaTensor,
        batch: &Batch,
        shape: &RopeShape<CudaTensor>,
    ) -> Result<[CudaTensor; 3]> {
        let (rows, width) = (batch.rows(), shape.kv_heads * shape.head_dim);
        let [k, v] = [self.new_tensor((rows, width))?, self.new_tensor((rows, width))?];
        let q = self.rope_into(qkv, batch, shape, [self.real(&k)?, self.real(&v)?], 0)?;
        Ok([q, k, v])
    }
}

impl Cuda {
    /// The queries; keys and values go to the two addresses, each token's to the row that `slots` says, or to its own.
    pub(crate) fn rope_into(
        &self,
        qkv: &CudaTensor,
        batch: &Batch,
        shape: &RopeShape<CudaTensor>,
        [k, v]: [u64; 2],
        slots: u64,
    ) -> Result<CudaTensor> {
        check(self, qkv, batch, shape)?;
        let rows = batch.rows();
        let q = self.new_tensor((rows, shape.heads * shape.head_dim))?;
        let metadata = self.metadata(batch)?;
        let (q_norm, k_norm, eps) = match &shape.norms {
            Some(norms) => (self.real(&norms.q)?, self.real(&norms.k)?, norms.eps),
            None => (0, 0, 0.0),
        };
        let [q_whole, k_whole] = shape.whole_norms(self);
        let growth = shape.query_growth.unwrap_or(NO_GROWTH);
        // Where sequences have frequencies of their own, a token says whose.
        let several = self.shape(&shape.inv_freq).0;
        let tables = match several {
            1 => None,
            _ => Some(self.upload(&frequency_rows(batch, several))?),
        };
        let mut args = Args::new([self.real(&q)?, k, v, self.real(qkv)?])
            .addresses([metadata.positions(self), slots, self.wide(&shape.inv_freq)?])
            .addresses([tables.as_ref().map_or(0, |tables| self.address(tables)), q_norm, k_norm])
            .ints([shape.heads, shape.kv_heads, shape.head_dim])
            .floats([eps]);
        let in_halves = shape.turned == shape.head_dim && shape.pairing == Pairing::Halves;
        let kernel = match in_halves && !q_whole && !k_whole && HALVES.contains(&shape.head_dim) {
            true => "rope_halves",
            false => {
                let neighbours = shape.pairing == Pairing::Neighbours;
                let [q_whole, k_whole, neighbours] = [q_whole, k_whole, neighbours].map(usize::from);
                args = args.ints([q_whole, k_whole, shape.turned, neighbours]);
                "rope"
            }
        };
        let args = args.floats([shape.stretch, growth.beta]).ints([growth.original]);
        self.launch(kernel, Launch::blocks(rows, 256).shared(4 * shape.head_dim), &args)?;
        Ok(q)
    }
}
