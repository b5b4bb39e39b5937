//! The program on a GPU, held against itself on the CPU. Without a card every test says that it was skipped;
//! `REQUIRE_CUDA=1` makes that a failure.

use std::path::{Path, PathBuf};

use gptq_kernels::{Backend, Batch, Cpu, Cuda, Dtype, SequenceRows};
use gptq_runtime::model::{Decoder, Model, ModelFiles};

use crate::model_folder::ModelFolder;
use crate::program::{artifact, copy_folder, demo, demo_text, gptq, quantize, run, words, workplace};

fn there_is_a_card() -> bool {
    let card = Cuda::new(0, Dtype::F16, None);
    if let Err(error) = &card {
        assert!(std::env::var_os("REQUIRE_CUDA").is_none(), "{error}");
        println!("skipped on CUDA: {error}");
    }
    card.is_ok()
}

fn weights(artifact: &Path) -> Vec<u8> {
    std::fs::read(artifact.join("model.safetensors")).unwrap()
}

fn perplexity(model: &Path, device: &str) -> f64 {
    let mut command = gptq("eval");
    command.arg(model).args(["--dataset", &demo_text("test"), "--device", device]);
    run(command.args(words("--join raw --ctx 256 --max-windows 16 --json"))).json()["perplexity"]
        .as_f64()
        .unwrap()
}

/// Each stage on the inputs that the CPU's stages before it make. Left to themselves the two runs drift apart:
/// one flipped code changes every later column of its row, and then the next stage's input.
#[test]
fn a_card_in_f32_finds_the_codes_of_the_cpu() {
    if !there_is_a_card() {
        return;
    }
    let mut command = gptq("bench");
    command.arg("agreement").arg(demo()).args(["--dataset", &demo_text("train")]);
    let layers =
        run(command.args(words("--samples 16 --seq-len 256 --device cuda --dtype f32 --json"))).json();
    for layer in layers.as_array().unwrap() {
        println!("{layer}");
        assert!(layer["codes_equal"].as_f64().unwrap() >= 0.99, "{layer}");
        assert!(layer["loss_distance"].as_f64().unwrap() <= 0.01, "{layer}");
    }
}

/// One artifact measured on both devices, and the artifacts that each made by itself.
#[test]
fn perplexity_does_not_depend_on_the_device() {
    if !there_is_a_card() {
        return;
    }
    let options = "--samples 16 --seq-len 256";
    let by_cpu = artifact(&format!("{options} --device cpu"));
    let by_card = artifact(&format!("{options} --device cuda"));
    let (on_cpu, on_card) = (perplexity(&by_cpu, "cpu"), perplexity(&by_cpu, "cuda"));
    println!("the CPU's artifact: {on_cpu} on the CPU, {on_card} on the card");
    assert!((on_card / on_cpu - 1.0).abs() <= 1e-3);
    let other = perplexity(&by_card, "cpu");
    println!("the card's artifact: {other}");
    // Two runs that drifted apart are two draws of the same quality.
    assert!((other / on_cpu - 1.0).abs() <= 1e-2);
}

#[test]
fn a_smaller_card_tiles_through_host_memory_and_writes_the_same_bytes() {
    if !there_is_a_card() {
        return;
    }
    let options = "--samples 96 --seq-len 512 --device cuda";
    let dir = workplace("smaller-card");
    let make = |name: &str, more: &str| -> (PathBuf, String) {
        let out = dir.join(name);
        let run = run(&mut quantize(&demo(), &out, &format!("{options}{more}")));
        let stderr = run.stderr.clone();
        run.ok();
        (out, stderr)
    };
    let (whole, said) = make("whole", "");
    assert!(said.contains("all on the GPU"), "{said}");
    // CUDA's own gigabyte, what solving a layer of this model takes, and some tiles.
    let (tiled, said) = make("tiled", " --max-gpu-memory 1180MB");
    assert!(said.contains("tiles through host memory"), "{said}");
    assert!(weights(&whole) == weights(&tiled), "the bytes differ");
    let refused = dir.join("refused");
    let mut command = quantize(&demo(), &refused, &format!("{options} --max-gpu-memory 1090MB"));
    let error = run(&mut command).refusal();
    assert!(error.contains("GPU memory"), "{error}");
    assert!(!refused.exists(), "nothing is left of a run that did not fit");
}

/// f16 ends at 65504. A run that leaves it says where, and a wider type gets through.
#[test]
fn activations_beyond_f16_are_reported_with_their_layer_and_stage() {
    if !there_is_a_card() {
        return;
    }
    let dir = workplace("overflow");
    copy_folder(&demo(), &dir.join("model"));
    let mut model = ModelFolder::read(&demo());
    let scaled = |values: Vec<f32>, factor: f32| -> Vec<u8> {
        values.iter().flat_map(|x| half::f16::from_f32(x * factor).to_le_bytes()).collect()
    };
    let embedding = model.tensor("model.embed_tokens.weight");
    embedding.data = vec![65504.0; embedding.halves().len()]
        .iter()
        .flat_map(|x| half::f16::from_f32(*x).to_le_bytes())
        .collect();
    let o_proj = model.tensor("model.layers.0.self_attn.o_proj.weight");
    o_proj.data = scaled(o_proj.halves(), 1000.0);
    model.write(&dir.join("model"));
    let out = dir.join("f16");
    let error = run(&mut quantize(&dir.join("model"), &out, "--device cuda --dtype f16")).refusal();
    assert!(error.contains("layer 0, stage gate_up: an activation is infinite or NaN"), "{error}");
    assert!(!out.exists());
    run(&mut quantize(&dir.join("model"), &dir.join("f32"), "--device cuda --dtype f32")).ok();
}

/// Scores of a whole text, and then of one more token for each of several sequences.
fn logits<B: Backend>(device: B, artifact: &Path, rows: usize, sequences: usize) -> [Vec<f32>; 2] {
    let model = Model::load(device.clone(), &ModelFiles::open(artifact).unwrap()).unwrap();
    let vocab = model.config.vocab_size as u32;
    let ids = |first: u32, count: usize| -> Vec<u32> {
        (0..count as u32).map(|i| (first + i * 7919) % vocab).collect()
    };
    let scores =
        |hidden: &B::Tensor, rows: usize| device.to_vec(&model.logits(hidden, 0..rows).unwrap()).unwrap();
    let text = scores(&model.forward(&ids(11, rows), &Batch::fresh([rows]), None).unwrap(), rows);
    // Contexts of different lengths, each in a block of its own.
    let mut caches = model.kv_caches(sequences).unwrap();
    let sequence = |i: usize, rows, context| SequenceRows { rows, context, blocks: vec![i as u32] };
    let before = Batch { sequences: (0..sequences).map(|i| sequence(i, 1 + i % 9, 0)).collect() };
    model.forward(&ids(5, before.rows()), &before, Some(&mut caches)).unwrap();
    let step = Batch { sequences: (0..sequences).map(|i| sequence(i, 1, 1 + i % 9)).collect() };
    let next = model.decode(&ids(3, sequences), &step, &mut caches, &mut Decoder::default()).unwrap();
    [text, device.to_vec(&next).unwrap()]
}

/// One number of rows for each way that a card has of multiplying, and one that fills up a recorded step.
#[test]
fn a_card_has_the_logits_of_the_cpu() {
    if !there_is_a_card() {
        return;
    }
    for options in ["", "--group-size 32 --asym", "--no-act-order", "--bits 8 --group-size -1", "--bits 3"] {
        let artifact = artifact(options);
        for (rows, sequences) in [(5, 1), (12, 8), (40, 12), (128, 64), (200, 100)] {
            let card = logits(Cuda::new(0, Dtype::F16, None).unwrap(), &artifact, rows, sequences);
            let cpu = logits(Cpu::new(), &artifact, rows, sequences);
            for (what, (got, expected)) in ["text", "step"].iter().zip(card.iter().zip(&cpu)) {
                assert_eq!(got.len(), expected.len());
                let square = |x: &f32| (*x as f64).powi(2);
                let error: f64 = got.iter().zip(expected).map(|(a, b)| square(&(a - b))).sum();
                let nmse = error / expected.iter().map(square).sum::<f64>();
                println!("{options}, {what}, {rows} rows, {sequences} sequences: nmse {nmse:.1e}");
                // As for every product in 16 bits.
                assert!(nmse <= 5e-4, "{options}, {what}, {rows} rows, {sequences} sequences: {nmse:.1e}");
            }
        }
    }
}

/// 200 tokens, each the most likely one: a step that is recorded once and replayed for every token must see the
/// cache, the position and the token of its own time.
#[test]
fn a_card_writes_the_text_of_the_cpu() {
    if !there_is_a_card() {
        return;
    }
    let text = |model: &Path, device: &str| {
        let mut command = gptq("generate");
        command.arg(model).args(["--prompt", "The river", "--device", device]);
        run(command.args(words("--max-new-tokens 200 --temperature 0 --repetition-penalty 1"))).ok()
    };
    for model in [demo(), artifact(""), artifact("--bits 8 --group-size -1")] {
        assert_eq!(text(&model, "cuda"), text(&model, "cpu"), "{}", model.display());
    }
}
