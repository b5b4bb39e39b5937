//! The program as a user meets it: help, tables, text, and the verdicts that scripts rely on.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use gptq_calibration::dataset::{self, DatasetRoots, Join};
use serde_json::{Value, json};

use crate::model_folder::{ModelFolder, logits};
use crate::program::{alone, artifact, copy_folder, demo, demo_text, gptq, quantize, run, words, workplace};

const VERBS: [&str; 11] = [
    "demo",
    "quantize",
    "branches",
    "table",
    "eval",
    "generate",
    "serve",
    "inspect",
    "synth",
    "bench",
    "completions",
];

const CARD: [&str; 6] = [
    "main",
    "gptq-4bit-32g-actorder_True",
    "gptq-8bit--1g-actorder_True",
    "gptq-8bit-128g-actorder_True",
    "gptq-8bit-32g-actorder_True",
    "gptq-4bit-64g-actorder_True",
];

#[test]
fn every_verb_is_listed_and_explains_itself_with_an_example() {
    let version = run(&mut gptq("--version")).ok();
    assert!(version.starts_with(concat!("gptq ", env!("CARGO_PKG_VERSION"))), "{version}");
    let overview = run(&mut gptq("--help")).ok();
    for verb in VERBS {
        assert!(overview.lines().any(|line| line.trim_start().starts_with(verb)), "{verb}");
        let help = run(gptq(verb).arg("--help")).ok();
        assert!(help.contains(&format!("Usage: gptq {verb}")), "{help}");
        assert!(help.contains("Examples:") && help.contains(&format!("  gptq {verb}")), "{help}");
    }
    let script = run(gptq("completions").arg("bash")).ok();
    assert!(VERBS.iter().all(|verb| script.contains(&format!("gptq,{verb}"))), "{script}");
}

#[test]
fn the_table_of_the_published_model_is_exact() {
    let rows = run(gptq("table").args(words("causallm-7b --json"))).json();
    let column = |key: &str| rows.as_array().unwrap().iter().map(|row| row[key].clone()).collect::<Vec<_>>();
    let sizes: [u64; 6] =
        [5_861_746_152, 6_241_200_048, 8_977_344_096, 9_125_046_312, 9_580_390_896, 5_988_230_696];
    assert_eq!(column("branch"), CARD.map(|name| json!(name)));
    assert_eq!(column("size_bytes"), sizes.map(|size| json!(size)));
    assert_eq!((&rows[0]["tensors"], &rows[0]["elements"]), (&json!(1187), &json!(2_113_843_200u64)));
    let markdown = run(gptq("table").arg("causallm-7b")).ok();
    for (name, size) in CARD.iter().zip(["5.86", "6.24", "8.98", "9.13", "9.58", "5.99"]) {
        let row = markdown.lines().find(|line| line.starts_with(&format!("| {name} |"))).unwrap();
        assert!(row.contains(&format!("| {size} GB |")), "{row}");
    }
}

#[test]
fn every_program_loads_what_the_portable_plan_makes() {
    let rows = run(gptq("table").args(words("causallm-7b --plan portable --json"))).json();
    let rows = rows.as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["branch"].as_str().unwrap()).collect();
    assert_eq!(names, ["main", "gptq-4bit-32g-actorder_False", "gptq-4bit-64g-actorder_False"]);
    for verdict in rows.iter().flat_map(|row| row["engines"].as_array().unwrap()) {
        assert_eq!(verdict["loads"], true, "{verdict}");
    }
}

/// `gptq generate --json` with a prompt of its own.
fn generated(model: &Path, options: &str) -> Value {
    run(gptq("generate").arg(model).args(["--prompt", "The city of"]).args(words(options)).arg("--json"))
        .json()
}

#[test]
fn equal_seeds_give_equal_texts_and_temperature_0_needs_none() {
    let model = artifact("");
    let greedy = generated(&model, "--temperature 0 --max-new-tokens 24");
    assert_eq!(greedy["generated_tokens"], 24);
    assert_eq!(greedy["text"], generated(&model, "--temperature 0 --max-new-tokens 24 --seed 9")["text"]);
    assert!(greedy["text"].as_str().unwrap().len() > 24, "{greedy}");
    let drawn = generated(&model, "--temperature 1 --seed 5 --max-new-tokens 24");
    assert_eq!(drawn["text"], generated(&model, "--temperature 1 --seed 5 --max-new-tokens 24")["text"]);
    assert_ne!(drawn["text"], generated(&model, "--temperature 1 --seed 6 --max-new-tokens 24")["text"]);
    let streamed = run(gptq("generate")
        .arg(&model)
        .args(["--prompt", "The city of"])
        .args(words("--temperature 0 --max-new-tokens 24")));
    assert_eq!(streamed.ok().trim_end_matches('\n'), greedy["text"].as_str().unwrap().trim_end_matches('\n'));
}

#[test]
fn a_stop_text_ends_the_text_before_it() {
    let model = artifact("");
    let whole = generated(&model, "--temperature 0 --max-new-tokens 24");
    let whole = whole["text"].as_str().unwrap();
    let stop = whole.split_whitespace().nth(4).unwrap();
    let stopped = generated(&model, &format!("--temperature 0 --max-new-tokens 24 --stop {stop}"));
    assert_eq!(stopped["text"], whole[..whole.find(stop).unwrap()]);
    assert_eq!(stopped["finish_reason"], "stop_sequence");
    assert!(stopped["generated_tokens"].as_u64().unwrap() < 24);
}

#[test]
fn a_chat_goes_through_the_template() {
    let tokens = |chat: &[&str]| {
        let mut command = gptq("generate");
        command.arg(demo()).args(["--prompt", "Hello"]).args(chat);
        let options = "--temperature 0 --max-new-tokens 2 --json";
        run(command.args(words(options))).json()["prompt_tokens"].as_u64().unwrap()
    };
    let short = tokens(&["--chat", "--system", "Be brief."]);
    let long =
        tokens(&["--chat", "--system", "Be brief, be kind, and answer in the tongue of the question."]);
    let none = tokens(&["--chat"]);
    assert!(tokens(&[]) < none && none < short && short < long, "{none}, {short}, {long}");
    // No system message is added unasked, and one of the user's own wins.
    assert_eq!(short, tokens(&["--chat", "--default-system", "Be brief."]));
    assert_eq!(short, tokens(&["--chat", "--system", "Be brief.", "--default-system", "Be brief, be kind."]));
}

#[test]
fn inspect_tells_a_sound_artifact_from_a_damaged_one() {
    let work = workplace("inspect");
    let report = run(gptq("inspect").arg(artifact("")).arg("--json")).json();
    assert_eq!((&report["sound"], &report["tensors"]), (&json!(true), &json!(11 + 28 * 5)));
    let text = run(gptq("inspect").arg(artifact(""))).ok();
    assert!(
        text.contains("groups in file order") && !text.contains("no, "),
        "every program loads what is made by default"
    );
    let text = run(gptq("inspect").arg(artifact("--order act-order"))).ok();
    assert!(text.contains("act-order") && text.contains("no, refuses desc_act with groups"), "{text}");
    assert_eq!(run(gptq("inspect").arg(demo()).arg("--json")).json()["quantization"], Value::Null);
    let unsound = |name: &str, tensor: &str, damage: &dyn Fn(&mut Vec<u8>)| {
        let mut folder = ModelFolder::read(&artifact(""));
        damage(&mut folder.tensor(tensor).data);
        folder.write(&work.join(name));
        let verdict = run(gptq("inspect").arg(work.join(name)).arg("--json"));
        assert_eq!(verdict.code, Some(1), "{name}");
        let report: Value = serde_json::from_str(&verdict.stdout).unwrap();
        assert_eq!(report["sound"], false);
        assert!(report["problems"][0].as_str().unwrap().contains(tensor), "{report}");
    };
    let g_idx = "model.layers.3.mlp.down_proj.g_idx";
    unsound("out-of-range", g_idx, &|bytes| bytes[1] = 1);
    unsound("scales", "model.layers.1.mlp.up_proj.scales", &|bytes| bytes[..2].copy_from_slice(&[0, 0x7E]));
    unsound("norm", "model.norm.weight", &|bytes| bytes[..2].copy_from_slice(&[0, 0x7C]));
    // Still a group of the linear, but one with a member too many.
    unsound("other-group", g_idx, &|bytes| bytes[0] = (bytes[0] + 1) % 6);
}

#[test]
fn a_random_checkpoint_is_the_same_for_a_seed_and_loads() {
    let work = workplace("synth");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 320,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "float16",
    });
    let file = work.join("tiny.json");
    fs::write(&file, config.to_string()).unwrap();
    let made = |name: &str, options: &str| {
        let out = work.join(name);
        run(gptq("synth").arg(&file).arg("--out").arg(&out).args(words(options))).ok();
        let weights = fs::read(out.join("model.safetensors")).unwrap();
        (out, weights)
    };
    let (first, weights) = made("first", "--seed 7");
    assert_eq!(weights, made("again", "--seed 7").1);
    assert_ne!(weights, made("other", "--seed 8").1);
    assert!(logits(&first).iter().all(|x| x.is_finite()));
    run(gptq("inspect").arg(&first)).ok();
    assert_eq!(logits(&made("bf16", "--dtype bf16").0).len(), 96 * 320);
    let line = run(gptq("synth").arg(&file).arg("--out").arg(&first)).refusal();
    assert!(line.contains("first"), "{line}");
}

#[test]
fn eval_tells_how_far_the_device_is_from_the_cpu() {
    let artifact = artifact("");
    let evaluated = |options: &str| {
        let mut command = gptq("eval");
        command.arg(&artifact).args(["--dataset", &demo_text("test")]);
        run(command.args(words("--join raw --ctx 256 --max-windows 2 --device cpu")).args(words(options)))
    };
    let with_itself = format!("--baseline {} --baseline-on-cpu", artifact.display());
    let same = evaluated(&format!("{with_itself} --json")).json();
    assert_eq!((&same["logit_nmse"], &same["kl_divergence"]), (&0.0.into(), &0.0.into()), "{same}");
    assert_eq!(same["perplexity"], same["baseline_perplexity"]);
    assert!(evaluated(&with_itself).ok().contains("in f32 on the CPU"));
    let other = format!("--baseline {} --baseline-on-cpu --json", demo().display());
    let quantized = evaluated(&other).json();
    assert!(quantized["logit_nmse"].as_f64().unwrap() > 1e-4, "{quantized}");
    let alone = evaluated("--baseline-on-cpu");
    assert!(alone.code == Some(2) && alone.stderr.contains("--baseline <MODEL>"), "{}", alone.stderr);
}

#[test]
fn eval_warns_where_calibration_and_evaluation_text_are_the_same() {
    let evaluated = |split: &str, options: &str| {
        let mut command = gptq("eval");
        command.arg(artifact("")).args(["--dataset", &demo_text(split), "--max-windows", "2", "--ctx", "64"]);
        run(command.args(words(options)))
    };
    let (same, other) = (evaluated("train", "--json"), evaluated("test", "--json"));
    assert!(same.stderr.contains("warning") && same.stderr.contains("calibrated"), "{}", same.stderr);
    assert!(!other.stderr.contains("warning"), "{}", other.stderr);
    assert_eq!(same.json()["calibrated_on_this_text"], true);
    assert_eq!(other.json()["calibrated_on_this_text"], false);
    // Windows of 64 tokens score 63 each, and the protocol stands beside the figure.
    let shown = evaluated("test", "").ok();
    assert!(shown.contains("2 windows of 64 tokens") && shown.contains("126 tokens scored"), "{shown}");
}

#[test]
fn a_model_has_no_distance_to_itself_and_some_to_its_artifact() {
    let compared = |model: &Path| {
        let mut command = gptq("eval");
        command.arg(model).arg("--baseline").arg(demo()).args(["--dataset", &demo_text("test")]);
        run(command.args(words("--max-windows 2 --ctx 128 --json"))).json()
    };
    let itself = compared(&demo());
    assert_eq!((itself["kl_divergence"].as_f64(), itself["top1_agreement"].as_f64()), (Some(0.0), Some(1.0)));
    let artifact = compared(&artifact(""));
    assert!(artifact["kl_divergence"].as_f64().unwrap() > 0.001, "{artifact}");
    assert!(artifact["top1_agreement"].as_f64().unwrap() < 1.0, "{artifact}");
    assert_eq!(artifact["baseline_perplexity"], itself["perplexity"]);
}

#[test]
fn a_closed_pipe_ends_the_program_without_a_panic() {
    let model = artifact("");
    let (model, text) = (model.to_str().unwrap(), demo_text("test"));
    let (source, out) =
        (demo().display().to_string(), workplace("closed-pipe").join("out").display().to_string());
    for (verb, options) in [
        ("table", "causallm-7b".to_string()),
        ("table", "causallm-7b --json".into()),
        ("inspect", model.into()),
        ("inspect", format!("{model} --json")),
        ("completions", "bash".into()),
        ("generate", format!("{model} --prompt a --max-new-tokens 8 --temperature 0")),
        ("generate", format!("{model} --prompt a --max-new-tokens 8 --temperature 0 --json")),
        ("eval", format!("{model} --dataset {text} --ctx 64 --max-windows 1")),
        ("quantize", format!("{source} --out {out} --method rtn")),
        ("--help", String::new()),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let _cores = alone();
        let child = gptq(verb).args(words(&options)).stdout(writer).stderr(Stdio::piped()).spawn();
        let ended = child.unwrap().wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(
            !stderr.contains("panicked") && ended.status.code() != Some(101),
            "{verb} {options}: {stderr}"
        );
    }
}

#[test]
fn branches_of_a_plan_are_made_measured_and_listed() {
    let work = workplace("branches");
    let (plan, text, out) = (work.join("plan.toml"), work.join("text.txt"), work.join("out"));
    // One window of 2048 tokens, of three to four letters each.
    let rows = dataset::load(&demo_text("test").parse().unwrap(), &DatasetRoots::from_env()).unwrap();
    fs::write(&text, &rows.join(Join::Raw).unwrap()[..12_000]).unwrap();
    let branches = "[[branch]]\nname = \"main\"\nbits = 4\n[[branch]]\nbits = 8\ngroup_size = -1\n\
                    [[branch]]\nname = \"everybody\"\nbits = 4\norder = \"gar\"\n";
    fs::write(&plan, branches).unwrap();
    let mut command = gptq("branches");
    command
        .arg(demo())
        .arg("--out")
        .arg(&out)
        .arg("--plan")
        .arg(&plan)
        .args(["--dataset", &demo_text("train")]);
    command.arg("--eval-dataset").arg(&text);
    let rows = run(command.args(words("--samples 4 --seq-len 128 --json"))).json();
    let measured = run(gptq("table").arg(demo()).arg("--artifacts").arg(&out).arg("--json")).json();
    assert_eq!(rows, measured);
    let predicted = run(gptq("table").arg(demo()).arg("--plan").arg(&plan).arg("--json")).json();
    assert_eq!(rows.as_array().unwrap().len(), 3);
    for (row, predicted) in rows.as_array().unwrap().iter().zip(predicted.as_array().unwrap()) {
        for key in ["branch", "size_bytes", "act_order", "engines"] {
            assert_eq!(row[key], predicted[key], "{key}");
        }
        assert_eq!(row["act_order"], row["branch"] != "everybody", "as its columns were solved: {row}");
        // Eight bits are so near that perplexity may come out on either side.
        let least = if row["bits"] == 8 { 0.999 } else { 1.0 };
        let [got, baseline] = ["perplexity", "baseline_perplexity"].map(|key| row[key].as_f64().unwrap());
        assert!(got > least * baseline, "{row}");
        assert!(row["kl_divergence"].as_f64().unwrap() > 0.0, "{row}");
    }
    assert!(
        rows[1]["kl_divergence"].as_f64() < rows[0]["kl_divergence"].as_f64(),
        "8 bits are nearer than 4"
    );
    let alike = fs::read(out.join("main/model.safetensors")).unwrap();
    assert!(
        alike == fs::read(artifact("--order act-order").join("model.safetensors")).unwrap(),
        "as `quantize` makes it"
    );
    let mut again = gptq("branches");
    again
        .arg(demo())
        .arg("--out")
        .arg(&out)
        .arg("--plan")
        .arg(&plan)
        .args(["--dataset", &demo_text("train")]);
    let shown = run(again.args(words("--samples 4 --seq-len 128 --resume"))).ok();
    let expected = "not for vLLM 0.33, lmdeploy: refuses desc_act with groups; order = \"gar\" in a plan";
    assert!(shown.contains(expected) && shown.contains("(main)"), "{shown}");
}

#[test]
fn quantize_says_who_will_not_load_the_result_and_what_changes_it() {
    let work = workplace("engines");
    let shown = |name: &str, options: &str| run(&mut quantize(&demo(), &work.join(name), options)).ok();
    let all = shown("default", "--samples 2 --seq-len 64");
    assert!(!all.contains("not for"), "{all}");
    let some = shown("act-order", "--samples 2 --seq-len 64 --order act-order");
    assert!(
        some.contains("not for vLLM 0.33, lmdeploy: refuses desc_act with groups; --order gar"),
        "{some}"
    );
    let asymmetric = shown("asym", "--method rtn --asym");
    assert!(asymmetric.contains("symmetric grids only; --sym"), "{asymmetric}");
}

#[test]
fn the_demo_leaves_six_sound_artifacts_and_their_table() {
    let out = workplace("demo").join("out");
    let shown = run(gptq("demo").arg("--out").arg(&out)).ok();
    let rows = run(gptq("table").arg("causallm-7b").arg("--artifacts").arg(&out).arg("--json")).json();
    assert_eq!(rows.as_array().unwrap().len(), 6);
    for (name, row) in CARD.iter().zip(rows.as_array().unwrap()) {
        assert_eq!(row["branch"], *name);
        assert!(shown.lines().any(|line| line.split_whitespace().next() == Some(name)), "{name}: {shown}");
        let (own, fp16) = (row["perplexity"].as_f64().unwrap(), row["baseline_perplexity"].as_f64().unwrap());
        assert!(own > 0.99 * fp16 && own < 1.1 * fp16, "{row}");
        run(gptq("inspect").arg(out.join(name))).ok();
    }
    let line = run(gptq("demo").arg("--out").arg(&out)).refusal();
    assert!(line.contains("--force"), "{line}");
    let other = workplace("demo-elsewhere");
    copy_folder(&artifact(""), &other.join("mine"));
    let line = run(gptq("demo").arg("--out").arg(&other).arg("--force")).refusal();
    assert!(line.contains("demo") && other.join("mine/model.safetensors").exists(), "{line}");
}
