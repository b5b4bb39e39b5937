//! How an artifact was quantized: `quantize_config.json`, or `quantization_config` inside `config.json`.

mod modules;
mod parse;
mod sources;
#[cfg(test)]
mod tests;

use std::path::Path;

use gptq_kernels::packing::ZeroOffset;
use serde_json::{Value, json};

pub use modules::ModuleRules;
use sources::Sources;

use crate::{Error, Result};

/// How zero points are stored: v1 stores `zero - 1`, v2 stores `zero`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointFormat {
    Gptq,
    GptqV2,
}

/// The quantization parameters of one artifact.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantConfig {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u32,
    /// Input features that share a scale and a zero; `None` (file: -1) is one group a row.
    pub group_size: Option<usize>,
    pub damp_percent: f64,
    /// File key `desc_act`: columns were solved in order of descending Hessian diagonal.
    pub act_order: bool,
    pub static_groups: bool,
    pub sym: bool,
    pub true_sequential: bool,
    pub format: CheckpointFormat,
    /// Modules that differ from the rest; none in what we write.
    pub modules: ModuleRules,
}

/// What a file that leaves keys out means, except for `bits` and `group_size`, which every file has.
impl Default for QuantConfig {
    fn default() -> Self {
        Self {
            bits: 4,
            group_size: Some(128),
            damp_percent: 0.01,
            act_order: false,
            static_groups: false,
            sym: true,
            true_sequential: true,
            format: CheckpointFormat::Gptq,
            modules: ModuleRules::default(),
        }
    }
}

impl QuantConfig {
    /// The quantization of the model in `dir`, `None` if it has none: quantize_config.json and the section in config.json,
    /// merged key by key.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        Sources::read(dir)?.map(|sources| parse::parse(sources.fields())).transpose()
    }

    /// Names that the safetensors file of an artifact may have beside the usual one, most likely first: the one that
    /// quantize_config.json gives, and AutoGPTQ's own. Empty for a folder that is not quantized.
    pub fn file_names(dir: &Path) -> Result<Vec<String>> {
        let Some(sources) = Sources::read(dir)? else { return Ok(vec![]) };
        let fields = sources.fields();
        let mut names = Vec::new();
        if let Some(name) = fields.string("model_file_base_name")? {
            if name.contains(['/', '\\', '\0']) {
                return Err(fields.invalid("model_file_base_name", "a file name"));
            }
            names.push(name.trim_end_matches(".safetensors").to_owned());
        }
        if let (Some(bits), Some(size)) = (fields.value("bits"), fields.value("group_size")) {
            names.push(format!("gptq_model-{bits}bit-{size}g"));
        }
        Ok(names)
    }

    /// The settings of a module, as `model.layers.3.self_attn.q_proj`; `None` where the description says that it is not
    /// quantized.
    pub fn of_module(&self, name: &str) -> Result<Option<Self>> {
        self.modules.of(self, name)
    }

    /// Refuses settings that no artifact can have.
    pub fn validate(&self) -> Result<()> {
        self.validate_shape()?;
        if !(self.damp_percent > 0.0 && self.damp_percent < 1.0) {
            return refuse("damp_percent", "above 0, below 1", self.damp_percent.to_string());
        }
        Ok(())
    }

    /// Refuses what no file can have.
    fn validate_shape(&self) -> Result<()> {
        match self {
            c if ![2, 3, 4, 8].contains(&c.bits) => refuse("bits", "2, 3, 4 or 8", c.bits.to_string()),
            c if c.group_size == Some(0) => refuse("group_size", "-1 or above 0", "0".into()),
            _ => Ok(()),
        }
    }

    /// Groups of a linear with this many input features.
    pub fn groups(&self, in_features: usize) -> usize {
        self.group_size.map_or(1, |size| in_features.div_ceil(size.max(1)))
    }

    /// The group size as files have it: -1 for one group a row.
    pub fn group_size_number(&self) -> i64 {
        self.group_size.map_or(-1, |size| size as i64)
    }

    /// `quantize_config.json`, keys in AutoGPTQ's order.
    pub fn to_quantize_config_json(&self, model_name: &str) -> Value {
        let mut json = self.common_json();
        json["model_name_or_path"] = json!(model_name);
        json["model_file_base_name"] = json!("model");
        // AutoGPTQ 0.4.2 refuses keys it does not know, so v1 files leave this one out.
        if self.format == CheckpointFormat::GptqV2 {
            json["checkpoint_format"] = json!(self.format.name());
        }
        json
    }

    /// The `quantization_config` of a `config.json`, which transformers, vLLM and TGI look for.
    pub fn to_quantization_config_json(&self) -> Value {
        let mut json = self.common_json();
        json["quant_method"] = json!("gptq");
        json["checkpoint_format"] = json!(self.format.name());
        json
    }

    fn common_json(&self) -> Value {
        json!({
            "bits": self.bits,
            "group_size": self.group_size_number(),
            "damp_percent": self.damp_percent,
            "desc_act": self.act_order,
            "static_groups": self.static_groups,
            "sym": self.sym,
            "true_sequential": self.true_sequential,
        })
    }
}

fn refuse(key: &'static str, expected: &str, got: String) -> Result<()> {
    Err(Error::QuantSetting { key, expected: expected.into(), got })
}

impl CheckpointFormat {
    /// The value of `checkpoint_format`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq_v2",
        }
    }

    /// What is subtracted from a zero point before it is stored.
    pub fn zero_offset(self) -> ZeroOffset {
        match self {
            Self::Gptq => 1,
            Self::GptqV2 => 0,
        }
    }
}
