use super::{Likeliest, TopLogits, check};
use crate::cuda::{Args, Cuda, CudaTensor, Launch};
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
        let args = Args::new([self.arrived(&keys)?, self.arrived(&masses)?, self.wide(logits)?])
            .ints([vocab, count]);
        self.launch("top_logits_of_parts", Launch::grid(parts, rows, 1, THREADS).early(), &args)?;
        let args = Args::new([self.arrived(&best)?, self.arrived(&keys)?, self.arrived(&masses)?])
            .ints([parts, count]);
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
