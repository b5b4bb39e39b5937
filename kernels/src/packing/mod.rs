//! The GPTQ file format, bit for bit: integer codes to 32-bit words and back.
//!
//! Every width is one rule: the codes of a lane, `bits` each, follow one another as a little-endian bit
//! stream that is cut into 32-bit words. `qweight` is `[in * bits / 32, out]`: a lane is an output row, its
//! words lie a row apart. `qzeros` is `[groups, out * bits / 32]`: a lane is a group, its words are adjacent.

mod lanes;
#[cfg(test)]
mod properties;
mod scales;

use std::borrow::Cow;
use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use lanes::unpack_lanes;
pub use lanes::{V1Zeros, lane_words, pack_lane, pack_zeros, unpack_lane, v1_zeros_to_v2};
use scales::Rearrange;
pub use scales::Scales;

use crate::error::expect;
use crate::{Error, Quantized, Result};

/// What is subtracted from a zero point before it is stored: 1 in v1 ("gptq"), 0 in v2 ("gptq_v2").
pub type ZeroOffset = u8;

/// One quantized linear as its tensors lie in a file, or several stacked along `out`. The codes, nearly all of it, may
/// stay where they are.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedLinear<'a> {
    /// 2, 3, 4 or 8.
    pub bits: u32,
    pub in_features: usize,
    pub out_features: usize,
    /// `[in * bits / 32, out]`: side by side `[in * bits / 32, its out]` of every linear.
    pub qweight: Vec<Cow<'a, [u32]>>,
    /// `[groups, out * bits / 32]`
    pub qzeros: Vec<u32>,
    /// `[groups, out]`
    pub scales: Scales,
    /// `[in]`: group of each input feature.
    pub g_idx: Vec<u32>,
    pub zero_offset: ZeroOffset,
    /// `[out]`, where the layer has one that is not all zero.
    pub bias: Option<Vec<f32>>,
}

impl<'a> PackedLinear<'a> {
    /// Packs a solved linear. Fails where a zero or a scale does not fit the format.
    pub fn pack(solved: &Quantized, zero_offset: ZeroOffset) -> Result<Self> {
        let (out_features, in_features) = solved.dims();
        let bits = solved.bits;
        let words = lane_words(in_features, bits)?;
        let mut lanes = vec![0; words * out_features];
        lanes
            .par_chunks_exact_mut(words)
            .zip(solved.codes.par_chunks_exact(in_features))
            .for_each(|(words, codes)| pack_lane(codes, bits, words));
        Ok(Self {
            bits,
            in_features,
            out_features,
            qweight: vec![Cow::Owned(transpose(&lanes, out_features, words))],
            qzeros: pack_zeros(&solved.zeros, out_features, bits, zero_offset)?,
            scales: Scales::F16(stored_scales(&solved.scales)?),
            g_idx: solved.g_idx.clone(),
            zero_offset,
            bias: None,
        })
    }

    /// Checks every length and the range of `g_idx`.
    pub fn check(&self) -> Result<()> {
        let groups = self.groups();
        let (words, parts) = (lane_words(self.in_features, self.bits)?, self.qweight.iter());
        if let Some(part) = parts.clone().find(|part| !part.len().is_multiple_of(words.max(1))) {
            return Err(Error::shape("qweight", format!("{words} rows"), format!("{} words", part.len())));
        }
        let lengths = [
            ("qweight", words * self.out_features, parts.map(|part| part.len()).sum()),
            ("qzeros", lane_words(self.out_features, self.bits)? * groups, self.qzeros.len()),
            ("scales", groups * self.out_features, self.scales.len()),
            ("g_idx", self.in_features, self.g_idx.len()),
        ];
        for (name, expected, got) in lengths {
            expect(name, expected, got)?;
        }
        match self.g_idx.iter().find(|&&g| g as usize >= groups) {
            Some(g) => Err(Error::shape("g_idx", format!("groups below {groups}"), g)),
            None => Ok(()),
        }
    }

    pub fn groups(&self) -> usize {
        self.scales.len() / self.out_features.max(1)
    }

    /// Codes `[out, in]`, one byte each, input features in file order.
    pub fn codes(&self) -> Vec<u8> {
        let words = self.qweight_rows();
        let lanes = |part: &Cow<[u32]>| transpose(part, words, part.len() / words.max(1));
        let unpacked = |part| unpack_lanes(&lanes(part), words, self.bits, self.in_features);
        let mut parts = self.qweight.iter().map(unpacked);
        let first = parts.next().unwrap_or_default();
        parts.fold(first, |mut all, part| {
            all.extend_from_slice(&part);
            all
        })
    }

    /// Rows of `qweight`: the words of a lane.
    fn qweight_rows(&self) -> usize {
        self.qweight.iter().map(|part| part.len()).sum::<usize>() / self.out_features.max(1)
    }

    /// The rows of `qweight`, one after the other, each in as many pieces as linears are stacked.
    pub fn qweight_pieces(&self) -> impl Iterator<Item = &[u32]> {
        let rows = self.qweight_rows();
        let piece = move |part: &[u32], row: usize| row * part.len() / rows..(row + 1) * part.len() / rows;
        (0..rows).flat_map(move |row| self.qweight.iter().map(move |part| &part[piece(part, row)]))
    }

    /// `qweight` in one piece, copied only where linears are stacked.
    pub fn joined_qweight(&self) -> Cow<'_, [u32]> {
        match &self.qweight[..] {
            [whole] => Cow::Borrowed(whole),
            _ => Cow::Owned(self.qweight_pieces().collect::<Vec<_>>().concat()),
        }
    }

    /// Zero points `[groups, out]`; v1's wrapped zero reads as `2^bits`, as other readers of v1 have it.
    pub fn zeros(&self) -> Vec<u16> {
        let words = self.qzeros.len() / self.groups().max(1);
        let stored = unpack_lanes(&self.qzeros, words, self.bits, self.out_features);
        stored.iter().map(|z| *z as u16 + self.zero_offset as u16).collect()
    }

    /// `(code - zero) * scale`, `[out, in]`.
    pub fn dequantized(&self) -> Vec<f32> {
        let (codes, zeros, n) = (self.codes(), self.zeros(), self.out_features);
        let scales = self.scales.to_f32();
        let mut values = vec![0.0; codes.len()];
        let rows =
            values.par_chunks_exact_mut(self.in_features).zip(codes.par_chunks_exact(self.in_features));
        rows.enumerate().for_each(|(row, (values, codes))| {
            for ((value, code), group) in values.iter_mut().zip(codes).zip(&self.g_idx) {
                let place = *group as usize * n + row;
                *value = (*code as f32 - zeros[place] as f32) * scales[place];
            }
        });
        values
    }

    /// The outputs of one linear of a stack. Whole words of zero points must belong to it.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let words = lane_words(rows.len(), self.bits)?;
        let first = lane_words(rows.start, self.bits)?;
        let columns = |values: &[u32], width: usize, span: Range<usize>| -> Vec<u32> {
            values.par_chunks_exact(width).flat_map_iter(|row| row[span.clone()].iter().copied()).collect()
        };
        let zero_words = lane_words(self.out_features, self.bits)?;
        let span = Columns { width: self.out_features, span: rows.clone() };
        Ok(Self {
            out_features: rows.len(),
            qweight: vec![columns(&self.joined_qweight(), self.out_features, rows.clone()).into()],
            qzeros: columns(&self.qzeros, zero_words, first..first + words),
            scales: Scales::rearranged(&[&self.scales], span),
            bias: self.bias.as_ref().map(|bias| bias[rows.clone()].to_vec()),
            g_idx: self.g_idx.clone(),
            ..*self
        })
    }

    /// Several linears with the same input, group assignment and format, stacked along `out`.
    /// Returns them where they cannot share one matrix.
    pub fn stack(mut parts: Vec<Self>) -> std::result::Result<Self, Vec<Self>> {
        let alike = |a: &Self, b: &Self| {
            (a.bits, a.in_features, a.zero_offset, a.groups())
                == (b.bits, b.in_features, b.zero_offset, b.groups())
                && a.g_idx == b.g_idx
                && a.bias.is_some() == b.bias.is_some()
        };
        if parts.is_empty() || !parts.iter().all(|part| alike(part, &parts[0])) {
            return Err(parts);
        }
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let groups = parts[0].groups();
        Ok(Self {
            out_features: parts.iter().map(|p| p.out_features).sum(),
            qzeros: interleave(parts.iter().map(|p| (&p.qzeros[..], p.qzeros.len() / groups.max(1))), groups),
            scales: {
                let widths = parts.iter().map(|p| p.out_features).collect();
                let scales: Vec<_> = parts.iter().map(|p| &p.scales).collect();
                Scales::rearranged(&scales, SideBySide { widths, groups })
            },
            qweight: parts.iter_mut().flat_map(|p| std::mem::take(&mut p.qweight)).collect(),
            bias: parts.iter().map(|p| p.bias.as_deref()).collect::<Option<Vec<_>>>().map(|b| b.concat()),
            ..parts.remove(0)
        })
    }
}

/// Some columns of a matrix.
struct Columns {
    width: usize,
    span: Range<usize>,
}

impl Rearrange for Columns {
    fn apply<T: Copy + Send + Sync>(&self, parts: &[Vec<T>]) -> Vec<T> {
        let rows = parts.iter().flat_map(|part| part.chunks_exact(self.width));
        rows.flat_map(|row| &row[self.span.clone()]).copied().collect()
    }
}

/// Matrices of `groups` rows beside one another.
struct SideBySide {
    widths: Vec<usize>,
    groups: usize,
}

impl Rearrange for SideBySide {
    fn apply<T: Copy + Send + Sync>(&self, parts: &[Vec<T>]) -> Vec<T> {
        interleave(parts.iter().map(Vec::as_slice).zip(self.widths.iter().copied()), self.groups)
    }
}

/// Scales as the file holds them; an error where one is beyond f16.
pub(crate) fn stored_scales(scales: &[f32]) -> Result<Vec<f16>> {
    let stored = |scale: &f32| {
        let stored = f16::from_f32(*scale);
        let why = "beyond f16";
        let error = || Error::Unrepresentable { op: "pack", value: format!("scale {scale}"), why };
        stored.is_finite().then_some(stored).ok_or_else(error)
    };
    scales.iter().map(stored).collect()
}

/// `[rows, columns]` to `[columns, rows]`, in tiles that stay in the cache.
fn transpose(values: &[u32], rows: usize, columns: usize) -> Vec<u32> {
    const TILE: usize = 32;
    let mut turned = vec![0; values.len()];
    turned.par_chunks_mut((TILE * rows).max(1)).enumerate().for_each(|(tile, turned)| {
        for start in (0..rows).step_by(TILE) {
            for (c, out) in turned.chunks_exact_mut(rows).enumerate() {
                for r in start..(start + TILE).min(rows) {
                    out[r] = values[r * columns + tile * TILE + c];
                }
            }
        }
    });
    turned
}

/// Row `r` of every part in turn, for `count` rows; each part comes with its row length.
fn interleave<'a, T: Copy + 'a>(parts: impl Iterator<Item = (&'a [T], usize)>, count: usize) -> Vec<T> {
    let parts: Vec<_> = parts.collect();
    let row = |r: usize| parts.iter().map(move |(values, width)| &values[r * width..(r + 1) * width]);
    (0..count).flat_map(row).collect::<Vec<_>>().concat()
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

    fn sample(out_features: usize, seed: u32) -> Quantized {
        Quantized {
            bits: 4,
            codes: codes(seed, out_features * 64, 4),
            scales: (0..2 * out_features).map(|i| (1 + i) as f32 / 64.0).collect(),
            zeros: codes(seed + 1, 2 * out_features, 3).iter().map(|z| z + 1).collect(),
            g_idx: (0..64).map(|i| i % 2).collect(),
            losses: vec![0.0; out_features],
        }
    }

    #[test]
    fn packing_and_unpacking_a_linear_returns_codes_and_zeros() {
        let solved = sample(40, 3);
        let packed = PackedLinear::pack(&solved, 1).unwrap();
        packed.check().unwrap();
        assert_eq!(packed.codes(), solved.codes);
        assert_eq!(packed.dequantized(), solved.dequantized());
        assert!(packed.zeros().iter().zip(&solved.zeros).all(|(a, b)| *a == *b as u16));
    }

    #[test]
    fn stacked_linears_keep_their_rows() {
        let (a, b) = (sample(8, 1), sample(16, 2));
        let (a, b) = (PackedLinear::pack(&a, 0).unwrap(), PackedLinear::pack(&b, 0).unwrap());
        let whole = PackedLinear::stack(vec![a.clone(), b.clone()]).unwrap();
        whole.check().unwrap();
        assert_eq!(whole.codes(), [a.codes(), b.codes()].concat());
        let row = |z: &[u16], width: usize, g: usize| z[g * width..(g + 1) * width].to_vec();
        for g in 0..2 {
            let expected = [row(&a.zeros(), 8, g), row(&b.zeros(), 16, g)].concat();
            assert_eq!(row(&whole.zeros(), 24, g), expected);
        }
        assert_eq!(whole.rows(0..8).unwrap(), a);
        assert_eq!(whole.rows(8..24).unwrap(), b);
        assert!(whole.rows(4..24).is_err(), "half a word of zero points");
        let other = PackedLinear { g_idx: vec![0; 64], ..b };
        assert!(PackedLinear::stack(vec![a, other]).is_err(), "different groups cannot share a matrix");
    }

    #[test]
    fn a_group_index_out_of_range_is_refused() {
        let mut packed = PackedLinear::pack(&sample(8, 1), 0).unwrap();
        packed.g_idx[5] = 2;
        assert!(packed.check().is_err());
    }
}
