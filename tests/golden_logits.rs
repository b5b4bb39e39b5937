//! The forward pass against logits of transformers, for every family that is supported.

use gptq_kernels::{Batch, Cpu, Device, SequenceRows};
use gptq_runtime::model::{Model, ModelFiles};
use safetensors::SafeTensors;

use crate::support;

/// Largest absolute difference of a logit: f32 sums in another order leave 4e-6 of logits up to 4.
const TOLERANCE: f32 = 1e-4;

fn families() -> [&'static str; 7] {
    [
        "llama-mha",
        "llama-gqa-tied",
        "llama-linear-rope-bias",
        "llama3-rope-scaling",
        "mistral-sliding",
        "qwen2-bias",
        "qwen3-qk-norm",
    ]
}

fn load(family: &str) -> (Model<Cpu>, Vec<u32>, Vec<f32>) {
    let dir = support::golden("logits").join(family);
    let mut files = ModelFiles::open(&dir).unwrap();
    // The reference model was cast to f16 as a whole before it was run in f32, rotary frequencies included.
    // Models that are loaded in the usual way keep them in f32, and so do we; without this line the largest
    // difference is 4.3e-3, growing with the position.
    files.inverse_frequencies.iter_mut().for_each(|f| *f = half::f16::from_f32(*f).to_f32());
    let model = Model::load(Cpu::new(), &files).unwrap();
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

#[test]
fn every_family_gives_the_logits_of_transformers() {
    for family in families() {
        let (model, ids, expected) = load(family);
        let hidden = model.forward(&ids, &Batch::fresh([ids.len()]), None).unwrap();
        let logits = model.logits(&hidden, 0..ids.len()).unwrap();
        assert_near(family, &model.backend().to_vec(&logits).unwrap(), &expected);
    }
}

#[test]
fn a_cache_filled_in_steps_gives_the_same_logits() {
    for family in families() {
        let (model, ids, expected) = load(family);
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
