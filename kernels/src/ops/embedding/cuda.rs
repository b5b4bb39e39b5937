use super::{Embedding, check};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::ops::sample::cuda::CudaSampled;
use crate::{Device, Error, MatMul, Result};

pub(crate) const SOURCE: &str = include_str!("embedding.cu");

/// Ids that go with the kernel's arguments: as in the kernel.
const FEW: usize = 16;

impl Embedding for Cuda {
    fn embedding(&self, table: &<Self as MatMul>::Weight, ids: &[u32]) -> Result<CudaTensor> {
        let y = self.new_tensor((ids.len(), table.dims().1))?;
        self.embedding_into(&y, table, ids)?;
        Ok(y)
    }

    fn embedding_into(
        &self,
        target: &CudaTensor,
        table: &<Self as MatMul>::Weight,
        ids: &[u32],
    ) -> Result<()> {
        let (vocab, hidden) = table.dims();
        check(ids, vocab)?;
        if self.shape(target) != (ids.len(), hidden) {
            return Err(Error::shape("embedding", (ids.len(), hidden), self.shape(target)));
        }
        let mut few = [0; FEW];
        let uploaded = match few.get_mut(..ids.len()) {
            Some(few) => {
                few.copy_from_slice(ids);
                None
            }
            None => Some(self.upload(ids)?),
        };
        let args = [
            Arg::Address(self.real(target)?),
            Arg::Address(self.arrived(table.values())?),
            Arg::Address(uploaded.as_ref().map_or(0, |ids| self.address(ids))),
            Arg::Ids(few),
            Arg::Int(ids.len() as i32),
            Arg::Int(vocab as i32),
            Arg::Int(hidden as i32),
        ];
        self.launch("embedding", Launch::blocks(ids.len(), 256).early(), &args)
    }

    fn embedding_of_sampled(
        &self,
        target: &CudaTensor,
        table: &<Self as MatMul>::Weight,
        sampled: &CudaSampled,
    ) -> Result<()> {
        let ((rows, width), (vocab, hidden)) = (self.shape(target), table.dims());
        if rows < sampled.rows() || width != hidden {
            return Err(Error::shape("embedding", (sampled.rows(), hidden), (rows, width)));
        }
        let args = [
            Arg::Address(self.real(target)?),
            Arg::Address(self.arrived(table.values())?),
            Arg::Address(sampled.ids(self)?),
            Arg::Ids([0; FEW]),
            Arg::Int(sampled.rows() as i32),
            Arg::Int(vocab as i32),
            Arg::Int(hidden as i32),
        ];
        self.launch("embedding", Launch::blocks(rows, 256).early(), &args)
    }
}
