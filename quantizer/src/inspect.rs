//! What a model folder holds, and whether it is sound: every tensor is read, nothing is computed with.

use std::path::Path;

use gptq_runtime::layout::{self, LinearSpec};
use gptq_runtime::model::ModelFiles;
use gptq_runtime::quant_config::QuantConfig;
use rayon::prelude::*;
use serde::Serialize;

use crate::Result;
use crate::table::human_size;

/// The findings.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub architecture: String,
    pub layers: usize,
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub context: usize,
    pub quantization: Option<Quantization>,
    /// File names with their bytes.
    pub files: Vec<(String, u64)>,
    pub tensors: usize,
    pub elements: u64,
    pub sound: bool,
    /// One line each: where, expected, got.
    pub problems: Vec<String>,
}

/// Parameters as declared, and what the tensors show.
#[derive(Clone, Debug, Serialize)]
pub struct Quantization {
    pub bits: u32,
    pub group_size: i64,
    pub act_order: bool,
    pub sym: bool,
    pub static_groups: bool,
    pub damp_percent: f64,
    pub declared_format: String,
    /// What the zero points of a symmetric artifact tell; `None` where they tell nothing.
    pub zeros_suggest: Option<&'static str>,
    pub g_idx: GroupIndex,
    pub bias_tensors: bool,
}

/// How input features are assigned to groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupIndex {
    /// No tensor: feature i is in group i / group_size.
    Absent,
    /// The tensor says the same.
    Contiguous,
    /// Features of one group lie apart: readers must follow the tensor.
    ActOrder,
}

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
    let mut quantization = None;
    if let Some(quant) = &files.quant {
        let seen: Vec<Seen> =
            linears.par_iter().map(|(name, linear)| examine(&files, quant, name, linear)).collect();
        problems.extend(seen.iter().flat_map(|seen| seen.problems.clone()));
        quantization = Some(summarise(&files, quant, &seen));
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
    zero_words: Option<u32>,
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
    if let Some(g_idx) = &g_idx
        && let Some(place) = g_idx.iter().position(|g| !(0..groups as i32).contains(g))
    {
        problems.push(format!(
            "{name}.g_idx: expected groups 0 to {}, got {} at {place}",
            groups - 1,
            g_idx[place]
        ));
    }
    match files.checkpoint.tensor(&format!("{name}.scales"), &[groups, n]) {
        Err(error) => problems.push(error.to_string()),
        Ok(scales) => {
            if let Some(place) = scales.to_f32().iter().position(|s| !(s.is_finite() && *s >= 0.0)) {
                problems.push(format!(
                    "{name}.scales: expected finite scales of at least 0, got another at {place}"
                ));
            }
        }
    }
    let uniform = |words: Vec<i32>| words.iter().all(|word| *word == words[0]).then(|| words[0] as u32);
    let zero_words = zeros.filter(|words| !words.is_empty()).and_then(uniform);
    if quant.sym && zero_words.is_none() {
        problems
            .push(format!("{name}.qzeros: expected one zero point, as symmetric grids have, got several"));
    }
    let size = quant.group_size.unwrap_or(k);
    let g_idx = match g_idx {
        None => GroupIndex::Absent,
        Some(g_idx) if g_idx.iter().enumerate().all(|(i, g)| *g == (i / size) as i32) => {
            GroupIndex::Contiguous
        }
        Some(_) => GroupIndex::ActOrder,
    };
    Seen { problems, g_idx, zero_words, bias: files.checkpoint.contains(&format!("{name}.bias")) }
}

fn summarise(files: &ModelFiles, quant: &QuantConfig, seen: &[Seen]) -> Quantization {
    let kinds = [GroupIndex::ActOrder, GroupIndex::Contiguous, GroupIndex::Absent];
    let g_idx =
        kinds.into_iter().find(|kind| seen.iter().any(|s| s.g_idx == *kind)).unwrap_or(GroupIndex::Absent);
    let suggested =
        seen.iter().map(|s| suggested_format(quant.bits, s.zero_words)).reduce(|a, b| a.filter(|_| a == b));
    Quantization {
        bits: quant.bits,
        group_size: quant.group_size_number(),
        act_order: quant.act_order,
        sym: quant.sym,
        static_groups: quant.static_groups,
        damp_percent: quant.damp_percent,
        declared_format: quant.format.name().into(),
        zeros_suggest: suggested.flatten().filter(|_| quant.sym),
        g_idx,
        bias_tensors: !files.config.qkv_bias && seen.iter().any(|s| s.bias),
    }
}

/// A symmetric zero is the middle code, stored as it is (v2) or less one (v1): each code of the word is that.
fn suggested_format(bits: u32, word: Option<u32>) -> Option<&'static str> {
    match (bits, word?) {
        (2, 0x5555_5555) | (4, 0x7777_7777) | (8, 0x7F7F_7F7F) => Some("gptq"),
        (2, 0xAAAA_AAAA) | (4, 0x8888_8888) | (8, 0x8080_8080) => Some("gptq_v2"),
        _ => None,
    }
}

/// Floating-point tensors that are missing, of another shape, or not finite.
fn float_problems(files: &ModelFiles) -> Vec<String> {
    let quantized = files.quant.is_some();
    let specs = layout::checkpoint_tensors(&files.config);
    let kept = specs.par_iter().filter(|spec| !quantized || !is_linear(&spec.name));
    let problem = |spec: &layout::TensorSpec| {
        let tensor = files.checkpoint.tensor(&spec.name, &spec.shape);
        tensor
            .and_then(|tensor| files.checkpoint.check_finite(&tensor, &spec.name))
            .err()
            .map(|e| e.to_string())
    };
    kept.filter_map(problem).collect()
}

fn is_linear(name: &str) -> bool {
    name.contains("_proj.")
}

impl Report {
    pub fn is_sound(&self) -> bool {
        self.sound
    }

    /// For people.
    pub fn to_terminal(&self) -> String {
        let mut text = format!(
            "architecture  {}, {} layers, hidden size {}, vocabulary {}, context {}\n",
            self.architecture, self.layers, self.hidden_size, self.vocab_size, self.context
        );
        match &self.quantization {
            None => text += "weights       floating point, not quantized\n",
            Some(q) => text += &q.lines(),
        }
        for (name, bytes) in &self.files {
            text += &format!("file          {name}, {bytes} bytes ({})\n", human_size(*bytes));
        }
        text += &format!("tensors       {}, {} elements\n", self.tensors, self.elements);
        for problem in &self.problems {
            text += &format!("problem       {problem}\n");
        }
        text + if self.sound { "verdict       sound\n" } else { "verdict       NOT sound\n" }
    }
}

impl Quantization {
    fn lines(&self) -> String {
        let group = if self.group_size < 0 {
            "one group a row".into()
        } else {
            format!("groups of {}", self.group_size)
        };
        let kind = if self.sym { "symmetric" } else { "asymmetric" };
        let order = if self.act_order { "act-order" } else { "no act-order" };
        let g_idx = match self.g_idx {
            GroupIndex::Absent => "absent, groups are contiguous",
            GroupIndex::Contiguous => "contiguous groups",
            GroupIndex::ActOrder => "act-order, readers must follow it",
        };
        let suggests =
            self.zeros_suggest.map_or(String::new(), |format| format!(", zero points look like {format}"));
        let bias = if self.bias_tensors { "yes" } else { "no" };
        format!(
            "weights       {} bits, {group}, {kind}, {order}, damp {}\nformat        {}{suggests}\n\
             g_idx         {g_idx}\nbias tensors  {bias}\n",
            self.bits, self.damp_percent, self.declared_format
        )
    }
}
