use super::{Rope, RopeShape, check, frequency_rows};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::{Batch, Device, Result};

pub(crate) const SOURCE: &str = include_str!("rope.cu");

impl Rope for Cuda {
    fn rope(
        &self,
        qkv: &CudaTensor,
        batch: &Batch,
        shape: &RopeShape<CudaTensor>,
    ) -> Result<[CudaTensor; 3]> {
        check(self.shape(qkv), self.shape(&shape.inv_freq), batch, shape)?;
        let rows = batch.rows();
        let q = self.new_tensor((rows, shape.heads * shape.head_dim))?;
        let k = self.new_tensor((rows, shape.kv_heads * shape.head_dim))?;
        let v = self.new_tensor((rows, shape.kv_heads * shape.head_dim))?;
        let placed = self.placed(batch)?;
        let (q_norm, k_norm, eps) = match &shape.norms {
            Some(norms) => (self.real(&norms.q)?, self.real(&norms.k)?, norms.eps),
            None => (0, 0, 0.0),
        };
        // Where sequences have frequencies of their own, a token says whose.
        let several = self.shape(&shape.inv_freq).0;
        let tables = match several {
            1 => None,
            _ => Some(self.upload(&frequency_rows(batch, several))?),
        };
        let args = [
            Arg::Address(self.real(&q)?),
            Arg::Address(self.real(&k)?),
            Arg::Address(self.real(&v)?),
            Arg::Address(self.real(qkv)?),
            placed.positions(self),
            Arg::Address(self.wide(&shape.inv_freq)?),
            Arg::Address(tables.as_ref().map_or(0, |tables| self.address(tables))),
            Arg::Address(q_norm),
            Arg::Address(k_norm),
            Arg::Int(shape.heads as i32),
            Arg::Int(shape.kv_heads as i32),
            Arg::Int(shape.head_dim as i32),
            Arg::Float(eps),
        ];
        self.launch("rope", Launch::blocks(rows, 256), &args)?;
        Ok([q, k, v])
    }
}
