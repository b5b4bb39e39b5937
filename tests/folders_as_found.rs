//! Model folders as the field's writers leave them: what says the same in another way must give the same logits, and what
//! cannot be read right must be refused by its name.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_runtime::model::ModelFiles;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::model_folder::{ModelFolder, Tensor, largest_difference, logits};
use crate::program::{artifact, demo, workplace};

/// Sums in another order, where linears are no longer stacked.
const SAME: f32 = 1e-4;

/// An artifact in file order, whose two descriptions and tensors can be changed.
struct Artifact {
    dir: PathBuf,
    folder: ModelFolder,
    own: Value,
}

impl Artifact {
    fn new(name: &str) -> Self {
        Self::of(name, &artifact("--group-size 64 --order file"))
    }

    fn of(name: &str, source: &Path) -> Self {
        let own = fs::read(source.join("quantize_config.json")).unwrap();
        let (folder, own) = (ModelFolder::read(source), serde_json::from_slice(&own).unwrap());
        Self { dir: workplace(name).join("model"), folder, own }
    }

    /// Sets a key in both descriptions.
    fn say(mut self, key: &str, value: Value) -> Self {
        self.own[key] = value.clone();
        self.folder.config["quantization_config"][key] = value;
        self
    }

    /// Changes every tensor whose name ends so.
    fn change(mut self, end: &str, change: impl Fn(&mut Tensor)) -> Self {
        self.folder.tensors.iter_mut().filter(|(name, _)| name.ends_with(end)).for_each(|(_, t)| change(t));
        self
    }

    fn without(mut self, end: &str) -> Self {
        self.folder.tensors.retain(|name, _| !name.ends_with(end));
        self
    }

    fn write(&self) -> &Path {
        self.folder.write(&self.dir);
        fs::write(self.dir.join("quantize_config.json"), self.own.to_string()).unwrap();
        &self.dir
    }

    fn logits(&self) -> Vec<f32> {
        logits(self.write())
    }

    fn refusal(&self) -> String {
        let message = ModelFiles::open(self.write()).err().expect("a refusal").to_string();
        assert_eq!(message.lines().count(), 1, "{message}");
        message
    }

    /// What is said of a folder that can be read.
    fn notes(&self) -> Vec<String> {
        ModelFiles::open(self.write()).unwrap().notes.iter().map(|note| note.to_string()).collect()
    }
}

fn assert_same(what: &str, got: &[f32], expected: &[f32]) {
    let difference = largest_difference(got, expected);
    assert!(difference <= SAME, "{what}: {difference}");
}

/// Beyond what f16 reaches, and a power of two: no number is rounded otherwise for it.
const BILLION: f32 = (1 << 30) as f32;

/// The same numbers as f32, a billionth as large.
fn shrink_scales(tensor: &mut Tensor) {
    let scales: Vec<f32> = tensor.halves().iter().map(|scale| scale / BILLION).collect();
    *tensor = Tensor::f32(tensor.shape.clone(), &scales);
}

#[test]
fn scales_of_every_type_keep_their_values() {
    let expected = Artifact::new("scales-as-they-are").logits();
    let wide =
        Artifact::new("scales-f32").change(".scales", |t| *t = Tensor::f32(t.shape.clone(), &t.halves()));
    assert_same("the same in f32", &wide.logits(), &expected);
    // Gates and what they gate a billionth as large, the norm before them a billion times.
    let grow = |t: &mut Tensor| {
        *t = Tensor::f32(t.shape.clone(), &t.halves().iter().map(|x| x * BILLION).collect::<Vec<_>>());
    };
    let tiny = Artifact::new("scales-beyond-f16")
        .change("gate_proj.scales", shrink_scales)
        .change("up_proj.scales", shrink_scales)
        .change("post_attention_layernorm.weight", grow);
    assert!(tiny.notes().iter().any(|note| note.contains("not exactly f16")), "{:?}", tiny.notes());
    assert_same("scales beyond f16", &tiny.logits(), &expected);
}

#[test]
fn unknown_groups_are_refused_and_placeholders_are_not_followed() {
    let expected = Artifact::new("groups-as-they-are").logits();
    let zero = |t: &mut Tensor| t.data.fill(0);
    let minus_one = |t: &mut Tensor| t.data.fill(0xFF);
    let empty = |t: &mut Tensor| *t = Tensor { shape: vec![0], data: vec![], ..t.clone() };
    let readable = [
        ("zeros", Artifact::new("groups-zero").change(".g_idx", zero)),
        ("minus ones", Artifact::new("groups-minus-one").change(".g_idx", minus_one)),
        ("nothing in them", Artifact::new("groups-empty").change(".g_idx", empty)),
        ("none", Artifact::new("groups-absent").without(".g_idx")),
    ];
    for (what, artifact) in readable {
        assert_same(what, &artifact.logits(), &expected);
        let unknown = artifact.say("desc_act", json!(true)).refusal();
        assert!(
            unknown.contains("q_proj: expected g_idx, without which desc_act: true"),
            "{what}: {unknown}"
        );
    }
    let uneven = Artifact::new("groups-uneven").change(".g_idx", |t| t.data[0] = 1).refusal();
    assert!(uneven.contains("g_idx: expected 64 features in group 0, got 63"), "{uneven}");
}

#[test]
fn a_format_that_the_zero_points_contradict_is_refused() {
    let wrong = Artifact::new("zeros-of-v2").say("checkpoint_format", json!("gptq_v2")).refusal();
    assert!(wrong.contains("as checkpoint_format gptq_v2 has them, got those of gptq"), "{wrong}");
}

/// One subtraction a word is how v1 has been written since 2024.
#[test]
fn asymmetric_zero_points_are_the_same_in_both_formats_whatever_borrows() {
    let source = artifact("--group-size 64 --order file --asym --checkpoint-format gptq_v2");
    let with_zeros = |name: &str| {
        Artifact::of(name, &source).change(".qzeros", |t| {
            // Every third zero point becomes 0.
            let words = t.words().into_iter().map(|word| word & 0xF0FF_F0F0);
            t.data = words.flat_map(u32::to_le_bytes).collect();
        })
    };
    let expected = with_zeros("zeros-v2").logits();
    let v1 = with_zeros("zeros-v1-borrowed").say("checkpoint_format", json!("gptq")).change(".qzeros", |t| {
        let words = t.words().into_iter().map(|word| word.wrapping_sub(0x1111_1111));
        t.data = words.flat_map(u32::to_le_bytes).collect();
    });
    assert_same("v1 with borrows", &v1.logits(), &expected);
}

#[test]
fn linears_that_are_dense_or_of_another_width_are_read_beside_the_others() {
    let (four, eight) =
        (artifact("--group-size 64 --order file"), artifact("--bits 8 --group-size 64 --order file"));
    let wider = ModelFolder::read(&eight);
    let source = ModelFolder::read(&demo());
    let mut mixed = Artifact::of("mixed-widths", &four);
    for (name, tensor) in wider.tensors.iter().filter(|(name, _)| name.contains("k_proj.")) {
        mixed.folder.tensors.insert(name.clone(), tensor.clone());
    }
    let undescribed = mixed.refusal();
    assert!(undescribed.contains("k_proj.qweight: expected shape"), "{undescribed}");
    let mixed = mixed.say("dynamic", json!({"+:.*\\.k_proj": {"bits": 8}}));
    let (plain, mixed_logits) = (logits(&four), mixed.logits());
    assert!(mixed_logits != plain, "the wider linears are used");

    // A dense linear with the very values that its codes have changes nothing.
    let mut dense = Artifact::of("mixed-dense", &four).without("o_proj.qweight");
    for (name, tensor) in source.tensors.iter().filter(|(name, _)| name.ends_with("o_proj.weight")) {
        dense.folder.tensors.insert(name.clone(), tensor.clone());
    }
    let said = dense.notes();
    assert!(
        said.iter().any(|note| note.contains("o_proj: not quantized, though the description")),
        "{said:?}"
    );
    let list = json!([
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"]
    ]);
    let listed = dense.say("modules_in_block_to_quantize", list.clone());
    assert_eq!(listed.notes(), [""; 0]);
    let apart: Vec<f32> = listed.logits().iter().zip(&plain).map(|(a, b)| a - b).collect();
    let size = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
    assert!(size(&apart) < 0.1 * size(&plain), "near what the codes give: {}", size(&apart) / size(&plain));
    let contradicted =
        Artifact::of("mixed-contradicted", &four).say("modules_in_block_to_quantize", list).refusal();
    assert!(contradicted.contains("o_proj: expected a floating-point .weight"), "{contradicted}");
    let rule = Artifact::of("mixed-rule", &four).say("dynamic", json!({"-:.*o_proj": {}})).refusal();
    assert!(rule.contains("o_proj: expected a floating-point .weight"), "{rule}");
}

#[test]
fn a_head_beside_a_tie_is_used_if_it_differs() {
    let expected = logits(&demo());
    let write = |name: &str, change: &dyn Fn(&mut ModelFolder)| {
        let (dir, mut folder) = (workplace(name), ModelFolder::read(&demo()));
        folder.config["tie_word_embeddings"] = json!(true);
        change(&mut folder);
        folder.write(&dir);
        dir
    };
    let own = write("tie-own-head", &|_| {});
    assert_same("a head of its own", &logits(&own), &expected);
    let embedding = |folder: &mut ModelFolder| folder.tensor("model.embed_tokens.weight").clone();
    let copied = write("tie-copied", &|folder| {
        let embedding = embedding(folder);
        folder.tensors.insert("lm_head.weight".into(), embedding);
    });
    let embedding_only = write("tie-embedding", &|folder| {
        folder.tensors.remove("lm_head.weight");
    });
    let head_only = write("tie-head", &|folder| {
        let embedding = embedding(folder);
        folder.tensors.remove("model.embed_tokens.weight");
        folder.tensors.insert("lm_head.weight".into(), embedding);
    });
    let tied = logits(&embedding_only);
    assert_same("a copy of the embedding", &logits(&copied), &tied);
    assert_same("the head alone", &logits(&head_only), &tied);
    assert!(ModelFiles::open(&copied).unwrap().notes.is_empty());
}

#[test]
fn codes_without_a_description_and_a_description_without_codes_say_so() {
    let mut nothing = Artifact::new("undescribed");
    nothing.folder.config.as_object_mut().unwrap().remove("quantization_config");
    nothing.folder.write(&nothing.dir);
    let message = ModelFiles::open(&nothing.dir).err().unwrap().to_string();
    assert!(message.contains("packed weights, but neither quantize_config.json"), "{message}");
    fs::write(nothing.dir.join("quant_config.json"), r#"{"w_bit": 4, "q_group_size": 128}"#).unwrap();
    let message = ModelFiles::open(&nothing.dir).err().unwrap().to_string();
    assert!(message.contains("got those of AWQ"), "{message}");
    let mut empty = Artifact::new("codeless");
    empty.folder.tensors = ModelFolder::read(&demo()).tensors;
    assert!(empty.refusal().contains("expected packed weights (.qweight)"));
}

#[test]
fn a_bias_that_the_family_does_not_know_is_refused_unless_it_says_nothing() {
    let zero = Artifact::new("bias-zero");
    assert_eq!(zero.notes(), [""; 0], "the usual all-zero biases");
    let some = zero.change("k_proj.bias", |t| t.data[1] = 0x3C).refusal();
    assert!(some.contains("k_proj.bias: expected none or zeros"), "{some}");
    let mut family = Artifact::new("bias-missing");
    family.folder.config["attention_bias"] = json!(true);
    let missing = family.without("q_proj.bias").refusal();
    assert!(missing.contains("q_proj.bias is missing"), "{missing}");
}

#[test]
fn a_model_saved_without_its_head_class_is_read_by_its_type() {
    let (dir, mut folder) = (workplace("bare-model"), ModelFolder::read(&demo()));
    folder.config["architectures"] = json!(["LlamaModel"]);
    folder.config["tie_word_embeddings"] = json!(true);
    folder.tensors.remove("lm_head.weight");
    folder.write(&dir.join("whole"));
    let expected = logits(&dir.join("whole"));
    let bare = folder.tensors.into_iter().map(|(name, t)| (name.trim_start_matches("model.").to_owned(), t));
    ModelFolder { config: folder.config, tensors: bare.collect() }.write(&dir.join("bare"));
    assert_same("names without model.", &logits(&dir.join("bare")), &expected);
}

#[test]
fn half_precision_weights_of_another_type_are_no_contradiction() {
    let bf16 =
        Artifact::new("norms-f32").change("norm.weight", |t| *t = Tensor::f32(t.shape.clone(), &t.halves()));
    assert!(bf16.folder.tensors.values().any(|tensor| tensor.dtype == Dtype::F32));
    assert_same("norms in f32", &bf16.logits(), &Artifact::new("norms-f16").logits());
}
