"""torch, numpy, transformers: loaded when an attribute is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class LazyModule:
    """Stands for a module until an attribute of it is asked for; torch alone costs more than a second."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # asked once; the next time it is simply there
        return value


if TYPE_CHECKING:
    import filelock
    import numpy
    import torch
else:
    numpy, torch = LazyModule("numpy"), LazyModule("torch")
    filelock = LazyModule("filelock")
