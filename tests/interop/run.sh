#!/usr/bin/env bash
# Our artifacts of the demo model in GPTQModel and transformers on the CPU: the same logits? By hand, not part of
# .ci/run: at its first run it installs several GB of Python packages under target/interop.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=target/interop/venv/bin/python
if ! "$python" -c 'import gptqmodel' 2>/dev/null; then
    python3 -m venv target/interop/venv
    "$python" -m pip install -q 'torch==2.15.*' 'transformers==5.24.*' 'safetensors' setuptools wheel
    # Its build looks at the torch that is installed.
    "$python" -m pip install -q --no-build-isolation 'gptqmodel==7.7.*' 'optimum==2.3.*'
fi
cargo build --release --bin gptq --example logits
exec env OMP_NUM_THREADS=1 "$python" tests/interop/compare.py target/release target/interop
