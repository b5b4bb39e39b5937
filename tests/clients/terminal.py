"""`gptq chat` in a terminal: editing, history, and what Ctrl-C means.

usage: terminal.py GPTQ MODEL   (Python's own library suffices)
"""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    """The program behind a pseudo terminal, its prompt awaited."""

    def __init__(self, program, model, *options):
        self.text = ""
        self.child, self.file = pty.fork()
        if self.child == 0:
            os.environ["TERM"] = "xterm"
            os.execv(program, [program, "chat", model, "--device", "cpu", "--temperature", "0", *options])
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.prompt()

    def read(self, done, seconds=60):
        """What comes until `done` says so."""
        begun, end = len(self.text), time.monotonic() + seconds
        while not done(self.text[begun:]):
            assert time.monotonic() < end, f"after {seconds} s: {self.text[begun:]!r}"
            if select.select([self.file], [], [], 0.05)[0]:
                piece = os.read(self.file, 4096).decode(errors="replace")
                # What moves the cursor is not text.
                self.text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", piece)
        return self.text[begun:]

    def prompt(self):
        return self.read(lambda text: text.endswith("> "))

    def send(self, keys):
        os.write(self.file, keys.encode())

    def answer(self, keys):
        """The answer to what these keys say."""
        self.send(keys + "\r")
        said = self.read(lambda text: text.endswith("\n> "))
        return said.split("\n", 1)[1].removesuffix("\n> ")

    def status(self):
        """How the program ended."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                self.read(lambda text: text, 0.2)
            except (AssertionError, OSError):
                pass
            done, status = os.waitpid(self.child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("the program goes on")


def main():
    program, model = sys.argv[1:]
    terminal = Terminal(program, model, "--max-new-tokens", "12")
    first = terminal.answer("The river")
    assert len(first) > 3, first
    terminal.answer("/reset")
    assert terminal.answer("The riverss\x7f\x7f") == first, "backspace"
    terminal.answer("/reset")
    assert terminal.answer(UP + UP) == first, "the line before the last one"
    terminal.send(CTRL_D)
    assert terminal.status() == 0
    print("editing ok")

    terminal = Terminal(program, model, "--max-new-tokens", "4000")
    terminal.send("The river\r")
    terminal.read(lambda text: len(text) > 60)
    terminal.send(CTRL_C)
    terminal.prompt()
    assert len(terminal.text) < 6000, "the answer was stopped"
    terminal.answer("/help")
    terminal.send("half a line" + CTRL_C)
    assert terminal.status() == 130
    print("Ctrl-C ok")


if __name__ == "__main__":
    main()
