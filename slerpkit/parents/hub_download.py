"""Files of a model on their way from the Hub into the cache, by a process of its own.

So Ctrl-C ends it at once, and nothing that a library prints or keeps in memory reaches the merge. What is fetched, and
when, is not known here. Read hub.py before this.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slerpkit.lazy import huggingface_hub
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.hub import errors_explained, is_connection_error
from slerpkit.parents.hub_cache import HubName, RemoteModel

FILES_AT_ONCE = 4  # what is cut off begins anew with its file, so no more than keeps a line busy
LOOK_SECONDS = 0.1  # between two looks at what has arrived
FAREWELL_SECONDS = 2.0  # for the library to put away what is under way
ANSWER_MARK = "=== slerpmerge:"
PAUSES = (1.0, 5.0, 20.0)  # seconds before a file is tried again
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# Parts that the library never takes up again: each download has a name of its own.
USELESS_PART = re.compile(r"\.[0-9a-f]{8}\.incomplete")


def fetch_files(remote: RemoteModel, names: Sequence[str], advanced: Callable[[int], None]) -> None:
    """Fetches files of a model that are not here. advanced: told of bytes as they arrive.

    Raises SlerpMergeError where the Hub, the network or the disk does not let it; whole files stay, and are not
    fetched again.
    """
    parts_before = set(parts_of(remote))
    message = json.dumps([remote.named.name, remote.named.revision, *names])
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, str(PACKAGE_ROOT), message],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env={**os.environ, "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0"},  # a second copy of all on the disk
        start_new_session=True,  # Ctrl-C reaches the main process alone
    )
    told = 0
    try:
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            arrived = min(bytes_here(remote, names, parts_before), sum(remote.sizes[name] for name in names))
            advanced(max(arrived - told, 0))
            told = max(told, arrived)
        answer = process.communicate()[0]
    except BaseException:
        end(process)
        remove_useless_parts(set(parts_of(remote)) - parts_before)
        raise
    fault = answer.partition(ANSWER_MARK)[2]  # before it, whatever a library prints
    if fault.strip():
        raise SlerpMergeError(*json.loads(fault))
    if missing := [name for name in names if not (remote.folder / name).is_file()]:
        what = f"The download of {remote.named.name} ended before {missing[0]} was here (status {process.returncode})."
        raise SlerpMergeError(what, "Try again; what is whole is kept.")
    advanced(sum(remote.sizes[name] for name in names) - told)


def parts_of(remote: RemoteModel) -> Iterable[Path]:
    """What stands in the cache of files that are not whole."""
    return (remote.named.folder / "blobs").glob("*.incomplete")


def bytes_here(remote: RemoteModel, names: Sequence[str], parts_before: set[Path]) -> int:
    """Bytes that have arrived of some files, whole or in part."""
    whole = sum(remote.sizes[name] for name in names if (remote.folder / name).is_file())
    parts = 0
    for part in set(parts_of(remote)) - parts_before:
        with contextlib.suppress(OSError):  # moved to its place meanwhile
            parts += part.stat().st_size
    return whole + parts


def end(process: subprocess.Popen[str]) -> None:
    """Ends a download: first as Ctrl-C would, then by force."""
    process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
    try:
        process.communicate(timeout=FAREWELL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def remove_useless_parts(parts: Iterable[Path]) -> None:
    """Removes what an ended download left and nothing takes up again."""
    for part in parts:
        if USELESS_PART.search(part.name):
            with contextlib.suppress(OSError):
                part.unlink()


def fetch_in_this_process(message: str) -> str:
    """Fetches what a message names; what went wrong, as a JSON list of message and hint, or nothing."""
    name, commit, *files = json.loads(message)

    def fetch(file: str) -> None:
        for wait in (*PAUSES, None):  # some versions of the library give up at the first broken connection
            try:
                huggingface_hub.hf_hub_download(name, file, revision=commit)
                return
            except Exception as error:
                if not is_connection_error(error):
                    raise
                if wait is None:
                    what = f"The connection to the Hub broke off while {name} was fetched."
                    raise SlerpMergeError(what, "Check the network.") from error
                time.sleep(wait)

    try:
        with errors_explained(HubName(name, commit)), ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(fetch, files))
    except SlerpMergeError as error:
        return json.dumps([error.message, error.hint])
    return ""


FETCH = f"""
import os, signal, sys
sys.path[:] = [sys.argv[1], *filter(None, sys.path)]  # not the current folder, which may be a stranger's
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
from {fetch_in_this_process.__module__} import {fetch_in_this_process.__name__} as fetch
print({ANSWER_MARK!r}, fetch(sys.argv[2]), flush=True)
os._exit(0)  # without waiting for what a library still does
"""
