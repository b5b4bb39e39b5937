//! The order in which a weight wants its input, and how that lies in memory.

use std::ops::RangeInclusive;
use std::sync::Arc;

use cudarc::driver::CudaSlice;

use super::Cuda;
use crate::Result;

/// Rows that go into panels, for weights that can take them so.
pub(crate) const PANEL_ROWS: RangeInclusive<usize> = 9..=2048;

/// Tokens that one block of a product takes: a panel has room for so many, or for a multiple of the most, or for fewer
/// by a power of two.
pub(crate) const PANEL_TILE: RangeInclusive<usize> = 16..=128;

/// How a weight wants its input: columns in an order of its own, and numbers of rows between few and many in panels
/// of 64 columns. A clone is the same one; equal orders of different weights are not known to be.
#[derive(Clone)]
pub struct CudaOrder(Arc<Forms>);

struct Forms {
    /// Feature at each place of a row.
    features: Vec<u32>,
    /// Rows after each other; `None` for the model's own order.
    plain: Option<Tables>,
    /// `None` where the weight takes none.
    panels: Option<Tables>,
    /// The logarithm of a lane's neighbouring features there.
    lane_shift: usize,
}

struct Tables {
    /// Feature at each place.
    features: CudaSlice<u32>,
    /// Place of each feature.
    places: CudaSlice<u32>,
}

/// Where the columns of some rows are.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    /// Address of the feature at each place, 0 where that is the one of the same number.
    pub features: u64,
    /// Address of each feature's place, or 0.
    pub places: u64,
    /// Tokens that a panel has room for, 0 for rows that lie after each other: `panel_place` says where.
    pub panel_tokens: usize,
    /// What `panel_column` needs to know of panels; 1 for rows, whose pairs stay neighbours.
    pub lane_shift: usize,
}

impl CudaOrder {
    /// `features[place]`: every feature once. `panels` is the number of bits of a weight that takes panels. `None`
    /// where rows may come as they are.
    pub(crate) fn new(gpu: &Cuda, features: Vec<u32>, panels: Option<u32>) -> Result<Option<Self>> {
        let in_order = features.iter().zip(0..).all(|(feature, place)| *feature == place);
        let plain = (!in_order).then(|| Tables::new(gpu, &features)).transpose()?;
        let lane_shift = panels.map_or(1, |bits| (64 / bits).ilog2() as usize);
        let panels = panels.map(|_| Tables::new(gpu, &panel_features(&features, lane_shift))).transpose()?;
        let nothing = plain.is_none() && panels.is_none();
        Ok((!nothing).then(|| Self(Arc::new(Forms { features, plain, panels, lane_shift }))))
    }

    /// Feature at each place of a row.
    pub(crate) fn features(&self) -> &[u32] {
        &self.0.features
    }

    /// The same on the GPU; 0 for the model's own order.
    pub(crate) fn features_of_rows(&self, gpu: &Cuda) -> u64 {
        self.0.plain.as_ref().map_or(0, |tables| gpu.address(&tables.features))
    }

    /// How `rows` rows lie.
    pub(crate) fn layout(&self, gpu: &Cuda, rows: usize) -> Layout {
        let panels = self.0.panels.as_ref().filter(|_| PANEL_ROWS.contains(&rows));
        let tables = panels.or(self.0.plain.as_ref());
        Layout {
            features: tables.map_or(0, |tables| gpu.address(&tables.features)),
            places: tables.map_or(0, |tables| gpu.address(&tables.places)),
            panel_tokens: panels.map_or(0, |_| panel_tokens(rows)),
            lane_shift: panels.map_or(1, |_| self.0.lane_shift),
        }
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Layout {
    /// Of rows for which nothing is asked.
    pub fn of(gpu: &Cuda, order: Option<&CudaOrder>, rows: usize) -> Self {
        let plain = Self { features: 0, places: 0, panel_tokens: 0, lane_shift: 1 };
        order.map_or(plain, |order| order.layout(gpu, rows))
    }
}

/// Tokens that panels of so many rows have room for.
fn panel_tokens(rows: usize) -> usize {
    match rows {
        rows if rows <= *PANEL_TILE.end() => rows.next_power_of_two().max(*PANEL_TILE.start()),
        rows => rows.next_multiple_of(*PANEL_TILE.end()),
    }
}

/// Features in the order in which the tensor cores meet them: of a chunk of codes a lane has neighbours, in pairs
/// for the two halves of each of its products.
fn panel_features(features: &[u32], lane_shift: usize) -> Vec<u32> {
    let lane_features = 1 << lane_shift;
    let chunk = 4 * lane_features;
    let in_chunk = |column: usize| {
        let (step, half, lane, second) = (column / 16, column % 16 / 8, column % 8 / 2, column % 2);
        lane * lane_features + 4 * step + 2 * half + second
    };
    (0..features.len()).map(|column| features[column / chunk * chunk + in_chunk(column % chunk)]).collect()
}

impl Tables {
    fn new(gpu: &Cuda, features: &[u32]) -> Result<Self> {
        let mut places = vec![0; features.len()];
        features.iter().zip(0..).for_each(|(feature, place)| places[*feature as usize] = place);
        Ok(Self { features: gpu.upload(features)?, places: gpu.upload(&places)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lane of the matrix instruction has, of 16 features, two neighbours and the two that lie eight further; codes
    /// are dealt so that these four are neighbours in a row.
    #[test]
    fn panels_meet_features_as_the_codes_were_repacked() {
        let features: Vec<u32> = (100..228).collect();
        let four_bits = panel_features(&features, 4);
        assert_eq!(four_bits[..8], [100, 101, 116, 117, 132, 133, 148, 149]);
        assert_eq!(four_bits[8..16], [102, 103, 118, 119, 134, 135, 150, 151]);
        assert_eq!(four_bits[16..18], [104, 105]);
        assert_eq!(four_bits[64..66], [164, 165], "the next chunk");
        let eight_bits = panel_features(&features, 3);
        assert_eq!(eight_bits[..8], [100, 101, 108, 109, 116, 117, 124, 125]);
        assert_eq!(eight_bits[32..34], [132, 133], "the next chunk");
        for mut all in [four_bits, eight_bits] {
            all.sort();
            assert_eq!(all, features);
        }
    }
}
