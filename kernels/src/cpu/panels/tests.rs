//! Every version of the product against f64, and against the others bit for bit.

use super::*;
use crate::Quantized;
use crate::packing::{PackedLinear, Scales};
use crate::testing::{NMSE_FIXED, assert_close, matmul_f64, random};

struct Case {
    risk: &'static str,
    rows: usize,
    n: usize,
    k: usize,
    bits: u32,
    group: usize,
    /// Groups are scattered over the features.
    act_order: bool,
}

const fn case(
    risk: &'static str,
    rows: usize,
    (n, k): (usize, usize),
    bits: u32,
    group: usize,
    act_order: bool,
) -> Case {
    Case { risk, rows, n, k, bits, group, act_order }
}

const CASES: [Case; 20] = [
    case("one token", 1, (64, 256), 4, 128, false),
    case("one token, act-order", 1, (96, 256), 4, 64, true),
    case("two tokens", 2, (32, 128), 4, 32, true),
    case("three tokens in a block of four", 3, (32, 256), 4, 128, true),
    case("five tokens in a block of eight", 5, (64, 128), 4, 128, false),
    case("as many tokens as go straight", 8, (64, 384), 4, 128, true),
    case("one token more", 9, (64, 384), 4, 128, true),
    case("a second block of two tokens", 14, (32, 128), 4, 128, false),
    case("several tiles of tokens", 800, (64, 128), 4, 64, true),
    case("a panel that is not full", 7, (40, 128), 4, 128, true),
    case("two bits", 1, (48, 256), 2, 64, true),
    case("two bits, many tokens", 30, (48, 256), 2, 64, true),
    case("three bits leave bits of a word", 1, (32, 256), 3, 128, true),
    case("three bits, many tokens", 25, (32, 224), 3, 32, true),
    case("eight bits", 1, (32, 256), 8, 128, true),
    case("eight bits, many tokens", 13, (40, 256), 8, 128, false),
    case("one group in several runs", 4, (32, 1000), 8, 1000, false),
    case("a short last group", 1, (32, 200), 4, 96, true),
    case("a short last group, many tokens", 40, (32, 200), 4, 128, true),
    case("eight bits, many tokens, some steps a run", 36, (64, 512), 8, 512, true),
];

impl Case {
    fn g_idx(&self) -> Vec<u32> {
        let place = |i: usize| if self.act_order { i * 37 % self.k } else { i };
        (0..self.k).map(|i| (place(i) / self.group) as u32).collect()
    }

    /// Random codes; scales of both signs; zero points of their own or, where there is a `zero`, all the same.
    fn solved(&self, zero: Option<u8>) -> Quantized {
        let g_idx = self.g_idx();
        let groups = self.k.div_ceil(self.group);
        let most = ((1u32 << self.bits) - 1) as f32;
        let codes =
            random(5, self.n * self.k).iter().map(|x| ((x + 1.0) * 0.5 * most).round() as u8).collect();
        let scale = |x: &f32| half::f16::from_f32(x + 0.01f32.copysign(*x)).to_f32();
        let scales = random(6, groups * self.n).iter().map(scale).collect();
        let own = |x: &f32| 1 + (x.abs() * (most - 1.0)) as u8;
        let zeros = random(7, groups * self.n).iter().map(|x| zero.unwrap_or(own(x))).collect();
        Quantized { bits: self.bits, codes, scales, zeros, g_idx, losses: vec![0.0; self.n] }
    }
}

#[test]
fn every_version_agrees_with_f64_and_with_the_others() {
    for case in &CASES {
        for (zero, offset, wide) in
            [(None, 1, false), (Some(1 << (case.bits - 1)), 0, false), (None, 0, true)]
        {
            let mut solved = case.solved(zero);
            let mut packed = PackedLinear::pack(&solved, offset).unwrap();
            if wide {
                solved.scales.iter_mut().for_each(|scale| *scale *= 0.123_456_78);
                packed.scales = Scales::exact(solved.scales.clone());
            }
            let bias = random(9, case.n);
            packed.bias = Some(bias.clone());
            let x = random(8, case.rows * case.k);
            let mut expected = matmul_f64(&x, &solved.dequantized(), (case.rows, case.n, case.k));
            expected.iter_mut().zip(bias.iter().cycle()).for_each(|(y, b)| *y += f64::from(*b));
            let weight = Panels::pack(&packed).unwrap();
            let mut row = vec![0.0; case.k];
            for (n, values) in solved.dequantized().chunks(case.k).enumerate() {
                weight.write_row(n, &mut row);
                assert_eq!(row, values, "{}, row {n}", case.risk);
            }
            let portable = weight.product(&x, case.rows, Isa::Portable);
            assert_close(case.risk, &portable, &expected, NMSE_FIXED);
            for isa in Isa::all() {
                assert_eq!(weight.product(&x, case.rows, isa), portable, "{}, {isa:?}", case.risk);
            }
        }
    }
}

#[test]
fn a_token_has_the_same_result_among_others_and_alone() {
    let case = case("", 30, (64, 256), 4, 64, true);
    let weight = Panels::pack(&PackedLinear::pack(&case.solved(None), 0).unwrap()).unwrap();
    let x = random(3, 30 * 256);
    let together = weight.product(&x, 30, Isa::best());
    for (row, expected) in x.chunks(256).zip(together.chunks(64)) {
        assert_eq!(weight.product(row, 1, Isa::best()), expected);
    }
}

#[test]
fn the_largest_sums_stay_within_32_bits() {
    let k = 1024;
    let solved = Quantized {
        bits: 8,
        codes: vec![255; 32 * k],
        scales: vec![1.0; 32],
        zeros: vec![1; 32],
        g_idx: vec![0; k],
        losses: vec![0.0; 32],
    };
    let mut packed = PackedLinear::pack(&solved, 1).unwrap();
    for (offset, value) in [(0, 255.0), (1, 254.0)] {
        packed.zero_offset = offset;
        let weight = Panels::pack(&packed).unwrap();
        for isa in Isa::all() {
            for rows in [1, 20] {
                let y = weight.product(&vec![-3.0; rows * k], rows, isa);
                assert_close("largest sums", &y, &vec![-3.0 * value * k as f64; rows * 32], 1e-12);
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_not_hidden() {
    let case = case("", 1, (32, 256), 4, 64, true);
    let weight = Panels::pack(&PackedLinear::pack(&case.solved(None), 0).unwrap()).unwrap();
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = random(1, 256);
        x[77] = odd;
        for isa in Isa::all() {
            assert!(weight.product(&x, 1, isa).iter().all(|y| y.is_nan()), "{odd}, {isa:?}");
        }
    }
    assert_eq!(weight.product(&[0.0; 256], 1, Isa::best()), [0.0; 32]);
    assert_eq!(weight.product(&[], 0, Isa::best()), [0.0; 0]);
}
