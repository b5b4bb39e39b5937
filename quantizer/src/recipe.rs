//! What GPTQ does beyond the bits and groups that a file has: the order of columns, the search of grids, the target, and what
//! is done after the sweep.

use gptq_kernels::GridKind;
use gptq_runtime::quant_config::QuantConfig;
use serde_json::{Value, json};

/// The choices that change a file's numbers and not its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    pub order: Order,
    pub grid: GridKind,
    pub target: Target,
    /// Rounds of coordinate descent on the codes and refit of the scales, after the sweep.
    pub rounds: usize,
}

/// What the quantized outputs shall be near to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `W x`: the weights as they are, on the input that the quantized stages before make.
    None,
    /// `W x_f`: what the unquantized model has, whose input is x_f.
    Asymmetric,
    /// The same; where the output is added to the residual stream, the sum. Such stages have as many inputs as outputs or
    /// more, so that sums by outputs are no larger than by inputs.
    Residual,
}

/// In which order columns are solved, and which of them form a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// By descending Hessian diagonal; groups are runs of that order, so that a file's `g_idx` is permuted.
    ActOrder,
    /// As they lie in the file.
    File,
    /// Group-aware reordering: groups are those of the file; inside of one, columns come by descending Hessian diagonal,
    /// and groups by the largest of theirs.
    Gar,
    /// As act-order, but groups are those of the file, and their grids those of the original weights.
    StaticGroups,
}

/// A recipe with a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preset {
    /// The least error, in files that every program loads.
    #[default]
    Best,
    /// Less error at next to no cost, in files that every program loads.
    Fast,
    /// What AutoGPTQ 0.4.2 did, and published files were made with.
    Card,
}

/// A choice that is named in options, plans, logs and files.
pub trait Named: Copy + PartialEq + 'static {
    /// Every choice with its name.
    const NAMES: &'static [(Self, &'static str)];

    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(choice, _)| *choice == self).map_or("", |(_, name)| name)
    }

    fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, known)| *known == name).map(|(choice, _)| *choice)
    }
}

impl Named for Order {
    const NAMES: &'static [(Self, &'static str)] = &[
        (Self::ActOrder, "act-order"),
        (Self::File, "file"),
        (Self::Gar, "gar"),
        (Self::StaticGroups, "static-groups"),
    ];
}

impl Named for GridKind {
    const NAMES: &'static [(Self, &'static str)] =
        &[(Self::Absmax, "absmax"), (Self::Mse, "mse"), (Self::Loop, "loop")];
}

impl Named for Target {
    const NAMES: &'static [(Self, &'static str)] =
        &[(Self::None, "none"), (Self::Asymmetric, "asymmetric"), (Self::Residual, "residual")];
}

impl Named for Preset {
    const NAMES: &'static [(Self, &'static str)] =
        &[(Self::Best, "best"), (Self::Fast, "fast"), (Self::Card, "card")];
}

impl Preset {
    pub fn recipe(self) -> Recipe {
        match self {
            Self::Best => {
                Recipe { order: Order::Gar, grid: GridKind::Loop, target: Target::Residual, rounds: 2 }
            }
            Self::Fast => Recipe { order: Order::Gar, grid: GridKind::Loop, ..Recipe::NEAREST },
            Self::Card => Recipe { order: Order::ActOrder, ..Recipe::NEAREST },
        }
    }
}

impl Recipe {
    /// Rounding to nearest: no column makes up for another.
    pub const NEAREST: Self =
        Self { order: Order::File, grid: GridKind::Absmax, target: Target::None, rounds: 0 };

    /// The preset that this is, if it is one.
    pub fn preset(&self) -> Option<Preset> {
        Preset::NAMES.iter().map(|(preset, _)| *preset).find(|preset| preset.recipe() == *self)
    }

    /// All choices by name, to tell recipes apart.
    pub fn to_json(&self) -> Value {
        json!({
            "order": self.order.name(),
            "grid": self.grid.name(),
            "target": self.target.name(),
            "rounds": self.rounds,
        })
    }
}

impl Order {
    /// The settings with what files say of this order.
    pub fn of(self, quant: QuantConfig) -> QuantConfig {
        let static_groups = self == Self::StaticGroups;
        QuantConfig { act_order: static_groups || self == Self::ActOrder, static_groups, ..quant }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each_name_is_found<T: Named + std::fmt::Debug>() {
        for (choice, name) in T::NAMES {
            assert_eq!((T::from_name(name), choice.name()), (Some(*choice), *name));
        }
        assert_eq!(T::from_name("other"), None);
    }

    #[test]
    fn choices_and_names_belong_together() {
        each_name_is_found::<Order>();
        each_name_is_found::<GridKind>();
        each_name_is_found::<Target>();
        each_name_is_found::<Preset>();
    }

    #[test]
    fn a_recipe_is_known_by_its_preset() {
        for (preset, _) in Preset::NAMES {
            assert_eq!(preset.recipe().preset(), Some(*preset));
        }
        assert_eq!(Recipe::NEAREST.preset(), None);
    }
}
