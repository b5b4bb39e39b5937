//! The table against the facts that are known of each program.

use super::*;
use crate::plan::Plan;
use crate::recipe::Preset;

fn config() -> ModelConfig {
    ModelConfig::preset("causallm-7b").unwrap()
}

fn refusing(facts: &Facts) -> Vec<&'static str> {
    verdicts(facts).iter().filter(|verdict| !verdict.loads).map(|verdict| verdict.engine).collect()
}

fn plain() -> Facts {
    Facts::of_settings(&config(), &QuantConfig::default())
}

/// Every combination of settings that can be written.
fn all() -> Vec<QuantConfig> {
    let mut all = Vec::new();
    for bits in [2, 3, 4, 8] {
        for group_size in [None, Some(32), Some(128)] {
            for flags in 0..16 {
                let flag = |place: u32| flags >> place & 1 == 1;
                let format = if flag(3) { CheckpointFormat::GptqV2 } else { CheckpointFormat::Gptq };
                let (act_order, static_groups, sym) = (flag(0), flag(1), flag(2));
                let quant = QuantConfig {
                    bits,
                    group_size,
                    act_order,
                    static_groups,
                    sym,
                    format,
                    ..Default::default()
                };
                all.push(quant);
            }
        }
    }
    all
}

#[test]
fn each_branch_of_the_card_is_loaded_by_those_that_can() {
    let expected: [(&str, &[&str]); 6] = [
        ("main", &["vLLM 0.33", "lmdeploy"]),
        ("gptq-4bit-32g-actorder_True", &["vLLM 0.33", "lmdeploy"]),
        // One group a row has no order to permute; 8 bits are beyond two of them.
        ("gptq-8bit--1g-actorder_True", &["ExLlama", "lmdeploy"]),
        ("gptq-8bit-128g-actorder_True", &["vLLM 0.33", "ExLlama", "lmdeploy"]),
        ("gptq-8bit-32g-actorder_True", &["vLLM 0.33", "ExLlama", "lmdeploy"]),
        ("gptq-4bit-64g-actorder_True", &["vLLM 0.33", "lmdeploy"]),
    ];
    for (branch, (name, engines)) in Plan::card(Preset::default()).branches.iter().zip(expected) {
        assert_eq!(branch.name, name);
        assert_eq!(refusing(&Facts::of_settings(&config(), &branch.quant_config())), engines, "{name}");
    }
}

#[test]
fn every_program_loads_every_portable_branch() {
    for branch in Plan::portable(Preset::default()).branches {
        assert_eq!(
            refusing(&Facts::of_settings(&config(), &branch.quant_config())),
            [""; 0],
            "{}",
            branch.name
        );
    }
}

#[test]
fn four_bits_symmetric_with_groups_in_file_order_load_in_every_program() {
    for (act_order, static_groups) in [(true, true), (false, false), (false, true)] {
        let quant = QuantConfig { act_order, static_groups, ..QuantConfig::default() };
        assert_eq!(refusing(&Facts::of_settings(&config(), &quant)), [""; 0]);
    }
}

#[test]
fn desc_act_is_written_where_g_idx_is_permuted_and_nowhere_else() {
    for quant in all() {
        let permuted = quant.act_order && !quant.static_groups && quant.group_size.is_some();
        assert_eq!(as_written(&config(), &quant).act_order, permuted, "{quant:?}");
    }
    let wide = QuantConfig { act_order: true, group_size: Some(11008), ..QuantConfig::default() };
    assert!(!needs_desc_act(&config(), &wide), "every linear is one group");
}

#[test]
fn each_restriction_makes_its_programs_refuse() {
    let with = |change: fn(&mut Facts)| {
        let mut facts = plain();
        change(&mut facts);
        refusing(&facts)
    };
    assert_eq!(with(|f| f.sym = false), ["vLLM 0.33", "lmdeploy"]);
    assert_eq!(with(|f| f.bits = 3), ["vLLM 0.33", "ExLlama", "llama.cpp converter", "lmdeploy"]);
    assert_eq!(with(|f| f.bits = 2), ["vLLM 0.33", "ExLlama", "lmdeploy"]);
    assert_eq!(with(|f| f.mlp_bias = true), ["SGLang 0.5.23"]);
    assert_eq!(with(|f| f.permuted = true).len(), ENGINES.len(), "misread by programs that trust desc_act");
    let together = with(|f| f.split_overrides = true);
    assert_eq!(together.len(), ENGINES.len() - 1, "all but the one that runs q, k and v apart");
    let v2 = with(|f| f.format = CheckpointFormat::GptqV2);
    assert!(v2.contains(&"ExLlama") && !v2.contains(&"vLLM 0.33"));
    let overrides = with(|f| f.overrides = true);
    assert!(!overrides.contains(&"vLLM 0.33") && !overrides.contains(&"transformers 5.24 + GPTQModel 7"));
}

#[test]
fn whatever_is_written_gptqmodel_reads_and_every_no_has_a_reason() {
    for quant in all() {
        let facts = Facts::of_settings(&config(), &quant);
        for verdict in verdicts(&facts) {
            let complete = ["vLLM to 0.27", "SGLang 0.5.23", "transformers 5.24 + GPTQModel 7"];
            assert!(verdict.loads || !complete.contains(&verdict.engine), "{quant:?}: {verdict:?}");
            assert!(verdict.loads || (verdict.reason.is_some() && verdict.remedy.is_some()), "{verdict:?}");
        }
        assert_eq!(exllama(&facts), quant.bits == 4 && quant.format == CheckpointFormat::Gptq);
    }
}

/// Following the advice, line by line, ends in a file that every program loads.
#[test]
fn every_remedy_removes_its_reason() {
    for quant in all() {
        let (mut quant, mut steps) = (quant, 0);
        loop {
            let verdicts = verdicts(&Facts::of_settings(&config(), &quant));
            let Some(refused) = verdicts.iter().find(|verdict| !verdict.loads) else { break };
            match refused.remedy.unwrap() {
                Remedy::FileGroups => (quant.act_order, quant.static_groups) = (false, false),
                Remedy::Symmetric => quant.sym = true,
                Remedy::FirstFormat => quant.format = CheckpointFormat::Gptq,
                Remedy::FourBits | Remedy::FourOrEightBits => quant.bits = 4,
            }
            steps += 1;
            assert!(steps <= 6, "{quant:?}: {verdicts:?}");
        }
    }
}

#[test]
fn engines_with_one_reason_share_a_line() {
    let quant = QuantConfig { act_order: true, ..QuantConfig::default() };
    let lines = advice(&Facts::of_settings(&config(), &quant), Place::Flags);
    assert_eq!(lines.len(), 1);
    assert!(
        lines[0].starts_with("not for vLLM 0.33, lmdeploy: refuses desc_act")
            && lines[0].contains("--order gar")
    );
    let plan = advice(&Facts::of_settings(&config(), &quant), Place::Plan);
    assert!(plan[0].contains("order = \"gar\""), "{plan:?}");
}
