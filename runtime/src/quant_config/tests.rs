//! What the field's writers write, read from folders of files.

use std::fs;

use serde_json::json;

use super::*;

fn read(quantize_config: Option<Value>, config: Option<Value>) -> Result<Option<QuantConfig>> {
    let dir = tempfile::tempdir().unwrap();
    for (name, json) in [("quantize_config.json", quantize_config), ("config.json", config)] {
        if let Some(json) = json {
            fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
    }
    QuantConfig::read(dir.path())
}

#[test]
fn files_of_both_tools_and_of_neither_are_read() {
    let expected = QuantConfig { damp_percent: 0.1, act_order: true, ..QuantConfig::default() };
    let auto_gptq = json!({"bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": true});
    assert_eq!(read(Some(auto_gptq), None).unwrap(), Some(expected.clone()));
    let gptqmodel = json!({"bits": 4, "group_size": 128, "desc_act": true, "sym": true, "lm_head": false,
        "quant_method": "gptq", "checkpoint_format": "gptq_v2", "pack_dtype": "int32",
        "meta": {"damp_percent": 0.1, "static_groups": true, "true_sequential": false}});
    let config = json!({"model_type": "llama", "quantization_config": gptqmodel});
    let v2 = QuantConfig {
        format: CheckpointFormat::GptqV2,
        static_groups: true,
        true_sequential: false,
        ..expected
    };
    assert_eq!(read(None, Some(config)).unwrap(), Some(v2));
    assert_eq!(read(None, Some(json!({"model_type": "llama"}))).unwrap(), None);
    assert_eq!(read(None, None).unwrap(), None);
}

#[test]
fn what_only_one_of_two_files_says_counts() {
    let section = |quant: Value| Some(json!({"quantization_config": quant}));
    let own = json!({"bits": 4, "group_size": 128, "desc_act": true});
    let inner = json!({"bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2", "sym": false,
        "damp_percent": 1, "meta": {"damp_percent": 0.05}});
    let merged = read(Some(own), section(inner)).unwrap().unwrap();
    assert!(merged.act_order && !merged.sym && merged.format == CheckpointFormat::GptqV2);
    assert_eq!(merged.damp_percent, 1.0, "an integer, and nothing that a reader needs");
}

#[test]
fn two_descriptions_that_contradict_each_other_are_refused_with_both_values() {
    let section = |quant: Value| Some(json!({"quantization_config": quant}));
    let base = json!({"bits": 4, "group_size": 128});
    for (key, one, other) in [
        ("bits", json!(4), json!(8)),
        ("group_size", json!(128), json!(-1)),
        ("desc_act", json!(true), json!(false)),
        ("sym", json!(false), json!(true)),
        ("checkpoint_format", json!("gptq"), json!("gptq_v2")),
    ] {
        let with = |value: &Value| {
            let mut quant = base.clone();
            quant[key] = value.clone();
            quant
        };
        assert!(read(Some(with(&one)), section(with(&one))).is_ok(), "{key}");
        let message = read(Some(with(&one)), section(with(&other))).unwrap_err().to_string();
        let expected =
            format!("quantization_config.{key}: expected {one} as in quantize_config.json, got {other}");
        assert!(message.ends_with(&expected), "{message}");
    }
    let message = read(
        Some(json!({"bits": 4, "group_size": 128, "format": "gptq", "checkpoint_format": "gptq_v2"})),
        None,
    );
    assert!(
        message
            .unwrap_err()
            .to_string()
            .ends_with("format: expected \"gptq_v2\" as under checkpoint_format, got \"gptq\"")
    );
    let format = json!({"bits": 4, "group_size": 128, "format": "gptq_v2"});
    let section_format = json!({"bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"});
    assert!(read(Some(format), section(section_format)).is_ok(), "two spellings of one key");
}

#[test]
fn rules_for_single_modules_follow_gptqmodel() {
    let quant = |dynamic: Value| {
        let own = json!({"bits": 4, "group_size": 128, "desc_act": true, "dynamic": dynamic});
        read(Some(own), None).unwrap().unwrap()
    };
    let name = "model.layers.1.mlp.down_proj";
    let rules = quant(json!({
        "-:model\\.layers\\.0\\.": {},
        "+:.*\\.down_proj.*": {"bits": 8, "group_size": 32, "desc_act": false},
        ".*": {"bits": 2},
    }));
    let of = |name: &str| rules.of_module(name).unwrap();
    assert_eq!(of("model.layers.0.mlp.down_proj"), None);
    let down = of(name).unwrap();
    assert_eq!((down.bits, down.group_size, down.act_order, down.sym), (8, Some(32), false, true));
    assert_eq!(of("model.layers.1.mlp.up_proj").unwrap().bits, 2, "the first match wins");
    let unanchored = quant(json!({"down_proj": {"bits": 8}}));
    assert_eq!(
        unanchored.of_module(name).unwrap().unwrap().bits,
        4,
        "names are matched from their beginning"
    );
    let look_around = quant(json!({"-:^(?!.*down).*$": {}}));
    assert!(look_around.of_module(name).unwrap().is_some());
    assert_eq!(look_around.of_module("model.layers.1.mlp.up_proj").unwrap(), None);
}

#[test]
fn a_list_of_quantized_modules_leaves_the_others_dense() {
    for list in
        [json!([["self_attn.q_proj"], ["mlp.down_proj"]]), json!(["self_attn.q_proj", "mlp.down_proj"])]
    {
        let own = json!({"bits": 4, "group_size": 128, "modules_in_block_to_quantize": list});
        let quant = read(Some(own), None).unwrap().unwrap();
        assert!(quant.of_module("model.layers.0.mlp.down_proj").unwrap().is_some());
        assert!(quant.of_module("model.layers.0.self_attn.o_proj").unwrap().is_none());
    }
}

#[test]
fn what_is_no_plain_gptq_is_refused_by_name() {
    let cases = [
        (json!({"quant_method": "awq"}), r#"quant_method: expected gptq, got "awq""#),
        (json!({"method": "fp8"}), r#"quant_method: expected gptq, got "fp8""#),
        (
            json!({"load_in_8bit": true}),
            "load_in_8bit: expected weights of GPTQ, not of bitsandbytes, got true",
        ),
        (json!({"w_bit": 4, "zero_point": true}), "w_bit: expected weights of GPTQ, not of AWQ, got 4"),
        (json!({"bits": 5}), "bits: expected 2, 3, 4 or 8, got 5"),
        (json!({"bits": null}), "bits: expected a value, got nothing"),
        (json!({"group_size": 0}), "group_size: expected -1 or above 0, got 0"),
        (json!({"group_size": -2}), "group_size: expected a whole number, 0 or more, got -2"),
        (json!({"checkpoint_format": "marlin"}), r#"expected gptq or gptq_v2, got "marlin""#),
        (json!({"is_marlin_format": true}), "is_marlin_format: expected false"),
        (json!({"lm_head": true}), "lm_head: expected false"),
        (json!({"adapter": {"rank": 4}}), "adapter: expected nothing"),
        (json!({"dynamic": {"+:.*": {"bits": 5}}}), "dynamic.*.bits: expected 2, 3, 4 or 8, got 5"),
        (json!({"dynamic": {"+:.*": {"format": "x"}}}), "format: expected bits, group_size, sym or desc_act"),
        (json!({"dynamic": {"+:(": {}}}), "expected a regular expression of module names"),
        (json!({"desc_act": 1}), "desc_act: expected true or false, got 1"),
        (json!({"meta": 1u64 << 63}), "meta: expected an object, got 9223372036854775808"),
    ];
    for (change, expected) in cases {
        let mut json = json!({"bits": 4, "group_size": 128});
        json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let message = read(Some(json), None).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    assert!(read(None, Some(json!({"quantization_config": {"load_in_4bit": true}}))).is_err());
    assert!(read(Some(json!({"bits": 4, "group_size": 128, "load_in_4bit": false})), None).is_ok());
}

#[test]
fn written_files_have_auto_gptqs_keys_in_its_order_and_read_back() {
    let v1 = QuantConfig { group_size: None, act_order: true, damp_percent: 0.1, ..QuantConfig::default() };
    let text = v1.to_quantize_config_json("author/model").to_string();
    let expected = concat!(
        r#"{"bits":4,"group_size":-1,"damp_percent":0.1,"desc_act":true,"static_groups":false,"sym":true,"#,
        r#""true_sequential":true,"model_name_or_path":"author/model","model_file_base_name":"model"}"#
    );
    assert_eq!(text, expected);
    for config in [v1.clone(), QuantConfig { format: CheckpointFormat::GptqV2, sym: false, ..v1 }] {
        let own = config.to_quantize_config_json("m");
        let model = json!({"quantization_config": config.to_quantization_config_json()});
        assert_eq!(read(Some(own), None).unwrap(), Some(config.clone()));
        assert_eq!(read(None, Some(model)).unwrap(), Some(config));
    }
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs the larger models and texts: GPTQ_SHARED is not set")]
fn gptqmodels_artifact_is_read() {
    let shared = std::env::var_os("GPTQ_SHARED").expect("GPTQ_SHARED is not set");
    let dir = Path::new(&shared).join("golden/gptqmodel-7.7.0-wiki20m-4bit-128g-actorder");
    let expected = QuantConfig { damp_percent: 0.1, act_order: true, ..QuantConfig::default() };
    assert_eq!(QuantConfig::read(&dir).unwrap(), Some(expected));
}
