//! A model of two layers and 20,000 weights, with a tokenizer, a text and a plan: a run takes some hundredths of a second.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Map, Value, json};

const WORDS: u32 = 64;

/// Where the model and what belongs to it lie.
pub struct Tiny(PathBuf);

impl Tiny {
    pub fn make(dir: &Path) -> Self {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", "hidden_act": "silu",
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
            "vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": false,
        });
        let tiny = Self(dir.into());
        fs::create_dir_all(dir).unwrap();
        fs::write(tiny.path("synth.json"), config.to_string()).unwrap();
        let mut synth = program("synth");
        synth.arg(tiny.path("synth.json")).arg("--out").arg(tiny.model());
        assert!(synth.output().unwrap().status.success());
        fs::write(tiny.model().join("tokenizer.json"), tokenizer().to_string()).unwrap();
        fs::write(tiny.path("text.txt"), text()).unwrap();
        let plan =
            "[[branch]]\nname = \"main\"\nbits = 4\ngroup_size = 32\n[[branch]]\nbits = 8\ngroup_size = -1\n";
        fs::write(tiny.path("plan.toml"), plan).unwrap();
        tiny
    }

    pub fn model(&self) -> PathBuf {
        self.path("model")
    }

    /// `quantize` or `branches` into `out`. `branches` measures what it makes.
    pub fn command(&self, verb: &str, out: &Path, options: &[&str]) -> Command {
        let mut command = program(verb);
        command.arg(self.model()).arg("--out").arg(out).arg("--dataset").arg(self.path("text.txt"));
        command.args(["--samples", "2", "--seq-len", "48", "--device", "cpu"]).args(options);
        match verb {
            "branches" => {
                command.arg("--plan").arg(self.path("plan.toml"));
                command.arg("--eval-dataset").arg(self.path("text.txt"))
            }
            _ => command.args(["--group-size", "32", "--no-bias"]),
        };
        command
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

fn program(verb: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gptq"));
    command
        .env_remove("RUST_LOG")
        .env("HF_HUB_CACHE", "/no-hub-cache")
        .env("HF_HUB_OFFLINE", "1")
        .env("RAYON_NUM_THREADS", "1")
        .arg(verb);
    command
}

/// A word is a token.
fn tokenizer() -> Value {
    let vocab: Map<_, _> = (0..WORDS).map(|i| (format!("w{i}"), json!(i))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" },
    })
}

/// Enough for one window of a measurement.
fn text() -> String {
    let words = (0..2100u32).map(|i| format!("w{} ", i.wrapping_mul(i).wrapping_add(i / 7) % WORDS));
    words.collect()
}
