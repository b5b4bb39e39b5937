//! Zero points, whichever way a writer stored them.

use gptq_kernels::packing::{V1Zeros, pack_zeros, v1_zeros_to_v2};

use crate::quant_config::{CheckpointFormat, QuantConfig};

/// The zero points of a linear as v2 has them, from words `[groups, out * bits / 32]` in the format of the file.
pub(crate) fn zeros_as_v2(words: Vec<u32>, quant: &QuantConfig, out_features: usize) -> Vec<u32> {
    if quant.format == CheckpointFormat::GptqV2 {
        return words;
    }
    let row = out_features * quant.bits as usize / 32;
    let each = converted(words.clone(), row, quant.bits, V1Zeros::EachCode);
    // Of 3 bits there are two kinds of v1. A symmetric file shows which, as all its zero points are the middle code.
    if quant.bits == 3 && quant.sym && !all_middle(&each, quant.bits, out_features) {
        let whole = converted(words, row, quant.bits, V1Zeros::WholeWords);
        if all_middle(&whole, quant.bits, out_features) {
            return whole;
        }
    }
    each
}

/// The format in which every zero point is the middle code, if there is one.
pub(super) fn symmetric_format(
    words: &[u32],
    quant: &QuantConfig,
    out_features: usize,
) -> Option<CheckpointFormat> {
    [CheckpointFormat::Gptq, CheckpointFormat::GptqV2].into_iter().find(|format| {
        let quant = QuantConfig { format: *format, sym: true, ..quant.clone() };
        all_middle(&zeros_as_v2(words.to_vec(), &quant, out_features), quant.bits, out_features)
    })
}

fn converted(mut words: Vec<u32>, row: usize, bits: u32, writer: V1Zeros) -> Vec<u32> {
    v1_zeros_to_v2(&mut words, row, bits, writer);
    words
}

/// Whether every zero point is `2^(bits - 1)`.
fn all_middle(words: &[u32], bits: u32, out_features: usize) -> bool {
    let row = pack_zeros(&vec![1 << (bits - 1); out_features], out_features, bits, 0);
    row.is_ok_and(|row| words.iter().zip(row.iter().cycle()).all(|(word, expected)| word == expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symmetric_zero_points_of_3_bits_are_read_from_both_kinds_of_v1() {
        let quant = QuantConfig { bits: 3, ..QuantConfig::default() };
        let v2 = pack_zeros(&[4; 64], 64, 3, 0).unwrap();
        let each = pack_zeros(&[4; 64], 64, 3, 1).unwrap();
        assert_eq!(zeros_as_v2(each, &quant, 64), v2);
        let ones = [0x2492_4924u32, 0x9249_2492, 0x4924_9249];
        let whole = v2.iter().zip(ones.iter().cycle()).map(|(word, one)| word.wrapping_sub(*one)).collect();
        assert_eq!(zeros_as_v2(whole, &quant, 64), v2);
    }
}
