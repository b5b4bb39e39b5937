//! Settings of single modules: GPTQModel's `dynamic` rules, and lists of the modules that are quantized at all.

use fancy_regex::Regex;
use serde_json::Value;

use super::QuantConfig;
use crate::config::fields::Fields;
use crate::{Error, Result};

/// Which modules differ from the rest of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModuleRules {
    rules: Vec<Rule>,
    /// Module paths inside a layer, as `self_attn.q_proj`; `None` for all.
    quantized: Option<Vec<String>>,
}

/// What modules whose name matches have instead. The first match wins.
#[derive(Clone, Debug)]
struct Rule {
    /// As the file has it, `-:` or `+:` included.
    text: String,
    pattern: Regex,
    change: Change,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Overrides {
    bits: Option<u32>,
    /// `Some(None)` is one group a row.
    group_size: Option<Option<usize>>,
    sym: Option<bool>,
    act_order: Option<bool>,
}

#[derive(Clone, Debug, PartialEq)]
enum Change {
    NotQuantized,
    Override(Overrides),
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        (&self.text, &self.change) == (&other.text, &other.change)
    }
}

impl ModuleRules {
    /// The rules of a description.
    pub(super) fn parse(fields: Fields) -> Result<Self> {
        let mut rules = Vec::new();
        if let Some(dynamic) = fields.object("dynamic", "dynamic.")? {
            for text in dynamic.keys() {
                rules.push(rule(dynamic, text)?);
            }
        }
        Ok(Self { rules, quantized: quantized_modules(fields)? })
    }

    /// Whether every module is like the others.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.quantized.is_none()
    }

    /// The settings of a module, as `model.layers.3.self_attn.q_proj`; `None` where it is not quantized.
    ///
    /// # Errors
    /// A pattern that takes too long to match.
    pub(super) fn of(&self, quant: &QuantConfig, name: &str) -> Result<Option<QuantConfig>> {
        let inside = |module: &String| name == module || name.ends_with(&format!(".{module}"));
        if self.quantized.as_ref().is_some_and(|quantized| !quantized.iter().any(inside)) {
            return Ok(None);
        }
        for rule in &self.rules {
            let matched = rule.pattern.is_match(name).map_err(|cause| Error::QuantSetting {
                key: "dynamic",
                expected: format!("a pattern that can be matched against {name}"),
                got: format!("{} ({cause})", gptq_input::short(&rule.text)),
            })?;
            if matched {
                return Ok(rule.change.applied(quant));
            }
        }
        Ok(Some(quant.clone()))
    }
}

impl Change {
    fn applied(&self, quant: &QuantConfig) -> Option<QuantConfig> {
        let Self::Override(change) = self else { return None };
        Some(QuantConfig {
            bits: change.bits.unwrap_or(quant.bits),
            group_size: change.group_size.unwrap_or(quant.group_size),
            sym: change.sym.unwrap_or(quant.sym),
            act_order: change.act_order.unwrap_or(quant.act_order),
            ..quant.clone()
        })
    }
}

fn rule(dynamic: Fields, text: &str) -> Result<Rule> {
    let excluded = text.strip_prefix("-:");
    let source = excluded.or(text.strip_prefix("+:")).unwrap_or(text);
    // The names are matched from their beginning, as Python's `re.match` does.
    let pattern = Regex::new(&format!("^(?:{source})"))
        .map_err(|_| dynamic.invalid(text, "a regular expression of module names as its key"))?;
    let change = match (excluded, dynamic.object(text, "dynamic.*.")?) {
        (Some(_), _) => Change::NotQuantized,
        (None, Some(overrides)) => Change::Override(parse_overrides(overrides)?),
        (None, None) => Change::Override(Overrides::default()),
    };
    Ok(Rule { text: text.into(), pattern, change })
}

fn parse_overrides(fields: Fields) -> Result<Overrides> {
    /// Settings of the solver, which change nothing about what a file holds.
    const HARMLESS: [&str; 10] = [
        "damp_percent",
        "damp_auto_increment",
        "static_groups",
        "true_sequential",
        "mse",
        "act_group_aware",
        "fallback",
        "hessian",
        "gptaq",
        "offload_to_disk",
    ];
    const KNOWN: [&str; 4] = ["bits", "group_size", "sym", "desc_act"];
    if let Some(key) = fields.keys().find(|key| !KNOWN.contains(key) && !HARMLESS.contains(key)) {
        return Err(fields.invalid(key, "bits, group_size, sym or desc_act"));
    }
    let bits = match fields.integer("bits")? {
        Some(bits @ (2 | 3 | 4 | 8)) => Some(bits as u32),
        Some(_) => return Err(fields.invalid("bits", "2, 3, 4 or 8")),
        None => None,
    };
    let group_size = match fields.value("group_size") {
        Some(_) => Some(super::parse::group_size(fields)?),
        None => None,
    };
    if group_size == Some(Some(0)) {
        return Err(fields.invalid("group_size", "-1 or above 0"));
    }
    Ok(Overrides { bits, group_size, sym: fields.boolean("sym")?, act_order: fields.boolean("desc_act")? })
}

/// `modules_in_block_to_quantize`: names, or lists of names.
fn quantized_modules(fields: Fields) -> Result<Option<Vec<String>>> {
    let key = "modules_in_block_to_quantize";
    let Some(value) = fields.value(key) else { return Ok(None) };
    let wrong = || fields.invalid(key, "a list of module names, or of such lists");
    let flat = |entry: &Value| match entry {
        Value::String(name) => Ok(vec![name.clone()]),
        Value::Array(names) => {
            names.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<_>>().ok_or_else(wrong)
        }
        _ => Err(wrong()),
    };
    let entries = value.as_array().ok_or_else(wrong)?;
    let names = entries.iter().map(flat).collect::<Result<Vec<_>>>()?.concat();
    // AutoGPTQ takes an empty list as all of them.
    Ok(Some(names).filter(|names| !names.is_empty()))
}
