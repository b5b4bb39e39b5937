"""A server of the program's for as long as a client needs it."""

import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager


@contextmanager
def served(program, model, *options):
    """A server on a free port, ready; ended as an operator ends it."""
    command = [program, "serve", "--model-id", model, "--port", "0", "--device", "cpu", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url = server.stdout.readline().split("listening on ")[1].strip()
        for _ in range(600):
            try:
                urllib.request.urlopen(url + "/health").close()
                break
            except urllib.error.HTTPError:
                time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        assert server.wait(timeout=95) == 0, "the server did not end cleanly"
