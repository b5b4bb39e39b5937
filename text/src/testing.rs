//! Small tokenizers for the tests of this crate and of those that encode with it.

use serde_json::{Map, Value, json};

use crate::tokenizer::Tokenizer;

/// A byte-level BPE without merges: one id a byte (`!` is 0, `a` is 64), then `<|end|>` (256, special).
pub fn bytes() -> Tokenizer {
    // GPT-2's spelling of bytes: the printable ones as themselves, the others as U+0100 onwards.
    let mut printable: Vec<u32> = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).collect();
    printable.extend(0x100..0x100 + 256 - printable.len() as u32);
    let spelled = printable.into_iter().filter_map(char::from_u32);
    let vocab: Map<String, Value> = spelled.enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    tokenizer(&json!({
        "version": "1.0",
        "added_tokens": [special(256, "<|end|>")],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }))
}

/// The kind of Llama 2: words that begin with `▁`, a leading space that decoding strips, bytes as a
/// fallback. Ids: `<unk>` 0, `<s>` 1, `▁` 2, `▁a` 3, `▁b` 4, `b` 5, then the bytes 0..=255 from 6 on.
pub fn byte_fallback() -> Tokenizer {
    let tokens = ["<unk>", "<s>", "▁", "▁a", "▁b", "b"].map(str::to_owned);
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let vocab: Map<String, Value> =
        tokens.into_iter().chain(bytes).enumerate().map(|(id, token)| (token, json!(id))).collect();
    let metaspace =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    tokenizer(&json!({
        "version": "1.0",
        // Left from training: 4 tokens at most, padded to 8.
        "truncation": {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [special(0, "<unk>"), special(1, "<s>")],
        "pre_tokenizer": metaspace,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["▁", "b"]], "byte_fallback": true,
            "unk_token": "<unk>"},
    }))
}

fn special(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false})
}

fn tokenizer(json: &Value) -> Tokenizer {
    let config = br#"{"bos_token": "<s>", "eos_token": "<|end|>"}"#;
    Tokenizer::from_bytes(json.to_string().as_bytes(), Some(config)).unwrap()
}
