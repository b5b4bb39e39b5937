"""Quantizes the demo model in several ways, and compares our logits with those of GPTQModel and transformers.

Other programs multiply by a scale, so that a negative one is as good as any; here that is shown.

usage: compare.py FOLDER_OF_THE_PROGRAM WORKPLACE
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, safe_open

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets/demo4m"
LIMIT = 1e-2
TOKENS = [(37 * i + 11) % 2048 for i in range(96)]

# GPTQModel takes asymmetric v1 files from itself alone.
REFUSED = "4-bit 32g, asymmetric, v1"

# Name and options of `quantize`.
ARTIFACTS = [
    ("4-bit 128g, as by default", ""),
    ("4-bit 128g, scales without signs", "--preset card --order gar"),
    ("4-bit 128g, act-order", "--order act-order"),
    (REFUSED, "--group-size 32 --asym --order act-order"),
    ("4-bit 32g, asymmetric, gptq_v2", "--group-size 32 --asym --checkpoint-format gptq_v2"),
    ("8-bit, one group a row", "--bits 8 --group-size -1"),
    ("8-bit 128g, act-order", "--bits 8 --order act-order"),
    ("3-bit 128g", "--bits 3"),
    ("2-bit 32g, act-order", "--bits 2 --group-size 32 --order act-order"),
    ("4-bit 64g, in file order", "--group-size 64 --order file"),
    ("4-bit 128g, grids of the original weights", "--order static-groups"),
    ("4-bit 128g, no bias tensors", "--no-bias"),
]


def ours(program, folder, out):
    subprocess.run([program / "examples/logits", folder, out, *map(str, TOKENS)], check=True)
    return load_file(out)["logits"]


def logits_of(model):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0].float()


def by_gptqmodel(folder):
    from gptqmodel import BACKEND, GPTQModel

    # Its plain PyTorch kernel, which has 16-bit activations.
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    return logits_of(model.model)


def by_transformers(folder):
    from transformers import AutoModelForCausalLM

    # Whichever kernel it picks.
    return logits_of(AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float16, device_map="cpu").eval())


def negative_scales(folder):
    """The share of scales that are below zero: symmetric grids of the loop search have a sign."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        scales = torch.cat([file.get_tensor(key).flatten() for key in file.keys() if key.endswith(".scales")])
    return (scales < 0).float().mean().item()


def difference(theirs, reference):
    return (torch.linalg.norm(theirs - reference) / torch.linalg.norm(reference)).item()


def main(program, work):
    torch.set_num_threads(1)
    import gptqmodel
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, GPTQModel {gptqmodel.__version__}"
    lines = [f"\n{datetime.date.today()}, {versions}\n", "| artifact | scales below 0 | GPTQModel | transformers |"]
    lines.append("| --- | --- | --- | --- |")
    failed = False
    for i, (name, options) in enumerate(ARTIFACTS):
        folder = work / f"artifact{i}"
        shutil.rmtree(folder, ignore_errors=True)
        command = [program / "gptq", "quantize", DEMO, "--out", folder, "--device", "cpu", "--samples", "16"]
        command += ["--seq-len", "256", "--dataset", DEMO / "text/train-00000-of-00001.parquet", *options.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        reference = ours(program, folder, work / "ours.safetensors")
        cells = []
        for engine in (by_gptqmodel, by_transformers):
            try:
                distance = difference(engine(folder), reference)
                failed |= not distance <= LIMIT
                cells.append(f"{distance:.1e}")
            except Exception as error:
                failed |= not (name == REFUSED and engine is by_gptqmodel and "sym=False" in str(error))
                cells.append(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
        lines.append(f"| {name} | {100 * negative_scales(folder):.0f} % | {' | '.join(cells)} |")
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()))
