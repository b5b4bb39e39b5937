//! The engine on a small random model: what it saves must not change what it says.

use std::path::Path;

use gptq_kernels::{Cpu, KvDtype};

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

fn engine(model: &Model<Cpu>, max_batch_total_tokens: usize) -> Engine<LocalExecutor<'_, Cpu>> {
    let limits = EngineLimits {
        max_total_tokens: 128,
        prefill: PrefillLimits { alone: 32, beside: 32 },
        cache: CacheSize::Tokens(max_batch_total_tokens),
        max_running: 16,
        prefix_cache: true,
    };
    let blocks = max_batch_total_tokens / KV_BLOCK_ROWS;
    let mut executor = LocalExecutor::new(model);
    executor.allocate_cache(blocks).unwrap();
    Engine::new(executor, limits, blocks)
}

fn ask(engine: &mut Engine<LocalExecutor<'_, Cpu>>, prompt: &[u32]) -> Events {
    ask_with(engine, prompt, |_| ())
}

fn ask_with(
    engine: &mut Engine<LocalExecutor<'_, Cpu>>,
    prompt: &[u32],
    change: impl FnOnce(&mut Task),
) -> Events {
    let (events, receiver) = super::events();
    let mut task = Task::new(prompt.to_vec(), NEW_TOKENS, SamplingParams::greedy());
    change(&mut task);
    engine.accept(Request { task, events });
    receiver
}

fn finish(engine: &mut Engine<LocalExecutor<'_, Cpu>>) {
    while !engine.scheduler.is_idle() {
        engine.try_step().unwrap();
    }
    assert_eq!(engine.scheduler.blocks.used(), 0);
}

fn tokens(events: Events) -> Vec<u32> {
    let mut ids = Vec::new();
    while let Ok(event) = events.try_recv() {
        match event {
            Event::Token(token) => ids.push(token.id),
            Event::Started(_) | Event::Prompt(_) => {}
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
fn one_by_one(engine: &mut Engine<LocalExecutor<'_, Cpu>>) -> Vec<Vec<u32>> {
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
    drop(ask(&mut engine, &long));
    let _events = ask(&mut engine, &long);
    engine.try_step().unwrap();
    assert_eq!(engine.stats.steps.load(Relaxed), before + 1);
    assert_eq!(
        engine.stats.cached_tokens.load(Relaxed),
        7 * 32 + 64,
        "a next turn finds the answer before it"
    );
}

/// The prompt as it was reported, before anything else.
fn reported(events: Events) -> Vec<PromptToken> {
    assert!(matches!(events.try_recv(), Ok(Event::Started(_))));
    match events.try_recv() {
        Ok(Event::Prompt(prompt)) => prompt,
        other => panic!("{other:?}"),
    }
}

/// The same from one pass over the whole prompt, without cache, scheduler or chunks.
fn expected(model: &Model<Cpu>, prompt: &[u32]) -> Vec<f32> {
    let hidden = model.forward(prompt, &gptq_kernels::Batch::fresh([prompt.len()]), None).unwrap();
    let logits = model.logits(&hidden, 0..prompt.len() - 1).unwrap();
    let losses = gptq_kernels::TokenLoss::token_loss(model.backend(), &logits, &prompt[1..]).unwrap();
    losses.into_iter().map(|loss| -loss).collect()
}

#[test]
fn prompt_probabilities_are_those_of_one_pass_also_in_chunks_after_a_cache_hit_and_after_preemption() {
    let folder = folder();
    let model = model(folder.path());
    // Room for two or three prompts of eight, of which the longest take three chunks.
    let mut engine = engine(&model, 128);
    let wanted = |task: &mut Task| (task.prompt_logprobs, task.top_n) = (true, 3);
    for round in ["unknown", "known to the prefix cache"] {
        let events: Vec<_> =
            prompts().iter().rev().map(|prompt| ask_with(&mut engine, prompt, wanted)).collect();
        finish(&mut engine);
        for (events, prompt) in events.into_iter().zip(prompts().iter().rev()) {
            let got = reported(events);
            assert_eq!(got.iter().map(|token| token.id).collect::<Vec<_>>(), *prompt, "{round}");
            assert_eq!((got[0].logprob, got[0].top.len()), (None, 0));
            for (token, expected) in got[1..].iter().zip(expected(&model, prompt)) {
                // Attention over blocks adds in another order: a last place or two of numbers near 5.
                assert!(token.logprob.is_some_and(|got| (got - expected).abs() < 2e-6), "{round}: {token:?}");
                assert_eq!(token.top.len(), 3);
                // Two ways to the same sum over 96 tokens.
                let own = token.top.iter().find(|top| top.id == token.id);
                assert!(own.is_none_or(|own| (own.logprob - expected).abs() < 1e-5), "{round}: {token:?}");
                assert!(own.is_some() || token.top[2].logprob >= expected, "{round}: {token:?}");
            }
        }
    }
    assert!(engine.stats.preemptions.load(Relaxed) > 0, "the cache was large enough for all");
}

#[test]
fn a_prompt_that_gives_up_its_blocks_half_read_has_every_probability_once() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = engine(&model, 128);
    // The second prompt takes 32 steps; after 18 the answer before it needs the fifth of eight blocks.
    engine.limits.prefill = PrefillLimits { alone: 3, beside: 3 };
    engine.scheduler = engine.limits.scheduler(128 / KV_BLOCK_ROWS);
    let _older = ask(&mut engine, &[7; 47]);
    let prompt: Vec<u32> = (0..64).map(|i| i * 5 % 96).collect();
    let events = ask_with(&mut engine, &prompt, |task| task.prompt_logprobs = true);
    finish(&mut engine);
    assert!(engine.stats.preemptions.load(Relaxed) > 0 && engine.stats.cached_tokens.load(Relaxed) > 0);
    let got = reported(events);
    assert_eq!(got.iter().map(|token| token.id).collect::<Vec<_>>(), prompt);
    for (token, expected) in got[1..].iter().zip(expected(&model, &prompt)) {
        assert!(token.logprob.is_some_and(|got| (got - expected).abs() < 2e-6), "{token:?}");
    }
}

#[test]
fn prompt_probabilities_change_no_token_and_a_prompt_of_one_token_has_one() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = engine(&model, 1024);
    let answers: Vec<_> = prompts()
        .iter()
        .map(|prompt| {
            let events = ask_with(&mut engine, prompt, |task| task.prompt_logprobs = true);
            finish(&mut engine);
            tokens(events)
        })
        .collect();
    assert_eq!(answers, alone(&model));
    let events = ask_with(&mut engine, &[5], |task| task.prompt_logprobs = true);
    finish(&mut engine);
    assert_eq!(reported(events), [PromptToken { id: 5, logprob: None, top: Vec::new() }]);
}

#[test]
fn a_prompt_alone_is_scored_among_others_and_gets_no_token() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = engine(&model, 128);
    let wanted = |task: &mut Task| (task.prompt_logprobs, task.max_new_tokens) = (true, 0);
    let alone = ask_with(&mut engine, &[5], wanted);
    let answered = ask(&mut engine, &prompts()[7]);
    let scored: Vec<_> = prompts().iter().map(|prompt| ask_with(&mut engine, prompt, wanted)).collect();
    finish(&mut engine);
    assert_eq!(reported(alone), [PromptToken { id: 5, logprob: None, top: Vec::new() }]);
    assert_eq!(tokens(answered).len() as u64, engine.stats.tokens.load(Relaxed));
    for (events, prompt) in scored.into_iter().zip(prompts()) {
        assert!(matches!(events.try_recv(), Ok(Event::Started(_))));
        let Ok(Event::Prompt(got)) = events.try_recv() else { panic!("no prompt") };
        assert!(events.try_recv().is_err(), "nothing comes after it");
        for (token, expected) in got[1..].iter().zip(expected(&model, &prompt)) {
            assert!(token.logprob.is_some_and(|got| (got - expected).abs() < 2e-6), "{token:?}");
        }
    }
}

#[test]
fn a_text_ends_only_after_its_least_number_of_tokens_also_ahead() {
    let folder = folder();
    let model = model(folder.path());
    let ends: Vec<u32> = alone(&model).iter().map(|answer| answer[1]).collect();
    for least in [0, 6] {
        let change = |task: &mut Task| (task.eos_token_ids, task.min_new_tokens) = (ends.clone(), least);
        let (expected, _) = said(&mut engine(&model, 1024), change);
        let (got, ahead) = said(&mut scheduling_ahead(&model, 1024), change);
        assert_eq!(got, expected);
        assert!(ahead > 0);
        for answer in expected {
            let end = answer.iter().position(|id| ends.contains(id)).unwrap_or(NEW_TOKENS);
            assert!(end >= least && answer.len() == NEW_TOKENS.min(end + 1), "{least}: {answer:?}");
        }
    }
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

/// Attention reads codes, also of tokens of the same step: neither chunks nor a hit nor computing again shows.
#[test]
fn an_int8_cache_says_the_same_whether_it_finds_or_computes_and_after_preemption() {
    let folder = folder();
    let model = model(folder.path()).with_kv_dtype(KvDtype::Int8);
    let expected = alone(&model);
    let mut finds = engine(&model, 1024);
    assert_eq!(one_by_one(&mut finds), expected);
    assert_eq!(finds.stats.cached_tokens.load(Relaxed), 7 * 32);

    let mut computes = engine(&model, 1024);
    computes.limits.prefix_cache = false;
    computes.scheduler = computes.limits.scheduler(1024 / KV_BLOCK_ROWS);
    assert_eq!(one_by_one(&mut computes), expected);

    let mut preempts = engine(&model, 128);
    let events: Vec<_> = prompts().iter().rev().map(|prompt| ask(&mut preempts, prompt)).collect();
    finish(&mut preempts);
    assert!(preempts.stats.preemptions.load(Relaxed) > 0, "the cache was large enough for all");
    assert_eq!(events.into_iter().rev().map(tokens).collect::<Vec<_>>(), expected);
}

/// An engine whose device is said to work beside the host.
fn scheduling_ahead(model: &Model<Cpu>, max_batch_total_tokens: usize) -> Engine<LocalExecutor<'_, Cpu>> {
    Engine { async_scheduling: true, ..engine(model, max_batch_total_tokens) }
}

/// What each prompt got until it ended, and how often a step was on its way while tokens were taken.
fn said(engine: &mut Engine<LocalExecutor<'_, Cpu>>, change: impl Fn(&mut Task)) -> (Vec<Vec<u32>>, usize) {
    let events: Vec<_> = prompts().iter().map(|prompt| ask_with(engine, prompt, &change)).collect();
    let mut ahead = 0;
    while !engine.scheduler.is_idle() {
        engine.try_step().unwrap();
        ahead += usize::from(engine.next.is_some());
    }
    assert_eq!(engine.scheduler.blocks.used(), 0);
    let ids = |events: Events| {
        let tokens = std::iter::from_fn(|| events.try_recv().ok());
        tokens
            .filter_map(|event| if let Event::Token(token) = event { Some(token.id) } else { None })
            .collect()
    };
    let answers: Vec<Vec<u32>> = events.into_iter().map(ids).collect();
    let handed_out: usize = answers.iter().map(Vec::len).sum();
    assert_eq!(
        engine.stats.tokens.load(Relaxed),
        handed_out as u64,
        "tokens that are discarded do not count"
    );
    (answers, ahead)
}

#[test]
fn steps_that_were_asked_for_ahead_change_no_answer() {
    let folder = folder();
    let model = model(folder.path());
    let ends: Vec<u32> = alone(&model).iter().take(3).map(|answer| answer[9]).collect();
    let warm = SamplingParams { temperature: 0.9, top_p: 0.95, top_k: 30, repetition_penalty: 1.0, seed: 4 };
    for (risk, tokens, looks) in [("room for all", 1024, true), ("a sequence is preempted", 160, false)] {
        for (what, change) in [
            ("to the last token", &(|_: &mut Task| ()) as &dyn Fn(&mut Task)),
            ("some end before", &|task: &mut Task| task.eos_token_ids = ends.clone()),
            ("token", &|task: &mut Task| task.sampling = warm.clone()),
            ("of different lengths", &|task: &mut Task| task.max_new_tokens = 1 + task.prompt.len() % 9),
        ] {
            let (expected, never) = said(&mut engine(&model, 1024), change);
            let (got, ahead) = said(&mut scheduling_ahead(&model, tokens), change);
            assert_eq!(got, expected, "{risk}, {what}");
            assert_eq!(never, 0, "a device that works at once");
            assert!(ahead > 0 || !looks, "{risk}, {what}: nothing was scheduled ahead");
        }
    }
}

#[test]
fn what_depends_on_the_last_token_is_not_asked_for_before_it_is_known() {
    let folder = folder();
    let model = model(folder.path());
    for change in [
        &(|task: &mut Task| task.sampling.repetition_penalty = 1.3) as &dyn Fn(&mut Task),
        &|task: &mut Task| task.adjustments.frequency_penalty = 0.7,
        &|task: &mut Task| task.top_n = 2,
        &|task: &mut Task| task.max_new_tokens = 1,
    ] {
        let (expected, _) = said(&mut engine(&model, 1024), change);
        assert_eq!(said(&mut scheduling_ahead(&model, 1024), change), (expected, 0));
    }
}

#[test]
fn clients_come_and_go_while_a_step_is_on_its_way() {
    let folder = folder();
    let model = model(folder.path());
    let expected = alone(&model);
    let mut engine = scheduling_ahead(&model, 1024);
    let stays = ask(&mut engine, &prompts()[0]);
    let leaves = ask(&mut engine, &prompts()[1]);
    while engine.next.is_none() {
        engine.try_step().unwrap();
    }
    // The gauges go on while nothing but steps ahead is asked for.
    let before = engine.stats.used_blocks.load(Relaxed);
    (0..16).for_each(|_| engine.try_step().unwrap());
    assert!(engine.next.is_some() && engine.stats.used_blocks.load(Relaxed) > before);
    drop(leaves);
    let comes = ask(&mut engine, &prompts()[2]);
    engine.try_step().unwrap();
    assert!(engine.next.is_none(), "nothing is computed for sequences that have ended");
    finish(&mut engine);
    assert_eq!([tokens(stays), tokens(comes)], [expected[0].clone(), expected[2].clone()]);
    // What was generated is cached, and found by the next turn.
    let long: Vec<u32> = prompts()[0].iter().chain(&expected[0]).copied().chain([5]).collect();
    let before = engine.stats.cached_tokens.load(Relaxed);
    let _events = ask(&mut engine, &long);
    finish(&mut engine);
    assert_eq!(engine.stats.cached_tokens.load(Relaxed) - before, 64);
}

#[test]
fn a_request_that_cannot_be_computed_fails_alone() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = engine(&model, 1024);
    let sound = ask(&mut engine, &prompts()[0]);
    let beyond = ask(&mut engine, &[1, 96]);
    finish(&mut engine);
    assert_eq!(beyond.try_recv(), Ok(Event::Failed("prompt: expected token ids below 96, got 96".into())));
    assert_eq!(tokens(sound), alone(&model)[0]);
}

#[test]
fn a_lost_device_is_told_to_everybody_who_waits() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = Engine {
        limits: EngineLimits { max_running: 1, ..engine(&model, 1024).limits },
        ..engine(&model, 1024)
    };
    let waits = ask(&mut engine, &prompts()[0]);
    let (handle, inbox) = handle();
    let (events, queued) = super::events();
    let task = Task::new(prompts()[1].clone(), 1, SamplingParams::greedy());
    assert!(handle.submit(Request { task, events }));
    engine.stats.ready.store(true, Relaxed);
    engine.give_up("lost", &inbox.requests);
    assert!(!engine.stats.ready.load(Relaxed), "unhealthy from now on");
    for events in [&waits, &queued] {
        assert_eq!(events.try_recv(), Ok(Event::Failed("lost".into())));
    }
}

#[test]
fn short_prompts_that_come_together_are_computed_together() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = engine(&model, 1024);
    engine.scheduler = Scheduler::new(64, PrefillLimits { alone: 40, beside: 8 }, 16, false);
    let _runs = ask(&mut engine, &[1, 2, 3]);
    engine.try_step().unwrap();
    let _long = ask(&mut engine, &prompts()[0][..30]);
    let _short: Vec<_> = (0..4).map(|i| ask(&mut engine, &[i; 8])).collect();
    let step = engine.scheduler.schedule();
    let rows: Vec<_> = step.batch.sequences.iter().map(|sequence| sequence.rows).collect();
    let parts = "one decodes, as much of the long one as makes eight rows with it, all of the short ones";
    assert_eq!(rows, [1, 7, 8, 8, 8, 8], "{parts}");
}

#[test]
fn a_long_prompt_holds_up_a_running_answer_by_its_share_only() {
    let folder = folder();
    let model = model(folder.path());
    let mut engine = engine(&model, 1024);
    engine.scheduler = Scheduler::new(64, PrefillLimits { alone: 40, beside: 8 }, 16, false);
    let short = ask(&mut engine, &[1, 2, 3]);
    engine.try_step().unwrap();
    let long = ask(&mut engine, &prompts()[0][..40]);
    let steps = |engine: &Engine<LocalExecutor<'_, Cpu>>| engine.stats.steps.load(Relaxed);
    let (before, tokens_before) = (steps(&engine), engine.stats.tokens.load(Relaxed));
    while engine.scheduler.running.len() < 2 || engine.scheduler.running[1].pending() > 1 {
        engine.try_step().unwrap();
    }
    assert_eq!(steps(&engine) - before, 6, "40 tokens, 7 a step");
    assert_eq!(
        engine.stats.tokens.load(Relaxed) - tokens_before,
        7,
        "one a step, and the first of the long one"
    );
    finish(&mut engine);
    assert_eq!([tokens(short).len(), tokens(long).len()], [NEW_TOKENS; 2]);
}
