//! The provided-files table: predicted from a config alone, or read off finished artifacts.

use std::fs;
use std::path::Path;

use gptq_runtime::checkpoint::Checkpoint;
use gptq_runtime::config::ModelConfig;
use gptq_runtime::layout::{self, TensorSpec};
use gptq_runtime::quant_config::QuantConfig;
use serde::Serialize;

use crate::artifact::{ArtifactLayout, metadata};
use crate::engines::{self, Facts, Verdict};
use crate::plan::Plan;
use crate::recipe::Preset;
use crate::record::{EvaluationRecord, QuantizeLog};
use crate::{Error, Result};

/// One branch. Numbers are exact; the texts of the table are made from them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub branch: String,
    pub bits: u32,
    /// -1 for one group a row.
    pub group_size: i64,
    pub act_order: bool,
    pub damp_percent: f64,
    pub dataset: String,
    /// `None` where nothing was calibrated, or no log says it.
    pub seq_len: Option<usize>,
    /// Bytes of all weight files, headers included.
    pub size_bytes: u64,
    /// Bytes of the tensors alone.
    pub tensor_bytes: u64,
    pub tensors: usize,
    pub elements: u64,
    /// Whether ExLlama's kernels read it.
    pub exllama: bool,
    /// What each known program makes of it.
    pub engines: Vec<Verdict>,
    pub desc: String,
    pub perplexity: Option<f64>,
    pub baseline_perplexity: Option<f64>,
    pub kl_divergence: Option<f64>,
    pub top1_agreement: Option<f64>,
    /// Seconds that quantizing took.
    pub seconds: Option<f64>,
}

/// What each branch of the plan will weigh, to the byte, with AutoGPTQ's bias tensors and header.
pub fn predict(config: &ModelConfig, plan: &Plan, dataset: &str, seq_len: usize) -> Result<Vec<Row>> {
    let row = |branch: &crate::plan::Branch| {
        let quant = branch.quant_config();
        layout::check_quantizable(config, &quant)?;
        let specs = layout::artifact_tensors(config, &quant, true);
        let totals = Totals::of(&specs);
        let size = ArtifactLayout::new(specs, &metadata(&quant), None).length();
        let facts = Facts::of_settings(config, &quant);
        Ok(Row::new(&branch.name, &quant, &facts, dataset.into(), Some(seq_len), size, totals))
    };
    plan.branches.iter().map(row).collect()
}

/// The table of the artifacts in a folder: each is a folder with a quantization config. Branches of the card
/// come in the card's order, then the portable ones, others after them by name.
pub fn measure(dir: &Path) -> Result<Vec<Row>> {
    let entries = fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut rows = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io(dir))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden
            && path.join("config.json").is_file()
            && let Some(quant) = QuantConfig::read(&path)?
        {
            let name = path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
            rows.push(measure_one(&path, &name, &quant)?);
        }
    }
    if rows.is_empty() {
        return Err(Error::Output {
            path: dir.into(),
            problem: "expected folders of artifacts, got none".into(),
        });
    }
    let plans = [Plan::card(Preset::default()), Plan::portable(Preset::default())];
    let known: Vec<_> = plans.iter().flat_map(|plan| &plan.branches).map(|branch| &branch.name).collect();
    let place = |row: &Row| known.iter().position(|name| **name == row.branch).unwrap_or(known.len());
    rows.sort_by_key(|row| (place(row), row.branch.clone()));
    Ok(rows)
}

/// The artifact in a folder, under a branch's name. None where it is not quantized.
pub(crate) fn measure_as(dir: &Path, branch: &str) -> Result<Option<Row>> {
    QuantConfig::read(dir)?.map(|quant| measure_one(dir, branch, &quant)).transpose()
}

fn measure_one(dir: &Path, branch: &str, quant: &QuantConfig) -> Result<Row> {
    let checkpoint = Checkpoint::open(dir)?;
    let entries: Vec<_> = checkpoint.names().filter_map(|name| checkpoint.spec(name)).collect();
    let totals = Totals {
        bytes: entries.iter().map(|entry| entry.bytes()).sum(),
        elements: entries.iter().map(|entry| entry.shape.iter().map(|d| *d as u64).product::<u64>()).sum(),
        count: entries.len(),
    };
    let size = checkpoint.file_sizes().iter().map(|(_, bytes)| bytes).sum();
    let log = QuantizeLog::read(dir)?;
    let calibration = log.as_ref().and_then(|log| log.calibration.as_ref());
    let dataset = calibration.map_or("unknown".into(), |c| c.dataset.clone());
    let config = ModelConfig::from_file(&dir.join("config.json"))?;
    let facts = Facts::of_files(&config, quant, permuted(&checkpoint, &config, quant));
    // A file whose groups lie in its own order says `desc_act: false`; the log knows in which order it was solved.
    let solved =
        QuantConfig { act_order: log.as_ref().map_or(quant.act_order, |log| log.act_order), ..quant.clone() };
    let row = Row::new(branch, &solved, &facts, dataset, calibration.map(|c| c.seq_len), size, totals);
    let evaluation = log.as_ref().and_then(|log| log.evaluation.as_ref());
    let measured = |value: fn(&EvaluationRecord) -> Option<f64>| evaluation.and_then(value);
    Ok(Row {
        perplexity: measured(|e| Some(e.perplexity)),
        baseline_perplexity: measured(|e| e.baseline_perplexity),
        kl_divergence: measured(|e| e.kl_divergence),
        top1_agreement: measured(|e| e.top1_agreement),
        seconds: log.as_ref().map(|log| log.seconds),
        ..row
    })
}

/// Whether some linear's features of one group lie apart.
fn permuted(checkpoint: &Checkpoint, config: &ModelConfig, quant: &QuantConfig) -> bool {
    let apart = |(layer, linear): (usize, layout::LinearSpec)| {
        let name = format!("{}{}.g_idx", layout::layer_prefix(layer), linear.module);
        let size = quant.group_size.unwrap_or(linear.in_features);
        let g_idx = checkpoint.ints(&name, &[linear.in_features]);
        g_idx.is_ok_and(|g_idx| g_idx.iter().enumerate().any(|(i, group)| *group != (i / size) as i32))
    };
    layout::linears(config).into_iter().any(apart)
}

struct Totals {
    bytes: u64,
    elements: u64,
    count: usize,
}

impl Totals {
    fn of(specs: &[TensorSpec]) -> Self {
        Self {
            bytes: specs.iter().map(TensorSpec::bytes).sum(),
            elements: specs.iter().map(TensorSpec::elements).sum(),
            count: specs.len(),
        }
    }
}

impl Row {
    fn new(
        branch: &str,
        quant: &QuantConfig,
        facts: &Facts,
        dataset: String,
        seq_len: Option<usize>,
        size_bytes: u64,
        totals: Totals,
    ) -> Self {
        Self {
            branch: branch.into(),
            bits: quant.bits,
            group_size: quant.group_size_number(),
            act_order: quant.act_order,
            damp_percent: quant.damp_percent,
            dataset,
            seq_len,
            size_bytes,
            tensor_bytes: totals.bytes,
            tensors: totals.count,
            elements: totals.elements,
            exllama: engines::exllama(facts),
            engines: engines::verdicts(facts),
            desc: describe(quant),
            perplexity: None,
            baseline_perplexity: None,
            kl_divergence: None,
            top1_agreement: None,
            seconds: None,
        }
    }

    fn cells(&self) -> Vec<String> {
        let yes = |flag| if flag { "Yes" } else { "No" }.to_string();
        let group = if self.group_size < 0 { "None".into() } else { self.group_size.to_string() };
        vec![
            self.branch.clone(),
            self.bits.to_string(),
            group,
            yes(self.act_order),
            self.damp_percent.to_string(),
            self.dataset.clone(),
            self.seq_len.map_or("-".into(), |len| len.to_string()),
            human_size(self.size_bytes),
            yes(self.exllama),
        ]
    }

    fn measured_cells(&self) -> Vec<String> {
        let show = |value: Option<f64>, digits: usize| value.map_or("-".into(), |x| format!("{x:.digits$}"));
        let percent = self.top1_agreement.map(|share| 100.0 * share);
        vec![show(self.perplexity, 3), show(self.kl_divergence, 5), show(percent, 1), show(self.seconds, 1)]
    }
}

const HEADINGS: [&str; 9] =
    ["Branch", "Bits", "GS", "Act Order", "Damp %", "GPTQ Dataset", "Seq Len", "Size", "ExLlama"];
const MEASURED_HEADINGS: [&str; 4] = ["Perplexity", "KL div", "Top-1 %", "Seconds"];

/// A table for a model card; columns of measurements only where something was measured.
pub fn to_markdown(rows: &[Row]) -> String {
    let escaped = |cells: &[String]| cells.iter().map(|cell| cell.replace('|', "\\|")).collect::<Vec<_>>();
    let line = |cells: &[String]| format!("| {} |\n", escaped(cells).join(" | "));
    let grid = grid(rows, true);
    let rule: Vec<String> = grid.iter().take(1).flatten().map(|_| "---".into()).collect();
    let mut lines: Vec<_> = grid.iter().map(|cells| line(cells)).collect();
    lines.insert(1, line(&rule));
    lines.concat() + "\n" + &loads_in(rows)
}

/// A row a program, a column a branch; with the reason of every no.
fn loads_in(rows: &[Row]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let Some(first) = rows.first() else { return String::new() };
    let branches = rows.iter().map(|row| row.branch.replace('|', "\\|"));
    let mut text = line([String::from("Loads in")].into_iter().chain(branches).collect());
    text += &line(vec!["---".into(); rows.len() + 1]);
    for (i, engine) in first.engines.iter().map(|verdict| verdict.engine).enumerate() {
        let cell = |row: &Row| match &row.engines[i] {
            Verdict { loads: true, .. } => "Yes".into(),
            Verdict { reason, .. } => format!("No: {}", reason.as_deref().unwrap_or_default()),
        };
        text += &line([String::from(engine)].into_iter().chain(rows.iter().map(cell)).collect());
    }
    text
}

/// An aligned table without the descriptions.
pub fn to_terminal(rows: &[Row]) -> String {
    let grid = grid(rows, false);
    let columns = grid.first().map_or(0, Vec::len);
    let width = |c: usize| grid.iter().map(|cells| cells[c].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    let line = |cells: &Vec<String>| {
        let padded: Vec<_> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    grid.iter().map(line).collect()
}

pub(crate) fn grid(rows: &[Row], with_desc: bool) -> Vec<Vec<String>> {
    let measured = rows.iter().any(|row| row.perplexity.is_some() || row.seconds.is_some());
    let mut headings: Vec<String> = HEADINGS.map(String::from).to_vec();
    headings.extend(MEASURED_HEADINGS.map(String::from).into_iter().filter(|_| measured));
    headings.extend(with_desc.then(|| "Desc".into()));
    let cells = rows.iter().map(|row| {
        let mut cells = row.cells();
        cells.extend(row.measured_cells().into_iter().filter(|_| measured));
        cells.extend(with_desc.then(|| row.desc.clone()));
        cells
    });
    [headings].into_iter().chain(cells).collect()
}

/// Decimal units, two digits, as the hub shows sizes.
pub fn human_size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.2} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// One sentence on what the parameters mean for choosing a branch.
fn describe(quant: &QuantConfig) -> String {
    let size = match (quant.bits, quant.group_size) {
        (8, None) => {
            "8 bits with one scale per output row: close to fp16, smallest of the 8-bit files.".into()
        }
        (8, Some(size)) => {
            format!("8 bits, a scale for every {size} inputs: nearly indistinguishable from fp16.")
        }
        (bits, None) => format!("{bits} bits with one scale per output row: the smallest file of its width."),
        (bits, Some(size @ ..=32)) => format!(
            "{bits} bits, a scale for every {size} inputs: the most accurate of its width, and the largest."
        ),
        (bits, Some(size @ ..=64)) => format!(
            "{bits} bits, a scale for every {size} inputs: between the finer and the coarser groups in size and accuracy."
        ),
        (bits, Some(size)) => {
            format!("{bits} bits, a scale for every {size} inputs: small and accurate, the usual choice.")
        }
    };
    match quant.act_order {
        true => size,
        false => format!("{size} Without act-order, for readers that need it so."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_sizes_are_reproduced() {
        let config = ModelConfig::preset("causallm-7b").unwrap();
        let rows = predict(&config, &Plan::card(Preset::default()), "wikitext", 8192).unwrap();
        let sizes: Vec<_> = rows.iter().map(|row| human_size(row.size_bytes)).collect();
        assert_eq!(sizes, ["5.86 GB", "6.24 GB", "8.98 GB", "9.13 GB", "9.58 GB", "5.99 GB"]);
        assert_eq!((rows[0].elements, rows[0].tensors), (2_113_843_200, 1187));
        let exllama: Vec<_> = rows.iter().map(|row| row.exllama).collect();
        assert_eq!(exllama, [true, true, false, false, false, true]);
    }

    #[test]
    fn markdown_has_the_card_s_columns_and_a_row_a_branch() {
        let config = ModelConfig::preset("causallm-7b").unwrap();
        let text = to_markdown(&predict(&config, &Plan::card(Preset::default()), "wikitext", 8192).unwrap());
        let lines: Vec<_> = text.lines().collect();
        let loads = lines.iter().position(|line| line.is_empty()).unwrap();
        assert_eq!(loads, 8);
        assert!(lines[9].starts_with("| Loads in | main | gptq-4bit-32g-actorder_True |"));
        assert!(lines[11].starts_with("| vLLM 0.33 | No: refuses desc_act with groups | "), "{}", lines[11]);
        assert_eq!(lines.iter().skip(loads + 3).count(), 9);
        assert_eq!(
            lines[0],
            "| Branch | Bits | GS | Act Order | Damp % | GPTQ Dataset | Seq Len | Size | ExLlama | Desc |"
        );
        assert!(lines[2].starts_with("| main | 4 | 128 | Yes | 0.1 | wikitext | 8192 | 5.86 GB | Yes | "));
        assert!(lines[4].contains("| 8 | None |"));
    }

    #[test]
    fn a_bar_in_a_dataset_s_name_does_not_add_a_column() {
        let config = ModelConfig::preset("causallm-7b").unwrap();
        let text = to_markdown(&predict(&config, &Plan::card(Preset::default()), "a|b", 8192).unwrap());
        assert!(text.contains("| a\\|b |"), "{text}");
    }
}
