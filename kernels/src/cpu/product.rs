//! Large products in f32: cut into tiles, each of which one thread multiplies with faer.
//!
//! Threads take tiles as they come, so that none waits at a barrier for a descheduled one.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::{Parts, team};

/// Rows and columns of a tile: at most so many that its operands stay in a core's cache, at least so many that they are
/// worth packing.
const LARGEST: usize = 512;
const SMALLEST: usize = 64;

/// Tiles that a thread should find, so that all end together.
const TILES: usize = 3;

/// `y = a b`, or `y += a b`; a: `[m, k]`, b: `[k, n]`, y: `[m, n]`, row-major, its rows `stride` apart.
pub(crate) fn multiply(y: &mut [f32], stride: usize, accum: Accum, a: MatRef<f32>, b: MatRef<f32>) {
    let tiles = tiles(a.nrows(), b.ncols());
    let parts = Parts::of(y);
    team::for_each(tiles.len(), |i| {
        let Tile { row, column, rows, columns } = tiles[i];
        let first = parts.place(row * stride + column, (rows - 1) * stride + columns);
        // SAFETY: the tile lies within y, and no other tile has its elements.
        let y = unsafe { MatMut::from_raw_parts_mut(first, rows, columns, stride as isize, 1) };
        let (a, b) = (a.subrows(row, rows), b.subcols(column, columns));
        matmul(y, accum, a, b, 1.0, Par::Seq);
    });
}

struct Tile {
    row: usize,
    column: usize,
    rows: usize,
    columns: usize,
}

fn tiles(m: usize, n: usize) -> Vec<Tile> {
    let count = |edge: usize| m.div_ceil(edge) * n.div_ceil(edge);
    let mut edge = LARGEST;
    while edge > SMALLEST && count(edge) < TILES * rayon::current_num_threads() {
        edge /= 2;
    }
    let tile = |row: usize, column: usize| Tile {
        row,
        column,
        rows: edge.min(m - row),
        columns: edge.min(n - column),
    };
    let of_row = |row: usize| (0..n).step_by(edge).map(move |column| tile(row, column));
    (0..m).step_by(edge).flat_map(of_row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NMSE_F32, assert_close, matmul_f64, random};

    #[test]
    fn tiles_of_every_kind_agree_with_f64() {
        for (m, n, k) in [(1, 1, 1), (70, 130, 33), (600, 1100, 20), (1300, 40, 7)] {
            let (a, b) = (random(1, m * k), random(2, n * k));
            let expected = matmul_f64(&a, &b, (m, n, k));
            let [a, b] = [(&a, m), (&b, n)].map(|(x, rows)| MatRef::from_row_major_slice(x, rows, k));
            // Two more columns than the product has.
            let mut y = vec![1.0; m * (n + 2)];
            multiply(&mut y, n + 2, Accum::Replace, a, b.transpose());
            multiply(&mut y, n + 2, Accum::Add, a, b.transpose());
            let got: Vec<f32> = y.chunks(n + 2).flat_map(|row| row[..n].iter().map(|y| y / 2.0)).collect();
            assert_close("all", &got, &expected, NMSE_F32);
            assert!(y.chunks(n + 2).all(|row| row[n..] == [1.0; 2]), "what is beside it stays");
        }
    }
}
