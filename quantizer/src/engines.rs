//! Which programs load an artifact, and why not: one table, with the versions that it was checked against.
//!
//! An artifact is reduced to [`Facts`]; [`verdicts`] is a pure function of them.

use gptq_runtime::config::ModelConfig;
use gptq_runtime::layout;
use gptq_runtime::quant_config::{CheckpointFormat, QuantConfig};
use serde::Serialize;

/// What decides whether a program loads an artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub bits: u32,
    /// `None` is one group a row.
    pub group_size: Option<usize>,
    pub sym: bool,
    /// As the configuration file says it.
    pub desc_act: bool,
    /// Features of one group lie apart: `g_idx` is not `i / group_size`.
    pub permuted: bool,
    pub format: CheckpointFormat,
    /// The MLP's linears have biases of their own (not AutoGPTQ's zeros).
    pub mlp_bias: bool,
    /// Modules that deviate from the settings (`dynamic`), or are not quantized at all.
    pub overrides: bool,
    /// Among them, q, k and v or gate and up of one layer differ from one another.
    pub split_overrides: bool,
}

/// What one program makes of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Name and version.
    pub engine: &'static str,
    pub loads: bool,
    /// Why not; or, where it loads, what to know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The setting that would change a no.
    #[serde(skip)]
    pub remedy: Option<Remedy>,
}

/// A setting of `quantize` or of a plan that lets more programs load the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remedy {
    FileGroups,
    Symmetric,
    FirstFormat,
    FourBits,
    FourOrEightBits,
}

/// Where a remedy is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Flags of `quantize`.
    Flags,
    /// Keys of a branch in a plan.
    Plan,
}

/// One program's abilities. What is not listed here, all of them have.
struct Engine {
    name: &'static str,
    bits: &'static [u32],
    asymmetric: bool,
    /// Files with `desc_act: true` and groups.
    act_order: bool,
    /// `gptq_v2`
    second_format: bool,
    mlp_bias: bool,
    /// `dynamic` rules and layers that stayed dense.
    overrides: bool,
    /// Runs q, k and v, and gate and up, as one linear each.
    fuses: bool,
    /// What to know where it loads.
    note: fn(&Facts) -> Option<&'static str>,
}

const ALL: &[u32] = &[2, 3, 4, 8];

/// Reads everything that the format has; others are described by what they lack.
const COMPLETE: Engine = Engine {
    name: "",
    bits: ALL,
    asymmetric: true,
    act_order: true,
    second_format: true,
    mlp_bias: true,
    overrides: true,
    fuses: true,
    note: |_| None,
};

/// As of November 2026. Where nothing is known of an ability beyond v1 files of one setting, it counts as absent.
const ENGINES: [Engine; 9] = [
    Engine { name: "vLLM 0.33", bits: &[4, 8], asymmetric: false, act_order: false, ..COMPLETE },
    Engine { name: "vLLM to 0.27", ..COMPLETE },
    Engine { name: "SGLang 0.5.23", mlp_bias: false, ..COMPLETE },
    Engine {
        name: "transformers 5.24 + GPTQModel 7",
        fuses: false,
        note: |facts| {
            let refused = !facts.sym && facts.format == CheckpointFormat::Gptq;
            refused.then_some("by transformers; GPTQModel.load wants gptq_v2 where grids are asymmetric")
        },
        ..COMPLETE
    },
    Engine { name: "ExLlama", bits: &[4], second_format: false, overrides: false, ..COMPLETE },
    Engine { name: "TGI 3.3", second_format: false, overrides: false, ..COMPLETE },
    Engine {
        name: "mistral.rs 0.9",
        second_format: false,
        overrides: false,
        note: |_| Some("on CUDA only"),
        ..COMPLETE
    },
    Engine {
        name: "llama.cpp converter",
        bits: &[2, 4, 8],
        overrides: false,
        note: |_| Some("dequantizes"),
        ..COMPLETE
    },
    Engine {
        name: "lmdeploy",
        bits: &[4],
        asymmetric: false,
        act_order: false,
        second_format: false,
        overrides: false,
        ..COMPLETE
    },
];

impl Facts {
    /// Of the artifact that these settings make of a model.
    pub fn of_settings(config: &ModelConfig, quant: &QuantConfig) -> Self {
        let desc_act = needs_desc_act(config, quant);
        Self { permuted: desc_act, desc_act, ..Self::of_files(config, quant, false) }
    }

    /// Of a finished artifact: its configuration as read, and whether some `g_idx` of it is permuted.
    pub fn of_files(config: &ModelConfig, quant: &QuantConfig, permuted: bool) -> Self {
        Self {
            bits: quant.bits,
            group_size: quant.group_size,
            sym: quant.sym,
            desc_act: quant.act_order,
            permuted,
            format: quant.format,
            mlp_bias: config.mlp_bias,
            overrides: false,
            split_overrides: false,
        }
    }
}

/// Whether an artifact's `g_idx` differs from `i / group_size`, so that its file has to say `desc_act: true`:
/// not where the groups are those of the file's order, and not where a row is one group.
pub fn needs_desc_act(config: &ModelConfig, quant: &QuantConfig) -> bool {
    let grouped = || layout::linears(config).iter().any(|(_, linear)| quant.groups(linear.in_features) > 1);
    quant.act_order && !quant.static_groups && grouped()
}

/// What the files say of an artifact that these settings made: `act_order` stands for their `desc_act`.
pub fn as_written(config: &ModelConfig, quant: &QuantConfig) -> QuantConfig {
    QuantConfig { act_order: needs_desc_act(config, quant), ..quant.clone() }
}

/// Every program's verdict, in the table's order.
pub fn verdicts(facts: &Facts) -> Vec<Verdict> {
    let verdict = |engine: &Engine| match engine.refusal(facts) {
        Some((reason, remedy)) => Verdict { engine: engine.name, loads: false, reason: Some(reason), remedy },
        None => Verdict {
            engine: engine.name,
            loads: true,
            reason: (engine.note)(facts).map(Into::into),
            remedy: None,
        },
    };
    ENGINES.iter().map(verdict).collect()
}

/// Whether ExLlama's kernels read the artifact, a column of the published tables.
pub fn exllama(facts: &Facts) -> bool {
    ENGINES.iter().filter(|engine| engine.name == "ExLlama").all(|engine| engine.refusal(facts).is_none())
}

impl Engine {
    /// Why this program does not load the artifact, or reads it wrong.
    fn refusal(&self, facts: &Facts) -> Option<(String, Option<Remedy>)> {
        let because = |reason: &str, remedy| Some((reason.to_string(), remedy));
        if !self.bits.contains(&facts.bits) {
            let widths: Vec<_> = self.bits.iter().map(u32::to_string).collect();
            let remedy = if self.bits.contains(&8) { Remedy::FourOrEightBits } else { Remedy::FourBits };
            return because(&format!("reads {} bits only", widths.join(", ")), Some(remedy));
        }
        if facts.permuted && !facts.desc_act {
            return because("g_idx is permuted, but the file says desc_act: false", None);
        }
        match facts {
            f if f.desc_act && f.group_size.is_some() && !self.act_order => {
                because("refuses desc_act with groups", Some(Remedy::FileGroups))
            }
            f if !f.sym && !self.asymmetric => because("reads symmetric grids only", Some(Remedy::Symmetric)),
            f if f.format == CheckpointFormat::GptqV2 && !self.second_format => {
                because("reads zero points of v1 only", Some(Remedy::FirstFormat))
            }
            f if f.mlp_bias && !self.mlp_bias => because("never reads the MLP's biases", None),
            f if f.overrides && !self.overrides => because("expects one setting for all linears", None),
            f if f.split_overrides && self.fuses => {
                because("fuses q, k, v and gate, up, which differ here", None)
            }
            _ => None,
        }
    }
}

impl Remedy {
    fn advice(self, place: Place) -> &'static str {
        let (flags, plan) = match self {
            Self::FileGroups => (
                "--order gar writes groups in file order, with the same accuracy",
                "order = \"gar\" in a plan writes groups in file order, with the same accuracy",
            ),
            Self::Symmetric => ("--sym changes that", "sym = true in a plan changes that"),
            Self::FirstFormat => {
                ("--checkpoint-format gptq changes that", "format = \"gptq\" in a plan changes that")
            }
            Self::FourBits => ("--bits 4 changes that", "bits = 4 in a plan changes that"),
            Self::FourOrEightBits => {
                ("--bits 4 or 8 changes that", "bits = 4 or bits = 8 in a plan changes that")
            }
        };
        if place == Place::Flags { flags } else { plan }
    }
}

/// A line for every reason why programs will not load an artifact, with their names and what changes it.
pub fn advice(facts: &Facts, place: Place) -> Vec<String> {
    let refused: Vec<_> = verdicts(facts).into_iter().filter(|verdict| !verdict.loads).collect();
    let mut lines = Vec::new();
    for (i, verdict) in refused.iter().enumerate() {
        let same = |other: &&Verdict| other.reason == verdict.reason;
        if refused[..i].iter().any(|earlier| same(&earlier)) {
            continue;
        }
        let names: Vec<_> = refused.iter().filter(same).map(|verdict| verdict.engine).collect();
        let reason = verdict.reason.as_deref().unwrap_or_default();
        let change = verdict.remedy.map_or(String::new(), |remedy| format!("; {}", remedy.advice(place)));
        lines.push(format!("not for {}: {reason}{change}", names.join(", ")));
    }
    lines
}

#[cfg(test)]
mod tests;
