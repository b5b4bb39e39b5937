//! Which group each input feature of a linear belongs to.

use super::{Finding, Module};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::quant_config::QuantConfig;

/// What an artifact has of `g_idx`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// No tensor, or an empty one.
    Absent,
    /// The same number throughout where there are several groups: some writers keep the tensor and fill nothing in.
    Placeholder,
    /// Feature `i` is in group `i / group_size`.
    InFileOrder,
    /// Another order; groups by feature.
    Permuted(Vec<i32>),
}

impl Stored {
    /// Reads the tensor of a quantized linear.
    ///
    /// # Errors
    /// A tensor of another shape or type.
    pub fn read(checkpoint: &Checkpoint, module: &Module, quant: &QuantConfig) -> Result<Self> {
        let (name, k) = (format!("{}.g_idx", module.name), module.linear.in_features);
        match checkpoint.spec(&name) {
            None => return Ok(Self::Absent),
            Some(entry) if entry.shape.contains(&0) => return Ok(Self::Absent),
            Some(_) => {}
        }
        let groups = checkpoint.ints(&name, &[k])?;
        let size = quant.group_size.unwrap_or(k);
        let several = quant.groups(k) > 1;
        let filled_with = |value: i32| groups.iter().all(|group| *group == value);
        Ok(match groups {
            _ if filled_with(-1) || several && filled_with(0) => Self::Placeholder,
            _ if groups.iter().enumerate().all(|(i, group)| *group as usize == i / size) => Self::InFileOrder,
            _ => Self::Permuted(groups),
        })
    }

    /// The group of every feature.
    pub fn groups(self, in_features: usize, group_size: usize) -> Vec<u32> {
        match self {
            Self::Permuted(groups) => groups.into_iter().map(|group| group as u32).collect(),
            _ => (0..in_features).map(|i| (i / group_size) as u32).collect(),
        }
    }

    /// What is amiss, beside the settings of its module.
    pub(super) fn examine(&self, module: &Module, quant: &QuantConfig) -> Option<Finding> {
        let name = || module.name.clone();
        let groups = quant.groups(module.linear.in_features);
        // Static groups lie in file order, whatever order they were solved in.
        let needed = quant.act_order && groups > 1 && !quant.static_groups;
        let unknown =
            |got| Finding::GroupsUnknown { module: name(), group_size: quant.group_size_number(), got };
        match self {
            Self::Absent if needed => Some(unknown("nothing")),
            Self::Placeholder if needed => Some(unknown("the same number throughout")),
            Self::Absent | Self::InFileOrder => None,
            Self::Placeholder => Some(Finding::GroupsPlaceholder { module: name() }),
            Self::Permuted(of_features) => misplaced(module, quant, of_features)
                .or_else(|| (!quant.act_order).then(|| Finding::GroupsUnannounced { module: name() })),
        }
    }
}

/// Every group must be there and hold as many features as a group has; only the last may be short.
fn misplaced(module: &Module, quant: &QuantConfig, of_features: &[i32]) -> Option<Finding> {
    let name = || module.name.clone();
    let (k, groups) = (of_features.len(), quant.groups(of_features.len()));
    let mut members = vec![0; groups];
    for (place, group) in of_features.iter().enumerate() {
        match usize::try_from(*group).ok().and_then(|group| members.get_mut(group)) {
            Some(count) => *count += 1,
            None => {
                return Some(Finding::GroupOutOfRange {
                    module: name(),
                    last: groups - 1,
                    got: *group,
                    place,
                });
            }
        }
    }
    let size = quant.group_size.unwrap_or(k);
    // With act-order the short group is the one that was solved last, which is also the last one.
    let expected = |group: usize| size.min(k - group * size);
    let (group, got) = members.iter().enumerate().find(|(group, count)| **count != expected(*group))?;
    Some(Finding::GroupSize { module: name(), group, expected: expected(group), got: *got })
}
