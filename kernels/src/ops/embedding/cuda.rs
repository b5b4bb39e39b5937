use super::{Embedding, check};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::{MatMul, Result};

pub(crate) const SOURCE: &str = include_str!("embedding.cu");

impl Embedding for Cuda {
    fn embedding(&self, table: &<Self as MatMul>::Weight, ids: &[u32]) -> Result<CudaTensor> {
        let (vocab, hidden) = table.dims();
        check(ids, vocab)?;
        let y = self.new_tensor((ids.len(), hidden))?;
        let ids = self.upload(ids)?;
        let args = [
            Arg::Address(self.real(&y)?),
            Arg::Address(self.arrived(table.values())?),
            Arg::Address(self.address(&ids)),
            Arg::Int(hidden as i32),
        ];
        self.launch("embedding", Launch::blocks(y.shape().0, 256), &args)?;
        Ok(y)
    }
}
