//! Perplexity: GPTQ against rounding, and on real text against an independent implementation in f64 and
//! GPTQModel 7.7.0.

use std::path::Path;

use crate::program::{artifact, demo, gptq, perplexity, run, words, workplace};
use crate::support;

const CALIBRATION: &str =
    "--dataset wikitext2:validation --join raw --sampling consecutive --samples 64 --seq-len 1024";
const PROTOCOL: &str = "--dataset wikitext2:test --join raw --ctx 1024 --max-windows 64 --json";

#[test]
fn gptq_loses_less_than_rounding_to_nearest() {
    let calibration = "--bits 3 --samples 8 --seq-len 256";
    let fp16 = perplexity(&demo());
    let rtn = perplexity(&artifact("--bits 3 --method rtn"));
    let gptq = perplexity(&artifact(calibration));
    let in_order = perplexity(&artifact(&format!("{calibration} --order file")));
    println!(
        "perplexity: fp16 {fp16:.3}, 3-bit rtn {rtn:.3}, gptq {gptq:.3}, without act-order {in_order:.3}"
    );
    assert!(fp16.is_finite() && fp16 < gptq && gptq < rtn, "fp16 {fp16}, gptq {gptq}, rtn {rtn}");
    assert!(fp16 < in_order && in_order < rtn, "fp16 {fp16}, without act-order {in_order}, rtn {rtn}");
}

/// One test, since every step uses all cores.
#[test]
#[cfg_attr(not(has_shared), ignore = "needs the larger models and texts: GPTQ_SHARED is not set")]
fn perplexity_on_wikitext_agrees_with_independent_implementations() {
    let shared = support::shared("");
    let (model, data) = (shared.join("models/wiki20m"), shared.join("data"));
    let gptqmodel = shared.join("golden/gptqmodel-7.7.0-wiki20m-4bit-128g-actorder");
    let work = workplace("quality");
    let measured = |dir: &Path| {
        let result = run(gptq("eval").env("GPTQ_DATASETS", &data).arg(dir).args(words(PROTOCOL))).json();
        assert_eq!(result["tokens_scored"], 64 * 1023);
        result["perplexity"].as_f64().unwrap()
    };
    let quantized = |name: &str, options: &str| {
        let out = work.join(name);
        let mut command = gptq("quantize");
        command.env("GPTQ_DATASETS", &data).arg(&model).arg("--out").arg(&out);
        run(command.args(words(CALIBRATION)).args(words(options))).ok();
        measured(&out)
    };
    let near = |name: &str, got: f64, expected: f64, tolerance: f64| {
        println!("{name}: perplexity {got:.4}, expected {expected} within {tolerance}");
        assert!((got - expected).abs() <= tolerance, "{name}: {got}");
    };
    let below = |name: &str, got: f64, limit: f64| {
        println!("{name}: perplexity {got:.4}, expected at most {limit}");
        assert!(got <= limit, "{name}: {got}");
    };
    near("fp16", measured(&model), 28.38, 0.03);
    near("GPTQModel's artifact", measured(&gptqmodel), 29.38, 0.03);
    near("rounded to nearest", quantized("rtn", "--method rtn"), 30.74, 0.05);
    // The reference has 29.368 and 29.537; the rest is room for sums in another order: seeds differ by 0.05.
    below("act-order", quantized("act-order", "--preset card"), 29.40);
    // This has 28.939, a prototype of the recipe in f64, all of the way to its target, 28.900; seeds differ by 0.05.
    below("best", quantized("best", ""), 28.96);
    below("static groups", quantized("static", "--preset card --order static-groups"), 29.45);
    below("without act-order", quantized("in-order", "--preset card --order file"), 29.57);
}
