//! In which order columns are solved, and which of them share a grid.

use std::collections::BTreeMap;
use std::ops::Range;

use gptq_kernels::Grouping;

use crate::recipe::Order;

/// Columns of one block of the sweep (Frantar et al. 2022, section 3.3, step 2).
const BLOCK_SIZE: usize = 128;

/// The order and the groups of one stage, from its Hessian's diagonal; equal features keep their own order. Groups have
/// `group_size` columns, but for the last of the file or of the order; `None` is one group.
pub fn grouping(diagonal: &[f32], group_size: Option<usize>, order: Order) -> Grouping {
    let size = diagonal.len();
    let group_size = group_size.unwrap_or(size).clamp(1, size.max(1));
    let in_file = |feature: &u32| *feature / group_size as u32;
    let mut features: Vec<u32> = (0..size as u32).collect();
    if order != Order::File {
        features.sort_by(|a, b| diagonal[*b as usize].total_cmp(&diagonal[*a as usize]));
    }
    if order == Order::Gar {
        features = by_first_met(&features, in_file);
    }
    let group_of = match order {
        Order::ActOrder | Order::File => (0..size).map(|place| (place / group_size) as u32).collect(),
        Order::Gar | Order::StaticGroups => features.iter().map(in_file).collect(),
    };
    let static_groups = order == Order::StaticGroups;
    Grouping { order: features, group_of, groups: size.div_ceil(group_size), static_groups }
}

/// All features of the group of the first one, then those of the group that is met next, and so on.
fn by_first_met(features: &[u32], group: impl Fn(&u32) -> u32) -> Vec<u32> {
    let mut rank = BTreeMap::new();
    for feature in features {
        let next = rank.len();
        rank.entry(group(feature)).or_insert(next);
    }
    let mut features = features.to_vec();
    features.sort_by_key(|feature| rank[&group(feature)]);
    features
}

/// Blocks of at most [`BLOCK_SIZE`] columns, none of which ends inside a group that it did not start.
///
/// So a group's grid is always found from weights that have received every update before it: those of
/// earlier blocks as a whole, and those of its own block column by column. Static groups have their grids before.
pub fn blocks(grouping: &Grouping) -> Vec<Range<usize>> {
    let runs: Vec<usize> = match grouping.static_groups {
        true => vec![1; grouping.order.len()],
        false => grouping.group_of.chunk_by(|a, b| a == b).map(<[u32]>::len).collect(),
    };
    let mut blocks: Vec<Range<usize>> = Vec::new();
    let (mut start, mut cut) = (0, false);
    for run in runs {
        let end = start + run;
        match blocks.last_mut() {
            Some(block) if !cut && end - block.start <= BLOCK_SIZE => block.end = end,
            _ => {
                let starts = (start..end).step_by(BLOCK_SIZE);
                blocks.extend(starts.map(|start| start..(start + BLOCK_SIZE).min(end)));
                cut = run > BLOCK_SIZE;
            }
        }
        start = end;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn act_order_sorts_by_descending_diagonal_and_keeps_ties() {
        let grouping = grouping(&[1.0, 3.0, 2.0, 3.0], Some(2), Order::ActOrder);
        assert_eq!(grouping.order, [1, 3, 2, 0]);
        assert_eq!(grouping.group_of, [0, 0, 1, 1]);
    }

    #[test]
    fn static_groups_follow_the_features_not_the_sweep() {
        let grouping = grouping(&[1.0, 3.0, 2.0, 3.0], Some(2), Order::StaticGroups);
        assert_eq!(grouping.group_of, [0, 1, 1, 0]);
    }

    #[test]
    fn gar_keeps_the_groups_of_the_file_and_sorts_them_and_their_columns() {
        // Groups of the file: 1 3 2 | 3 0 9 | 4, the last one short.
        let grouping = grouping(&[1.0, 3.0, 2.0, 3.0, 0.0, 9.0, 4.0], Some(3), Order::Gar);
        assert_eq!(grouping.order, [5, 3, 4, 6, 1, 2, 0]);
        assert_eq!(grouping.group_of, [1, 1, 1, 2, 0, 0, 0]);
        assert!(!grouping.static_groups);
    }

    /// The short group of the file may be met anywhere.
    #[test]
    fn a_short_group_in_the_middle_is_cut_by_no_block() {
        for group_size in [96, 128, 192] {
            let diagonal: Vec<f32> =
                (0..448).map(|i| if i >= 384 { 5.0 } else { (i / 100) as f32 * 2.0 }).collect();
            let grouping = grouping(&diagonal, Some(group_size), Order::Gar);
            let blocks = blocks(&grouping);
            assert_eq!(blocks.iter().cloned().flatten().collect::<Vec<_>>(), (0..448).collect::<Vec<_>>());
            for block in blocks {
                let group = |place: usize| grouping.group_of[place];
                let starts = block.start == 0 || group(block.start - 1) != group(block.start);
                let ends = block.end == 448 || group(block.end - 1) != group(block.end);
                assert!(
                    block.len() <= BLOCK_SIZE && (group_size > BLOCK_SIZE || starts && ends),
                    "{block:?}"
                );
                assert!(
                    starts || group(block.start) == group(block.end - 1),
                    "{block:?} holds an end and a start"
                );
            }
        }
    }

    #[test]
    fn blocks_cover_every_column_once_and_never_cut_into_a_group() {
        for (size, group_size) in
            [(256, 32), (256, 128), (1000, 96), (384, 192), (300, 7), (256, 256), (72, 32)]
        {
            let grouping = grouping(&vec![1.0; size], Some(group_size), Order::File);
            let blocks = blocks(&grouping);
            assert_eq!(blocks.iter().cloned().flatten().collect::<Vec<_>>(), (0..size).collect::<Vec<_>>());
            for block in blocks {
                assert!(block.len() <= BLOCK_SIZE);
                let inside = block.start % group_size;
                assert!(inside == 0 || group_size > BLOCK_SIZE, "a block starts inside a small group");
                let ends_group = block.end % group_size == 0 || block.end == size;
                assert!(ends_group || group_size > BLOCK_SIZE, "a block ends inside a small group");
                assert!(block.start / group_size == (block.end - 1) / group_size || group_size < BLOCK_SIZE);
            }
        }
    }
}
