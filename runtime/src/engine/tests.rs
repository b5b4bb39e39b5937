//! The engine on a small random model: what it saves must not change what it says.

use std::path::Path;

use gptq_kernels::Cpu;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;
use crate::config::ModelConfig;
use crate::model::ModelFiles;
use crate::synth;

const NEW_TOKENS: usize = 24;

pub fn folder() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 96, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "torch_dtype": "float16",
        "tie_word_embeddings": false}"#;
    let path = root.path().join("config.json");
    std::fs::write(&path, config).unwrap();
    let config = ModelConfig::from_file(&path).unwrap();
    synth::write_checkpoint(&config, &root.path().join("model"), 1, u64::MAX, &|_, _| ()).unwrap();
    root
}

pub fn model(folder: &Path) -> Model<Cpu> {
    Model::load(Cpu::new(), &ModelFiles::open(&folder.join("model")).unwrap()).unwrap()
}

fn engine(model: &Model<Cpu>, max_batch_total_tokens: usize) -> Engine<'_, Cpu> {
    let limits = EngineLimits {
        max_total_tokens: 128,
        max_batch_prefill_tokens: 32,
        max_batch_total_tokens,
        max_running: 16,
        prefix_cache: true,
    };
    let blocks = max_batch_total_tokens / KV_BLOCK_ROWS;
    let runner = Runner::new(model, blocks).unwrap();
    Engine { runner, scheduler: limits.scheduler(blocks), limits, stats: Arc::default() }
}

fn ask(engine: &mut Engine<'_, Cpu>, prompt: &[u32]) -> UnboundedReceiver<Event> {
    let (events, receiver) = unbounded_channel();
    let sampling =
        SamplingParams { temperature: 0.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed: 0 };
    let task = Task {
        prompt: prompt.to_vec(),
        max_new_tokens: NEW_TOKENS,
        eos_token_ids: Vec::new(),
        sampling,
        adjustments: Adjustments::default(),
        top_n: 0,
    };
    engine.accept(Request { task, events });
    receiver
}

fn finish(engine: &mut Engine<'_, Cpu>) {
    while !engine.scheduler.is_idle() {
        engine.try_step().unwrap();
    }
    assert_eq!(engine.scheduler.blocks.used(), 0);
}

fn tokens(mut events: UnboundedReceiver<Event>) -> Vec<u32> {
    let mut ids = Vec::new();
    while let Ok(event) = events.try_recv() {
        match event {
            Event::Token(token) => ids.push(token.id),
            Event::Started(_) => {}
            Event::Failed(message) => panic!("{message}"),
        }
    }
    assert_eq!(ids.len(), NEW_TOKENS);
    ids
}

/// Prompts with the same 40 tokens in front, of different lengths.
fn prompts() -> Vec<Vec<u32>> {
    let of = |i: u32| (0..40).map(|j| j * 7 % 96).chain((0..3 * i + 1).map(|j| (i * 11 + j) % 96)).collect();
    (0..8).map(of).collect()
}

/// Each prompt after the one before it has its answer.
fn one_by_one(engine: &mut Engine<'_, Cpu>) -> Vec<Vec<u32>> {
    let each = |prompt: &Vec<u32>| {
        let events = ask(engine, prompt);
        finish(engine);
        tokens(events)
    };
    prompts().iter().map(each).collect()
}

/// Each prompt in an engine that knows nothing yet.
fn alone(model: &Model<Cpu>) -> Vec<Vec<u32>> {
    let each = |prompt: &Vec<u32>| {
        let mut engine = engine(model, 1024);
        let events = ask(&mut engine, prompt);
        finish(&mut engine);
        assert_eq!(engine.stats.cached_tokens.load(Relaxed), 0);
        tokens(events)
    };
    prompts().iter().map(each).collect()
}

#[test]
fn a_shared_beginning_is_computed_once_and_changes_no_token() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = engine(&model, 1024);
    let answers = one_by_one(&mut engine);
    assert_eq!(answers, alone(&model));
    assert_eq!(engine.stats.cached_tokens.load(Relaxed), 7 * 32, "two full blocks for all but the first");

    let before = engine.stats.steps.load(Relaxed);
    let long: Vec<u32> = prompts()[0].iter().chain(&answers[0]).copied().chain([5]).collect();
    ask(&mut engine, &long).close();
    let _events = ask(&mut engine, &long);
    engine.try_step().unwrap();
    assert_eq!(engine.stats.steps.load(Relaxed), before + 1);
    assert_eq!(
        engine.stats.cached_tokens.load(Relaxed),
        7 * 32 + 64,
        "a next turn finds the answer before it"
    );
}

#[test]
fn without_the_prefix_cache_nothing_is_found_and_every_answer_is_the_same() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = engine(&model, 1024);
    engine.limits.prefix_cache = false;
    engine.scheduler = engine.limits.scheduler(1024 / KV_BLOCK_ROWS);
    let answers = one_by_one(&mut engine);
    assert_eq!(answers, alone(&model));
    assert_eq!(engine.stats.cached_tokens.load(Relaxed), 0);
}

#[test]
fn sequences_that_give_up_their_blocks_say_the_same_tokens() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = engine(&model, 128);
    let events: Vec<_> = prompts().iter().rev().map(|prompt| ask(&mut engine, prompt)).collect();
    finish(&mut engine);
    assert!(engine.stats.preemptions.load(Relaxed) > 0, "the cache was large enough for all");
    let mut answers: Vec<_> = events.into_iter().map(tokens).collect();
    answers.reverse();
    assert_eq!(answers, alone(&model));
}
