//! What a model folder holds, and whether it is sound: every tensor is read, nothing is computed with.

mod report;

use std::path::Path;

use gptq_kernels::packing::pack_zeros;
use gptq_runtime::layout::{self, LinearSpec};
use gptq_runtime::model::ModelFiles;
use gptq_runtime::quant_config::{CheckpointFormat, QuantConfig};
use rayon::prelude::*;

pub use report::{GroupIndex, Quantization, Report};

use crate::Result;
use crate::engines::{Facts, verdicts};

/// Examines a checkpoint or an artifact. Files that cannot be opened at all are an error; what is wrong
/// inside them is in the report.
pub fn inspect(dir: &Path) -> Result<Report> {
    let files = ModelFiles::open(dir)?;
    let linears: Vec<(String, LinearSpec)> = (0..files.config.num_hidden_layers)
        .flat_map(|layer| {
            layout::linears(&files.config)
                .into_iter()
                .map(move |l| (layout::layer_prefix(layer) + l.module, l))
        })
        .collect();
    let mut problems = Vec::new();
    let (mut quantization, mut engines) = (None, Vec::new());
    if let Some(quant) = &files.quant {
        let seen: Vec<Seen> =
            linears.par_iter().map(|(name, linear)| examine(&files, quant, name, linear)).collect();
        problems.extend(seen.iter().flat_map(|seen| seen.problems.clone()));
        let summary = summarise(quant, &seen);
        let permuted = summary.g_idx == GroupIndex::ActOrder;
        engines = verdicts(&Facts::of_files(&files.config, quant, permuted));
        quantization = Some(summary);
    }
    problems.extend(float_problems(&files));
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
        context: files.config.max_position_embeddings,
        quantization,
        engines,
        files: files.checkpoint.file_sizes().into_iter().map(|(path, bytes)| (short(path), bytes)).collect(),
        tensors: names.len(),
        elements: names.iter().map(elements).sum(),
        sound: problems.is_empty(),
        problems,
    })
}

/// One quantized linear.
struct Seen {
    problems: Vec<String>,
    g_idx: GroupIndex,
    /// Under which format the zero points are those of symmetric grids.
    zeros: Option<CheckpointFormat>,
    bias: bool,
}

fn examine(files: &ModelFiles, quant: &QuantConfig, name: &str, linear: &LinearSpec) -> Seen {
    let (k, n, bits) = (linear.in_features, linear.out_features, quant.bits as usize);
    let groups = quant.groups(k);
    let mut problems = Vec::new();
    let mut ints = |tensor: &str, shape: &[usize]| {
        let found = files.checkpoint.ints(&format!("{name}.{tensor}"), shape);
        found.map_err(|error| problems.push(error.to_string())).ok()
    };
    ints("qweight", &[k * bits / 32, n]);
    let zeros = ints("qzeros", &[groups, n * bits / 32]);
    let present = files.checkpoint.contains(&format!("{name}.g_idx"));
    let g_idx = if present { ints("g_idx", &[k]) } else { None };
    let size = quant.group_size.unwrap_or(k);
    problems.extend(g_idx.as_ref().and_then(|g_idx| group_problem(name, g_idx, size, groups)));
    problems.extend(scale_problem(files, name, &[groups, n]));
    let suggested = zeros.as_ref().and_then(|words| suggested_format(words, quant.bits, n));
    problems.extend(zeros.filter(|_| quant.sym).and_then(|_| zero_problem(name, quant, suggested)));
    let bias = files.checkpoint.contains(&format!("{name}.bias"));
    if bias || linear.bias {
        problems.extend(float_problem(files, &format!("{name}.bias"), &[n]));
    }
    let g_idx = match g_idx {
        None => GroupIndex::Absent,
        Some(g_idx) if g_idx.iter().enumerate().all(|(i, g)| *g == (i / size) as i32) => {
            GroupIndex::Contiguous
        }
        Some(_) => GroupIndex::ActOrder,
    };
    Seen { problems, g_idx, zeros: suggested, bias }
}

/// Every group is there, and holds as many features as a group has; only the last may be short.
fn group_problem(name: &str, g_idx: &[i32], size: usize, groups: usize) -> Option<String> {
    let mut members = vec![0; groups];
    for (place, group) in g_idx.iter().enumerate() {
        match usize::try_from(*group).ok().and_then(|group| members.get_mut(group)) {
            Some(count) => *count += 1,
            None => {
                let last = groups - 1;
                return Some(format!("{name}.g_idx: expected groups 0 to {last}, got {group} at {place}"));
            }
        }
    }
    let expected = |group: usize| size.min(g_idx.len() - group * size);
    let (group, count) = members.iter().enumerate().find(|(group, count)| **count != expected(*group))?;
    Some(format!("{name}.g_idx: expected {} features in group {group}, got {count}", expected(group)))
}

fn scale_problem(files: &ModelFiles, name: &str, shape: &[usize]) -> Option<String> {
    let scales = match files.checkpoint.tensor(&format!("{name}.scales"), shape) {
        Ok(scales) => scales.to_f32(),
        Err(error) => return Some(error.to_string()),
    };
    let place = scales.iter().position(|scale| !(scale.is_finite() && *scale >= 0.0))?;
    let got = scales[place];
    Some(format!("{name}.scales: expected finite scales of at least 0, got {got} at {place}"))
}

/// Symmetric grids have the middle code as zero point, stored as the declared format has it.
fn zero_problem(name: &str, quant: &QuantConfig, suggested: Option<CheckpointFormat>) -> Option<String> {
    let declared = quant.format.name();
    match suggested {
        Some(format) if format == quant.format => None,
        Some(format) => Some(format!(
            "{name}.qzeros: expected zero points as in {declared}, got those of {}",
            format.name()
        )),
        None => Some(format!("{name}.qzeros: expected the middle code throughout (symmetric), got others")),
    }
}

/// The format under which every zero point is the middle code, `2^(bits - 1)`.
fn suggested_format(words: &[i32], bits: u32, out_features: usize) -> Option<CheckpointFormat> {
    let middle = vec![2u8.pow(bits - 1); out_features];
    [CheckpointFormat::Gptq, CheckpointFormat::GptqV2].into_iter().find(|format| {
        let row = pack_zeros(&middle, out_features, bits, format.zero_offset());
        row.is_ok_and(|row| {
            words.iter().zip(row.iter().cycle()).all(|(word, expected)| *word as u32 == *expected)
        })
    })
}

fn summarise(quant: &QuantConfig, seen: &[Seen]) -> Quantization {
    let kinds = [GroupIndex::ActOrder, GroupIndex::Contiguous, GroupIndex::Absent];
    let g_idx =
        kinds.into_iter().find(|kind| seen.iter().any(|s| s.g_idx == *kind)).unwrap_or(GroupIndex::Absent);
    let suggested = seen.iter().map(|s| s.zeros).reduce(|a, b| a.filter(|_| a == b)).flatten();
    Quantization {
        bits: quant.bits,
        group_size: quant.group_size_number(),
        act_order: quant.act_order,
        sym: quant.sym,
        static_groups: quant.static_groups,
        damp_percent: quant.damp_percent,
        declared_format: quant.format.name().into(),
        zeros_suggest: suggested.filter(|_| quant.sym).map(CheckpointFormat::name),
        g_idx,
        bias_tensors: seen.iter().any(|s| s.bias),
    }
}

/// Floating-point tensors that are missing, of another shape, or not finite.
fn float_problems(files: &ModelFiles) -> Vec<String> {
    let quantized = files.quant.is_some();
    let specs = layout::checkpoint_tensors(&files.config);
    let kept = specs.par_iter().filter(|spec| !quantized || !is_linear(&spec.name));
    kept.filter_map(|spec| float_problem(files, &spec.name, &spec.shape)).collect()
}

fn float_problem(files: &ModelFiles, name: &str, shape: &[usize]) -> Option<String> {
    let tensor = files.checkpoint.tensor(name, shape);
    tensor.and_then(|tensor| files.checkpoint.check_finite(&tensor, name)).err().map(|e| e.to_string())
}

fn is_linear(name: &str) -> bool {
    name.contains("_proj.")
}

#[cfg(test)]
mod tests {
    use gptq_runtime::config::ModelConfig;
    use gptq_runtime::layout::{StoredDtype, TensorSpec};

    use super::*;
    use crate::artifact::{ArtifactLayout, ArtifactWriter, Fingerprint, OutMode, metadata};

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
        let (writer, _) = ArtifactWriter::begin(&out, files, &Fingerprint::new(), OutMode::New).unwrap();
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
            assert_eq!(quantization.zeros_suggest, Some("gptq"), "{bits} bits");
            assert_eq!(quantization.g_idx, GroupIndex::Contiguous);
        }
    }

    #[test]
    fn zero_points_of_the_other_format_are_a_problem() {
        for bits in [3, 4] {
            let report = report(bits, CheckpointFormat::GptqV2, &|_, _| {});
            assert!(!report.sound && report.problems[0].contains("gptq_v2"), "{:?}", report.problems);
            assert_eq!(report.quantization.unwrap().zeros_suggest, Some("gptq_v2"));
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
            assert!(
                report.problems.len() == 1 && report.problems[0].contains(&name),
                "{name}: {:?}",
                report.problems
            );
        }
    }
}
