//! Branches for tests.

use gptq_runtime::quant_config::CheckpointFormat;

use super::Published;
use crate::engines::{Facts, exllama, verdicts};
use crate::record::QuantizeLog;
use crate::table::Row;

/// Three act-order branches of a 7B model, with this log.
pub(crate) fn branches(log: &QuantizeLog) -> Vec<Published> {
    let sizes = [
        ("main", 4, 128, 5_861_746_152),
        ("gptq-4bit-32g-actorder_True", 4, 32, 6_241_200_048),
        ("gptq-8bit-128g-actorder_True", 8, 128, 9_125_046_312),
    ];
    let published = |(name, bits, group_size, bytes)| Published {
        row: row(name, bits, group_size, bytes),
        log: Some(log.clone()),
    };
    sizes.map(published).into()
}

fn row(branch: &str, bits: u32, group_size: usize, size_bytes: u64) -> Row {
    let facts = Facts {
        bits,
        group_size: Some(group_size),
        sym: true,
        desc_act: true,
        permuted: true,
        format: CheckpointFormat::Gptq,
        mlp_bias: false,
        overrides: false,
        split_overrides: false,
    };
    Row {
        branch: branch.into(),
        bits,
        group_size: group_size as i64,
        act_order: true,
        damp_percent: 0.1,
        dataset: "wikitext2:test".into(),
        seq_len: Some(8192),
        size_bytes,
        tensor_bytes: size_bytes,
        tensors: 1187,
        elements: 2_113_843_200,
        exllama: exllama(&facts),
        engines: verdicts(&facts),
        desc: String::new(),
        perplexity: None,
        baseline_perplexity: None,
        kl_divergence: None,
        top1_agreement: None,
        seconds: None,
    }
}
