//! How an artifact was quantized: `quantize_config.json`, or `quantization_config` inside `config.json`.

mod parse;

use std::path::Path;

use gptq_kernels::packing::ZeroOffset;
use serde_json::{Value, json};

use crate::config::fields::{Fields, read_json};
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
        }
    }
}

impl QuantConfig {
    /// The quantization of the model in `dir`, `None` if it has none.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let (own_path, model_path) = (dir.join("quantize_config.json"), dir.join("config.json"));
        let own = match own_path.exists() {
            true => Some(parse::parse(Fields::new(&read_json(&own_path)?, &own_path, "")?)?),
            false => None,
        };
        if !model_path.exists() {
            return Ok(own);
        }
        let model = read_json(&model_path)?;
        let model = Fields::new(&model, &model_path, "")?;
        let Some(section) = model.object("quantization_config", "quantization_config.")? else {
            return Ok(own);
        };
        let inner = parse::parse(section)?;
        if let Some(own) = &own {
            own.agrees_with(&inner, section)?;
        }
        Ok(own.or(Some(inner)))
    }

    /// Refuses settings that no artifact can have.
    pub fn validate(&self) -> Result<()> {
        let refuse = |key, expected: &str, got: String| {
            Err(Error::QuantSetting { key, expected: expected.into(), got })
        };
        match self {
            c if ![2, 3, 4, 8].contains(&c.bits) => refuse("bits", "2, 3, 4 or 8", c.bits.to_string()),
            c if c.group_size == Some(0) => refuse("group_size", "-1 or above 0", "0".into()),
            c if !(c.damp_percent > 0.0 && c.damp_percent < 1.0) => {
                refuse("damp_percent", "above 0, below 1", c.damp_percent.to_string())
            }
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

    /// Two descriptions of one artifact must not contradict each other in what decides its tensors.
    fn agrees_with(&self, other: &Self, section: Fields) -> Result<()> {
        let same = [
            ("bits", self.bits == other.bits, self.bits.to_string()),
            ("group_size", self.group_size == other.group_size, self.group_size_number().to_string()),
            ("desc_act", self.act_order == other.act_order, self.act_order.to_string()),
        ];
        match same.into_iter().find(|(_, same, _)| !same) {
            Some((key, _, own)) => Err(section.invalid(key, format!("{own} as in quantize_config.json"))),
            None => Ok(()),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn read(quantize_config: Option<Value>, config: Option<Value>) -> Result<Option<QuantConfig>> {
        let dir = tempfile::tempdir().unwrap();
        for (name, json) in [("quantize_config.json", quantize_config), ("config.json", config)] {
            if let Some(json) = json {
                fs::write(dir.path().join(name), json.to_string()).unwrap();
            }
        }
        QuantConfig::read(dir.path())
    }

    #[test]
    fn files_of_both_tools_and_of_neither_are_read() {
        let expected = QuantConfig { damp_percent: 0.1, act_order: true, ..QuantConfig::default() };
        let auto_gptq = json!({"bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": true});
        assert_eq!(read(Some(auto_gptq), None).unwrap(), Some(expected.clone()));
        let gptqmodel = json!({"bits": 4, "group_size": 128, "desc_act": true, "sym": true, "lm_head": false,
            "quant_method": "gptq", "checkpoint_format": "gptq_v2", "pack_dtype": "int32",
            "meta": {"damp_percent": 0.1, "static_groups": true, "true_sequential": false}});
        let config = json!({"model_type": "llama", "quantization_config": gptqmodel});
        let v2 = QuantConfig {
            format: CheckpointFormat::GptqV2,
            static_groups: true,
            true_sequential: false,
            ..expected
        };
        assert_eq!(read(None, Some(config)).unwrap(), Some(v2));
        assert_eq!(read(None, Some(json!({"model_type": "llama"}))).unwrap(), None);
        assert_eq!(read(None, None).unwrap(), None);
    }

    #[test]
    fn two_files_that_contradict_each_other_are_refused() {
        let quant = |bits: u32, group_size: i64| json!({"bits": bits, "group_size": group_size});
        let section = |quant: Value| Some(json!({"quantization_config": quant}));
        assert!(read(Some(quant(4, 128)), section(quant(4, 128))).is_ok());
        let message = read(Some(quant(4, 128)), section(quant(8, 128))).unwrap_err().to_string();
        assert!(message.ends_with("quantization_config.bits: expected 4 as in quantize_config.json, got 8"));
        let message = read(Some(quant(4, -1)), section(quant(4, 128))).unwrap_err().to_string();
        assert!(
            message.ends_with("group_size: expected -1 as in quantize_config.json, got 128"),
            "{message}"
        );
    }

    #[test]
    fn written_files_have_auto_gptqs_keys_in_its_order_and_read_back() {
        let v1 =
            QuantConfig { group_size: None, act_order: true, damp_percent: 0.1, ..QuantConfig::default() };
        let text = v1.to_quantize_config_json("author/model").to_string();
        let expected = concat!(
            r#"{"bits":4,"group_size":-1,"damp_percent":0.1,"desc_act":true,"static_groups":false,"sym":true,"#,
            r#""true_sequential":true,"model_name_or_path":"author/model","model_file_base_name":"model"}"#
        );
        assert_eq!(text, expected);
        for config in [v1.clone(), QuantConfig { format: CheckpointFormat::GptqV2, sym: false, ..v1 }] {
            let own = config.to_quantize_config_json("m");
            let model = json!({"quantization_config": config.to_quantization_config_json()});
            assert_eq!(read(Some(own), None).unwrap(), Some(config.clone()));
            assert_eq!(read(None, Some(model)).unwrap(), Some(config));
        }
    }

    #[test]
    #[cfg_attr(not(has_shared), ignore = "needs the larger models and texts: GPTQ_SHARED is not set")]
    fn gptqmodels_artifact_is_read() {
        let shared = std::env::var_os("GPTQ_SHARED").expect("GPTQ_SHARED is not set");
        let dir = Path::new(&shared).join("golden/gptqmodel-7.7.0-wiki20m-4bit-128g-actorder");
        let expected = QuantConfig { damp_percent: 0.1, act_order: true, ..QuantConfig::default() };
        assert_eq!(QuantConfig::read(&dir).unwrap(), Some(expected));
    }
}
