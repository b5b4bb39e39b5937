//! Every family from end to end: quantized, written under the names that other tools know, predicted, read back.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use gptq_kernels::{Backend, Cpu, Cuda, Dtype};
use gptq_quantizer::Error;
use gptq_quantizer::artifact::OutMode;
use gptq_quantizer::plan::{Branch, Plan};
use gptq_quantizer::produce::{Event, Job, Source, produce};
use gptq_quantizer::recipe::Preset;
use gptq_quantizer::record::QuantizeLog;
use gptq_quantizer::sequential::ActivationCache;
use gptq_quantizer::table;
use gptq_runtime::config::{ModelConfig, PRESETS};
use gptq_runtime::layout;
use gptq_runtime::model::{Model, ModelFiles};
use gptq_runtime::perplexity::{Baseline, evaluate};

use crate::model_folder::ModelFolder;
use crate::program::workplace;
use crate::support::golden;

/// Of `tests/golden/families`, by name.
fn families() -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(golden("families")).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = entries
        .filter(|dir| dir.join("config.json").exists())
        .map(|dir| (dir.file_name().unwrap().to_str().unwrap().to_owned(), dir))
        .collect();
    all.sort();
    assert_eq!(all.len(), 22);
    all
}

/// Sequences of random tokens.
fn random(seed: u64, count: usize, length: usize) -> Vec<Vec<u32>> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % 320
    };
    (0..count).map(|_| (0..length).map(|_| next()).collect()).collect()
}

/// As `quantize` makes it by default, with both streams.
fn branch() -> Branch {
    Branch { recipe: Preset::Best.recipe(), ..Branch::new("main".into(), 4, Some(32)) }
}

/// Four bits, on 16 sequences of 128 random tokens.
fn quantized(name: &str, dir: &Path, out: &Path) -> QuantizeLog {
    made(name, dir, out, false).unwrap()
}

/// The same, or stopped behind the first layer that it solves.
fn made(name: &str, dir: &Path, out: &Path, stops: bool) -> gptq_quantizer::Result<QuantizeLog> {
    made_on(&Cpu::new(), name, (dir, out), stops)
}

fn made_on<B: Backend>(
    device: &B,
    name: &str,
    (dir, out): (&Path, &Path),
    stops: bool,
) -> gptq_quantizer::Result<QuantizeLog> {
    let stop = AtomicBool::new(false);
    let (files, sequences) = (ModelFiles::open(dir).unwrap(), random(1, 16, 128));
    let params = branch().params();
    let source = Source::check(name, dir, &files).unwrap();
    let job = Job { mode: OutMode::Resume, stop: &stop, ..Job::new(&source, &params, &sequences, out) };
    let activations = ActivationCache::embed(device, &files, &sequences, params.layout()).unwrap();
    produce(device, &job, activations, &mut |event| {
        if let Event::Solving { .. } = event {
            stop.store(stops, Ordering::Relaxed);
        }
    })
}

/// Names of the source's tensors as GPTQModel names those of its files.
fn expected_names(source: &ModelFolder) -> BTreeSet<String> {
    let kept = ["embed_tokens", "lm_head", ".gate", "shared_expert_gate"];
    let names = |(name, tensor): (&String, &crate::model_folder::Tensor)| match name.strip_suffix(".weight") {
        Some(module) if tensor.shape.len() == 2 && !kept.iter().any(|kept| module.ends_with(kept)) => {
            ["qweight", "qzeros", "scales", "g_idx", "bias"].map(|part| format!("{module}.{part}")).to_vec()
        }
        _ => vec![name.clone()],
    };
    source.tensors.iter().flat_map(names).collect()
}

#[test]
fn every_family_is_quantized_under_the_known_names_and_read_back() {
    let work = workplace("families");
    for (name, dir) in families() {
        let out = work.join(&name);
        let log = quantized(&name, &dir, &out);
        let (source, artifact) = (ModelFolder::read(&dir), ModelFolder::read(&out));
        let names: BTreeSet<String> = artifact.tensors.keys().cloned().collect();
        assert_eq!(names, expected_names(&source), "{name}");

        let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
        let plan = Plan { branches: vec![branch()] };
        let predicted = table::predict(&config, &plan, "random", 128).unwrap()[0].size_bytes;
        assert_eq!(predicted, std::fs::metadata(out.join("model.safetensors")).unwrap().len(), "{name}");

        let load = |dir: &Path| Model::load(Cpu::new(), &ModelFiles::open(dir).unwrap()).unwrap();
        let (original, quantized) = (load(&dir), load(&out));
        let windows = random(2, 4, 128);
        let beside = Some(Baseline::Beside(&original));
        let result = evaluate(&quantized, beside, &windows, &mut |_| ControlFlow::Continue(())).unwrap();
        let (compared, held_out) = (result.comparison.unwrap(), log.held_out.unwrap());
        println!(
            "{name}: perplexity {:.2} of {:.2}, KL divergence {:.4}, of held-out sequences {:.4}",
            result.perplexity, compared.baseline_perplexity, compared.kl_divergence, held_out.kl_divergence
        );
        // Four bits in groups of 32 of random weights leave .0003 to .12.
        assert!(compared.kl_divergence < 0.2 && held_out.kl_divergence < 0.2, "{name}");
    }
}

/// What a GPU makes of a family, and how it runs what it made: quantized there, loaded there and on the CPU, and compared
/// by what both expect of every token.
#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn every_family_is_quantized_and_run_on_a_gpu() {
    let work = workplace("families-gpu");
    let windows = random(2, 4, 128);
    for dtype in [Dtype::F32, Dtype::F16] {
        let device = Cuda::new(0, dtype, None).unwrap();
        for (name, dir) in families() {
            let out = work.join(format!("{name}-{dtype:?}"));
            let log = made_on(&device, &name, (&dir, &out), false).unwrap();
            let on_gpu = Model::load(device.clone(), &ModelFiles::open(&out).unwrap()).unwrap();
            let on_cpu = Model::load(Cpu::new(), &ModelFiles::open(&out).unwrap()).unwrap();
            let baseline = Some(Baseline::OnCpu(&on_cpu));
            let result = evaluate(&on_gpu, baseline, &windows, &mut |_| ControlFlow::Continue(())).unwrap();
            let (devices, held_out) = (result.comparison.unwrap(), log.held_out.unwrap());
            println!(
                "{name}, {dtype:?}: perplexity {:.2}, on the CPU {:.2}, KL divergence {:.1e}; of held-out sequences to the \
                 unquantized model {:.4}",
                result.perplexity, devices.baseline_perplexity, devices.kl_divergence, held_out.kl_divergence
            );
            // Experts are chosen by scores that may be as good as equal: then a token goes to another one, in f32 too, since
            // the CPU multiplies codes by activations of 16 bits.
            let most = match (on_gpu.config.experts.is_some(), dtype) {
                (false, Dtype::F32) => 1e-5,
                (true, Dtype::F32) => 1e-3,
                _ => 1e-2,
            };
            assert!(devices.kl_divergence < most && held_out.kl_divergence < 0.2, "{name}, {dtype:?}");
        }
    }
}

/// Experts of random routers get tokens unevenly, and few of them: what they got is written down.
#[test]
fn tokens_of_every_expert_are_counted() {
    let work = workplace("expert-tokens");
    for name in ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"] {
        let dir = golden(&format!("families/{name}"));
        let experts = ModelConfig::from_file(&dir.join("config.json")).unwrap().experts.unwrap();
        let log = quantized(name, &dir, &work.join(name));
        assert_eq!(log.experts().count(), experts.layers.iter().filter(|has| **has).count(), "{name}");
        for layer in log.experts() {
            // Two of 16 sequences are held out.
            assert_eq!(layer.tokens.iter().sum::<usize>(), 14 * 128 * experts.per_token, "{name}");
            let few = |expert: &usize| layer.tokens[*expert] < 128;
            assert_eq!(layer.starved, (0..experts.count).filter(few).collect::<Vec<_>>(), "{name}");
        }
    }
}

#[test]
fn a_stopped_run_over_experts_and_norms_ends_in_the_same_bytes() {
    let work = workplace("families-stopped");
    for name in ["qwen2_moe", "glm4_moe", "gemma2"] {
        let dir = golden(&format!("families/{name}"));
        let [whole, stopped] = ["whole", "stopped"].map(|how| work.join(format!("{name}-{how}")));
        quantized(name, &dir, &whole);
        let layers = ModelConfig::from_file(&dir.join("config.json")).unwrap().num_hidden_layers;
        for layer in 1..layers {
            let error = made(name, &dir, &stopped, true).unwrap_err();
            assert!(matches!(error, Error::Stopped { done, .. } if done == layer), "{name}: {error}");
        }
        quantized(name, &dir, &stopped);
        let bytes = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
        assert!(bytes(&whole) == bytes(&stopped), "{name}");
    }
}

#[test]
fn configs_of_all_families_and_presets_are_written_as_they_are_read() {
    let of_files = families().into_iter().map(|(_, dir)| ModelConfig::from_file(&dir.join("config.json")));
    for config in of_files.chain(PRESETS.iter().map(|name| ModelConfig::preset(name))) {
        let config = config.unwrap();
        let again = ModelConfig::from_json(&config.to_json(), Path::new("written")).unwrap();
        assert_eq!(again, config);
        assert!(layout::checkpoint_tensors(&config).iter().all(|spec| spec.elements() > 0));
    }
}
