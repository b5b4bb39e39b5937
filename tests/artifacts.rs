//! Artifacts, read by a reader that shares no code with the writer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::model_folder::{ModelFolder, Tensor, largest_difference, logits};
use crate::program::{artifact, demo, gptq, quantize, run, workplace};
use crate::support::golden;

/// One way to write the demo: command-line options, and the same as the branch of a plan.
struct Case {
    options: &'static str,
    plan: &'static str,
    bits: usize,
    /// `usize::MAX` for one group a row.
    group_size: usize,
    /// What v1 takes off a zero point.
    offset: i64,
}

const fn case(
    options: &'static str,
    plan: &'static str,
    bits: usize,
    group_size: usize,
    offset: i64,
) -> Case {
    Case { options, plan, bits, group_size, offset }
}

const ACT_ORDER: Case = case("--order act-order", "bits = 4", 4, 128, 1);
const PLAIN: &str = "--order file";

/// Cases that are one file with bias tensors, as `table` predicts them.
const ONE_FILE: [Case; 6] = [
    ACT_ORDER,
    case(
        "--order act-order --group-size 32 --asym --checkpoint-format gptq_v2",
        "bits = 4\ngroup_size = 32\nsym = false\nformat = \"gptq_v2\"",
        4,
        32,
        0,
    ),
    case("--bits 8 --group-size -1", "bits = 8\norder = \"gar\"\ngroup_size = -1", 8, usize::MAX, 1),
    case(
        "--order act-order --bits 3 --group-size 64 --asym",
        "bits = 3\ngroup_size = 64\nsym = false",
        3,
        64,
        1,
    ),
    case("--order act-order --bits 2 --group-size 32", "bits = 2\ngroup_size = 32", 2, 32, 1),
    case("--group-size 64", "bits = 4\norder = \"gar\"\ngroup_size = 64", 4, 64, 1),
];

const OTHERS: [Case; 5] = [
    case("--order static-groups", "", 4, 128, 1),
    case("--preset card --order gar", "", 4, 128, 1),
    case("--no-bias", "", 4, 128, 1),
    case("--max-shard-size 2MB", "", 4, 128, 1),
    case(PLAIN, "", 4, 128, 1),
];

/// The linears of the demo: module, input features, output features.
const LINEARS: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 256, 256),
    ("self_attn.k_proj", 256, 256),
    ("self_attn.v_proj", 256, 256),
    ("self_attn.o_proj", 256, 256),
    ("mlp.gate_proj", 256, 768),
    ("mlp.up_proj", 256, 768),
    ("mlp.down_proj", 768, 256),
];

fn modules() -> impl Iterator<Item = (String, usize, usize)> {
    (0..4).flat_map(|layer| LINEARS.map(|(name, k, n)| (format!("model.layers.{layer}.{name}"), k, n)))
}

/// Unpacked by the format's description, bit by bit: the codes of a column follow one another from the lowest
/// bit of its first word; `value = scale * (code - zero)`. The result is `[out, in]`.
fn dequantize(folder: &mut ModelFolder, name: &str, bits: usize, offset: i64) -> Tensor {
    let mut part = |part: &str| folder.tensors.remove(&format!("{name}.{part}")).unwrap();
    let (qweight, qzeros, g_idx) = (part("qweight"), part("qzeros").words(), part("g_idx").words());
    let (scales, k, n) = (part("scales").halves(), qweight.shape[0] * 32 / bits, qweight.shape[1]);
    let qweight = qweight.words();
    let field = |word: &dyn Fn(usize) -> u32, index: usize| -> i64 {
        (0..bits)
            .map(|b| (index * bits + b, b))
            .map(|(at, b)| i64::from(word(at / 32) >> (at % 32) & 1) << b)
            .sum()
    };
    let mut weight = vec![0.0; n * k];
    for o in 0..n {
        for i in 0..k {
            let group = g_idx[i] as usize;
            let code = field(&|word| qweight[word * n + o], i);
            let zero = field(&|word| qzeros[group * n * bits / 32 + word], o) + offset;
            weight[o * k + i] = scales[group * n + o] * (code - zero) as f32;
        }
    }
    Tensor::f32(vec![n, k], &weight)
}

/// The artifact as an ordinary checkpoint of 32-bit weights; biases stay only where the source has them.
pub fn write_dequantized(artifact: &Path, source: &ModelFolder, bits: usize, offset: i64, dir: &Path) {
    let mut folder = ModelFolder::read(artifact);
    let quantized = folder.tensors.keys().filter_map(|name| name.strip_suffix(".qweight")).map(String::from);
    for name in quantized.collect::<Vec<_>>() {
        let weight = dequantize(&mut folder, &name, bits, offset);
        folder.tensors.insert(format!("{name}.weight"), weight);
    }
    folder.tensors.retain(|name, _| !name.ends_with(".bias") || source.tensors.contains_key(name));
    folder.config.as_object_mut().unwrap().remove("quantization_config");
    folder.config["dtype"] = json!("float32");
    folder.write(dir);
}

#[test]
fn real_biases_tied_embeddings_and_head_norms_of_other_families_survive() {
    let work = workplace("families");
    for family in
        ["llama-gqa-tied", "llama-linear-rope-bias", "mistral-sliding", "qwen2-bias", "qwen3-qk-norm"]
    {
        let source = golden("logits").join(family);
        let (out, plain) = (work.join(family), work.join(format!("{family}-plain")));
        run(&mut quantize(&source, &out, "--method rtn --bits 8 --group-size 32 --no-bias")).ok();
        let original = ModelFolder::read(&source);
        write_dequantized(&out, &original, 8, 1, &plain);
        let (ours, theirs) = (logits(&out), logits(&plain));
        let (worst, moved) =
            (largest_difference(&ours, &theirs), largest_difference(&ours, &logits(&source)));
        println!("{family}: largest difference {worst:.1e}, from fp16 {moved:.1e}");
        assert!(worst <= 1e-3 && moved > 1e-3 && moved < 0.5, "{family}: {worst}, {moved}");
        let biases =
            |folder: &ModelFolder| folder.tensors.keys().filter(|name| name.ends_with(".bias")).count();
        assert_eq!(biases(&ModelFolder::read(&out)), biases(&original), "{family}");
    }
}

#[test]
fn an_independent_reader_of_the_format_gets_the_same_logits() {
    let plain = workplace("dequantized");
    let source = ModelFolder::read(&demo());
    let mut seen: Vec<Vec<f32>> = Vec::new();
    for case in ONE_FILE.iter().chain(&OTHERS) {
        let dir = artifact(case.options);
        write_dequantized(&dir, &source, case.bits, case.offset, &plain);
        let (ours, theirs) = (logits(&dir), logits(&plain));
        let worst = largest_difference(&ours, &theirs);
        println!("{:>55}: largest difference {worst:.1e}", case.options);
        // Measured: 1.6e-3 of logits around 20. Products with codes round activations to 16 bits.
        assert!(worst <= 1e-2, "{}: {worst}", case.options);
        if !matches!(case.options, "--no-bias" | "--max-shard-size 2MB") {
            assert!(seen.iter().all(|other| largest_difference(other, &ours) > 0.05), "{}", case.options);
            seen.push(ours);
        }
    }
}

#[test]
fn groups_and_zero_points_are_laid_out_as_other_readers_expect() {
    for case in ONE_FILE.iter().chain(&OTHERS) {
        let mut folder = ModelFolder::read(&artifact(case.options));
        let contiguous = !case.options.contains("--order act-order");
        // What the files say of the order is true, so that no reader refuses or misreads them.
        let own: Value =
            serde_json::from_slice(&fs::read(artifact(case.options).join("quantize_config.json")).unwrap())
                .unwrap();
        assert_eq!(own["desc_act"], !contiguous, "{}", case.options);
        assert_eq!(folder.config["quantization_config"]["desc_act"], !contiguous, "{}", case.options);
        for (name, k, n) in modules() {
            let (size, groups) = (case.group_size.min(k), k.div_ceil(case.group_size.min(k)));
            let g_idx = folder.tensor(&format!("{name}.g_idx")).words();
            let in_order: Vec<u32> = (0..k).map(|i| (i / size) as u32).collect();
            let mut sorted = g_idx.clone();
            sorted.sort();
            assert_eq!(sorted, in_order, "{} {name}: every group has its size", case.options);
            assert_eq!(g_idx == in_order, contiguous, "{} {name}", case.options);
            // Symmetric grids of the loop search have a sign, which readers need not know of.
            let scales = folder.tensor(&format!("{name}.scales")).halves();
            let signed = !case.options.contains("asym") && !case.options.contains("card");
            assert_eq!(scales.iter().any(|scale| *scale < 0.0), signed, "{} {name}", case.options);
            let qzeros = folder.tensor(&format!("{name}.qzeros")).words();
            assert_eq!(qzeros.len(), groups * n * case.bits / 32);
            let middle: Option<u32> = match case.bits {
                _ if case.options.contains("asym") => None,
                2 => Some(0x5555_5555),
                4 => Some(0x7777_7777),
                _ => Some(0x7F7F_7F7F),
            };
            match middle {
                Some(word) => assert!(qzeros.iter().all(|w| *w == word), "{} {name}", case.options),
                None => assert!(qzeros.iter().any(|w| *w != qzeros[0]), "{} {name}", case.options),
            }
        }
        let q = folder.tensor("model.layers.2.self_attn.q_proj.g_idx").words();
        for other in ["k_proj", "v_proj"] {
            let g_idx = folder.tensor(&format!("model.layers.2.self_attn.{other}.g_idx")).words();
            assert_eq!(g_idx, q, "servers fuse q, k and v only where their groups agree");
        }
    }
}

#[test]
fn files_have_the_predicted_size_and_the_described_tensors() {
    let plan = workplace("prediction").join("plan.toml");
    let branches =
        ONE_FILE.iter().enumerate().map(|(i, c)| format!("[[branch]]\nname = \"b{i}\"\n{}\n", c.plan));
    fs::write(&plan, branches.collect::<String>()).unwrap();
    let config = demo().join("config.json");
    let rows = run(gptq("table").arg(&config).arg("--plan").arg(&plan).arg("--json")).json();
    for (case, row) in ONE_FILE.iter().zip(rows.as_array().unwrap()) {
        let dir = artifact(case.options);
        let length = fs::metadata(dir.join("model.safetensors")).unwrap().len();
        assert_eq!(json!(length), row["size_bytes"], "{}", case.options);
        let folder = ModelFolder::read(&dir);
        let bytes: usize = folder.tensors.values().map(|tensor| tensor.data.len()).sum();
        let elements: usize =
            folder.tensors.values().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(json!(bytes), row["tensor_bytes"]);
        assert_eq!(json!(elements), row["elements"]);
        assert_eq!(json!(folder.tensors.len()), row["tensors"]);
        assert_eq!(described(&folder), expected_tensors(case), "{}", case.options);
    }
}

fn described(folder: &ModelFolder) -> BTreeMap<String, (Dtype, Vec<usize>)> {
    folder.tensors.iter().map(|(name, t)| (name.clone(), (t.dtype, t.shape.clone()))).collect()
}

fn expected_tensors(case: &Case) -> BTreeMap<String, (Dtype, Vec<usize>)> {
    let mut expected = BTreeMap::new();
    let mut add = |name: String, dtype, shape: &[usize]| expected.insert(name, (dtype, shape.to_vec()));
    for outer in ["model.embed_tokens.weight", "lm_head.weight"] {
        add(outer.into(), Dtype::F16, &[2048, 256]);
    }
    add("model.norm.weight".into(), Dtype::F16, &[256]);
    for layer in 0..4 {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("model.layers.{layer}.{norm}.weight"), Dtype::F16, &[256]);
        }
    }
    for (name, k, n) in modules() {
        let groups = k.div_ceil(case.group_size.min(k));
        add(format!("{name}.qweight"), Dtype::I32, &[k * case.bits / 32, n]);
        add(format!("{name}.qzeros"), Dtype::I32, &[groups, n * case.bits / 32]);
        add(format!("{name}.scales"), Dtype::F16, &[groups, n]);
        add(format!("{name}.g_idx"), Dtype::I32, &[k]);
        add(format!("{name}.bias"), Dtype::F16, &[n]);
    }
    expected
}

#[test]
fn bias_and_shards_are_as_asked_for_and_what_is_not_quantized_is_copied() {
    let whole = ModelFolder::read(&artifact(""));
    let without = ModelFolder::read(&artifact("--no-bias"));
    let is_bias = |name: &str| name.ends_with(".bias");
    assert!(without.tensors.keys().all(|name| !is_bias(name)));
    let biases: Vec<_> = whole.tensors.iter().filter(|(name, _)| is_bias(name)).collect();
    assert!(biases.len() == 28 && biases.iter().all(|(_, bias)| bias.data.iter().all(|byte| *byte == 0)));
    assert_eq!(without.tensors.len() + 28, whole.tensors.len());

    let sharded = artifact("--max-shard-size 2MB");
    let index = fs::read(sharded.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let shards = ModelFolder::read(&sharded);
    assert!(!sharded.join("model.safetensors").exists());
    assert_eq!(shards.tensors.len(), whole.tensors.len());
    let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, file) in index["weight_map"].as_object().unwrap() {
        assert!(shards.tensors[name].data == whole.tensors[name].data, "{name}");
        *sizes.entry(file.as_str().unwrap()).or_default() += whole.tensors[name].data.len();
    }
    assert!(sizes.keys().eq(&["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]));
    assert!(sizes.values().all(|bytes| *bytes <= 2_000_000), "{sizes:?}");
    assert_eq!(index["metadata"]["total_size"], sizes.values().sum::<usize>());

    let source = ModelFolder::read(&demo());
    let kept = source.tensors.iter().filter(|(name, _)| !name.contains("_proj."));
    assert!(kept.clone().count() == 11 && kept.clone().all(|(name, t)| whole.tensors[name].data == t.data));
}

#[test]
fn artifacts_in_the_layout_of_other_programs_are_read() {
    let dir = artifact(PLAIN);
    let expected = logits(&dir);
    let work = workplace("other-layouts");

    let mut bare = ModelFolder::read(&dir);
    bare.tensors.retain(|name, _| !name.ends_with(".g_idx") && !name.ends_with(".bias"));
    bare.write_as(&work.join("bare"), "gptq_model-4bit-128g.safetensors");
    assert!(logits(&work.join("bare")) == expected, "without g_idx and bias, under AutoGPTQ's file name");

    let mut old = ModelFolder::read(&dir);
    old.config.as_object_mut().unwrap().remove("quantization_config");
    old.write(&work.join("old"));
    let own = "quantize_config.json";
    fs::copy(dir.join(own), work.join("old").join(own)).unwrap();
    assert!(logits(&work.join("old")) == expected, "with quantize_config.json alone");

    let new = ModelFolder::read(&dir);
    new.write(&work.join("new"));
    assert!(logits(&work.join("new")) == expected, "with quantization_config in config.json alone");
}
