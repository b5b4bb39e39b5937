//! Bad input: one line that names the fault, an exit status that is not 0, and nothing under the output's name.

use std::fs;
use std::path::Path;
use std::process::Command;

use safetensors::Dtype;
use serde_json::json;

use crate::model_folder::{ModelFolder, Tensor};
use crate::program::{artifact, demo, demo_text, gptq, quantize, run, words, workplace};
use crate::support::golden;

const Q_PROJ: &str = "model.layers.1.self_attn.q_proj.weight";

/// A Llama of 0.8 MB. Rounding to nearest needs no tokenizer, which it lacks.
fn tiny() -> ModelFolder {
    ModelFolder::read(&golden("logits/llama-mha"))
}

fn rtn(model: &Path, out: &Path) -> Command {
    let mut command = gptq("quantize");
    command.arg(model).arg("--out").arg(out).args(words("--method rtn"));
    command
}

/// The command fails in one line with all these words, and leaves nothing beside what was there.
fn refuses(command: &mut Command, out: &Path, named: &[&str]) {
    let line = run(command).refusal();
    for word in named {
        assert!(line.contains(word), "expected {word} in: {line}");
    }
    assert!(!out.exists(), "{line}");
    let partial = format!(".{}.partial", out.file_name().unwrap().to_str().unwrap());
    assert!(!out.with_file_name(&partial).exists(), "{partial} after: {line}");
}

#[test]
fn the_tiny_model_is_accepted_before_it_is_damaged() {
    let work = workplace("undamaged");
    tiny().write(&work.join("model"));
    run(&mut rtn(&work.join("model"), &work.join("out"))).ok();
    assert!(work.join("out/model.safetensors").exists());
}

#[test]
fn a_missing_or_wrong_config_is_named() {
    let work = workplace("bad-config");
    let out = work.join("out");
    let model = work.join("model");
    refuses(&mut rtn(&model, &out), &out, &["model"]);
    fs::create_dir(&model).unwrap();
    refuses(&mut rtn(&model, &out), &out, &["config.json", "No such file"]);
    for (text, named) in [("", "JSON"), ("{\"hidden_size\": ", "JSON"), ("[1, 2]", "expected an object")] {
        tiny().write(&model);
        fs::write(model.join("config.json"), text).unwrap();
        refuses(&mut rtn(&model, &out), &out, &["config.json", named]);
    }
    for (key, value, named) in [
        ("model_type", json!("mamba"), "architecture mamba"),
        ("hidden_size", json!("128"), "whole number"),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("hidden_act", json!("relu"), "silu"),
    ] {
        let mut folder = tiny();
        folder.config[key] = value;
        folder.write(&model);
        refuses(&mut rtn(&model, &out), &out, &["config.json", named]);
    }
}

#[test]
fn absurd_sizes_are_refused_in_little_memory() {
    let work = workplace("absurd");
    let out = work.join("out");
    let model = work.join("model");
    for (key, value) in [
        ("vocab_size", json!(1_000_000_000_000_000u64)),
        ("hidden_size", json!(1_000_000_000_000u64)),
        ("vocab_size", json!(1 << 24)),
        ("intermediate_size", json!(1 << 22)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("num_hidden_layers", json!(4096)),
        ("max_position_embeddings", json!(1u64 << 60)),
    ] {
        let mut folder = tiny();
        folder.config[key] = value.clone();
        folder.write(&model);
        let program = env!("CARGO_BIN_EXE_gptq");
        let mut limited = Command::new("sh");
        limited.args(["-c", "ulimit -v 2000000; exec \"$@\"", "sh", program, "quantize"]).arg(&model);
        let line = run(limited.arg("--out").arg(&out).args(words("--method rtn"))).refusal();
        assert!(line.contains("expected") || line.contains("missing"), "{key} {value}: {line}");
        assert!(!out.exists());
    }
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    let work = workplace("bad-tensor");
    let (model, out) = (work.join("model"), work.join("out"));
    let refuse = |damage: &dyn Fn(&mut ModelFolder), named: &[&str]| {
        let mut folder = tiny();
        damage(&mut folder);
        folder.write(&model);
        refuses(&mut rtn(&model, &out), &out, named);
    };
    refuse(&|folder| drop(folder.tensors.remove(Q_PROJ)), &[Q_PROJ, "missing"]);
    refuse(&|folder| drop(folder.tensors.remove("lm_head.weight")), &["lm_head.weight", "missing"]);
    refuse(&|folder| folder.tensor(Q_PROJ).shape = vec![64, 256], &[Q_PROJ, "[128, 128]", "[64, 256]"]);
    refuse(&|folder| folder.tensor(Q_PROJ).shape = vec![128 * 128], &[Q_PROJ, "[128, 128]", "[16384]"]);
    let integers = Tensor { dtype: Dtype::I32, shape: vec![128, 128], data: vec![1; 4 * 128 * 128] };
    refuse(&|folder| *folder.tensor(Q_PROJ) = integers.clone(), &[Q_PROJ, "I32"]);
}

#[test]
fn values_that_are_not_finite_are_named_with_their_tensor() {
    let work = workplace("not-finite");
    let (model, out) = (work.join("model"), work.join("out"));
    for (tensor, bits, shown) in [
        (Q_PROJ, 0x7E00u16, "NaN"),
        ("model.layers.0.mlp.down_proj.weight", 0x7C00, "inf"),
        ("model.embed_tokens.weight", 0xFC00, "-inf"),
        ("model.norm.weight", 0x7E00, "NaN"),
    ] {
        let mut folder = tiny();
        folder.tensor(tensor).data[200..202].copy_from_slice(&bits.to_le_bytes());
        folder.write(&model);
        refuses(&mut rtn(&model, &out), &out, &[tensor, shown, "element 100"]);
    }
}

#[test]
fn a_damaged_weight_file_is_refused() {
    let work = workplace("damaged");
    let (model, out) = (work.join("model"), work.join("out"));
    tiny().write(&model);
    let file = model.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    let header = |length: u64| [&length.to_le_bytes()[..], &whole[8..]].concat();
    for (bytes, named) in [
        (whole[..whole.len() - 10].to_vec(), "truncated"),
        (whole[..100].to_vec(), "truncated header"),
        (Vec::new(), "header"),
        (header(whole.len() as u64 + 1000), "header"),
        (header(u64::MAX), "header"),
        (header(20), "header"),
        ([&whole[..], &[0; 3]].concat(), "extra bytes"),
    ] {
        fs::write(&file, bytes).unwrap();
        refuses(&mut rtn(&model, &out), &out, &["model.safetensors", named]);
    }
    fs::remove_file(&file).unwrap();
    refuses(&mut rtn(&model, &out), &out, &["safetensors"]);
}

#[test]
fn settings_that_cannot_be_are_refused_by_name() {
    let work = workplace("bad-settings");
    let (model, out) = (work.join("model"), work.join("out"));
    tiny().write(&model);
    for (options, named) in [
        ("--bits 5", "--bits"),
        ("--group-size 0", "--group-size"),
        ("--group-size -2", "--group-size"),
        ("--damp-percent 1.5", "--damp-percent"),
        ("--damp-percent 0", "damp"),
        ("--max-shard-size 3apples", "--max-shard-size"),
        ("--device tpu", "--device"),
        ("--no-such-option", "--no-such-option"),
    ] {
        refuses(rtn(&model, &out).args(words(options)), &out, &[named]);
    }
    let mut narrow = tiny();
    narrow.config["intermediate_size"] = json!(72);
    for layer in 0..2 {
        for (name, shape) in [("gate_proj", [72, 128]), ("up_proj", [72, 128]), ("down_proj", [128, 72])] {
            let name = format!("model.layers.{layer}.mlp.{name}.weight");
            narrow.tensors.insert(name, Tensor::f32(shape.to_vec(), &vec![0.5; 72 * 128]));
        }
    }
    narrow.write(&model);
    refuses(
        rtn(&model, &out).args(words("--bits 3")),
        &out,
        &["gate_proj", "3 bits", "multiple of 32", "72"],
    );
    run(rtn(&model, &out).args(words("--bits 4"))).ok();
}

#[test]
fn an_artifact_is_not_quantized_again() {
    let out = workplace("again").join("out");
    refuses(&mut quantize(&artifact(""), &out, ""), &out, &["quantized already"]);
}

#[test]
fn an_output_with_files_is_not_touched() {
    let work = workplace("occupied");
    let (model, out) = (work.join("model"), work.join("out"));
    tiny().write(&model);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.txt"), "precious").unwrap();
    let line = run(&mut rtn(&model, &out)).refusal();
    assert!(line.contains("out") && line.contains("--force"), "{line}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(out.join("thesis.txt")).unwrap(), "precious");
    let line = run(rtn(&model, &model.join("config.json")).arg("--force")).refusal();
    assert!(line.contains("config.json"), "{line}");
    assert!(fs::read_to_string(model.join("config.json")).unwrap().contains("LlamaForCausalLM"));
}

#[test]
fn force_replaces_artifacts_and_neither_the_source_nor_other_folders() {
    let work = workplace("forced");
    let model = work.join("models/fp16");
    tiny().write(&model);
    let home = work.join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("thesis.txt"), "precious").unwrap();
    fs::copy(model.join("config.json"), home.join("config.json")).unwrap();
    for out in [&model, &work.join("models"), &home] {
        let line = run(rtn(&model, out).arg("--force")).refusal();
        assert!(line.contains(out.to_str().unwrap()), "{line}");
    }
    assert!(home.join("thesis.txt").exists());
    assert!(ModelFolder::read(&model).tensors.contains_key(Q_PROJ), "the source is whole");
    let (out, again) = (work.join("out"), ["--bits", "8", "--force"]);
    run(&mut rtn(&model, &out)).ok();
    run(rtn(&model, &out).args(again)).ok();
    assert_eq!(ModelFolder::read(&out).config["quantization_config"]["bits"], 8);
}

#[test]
fn a_bad_calibration_text_is_named_with_what_would_fit() {
    let work = workplace("bad-text");
    let out = work.join("out");
    let refuse = |file: &str, text: &str, options: &str, named: &[&str]| {
        let path = work.join(file);
        fs::write(&path, text).unwrap();
        let mut command = gptq("quantize");
        command.arg(demo()).arg("--out").arg(&out).arg("--dataset").arg(&path).args(words(options));
        refuses(&mut command, &out, named);
    };
    refuse("short.txt", "Too short.", "", &["short.txt", "32", "1024", "0 fit in"]);
    let options = "--samples 9 --seq-len 100 --sampling consecutive";
    refuse("words.txt", &"and ".repeat(500), options, &["words.txt", "9 distinct", "fit in"]);
    refuse("zero.txt", "Some text.", "--samples 0", &["at least 1"]);
    refuse("empty.txt", "", "", &["empty.txt", "expected text"]);
    refuse("text.csv", "text\nhello", "", &["text.csv", ".parquet, .jsonl or .txt"]);
    refuse(
        "lines.jsonl",
        "{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"text\"\n",
        "",
        &["lines.jsonl:3", "JSON"],
    );
    refuse("fields.jsonl", "{\"text\": \"a\"}\n{\"body\": \"b\"}\n", "", &["fields.jsonl:2", "text"]);
    refuse("damaged.parquet", "PAR1 and then nothing", "", &["damaged.parquet"]);
    for (spec, named) in [
        (work.join("none.txt").display().to_string(), "none.txt"),
        ("wikitext2:dev".into(), "train, validation or test"),
        ("wikitext2:test".into(), "GPTQ_DATASETS"),
        (demo_text("dev"), "dev"),
    ] {
        let mut command = gptq("quantize");
        refuses(command.arg(demo()).arg("--out").arg(&out).args(["--dataset", &spec]), &out, &[named]);
    }
}

#[test]
fn a_model_without_a_tokenizer_is_refused_where_one_is_needed() {
    let work = workplace("no-tokenizer");
    let (model, out) = (work.join("model"), work.join("out"));
    tiny().write(&model);
    refuses(&mut quantize(&model, &out, ""), &out, &["tokenizer"]);
    let line = run(gptq("generate").arg(&model).args(words("--prompt x"))).refusal();
    assert!(line.contains("tokenizer"), "{line}");
}
