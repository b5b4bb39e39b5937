//! How the files are fetched and run, by us and by others.

use super::Publication;

/// `others`: branches besides main.
pub(super) fn download(repo: &str, others: &[&str]) -> String {
    let folder = repo.rsplit('/').next().unwrap_or(repo);
    let mut commands =
        vec![format!("gptq download {repo}"), format!("hf download {repo} --local-dir {folder}")];
    if let Some(branch) = others.first() {
        commands.push(format!("gptq download {repo}:{branch}"));
        commands.push(format!("hf download {repo} --revision {branch} --local-dir {folder}-{branch}"));
    }
    let name = others.first().map_or(repo.to_owned(), |branch| format!("{repo}:{branch}"));
    format!(
        "## Download\n\n```\n{}\n```\n\nA branch is named behind a colon, or by `--revision`. In text-generation-webui, `{name}` is what \
         goes into the field of the model's download; the loader is ExLlamaV2 or Transformers, and its settings come from the files.\n\n",
        commands.join("\n")
    )
}

/// Engines are named only where they load what `main`, or else the first branch, holds.
pub(super) fn run(repo: &str, publication: &Publication) -> String {
    let main = publication.branches.iter().find(|published| published.row.branch == "main");
    let branch = main.or(publication.branches.first());
    let loads = |name: &str| {
        let engines = branch.into_iter().flat_map(|published| &published.row.engines);
        engines.into_iter().any(|verdict| verdict.engine.starts_with(name) && verdict.loads)
    };
    let mut text = format!(
        "## Run\n\nWith gptq, on a CPU or an NVIDIA GPU:\n\n```\ngptq chat {repo}\ngptq serve --model-id {repo} --port 3000\n```\n\n"
    );
    if loads("vLLM 0.33") {
        text += &format!("With vLLM:\n\n```\nvllm serve {repo}\n```\n\n");
    } else if loads("vLLM") {
        text += &format!("With vLLM up to 0.27:\n\n```\nvllm serve {repo} --quantization gptq\n```\n\n");
    }
    if loads("TGI") {
        text += &format!(
            "With text-generation-inference:\n\n```\ndocker run --gpus all --shm-size 1g -p 3000:80 \
             ghcr.io/huggingface/text-generation-inference:3.3 --model-id {repo} --quantize gptq\n```\n\n"
        );
    }
    if loads("transformers") {
        text += &format!(
            "From Python, with `pip install transformers accelerate optimum gptqmodel`:\n\n```python\n\
             from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             model = AutoModelForCausalLM.from_pretrained(\"{repo}\", revision=\"{}\", device_map=\"auto\")\n\
             tokenizer = AutoTokenizer.from_pretrained(\"{repo}\")\n\
             inputs = tokenizer(\"Once upon a time\", return_tensors=\"pt\").to(model.device)\n\
             print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))\n```\n\n",
            branch.map_or("main", |published| published.row.branch.as_str())
        );
    }
    text + "Once a server runs on port 3000, `InferenceClient(\"http://localhost:3000\")` of huggingface_hub and the OpenAI client \
            with `base_url=\"http://localhost:3000/v1\"` talk to it.\n\n"
}
