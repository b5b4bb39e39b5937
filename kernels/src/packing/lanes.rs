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

/// How the writer of a v1 file took one from its zero points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum V1Zeros {
    /// From each by itself, as the format says.
    EachCode,
    /// From whole words, as GPTQModel and AutoGPTQ have done since 2024. With 2, 4 and 8 bits that is the same as far as no
    /// zero point is 0, from which a word borrows at its neighbour. With 3 bits the words that are subtracted are not
    /// those of the layout, so these files differ from all others.
    WholeWords,
}

/// The zero points of a v1 file as a v2 file has them, rows of `words` words.
///
/// With 2, 4 and 8 bits one is added to every zero point of a word by one addition: what a borrowing writer took
/// from neighbours comes back, and where nothing was borrowed nothing is carried.
pub fn v1_zeros_to_v2(zeros: &mut [u32], words: usize, bits: u32, writer: V1Zeros) {
    /// What GPTQModel adds to the words of 32 zero points of 3 bits.
    const THREE_BITS: [u32; 3] = [0x2492_4924, 0x9249_2492, 0x4924_9249];
    let by_word = |zeros: &mut [u32], ones: &[u32]| {
        for row in zeros.chunks_exact_mut(words.max(1)) {
            row.iter_mut().zip(ones.iter().cycle()).for_each(|(word, ones)| *word = word.wrapping_add(*ones));
        }
    };
    match (bits, writer) {
        (3, V1Zeros::WholeWords) => by_word(zeros, &THREE_BITS),
        (3, V1Zeros::EachCode) => {
            let mut codes = vec![0; words * 32 / 3];
            for row in zeros.chunks_exact_mut(words.max(1)) {
                unpack_lane(row, bits, &mut codes);
                codes.iter_mut().for_each(|code| *code = (*code + 1) & 7);
                pack_lane(&codes, bits, row);
            }
        }
        _ => by_word(zeros, &[(0..32).step_by(bits as usize).fold(0, |ones, bit| ones | 1 << bit)]),
    }
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

    /// One subtraction a word, as writers of v1 do it, takes from the neighbour of a zero point of 0.
    #[test]
    fn zero_points_of_0_come_back_from_words_that_borrowed() {
        for (bits, one) in [(2, 0x5555_5555u32), (4, 0x1111_1111), (8, 0x0101_0101)] {
            let zeros: Vec<u8> =
                (0..64u32).map(|i| (i.wrapping_mul(7) % 5 * (i % 3)) as u8 % (1 << (bits - 1))).collect();
            let whole = pack_zeros(&zeros, 64, bits, 0).unwrap();
            let mut stored: Vec<u32> = whole.iter().map(|word| word.wrapping_sub(one)).collect();
            v1_zeros_to_v2(&mut stored, whole.len(), bits, V1Zeros::WholeWords);
            assert_eq!(stored, whole, "{bits} bits");
        }
    }

    #[test]
    fn zero_points_above_0_read_the_same_whichever_way_one_was_taken_from_them() {
        for bits in [2, 3, 4, 8] {
            let zeros: Vec<u8> = (0..128u32).map(|i| 1 + (i * 11 % ((1 << bits) - 1)) as u8).collect();
            let mut stored = pack_zeros(&zeros, 64, bits, 1).unwrap();
            v1_zeros_to_v2(&mut stored, lane_words(64, bits).unwrap(), bits, V1Zeros::EachCode);
            assert_eq!(stored, pack_zeros(&zeros, 64, bits, 0).unwrap(), "{bits} bits");
        }
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
