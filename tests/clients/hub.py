"""Python's huggingface_hub and gptq at one cache, against a server that behaves as a hub does.

    python hub.py GPTQ STAND_IN ARTIFACT
"""

import os
import pty
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

gptq, stand_in, artifact = (os.path.abspath(path) for path in sys.argv[1:4])
hf = str(Path(sys.executable).with_name("hf"))
REPO = "acme/tiny-GPTQ"
BRANCH = "gptq-8bit"


def main():
    server = subprocess.Popen(
        [stand_in, f"{REPO}={artifact}", f"{REPO}:{BRANCH}={artifact}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    endpoint = server.stdout.readline().strip()
    try:
        with tempfile.TemporaryDirectory() as work:
            for check in [ours_for_python, pythons_for_us, both_at_once, plain_folder, pushed_for_python, asked_first]:
                check(Caches(endpoint, Path(work) / check.__name__))
                print(f"ok: {check.__doc__}")
    finally:
        server.stdin.close()
        server.wait()


class Caches:
    def __init__(self, endpoint, home):
        self.home = home
        self.env = {
            "PATH": os.environ["PATH"], "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HOME": str(home),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_read",
        }

    def start(self, *command, **env):
        return subprocess.Popen(
            command, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *command, **env):
        process = self.start(*command, **env)
        out, errors = process.communicate()
        assert process.returncode == 0, f"{command}: {errors}"
        return out.strip(), errors

    def python(self, code, **env):
        return self.run(sys.executable, "-c", code, **env)[0]


def same(folder):
    for path in Path(artifact).iterdir():
        if path.is_file():
            assert (Path(folder) / path.name).read_bytes() == path.read_bytes(), path.name


def ours_for_python(caches):
    "Python verifies and reads a cache that we have filled"
    folder, _ = caches.run(gptq, "download", f"{REPO}:{BRANCH}")
    same(folder)
    verified, _ = caches.run(hf, "cache", "verify", REPO, "--revision", BRANCH)
    print(f"    {verified.splitlines()[0]}")
    code = f"import huggingface_hub as h; print(h.snapshot_download({REPO!r}, revision={BRANCH!r}))"
    assert caches.python(code, HF_HUB_OFFLINE="1") == folder
    # Online it finds nothing to fetch, and one file by its name.
    assert caches.python(code) == folder
    code = f"import huggingface_hub as h; print(h.hf_hub_download({REPO!r}, 'config.json', revision={BRANCH!r}))"
    assert caches.python(code) == f"{folder}/config.json"
    code = "import huggingface_hub as h; i = h.scan_cache_dir(); print(len(i.repos), len(i.warnings))"
    assert caches.python(code) == "1 0"


def pythons_for_us(caches):
    "We read a cache that Python has filled"
    caches.run(hf, "download", REPO)
    asked, errors = caches.run(gptq, "download", REPO)
    assert "fetch" not in errors and "files" not in errors, errors
    same(asked)
    report, _ = caches.run(gptq, "inspect", REPO, HF_HUB_OFFLINE="1")
    assert "sound" in report or "tensors" in report, report


def both_at_once(caches):
    "Both fill one cache at once"
    processes = [caches.start(*command) for command in [(gptq, "download", REPO), (hf, "download", REPO)] * 2]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    caches.run(hf, "cache", "verify", REPO)
    folder, _ = caches.run(gptq, "download", REPO)
    same(folder)


def plain_folder(caches):
    "Each knows what the other has put into a folder of plain files"
    folder = caches.home / "plain"
    caches.run(gptq, "download", REPO, "--local-dir", str(folder))
    same(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    caches.run(hf, "download", REPO, "--local-dir", str(folder))
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file() or path in times}
    shutil.rmtree(folder)
    caches.run(hf, "download", REPO, "--local-dir", str(folder))
    _, errors = caches.run(gptq, "download", REPO, "--local-dir", str(folder))
    assert "files," not in errors, errors


def pushed_for_python(caches):
    "Python fetches what we have pushed, and sees nothing to send"
    pushed = "acme/pushed-GPTQ"
    for branch in ["other", "main"]:
        options = ["--branch", branch, "--yes"]
        caches.run(gptq, "push", artifact, pushed, *options, HF_TOKEN="hf_write")
    for revision in ["other", "main"]:
        folder, _ = caches.run(hf, "download", pushed, "--revision", revision, "--quiet")
        same(folder.splitlines()[-1].removeprefix("path="))
        caches.run(hf, "cache", "verify", pushed, "--revision", revision)
    code = f"import huggingface_hub as h; print(sorted(b.name for b in h.list_repo_refs({pushed!r}).branches))"
    assert caches.python(code) == "['main', 'other']"


def asked_first(caches):
    "Nothing is sent before a terminal's yes"
    repo = "acme/asked-GPTQ"
    command = [gptq, "push", artifact, repo]

    def answered(answer):
        child, terminal = pty.fork()
        if child == 0:
            os.execve(gptq, command, caches.env | {"HF_TOKEN": "hf_write"})
        seen = b""
        while b"[y/N]" not in seen:
            seen += os.read(terminal, 1000)
        os.write(terminal, answer + b"\n")
        try:
            while piece := os.read(terminal, 1000):
                seen += piece
        except OSError:
            pass  # the end of a pseudo terminal
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seen.decode()

    code, seen = answered(b"")
    assert code == 1 and "nothing was sent" in seen and "model.safetensors" in seen, seen
    code = f"import huggingface_hub as h; print(h.repo_exists({repo!r}))"
    assert caches.python(code) == "False"
    exit_code, seen = answered(b"y")
    assert exit_code == 0 and "read back and compared" in seen, seen
    assert caches.python(code) == "True"


if __name__ == "__main__":
    main()
