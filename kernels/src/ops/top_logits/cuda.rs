use super::{Likeliest, TopLogits, check};
use crate::cuda::{Arg, Cuda, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("top_logits.cu");

/// Logits of one block, and its threads: as in the kernel.
const PART: usize = 4096;
const THREADS: u32 = 256;

impl TopLogits for Cuda {
    fn top_logits(&self, logits: &CudaTensor, count: usize) -> Result<Vec<Likeliest>> {
        let (rows, vocab) = self.shape(logits);
        check(vocab, count)?;
        let parts = vocab.div_ceil(PART);
        let keys = self.scratch(8 * rows * parts * count)?;
        let masses = self.scratch(8 * rows * parts)?;
        // Ids and logits of the candidates, and the total.
        let width = 2 * count + 1;
        let best = self.scratch(4 * rows * width)?;
        let args = [
            Arg::Address(self.arrived(&keys)?),
            Arg::Address(self.arrived(&masses)?),
            Arg::Address(self.wide(logits)?),
            Arg::Int(vocab as i32),
            Arg::Int(count as i32),
        ];
        self.launch("top_logits_of_parts", Launch::grid(parts, rows, 1, THREADS).early(), &args)?;
        let args = [
            Arg::Address(self.arrived(&best)?),
            Arg::Address(self.arrived(&keys)?),
            Arg::Address(self.arrived(&masses)?),
            Arg::Int(parts as i32),
            Arg::Int(count as i32),
        ];
        let launch = Launch::blocks(rows, THREADS).shared(8 * parts * count).early();
        self.launch("top_logits_of_all", launch, &args)?;
        let best = self.answer(&self.view(&best, 0..4 * rows * width)?)?.words()?;
        let row = |row: &[u32]| Likeliest {
            candidates: row[..2 * count].chunks_exact(2).map(|c| (c[0], f32::from_bits(c[1]))).collect(),
            total: f32::from_bits(row[2 * count]),
        };
        Ok(best.chunks_exact(width).map(row).collect())
    }
}
