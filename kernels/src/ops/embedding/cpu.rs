use candle_core::Tensor;

use super::{Embedding, check};
use crate::cpu::each_row;
use crate::{Cpu, Device, Error, MatMul, Result, Sample};

impl Embedding for Cpu {
    fn embedding(&self, table: &<Self as MatMul>::Weight, ids: &[u32]) -> Result<Tensor> {
        let (vocab, hidden) = table.dims();
        check(ids, vocab)?;
        let mut y = vec![0.0; ids.len() * hidden];
        each_row(&mut y, hidden, |row, out| table.write_row(ids[row] as usize, out));
        self.tensor(y, (ids.len(), hidden))
    }

    fn embedding_into(&self, _: &Tensor, _: &<Self as MatMul>::Weight, _: &[u32]) -> Result<()> {
        Err(nothing_captured())
    }

    fn embedding_of_sampled(
        &self,
        _: &Tensor,
        _: &<Self as MatMul>::Weight,
        _: &<Self as Sample>::Sampled,
    ) -> Result<()> {
        Err(nothing_captured())
    }
}

fn nothing_captured() -> Error {
    Error::shape("embedding on the CPU", "a captured step", "none: the CPU captures nothing")
}
