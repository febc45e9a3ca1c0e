"""Which files of a parent the child takes over as they are, and whether a link would bring in what is none of it.

Names alone: what is changed in them, and what stands in them, is the business of child/companions.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slerpkit.files import nested_files, stays_within
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import (
    COMPANION_FILES,
    GENERATION_NAME,
    MODULE_FILES,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
    matching_files,
)

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Parents
    from slerpkit.parity.report import ParityReport


def copied_files(parity: ParityReport, modules_role: str | None) -> list[tuple[str, tuple[str, ...]]]:
    """(role, patterns) of what is copied: the parent, "primary" or "secondary", and its files beside the weights.

    modules_role: the parent whose modules of sentence-transformers the child has.
    """
    chosen = (
        (parity.vocabulary.tokenizer_source, TOKENIZER_FILES),
        (parity.template.role, TEMPLATE_FILES),
        ("primary", COMPANION_FILES),
        (modules_role, MODULE_FILES),
    )
    return [(role, patterns) for role, patterns in chosen if role is not None]


def check_links(parents: Parents, parity: ParityReport, modules_role: str | None) -> None:
    """Raises SlerpMergeError where a link that leads out of a parent's folder would bring a file into the child.

    Weights may lie anywhere: nothing but weights comes through them.
    """
    made_from = ("primary", ("config.json", GENERATION_NAME))
    for role, patterns in (made_from, *copied_files(parity, modules_role)):
        folder = parents.by_role[role].folder
        paths = [file for path in matching_files(folder, patterns) for file in with_nested(path)]
        if role == modules_role:
            paths += [folder / name for module in parents.by_role[role].modules for name in module.files]
        for path in paths:
            if not stays_within(path, folder):
                raise SlerpMergeError(
                    f"{path} is a link that leads outside its folder, to {path.resolve()}, and would be copied.",
                    "A downloaded model has no business there. If you made the link yourself, add --follow-links.",
                )


def with_nested(path: Path) -> Iterator[Path]:
    """A path, and all below it where it is a folder."""
    yield path
    yield from nested_files(path) if path.is_dir() else ()
