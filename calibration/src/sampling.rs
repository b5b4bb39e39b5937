//! Which windows of a long token sequence are used.

use std::collections::HashMap;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};

/// How many windows of which length, and where they begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleRequest {
    pub samples: usize,
    /// Tokens in one window.
    pub seq_len: usize,
    pub sampling: Sampling,
    /// Used by [`Sampling::Random`] only.
    pub seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampling {
    /// Window i begins at token `i * seq_len`.
    Consecutive,
    /// Windows begin at distinct random offsets and may overlap. The offsets are the first `samples` elements
    /// of a Fisher-Yates shuffle of all `tokens - seq_len + 1` offsets; its uniform integers are 64-bit words
    /// of ChaCha20 (seeded by `seed_from_u64`), reduced modulo the range after rejecting the words that would
    /// favour small values. The same seed therefore gives the same windows on every machine.
    Random,
}

/// Cuts `samples` windows of `seq_len` tokens, in the order drawn.
///
/// # Errors
/// [`Error::Zero`] for zero samples or zero length; [`Error::TextTooShort`] when fewer distinct windows fit.
pub fn sample(tokens: &[u32], request: &SampleRequest) -> Result<Vec<Vec<u32>>> {
    let &SampleRequest { samples, seq_len, sampling, seed } = request;
    check_not_zero("the number of samples", samples)?;
    check_not_zero("the sequence length", seq_len)?;
    let fit = match sampling {
        Sampling::Consecutive => tokens.len() / seq_len,
        Sampling::Random => (tokens.len() + 1).saturating_sub(seq_len),
    };
    if samples > fit {
        return Err(Error::TextTooShort { asked: samples, fit, seq_len, tokens: tokens.len() });
    }
    let offsets = match sampling {
        Sampling::Consecutive => (0..samples).map(|i| i * seq_len).collect(),
        Sampling::Random => distinct_offsets(fit, samples, &mut ChaCha20Rng::seed_from_u64(seed)),
    };
    Ok(offsets.into_iter().map(|offset| tokens[offset..offset + seq_len].to_vec()).collect())
}

/// The consecutive full windows of `ctx` tokens, at most `max` of them; a shorter rest is left out.
///
/// # Errors
/// [`Error::Zero`] for a zero `ctx` or `max`; [`Error::TextTooShort`] when not even one window fits.
pub fn windows(tokens: &[u32], ctx: usize, max: Option<usize>) -> Result<Vec<&[u32]>> {
    check_not_zero("the context length", ctx)?;
    check_not_zero("the number of windows", max.unwrap_or(usize::MAX))?;
    if tokens.len() < ctx {
        return Err(Error::TextTooShort { asked: 1, fit: 0, seq_len: ctx, tokens: tokens.len() });
    }
    Ok(tokens.chunks_exact(ctx).take(max.unwrap_or(usize::MAX)).collect())
}

pub(crate) fn check_not_zero(what: &'static str, value: usize) -> Result<()> {
    if value == 0 { Err(Error::Zero(what)) } else { Ok(()) }
}

/// The first `count` elements of a shuffle of `0..fit`. Only the elements that a swap has moved are stored,
/// so the cost follows `count`, not `fit`.
pub(crate) fn distinct_offsets(fit: usize, count: usize, rng: &mut impl RngCore) -> Vec<usize> {
    let mut moved = HashMap::new();
    let draw = |i: usize| {
        let j = i + uniform_below(rng, (fit - i) as u64) as usize;
        let at_i = moved.get(&i).copied().unwrap_or(i);
        moved.insert(j, at_i).unwrap_or(j)
    };
    (0..count).map(draw).collect()
}

/// A uniform integer in `0..n`, for n >= 1.
pub(crate) fn uniform_below(rng: &mut impl RngCore, n: u64) -> u64 {
    let remainder = (u64::MAX % n + 1) % n; // 2^64 mod n
    loop {
        let word = rng.next_u64();
        if word <= u64::MAX - remainder {
            return word % n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANDOM: SampleRequest =
        SampleRequest { samples: 5, seq_len: 4, sampling: Sampling::Random, seed: 0 };
    const CONSECUTIVE: SampleRequest = SampleRequest { sampling: Sampling::Consecutive, ..RANDOM };

    fn seeded(fit: usize, count: usize, seed: u64) -> Vec<usize> {
        distinct_offsets(fit, count, &mut ChaCha20Rng::seed_from_u64(seed))
    }

    fn tokens(count: u32) -> Vec<u32> {
        (0..count).collect()
    }

    #[test]
    fn consecutive_windows_do_not_overlap_and_skip_nothing() {
        let windows = sample(&tokens(20), &CONSECUTIVE).unwrap();
        assert_eq!(windows.len(), 5);
        assert_eq!(windows.concat(), tokens(20));
    }

    #[test]
    fn random_offsets_are_distinct_even_when_every_one_is_taken() {
        let windows = sample(&tokens(20), &SampleRequest { samples: 17, ..RANDOM }).unwrap();
        let mut offsets: Vec<u32> = windows.iter().map(|window| window[0]).collect();
        assert_ne!(offsets, tokens(17), "the windows are in the order drawn");
        offsets.sort_unstable();
        assert_eq!(offsets, tokens(17));
        for window in windows {
            assert_eq!(window, (window[0]..window[0] + 4).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_offsets_in_every_release() {
        // From an independent Python program: RFC 8439's ChaCha20 block, the PCG32 seed expansion, the
        // shuffle.
        assert_eq!(seeded(300_000, 5, 0), [155_186, 59_399, 105_772, 70_595, 42_412]);
        assert_eq!(seeded(300_000, 5, 42), [127_256, 149_355, 16_783, 81_189, 264_109]);
    }

    #[test]
    fn every_offset_is_about_as_likely() {
        let mut counts = [0u32; 17];
        for seed in 0..2000 {
            for offset in seeded(17, 5, seed) {
                counts[offset] += 1;
            }
        }
        // 10,000 draws over 17 offsets: mean 588, standard deviation 20; five of them on either side.
        assert!(counts.iter().all(|&count| (488..=688).contains(&count)), "{counts:?}");
    }

    #[test]
    fn a_short_text_says_how_many_windows_fit() {
        for (request, expected) in [(CONSECUTIVE, 4), (RANDOM, 16)] {
            let request = SampleRequest { samples: 17, ..request };
            match sample(&tokens(19), &request) {
                Err(Error::TextTooShort { asked: 17, fit, seq_len: 4, tokens: 19 }) => {
                    assert_eq!(fit, expected)
                }
                other => panic!("{other:?}"),
            }
        }
        for request in [CONSECUTIVE, RANDOM] {
            assert!(matches!(sample(&tokens(3), &request), Err(Error::TextTooShort { fit: 0, .. })));
            let huge = SampleRequest { samples: usize::MAX, seq_len: usize::MAX, ..request };
            assert!(matches!(sample(&[], &huge), Err(Error::TextTooShort { fit: 0, .. })));
        }
    }

    #[test]
    fn zero_sizes_are_errors() {
        assert!(matches!(sample(&[1], &SampleRequest { samples: 0, ..RANDOM }), Err(Error::Zero(_))));
        assert!(matches!(sample(&[1], &SampleRequest { seq_len: 0, ..RANDOM }), Err(Error::Zero(_))));
        assert!(matches!(windows(&[1], 0, None), Err(Error::Zero(_))));
        assert!(matches!(windows(&[1], 1, Some(0)), Err(Error::Zero(_))));
    }

    #[test]
    fn a_rest_shorter_than_the_context_is_not_a_window() {
        assert_eq!(windows(&[1, 2, 3, 4, 5], 2, None).unwrap(), [[1, 2], [3, 4]]);
        assert_eq!(windows(&[1, 2, 3, 4, 5], 2, Some(1)).unwrap(), [[1, 2]]);
        assert!(matches!(windows(&[1], 2, None), Err(Error::TextTooShort { fit: 0, .. })));
    }
}
