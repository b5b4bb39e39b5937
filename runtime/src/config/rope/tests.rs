//! Spellings of every age, beside what transformers makes of them.

use std::path::Path;

use serde_json::{Value, json};

use super::*;

fn read(config: Value) -> Result<(f64, RopeScaling)> {
    let fields = Fields::new(&config, Path::new("c"), "").unwrap();
    let ropes = rope(fields, Architecture::Llama.family(), 4096, 8)?;
    Ok((ropes.theta, ropes.scaling))
}

#[test]
fn both_ages_of_rope_keys_are_read() {
    let rope = |config| read(config).unwrap();
    let linear = RopeScaling::Linear { factor: 4.0 };
    let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}});
    assert_eq!(rope(old), (5e5, linear.clone()));
    let new = json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}});
    assert_eq!(rope(new), (5e5, linear.clone()));
    assert_eq!(rope(json!({"rope_theta": 5e5, "rope_scaling": null})), (5e5, RopeScaling::None));
    assert_eq!(rope(json!({"rope_parameters": {"rope_type": "default"}})), (1e4, RopeScaling::None));
}

#[test]
fn llama3s_scaling_is_read_in_full() {
    let mut config = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
        "high_freq_factor": 4, "original_max_position_embeddings": 64}});
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    assert_eq!(read(config.clone()).unwrap().1, expected);
    config["rope_scaling"]["high_freq_factor"] = json!(1);
    let message = read(config).unwrap_err().to_string();
    assert_eq!(message, "c: rope_scaling.high_freq_factor: expected above low_freq_factor 1, got 1");
}

/// transformers 5.24 gives these.
#[test]
fn of_two_spellings_transformers_takes_the_old_one_whole() {
    let both = json!({"rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}});
    assert_eq!(read(both).unwrap(), (1e4, RopeScaling::Linear { factor: 4.0 }));
    let empty = json!({"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}});
    assert_eq!(read(empty).unwrap(), (5e5, RopeScaling::None));
    let types = json!({"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2}});
    assert_eq!(read(types).unwrap().1, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn yarns_defaults_are_those_of_transformers() {
    let yarn = |scaling: Value| match read(json!({"rope_scaling": scaling})).unwrap().1 {
        RopeScaling::Yarn(yarn) => yarn,
        other => panic!("{other:?}"),
    };
    let plain = yarn(json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}));
    assert_eq!((plain.beta_fast, plain.beta_slow, plain.truncate), (32.0, 1.0, true));
    assert!((plain.attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
    let stretched = yarn(json!({"type": "yarn", "original_max_position_embeddings": 1024}));
    assert_eq!(stretched.factor, 4.0, "from the two lengths");
    let deepseek = yarn(json!({"type": "yarn", "factor": 40, "mscale": 0.7, "mscale_all_dim": 0.7}));
    assert_eq!((deepseek.attention_factor, deepseek.original_max_position_embeddings), (1.0, 4096));
}

#[test]
fn the_context_counts_what_stretches_it() {
    let context = |scaling: Value| read(json!({"rope_scaling": scaling})).unwrap().1.context_length(4096);
    assert_eq!(context(json!({"type": "linear", "factor": 4})), 16384);
    assert_eq!(context(json!({"type": "dynamic", "factor": 2.5})), 10240);
    let yarn =
        |original: usize| json!({"type": "yarn", "factor": 4, "original_max_position_embeddings": original});
    assert_eq!((context(yarn(4096)), context(yarn(1024))), (16384, 4096));
    let long = json!({"type": "longrope", "factor": 4, "original_max_position_embeddings": 1024,
        "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3, 4]});
    assert_eq!(context(long), 4096);
}

#[test]
fn other_rotations_are_refused_by_name() {
    let cases = [
        (
            json!({"rope_scaling": {"type": "ntk", "factor": 4}}),
            r#"rope_scaling.type: expected default, linear, dynamic, llama3, yarn or longrope, got "ntk""#,
        ),
        (
            json!({"rope_scaling": {"factor": 4}}),
            "rope_scaling.type: expected default, linear, dynamic, llama3, yarn or longrope, got nothing",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0}}),
            "factor: expected a number above 0, got 0",
        ),
        (
            json!({"rope_scaling": {"type": "llama3"}}),
            "low_freq_factor: expected a number above 0, got nothing",
        ),
        (
            json!({"rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 1000.0}}),
            "rope_scaling.alpha: expected a key that this program knows, got 1000.0",
        ),
        (
            json!({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}),
            "short_factor: expected 4 numbers above 0, one for each pair of features, got [1]",
        ),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor: expected 1"),
    ];
    for (config, expected) in cases {
        let message = read(config).unwrap_err().to_string();
        assert!(message.contains(expected), "expected {expected}, got {message}");
    }
}
