//! The artifact's README.md: what it is, how it was made, what it costs, how to use it.

use std::fs;
use std::path::Path;

use gptq_runtime::config::ModelConfig;

use crate::Result;
use crate::artifact::replace_files;
use crate::engines::{Facts, Verdict, verdicts};
use crate::record::{EvaluationRecord, LOG_FILE, QuantizeLog};

/// The card's file name.
pub const CARD_FILE: &str = "README.md";

/// Writes card and log anew, after a measurement. The log comes last: where it has a measurement, the card has it too.
pub fn update(dir: &Path, log: &QuantizeLog, config: &ModelConfig) -> Result<()> {
    let card = model_card(log, config).into_bytes();
    replace_files(dir, &[(CARD_FILE, card), (LOG_FILE, log.to_bytes())])
}

/// The card's text, with the front matter that the hub reads.
pub fn model_card(log: &QuantizeLog, config: &ModelConfig) -> String {
    let name = model_name(&log.model);
    let base = hub_id(&log.model).map_or(String::new(), |id| format!("base_model: {id}\n"));
    let mut text = format!(
        "---\n{base}library_name: transformers\npipeline_tag: text-generation\ntags:\n- gptq\n- {} bit\n---\n\n\
         # {name}, GPTQ, {}\n\n\
         Weights of {name} ({}, {} layers, hidden size {}) with {} bits a weight, made by {}.\n\n",
        log.bits,
        short(log),
        config.architecture.class_name(),
        config.num_hidden_layers,
        config.hidden_size,
        log.bits,
        log.made_by,
    );
    text += &parameters(log);
    text += &calibration(log);
    if let Some(evaluation) = &log.evaluation {
        text += &measurement(evaluation);
    }
    text += &loads_in(&Facts::of_settings(config, &log.quant_config()));
    text += "## Use\n\n```\ngptq generate . --prompt \"Once upon a time\"\ngptq eval . --dataset wikitext2:test\n```\n\n\
             transformers reads the folder with `AutoModelForCausalLM.from_pretrained(folder, device_map=\"auto\")` \
             once a GPTQ backend is installed.\n\n\
             Every linear's loss and damp are in `quantize_log.json`. The licence of the original model applies.\n";
    text
}

pub(crate) fn parameters(log: &QuantizeLog) -> String {
    let group =
        if log.group_size < 0 { "none, one per output row".into() } else { log.group_size.to_string() };
    let rows = [
        ("Method", log.method.to_uppercase()),
        ("Bits", log.bits.to_string()),
        ("Group size", group),
        ("Act order", yes(log.act_order)),
        ("Symmetric", yes(log.sym)),
        ("Order of columns", log.recipe.order.clone()),
        ("Grids", log.recipe.grid.clone()),
        ("Target", log.recipe.target.clone()),
        ("Rounds of refinement", log.recipe.rounds.to_string()),
        ("Damp percent", log.damp_percent.to_string()),
        ("Checkpoint format", log.checkpoint_format.clone()),
    ];
    let lines = rows.map(|(key, value)| format!("| {key} | {value} |\n")).concat();
    format!("| Parameter | Value |\n| --- | --- |\n{lines}\n")
}

pub(crate) fn calibration(log: &QuantizeLog) -> String {
    let raised = log.raised_damp().len();
    let damp = match raised {
        0 => String::new(),
        n => format!(" {n} linears needed more damp than asked for; the log names them."),
    };
    let experts = experts_line(log).map_or(String::new(), |line| format!(" {line}."));
    match &log.calibration {
        None => "Rounded to nearest, without calibration.\n\n".into(),
        Some(c) => format!(
            "Calibrated on {} sequences of {} tokens from {} (rows joined {}, {} windows, seed {}), in {:.0} s on \
             {}.{damp}{experts}\n\n",
            c.samples, c.seq_len, c.dataset, c.join, c.sampling, c.seed, log.seconds, log.device
        ),
    }
}

/// How many tokens experts were solved with; `None` without experts.
pub fn experts_line(log: &QuantizeLog) -> Option<String> {
    let mut tokens: Vec<usize> = log.experts().flat_map(|layer| layer.tokens.iter().copied()).collect();
    tokens.sort_unstable();
    let (least, most) = (tokens.first()?, tokens.last()?);
    let starved: usize = log.experts().map(|layer| layer.starved.len()).sum();
    let filled = match starved {
        0 => "all had as many as they have inputs".into(),
        n => format!("{n} had fewer than they have inputs, and other tokens filled up their Hessians"),
    };
    let (count, middle) = (tokens.len(), tokens[tokens.len() / 2]);
    Some(format!("Tokens an expert: {least} to {most}, median {middle}, of {count} experts; {filled}"))
}

fn measurement(e: &EvaluationRecord) -> String {
    let mut text = format!("## Measured\n\nPerplexity {:.4}", e.perplexity);
    if let Some(baseline) = e.baseline_perplexity {
        text += &format!(", of the original {baseline:.4}");
    }
    if let (Some(kl), Some(top1)) = (e.kl_divergence, e.top1_agreement) {
        text += &format!(
            ". KL divergence from the original {kl:.5} nats a token, the same first choice for {:.2} % of tokens",
            100.0 * top1
        );
    }
    text += &format!(
        ".\n\nProtocol: {}, rows joined {}, {} windows of {} tokens, {} tokens scored.\n\n",
        e.protocol.dataset, e.protocol.join, e.protocol.windows, e.protocol.ctx, e.tokens_scored
    );
    text
}

/// Which programs load the files.
fn loads_in(facts: &Facts) -> String {
    let line = |verdict: &Verdict| {
        let answer = yes(verdict.loads);
        let reason = verdict.reason.as_ref().map_or(String::new(), |reason| format!(", {reason}"));
        format!("| {} | {answer}{reason} |\n", verdict.engine)
    };
    let lines: String = verdicts(facts).iter().map(line).collect();
    format!("## Loads in\n\n| Program | |\n| --- | --- |\n{lines}\n")
}

fn short(log: &QuantizeLog) -> String {
    let group = if log.group_size < 0 { "no groups".into() } else { format!("groups of {}", log.group_size) };
    format!("{} bits, {group}", log.bits)
}

/// `owner/name`, without a branch, where the source was named so and is no folder.
fn hub_id(model: &str) -> Option<&str> {
    let id = model.split(':').next().unwrap_or(model);
    let plain = |part: &str| part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    let parts: Vec<_> = id.split('/').collect();
    let named = parts.len() == 2 && parts.iter().all(|part| plain(part) && !part.is_empty());
    (named && parts[0] != "." && parts[0] != ".." && fs::metadata(model).is_err()).then_some(id)
}

/// The last part of a folder or hub id, without a branch.
pub fn model_name(model: &str) -> &str {
    let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or(model);
    last.split(':').next().unwrap_or(last)
}

fn yes(flag: bool) -> String {
    if flag { "yes" } else { "no" }.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Preset;
    use crate::record::{CalibrationRecord, Protocol, RecipeRecord};

    #[test]
    fn a_card_names_parameters_calibration_and_the_protocol_of_its_figures() {
        let log = QuantizeLog {
            made_by: "gptq 0.1.0".into(),
            model: "someone/Model-7B:main".into(),
            device: "CPU".into(),
            method: "gptq".into(),
            bits: 4,
            group_size: -1,
            act_order: true,
            sym: true,
            static_groups: false,
            recipe: RecipeRecord::from(&Preset::Card.recipe()),
            damp_percent: 0.1,
            checkpoint_format: "gptq".into(),
            calibration: Some(CalibrationRecord {
                dataset: "wikitext2:train".into(),
                fingerprint: "0".into(),
                join: "raw".into(),
                sampling: "random".into(),
                samples: 128,
                seq_len: 8192,
                seed: 0,
            }),
            seconds: 1.0,
            evaluation: Some(EvaluationRecord {
                protocol: Protocol {
                    dataset: "wikitext2:test".into(),
                    join: "paper".into(),
                    ctx: 2048,
                    windows: 10,
                    ..Protocol::default()
                },
                tokens_scored: 20470,
                perplexity: 5.5,
                baseline_perplexity: Some(5.4),
                kl_divergence: Some(0.01),
                top1_agreement: Some(0.95),
            }),
            ..QuantizeLog::default()
        };
        let text = model_card(&log, &ModelConfig::preset("llama2-7b").unwrap());
        for part in [
            "base_model: someone/Model-7B\n",
            "# Model-7B, GPTQ, 4 bits, no groups",
            "| Damp percent | 0.1 |",
            "128 sequences of 8192 tokens from wikitext2:train",
            "5.5000",
            "10 windows of 2048 tokens",
            "95.00 %",
            "| vLLM 0.33 | yes |",
            "| ExLlama | yes |",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }
}
