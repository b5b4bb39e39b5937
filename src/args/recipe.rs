//! How GPTQ shall find the codes.

use anyhow::{Result, bail};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gptq_kernels::GridKind;
use gptq_quantizer::recipe::{Named, Order, Preset, Recipe, Target};

/// A preset, and single choices that differ from it.
#[derive(Args, Clone, Debug)]
pub struct RecipeArgs {
    /// best: the least error. fast: the same order and grids, without the unquantized model's activations and refinement.
    /// card: what AutoGPTQ 0.4.2 did, as published files were made: act-order, scales from the largest weight
    /// [default: best]
    #[arg(long, value_parser = named::<Preset>())]
    pub preset: Option<Preset>,

    /// Order in which columns are solved. act-order: by descending Hessian diagonal, groups scattered over the inputs as in
    /// published files (desc_act: true). gar: the same inside of groups that stay in file order, which all programs read.
    /// static-groups: act-order, groups in file order with grids of the original weights. file: as they lie
    #[arg(long, value_parser = named::<Order>(), conflicts_with_all = ["act_order", "no_act_order", "static_groups",
        "no_static_groups"])]
    pub order: Option<Order>,

    /// Same as --order act-order
    #[arg(long, overrides_with = "no_act_order")]
    pub act_order: bool,

    /// Same as --order file
    #[arg(long, conflicts_with = "static_groups")]
    pub no_act_order: bool,

    /// Same as --order static-groups
    #[arg(long, overrides_with = "no_static_groups")]
    pub static_groups: bool,

    /// Same as --order act-order
    #[arg(long)]
    pub no_static_groups: bool,

    /// Scales of a group: absmax reaches the largest weight, mse has the least error to the 2.4th, loop the least loss of
    /// the sweep over the group
    #[arg(long, value_parser = named::<GridKind>(), conflicts_with = "mse")]
    pub grid: Option<GridKind>,

    /// Same as --grid mse
    #[arg(long)]
    pub mse: bool,

    /// What quantized outputs should approximate: those of the same input (none), of the unquantized model (asymmetric), or,
    /// where they are added to it, of its residual stream (residual). The latter two walk the unquantized model too
    #[arg(long, value_parser = named::<Target>())]
    pub target: Option<Target>,

    /// Rounds of refinement after the sweep: coordinate descent on codes, then a refit of scales. Kept only
    /// for linears whose loss on held-out sequences falls, as is a target
    #[arg(long, value_name = "N")]
    pub rounds: Option<usize>,
}

impl RecipeArgs {
    /// The order that was asked for, in whichever spelling.
    pub fn order(&self) -> Option<Order> {
        match self.order {
            Some(order) => Some(order),
            None if self.no_act_order => Some(Order::File),
            None if self.static_groups => Some(Order::StaticGroups),
            None if self.act_order || self.no_static_groups => Some(Order::ActOrder),
            None => None,
        }
    }

    fn grid(&self) -> Option<GridKind> {
        self.grid.or(self.mse.then_some(GridKind::Mse))
    }

    /// The preset with the choices that were made.
    pub fn recipe(&self) -> Recipe {
        let preset = self.preset.unwrap_or_default().recipe();
        Recipe {
            order: self.order().unwrap_or(preset.order),
            grid: self.grid().unwrap_or(preset.grid),
            target: self.target.unwrap_or(preset.target),
            rounds: self.rounds.unwrap_or(preset.rounds),
        }
    }

    /// The same for rounding to nearest, which solves nothing and has nothing to choose but grids.
    pub fn nearest(&self) -> Result<Recipe> {
        let solving =
            [self.preset.is_some(), self.order().is_some(), self.target.is_some(), self.rounds.is_some()];
        if solving.contains(&true) {
            bail!("--method rtn: expected no preset, order, target or rounds, which it has no use for");
        }
        Ok(Recipe { grid: self.grid().unwrap_or(Recipe::NEAREST.grid), ..Recipe::NEAREST })
    }
}

/// Reads a choice by its name.
pub fn named<T: Named + Send + Sync>() -> impl TypedValueParser<Value = T> {
    let names = PossibleValuesParser::new(T::NAMES.iter().map(|(_, name)| *name));
    names.try_map(|name| T::from_name(&name).ok_or_else(|| format!("{name} is no choice")))
}
