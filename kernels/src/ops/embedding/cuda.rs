use super::{Embedding, check};
use crate::cuda::{Arg, Args, Cuda, CudaTensor, Launch};
use crate::error::expect;
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
        expect("embedding", (ids.len(), hidden), self.shape(target))?;
        let mut few = [0; FEW];
        let uploaded = match few.get_mut(..ids.len()) {
            Some(few) => {
                few.copy_from_slice(ids);
                None
            }
            None => Some(self.upload(ids)?),
        };
        let args = Args::new([self.real(target)?, self.arrived(table.values())?])
            .addresses([uploaded.as_ref().map_or(0, |ids| self.address(ids))])
            .and(Arg::Ids(few))
            .ints([ids.len(), vocab, hidden]);
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
        let args = Args::new([self.real(target)?, self.arrived(table.values())?, sampled.ids(self)?])
            .and(Arg::Ids([0; FEW]))
            .ints([sampled.rows(), vocab, hidden]);
        self.launch("embedding", Launch::blocks(rows, 256).early(), &args)
    }
}
