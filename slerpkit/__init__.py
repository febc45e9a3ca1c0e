"""slerpmerge: two language models of one architecture become one, by spherical linear interpolation."""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """`from slerpkit import merge_models`: loaded when it is asked for, so that a module costs what it needs itself."""
    if name == "merge_models":
        from slerpkit.story import merge_models

        return merge_models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
