//! What a model folder holds, and whether it is sound: every tensor is read, nothing is computed with.

mod report;

use std::path::Path;

use gptq_runtime::layout::{self, TensorSpec};
use gptq_runtime::model::ModelFiles;
use gptq_runtime::quant_config::QuantConfig;
use gptq_runtime::soundness::{Finding, Stored, summary};
use rayon::prelude::*;

pub use report::{GroupIndex, Quantization, Report};

use crate::Result;
use crate::engines::{Facts, verdicts};

/// Examines a checkpoint or an artifact. Files that cannot be opened at all are an error; what is wrong
/// inside them is in the report.
pub fn inspect(dir: &Path) -> Result<Report> {
    let (files, findings) = ModelFiles::examine(dir)?;
    let (notes, wrong): (Vec<_>, Vec<_>) = findings.into_iter().partition(Finding::is_harmless);
    let mut problems: Vec<String> = wrong.iter().map(Finding::to_string).collect();
    problems.extend(float_problems(&files));
    let (quantization, engines) = match &files.quant {
        Some(quant) => {
            let summary = summarise(&files, quant)?;
            let permuted = summary.g_idx == GroupIndex::ActOrder;
            let facts = Facts {
                overrides: summary.own_settings || summary.dense_linears > 0,
                split_overrides: has_split_groups(&files)?,
                ..Facts::of_files(&files.config, quant, permuted)
            };
            (Some(summary), verdicts(&facts))
        }
        None => (None, vec![]),
    };
    let names: Vec<_> = files.checkpoint.names().collect();
    let elements =
        |name: &&str| files.checkpoint.spec(name).map_or(0, |e| e.shape.iter().map(|d| *d as u64).product());
    let short =
        |path: &Path| path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    Ok(Report {
        architecture: files.config.architecture.class_name().into(),
        layers: files.config.num_hidden_layers,
        hidden_size: files.config.hidden_size,
        vocab_size: files.config.vocab_size,
        context: files.config.context_length(),
        quantization,
        engines,
        files: files.checkpoint.file_sizes().into_iter().map(|(path, bytes)| (short(path), bytes)).collect(),
        tensors: names.len(),
        elements: names.iter().map(elements).sum(),
        sound: problems.is_empty(),
        problems,
        notes: summary(&notes),
    })
}

/// Parameters as declared, and what the tensors show.
fn summarise(files: &ModelFiles, quant: &QuantConfig) -> Result<Quantization> {
    let modules = files.modules()?;
    // A linear whose tensors do not fit is among the problems.
    let stored = modules.par_iter().filter_map(|module| {
        let own = module.quant.as_ref()?;
        Stored::read(&files.checkpoint, module, own).ok()
    });
    let stored: Vec<Stored> = stored.collect();
    let has = |wanted: fn(&Stored) -> bool| stored.iter().any(wanted);
    let g_idx = match () {
        () if has(|stored| matches!(stored, Stored::Permuted(_))) => GroupIndex::ActOrder,
        () if has(|stored| *stored == Stored::InFileOrder) => GroupIndex::Contiguous,
        () => GroupIndex::Absent,
    };
    let bias = modules.iter().any(|module| files.checkpoint.contains(&format!("{}.bias", module.name)));
    Ok(Quantization {
        bits: quant.bits,
        group_size: quant.group_size_number(),
        act_order: quant.act_order,
        sym: quant.sym,
        static_groups: quant.static_groups,
        damp_percent: quant.damp_percent,
        declared_format: quant.format.name().into(),
        g_idx,
        bias_tensors: bias,
        dense_linears: modules.iter().filter(|module| module.quant.is_none()).count(),
        own_settings: !quant.modules.is_empty(),
    })
}

/// Whether linears that programs stack, as q, k and v, are quantized in several ways.
fn has_split_groups(files: &ModelFiles) -> Result<bool> {
    for index in 0..files.config.num_hidden_layers {
        for group in layout::layer(&files.config, index).groups {
            let modules = group.linears.into_iter().map(|linear| files.module(index, linear));
            let modules = modules.collect::<std::result::Result<Vec<_>, _>>()?;
            if modules.iter().zip(modules.iter().skip(1)).any(|(a, b)| a.quant != b.quant) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Floating-point tensors that are not finite. Those that are missing or misshapen are findings.
fn float_problems(files: &ModelFiles) -> Vec<String> {
    let specs = layout::checkpoint_tensors(&files.config);
    let problem = |spec: &TensorSpec| {
        let tensor = files.checkpoint.tensor(&spec.name, &spec.shape).ok()?;
        files.checkpoint.check_finite(&tensor, &spec.name).err().map(|error| error.to_string())
    };
    specs.par_iter().filter_map(problem).collect()
}

#[cfg(test)]
mod tests {
    use gptq_kernels::packing::pack_zeros;
    use gptq_runtime::config::ModelConfig;
    use gptq_runtime::layout::StoredDtype;
    use gptq_runtime::quant_config::CheckpointFormat;

    use super::*;
    use crate::artifact::{ArtifactLayout, Begun, Fingerprint, OutMode, begin, metadata};

    fn config() -> ModelConfig {
        ModelConfig {
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 32,
            vocab_size: 32,
            ..ModelConfig::preset("tinyllama-1.1b").unwrap()
        }
    }

    /// Inspects a symmetric artifact with groups of 32 whose tensors were changed by `damage`.
    fn report(bits: u32, zeros: CheckpointFormat, damage: &dyn Fn(&str, &mut [u8])) -> Report {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a");
        let (config, quant) =
            (config(), QuantConfig { bits, group_size: Some(32), ..QuantConfig::default() });
        let specs = layout::artifact_tensors(&config, &quant, true);
        let files = ArtifactLayout::new(specs.clone(), &metadata(&quant), None);
        let begun = begin(&out, files, &Fingerprint::new(), OutMode::New).unwrap();
        let Begun::Writing(mut writer, _) = begun else { panic!("finished") };
        for spec in &specs {
            let mut bytes = content(spec, bits, zeros);
            damage(&spec.name, &mut bytes);
            writer.write_tensor(&spec.name, &bytes).unwrap();
        }
        writer.add_file("config.json", config.to_json().to_string().as_bytes()).unwrap();
        writer
            .add_file("quantize_config.json", quant.to_quantize_config_json("m").to_string().as_bytes())
            .unwrap();
        writer.finish().unwrap();
        inspect(&out).unwrap()
    }

    fn content(spec: &TensorSpec, bits: u32, zeros: CheckpointFormat) -> Vec<u8> {
        let bytes = |words: Vec<u32>| words.into_iter().flat_map(u32::to_le_bytes).collect();
        match spec.name.rsplit('.').next().unwrap() {
            "g_idx" => bytes((0..spec.shape[0] as u32).map(|i| i / 32).collect()),
            "qzeros" => {
                let out_features = spec.shape[1] * 32 / bits as usize;
                let middle = vec![2u8.pow(bits - 1); spec.shape[0] * out_features];
                bytes(pack_zeros(&middle, out_features, bits, zeros.zero_offset()).unwrap())
            }
            _ => vec![0; spec.elements() as usize * if spec.dtype == StoredDtype::I32 { 4 } else { 2 }],
        }
    }

    #[test]
    fn sound_artifacts_of_every_width_are_called_sound() {
        for bits in [2, 3, 4, 8] {
            let report = report(bits, CheckpointFormat::Gptq, &|_, _| {});
            assert_eq!(report.problems, [""; 0], "{bits} bits");
            let quantization = report.quantization.unwrap();
            assert_eq!(quantization.g_idx, GroupIndex::Contiguous);
        }
    }

    #[test]
    fn zero_points_of_the_other_format_are_a_problem() {
        for bits in [3, 4] {
            let report = report(bits, CheckpointFormat::GptqV2, &|_, _| {});
            assert!(!report.sound && report.problems[0].contains("gptq_v2"), "{:?}", report.problems);
        }
    }

    #[test]
    fn each_kind_of_damage_is_found_and_named_once() {
        type Damage = fn(&mut [u8]);
        let cases: [(&str, Damage); 6] = [
            ("self_attn.q_proj.g_idx", |bytes| bytes[0] = 2),
            ("mlp.up_proj.g_idx", |bytes| bytes[0] = 1),
            ("mlp.down_proj.qzeros", |bytes| bytes[5] ^= 8),
            ("mlp.gate_proj.scales", |bytes| bytes[1] = 0x7C),
            ("self_attn.v_proj.bias", |bytes| bytes[1] = 0x7E),
            ("input_layernorm.weight", |bytes| bytes[..2].copy_from_slice(&[0xC0, 0x7F])),
        ];
        for (tensor, change) in cases {
            let name = format!("model.layers.0.{tensor}");
            let report = report(4, CheckpointFormat::Gptq, &|n, bytes| {
                if n == name {
                    change(bytes)
                }
            });
            let said = [report.problems, report.notes].concat();
            let module = name.trim_end_matches(".weight");
            assert!(said.len() == 1 && said[0].contains(module), "{name}: {said:?}");
        }
    }
}
