"""The chat page in a real browser, over the DevTools protocol.

usage: page.py GPTQ MODEL PICTURES   (needs chromium and websocket-client; PICTURES is a folder for screenshots)
"""

import base64
import http.server
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager

import websocket

from server import served


class Page:
    def __init__(self, address):
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.count, self.events = 0, []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(domain + ".enable")

    def call(self, method, **parameters):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def run(self, script):
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script, seconds=60):
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"{script} is still false"
            time.sleep(0.02)

    def type(self, text):
        self.run("document.getElementById('text').focus()")
        self.call("Input.insertText", text=text)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13, "Escape": 27}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      text="\r" if key == "Enter" and kind == "keyDown" else "")

    def look(self, width, height, scheme):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def complaints(self):
        """What the browser found wrong: exceptions, and errors in its log."""
        of = {"Runtime.exceptionThrown": lambda p: True, "Runtime.consoleAPICalled": lambda p: True,
              "Log.entryAdded": lambda p: p["entry"]["level"] in ("warning", "error")}
        return [e for e in self.events if e["method"] in of and of[e["method"]](e["params"])]

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser():
    # Its last writes may come after its end.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        process = subprocess.Popen(["chromium", *options, "about:blank"], stderr=subprocess.PIPE, text=True)
        try:
            line = next(line for line in process.stderr if "DevTools listening on" in line)
            port = line.split("127.0.0.1:")[1].split("/")[0]
            pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
            yield Page(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"))
        finally:
            process.kill()
            process.wait()


def set_to(page, **fields):
    for name, value in fields.items():
        page.run(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")


def first_answer(page, text, **fields):
    """The answer to `text` in a new chat."""
    page.run("document.getElementById('reset').click()")
    set_to(page, temperature=0, max_tokens=12, **fields)
    page.type(text)
    page.press("Enter")
    page.until("document.querySelector('.assistant:not(.waiting)') !== null")
    page.until("document.getElementById('send').textContent === 'Send'")
    return page.run("document.querySelector('.assistant').textContent")


def parameters(page):
    """The fields reach the sampler."""
    plain = first_answer(page, "Who was the king?")
    stop = plain[len(plain) // 2 :][:3]
    assert first_answer(page, "Who was the king?", stop=f"never said\n{stop}\n") == plain[: plain.index(stop)]
    words = page.run("fetch('/tokenize', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify({inputs: ' city'})}).then(a => a.json())")
    wanted, text = words[-1]["id"], words[-1]["text"]
    for bias in (f"{wanted}: 100", f"1:-1,\n{wanted} : 1e2\n", json.dumps({wanted: 100})):
        answer = first_answer(page, "Who was the king?", stop="", logit_bias=bias, typical_p=0.5)
        assert answer.count(text.strip()) == 12, (bias, answer)
    asked = json.loads(page.run("body()"))
    assert asked["typical_p"] == 0.5 and asked["logit_bias"] == {str(wanted): 100} and "stop" not in asked, asked
    set_to(page, logit_bias="", typical_p=1)
    page.run("document.getElementById('reset').click()")


def converse(page):
    set_to(page, max_tokens=24, temperature=0)
    page.type("Tell me about the river.")
    page.press("Enter")
    page.until("document.querySelector('.assistant')?.textContent.length > 10")
    page.until("document.getElementById('send').textContent === 'Send'")
    assert page.run("document.querySelector('.user').textContent") == "Tell me about the river."
    page.type("<b>And</b> the king?")
    page.press("Enter")
    page.until("document.querySelectorAll('.assistant:not(.waiting)').length === 2")
    assert page.run("document.querySelectorAll('.user b').length") == 0, "a message is text, never markup"


def stop(page):
    """By key and by button; the whole answers would be far longer."""
    set_to(page, max_tokens=2000)
    ways = (lambda: page.press("Escape"), lambda: page.run("document.getElementById('send').click()"))
    for turn, end in enumerate(ways, start=2):
        page.type("Go on for a long time.")
        page.press("Enter")
        page.until(f"document.querySelectorAll('.assistant')[{turn}]?.textContent.length > 20")
        assert page.run("document.getElementById('send').textContent") == "Stop", "the answer ended by itself"
        end()
        page.until("document.getElementById('send').textContent === 'Send'")
        length = page.run(f"document.querySelectorAll('.assistant')[{turn}].textContent.length")
        assert length < 1500, f"{length} characters after the stop"
        assert page.run("history.length") == 2 * turn + 2, "what was said before the stop stays"


def fail(page, pictures):
    def refused(expected):
        page.type("This cannot be.")
        page.press("Enter")
        page.until(f"[...document.querySelectorAll('.error')].at(-1)?.textContent.includes({json.dumps(expected)})")
        assert page.run("history.length") == 8, "a question without an answer is not part of the conversation"

    set_to(page, top_p=5)
    refused("top_p")
    set_to(page, top_p=0.95)
    for bias in ("7", "7: much", "{7"):
        set_to(page, logit_bias=bias)
        refused("logit bias: ")
        page.run("document.querySelectorAll('.error').forEach(node => node.remove())")
    set_to(page, logit_bias="")
    page.run("served = fetch")
    proxy = "<html><style>b {}</style><title>Oh</title><h1>No route</h1>\n<p>to the model</html>"
    for status, said in ((502, "502 Bad Gateway No route to the model"), (200, "200 No route to the model")):
        answer = f"new Response({json.dumps(proxy)}, {{status: {status}, statusText: '{said.split(' No')[0][4:]}'}})"
        page.run(f"window.fetch = async () => {answer}; null")
        refused(said)
    page.run("""window.fetch = async () => new Response('{"detail": "gone"}', {status: 410}); null""")
    refused('410 {"detail": "gone"}')
    page.run("window.fetch = served; null")
    page.picture(pictures / "chat-errors.png")


class Silent(http.server.BaseHTTPRequestHandler):
    """Another site, with an empty page."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>elsewhere</title>")

    def log_message(self, *_):
        pass


def foreign(page, url):
    """A page of another site can neither have anything generated nor read an answer."""
    def asked():
        metrics = urllib.request.urlopen(url + "/metrics").read().decode()
        return [line for line in metrics.splitlines() if line.startswith("tgi_request_count ")]

    before, site = asked(), http.server.HTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    page.call("Page.navigate", url=f"http://127.0.0.1:{site.server_port}/")
    page.until("document.title === 'elsewhere'")
    body = json.dumps(json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 1}}))
    for kind in ("text/plain", "application/json"):
        for mode in ("cors", "no-cors"):
            sent = f"fetch('{url}/generate', {{method: 'POST', mode: '{mode}', headers: {{'Content-Type': '{kind}'}}, body: {body}}})"
            outcome = page.run(f"{sent}.then(answer => answer.type + answer.status, error => 'kept')")
            assert outcome in ("kept", "opaque0"), (kind, mode, outcome)
    assert page.run(f"fetch('{url}/info').then(answer => answer.text(), error => 'kept')") == "kept"
    framed = f"document.body.innerHTML = '<iframe src=\"{url}/\"></iframe>'; null"
    page.run(framed)
    assert asked() == before, "another site's page had something generated"
    site.shutdown()


def main():
    program, model, pictures = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
    pictures.mkdir(parents=True, exist_ok=True)
    with served(program, model) as url, browser() as page:
        page.call("Page.navigate", url=url + "/")
        page.until("document.readyState === 'complete' && document.getElementById('model').textContent !== ''")
        for check in (parameters, converse, stop):
            check(page)
            print(check.__name__, "ok")
        for width, height in ((1280, 800), (375, 700)):
            for scheme in ("light", "dark"):
                page.look(width, height, scheme)
                for settings in ("", "-settings"):
                    page.run(f"document.querySelector('details').open = {json.dumps(settings != '')}")
                    overflow = page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                    assert overflow <= 0, f"{overflow} pixels too wide at {width}"
                    page.picture(pictures / f"chat-{width}-{scheme}{settings}.png")
        asked = {e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"}
        assert all(address.startswith((url, "data:")) for address in asked), asked
        assert not page.complaints(), page.complaints()
        fail(page, pictures)
        print("look and fail ok")
        foreign(page, url)
        print("foreign ok")


if __name__ == "__main__":
    main()
