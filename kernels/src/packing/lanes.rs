//! One lane: a stream of codes cut into 32-bit words.

use rayon::prelude::*;

use super::ZeroOffset;
use crate::{Error, Result};

/// Words of a lane of `count` codes; an error where the last word would not be full.
pub fn lane_words(count: usize, bits: u32) -> Result<usize> {
    let total = count * bits as usize;
    if !matches!(bits, 2 | 3 | 4 | 8) || !total.is_multiple_of(32) {
        return Err(Error::shape(
            "packing",
            "2, 3, 4 or 8 bits filling whole 32-bit words",
            format!("{count} codes of {bits} bits"),
        ));
    }
    Ok(total / 32)
}

/// Packs one lane of codes into its words.
pub fn pack_lane(codes: &[u8], bits: u32, words: &mut [u32]) {
    words.fill(0);
    for (position, code) in (0..).step_by(bits as usize).zip(codes) {
        let (word, shift) = (position / 32, position as u32 % 32);
        words[word] |= (*code as u32) << shift;
        if shift + bits > 32 {
            words[word + 1] |= *code as u32 >> (32 - shift);
        }
    }
}

/// The inverse of [`pack_lane`].
pub fn unpack_lane(words: &[u32], bits: u32, codes: &mut [u8]) {
    let mask = (1u32 << bits) - 1;
    for (position, code) in (0..).step_by(bits as usize).zip(codes) {
        let (word, shift) = (position / 32, position as u32 % 32);
        let mut value = words[word] >> shift;
        if shift + bits > 32 {
            value |= words[word + 1] << (32 - shift);
        }
        *code = (value & mask) as u8;
    }
}

/// Zero points `[groups, out]` to words `[groups, out * bits / 32]`.
pub fn pack_zeros(zeros: &[u8], out_features: usize, bits: u32, offset: ZeroOffset) -> Result<Vec<u32>> {
    let words = lane_words(out_features, bits)?;
    if let Some(zero) = zeros.iter().find(|&&zero| zero < offset) {
        let why = "format gptq (v1) stores zero - 1; use gptq_v2";
        return Err(Error::Unrepresentable { op: "pack", value: format!("zero {zero}"), why });
    }
    let stored: Vec<u8> = zeros.iter().map(|zero| zero - offset).collect();
    let mut packed = vec![0; stored.len() / out_features * words];
    for (words, codes) in packed.chunks_exact_mut(words).zip(stored.chunks_exact(out_features)) {
        pack_lane(codes, bits, words);
    }
    Ok(packed)
}

pub(super) fn unpack_lanes(lanes: &[u32], words: usize, bits: u32, count: usize) -> Vec<u8> {
    let mut codes = vec![0; lanes.len() / words.max(1) * count];
    codes
        .par_chunks_exact_mut(count.max(1))
        .zip(lanes.par_chunks_exact(words.max(1)))
        .for_each(|(codes, words)| unpack_lane(words, bits, codes));
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(seed: u32, count: usize, bits: u32) -> Vec<u8> {
        (0..count as u32)
            .map(|i| {
                (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8 & ((1u32 << bits) - 1) as u8
            })
            .collect()
    }

    #[test]
    fn every_width_survives_the_round_trip() {
        for bits in [2, 3, 4, 8] {
            let original = codes(1, 96, bits);
            let mut words = vec![u32::MAX; lane_words(96, bits).unwrap()];
            pack_lane(&original, bits, &mut words);
            let mut back = vec![0; 96];
            unpack_lane(&words, bits, &mut back);
            assert_eq!(back, original, "{bits} bits");
        }
    }

    /// The layout of 3 bits as the format's description spells it out, written independently of the stream.
    #[test]
    fn three_bit_codes_straddle_words_as_the_format_says() {
        let c: Vec<u32> = codes(5, 32, 3).iter().map(|c| *c as u32).collect();
        let mut words = [0; 3];
        pack_lane(&codes(5, 32, 3), 3, &mut words);
        let mut expected = [0u32; 3];
        for j in 0..10 {
            expected[0] |= c[j] << (3 * j);
            expected[1] |= c[11 + j] << (3 * j + 1);
            expected[2] |= c[22 + j] << (3 * j + 2);
        }
        expected[0] |= (c[10] & 3) << 30;
        expected[1] |= c[10] >> 2 | (c[21] & 1) << 31;
        expected[2] |= c[21] >> 1;
        assert_eq!(words, expected);
    }

    #[test]
    fn symmetric_zeros_are_the_published_words() {
        let word = |bits, zero, offset| pack_zeros(&[zero; 8], 8, bits, offset).unwrap()[0];
        assert_eq!(word(4, 8, 1), 0x7777_7777);
        assert_eq!(word(4, 8, 0), 0x8888_8888);
        assert_eq!(word(8, 128, 1), 0x7F7F_7F7F);
        assert_eq!(word(8, 128, 0), 0x8080_8080);
    }

    #[test]
    fn a_zero_that_v1_cannot_hold_is_refused() {
        assert!(pack_zeros(&[0; 8], 8, 4, 1).is_err());
        assert!(pack_zeros(&[0; 8], 8, 4, 0).is_ok());
    }

    #[test]
    fn lanes_that_do_not_fill_their_words_are_refused() {
        assert!(lane_words(33, 4).is_err());
        assert!(lane_words(32, 5).is_err());
        assert_eq!(lane_words(64, 3).unwrap(), 6);
    }
}
