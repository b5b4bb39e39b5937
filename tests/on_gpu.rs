//! The program on a GPU, held against itself on the CPU. Where the build saw no GPU these tests are
//! ignored.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use gptq_kernels::{
    Backend, Batch, Cpu, Cuda, Device, Dtype, KV_BLOCK_ROWS, KvDtype, SequenceRows, TopLogits,
};
use gptq_runtime::engine::{self, CacheSize, EngineLimits, Event, Events, PrefillLimits, Request, Task};
use gptq_runtime::generate::{FinishReason, GenerateParams, generate};
use gptq_runtime::model::{Decoder, Model, ModelFiles};
use gptq_runtime::sampling::SamplingParams;

use crate::artifacts::write_dequantized;
use crate::model_folder::ModelFolder;
use crate::program::{artifact, copy_folder, demo, demo_text, gptq, quantize, run, words, workplace};

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
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_card_in_f32_finds_the_codes_of_the_cpu() {
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
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn perplexity_does_not_depend_on_the_device() {
    let options = "--samples 16 --seq-len 256";
    let by_cpu = artifact(&format!("{options} --device cpu"));
    let by_card = artifact(&format!("{options} --device cuda"));
    let (on_cpu, on_gpu) = (perplexity(&by_cpu, "cpu"), perplexity(&by_cpu, "cuda"));
    println!("the CPU's artifact: {on_cpu} on the CPU, {on_gpu} on the GPU");
    assert!((on_gpu / on_cpu - 1.0).abs() <= 1e-3);
    let mut command = gptq("eval");
    command
        .arg(&by_cpu)
        .args(["--dataset", &demo_text("test"), "--device", "cuda", "--baseline"])
        .arg(&by_cpu);
    let options = "--baseline-on-cpu --join raw --ctx 256 --max-windows 16 --json";
    let distance = run(command.args(words(options))).json();
    println!("{distance}");
    // As for every product in 16 bits.
    assert!(distance["logit_nmse"].as_f64().unwrap() <= 5e-4, "{distance}");
    let other = perplexity(&by_card, "cpu");
    println!("the GPU's artifact: {other}");
    // Two runs that drifted apart are two draws of the same quality.
    assert!((other / on_cpu - 1.0).abs() <= 1e-2);
}

#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_smaller_card_tiles_through_host_memory_and_writes_the_same_bytes() {
    let options = "--samples 96 --seq-len 512 --device cuda";
    let dir = workplace("smaller-gpu");
    let make = |name: &str, more: &str| -> (PathBuf, String) {
        let out = dir.join(name);
        let run = run(&mut quantize(&demo(), &out, &format!("{options}{more}")));
        let stderr = run.stderr.clone();
        run.ok();
        (out, stderr)
    };
    let (whole, said) = make("whole", "");
    assert!(said.contains("all on the GPU"), "{said}");
    // CUDA's own gigabyte, what solving a layer of this model takes, and some chunks.
    let (tiled, said) = make("tiled", " --max-gpu-memory 1180MB");
    assert!(said.contains("chunks through host memory"), "{said}");
    assert!(weights(&whole) == weights(&tiled), "the bytes differ");
    let refused = dir.join("refused");
    let mut command = quantize(&demo(), &refused, &format!("{options} --max-gpu-memory 1090MB"));
    let error = run(&mut command).refusal();
    assert!(error.contains("GPU memory"), "{error}");
    assert!(!refused.exists(), "nothing is left of a run that did not fit");
}

/// f16 ends at 65504. A run that leaves it says where, and a wider type gets through.
#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn activations_beyond_f16_are_reported_with_their_layer_and_stage() {
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

/// Steps after which the longest context is in its second block.
const STEPS: usize = 9;

/// Scores of a whole text, and then of the last of some more tokens for each of several sequences. With a type of
/// cache that loses something the text goes through one.
fn logits<B: Backend>(
    device: B,
    artifact: &Path,
    (rows, sequences): (usize, usize),
    kv_dtype: KvDtype,
) -> [Vec<f32>; 2] {
    let model = Model::load(device.clone(), &ModelFiles::open(artifact).unwrap()).unwrap();
    let model = model.with_kv_dtype(kv_dtype);
    let vocab = model.config.vocab_size as u32;
    let ids = |first: u32, count: usize| -> Vec<u32> {
        (0..count as u32).map(|i| (first + i * 7919) % vocab).collect()
    };
    let blocks = rows.div_ceil(KV_BLOCK_ROWS);
    let mut caches = (kv_dtype != KvDtype::Auto).then(|| model.kv_caches(blocks).unwrap());
    let mut batch = Batch::fresh([rows]);
    batch.sequences[0].blocks = (0..blocks as u32).collect();
    let hidden = model.forward(&ids(11, rows), &batch, caches.as_mut()).unwrap();
    let text = device.to_vec(&model.logits(&hidden, 0..rows).unwrap()).unwrap();
    // Contexts of different lengths, each in blocks of its own.
    let mut caches = model.kv_caches(2 * sequences).unwrap();
    let sequence = |i: usize, rows, context| {
        let blocks = vec![(sequences + i) as u32, i as u32];
        SequenceRows { rows, context, blocks }
    };
    let before = Batch { sequences: (0..sequences).map(|i| sequence(i, 1 + i % 9, 0)).collect() };
    model.forward(&ids(5, before.rows()), &before, Some(&mut caches)).unwrap();
    let mut decoder = Decoder::default();
    let mut next = Vec::new();
    for new in 0..STEPS {
        let step = Batch { sequences: (0..sequences).map(|i| sequence(i, 1, 1 + i % 9 + new)).collect() };
        let ids = ids(3 + new as u32, sequences);
        next = device.to_vec(&model.decode(&ids, &step, None, &mut caches, &mut decoder).unwrap()).unwrap();
    }
    [text, next]
}

/// The squares of the differences stay below this share of the CPU's, which runs the model of `on_cpu`.
fn logits_agree(
    gpu: &Cuda,
    [artifact, on_cpu]: [&Path; 2],
    sizes: (usize, usize),
    kv_dtype: KvDtype,
    tolerance: f64,
) {
    let got = logits(gpu.clone(), artifact, sizes, kv_dtype);
    let expected = logits(Cpu::new(), on_cpu, sizes, kv_dtype);
    for (what, (got, expected)) in ["text", "step"].iter().zip(got.iter().zip(&expected)) {
        assert_eq!(got.len(), expected.len());
        let square = |x: &f32| (*x as f64).powi(2);
        let error: f64 = got.iter().zip(expected).map(|(a, b)| square(&(a - b))).sum();
        let nmse = error / expected.iter().map(square).sum::<f64>();
        let (rows, sequences) = sizes;
        let case = format!("{}, {what}, {rows} rows, {sequences} sequences", artifact.display());
        println!("{case}, {:?}, {kv_dtype:?} cache: nmse {nmse:.1e}", gpu.dtype());
        assert!(nmse <= tolerance, "{case}, {:?}, {kv_dtype:?} cache: {nmse:.1e}", gpu.dtype());
    }
}

/// Groups scattered over the inputs, as in published files.
const ACT_ORDER: &str = "--order act-order";

/// One number of rows for each way that a GPU has of multiplying, and one that fills up a captured step.
const SIZES: [(usize, usize); 5] = [(5, 1), (12, 8), (40, 12), (128, 64), (200, 100)];

#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_card_has_the_logits_of_the_cpu() {
    let gpu = Cuda::new(0, Dtype::F16, None).unwrap();
    for options in
        [ACT_ORDER, "--group-size 32 --asym", "--order file", "--bits 8 --group-size -1", "--bits 3"]
    {
        let artifact = artifact(options);
        // As for every product in 16 bits.
        SIZES.iter().for_each(|sizes| logits_agree(&gpu, [&artifact; 2], *sizes, KvDtype::Auto, 5e-4));
    }
}

/// A key that a GPU has a little differently may get the code beside the CPU's. Where it computes in f16 that is up to
/// one code in ten, with an error of a step where numbers are 40 steps large: 6e-5 of the square in every layer, beside
/// what f16 costs anyhow; bf16 is eight times as coarse. In f32 it is one code in many thousands, if the CPU multiplies in
/// f32 too: with quantized weights it rounds activations to 16 bits, so it gets the weights that the codes stand for. There
/// keys and values are decoded before they are used, as on every GPU before Hopper, in steps that are captured and replayed
/// while contexts grow.
#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn with_an_int8_cache_a_card_has_the_logits_of_the_cpu() {
    let (artifact, plain) = (artifact(ACT_ORDER), workplace("plain"));
    write_dequantized(&artifact, &ModelFolder::read(&demo()), 4, 1, &plain);
    for (dtype, tolerance) in [(Dtype::F16, 1e-3), (Dtype::BF16, 1e-2), (Dtype::F32, 1e-5)] {
        let gpu = Cuda::new(0, dtype, None).unwrap();
        for sizes in SIZES {
            logits_agree(&gpu, [&artifact, &plain], sizes, KvDtype::Int8, tolerance);
        }
    }
}

/// 200 tokens, each the most likely one by far: between the first two there are at least 0.04 nats at every place, where
/// scores of 16-bit activations are off by a hundredth.
#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_card_writes_the_text_of_the_cpu() {
    let text = |device: &str| {
        let mut command = gptq("generate");
        command.arg(demo()).args(["--prompt", "She was", "--device", device]);
        run(command.args(words("--max-new-tokens 200 --temperature 0 --repetition-penalty 1"))).ok()
    };
    assert_eq!(text("cuda"), text("cpu"));
}

/// Where the second best token is so many nats below the best, the scores of 16-bit activations say the same as exact
/// ones: logits around 16 differ by 2^-11 of them, three times over.
const CLEARLY: f32 = 0.025;

/// The most likely tokens after a prompt. A step that is captured once and replayed for every token must see the cache,
/// the position and the token of its own time.
fn likeliest<B: Backend>(model: &Model<B>, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let params = GenerateParams::new(tokens, Vec::new(), SamplingParams::greedy());
    let mut ids = Vec::new();
    generate(model, prompt, &params, &mut |id| {
        ids.push(id);
        ControlFlow::Continue(())
    })
    .unwrap();
    ids
}

/// By how much the best token after each one of a text is better than the second best.
fn gaps(model: &Model<Cpu>, ids: &[u32]) -> Vec<f32> {
    let cpu = model.backend();
    let hidden = model.forward(ids, &Batch::fresh([ids.len()]), None).unwrap();
    let best = cpu.top_logits(&model.logits(&hidden, 0..ids.len()).unwrap(), 2).unwrap();
    best.iter().map(|best| best.candidates[0].1 - best.candidates[1].1).collect()
}

/// Token by token, with the same text before: where the two devices part, the choice was a close one.
#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_card_chooses_the_tokens_of_the_cpu_where_the_choice_is_clear() {
    for options in [ACT_ORDER, "--group-size 32 --order file", "--bits 8 --group-size -1"] {
        let files = ModelFiles::open(&artifact(options)).unwrap();
        let on_cpu = Model::load(Cpu::new(), &files).unwrap();
        let on_gpu = Model::load(Cuda::new(0, Dtype::F16, None).unwrap(), &files).unwrap();
        let (mut text, mut close) = (vec![11, 402, 97], 0);
        let end = text.len() + 200;
        while text.len() < end {
            let expected = likeliest(&on_cpu, &text, end - text.len());
            let got = likeliest(&on_gpu, &text, expected.len());
            let same = got.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            let begin = text.len();
            text.extend(&expected[..(same + 1).min(expected.len())]);
            if same < expected.len() {
                let gap = gaps(&on_cpu, &text[..begin + same])[begin + same - 1];
                println!("{options}: token {} is {gap} nats ahead of {}", expected[same], got[same]);
                assert!(gap < CLEARLY, "{options}: at {} of {end}", begin + same);
                close += 1;
            }
        }
        // Otherwise nothing would be shown: such choices are one in a hundred.
        assert!(close <= 10, "{options}: {close} of 200");
    }
}

/// What an engine that serves one sequence at a time answers to several.
fn served<B: Backend>(model: &Model<B>, tasks: &[Task]) -> Vec<Vec<u32>> {
    let limits = EngineLimits {
        max_total_tokens: 128,
        prefill: PrefillLimits { alone: 64, beside: 64 },
        cache: CacheSize::Tokens(1024),
        max_running: 1,
        prefix_cache: false,
    };
    let (handle, inbox) = engine::handle();
    std::thread::scope(|scope| {
        scope.spawn(|| engine::run(model, limits, inbox).unwrap());
        let ask = |task: &Task| {
            let (events, answers) = engine::events();
            assert!(handle.submit(Request { task: task.clone(), events }));
            answers
        };
        let answers: Vec<_> = tasks.iter().map(ask).collect();
        let tokens = |events: Events| {
            events
                .filter_map(|event| match event {
                    Event::Token(token) => Some(token.id),
                    Event::Failed(message) => panic!("{message}"),
                    Event::Started(_) | Event::Prompt(_) => None,
                })
                .collect()
        };
        let all = answers.into_iter().map(tokens).collect();
        handle.stop();
        all
    })
}

/// The same tasks one by one without an engine.
fn generated<B: Backend>(model: &Model<B>, task: &Task) -> Vec<u32> {
    let params = GenerateParams::new(task.max_new_tokens, task.eos_token_ids.clone(), task.sampling.clone());
    let mut ids = Vec::new();
    let reason = generate(model, &task.prompt, &params, &mut |id| {
        ids.push(id);
        ControlFlow::Continue(())
    });
    // An engine reports the token that ends a text too.
    match reason.unwrap() {
        FinishReason::EosToken => ids.into_iter().chain([task.eos_token_ids[0]]).collect(),
        _ => ids,
    }
}

/// Both ask for steps ahead where the device works beside the host, and take a token that ends the text for what it is.
fn engine_agrees_with_sessions<B: Backend>(device: B) {
    let files = ModelFiles::open(&artifact(ACT_ORDER)).unwrap();
    let model = &Model::load(device, &files).unwrap();
    let task = |seed: u32, temperature: f32, repetition_penalty: f32| Task {
        prompt: (0..40).map(|i| (seed * 131 + i * 17) % 2000).collect(),
        max_new_tokens: 60,
        ..Task::new(
            Vec::new(),
            0,
            SamplingParams { temperature, top_p: 0.95, top_k: 50, repetition_penalty, seed: seed.into() },
        )
    };
    let mut tasks = vec![task(1, 0.0, 1.0), task(2, 0.9, 1.0), task(3, 0.9, 1.2), task(4, 1.3, 1.0)];
    // One that ends in the middle, while the next step is on its way.
    let end = generated(model, &tasks[3])[30];
    tasks.push(Task { eos_token_ids: vec![end], ..tasks[3].clone() });
    let expected: Vec<_> = tasks.iter().map(|task| generated(model, task)).collect();
    assert!(expected[4].len() <= 31);
    assert_eq!(served(model, &tasks), expected);
}

#[test]
fn an_engine_says_what_a_session_says() {
    engine_agrees_with_sessions(Cpu::new());
}

#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn an_engine_says_what_a_session_says_on_a_card() {
    engine_agrees_with_sessions(Cuda::new(0, Dtype::F16, None).unwrap());
}

/// A GPU that is lost, as by an address that does not exist: the engine tells waiting requests and ends. In a process of its
/// own, since nothing in it can compute on that GPU again.
#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_lost_card_ends_the_engine() {
    const INSIDE: &str = "GPTQ_TEST_LOSES_A_CARD";
    let Some(folder) = std::env::var_os(INSIDE) else {
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", "on_gpu::a_lost_card_ends_the_engine", "--include-ignored", "--nocapture"]);
        assert!(again.env(INSIDE, artifact(ACT_ORDER)).status().unwrap().success());
        return;
    };
    let files = ModelFiles::open(Path::new(&folder)).unwrap();
    let model = &Model::load(Cuda::new(0, Dtype::F16, None).unwrap(), &files).unwrap();
    let limits = EngineLimits {
        max_total_tokens: 128,
        prefill: PrefillLimits { alone: 64, beside: 64 },
        cache: CacheSize::Share(0.5),
        max_running: 4,
        prefix_cache: true,
    };
    let (handle, inbox) = engine::handle();
    std::thread::scope(|scope| {
        let engine = scope.spawn(|| engine::run(model, limits, inbox));
        let ask = || {
            let (events, answers) = engine::events();
            let task = Task::new(vec![1, 2, 3], 4, SamplingParams::greedy());
            (handle.submit(Request { task, events }), answers)
        };
        let last = |answers: Events| answers.last();
        let (_, answers) = ask();
        assert!(matches!(last(answers), Some(Event::Token(token)) if token.finish.is_some()));
        let total = handle.stats.total_blocks.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(total, 4 * 128 / KV_BLOCK_ROWS, "what four sequences can use, not half a GPU");
        lose_the_card();
        assert!(model.backend().synchronize().is_err());
        let (_, answers) = ask();
        assert!(matches!(last(answers), Some(Event::Failed(_))), "waiting requests are told");
        println!(
            "the engine ended: {:?}",
            engine.join().unwrap().map_err(|error| error.to_string()).unwrap_err()
        );
        assert!(!handle.stats.ready.load(std::sync::atomic::Ordering::Relaxed));
        assert!(!ask().0, "and takes nothing more");
    });
    // Everything on the GPU is gone; freeing it would fail once more.
    std::process::exit(0);
}

/// Runs a kernel that stops, in the context that every user of the GPU in this process shares.
#[expect(unsafe_code, reason = "a kernel of its own")]
fn lose_the_card() {
    use cudarc::driver::{CudaContext, LaunchConfig};
    let ptx = cudarc::nvrtc::compile_ptx(r#"extern "C" __global__ void stop() { asm("trap;"); }"#).unwrap();
    let stream = CudaContext::new(0).unwrap().default_stream();
    let stop = stream.context().load_module(ptx).unwrap().load_function("stop").unwrap();
    // SAFETY: the kernel has no parameters and touches no memory.
    unsafe { stream.launch_builder(&stop).launch(LaunchConfig::for_num_elems(1)) }.unwrap();
    assert!(stream.synchronize().is_err());
}
