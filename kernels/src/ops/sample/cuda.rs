use super::{Change, RowSampling, Sample, SampledToken, check};
use crate::cuda::{Answer, Arg, Bytes, Cuda, CudaTensor, Launch};
use crate::{Device, Result};

pub(crate) const SOURCE: &str = include_str!("sample.cu");
pub(crate) const SEARCH_SOURCE: &str = include_str!("search.cu");

/// Threads of a block, as in the kernel.
const THREADS: u32 = 1024;

/// Blocks of a row at most: a cluster of more may not be had.
const MOST_SHARES: usize = 8;

/// Words of a row's `Found`.
const FOUND: usize = 3;

/// Tokens on the GPU and on their way to the host.
pub struct CudaSampled {
    /// `[rows]` ids, then what was found in each row.
    words: Bytes,
    rows: usize,
    answer: Answer,
}

impl CudaSampled {
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Where the ids lie, for what runs after.
    pub(crate) fn ids(&self, gpu: &Cuda) -> Result<u64> {
        gpu.arrived(&self.words)
    }
}

impl Sample for Cuda {
    type Sampled = CudaSampled;

    fn sample(&self, logits: &CudaTensor, sampling: &[RowSampling]) -> Result<CudaSampled> {
        let (rows, vocab) = self.shape(logits);
        check((rows, vocab), sampling)?;
        let words = self.scratch(4 * rows * (1 + FOUND))?;
        let (described, changes) = described(sampling);
        let described = if described.is_empty() { None } else { Some(self.upload(&described)?) };
        // What logits were before, one for each change.
        let before = self.scratch(4 * changes.len())?;
        let changes = if changes.is_empty() {
            None
        } else {
            Some(self.upload(bytemuck::cast_slice::<_, u32>(&changes))?)
        };
        let ids = self.arrived(&words)?;
        let args = [
            Arg::Address(ids),
            Arg::Address(ids + 4 * rows as u64),
            Arg::Address(self.wide(logits)?),
            Arg::Address(described.as_ref().map_or(0, |words| self.address(words))),
            Arg::Address(changes.as_ref().map_or(0, |words| self.address(words))),
            Arg::Address(self.arrived(&before)?),
            Arg::Int(vocab as i32),
        ];
        let shares = shares(self, rows);
        let launch = Launch::grid(rows, shares, 1, THREADS).cluster(shares).early();
        self.launch("sample", launch, &args)?;
        let answer = self.answer(&self.view(&words, 0..4 * rows * (1 + FOUND))?)?;
        Ok(CudaSampled { words, rows, answer })
    }

    fn sampled_tokens(&self, sampled: &CudaSampled) -> Result<Vec<Option<SampledToken>>> {
        let words = sampled.answer.words()?;
        let (ids, found) = words.split_at(sampled.rows);
        let sampled = |(id, found): (&u32, &[u32])| {
            let [logit, largest, mass] = [0, 1, 2].map(|i| f32::from_bits(found[i]));
            (*id != u32::MAX).then(|| SampledToken { id: *id, logprob: logit - largest - mass.ln() })
        };
        Ok(ids.iter().zip(found.chunks_exact(FOUND)).map(sampled).collect())
    }
}

/// Blocks that share a row: all together at most one for each multiprocessor.
fn shares(gpu: &Cuda, rows: usize) -> usize {
    let most = if gpu.is_hopper() { MOST_SHARES } else { 1 };
    (1..=most)
        .rev()
        .find(|shares| shares.is_power_of_two() && shares * rows <= gpu.multiprocessors())
        .unwrap_or(1)
}

/// `struct RowSampling` of every row, none where all rows take the likeliest token; and the changes of all rows.
fn described(sampling: &[RowSampling]) -> (Vec<u32>, Vec<Change>) {
    let (mut words, mut changes) = (Vec::new(), Vec::new());
    if sampling.iter().all(|params| params.temperature == 0.0 && params.changes.is_empty()) {
        return (words, changes);
    }
    for params in sampling {
        let first = changes.len();
        changes.extend_from_slice(&params.changes);
        let top_k = u32::try_from(params.top_k).unwrap_or(u32::MAX);
        words.extend([params.rate().to_bits(), top_k, params.top_p.to_bits(), params.typical_p.to_bits()]);
        words.extend([
            params.random as u32,
            (params.random >> 32) as u32,
            first as u32,
            params.changes.len() as u32,
        ]);
        // The last word fills up what a struct with a number of 64 bits takes.
        words.extend([params.farthest(), 0]);
    }
    (words, changes)
}
