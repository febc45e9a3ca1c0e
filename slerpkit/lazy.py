"""Heavy libraries, each loaded when an attribute of it is first asked for.

Modules import the names from here at their top (`from slerpkit.lazy import torch`), so that importing them loads none:
`--help` and the first prompt wait for no library that they do not need. What a library is used for is not known here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule:
    """Stands for a module until an attribute of it is asked for; torch alone costs more than a second."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = load_module(self._name)
        if not hasattr(module, attribute):  # a module inside it, perhaps, that it does not load by itself
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(f"{self._name}.{attribute}")
        value = getattr(module, attribute)
        setattr(self, attribute, value)  # asked once; the next time it is simply there
        return value


def load_module(name: str) -> ModuleType:
    """A module, loaded now. Raises ImportError where it is not there, not whole, or broken in whatever way."""
    try:
        with single_threaded() if name == "numpy" else contextlib.nullcontext():
            module = importlib.import_module(name)
    except ImportError:
        raise
    except Exception as error:  # a broken package raises what it likes
        raise ImportError(f"{name}: {type(error).__name__}: {error}", name=name) from error
    if module.__spec__ is not None and module.__spec__.origin is None:
        raise ImportError(f"{name}: its folder holds no package", name=name)  # as half an uninstallation leaves it
    return module


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Lets numpy start no threads of its own: they would fight the workers, and tight limits do not allow them."""
    name = "OPENBLAS_NUM_THREADS"
    is_stated = name in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if not is_stated:
            del os.environ[name]


def load_modules(*names: str) -> None:
    """Loads what will be needed later, so that what is missing or broken is known now. Raises ImportError."""
    for name in names:
        load_module(name)


def lazy_modules(package: str, *names: str) -> Iterator[LazyModule]:
    """Some modules of a package."""
    return (LazyModule(f"{package}.{name}") for name in names)


if TYPE_CHECKING:
    import filelock
    import huggingface_hub
    import numpy
    import tokenizers
    import torch
    import transformers
    import yaml
else:
    filelock = LazyModule("filelock")
    huggingface_hub = LazyModule("huggingface_hub")
    numpy = LazyModule("numpy")
    tokenizers = LazyModule("tokenizers")
    torch = LazyModule("torch")
    transformers = LazyModule("transformers")
    yaml = LazyModule("yaml")
