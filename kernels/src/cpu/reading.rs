//! How fast memory is read, which is what limits decoding.

use std::hint::black_box;

use super::{LongLived, read_ahead, team};

/// Words that a thread reads at a time, 2 MB.
const PIECE: usize = 256 << 10;

/// Memory that has been written, read as codes are: from large pages, asked for ahead of time, by the threads of the products.
pub struct ReadMemory(LongLived<u64>);

impl ReadMemory {
    /// `bytes`, rounded down to whole words.
    pub fn new(bytes: usize) -> Self {
        let mut words = LongLived::zeros(bytes / size_of::<u64>());
        words.iter_mut().zip(0..).for_each(|(word, i)| *word = i);
        Self(words)
    }

    /// Reads every word once.
    pub fn read(&self) {
        let pieces = self.0.chunks(PIECE).collect::<Vec<_>>();
        team::for_each(pieces.len(), |i| {
            black_box(xor(pieces[i]));
        });
    }
}

/// All words in one, a cache line in each step.
fn xor(words: &[u64]) -> u64 {
    let (lines, rest) = words.as_chunks::<8>();
    let mut sums = [0; 8];
    for line in lines {
        read_ahead(line.as_ptr());
        sums.iter_mut().zip(line).for_each(|(sum, word)| *sum ^= word);
    }
    sums.iter().chain(rest).fold(0, |all, word| all ^ word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read() {
        for count in [0, 7, 8, 1000, PIECE + 3] {
            let words: Vec<u64> = (0..count as u64).map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
            assert_eq!(xor(&words), words.iter().fold(0, |all, word| all ^ word));
        }
        ReadMemory::new(3 << 20).read();
    }
}
