"""The primary as its class would load it, looked at beside the questions.

In a process of its own: to load the libraries here would hold up what the person types, and print over it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from slerpkit.evaluation.loading import load_without_weights
from slerpkit.merge.team import PACKAGE_ROOT, SAFE_PATH
from slerpkit.messages import format_names
from slerpkit.parents.checkpoint import open_checkpoint

NAMED_KEYS = 3


class Lookahead:
    """What one model's class misses of it, as soon as that is known."""

    def __init__(self, folder: Path, base: Path | None = None) -> None:
        """base: of an adapter."""
        self.folder = folder
        self.warning: str | None = None
        self._process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):  # where no process can be started, the merge itself says so
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    LOOK,
                    str(PACKAGE_ROOT),
                    *(str(place.resolve()) for place in (folder, base) if place),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                start_new_session=True,  # Ctrl-C reaches the main process alone
            )

    def look(self, seconds: float = 0) -> str | None:
        """A warning of what the class misses; None where it misses nothing, or where that is not known by then."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                self.warning = self._process.communicate()[0] or None
                self._process = None
        return self.warning

    def end(self) -> None:
        """Gives up what is not known yet."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def what_is_lacking(folder: Path, base: Path | None = None) -> str:
    """What a person is told of the keys that a model's class needs and has not; empty where there is none."""
    loading = load_without_weights(open_checkpoint(folder, base))
    name, sentences = loading.architecture, []
    if loading.missing:
        lost = f"{name} needs {format_names(loading.missing, NAMED_KEYS)}, which the primary lacks"
        sentences.append(f"{lost}; whoever loads the child gets random numbers there.")
    if loading.mismatched:
        names = format_names(loading.mismatched, NAMED_KEYS)
        sentences.append(f"{name} has {names} in another shape than the primary; the child will not load as it is.")
    return " ".join(sentences)


LOOK = f"""
import os, sys
{SAFE_PATH}
if hasattr(os, "nice"):
    os.nice(10)  # the workers load at the same time, and are needed sooner
from pathlib import Path
from {what_is_lacking.__module__} import {what_is_lacking.__name__} as look
sys.stdout.buffer.write(look(*map(Path, sys.argv[2:])).encode("utf-8", "backslashreplace"))
sys.stdout.flush()
os._exit(0)  # without taking the libraries apart first
"""
