//! What holds for all codes of all widths.

use proptest::prelude::*;

use super::*;

const WIDTHS: [u32; 4] = [2, 3, 4, 8];

/// A width, and whole lanes of codes in it: `rows` of 32.
fn codes(rows: usize) -> impl Strategy<Value = (u32, Vec<u8>)> {
    prop::sample::select(&WIDTHS[..]).prop_flat_map(move |bits| {
        let most = ((1u16 << bits) - 1) as u8;
        (Just(bits), prop::collection::vec(0..=most, 32 * rows))
    })
}

/// The lane as one little-endian number, bit by bit.
fn bit_of(words: &[u32], position: usize) -> bool {
    words[position / 32] >> (position % 32) & 1 == 1
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_lane_is_a_little_endian_stream_of_bits((bits, codes) in codes(3)) {
        let mut words = vec![u32::MAX; lane_words(codes.len(), bits).unwrap()];
        pack_lane(&codes, bits, &mut words);
        for (i, code) in codes.iter().enumerate() {
            for bit in 0..bits as usize {
                prop_assert_eq!(bit_of(&words, i * bits as usize + bit), code >> bit & 1 == 1);
            }
        }
        let mut back = vec![0; codes.len()];
        unpack_lane(&words, bits, &mut back);
        prop_assert_eq!(back, codes);
    }

    #[test]
    fn lanes_of_half_a_word_are_refused(bits in prop::sample::select(&WIDTHS[..]), count in 1usize..200) {
        prop_assert_eq!(lane_words(count, bits).is_ok(), (count * bits as usize).is_multiple_of(32));
    }

    #[test]
    fn zero_points_of_both_formats_come_back((bits, zeros) in codes(2), v1 in any::<bool>()) {
        // v1 stores zero - 1 and cannot hold 0.
        let zeros: Vec<u8> = zeros.into_iter().map(|zero| zero.max(v1 as u8)).collect();
        let packed = PackedLinear {
            bits,
            in_features: 32,
            out_features: 32,
            qweight: vec![vec![0; bits as usize * 32].into()],
            qzeros: pack_zeros(&zeros, 32, bits, v1 as u8).unwrap(),
            scales: Scales::F16(vec![f16::ONE; 64]),
            g_idx: vec![0; 32],
            zero_offset: v1 as u8,
            bias: None,
        };
        packed.check().unwrap();
        prop_assert_eq!(packed.zeros(), zeros.into_iter().map(u16::from).collect::<Vec<_>>());
    }

    #[test]
    fn a_zero_that_v1_cannot_hold_is_refused((bits, mut zeros) in codes(1), place in 0usize..32) {
        zeros[place] = 0;
        prop_assert!(pack_zeros(&zeros, 32, bits, 1).is_err());
        prop_assert!(pack_zeros(&zeros, 32, bits, 0).is_ok());
    }
}
