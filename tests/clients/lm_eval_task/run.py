"""The evaluation harness's `local-completions` against a served model: loglikelihoods and generated texts.

usage: run.py GPTQ MODEL   (needs lm_eval[api] and transformers; takes about a minute with the demo's model)
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
import transformers
from lm_eval.tasks import TaskManager

from server import served

HERE = Path(__file__).parent
TEXT = "The river rises in the hills and flows through the old city . The king of England came in the summer . " * 8
WINDOW = 64


def ask(url, **body):
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))["choices"][0]


def perplexity(program, model):
    """Of the first window of a text, by `gptq eval`: no server, no cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(TEXT)
        command = [program, "eval", model, "--dataset", str(path), "--join", "raw", "--ctx", str(WINDOW)]
        command += ["--max-windows", "1", "--device", "cpu", "--json"]
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return report["perplexity"]


def scores(url, tokenizer):
    """A prompt alone: no token is generated, and every token of the prompt but the first has its log-probability."""
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids[:WINDOW]
    choice = ask(url, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    logprobs = choice["logprobs"]["token_logprobs"]
    assert len(logprobs) == WINDOW and logprobs[0] is None and choice["finish_reason"] == "length", choice
    return math.exp(-sum(logprobs[1:]) / (WINDOW - 1))


def harness(url, model, tasks):
    arguments = dict(model="m", base_url=url + "/v1/completions", tokenizer=model, tokenizer_backend="huggingface",
                     max_length=256, num_concurrent=2)
    here = os.getcwd()
    # The tasks name their data by relative paths.
    os.chdir(HERE)
    try:
        return lm_eval.simple_evaluate("local-completions", model_args=arguments, tasks=tasks, log_samples=True,
                                       task_manager=TaskManager(include_path=str(HERE)), bootstrap_iters=0)
    finally:
        os.chdir(here)


def main(program, model):
    program, model = str(Path(program).resolve()), str(Path(model).resolve())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    with served(program, model) as url:
        served_perplexity, own = scores(url, tokenizer), perplexity(program, model)
        assert abs(served_perplexity / own - 1) < 1e-4, (served_perplexity, own)
        found = harness(url, model, ["gptq_words", "gptq_lines"])
        for sample in found["samples"]["gptq_words"]:
            for arguments, ((loglikelihood, greedy),) in zip(sample["arguments"], sample["resps"]):
                context, word = arguments[:2]
                before, both = (tokenizer(text, add_special_tokens=False).input_ids for text in (context, context + word))
                logprobs = ask(url, prompt=both, max_tokens=0, echo=True, logprobs=1)["logprobs"]["token_logprobs"]
                assert abs(sum(logprobs[len(before):]) - loglikelihood) < 1e-3, (context, word)
                likeliest = ask(url, prompt=before, max_tokens=len(both) - len(before), temperature=0)["text"]
                assert greedy == (likeliest == word), (context, word, likeliest, greedy)
        for sample in found["samples"]["gptq_lines"]:
            plain = ask(url, prompt=sample["doc"]["text"], max_tokens=12, temperature=0)["text"]
            assert sample["resps"][0][0] == plain.split(".")[0], (sample["resps"], plain)
    results = {task: {k: v for k, v in values.items() if "," in k} for task, values in found["results"].items()}
    print(f"lm_eval {lm_eval.__version__}: perplexity served {served_perplexity:.5f}, own {own:.5f}; {results}")


if __name__ == "__main__":
    main(*sys.argv[1:])
