//! Quantized weights as panels, and their product with activations in 16-bit fixed point.
//!
//! A panel is 32 output rows, interleaved: the words in which their codes stand follow one another, so that a vector
//! register holds the same input features of as many rows, and a product reads the panel from its first byte to its
//! last. Features come in the order of their groups, cut into runs of at most [`RUN`] that have one scale and one zero
//! point in every row; act-order is a matter of the order in which activations are read.
//!
//! The activations of a run become integers of 16 bits times a step (see [`fixed`]). Products and sums of integers are
//! exact, so the result depends neither on the processor nor on how many rows are multiplied at once, and its only error
//! is that of the 16 bits: 1e-9 of the result's square or less for activations of one size, a hundred thousandth of what
//! eight bits leave.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod fixed;
mod kernels;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod portable;
mod rounded;
#[cfg(test)]
mod tests;

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::{Isa, Parts};
use super::{LongLived, team};
use fixed::{Block, Blocks};
use kernels::Kernels;
pub(super) use rounded::Rounded;

/// Output rows of a panel.
const PANEL: usize = 32;

/// Most input features of a run: with codes of 8 bits and activations of 16, sums stay within 32 bits.
pub(super) const RUN: usize = 128;

/// Up to so many tokens codes go straight from words to products; beyond, a run is unpacked once for all tokens.
const DIRECT: usize = 8;

/// Bits of a code that has been unpacked.
const UNPACKED: usize = 16;

/// Tokens whose results one thread keeps at hand (24 KB) while it reads a panel.
const TILE: usize = 192;

/// A word of every row of a panel. Its low half holds the first code of each of its pairs, its high half the second.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Lanes([u32; PANEL]);

/// Begins where a cache line does.
#[repr(align(64))]
struct Aligned<T>(T);

/// Input features with the same scale and zero point in every row.
struct Run {
    group: usize,
    /// In the order of the groups.
    columns: Range<usize>,
    /// Words of a row before this run, and in it; the last one may have room left.
    at: usize,
    words: usize,
}

/// A quantized weight `[out, in]`.
pub(crate) struct Panels {
    bits: usize,
    dims: (usize, usize),
    runs: Vec<Run>,
    groups: usize,
    /// Words of a row.
    words: usize,
    /// `[panels, words]`
    codes: LongLived<Lanes>,
    scales: OwnedScales,
    zeros: OwnedZeros,
    /// Input feature of each column; `None` where the order is the file's own.
    order: Option<Vec<u32>>,
    bias: Option<Vec<f32>>,
}

/// `[panels, groups]` of a panel's rows.
enum OwnedScales {
    F16(Vec<[f16; PANEL]>),
    F32(Vec<[f32; PANEL]>),
}

enum OwnedZeros {
    /// Nearly always: symmetric grids have one.
    Same(u16),
    Each(Vec<[u16; PANEL]>),
}

/// One panel's `[groups]`.
#[derive(Clone, Copy)]
enum Scales<'a> {
    F16(&'a [[f16; PANEL]]),
    F32(&'a [[f32; PANEL]]),
}

#[derive(Clone, Copy)]
enum Zeros<'a> {
    Same(u16),
    Each(&'a [[u16; PANEL]]),
}

/// What a kernel multiplies: runs of one panel, and a block of tokens.
#[derive(Clone, Copy)]
struct Task<'a> {
    runs: &'a [Run],
    codes: &'a [Lanes],
    scales: Scales<'a>,
    zeros: Zeros<'a>,
    /// `[words, pairs in a word, tokens]`, two features each, as [`Kernels::arrange`] leaves them.
    x: &'a [i32],
    /// `[runs, tokens]`: sum of a token's features.
    totals: &'a [i32],
    /// `[runs, tokens]`: what a token's integers are multiples of.
    steps: &'a [f32],
}

/// Pairs of codes that a word has room for.
const fn pairs_in_word(bits: usize) -> usize {
    16 / bits
}

/// The bits of one pair, in both halves of a word.
const fn mask(bits: usize) -> u32 {
    let one = u16::MAX >> (16 - bits);
    one as u32 * 0x1_0001
}

impl OwnedScales {
    fn of_panel(&self, panel: usize, groups: usize) -> Scales<'_> {
        match self {
            Self::F16(scales) => Scales::F16(&scales[panel * groups..][..groups]),
            Self::F32(scales) => Scales::F32(&scales[panel * groups..][..groups]),
        }
    }
}

impl OwnedZeros {
    fn of_panel(&self, panel: usize, groups: usize) -> Zeros<'_> {
        match self {
            Self::Same(zero) => Zeros::Same(*zero),
            Self::Each(zeros) => Zeros::Each(&zeros[panel * groups..][..groups]),
        }
    }
}

impl Scales<'_> {
    fn of(&self, group: usize) -> [f32; PANEL] {
        match self {
            Self::F16(scales) => scales[group].map(f16::to_f32),
            Self::F32(scales) => scales[group],
        }
    }
}

impl Zeros<'_> {
    fn of(&self, group: usize) -> [u16; PANEL] {
        match self {
            Self::Same(zero) => [*zero; PANEL],
            Self::Each(zeros) => zeros[group],
        }
    }
}

impl Panels {
    /// Name of the inner loop that multiplies so many rows with these instructions.
    pub fn kernel_name(&self, rows: usize, isa: Isa) -> &'static str {
        match (self.fitting(isa), rows) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx, ..=DIRECT) | (Isa::Avx512, _) => "panels, AVX-512 VNNI",
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx, _) => "panels, AMX",
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, _) => "panels, AVX2",
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, _) => "panels, NEON",
            (Isa::Portable, _) => "panels, portable",
        }
    }

    /// `(out, in)`
    pub fn dims(&self) -> (usize, usize) {
        self.dims
    }

    /// Writes the values of row `row`, `in` of them, in the file's order.
    pub fn write_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane, pairs) = (row / PANEL, row % PANEL, pairs_in_word(self.bits));
        let codes = &self.codes[panel * self.words..][..self.words];
        let scales = self.scales.of_panel(panel, self.groups);
        let zeros = self.zeros.of_panel(panel, self.groups);
        for run in &self.runs {
            let (scale, zero) = (scales.of(run.group)[lane], i32::from(zeros.of(run.group)[lane]));
            for (i, column) in run.columns.clone().enumerate() {
                let word = codes[run.at + i / (2 * pairs)].0[lane];
                let pair = word >> (self.bits * (i / 2 % pairs)) & mask(self.bits);
                let code = (pair >> (16 * (i % 2)) & 0xFFFF) as i32;
                let place = self.order.as_ref().map_or(column, |order| order[column] as usize);
                out[place] = (code - zero) as f32 * scale;
            }
        }
    }

    /// `x W^T + bias`; x: `[rows, in]`, result: `[rows, out]`
    pub fn product(&self, x: &[f32], rows: usize, isa: Isa) -> Vec<f32> {
        let n = self.dims.0;
        let mut y = Vec::with_capacity(rows * n);
        let panels = n.div_ceil(PANEL);
        let isa = self.fitting(isa);
        let kernels = match rows {
            ..=DIRECT => Kernels::of(isa, self.bits, fixed::tokens(rows)),
            _ => Kernels::of(isa, UNPACKED, fixed::block(isa)),
        };
        let blocks = Blocks::of(self, x, rows, (isa, &kernels));
        let blocks: Vec<_> = blocks.iter().collect();
        let parts = Parts::of(&mut y.spare_capacity_mut()[..rows * n]);
        let store = |panel: usize, first: usize, tile: &[[f32; PANEL]]| {
            let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
            for (row, values) in (first..rows).zip(tile) {
                // SAFETY: every panel has columns of its own, and every tile rows of its own.
                let y = unsafe { parts.part(row * n + columns.start, columns.len()) };
                match &self.bias {
                    Some(bias) => {
                        y.iter_mut().zip(values).zip(&bias[columns.clone()]).for_each(|((y, x), b)| {
                            y.write(x + b);
                        })
                    }
                    None => match y.first_chunk_mut::<PANEL>() {
                        // Of a whole panel: a length known beforehand needs no call.
                        Some(y) => y.iter_mut().zip(values).for_each(|(y, x)| _ = y.write(*x)),
                        None => y.iter_mut().zip(values).for_each(|(y, x)| _ = y.write(*x)),
                    },
                }
            }
        };
        match &blocks[..] {
            [] => {}
            [block] if rows <= DIRECT => {
                team::for_each(panels, |panel| {
                    let mut tile = [[0.0; PANEL]; DIRECT];
                    let task = self.task(panel, block);
                    kernels.multiply(&task, (0, 0), std::slice::from_ref(block), &mut tile[..block.tokens]);
                    store(panel, 0, &tile);
                });
            }
            blocks => {
                let tiles: Vec<_> = blocks.chunks(TILE / fixed::block(isa)).collect();
                team::for_each(panels * tiles.len(), |i| {
                    let (panel, blocks) = (i % panels, tiles[i / panels]);
                    let mut tile = Aligned([[0.0; PANEL]; TILE]);
                    self.add_tile(panel, blocks, isa, &mut tile.0);
                    store(panel, blocks[0].first, &tile.0);
                });
            }
        }
        // SAFETY: every row of every panel has been stored.
        unsafe { y.set_len(rows * n) };
        y
    }

    /// The instructions whose kernels take this weight's runs: tiles take whole steps.
    fn fitting(&self, isa: Isa) -> Isa {
        #[cfg(target_arch = "x86_64")]
        let whole = |run: &Run| (run.words * pairs_in_word(self.bits)).is_multiple_of(amx::STEP);
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx if !self.runs.iter().all(whole) || !pairs_in_word(self.bits).is_multiple_of(2) => {
                Isa::Avx512
            }
            _ => isa,
        }
    }

    fn task<'a>(&'a self, panel: usize, block: &'a Block) -> Task<'a> {
        Task {
            runs: &self.runs,
            codes: &self.codes[panel * self.words..][..self.words],
            scales: self.scales.of_panel(panel, self.groups),
            zeros: self.zeros.of_panel(panel, self.groups),
            x: block.x,
            totals: block.totals,
            steps: block.steps,
        }
    }

    /// Adds the results of a panel for many tokens, run by run.
    fn add_tile(&self, panel: usize, blocks: &[Block], isa: Isa, y: &mut [[f32; PANEL]]) {
        let mut unpacked = [Lanes([0; PANEL]); RUN / 2 + 8];
        let narrow = Kernels::of(isa, self.bits, 1);
        for (r, run) in self.runs.iter().enumerate() {
            let whole = self.task(panel, &blocks[0]);
            let pairs = run.words * pairs_in_word(self.bits);
            narrow.unpack(&whole.codes[run.at..][..run.words], &mut unpacked[..pairs]);
            let unpacked_run = [Run { at: 0, words: pairs, columns: run.columns.clone(), group: run.group }];
            let mut rest = &mut y[..];
            for blocks in blocks.chunk_by(|one, next| one.tokens == next.tokens) {
                let tokens = blocks[0].tokens;
                let (y, after) = rest.split_at_mut(blocks.len() * tokens);
                rest = after;
                let task =
                    Task { runs: &unpacked_run, codes: &unpacked[..pairs], ..self.task(panel, &blocks[0]) };
                let at = run.at * pairs_in_word(self.bits);
                Kernels::of(isa, UNPACKED, tokens).multiply(&task, (at, r), blocks, y);
            }
        }
    }
}
