//! What is written down about a run: `quantize_log.json` beside the artifact, for people and for later runs.

use std::path::Path;

use gptq_runtime::quant_config::{CheckpointFormat, QuantConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::guard::Verdict;
use crate::recipe::{Named, Recipe};
use crate::sequential::{Agreement, ExpertTokens, Phases};
use crate::spread::Spread;
use crate::{Error, Result};

/// The log's file name.
pub const LOG_FILE: &str = "quantize_log.json";

/// One artifact's making.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct QuantizeLog {
    /// Program and version.
    pub made_by: String,
    /// The source as the user named it.
    pub model: String,
    pub device: String,
    /// `gptq` or `rtn`.
    pub method: String,
    pub bits: u32,
    /// -1 for one group a row.
    pub group_size: i64,
    /// Columns were solved by descending Hessian diagonal; the files' `desc_act` is about `g_idx` instead.
    pub act_order: bool,
    pub sym: bool,
    pub static_groups: bool,
    #[serde(default)]
    pub recipe: RecipeRecord,
    /// As asked for; see each linear for what was used.
    pub damp_percent: f64,
    pub checkpoint_format: String,
    /// `None` for rounding to nearest.
    pub calibration: Option<CalibrationRecord>,
    /// Seconds of this run, from the first layer to the last written byte.
    pub seconds: f64,
    /// Bytes of the device's memory that were in use at most; `None` where it is the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<usize>,
    pub layers: Vec<LayerRecord>,
    /// `None` where the recipe has no use for the unquantized model's activations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<Agreement>,
    /// Everything that decides the artifact's bytes: a later run with the same settings makes the same.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub settings: Value,
    /// Where the artifact was measured after it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<EvaluationRecord>,
}

/// How columns were solved, by the names of [`crate::recipe::Named`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct RecipeRecord {
    /// `None` where single choices differ from every preset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    pub order: String,
    pub grid: String,
    #[serde(default)]
    pub target: String,
    #[serde(default)]
    pub rounds: usize,
}

impl From<&Recipe> for RecipeRecord {
    fn from(recipe: &Recipe) -> Self {
        let preset = recipe.preset().map(|preset| preset.name().into());
        Self {
            preset,
            order: recipe.order.name().into(),
            grid: recipe.grid.name().into(),
            target: recipe.target.name().into(),
            rounds: recipe.rounds,
        }
    }
}

/// Which tokens the Hessians saw.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct CalibrationRecord {
    pub dataset: String,
    /// Hash of the rows, to tell that two texts are the same whatever their name.
    pub fingerprint: String,
    pub join: String,
    pub sampling: String,
    pub samples: usize,
    pub seq_len: usize,
    pub seed: u64,
}

/// One layer, seconds by phase.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct LayerRecord {
    pub layer: usize,
    #[serde(flatten)]
    pub phases: Phases,
    pub linears: Vec<LinearRecord>,
    /// Where the layer has experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertTokens>,
}

#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct LinearRecord {
    pub module: String,
    /// Damped objective, `sum ((w - q) / U_ii)^2 / 2` with H = 2 / sequences * X X^T, as the sweep left it.
    pub loss: f64,
    /// What the factorization needed: as asked for, or more.
    pub damp_percent: f64,
    /// What tokens said that solving did not see, where some were held out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<Verdict>,
    /// Of the Hessian's diagonal; `None` for rounding to nearest, and in logs of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hessian: Option<Spread>,
}

/// A measurement with its protocol.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct EvaluationRecord {
    #[serde(flatten)]
    pub protocol: Protocol,
    pub tokens_scored: usize,
    pub perplexity: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline_perplexity: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_divergence: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
}

/// Everything but the artifact that decides a measurement: one of the same protocol need not be made again.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Protocol {
    pub dataset: String,
    pub join: String,
    pub ctx: usize,
    pub windows: usize,
    /// Hash of the windows' token ids.
    #[serde(default)]
    pub tokens: String,
    /// Device and compute type.
    #[serde(default)]
    pub arithmetic: String,
    /// [`crate::NUMERICS`] of the program.
    #[serde(default)]
    pub numerics: u32,
}

impl QuantizeLog {
    /// The log of an artifact; `None` where another program made it.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(LOG_FILE);
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(Error::io(&path))?,
        };
        serde_json::from_str(&text).map(Some).map_err(|error| Error::invalid(path.display(), error))
    }

    /// As [`Self::read`]; `None` also where the log is another version's or damaged.
    pub fn read_if_ours(dir: &Path) -> Result<Option<Self>> {
        match Self::read(dir) {
            Err(Error::Invalid { .. }) => Ok(None),
            log => log,
        }
    }

    /// The settings, with the order of columns that was solved in.
    pub fn quant_config(&self) -> QuantConfig {
        let second = self.checkpoint_format == CheckpointFormat::GptqV2.name();
        QuantConfig {
            bits: self.bits,
            group_size: usize::try_from(self.group_size).ok(),
            damp_percent: self.damp_percent,
            act_order: self.act_order,
            static_groups: self.static_groups,
            sym: self.sym,
            true_sequential: true,
            format: if second { CheckpointFormat::GptqV2 } else { CheckpointFormat::Gptq },
            ..QuantConfig::default()
        }
    }

    /// The file's content.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Strings, numbers and lists always have a JSON form.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// Linears whose factorization needed more damp than asked for.
    pub fn raised_damp(&self) -> Vec<(usize, &LinearRecord)> {
        let linears =
            self.layers.iter().flat_map(|layer| layer.linears.iter().map(|linear| (layer.layer, linear)));
        linears.filter(|(_, linear)| linear.damp_percent > self.damp_percent).collect()
    }

    /// Seconds by phase over all layers.
    pub fn phases(&self) -> Phases {
        let mut sum = Phases::default();
        self.layers.iter().for_each(|layer| sum += layer.phases);
        sum
    }

    /// Layers with experts.
    pub fn experts(&self) -> impl Iterator<Item = &ExpertTokens> {
        self.layers.iter().filter_map(|layer| layer.experts.as_ref())
    }

    /// Sum of all linears' losses.
    pub fn total_loss(&self) -> f64 {
        self.layers.iter().flat_map(|layer| &layer.linears).map(|linear| linear.loss).sum()
    }
}
