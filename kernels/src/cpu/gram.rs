//! `H += x^T x`, the lower triangle alone.
//!
//! Features are cut into panels of [`COLUMNS`], packed once for all threads; a panel's strips of [`ROWS`] are multiplied
//! with all panels up to the diagonal. The sums of [`DEPTH`] tokens are made in registers and then added to H.

use super::block::{Before, COLUMNS, Columns, LANES, ROWS, multiply_block};
use super::{Isa, Parts, team};

/// Tokens whose products are summed up, one after the other, before they are added: as in faer's products on x86, whose bits
/// these are therefore. A panel of them (96 KB) stays in a core's second cache.
const DEPTH: usize = 512;

/// Tokens that one thread packs at a time.
const TOGETHER: usize = 32;

/// Rows that one thread makes at a time: strips of one panel, which read others one after the other.
const GROUP: usize = COLUMNS / 2;

/// The lower triangle of `h += x^T x`; h: `[size, size]`, x: `[tokens, size]`. Other elements of h may change too.
pub(crate) fn add_gram(h: &mut [f32], x: &[f32], size: usize, isa: Isa) {
    let parts = Parts::of(h);
    let groups = size.div_ceil(GROUP);
    for x in x.chunks(DEPTH * size.max(1)) {
        let panels = panels(x, size);
        let panels: Vec<_> = panels.chunks_exact(x.len() / size).collect();
        // A group near the top and one near the bottom make pieces of the same size.
        team::for_each(groups.div_ceil(2), |i| {
            let (first, second) = (i, groups - 1 - i);
            add_group(&parts, size, second, &panels, isa);
            if first != second {
                add_group(&parts, size, first, &panels, isa);
            }
        });
    }
}

/// `[size / COLUMNS, tokens]`, what is missing from the last being zeros.
fn panels(x: &[f32], size: usize) -> Vec<Columns> {
    let (count, tokens) = (size.div_ceil(COLUMNS), x.len() / size);
    let mut panels = Vec::with_capacity(count * tokens);
    let parts = Parts::of(&mut panels.spare_capacity_mut()[..count * tokens]);
    team::for_each(tokens.div_ceil(TOGETHER), |i| {
        let piece = i * TOGETHER..((i + 1) * TOGETHER).min(tokens);
        // Panel by panel, since rows of different panels lie where a cache has room for few of them.
        for panel in 0..count {
            let first = panel * COLUMNS;
            // SAFETY: every token is packed by one thread.
            let rows = unsafe { parts.part(panel * tokens + piece.start, piece.len()) };
            for (row, x) in rows.iter_mut().zip(x[piece.start * size..].chunks_exact(size)) {
                row.write(Columns(match x[first..].first_chunk() {
                    Some(features) => *features,
                    None => std::array::from_fn(|i| x.get(first + i).copied().unwrap_or(0.0)),
                }));
            }
        }
    });
    // SAFETY: every row of every panel has been written.
    unsafe { panels.set_len(count * tokens) };
    panels
}

/// Some rows, up to the diagonal.
fn add_group(h: &Parts<f32>, size: usize, group: usize, panels: &[&[Columns]], isa: Isa) {
    let rows = group * GROUP..((group + 1) * GROUP).min(size);
    for (panel, column) in panels.iter().zip((0..rows.end).step_by(COLUMNS)) {
        for row in rows.clone().step_by(ROWS) {
            let (strip, last) = (panels[row / COLUMNS], (row + ROWS).min(size));
            let columns = last.saturating_sub(column).next_multiple_of(LANES).min(COLUMNS);
            let strip = (bytemuck::cast_slice::<_, [f32; COLUMNS]>(strip), row % COLUMNS);
            let (rows, inside) = (last - row, columns.min(size - column));
            if rows == ROWS && inside == columns {
                // SAFETY: a row belongs to one thread; the part ends with the last of them.
                let h = unsafe { h.part(row * size + column, (ROWS - 1) * size + columns) };
                multiply_block(strip, panel, columns, (h, size), Before::Added, isa);
                continue;
            }
            let mut sums = [0.0; ROWS * COLUMNS];
            multiply_block(strip, panel, columns, (&mut sums, COLUMNS), Before::Dropped, isa);
            for (r, sums) in sums.chunks_exact(COLUMNS).take(rows).enumerate() {
                // SAFETY: as above.
                let h = unsafe { h.part((row + r) * size + column, inside) };
                h.iter_mut().zip(sums).for_each(|(h, sum)| *h += sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NMSE_F32, assert_close, random};

    #[test]
    fn the_lower_triangle_agrees_with_f64_whatever_the_size() {
        for (size, tokens) in [(1, 3), (8, 1), (48, 5), (63, 40), (200, 600), (390, 30)] {
            let x = random(3, size * tokens);
            let lower: Vec<_> = (0..size).flat_map(|i| (0..=i).map(move |j| (i, j))).collect();
            let sum = |(i, j): &(usize, usize)| {
                x.chunks(size).map(|x| f64::from(x[*i]) * f64::from(x[*j])).sum::<f64>() + 1.0
            };
            let expected: Vec<f64> = lower.iter().map(sum).collect();
            for isa in Isa::all() {
                let mut h = vec![1.0; size * size];
                add_gram(&mut h, &x, size, isa);
                let got: Vec<f32> = lower.iter().map(|(i, j)| h[i * size + j]).collect();
                assert_close(&format!("{size} features, {isa:?}"), &got, &expected, NMSE_F32);
            }
        }
        add_gram(&mut [], &[], 0, Isa::best());
    }
}
