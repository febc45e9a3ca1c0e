"""The process and its terminal: signals, encodings, and how the process ends.

Knows nothing of merging. Loaded once the flags are read.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, NoReturn

from slerpkit.lazy import LazyModule
from slerpkit.merge.save_directory import STOP_SIGNALS
from slerpkit.threads import BackgroundThread

if TYPE_CHECKING:
    import colorama
else:  # so that a process without it can still end as it should
    colorama = LazyModule("colorama")


def collect_garbage_again() -> None:
    """A collector that rested while libraries were loaded goes back to work."""
    if not gc.isenabled():
        gc.freeze()  # of all that is loaded by now nothing is garbage
        gc.enable()


class Terminated(KeyboardInterrupt):
    """The system asked the process to end, as it does before a machine goes away or when a terminal is lost."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def signals_end_it() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end a merge as Ctrl-C does: tidily, and with what is finished kept."""

    def end(number: int, frame: object) -> None:
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in STOP_SIGNALS if number != signal.SIGINT]
    # What is ignored on purpose, as nohup has it, stays so.
    before = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def drop_output(stream: IO[str]) -> None:
    """Sends what a stream still holds, and what follows, nowhere: whoever read it is gone."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file, as in a test
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def leave(status: int) -> NoReturn:
    """Ends the process. Libraries that still load in the background are not waited for."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not spoil the leaving
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            drop_output(stream)  # else Python would complain of it, and change the status
    if threading.active_count() > 1 or BackgroundThread.were_started:
        os._exit(status)
    sys.exit(status)


def open_closed_streams() -> None:
    """Lets a stream that whoever started this has closed lead nowhere; else a model's file would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  as long as the process


def prepare_terminal() -> None:
    """Makes old consoles understand colours, and names that a terminal cannot show stop nothing."""
    open_closed_streams()
    colorama.just_fix_windows_console()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("NO_COLOR"):  # older versions of prompt_toolkit do not know it
        os.environ.setdefault("PROMPT_TOOLKIT_COLOR_DEPTH", "DEPTH_1_BIT")
