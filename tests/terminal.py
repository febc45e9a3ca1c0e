"""Drives the real program on a real pseudo-terminal and keeps the screen that a person would see."""

from __future__ import annotations

import codecs
import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

try:
    import fcntl
    import pty
    import termios
except ImportError:  # Windows
    pty = None

PROGRAM = Path(__file__).resolve().parents[1] / "slerpmerge.py"
PATIENCE = 30  # seconds; only a program that hangs waits this long

needs_terminal = pytest.mark.skipif(pty is None, reason="this system has no pseudo-terminal (pty) to drive")

# Makes the pseudo-terminal the program's own, so that Ctrl-C reaches it as a signal; then becomes the program.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
)

TOKEN = re.compile(
    r"\x1b\[(?P<mode>[?>=]?)(?P<numbers>[\d;]*)(?P<command>[@-~])"  # a control sequence
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # a window title or a link
    r"|\x1b[ -/]*[0-Z\\^-~]"  # any other escape sequence
    r"|(?P<text>[^\x1b])"
)


def words(text: str) -> str:
    """What is drawn, without frames and line breaks, as one line."""
    return " ".join(re.sub(r"[│|╭╮╰╯─]", " ", text).split())


class Screen:
    """What stands on a terminal after all it was sent, with the lines that have scrolled off above it."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns = columns
        self.rows = rows
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0
        self.overrun: set[int] = set()  # lines that were longer than the terminal is wide
        self._rest = ""

    def __str__(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.lines)

    @property
    def overrun_lines(self) -> list[str]:
        return [str(self).split("\n")[row] for row in sorted(self.overrun)]

    def feed(self, text: str) -> str:
        """Takes what the program wrote; returns what a terminal would answer."""
        text = self._rest + text
        answers, position = "", 0
        while match := TOKEN.match(text, position):
            position = match.end()
            if match["text"]:
                self._write(match["text"])
            elif match["command"] and not match["mode"]:
                answers += self._obey(match["command"], [int(n or 0) for n in match["numbers"].split(";")])
        self._rest = text[position:]  # an escape sequence that has not come whole
        return answers

    def _write(self, character: str) -> None:
        from rich.cells import cell_len

        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._move(self.row + 1, self.column)
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character.isprintable():
            width = cell_len(character)
            if self.column + width > self.columns:
                self.overrun.add(self.row)
                self._move(self.row + 1, 0)
            line = self.lines[self.row]
            line += [" "] * (self.column - len(line))
            line[self.column : self.column + width] = [character, *[""] * (width - 1)]
            self.column += width

    def _move(self, row: int, column: int) -> None:
        self.row, self.column = max(0, row), max(0, column)
        self.lines += [[] for _ in range(self.row + 1 - len(self.lines))]

    def _obey(self, command: str, numbers: list[int]) -> str:
        top = max(0, len(self.lines) - self.rows)
        count = max(1, numbers[0])
        if command == "n" and numbers == [6]:  # where is the cursor?
            return f"\x1b[{self.row - top + 1};{min(self.column, self.columns - 1) + 1}R"
        if command == "A":
            self._move(max(top, self.row - count), self.column)
        elif command == "B":
            self._move(min(top + self.rows - 1, self.row + count), self.column)
        elif command == "C":
            self.column = min(self.columns - 1, self.column + count)
        elif command == "D":
            self.column = max(0, self.column - count)
        elif command == "G":
            self.column = count - 1
        elif command == "H":
            self._move(top + count - 1, (numbers[1:] or [1])[0] - 1)
        elif command == "K" and numbers == [0]:
            del self.lines[self.row][self.column :]
        elif command == "K" and numbers == [2]:
            self.lines[self.row] = []
        elif command == "J" and numbers == [0]:
            del self.lines[self.row][self.column :]
            self.lines[self.row + 1 :] = [[] for _ in self.lines[self.row + 1 :]]
        return ""


class Terminal:
    """The program on a pseudo-terminal. `with Terminal.start([...]) as terminal:` ends it in any case."""

    def __init__(self, process: subprocess.Popen, keyboard: int, screen: Screen) -> None:
        self.process = process
        self.keyboard = keyboard
        self.screen = screen
        self.output = ""  # everything the program wrote, escape sequences and all
        self.closed = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @classmethod
    def start(
        cls,
        arguments: Sequence[str | Path] = (),
        columns: int = 100,
        rows: int = 40,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Terminal:
        """Starts `slerpmerge.py` with these arguments, environment variables on top, and current folder."""
        keyboard, program_side = pty.openpty()
        fcntl.ioctl(program_side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        variables = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        variables.update({"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **(env or {})})
        process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, sys.executable, PROGRAM, *map(str, arguments)],
            stdin=program_side,
            stdout=program_side,
            stderr=program_side,
            cwd=folder,
            env=variables,
            start_new_session=True,
        )
        os.close(program_side)
        return cls(process, keyboard, Screen(columns, rows))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.keyboard)

    @property
    def text(self) -> str:
        """The screen as text, scrolled lines included, without escape sequences."""
        return str(self.screen)

    def send(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def answer(self, prompt: str, text: str = "", timeout: float = PATIENCE) -> None:
        """Types an answer and Enter once the prompt stands there."""
        self.wait_for(prompt, timeout)
        self.send(text + "\r")

    def answer_all(self, *dialogue: tuple[str, str]) -> None:
        """Types an answer at each of the prompts, one after the other."""
        for prompt, text in dialogue:
            self.answer(prompt, text)

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        self.interrupt()
        return self.exit_status()

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.send("\x03")

    def wait_for(self, text: str, timeout: float = PATIENCE) -> None:
        """Until the text is on the screen, broken over lines or not; fails, with the screen, where it never is."""
        deadline = time.monotonic() + timeout
        while "".join(text.split()) not in "".join(self.text.split()):
            if self.closed or time.monotonic() > deadline:
                happened = "the program ended" if self.closed else f"{timeout:g} s went by"
                raise AssertionError(f"{happened}, and {text!r} is not on the screen:\n{self.text}")
            self._read(0.1)

    def exit_status(self, timeout: float = PATIENCE) -> int:
        """Waits for the program's end; its exit status."""
        deadline = time.monotonic() + timeout
        while not self.closed and time.monotonic() < deadline:
            self._read(0.1)
        if not self.closed:
            raise AssertionError(f"the program did not end within {timeout:g} s:\n{self.text}")
        return self.process.wait(timeout)

    def _read(self, timeout: float) -> None:
        if not select.select([self.keyboard], [], [], timeout)[0]:
            return
        try:
            data = os.read(self.keyboard, 65536)
        except OSError:  # Linux says so once the program's side is closed
            data = b""
        self.closed = not data
        text = self._decoder.decode(data)
        self.output += text
        answers = self.screen.feed(text)
        if answers:
            self.send(answers)

    def resize(self, columns: int, rows: int = 40) -> None:
        """Gives the terminal another size, of which the program is told."""
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.columns, self.screen.rows = columns, rows

    def hang_up(self) -> int:
        """Closes the terminal under the program; its exit status."""
        os.close(self.keyboard)
        self.keyboard = os.open(os.devnull, os.O_RDWR)  # so that leaving has something to close
        return self.process.wait(PATIENCE)
