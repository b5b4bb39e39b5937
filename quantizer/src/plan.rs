//! The branches that a publisher offers of one model.

use std::collections::BTreeSet;
use std::path::Path;

use gptq_kernels::GridKind;
use gptq_runtime::quant_config::{CheckpointFormat, QuantConfig};
use serde::Deserialize;

use crate::gptq::{GptqParams, Method};
use crate::recipe::{Named, Order, Preset, Recipe};
use crate::{Error, Result};

/// Branches in the order of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub branches: Vec<Branch>,
}

/// One branch: a folder of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Branch {
    pub name: String,
    pub bits: u32,
    /// `None` is one group a row.
    pub group_size: Option<usize>,
    pub damp_percent: f64,
    pub sym: bool,
    pub format: CheckpointFormat,
    pub recipe: Recipe,
}

impl Plan {
    /// The six branches of the usual card: 4 and 8 bits, act-order, damp 0.1. Names, sizes and the order of columns are
    /// the card's whatever the preset.
    pub fn card(preset: Preset) -> Self {
        let shapes = [(4, Some(128)), (4, Some(32)), (8, None), (8, Some(128)), (8, Some(32)), (4, Some(64))];
        Self::of(&shapes, Recipe { order: Order::ActOrder, ..preset.recipe() })
    }

    /// What every program reads: 4 bits, groups in file order.
    pub fn portable(preset: Preset) -> Self {
        Self::of(
            &[(4, Some(128)), (4, Some(32)), (4, Some(64))],
            Recipe { order: Order::Gar, ..preset.recipe() },
        )
    }

    /// The first is called main.
    fn of(shapes: &[(u32, Option<usize>)], recipe: Recipe) -> Self {
        let branch = |(i, &(bits, group_size)): (usize, &(u32, Option<usize>))| {
            let name = if i == 0 { "main".into() } else { branch_name(bits, group_size, recipe.order) };
            Branch { recipe, ..Branch::new(name, bits, group_size) }
        };
        Self { branches: shapes.iter().enumerate().map(branch).collect() }
    }

    /// Reads a plan: `[[branch]]` tables with `bits`, and what differs from the card's defaults. `preset` is that of
    /// branches that name none.
    ///
    /// ```toml
    /// [[branch]]
    /// bits = 4                # 2, 3, 4 or 8
    /// name = "main"           # else made from the settings: gptq-4bit-128g-actorder_True
    /// group_size = 128        # -1 for one group a row
    /// damp_percent = 0.1      # between 0 and 1
    /// sym = true
    /// preset = "best"         # or "fast", "card"
    /// order = "act-order"     # or "gar", "file", "static-groups"
    /// grid = "loop"           # or "absmax", "mse"
    /// target = "asymmetric"   # or "residual", "none"
    /// rounds = 2              # of refinement
    /// format = "gptq"         # or "gptq_v2"
    /// ```
    ///
    /// `act_order = false` is `order = "file"`, `static_groups = true` is `order = "static-groups"`, `mse = true` is
    /// `grid = "mse"`.
    pub fn from_toml(path: &Path, preset: Preset) -> Result<Self> {
        /// Bytes of a plan at most.
        const MOST_BYTES: u64 = 1 << 20;
        let bytes = gptq_input::read(path, MOST_BYTES).map_err(Error::io(path))?;
        let text = String::from_utf8_lossy(&bytes);
        Self::parse(&text, preset).map_err(|problem| Error::invalid(path.display(), problem))
    }

    fn parse(text: &str, preset: Preset) -> Result<Self, String> {
        let file: PlanFile = toml::from_str(text).map_err(|error| one_line(&error, text))?;
        let check = |(i, entry): (usize, BranchEntry)| {
            entry.check(preset).map_err(|problem| format!("branch {}: {problem}", i + 1))
        };
        let branches = file.branch.into_iter().enumerate().map(check).collect::<Result<Vec<_>, _>>()?;
        let mut names = BTreeSet::new();
        match branches.iter().find(|branch| !names.insert(&branch.name)) {
            Some(twice) => Err(format!("branch {} is there twice", twice.name)),
            None if branches.is_empty() => Err("expected at least one [[branch]]".into()),
            None => Ok(Self { branches }),
        }
    }
}

impl Branch {
    /// A branch as the card has them: act-order, symmetric, damp 0.1, v1.
    pub fn new(name: String, bits: u32, group_size: Option<usize>) -> Self {
        Self {
            name,
            bits,
            group_size,
            damp_percent: 0.1,
            sym: true,
            format: CheckpointFormat::Gptq,
            recipe: Preset::Card.recipe(),
        }
    }

    pub fn params(&self) -> GptqParams {
        let quant = QuantConfig {
            bits: self.bits,
            group_size: self.group_size,
            damp_percent: self.damp_percent,
            sym: self.sym,
            true_sequential: true,
            format: self.format,
            ..QuantConfig::default()
        };
        GptqParams::new(quant, Method::Gptq, self.recipe)
    }

    pub fn quant_config(&self) -> QuantConfig {
        self.params().quant
    }
}

/// `gptq-4bit-32g-actorder_True`, as publishers name branches.
pub fn branch_name(bits: u32, group_size: Option<usize>, order: Order) -> String {
    let group = group_size.map_or(-1, |size| size as i64);
    let sorted = matches!(order, Order::ActOrder | Order::StaticGroups);
    format!("gptq-{bits}bit-{group}g-actorder_{}", if sorted { "True" } else { "False" })
}

/// The place and the message, without the excerpt that takes further lines.
fn one_line(error: &toml::de::Error, text: &str) -> String {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = 1 + text.bytes().take(start).filter(|byte| *byte == b'\n').count();
    format!("line {line}: {}", error.message().trim().replace('\n', ", "))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanFile {
    #[serde(default)]
    branch: Vec<BranchEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BranchEntry {
    name: Option<String>,
    bits: u32,
    #[serde(default = "default_group_size")]
    group_size: i64,
    #[serde(default = "default_damp")]
    damp_percent: f64,
    #[serde(default = "yes")]
    sym: bool,
    #[serde(default = "default_format")]
    format: String,
    preset: Option<String>,
    order: Option<String>,
    act_order: Option<bool>,
    static_groups: Option<bool>,
    grid: Option<String>,
    mse: Option<bool>,
    target: Option<String>,
    rounds: Option<usize>,
}

fn default_group_size() -> i64 {
    128
}

fn default_damp() -> f64 {
    0.1
}

fn default_format() -> String {
    CheckpointFormat::Gptq.name().into()
}

fn yes() -> bool {
    true
}

impl BranchEntry {
    fn check(self, preset: Preset) -> Result<Branch, String> {
        let group_size = match self.group_size {
            -1 => None,
            size if size > 0 => Some(size as usize),
            size => return Err(format!("group_size: expected -1 or a positive number, got {size}")),
        };
        let recipe = self.recipe(preset)?;
        let name = self.name.unwrap_or_else(|| branch_name(self.bits, group_size, recipe.order));
        let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.starts_with('.') || !name.chars().all(safe) {
            return Err(format!("name: expected letters, digits, '.', '_' and '-', got {name:?}"));
        }
        let format =
            [CheckpointFormat::Gptq, CheckpointFormat::GptqV2].into_iter().find(|f| f.name() == self.format);
        let branch = Branch {
            bits: self.bits,
            group_size,
            damp_percent: self.damp_percent,
            sym: self.sym,
            recipe,
            format: format
                .ok_or_else(|| format!("{name}: format: expected gptq or gptq_v2, got {}", self.format))?,
            name,
        };
        let valid = branch.quant_config().validate();
        valid.map(|()| branch.clone()).map_err(|error| format!("{}: {error}", branch.name))
    }

    /// The preset, in act-order, with what the branch says of its own.
    fn recipe(&self, preset: Preset) -> Result<Recipe, String> {
        let preset = chosen("preset", &self.preset)?.unwrap_or(preset).recipe();
        let order = match (chosen("order", &self.order)?, self.act_order, self.static_groups) {
            (Some(order), None, None) => order,
            (Some(_), ..) => return Err("order: expected without act_order and static_groups".into()),
            (None, Some(false), Some(true)) => {
                return Err("static_groups: expected act_order = true with it".into());
            }
            (None, _, Some(true)) => Order::StaticGroups,
            (None, Some(false), _) => Order::File,
            (None, ..) => Order::ActOrder,
        };
        let grid = match (chosen("grid", &self.grid)?, self.mse) {
            (Some(grid), None) => grid,
            (Some(_), Some(_)) => return Err("grid: expected without mse".into()),
            (None, Some(true)) => GridKind::Mse,
            (None, _) => preset.grid,
        };
        let target = chosen("target", &self.target)?.unwrap_or(preset.target);
        Ok(Recipe { order, grid, target, rounds: self.rounds.unwrap_or(preset.rounds) })
    }
}

/// A choice by its name, where one is given.
fn chosen<T: Named>(key: &str, name: &Option<String>) -> Result<Option<T>, String> {
    let Some(name) = name else { return Ok(None) };
    let names = || T::NAMES.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
    T::from_name(name).map(Some).ok_or_else(|| format!("{key}: expected one of {}, got {name}", names()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Target;

    fn parsed(text: &str) -> Result<Plan, String> {
        Plan::parse(text, Preset::Fast)
    }

    #[test]
    fn the_card_has_the_published_names_in_the_published_order() {
        let names: Vec<_> =
            Plan::card(Preset::default()).branches.into_iter().map(|branch| branch.name).collect();
        assert_eq!(
            names,
            [
                "main",
                "gptq-4bit-32g-actorder_True",
                "gptq-8bit--1g-actorder_True",
                "gptq-8bit-128g-actorder_True",
                "gptq-8bit-32g-actorder_True",
                "gptq-4bit-64g-actorder_True",
            ]
        );
    }

    #[test]
    fn a_plan_fills_in_the_defaults_of_the_card() {
        let plan =
            parsed("[[branch]]\nname = \"main\"\nbits = 4\n[[branch]]\nbits = 8\ngroup_size = -1\n").unwrap();
        let card = Plan::card(Preset::Fast).branches;
        assert_eq!(plan.branches, [card[0].clone(), card[2].clone()]);
    }

    #[test]
    fn choices_of_a_branch_come_before_its_preset() {
        let of = |text: &str| {
            let branch = parsed(&format!("[[branch]]\nbits = 4\n{text}")).unwrap().branches.remove(0);
            (branch.recipe.order, branch.recipe.grid, branch.name.ends_with("True"))
        };
        let best = "[[branch]]\nbits = 4\npreset = \"best\"\ntarget = \"residual\"\nrounds = 3";
        let best = parsed(best).unwrap().branches[0].recipe;
        assert_eq!((best.target, best.rounds), (Target::Residual, 3));
        assert_eq!(of(""), (Order::ActOrder, GridKind::Loop, true));
        assert_eq!(of("preset = \"card\""), (Order::ActOrder, GridKind::Absmax, true));
        assert_eq!(of("order = \"gar\"\ngrid = \"mse\""), (Order::Gar, GridKind::Mse, false));
        assert_eq!(of("act_order = false\nmse = true"), (Order::File, GridKind::Mse, false));
        assert_eq!(of("static_groups = true\nmse = false"), (Order::StaticGroups, GridKind::Loop, true));
    }

    #[test]
    fn mistakes_are_named_in_one_line() {
        for (text, named) in [
            ("", "at least one"),
            ("[[branch]]\nbits = 5", "bits"),
            ("[[branch]]\nbits = 4\ngroup = 3", "line 3: unknown field `group`"),
            ("[[branch]]\nbits = 4\n[[branch]]\nbits = 4\ngroup_size = 0", "branch 2: group_size"),
            ("[[branch]]\nbits = 4\ngroup_size = 0", "group_size"),
            ("[[branch]]\nbits = 4\nname = \"../x\"", "../x"),
            ("[[branch]]\nbits = 4\n[[branch]]\nbits = 4", "twice"),
            ("[[branch]]\nbits = 4\nformat = \"awq\"", "awq"),
            ("[[branch]]\nbits = 4\ndamp_percent = 2.0", "damp_percent"),
            ("[[branch]]\nbits = 4\norder = \"up\"", "order: expected one of act-order, file"),
            ("[[branch]]\nbits = 4\norder = \"gar\"\nact_order = true", "order"),
            ("[[branch]]\nbits = 4\nact_order = false\nstatic_groups = true", "static_groups"),
            ("[[branch]]\nbits = 4\ngrid = \"loop\"\nmse = true", "grid"),
        ] {
            let message = parsed(text).unwrap_err();
            assert!(message.contains(named) && !message.contains('\n'), "{text}: {message}");
        }
    }
}
