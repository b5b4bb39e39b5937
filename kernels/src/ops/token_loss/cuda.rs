use super::{Divergence, TokenLoss, check_pair, check_targets};
use crate::cuda::{Args, Cuda, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("token_loss.cu");

/// Threads that share a row of the vocabulary.
const THREADS: u32 = 512;

impl TokenLoss for Cuda {
    fn token_loss(&self, logits: &CudaTensor, targets: &[u32]) -> Result<Vec<f32>> {
        let (rows, vocab) = self.shape(logits);
        check_targets((rows, vocab), targets)?;
        let loss = self.alloc::<f32>(rows)?;
        let targets = self.upload(targets)?;
        let args = Args::new([self.address(&loss), self.wide(logits)?, self.address(&targets)]).ints([vocab]);
        self.launch("token_loss", Launch::blocks(rows, THREADS), &args)?;
        self.download(&loss.slice(..rows))
    }

    fn divergence(&self, reference: &CudaTensor, logits: &CudaTensor) -> Result<Vec<Divergence>> {
        let (rows, vocab) = self.shape(logits);
        check_pair(self.shape(reference), (rows, vocab))?;
        let (kl, same) = (self.alloc::<f32>(rows)?, self.alloc::<u32>(rows)?);
        let args =
            Args::new([self.address(&kl), self.address(&same), self.wide(reference)?, self.wide(logits)?])
                .ints([vocab]);
        self.launch("divergence", Launch::blocks(rows, THREADS), &args)?;
        let same = self.download(&same.slice(..rows))?;
        let pairs = self.download(&kl.slice(..rows))?.into_iter().zip(same);
        Ok(pairs.map(|(kl, same)| Divergence { kl, same_top1: same == 1 }).collect())
    }
}
