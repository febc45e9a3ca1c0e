"""The devices that arithmetic can run on, and the memory that they have.

Knows nothing of merging or judging. torch is asked only where a device other than the processor is spoken of.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from slerpkit.lazy import torch
from slerpkit.messages import SlerpMergeError


def accelerators() -> dict[str, bool]:
    """The devices torch knows beside the processor, and whether each is there."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


def is_available(device: str) -> bool:
    """Whether a device is there: the processor always is."""
    return device == "cpu" or accelerators().get(device, False)


def check_device(device: str) -> None:
    """Raises SlerpMergeError where a device is asked for that is not there."""
    if not is_available(device):
        raise SlerpMergeError(
            f"This machine has no {device.upper()} device that torch can use.",
            "Leave the device to auto; a merge is bound by reading and writing, and the processor does it well.",
        )


def free_memory() -> float:
    """Bytes of main memory that a new program could have; infinite where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def accelerator_memory(device: str) -> float:
    """Free bytes of a device that is not the processor."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    recommended = getattr(torch.mps, "recommended_max_memory", lambda: math.inf)()
    return recommended - torch.mps.current_allocated_memory()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Gives torch its own thread count back where something sets another."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
