"""A stranger's program, such as a chat template, run for a text within limits of time, memory and length.

It runs in a forked process, the one place where a power of numbers or an endless loop can be ended from outside. What
the program is, is not known here. Read messages.py before this.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from slerpkit.messages import SlerpMergeError, shorten

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MOST_SECONDS = 10
MOST_BYTES = 1_000_000_000  # beside what the process holds when it begins
MOST_CHARACTERS = 1_000_000


def text_within_limits(make: Callable[[], str], what: str, hint: str) -> str:
    """The text that `make` returns. Raises SlerpMergeError, `what` with the reason, where it fails or takes too much.

    Only Linux forks safely beside other libraries' threads; elsewhere the length alone is bounded.
    """
    text, reason = forked_text(make) if sys.platform == "linux" else text_or_reason(make)
    if reason is not None:
        raise SlerpMergeError(f"{what}: {shorten(reason, 200)}", hint)
    return text


def text_or_reason(make: Callable[[], str]) -> tuple[str, str | None]:
    """(the text, None), or (nothing, why there is none)."""
    try:
        text = make()
    except Exception as error:  # a program of a stranger's fails in its own ways
        return "", str(error) or type(error).__name__
    if len(text) > MOST_CHARACTERS:
        return "", f"it makes {len(text):,} characters of it"
    return text, None


def forked_text(make: Callable[[], str]) -> tuple[str, str | None]:
    """As text_or_reason, from a process that is ended where it takes too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_text, args=(make, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(MOST_SECONDS):
            return "", f"it takes more than {MOST_SECONDS} s"
        return receiver.recv()
    except EOFError:
        return "", "it takes more memory than there is"
    finally:
        process.kill()
        process.join()
        receiver.close()


def send_text(make: Callable[[], str], sender: Connection) -> None:
    """Sends what text_or_reason has of it. Runs in the forked process."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends it
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm", encoding="ascii") as stream:
            held = int(stream.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES, hard))
    sender.send(text_or_reason(make))
