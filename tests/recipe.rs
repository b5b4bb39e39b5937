//! What the pieces of a recipe are worth, on tokens that solving did not see and in plain f64; and that only what such
//! tokens speak for is kept.

use gptq_kernels::packing::PackedLinear;
use gptq_kernels::{Batch, Cpu, Device, Dtype, GptqSweep, GridKind, Hessian, HostTensor, MatMul, TokenLoss};
use gptq_quantizer::gptq::{GptqParams, Method, Solved, StageWeights, solve};
use gptq_quantizer::moments::{Evidence, Moments, Reaching};
use gptq_quantizer::recipe::{Order, Preset, Recipe, Target};
use gptq_runtime::model::{Model, ModelFiles};
use gptq_runtime::quant_config::QuantConfig;
use serde_json::Value;

use crate::program::{artifact, demo, demo_text, gptq, quantize, run, words, workplace};
use gptq_calibration::dataset::{self, DatasetRoots, Join};
use gptq_calibration::sampling::{SampleRequest, Sampling};
use gptq_text::tokenizer::Tokenizer;

/// Two linears that share an input.
const OUTPUTS: [usize; 2] = [32, 64];
const OUT: usize = 96;
const IN: usize = 192;
const TOKENS: usize = 900;

/// Even pseudorandom numbers from -1 to 1.
fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

/// Inputs as the unquantized model has them, and as quantized stages before make them of the same tokens: off by a part
/// that follows the input, `sway` of it, and by noise.
struct Tokens {
    original: Vec<f32>,
    quantized: Vec<f32>,
}

impl Tokens {
    fn new(seed: u64, sway: f32) -> Self {
        let (noise, shared) = (random(seed, TOKENS * IN), random(seed + 1, TOKENS * 8));
        let (mixing, other) = (random(5, 8 * IN), random(6, 8 * IN));
        let mixed = |mixing: &[f32], i: usize| -> f32 {
            let (t, j) = (i / IN, i % IN);
            (0..8).map(|k| shared[t * 8 + k] * mixing[k * IN + j]).sum()
        };
        let original: Vec<f32> = (0..TOKENS * IN).map(|i| mixed(&mixing, i) + 0.3 * noise[i]).collect();
        let rounding = random(seed + 2, TOKENS * IN);
        let off = |i: usize| original[i] - sway * mixed(&other, i) + 0.02 * rounding[i];
        Self { quantized: (0..TOKENS * IN).map(off).collect(), original }
    }

    fn moments(&self, cpu: &Cpu, target: Target) -> Moments<Cpu> {
        let mut moments = Moments::new(cpu, (OUT, IN), false, target).unwrap();
        let tensor = |values: &[f32]| cpu.tensor(values.to_vec(), (TOKENS, IN)).unwrap();
        let (quantized, original) = (tensor(&self.quantized), tensor(&self.original));
        let reaching = |input| Reaching { input, hidden: None };
        moments.add(cpu, &reaching(&quantized), Some(&reaching(&original)), None).unwrap();
        moments
    }
}

fn weights() -> Vec<f32> {
    random(9, OUT * IN).iter().map(|w| w * w * w).collect()
}

fn stage(cpu: &Cpu) -> StageWeights<Cpu> {
    let values = weights();
    let (first, second) = values.split_at(OUTPUTS[0] * IN);
    let tensor = |values, rows| {
        HostTensor::new(Dtype::F32, vec![rows, IN], bytemuck::cast_slice::<f32, u8>(values)).unwrap()
    };
    StageWeights::read(cpu, &[tensor(first, OUTPUTS[0]), tensor(second, OUTPUTS[1])], &[]).unwrap()
}

fn params(recipe: Recipe) -> GptqParams {
    let quant = QuantConfig { bits: 3, group_size: Some(64), damp_percent: 0.01, ..QuantConfig::default() };
    GptqParams::new(quant, Method::Gptq, recipe)
}

fn solved(cpu: &Cpu, recipe: Recipe, evidence: &Evidence<Cpu>) -> Solved<Cpu> {
    solve(cpu, &stage(cpu), Some(evidence), &params(recipe)).unwrap()
}

/// `sum |W x_f - Q x|^2` over tokens and outputs.
fn error(packed: &PackedLinear, tokens: &Tokens) -> f64 {
    let (w, q) = (weights(), packed.dequantized());
    let along = |row: &[f32], x: &[f32]| -> f64 {
        row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
    };
    let pairs = tokens.original.chunks_exact(IN).zip(tokens.quantized.chunks_exact(IN));
    pairs
        .map(|(x_f, x)| {
            let rows = w.chunks_exact(IN).zip(q.chunks_exact(IN));
            rows.map(|(w, q)| (along(w, x_f) - along(q, x)).powi(2)).sum::<f64>()
        })
        .sum()
}

#[test]
fn each_piece_brings_outputs_nearer_to_those_of_the_unquantized_model() {
    let cpu = Cpu::new();
    let fresh = Tokens::new(300, 0.1);
    let of = |name: &str, recipe: Recipe| {
        let evidence = Evidence {
            solving: Tokens::new(100, 0.1).moments(&cpu, recipe.target),
            held_out: Some(Tokens::new(200, 0.1).moments(&cpu, recipe.target)),
        };
        let solved = solved(&cpu, recipe, &evidence);
        let error = error(&cpu.collect(solved.packed).unwrap(), &fresh);
        println!("{name}: {error:.1}, {:?}", solved.verdicts);
        error
    };
    let card = Preset::Card.recipe();
    let grid = Recipe { grid: GridKind::Loop, ..card };
    let target = Recipe { target: Target::Asymmetric, ..grid };
    let all = Recipe { rounds: 2, ..target };
    let errors = [of("card", card), of("loop", grid), of("target", target), of("refined", all)];
    assert!(errors.windows(2).all(|pair| pair[1] < 0.99 * pair[0]), "{errors:?}");
    let gar = of("gar", Recipe { order: Order::Gar, ..all });
    assert!(gar < 1.1 * errors[3], "groups in file order cost little: {gar}, {errors:?}");
}

/// `sum (W x_f + h_f - h) x^T`, in f64 from the tokens themselves; a bias, which both models add, is no part of it.
#[test]
fn a_residual_target_asks_for_what_the_unquantized_model_has_behind_the_stage() {
    let cpu = Cpu::new();
    let tokens = Tokens::new(100, 0.1);
    let (before, before_f) = (random(31, TOKENS * OUT), random(32, TOKENS * OUT));
    let (weights, bias) = (weights(), random(33, OUT));
    let made = |t: usize, n: usize| -> f64 {
        let products =
            (0..IN).map(|i| f64::from(weights[n * IN + i]) * f64::from(tokens.original[t * IN + i]));
        products.sum::<f64>() + f64::from(before_f[t * OUT + n])
    };
    let behind_f = (0..TOKENS * OUT).map(|i| (made(i / OUT, i % OUT) + f64::from(bias[i % OUT])) as f32);
    let inputs = [&tokens.quantized, &tokens.original].map(|x| cpu.tensor(x.clone(), (TOKENS, IN)).unwrap());
    let states = [before.clone(), behind_f.collect()].map(|h| cpu.tensor(h, (TOKENS, OUT)).unwrap());
    let [quantized, original] = [0, 1].map(|i| Reaching { input: &inputs[i], hidden: Some(&states[i]) });
    let mut moments = Moments::new(&cpu, (OUT, IN), true, Target::Residual).unwrap();
    let bias = cpu.weight_from_f32(bias, (1, OUT), None).unwrap();
    moments.add(&cpu, &quantized, Some(&original), Some(&bias)).unwrap();
    let found = cpu.matrix_to_vec(moments.outputs.as_ref().unwrap()).unwrap();
    for (n, k) in [(0, 0), (40, 100), (95, 191)] {
        let wanted = |t: usize| made(t, n) - f64::from(before[t * OUT + n]);
        let expected: f64 = (0..TOKENS).map(|t| wanted(t) * f64::from(tokens.quantized[t * IN + k])).sum();
        let got = f64::from(found[n * IN + k]);
        assert!((got - expected).abs() < 1e-3 * expected.abs().max(1.0), "({n}, {k}): {got}, {expected}");
    }
}

/// The text that is held out says the opposite of the one that is solved for.
#[test]
fn what_held_out_tokens_speak_against_is_not_kept() {
    let cpu = Cpu::new();
    let target = Recipe { grid: GridKind::Loop, target: Target::Asymmetric, ..Preset::Card.recipe() };
    let evidence = |held_out: f32| Evidence {
        solving: Tokens::new(100, 0.1).moments(&cpu, Target::Asymmetric),
        held_out: Some(Tokens::new(200, held_out).moments(&cpu, Target::Asymmetric)),
    };
    let plain = solved(&cpu, Recipe { target: Target::None, ..target }, &evidence(0.1)).packed;
    let misled = solved(&cpu, target, &evidence(-0.1));
    assert!(misled.verdicts.unwrap().iter().all(|verdict| !verdict.takes_target()));
    assert!(cpu.collect(misled.packed).unwrap() == cpu.collect(plain).unwrap());
    // Each linear has its own verdict: of a refinement that is thrown away nothing is left.
    let refined = Recipe { rounds: 3, ..target };
    for sway in [0.1, -0.1] {
        let (before, after) = (solved(&cpu, target, &evidence(sway)), solved(&cpu, refined, &evidence(sway)));
        let (before, packed) = (cpu.collect(before.packed).unwrap(), cpu.collect(after.packed).unwrap());
        let mut start = 0;
        for (count, verdict) in OUTPUTS.iter().zip(after.verdicts.unwrap()) {
            let rows = start..start + count;
            start = rows.end;
            let same = packed.rows(rows.clone()).unwrap() == before.rows(rows).unwrap();
            assert_eq!(same, !verdict.takes_refinement(), "{verdict:?}");
        }
    }
}

/// The first of these decides for all: every eighth sequence is the one that is held out.
#[test]
fn the_distance_at_the_end_of_a_run_is_that_of_the_artifact() {
    let out = workplace("distance").join("q4");
    let options = "--samples 8 --seq-len 128 --sampling consecutive --join raw --device cpu --json";
    let log: Value = run(&mut quantize(&demo(), &out, options)).json();
    let told = &log["held_out"];
    assert_eq!((&told["sequences"], &told["tokens"]), (&1.into(), &128.into()), "{told}");
    let text = dataset::load(&demo_text("train").parse().unwrap(), &DatasetRoots::from_env()).unwrap();
    let request = SampleRequest { samples: 8, seq_len: 128, sampling: Sampling::Consecutive, seed: 0 };
    let ids = text.sample(&Tokenizer::load(&demo()).unwrap(), Join::Raw, &request).unwrap().ids.remove(7);
    let cpu = Cpu::new();
    let logits = |dir: &std::path::Path| {
        let model = Model::load(cpu.clone(), &ModelFiles::open(dir).unwrap()).unwrap();
        let hidden = model.forward(&ids, &Batch::fresh([ids.len()]), None).unwrap();
        model.logits(&hidden, 0..ids.len()).unwrap()
    };
    let found = cpu.divergence(&logits(&demo()), &logits(&out)).unwrap();
    let kl = found.iter().map(|distance| f64::from(distance.kl)).sum::<f64>() / ids.len() as f64;
    let same = found.iter().filter(|distance| distance.same_top1).count();
    let (told_kl, told_same) =
        (told["kl_divergence"].as_f64().unwrap(), told["top1_agreement"].as_f64().unwrap() * 128.0);
    println!("KL {kl}, told {told_kl}; {same} equal first tokens, told {told_same}");
    // An artifact's products sum in another order than those of the solved weights.
    assert!((told_kl / kl - 1.0).abs() < 1e-3 && (told_same - same as f64).abs() < 1.5, "{told_kl}, {kl}");
}

#[test]
fn what_a_recipe_cannot_have_is_refused_by_name() {
    let out = workplace("recipes").join("out");
    for (options, named) in [
        ("--method rtn --preset fast", "--method rtn: expected no preset"),
        ("--method rtn --target residual", "--method rtn: expected no preset"),
        ("--samples 1 --seq-len 64", "expected two sequences or more, of which one is held out"),
        ("--order up", "[possible values: act-order, file, gar, static-groups]"),
        ("--order gar --act-order", "cannot be used with"),
        ("--no-act-order --static-groups", "cannot be used with"),
        ("--grid loop --mse", "cannot be used with"),
    ] {
        let ended = run(&mut quantize(&demo(), &out, options));
        assert!(ended.stderr.contains(named), "{options}: {}", ended.stderr);
        ended.refusal();
        assert!(!out.exists(), "{options}");
    }
}

/// What was used stands in the log, on the card and in quantize_config.json; a file of the card's preset has no key that
/// AutoGPTQ 0.4.2 does not know.
#[test]
fn files_say_what_they_were_made_with() {
    let read = |dir: &std::path::Path, name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    let json =
        |dir: &std::path::Path, name: &str| -> Value { serde_json::from_str(&read(dir, name)).unwrap() };
    let best = artifact("");
    let recipe = serde_json::json!({"order": "gar", "grid": "loop", "target": "residual", "rounds": 2});
    assert_eq!(json(&best, "quantize_config.json")["meta"]["recipe"], recipe);
    assert_eq!(json(&best, "quantize_log.json")["recipe"]["preset"], "best");
    let verdict = &json(&best, "quantize_log.json")["layers"][1]["linears"][0]["held_out"];
    assert!(["target", "swept", "refined"].iter().all(|key| verdict[key].is_f64()), "{verdict}");
    let card = read(&best, "README.md");
    assert!(card.contains("| Target | residual |") && card.contains("| Order of columns | gar |"), "{card}");
    let published = artifact("--preset card --order gar");
    assert!(json(&published, "quantize_config.json")["meta"]["recipe"]["grid"] == "absmax");
    let published = workplace("published").join("q4");
    run(&mut quantize(&demo(), &published, "--preset card --samples 2 --seq-len 64")).ok();
    let keys: Vec<_> =
        json(&published, "quantize_config.json").as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys.len(), 9, "{keys:?}");
    assert_eq!(keys[3], "desc_act", "{keys:?}");
}

#[test]
fn presets_are_compared_over_seeds_and_the_better_one_is_told() {
    let bench = |options: &str| {
        let mut command = gptq("bench");
        run(command
            .args(words("quality --device cpu --seq-len 128 --ctx 128 --max-windows 4"))
            .args(words(options)))
    };
    let report = bench("--samples 8 --seeds 2 --presets best,card --json").json();
    let [best, card] = &report["presets"].as_array().unwrap()[..] else { panic!("{report}") };
    for found in [best, card] {
        let runs = found["runs"].as_array().unwrap();
        let [first, second] =
            [&runs[0], &runs[1]].map(|run| run["figures"]["kl_divergence"].as_f64().unwrap());
        let of = |what: &str| found[what]["kl_divergence"].as_f64().unwrap();
        assert!((of("mean") - (first + second) / 2.0).abs() < 1e-9, "{found}");
        assert!((of("deviation") - (first - second).abs() / 2f64.sqrt()).abs() < 1e-9, "{found}");
        assert!(first != second, "another seed is another calibration: {found}");
    }
    for figure in ["kl_divergence", "stage_loss_percent"] {
        assert!(best["mean"][figure].as_f64() < card["mean"][figure].as_f64(), "{figure}: {report}");
    }
    let line = bench("--seeds 2 --sampling consecutive").refusal();
    assert!(line.contains("expected --sampling random"), "{line}");
}
