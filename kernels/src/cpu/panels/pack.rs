//! From the file's layout to panels.

use half::f16;
use rayon::prelude::*;

use super::{Lanes, OwnedScales, OwnedZeros, PANEL, Panels, RUN, Run, pairs_in_word};
use crate::Result;
use crate::cpu::LongLived;
use crate::packing::{PackedLinear, Scales};

impl Panels {
    /// Repacks a linear that may be groups and features in any order.
    pub fn pack(packed: &PackedLinear) -> Result<Self> {
        packed.check()?;
        let (n, k, groups) = (packed.out_features, packed.in_features, packed.groups());
        let bits = packed.bits as usize;
        let mut order: Vec<u32> = (0..k as u32).collect();
        order.sort_by_key(|i| packed.g_idx[*i as usize]);
        let runs = runs(&packed.g_idx, groups, 2 * pairs_in_word(bits));
        let words = runs.last().map_or(0, |run| run.at + run.words);
        let mut codes = LongLived::<Lanes>::zeros(n.div_ceil(PANEL) * words);
        let unpacked = packed.codes();
        let panels = codes.par_chunks_exact_mut(words.max(1)).zip(unpacked.par_chunks((PANEL * k).max(1)));
        panels.for_each(|(panel, rows)| {
            for (lane, row) in rows.chunks_exact(k).enumerate() {
                runs.iter().for_each(|run| put(panel, lane, row, &order, run, bits));
            }
        });
        let zeros = packed.zeros();
        Ok(Self {
            bits,
            dims: (n, k),
            scales: match &packed.scales {
                Scales::F16(scales) => OwnedScales::F16(of_panels(scales, n, groups, f16::ZERO)),
                Scales::F32(scales) => OwnedScales::F32(of_panels(scales, n, groups, 0.0)),
            },
            zeros: match zeros.iter().all(|zero| *zero == zeros[0]) {
                true => OwnedZeros::Same(zeros.first().copied().unwrap_or(0)),
                false => OwnedZeros::Each(of_panels(&zeros, n, groups, 0)),
            },
            runs,
            groups,
            words,
            codes,
            order: (!order.is_sorted()).then_some(order),
            bias: packed.bias.clone(),
        })
    }
}

/// Groups cut into runs; a word holds `codes_in_word`.
pub(super) fn runs(g_idx: &[u32], groups: usize, codes_in_word: usize) -> Vec<Run> {
    let mut sizes = vec![0; groups];
    g_idx.iter().for_each(|g| sizes[*g as usize] += 1);
    let (mut runs, mut start, mut at) = (Vec::new(), 0, 0);
    for (group, size) in sizes.into_iter().enumerate() {
        let end = start + size;
        for first in (start..end).step_by(RUN) {
            let columns = first..(first + RUN).min(end);
            let words = columns.len().div_ceil(codes_in_word);
            runs.push(Run { group, columns, at, words });
            at += words;
        }
        start = end;
    }
    runs
}

/// Puts one row's codes of a run into its lane.
fn put(panel: &mut [Lanes], lane: usize, row: &[u8], order: &[u32], run: &Run, bits: usize) {
    let columns = order[run.columns.clone()].chunks(2 * pairs_in_word(bits));
    for (columns, lanes) in columns.zip(&mut panel[run.at..]) {
        for (i, pair) in columns.chunks(2).enumerate() {
            let code = |j: usize| pair.get(j).map_or(0, |column| u32::from(row[*column as usize]));
            lanes.0[lane] |= (code(0) | code(1) << 16) << (bits * i);
        }
    }
}

/// `[groups, n]` to `[panels, groups]` of a panel's rows.
fn of_panels<T: Copy>(values: &[T], n: usize, groups: usize, none: T) -> Vec<[T; PANEL]> {
    let panel = |panel: usize| {
        (0..groups).map(move |group| {
            let value =
                |lane| Some(panel * PANEL + lane).filter(|row| *row < n).map(|row| values[group * n + row]);
            std::array::from_fn(|lane| value(lane).unwrap_or(none))
        })
    };
    (0..n.div_ceil(PANEL)).flat_map(panel).collect()
}
