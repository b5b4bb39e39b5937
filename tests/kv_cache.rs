//! `--kv-cache-dtype` on the command line.

use std::process::Command;

use crate::program::{artifact, demo, demo_text, gptq, run, words};

fn eval(options: &str) -> Command {
    let mut command = gptq("eval");
    command.arg(artifact("")).args(["--dataset", &demo_text("test")]);
    command.args(words("--join raw --ctx 256 --max-windows 4")).args(words(options));
    command
}

#[test]
fn eval_states_what_an_int8_cache_costs_and_that_it_was_one() {
    let (exact, int8) = (artifact(""), "--kv-cache-dtype int8");
    let mut command = eval(int8);
    let measured = run(command.arg("--baseline").arg(&exact).arg("--json")).json();
    assert_eq!(measured["kv_cache_dtype"], "int8");
    let of = |name: &str| measured[name].as_f64().unwrap();
    // 8 bits of keys and values cost far less than 4 bits of weights, which are at 0.02 and more.
    assert!(of("kl_divergence") > 0.0 && of("kl_divergence") < 0.002, "{measured}");
    assert!(of("top1_agreement") > 0.98, "{measured}");
    assert!((of("perplexity") / of("baseline_perplexity") - 1.0).abs() < 0.002, "{measured}");
    let auto = run(&mut eval("--json")).json();
    assert_eq!(auto["kv_cache_dtype"], "auto");
    assert_eq!(auto["perplexity"], measured["baseline_perplexity"], "the baseline has no cache");
    assert!(run(&mut eval(int8)).ok().contains("int8 KV cache"));
    assert!(!run(&mut eval("")).ok().contains("KV cache"));
}

#[test]
fn texts_and_benchmarks_run_with_an_int8_cache() {
    let mut command = gptq("generate");
    command.arg(artifact("")).args(["--prompt", "The river", "--kv-cache-dtype", "int8", "--json"]);
    let text = run(command.args(words("--max-new-tokens 40 --temperature 0 --device cpu"))).json();
    assert_eq!(text["generated_tokens"], 40);
    for options in ["decode --context 8 --tokens 4 --batch 2", "prefill --tokens 32"] {
        let mut command = gptq("bench");
        command
            .args(words(options))
            .arg(artifact(""))
            .args(words("--device cpu --json --kv-cache-dtype int8"));
        let figures = run(&mut command).json();
        let named =
            |what: &serde_json::Value| what.as_str().is_some_and(|what| what.contains("int8 KV cache"));
        assert!(figures.as_array().unwrap().iter().any(|figure| named(&figure["what"])), "{figures}");
    }
}

#[test]
fn other_types_and_a_cache_that_is_elsewhere_are_refused() {
    let mut command = gptq("generate");
    command.arg(demo()).args(["--prompt", "a", "--kv-cache-dtype", "fp8"]);
    let line = run(&mut command).refusal();
    assert!(line.contains("fp8") && line.contains("--kv-cache-dtype"), "{line}");
    let line = run(gptq("bench").args(words("serve --kv-cache-dtype int8"))).refusal();
    assert!(line.contains("required"), "{line}");
}
