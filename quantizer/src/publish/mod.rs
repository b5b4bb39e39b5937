//! The card of a repository with several branches, and that of each branch: what there is, what it costs, which engines load it,
//! how it is fetched and run. Everything in it comes from the artifacts and their logs.

mod base;
#[cfg(test)]
pub(crate) mod testing;
mod usage;

use std::path::Path;

pub use self::base::Base;
use crate::Result;
use crate::card;
use crate::record::QuantizeLog;
use crate::table::{self, Row};

/// Everything that the cards say.
#[derive(Clone, Debug)]
pub struct Publication {
    /// `owner/name` of the repository.
    pub repo: String,
    /// The base model's name, for titles.
    pub name: String,
    pub base: Base,
    /// A branch each, `main` among them or not.
    pub branches: Vec<Published>,
    /// A conversation as the model's template writes it, with `{system_message}` and `{prompt}` in it.
    pub prompt: Option<String>,
    /// Licence files that lie in the branches.
    pub licences: Vec<String>,
    /// Pictures that lie beside the card, with what they show.
    pub pictures: Vec<(String, String)>,
}

/// A branch.
#[derive(Clone, Debug)]
pub struct Published {
    pub row: Row,
    pub log: Option<QuantizeLog>,
}

impl Published {
    /// The artifact in a folder, known by its branch's name.
    pub fn read(dir: &Path, branch: &str) -> Result<Option<Self>> {
        let Some(row) = table::measure_as(dir, branch)? else { return Ok(None) };
        Ok(Some(Self { row, log: QuantizeLog::read(dir)? }))
    }
}

impl Publication {
    /// The card of a branch. Each has all of it, since each is read alone; the title says which it is.
    pub fn card(&self, branch: &str) -> String {
        let own = self.branches.iter().find(|published| published.row.branch == branch);
        let mut text = self.header(own);
        let title = if branch == "main" { String::new() } else { format!(", branch `{branch}`") };
        text += &format!("# {}, GPTQ{title}\n\n{}\n", self.name, self.introduction());
        text += &self.files();
        if let Some(log) = own.and_then(|published| published.log.as_ref()) {
            text += &format!("## This branch\n\n{}{}", card::parameters(log), card::calibration(log));
        }
        text += &self.calibration();
        text += &self.prompt();
        text += &usage::download(&self.repo, &self.others());
        text += &usage::run(&self.repo, self);
        text += &self.licence();
        text += &self.original();
        text
    }

    /// What the hub reads.
    fn header(&self, own: Option<&Published>) -> String {
        let mut lines = Vec::new();
        if let Some(id) = &self.base.id {
            lines.push(format!("base_model: {id}"));
            lines.push("base_model_relation: quantized".into());
        }
        lines.push("library_name: transformers".into());
        lines.push("pipeline_tag: text-generation".into());
        lines.extend(self.base.licence.iter().map(|(key, value)| format!("{key}: {}", quoted(value))));
        if !self.base.languages.is_empty() {
            lines.push("language:".into());
            lines.extend(self.base.languages.iter().map(|language| format!("- {}", quoted(language))));
        }
        let bits = own.or(self.branches.first()).map(|published| published.row.bits);
        lines.push("tags:\n- gptq".into());
        lines.extend(bits.map(|bits| format!("- {bits}-bit")));
        format!("---\n{}\n---\n\n", lines.join("\n"))
    }

    fn introduction(&self) -> String {
        let source = match &self.base.id {
            Some(id) => format!("[{id}](https://huggingface.co/{id})"),
            None => self.name.clone(),
        };
        let made = self.branches.iter().find_map(|published| published.log.as_ref());
        let made = made.map_or("gptq".to_owned(), |log| log.made_by.clone());
        let several = match self.branches.len() {
            1 => "One set of weights.".to_owned(),
            n => format!("{n} sets of weights, one a branch, of different size and accuracy; pick one."),
        };
        format!("GPTQ weights of {source}, made by {made}. {several}\n")
    }

    fn files(&self) -> String {
        let rows: Vec<_> = self.branches.iter().map(|published| published.row.clone()).collect();
        let mut text = format!("## Provided files\n\n{}\n", table::to_markdown(&rows));
        for (file, what) in &self.pictures {
            text += &format!("![{what}]({file})\n\n");
        }
        text += &measured(&self.branches);
        text += "- **Bits**: of a weight's code. Fewer make smaller files and larger errors.\n\
                 - **GS** (group size): inputs that share a scale. Smaller groups are more accurate and take more memory; \
                 None is one scale for each row.\n\
                 - **Act Order**: columns are solved by falling importance, which is more accurate.\n\
                 - **Damp %**: share of the mean of the Hessian's diagonal that is added to it before it is factored.\n\
                 - **GPTQ Dataset**, **Seq Len**: the text that calibrated the weights, and the tokens of its sequences. It need \
                 not be what the model was trained on.\n\
                 - **ExLlama**: whether its kernels read the file.\n\n";
        text
    }

    /// Which text the Hessians saw.
    fn calibration(&self) -> String {
        let mut names: Vec<_> = self
            .branches
            .iter()
            .filter_map(|published| published.log.as_ref()?.calibration.as_ref())
            .map(|c| (c.dataset.as_str(), c.samples, c.seq_len))
            .collect();
        names.sort();
        names.dedup();
        let line = |(name, samples, seq_len): &(&str, usize, usize)| {
            let test = match name.ends_with(":test") {
                true => " This is the **test split**: perplexity on it flatters these files.",
                false => "",
            };
            format!("Calibrated on {samples} sequences of {seq_len} tokens from {name}.{test}\n")
        };
        match names.is_empty() {
            true => String::new(),
            false => format!("## Calibration\n\n{}\n", names.iter().map(line).collect::<String>()),
        }
    }

    fn prompt(&self) -> String {
        let Some(prompt) = &self.prompt else { return String::new() };
        format!("## Prompt template\n\n{}\n\n", fenced(prompt.trim_end()))
    }

    fn others(&self) -> Vec<&str> {
        let names = self.branches.iter().map(|published| published.row.branch.as_str());
        names.filter(|name| *name != "main").collect()
    }

    fn licence(&self) -> String {
        let name = self.base.licence.get("license_name").or(self.base.licence.get("license"));
        let name = name.map_or(String::new(), |name| format!(" ({name})"));
        let files = match self.licences.is_empty() {
            true => String::new(),
            false => {
                let links: Vec<_> = self.licences.iter().map(|file| format!("[{file}]({file})")).collect();
                format!(
                    " Its files are carried along: {}; where there are several, all of them apply.",
                    links.join(", ")
                )
            }
        };
        format!(
            "## Licence\n\nThe licence of the original model{name} applies to these weights, too.{files}\n\n"
        )
    }

    /// The base model's card, as its authors wrote it.
    fn original(&self) -> String {
        if self.base.text.is_empty() {
            return String::new();
        }
        let by = self
            .base
            .id
            .as_ref()
            .map_or(self.name.clone(), |id| format!("[{id}](https://huggingface.co/{id})"));
        format!(
            "---\n\n# Original model card\n\nWritten by the authors of {by}, unchanged:\n\n{}\n",
            self.base.text
        )
    }
}

/// Of what the table's measurements are.
fn measured(branches: &[Published]) -> String {
    let evaluation = branches.iter().find_map(|published| published.log.as_ref()?.evaluation.as_ref());
    let Some(e) = evaluation else { return String::new() };
    let baseline = e.baseline_perplexity.map_or(String::new(), |perplexity| {
        format!(" The original has perplexity {perplexity:.3}; KL divergence from it is in nats a token, Top-1 the share of tokens whose likeliest choice is the same.")
    });
    format!(
        "Perplexity: {}, rows joined {}, {} windows of {} tokens, {} tokens scored.{baseline}\n\n",
        e.protocol.dataset, e.protocol.join, e.protocol.windows, e.protocol.ctx, e.tokens_scored
    )
}

/// A value that cannot be anything else to a reader of YAML.
fn quoted(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
    // Norway's code is not the opposite of yes.
    let is_word = !value.is_empty()
        && value.chars().all(plain)
        && !["no", "yes", "on", "off", "true", "false", "null"].contains(&value);
    match is_word && !value.ends_with(':') && !value.starts_with('-') {
        true => value.to_owned(),
        false => serde_json::Value::from(value).to_string(),
    }
}

/// A block of text that shows as it is, whatever backticks it has.
fn fenced(text: &str) -> String {
    let mut fence = "```".to_owned();
    while text.contains(&fence) {
        fence.push('`');
    }
    format!("{fence}\n{text}\n{fence}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::CalibrationRecord;

    fn publication() -> Publication {
        let calibration = CalibrationRecord {
            dataset: "wikitext2:test".into(),
            fingerprint: "0".into(),
            join: "raw".into(),
            sampling: "random".into(),
            samples: 128,
            seq_len: 8192,
            seed: 0,
        };
        let log = QuantizeLog {
            made_by: "gptq 0.1.0".into(),
            calibration: Some(calibration),
            ..QuantizeLog::default()
        };
        let card = "---\nlicense: llama2\nlanguage:\n- en\n- no\n---\n# CausalLM\nOurs.";
        Publication {
            repo: "someone/CausalLM-7B-GPTQ".into(),
            name: "CausalLM-7B".into(),
            base: Base::read(Some("CausalLM/7B".into()), card),
            branches: testing::branches(&log),
            prompt: Some("<|im_start|>system\n{system_message}<|im_end|>\n```\n{prompt}".into()),
            licences: vec!["LICENSE".into(), "LICENSE-llama2.txt".into()],
            pictures: vec![("size.svg".into(), "Size against KL divergence".into())],
        }
    }

    #[test]
    fn a_card_says_what_there_is_and_how_to_get_and_run_it() {
        let text = publication().card("main");
        let header = "---\nbase_model: CausalLM/7B\nbase_model_relation: quantized\nlibrary_name: transformers\n\
                      pipeline_tag: text-generation\nlicense: llama2\nlanguage:\n- en\n- \"no\"\ntags:\n- gptq\n- 4-bit\n---\n\n# CausalLM-7B, GPTQ\n";
        assert!(text.starts_with(header), "{text}");
        for part in [
            "| main | 4 | 128 | Yes | 0.1 |",
            "| vLLM 0.33 | No: refuses desc_act with groups |",
            "**test split**",
            "````\n<|im_start|>system\n{system_message}<|im_end|>\n```\n{prompt}\n````",
            "gptq download someone/CausalLM-7B-GPTQ:gptq-4bit-32g-actorder_True",
            "hf download someone/CausalLM-7B-GPTQ --revision gptq-4bit-32g-actorder_True",
            "`someone/CausalLM-7B-GPTQ:gptq-4bit-32g-actorder_True`",
            "gptq serve --model-id someone/CausalLM-7B-GPTQ",
            "[LICENSE](LICENSE), [LICENSE-llama2.txt](LICENSE-llama2.txt)",
            "![Size against KL divergence](size.svg)",
            "# Original model card\n\nWritten by the authors of [CausalLM/7B]",
            "# CausalLM\nOurs.",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        let other = publication().card("gptq-8bit-128g-actorder_True");
        assert!(other.contains("# CausalLM-7B, GPTQ, branch `gptq-8bit-128g-actorder_True`"));
        assert!(other.contains("- 8-bit\n") && other.contains("## This branch"));
    }
}
