//! What is read.

use std::fs;

use gptq_runtime::checkpoint::Checkpoint;
use gptq_runtime::quant_config::QuantConfig;
use gptq_text::chat::{ChatTemplate, Conversation, message};
use gptq_text::tokenizer::Tokenizer;
use tempfile::TempDir;

/// One reader; true where it took the input.
pub struct Target {
    /// Its folder in `corpus/`.
    pub name: &'static str,
    pub read: fn(&[u8]) -> bool,
}

pub const TARGETS: [Target; 6] = [
    Target { name: "header", read: header },
    Target { name: "index", read: index },
    Target { name: "quant_config", read: quant_config },
    Target { name: "tokenizer", read: tokenizer },
    Target { name: "tokenizer_config", read: tokenizer_config },
    Target { name: "chat_template", read: chat_template },
];

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir_in(crate::place()).expect("a folder for the input");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("a file for the input");
    }
    folder
}

fn header(input: &[u8]) -> bool {
    let folder = folder(&[("model.safetensors", input)]);
    let Ok(checkpoint) = Checkpoint::open(folder.path()) else { return false };
    for name in checkpoint.names() {
        let entry = checkpoint.spec(name).expect("a tensor that is listed");
        let bits = entry.shape.iter().product::<usize>() * entry.dtype.bitsize();
        assert_eq!(checkpoint.raw(name).map(<[u8]>::len), Some(bits / 8), "{name}");
        let _ = checkpoint.tensor(name, &entry.shape);
        let _ = checkpoint.ints(name, &entry.shape);
        let _ = checkpoint.words(name, &entry.shape);
    }
    true
}

fn index(input: &[u8]) -> bool {
    let shard = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let shard = [&(shard.len() as u64).to_le_bytes()[..], shard, &[7]].concat();
    let folder = folder(&[
        ("model.safetensors.index.json", input),
        ("model-00001-of-00002.safetensors", &shard),
        ("model-00002-of-00002.safetensors", &shard),
    ]);
    Checkpoint::open(folder.path()).is_ok()
}

/// Alone, inside config.json, and both.
fn quant_config(input: &[u8]) -> bool {
    let inside = [&b"{\"quantization_config\": "[..], input, b"}"].concat();
    let sound = br#"{"bits": 4, "group_size": 128, "desc_act": false, "sym": true}"#;
    let own = QuantConfig::read(folder(&[("quantize_config.json", input)]).path());
    let model = QuantConfig::read(folder(&[("config.json", &inside)]).path());
    let both = QuantConfig::read(folder(&[("quantize_config.json", sound), ("config.json", &inside)]).path());
    if let Ok(Some(config)) = &own {
        // The damping is of the past, and whatever it says, the file can be read.
        assert!(QuantConfig { damp_percent: 0.1, ..config.clone() }.validate().is_ok());
    }
    own.is_ok() || model.is_ok() || both.is_ok()
}

fn tokenizer(input: &[u8]) -> bool {
    let Ok(tokenizer) = Tokenizer::from_bytes(input, None) else { return false };
    let text = "A text\n with  blanks, \u{e9}\u{1F600}<s> and 123.";
    // What the library cannot do is an error, whatever its reason.
    let ids = tokenizer.encode(text, true).unwrap_or_default();
    let _ = (tokenizer.encode_with_ranges(text, false), tokenizer.decode(&ids, true), tokenizer.vocab_size());
    true
}

fn tokenizer_config(input: &[u8]) -> bool {
    let tokenizer = br#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
    let loaded = Tokenizer::from_bytes(tokenizer, Some(input)).map(|tokenizer| tokenizer.eos_id()).is_ok();
    rendered(input) || loaded
}

fn chat_template(input: &[u8]) -> bool {
    let source = String::from_utf8_lossy(input);
    rendered(serde_json::json!({"chat_template": source, "bos_token": "<s>"}).to_string().as_bytes())
}

/// Renders a short conversation by the template of a tokenizer_config.json.
fn rendered(config: &[u8]) -> bool {
    let messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")];
    let messages = messages.map(|(role, content)| message(role, content));
    ChatTemplate::from_config(config)
        .and_then(|template| template.render(&Conversation::new(&messages)))
        .is_ok()
}
