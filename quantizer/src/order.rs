//! In which order columns are solved, and which of them share a grid.

use std::ops::Range;

use gptq_kernels::Grouping;

/// Columns of one block of the sweep (Frantar et al. 2022, section 3.3, step 2).
const BLOCK_SIZE: usize = 128;

/// The order and the groups of one stage.
///
/// - act-order: features by descending Hessian diagonal, equal ones in their own order.
/// - groups: runs of `group_size` places of the sweep; static groups: of features in their own order.
pub fn grouping(
    diagonal: &[f32],
    group_size: Option<usize>,
    act_order: bool,
    static_groups: bool,
) -> Grouping {
    let size = diagonal.len();
    let group_size = group_size.unwrap_or(size).clamp(1, size.max(1));
    let mut order: Vec<u32> = (0..size as u32).collect();
    if act_order {
        order.sort_by(|a, b| diagonal[*b as usize].total_cmp(&diagonal[*a as usize]));
    }
    let group_of = match static_groups {
        true => order.iter().map(|feature| *feature / group_size as u32).collect(),
        false => (0..size).map(|place| (place / group_size) as u32).collect(),
    };
    Grouping { order, group_of, groups: size.div_ceil(group_size), static_groups }
}

/// Blocks of at most [`BLOCK_SIZE`] columns, none of which ends inside a group that it did not start.
///
/// So a group's grid is always found from weights that have received every update before it: those of
/// earlier blocks as a whole, and those of its own block column by column.
pub fn blocks(grouping: &Grouping) -> Vec<Range<usize>> {
    let size = grouping.order.len();
    let group_size = match grouping.static_groups {
        true => 1,
        false => grouping.group_of.iter().take_while(|g| **g == 0).count().max(1),
    };
    let spans: Vec<Range<usize>> = match group_size > BLOCK_SIZE {
        true => (0..size).step_by(group_size).map(|start| start..(start + group_size).min(size)).collect(),
        false => std::iter::once(0..size).collect(),
    };
    let step = if group_size > BLOCK_SIZE { BLOCK_SIZE } else { BLOCK_SIZE / group_size * group_size };
    spans
        .into_iter()
        .flat_map(|span| span.clone().step_by(step).map(move |start| start..(start + step).min(span.end)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn act_order_sorts_by_descending_diagonal_and_keeps_ties() {
        let grouping = grouping(&[1.0, 3.0, 2.0, 3.0], Some(2), true, false);
        assert_eq!(grouping.order, [1, 3, 2, 0]);
        assert_eq!(grouping.group_of, [0, 0, 1, 1]);
    }

    #[test]
    fn static_groups_follow_the_features_not_the_sweep() {
        let grouping = grouping(&[1.0, 3.0, 2.0, 3.0], Some(2), true, true);
        assert_eq!(grouping.group_of, [0, 1, 1, 0]);
    }

    #[test]
    fn blocks_cover_every_column_once_and_never_cut_into_a_group() {
        for (size, group_size) in
            [(256, 32), (256, 128), (1000, 96), (384, 192), (300, 7), (256, 256), (72, 32)]
        {
            let grouping = grouping(&vec![1.0; size], Some(group_size), false, false);
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
