//! The forward pass against logits of transformers, for every family that is supported.

use gptq_kernels::{Backend, Batch, Cpu, Cuda, Device, Dtype, SequenceRows};
use gptq_runtime::model::{Decoder, Model, ModelFiles};
use safetensors::SafeTensors;

use crate::support;

/// Largest absolute difference of a logit: f32 sums in another order leave 4e-6 of logits up to 4.
const TOLERANCE: f32 = 1e-4;

/// A checkpoint, and whether its reference had rotary frequencies rounded to f16: the older ones were cast to f16 as a
/// whole before they were run in f32. Models that are loaded in the usual way keep them in f32, and so do we; without the
/// rounding the largest difference is 4.3e-3, growing with the position.
fn families() -> [(&'static str, bool); 29] {
    [
        ("logits/llama-mha", true),
        ("logits/llama-gqa-tied", true),
        ("logits/llama-linear-rope-bias", true),
        ("logits/llama3-rope-scaling", true),
        ("logits/mistral-sliding", true),
        ("logits/qwen2-bias", true),
        ("logits/qwen3-qk-norm", true),
        ("families/llama-yarn", false),
        ("families/qwen3-yarn", false),
        ("families/llama-dynamic", false),
        ("families/qwen2-window-layers", false),
        ("families/llama-mlp-bias-head-dim", false),
        ("families/phi3", false),
        ("families/phi3-longrope", false),
        ("families/gemma2", false),
        ("families/gemma3-text", false),
        ("families/olmo2", false),
        ("families/olmo3", false),
        ("families/smollm3", false),
        ("families/glm4", false),
        ("families/granite", false),
        ("families/ernie4_5", false),
        ("families/seed_oss", false),
        ("families/ministral3", false),
        ("families/mixtral", false),
        ("families/qwen2_moe", false),
        ("families/qwen3_moe", false),
        ("families/olmoe", false),
        ("families/glm4_moe", false),
    ]
}

fn load(family: (&str, bool)) -> (Model<Cpu>, Vec<u32>, Vec<f32>) {
    load_on(Cpu::new(), family)
}

fn load_on<B: Backend>(device: B, (family, rounded): (&str, bool)) -> (Model<B>, Vec<u32>, Vec<f32>) {
    let dir = support::golden(family);
    let mut files = ModelFiles::open(&dir).unwrap();
    if rounded {
        files.inverse_frequencies.iter_mut().for_each(|f| *f = half::f16::from_f32(*f).to_f32());
    }
    let model = Model::load(device, &files).unwrap();
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    (model, support::ints(&file, "input_ids"), support::floats(&file, "logits"))
}

fn assert_near(family: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{family}");
    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{family}: largest difference {worst:.1e}");
    assert!(worst <= TOLERANCE, "{family}: {worst}");
}

/// Beside a second, shorter sequence, whose rows must not be taken for those of the first.
#[test]
fn every_family_gives_the_logits_of_transformers() {
    for family in families() {
        let (model, ids, expected) = load(family);
        let family = family.0;
        let both = [&ids[..21], &ids[..]].concat();
        let hidden = model.forward(&both, &Batch::fresh([21, ids.len()]), None).unwrap();
        let logits = model.backend().to_vec(&model.logits(&hidden, 0..both.len()).unwrap()).unwrap();
        let (short, whole) = logits.split_at(21 * model.config.vocab_size);
        assert_near(family, whole, &expected);
        // Frequencies of a short sequence are others.
        if !["families/llama-dynamic", "families/phi3-longrope"].contains(&family) {
            assert_near(family, short, &expected[..short.len()]);
        }
    }
}

#[test]
fn a_cache_filled_in_steps_gives_the_same_logits() {
    // With a base that grows with the length, keys of earlier steps were turned by another one, as in transformers.
    let by_length = ["families/llama-dynamic", "families/phi3-longrope"];
    for family in families().into_iter().filter(|(family, _)| !by_length.contains(family)) {
        let (model, ids, expected) = load(family);
        let family = family.0;
        let mut caches = model.kv_caches(3).unwrap();
        let mut got = Vec::new();
        for step in [0..20, 20..21, 21..22, 22..48] {
            let sequences =
                vec![SequenceRows { rows: step.len(), context: step.start, blocks: vec![2, 0, 1] }];
            let hidden = model.forward(&ids[step.clone()], &Batch { sequences }, Some(&mut caches)).unwrap();
            got.extend(model.backend().to_vec(&model.logits(&hidden, 0..step.len()).unwrap()).unwrap());
        }
        assert_near(family, &got, &expected);
    }
}

/// The frequencies of a sequence follow from its own length, not from its neighbours'.
#[test]
fn lengths_of_others_do_not_change_a_sequence_whose_base_grows() {
    let (model, ids, expected) = load(("families/llama-dynamic", false));
    let vocab = model.config.vocab_size;
    let both = [&ids[..], &ids[..20]].concat();
    let hidden = model.forward(&both, &Batch::fresh([48, 20]), None).unwrap();
    let logits = model.backend().to_vec(&model.logits(&hidden, 0..68).unwrap()).unwrap();
    assert_near("the longer one", &logits[..48 * vocab], &expected);
    let alone = model.forward(&ids[..20], &Batch::fresh([20]), None).unwrap();
    let alone = model.backend().to_vec(&model.logits(&alone, 0..20).unwrap()).unwrap();
    assert_near("the shorter one", &logits[48 * vocab..], &alone);
}

/// In one pass, and through a cache in steps that the device may record.
#[test]
#[cfg_attr(not(has_cuda), ignore = "needs an NVIDIA GPU")]
fn a_card_gives_the_logits_of_transformers() {
    for family in families() {
        for (dtype, tolerance) in [(Dtype::F32, 1e-3), (Dtype::F16, 2e-2)] {
            let (model, ids, expected) = load_on(Cuda::new(0, dtype, None).unwrap(), family);
            let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            let near = |how: &str, got: &[f32], expected: &[f32]| {
                let worst =
                    got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
                println!("{} {dtype:?} {how}: {worst:.1e} of the largest", family.0);
                assert!(got.len() == expected.len() && worst <= tolerance, "{} {how}: {worst}", family.0);
            };
            let hidden = model.forward(&ids, &Batch::fresh([ids.len()]), None).unwrap();
            let logits = model.logits(&hidden, 0..ids.len()).unwrap();
            near("at once", &model.backend().to_vec(&logits).unwrap(), &expected);
            if ["families/llama-dynamic", "families/phi3-longrope"].contains(&family.0) {
                continue;
            }
            let (mut caches, mut decoder) = (model.kv_caches(3).unwrap(), Decoder::default());
            let batch = |rows: usize, context: usize| Batch {
                sequences: vec![SequenceRows { rows, context, blocks: vec![2, 0, 1] }],
            };
            model.forward(&ids[..40], &batch(40, 0), Some(&mut caches)).unwrap();
            let vocab = model.config.vocab_size;
            for place in 40..48 {
                let logits = model
                    .decode(&ids[place..=place], &batch(1, place), None, &mut caches, &mut decoder)
                    .unwrap();
                let got = model.backend().to_vec(&logits).unwrap();
                near("token by token", &got, &expected[place * vocab..][..vocab]);
            }
        }
    }
}
