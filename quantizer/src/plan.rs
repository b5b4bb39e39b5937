//! The branches that a publisher offers of one model.

use std::collections::BTreeSet;
use std::path::Path;

use gptq_runtime::quant_config::{CheckpointFormat, QuantConfig};
use serde::Deserialize;

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
    pub act_order: bool,
    pub damp_percent: f64,
    pub sym: bool,
    pub static_groups: bool,
    pub mse: bool,
    pub format: CheckpointFormat,
}

impl Plan {
    /// The six branches of the usual card: 4 and 8 bits, act-order, damp 0.1.
    pub fn card() -> Self {
        let branch = |bits, group_size| Branch::new(branch_name(bits, group_size, true), bits, group_size);
        let main = Branch::new("main".into(), 4, Some(128));
        let others = [(4, Some(32)), (8, None), (8, Some(128)), (8, Some(32)), (4, Some(64))];
        Self { branches: [main].into_iter().chain(others.map(|(bits, size)| branch(bits, size))).collect() }
    }

    /// Reads a plan: `[[branch]]` tables with `bits`, and what differs from the card's defaults.
    ///
    /// ```toml
    /// [[branch]]
    /// bits = 4                # 2, 3, 4 or 8
    /// name = "main"           # else made from the settings: gptq-4bit-128g-actorder_True
    /// group_size = 128        # -1 for one group a row
    /// act_order = true
    /// damp_percent = 0.1      # between 0 and 1
    /// sym = true
    /// static_groups = false
    /// mse = false             # search each grid's range
    /// format = "gptq"         # or "gptq_v2"
    /// ```
    pub fn from_toml(path: &Path) -> Result<Self> {
        /// Bytes of a plan at most.
        const MOST_BYTES: u64 = 1 << 20;
        let bytes = gptq_input::read(path, MOST_BYTES).map_err(Error::io(path))?;
        let text = String::from_utf8_lossy(&bytes);
        Self::parse(&text).map_err(|problem| Error::Invalid { place: path.display().to_string(), problem })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: PlanFile = toml::from_str(text).map_err(|error| one_line(&error, text))?;
        let check = |(i, entry): (usize, BranchEntry)| {
            entry.check().map_err(|problem| format!("branch {}: {problem}", i + 1))
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
            act_order: true,
            damp_percent: 0.1,
            sym: true,
            static_groups: false,
            mse: false,
            format: CheckpointFormat::Gptq,
        }
    }

    pub fn quant_config(&self) -> QuantConfig {
        QuantConfig {
            bits: self.bits,
            group_size: self.group_size,
            damp_percent: self.damp_percent,
            act_order: self.act_order,
            static_groups: self.static_groups,
            sym: self.sym,
            true_sequential: true,
            format: self.format,
            ..QuantConfig::default()
        }
    }
}

/// `gptq-4bit-32g-actorder_True`, as publishers name branches.
pub fn branch_name(bits: u32, group_size: Option<usize>, act_order: bool) -> String {
    let group = group_size.map_or(-1, |size| size as i64);
    format!("gptq-{bits}bit-{group}g-actorder_{}", if act_order { "True" } else { "False" })
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
    #[serde(default = "yes")]
    act_order: bool,
    #[serde(default = "default_damp")]
    damp_percent: f64,
    #[serde(default = "yes")]
    sym: bool,
    #[serde(default)]
    static_groups: bool,
    #[serde(default)]
    mse: bool,
    #[serde(default = "default_format")]
    format: String,
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
    fn check(self) -> Result<Branch, String> {
        let group_size = match self.group_size {
            -1 => None,
            size if size > 0 => Some(size as usize),
            size => return Err(format!("group_size: expected -1 or a positive number, got {size}")),
        };
        let name = self.name.unwrap_or_else(|| branch_name(self.bits, group_size, self.act_order));
        let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.starts_with('.') || !name.chars().all(safe) {
            return Err(format!("name: expected letters, digits, '.', '_' and '-', got {name:?}"));
        }
        let format =
            [CheckpointFormat::Gptq, CheckpointFormat::GptqV2].into_iter().find(|f| f.name() == self.format);
        let branch = Branch {
            bits: self.bits,
            group_size,
            act_order: self.act_order,
            damp_percent: self.damp_percent,
            sym: self.sym,
            static_groups: self.static_groups,
            mse: self.mse,
            format: format
                .ok_or_else(|| format!("{name}: format: expected gptq or gptq_v2, got {}", self.format))?,
            name,
        };
        let valid = branch.quant_config().validate();
        valid.map(|()| branch.clone()).map_err(|error| format!("{}: {error}", branch.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_card_has_the_published_names_in_the_published_order() {
        let names: Vec<_> = Plan::card().branches.into_iter().map(|branch| branch.name).collect();
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
            Plan::parse("[[branch]]\nname = \"main\"\nbits = 4\n[[branch]]\nbits = 8\ngroup_size = -1\n")
                .unwrap();
        assert_eq!(plan.branches, [Plan::card().branches[0].clone(), Plan::card().branches[2].clone()]);
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
        ] {
            let message = Plan::parse(text).unwrap_err();
            assert!(message.contains(named) && !message.contains('\n'), "{text}: {message}");
        }
    }
}
