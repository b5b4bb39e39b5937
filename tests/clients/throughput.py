"""A large file from a hub on this machine: gptq beside Python's client, in turn, by hand.

    python throughput.py GPTQ STAND_IN [BYTES [ROUNDS]]

gptq hashes what arrives; Python's client looks at the length alone.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

gptq, stand_in = (os.path.abspath(path) for path in sys.argv[1:3])
size = int(sys.argv[3]) if len(sys.argv) > 3 else 2_000_000_000
rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 3
hf = str(Path(sys.executable).with_name("hf"))
REPO = "acme/large"


def main():
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "model").mkdir()
        with open(work / "model/model.safetensors", "wb") as file:
            block = os.urandom(1 << 20)
            for start in range(0, size, len(block)):
                # No two blocks are alike.
                file.write((start.to_bytes(8, "little") + block)[: min(len(block), size - start)])
        server = subprocess.Popen(
            [stand_in, f"{REPO}={work / 'model'}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        endpoint = server.stdout.readline().strip()
        # The server has it in memory.
        shutil.rmtree(work / "model")
        commands = {"gptq": [gptq, "download", REPO], "hf": [hf, "download", REPO, "--quiet"]}
        times = {name: [] for name in commands}
        try:
            for number in range(rounds):
                order = list(commands) if number % 2 == 0 else list(commands)[::-1]
                for name in order:
                    times[name].append(timed(endpoint, work / "home", commands[name]))
        finally:
            server.stdin.close()
            server.wait()
    for name, seconds in times.items():
        median = sorted(seconds)[len(seconds) // 2]
        each = " ".join(f"{second:.2f}" for second in seconds)
        print(f"{name:5} {median:.2f} s, {size / median / 1e9:.2f} GB/s (each: {each})")


def timed(endpoint, home, command):
    env = {
        "PATH": os.environ["PATH"], "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HOME": str(home),
        "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    os.sync()
    start = time.monotonic()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    blobs = [path for path in home.rglob("blobs/*") if path.is_file()]
    assert sum(path.stat().st_size for path in blobs) >= size, blobs
    shutil.rmtree(home)
    return seconds


if __name__ == "__main__":
    main()
