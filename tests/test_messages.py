"""What the system refuses, and what cannot be loaded, in words: the cause, and a remedy that is true."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from slerpkit.messages import explain_import_error, explain_os_error, explain_refusal


def refusal(number: int, *path: str) -> OSError:
    return OSError(number, os.strerror(number), *path)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "close other programs"),
        (errno.EFBIG, "--max-shard-size"),
        (errno.ENOMEM, "--threads 1"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.EACCES, "or choose another place"),
        (errno.EPERM, "or choose another place"),
        (errno.EROFS, "mounted read-only"),
        (errno.ENOSPC, "Free some space"),
        (errno.EXDEV, "Check the path and the disk"),
    ],
    ids=errno.errorcode.get,
)
def test_each_refusal_has_the_remedy_that_fits(number, remedy):
    told = explain_os_error(refusal(number), Path("model.safetensors"), "write")
    assert told.message == f"Could not write model.safetensors: {os.strerror(number)}."
    assert remedy in told.hint
    assert remedy in explain_refusal(refusal(number)).hint
    assert explain_refusal(refusal(number, "model")).message == f"Could not use model: {os.strerror(number)}."


def test_what_may_not_be_read_is_not_said_to_belong_elsewhere():
    told = explain_os_error(refusal(errno.EACCES), Path("config.json"), "read")
    assert told.hint == "Check who owns it and its permissions."


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.EACCES, errno.EFBIG, errno.ENODEV])
@pytest.mark.parametrize("doing", ["read", "write", "copy", "read the tensor a from"])
def test_nobody_is_told_to_delete_what_may_be_right(number, doing):
    told = explain_os_error(refusal(number), Path("model.safetensors"), doing)
    assert not {"delete", "remove", "download"} & set(told.hint.lower().replace(".", " ").split())


def test_memory_that_ran_out_is_called_so():
    told = explain_refusal(MemoryError())
    assert (told.message, "--threads 1" in told.hint) == ("The system refused: out of memory.", True)


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("No module named 'yaml'", "pip install"),
        ("numpy.so: failed to map segment from shared object", "ulimit -v"),
        ("libc.so: cannot allocate memory in static TLS block", "ulimit -v"),
        ("numpy: MemoryError: ", "ulimit -v"),
    ],
)
def test_a_package_is_blamed_only_where_memory_is_not(reason, remedy):
    told = explain_import_error(ImportError(reason))
    assert told.message == f"A package cannot be loaded: {' '.join(reason.split())}."
    assert remedy in told.hint


def test_of_what_a_package_says_of_its_fault_the_cause_is_told():
    page = ImportError("IMPORTANT: PLEASE READ THIS\n" + 99 * "advice\n")
    page.__cause__ = ImportError("libblas.so: cannot open shared object file")
    told = explain_import_error(page)
    assert told.message == "A package cannot be loaded: libblas.so: cannot open shared object file."
