use super::{NO_GROWTH, Pairing, Rope, RopeShape, check, frequency_rows};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
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
        let q = self.rope_into(qkv, batch, shape, [self.real(&k)?, self.real(&v)?], Arg::Address(0))?;
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
        slots: Arg,
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
        let mut args = vec![
            Arg::Address(self.real(&q)?),
            Arg::Address(k),
            Arg::Address(v),
            Arg::Address(self.real(qkv)?),
            metadata.positions(self),
            slots,
            Arg::Address(self.wide(&shape.inv_freq)?),
            Arg::Address(tables.as_ref().map_or(0, |tables| self.address(tables))),
            Arg::Address(q_norm),
            Arg::Address(k_norm),
            Arg::Int(shape.heads as i32),
            Arg::Int(shape.kv_heads as i32),
            Arg::Int(shape.head_dim as i32),
            Arg::Float(eps),
        ];
        let in_halves = shape.turned == shape.head_dim && shape.pairing == Pairing::Halves;
        let kernel = match in_halves && !q_whole && !k_whole && HALVES.contains(&shape.head_dim) {
            true => "rope_halves",
            false => {
                args.extend([
                    Arg::Int(q_whole as i32),
                    Arg::Int(k_whole as i32),
                    Arg::Int(shape.turned as i32),
                    Arg::Int((shape.pairing == Pairing::Neighbours) as i32),
                ]);
                "rope"
            }
        };
        args.extend([Arg::Float(shape.stretch), Arg::Float(growth.beta), Arg::Int(growth.original as i32)]);
        self.launch(kernel, Launch::blocks(rows, 256).shared(4 * shape.head_dim), &args)?;
        Ok(q)
    }
}
