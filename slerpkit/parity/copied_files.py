"""The files of a parent that the child takes over as they are: which, whether they are whole, whose they really are.

What is changed in them on the way is the business of child/companions.py. Read report.py before this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slerpkit.files import file_size, json_fault, matching_files, nested_files, read_bytes, stays_within
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import (
    COMPANION_FILES,
    GENERATION_NAME,
    MODULE_FILES,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
)
from slerpkit.parity.modules import modules_source
from slerpkit.parity.report import Mismatch
from slerpkit.parity.tokenizer_source import code_of_tokenizer
from slerpkit.parity.vocabulary import MAX_TOKENIZER_BYTES
from slerpkit.recipe import PARENTS

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity.report import ChildTemplate, Vocabulary


@dataclass(frozen=True)
class CopiedFiles:
    """Some files of one parent, which go together."""

    role: str  # of the parent: "primary" or "secondary"
    folder: Path
    patterns: tuple[str, ...]  # of files and whole folders directly in it
    nested: tuple[str, ...] = ()  # others, by their paths in it

    @property
    def paths(self) -> Iterator[Path]:
        """All of them that are there, and what whole folders hold."""
        for path in matching_files(self.folder, self.patterns):
            yield path
            yield from nested_files(path) if path.is_dir() else ()
        yield from (self.folder / name for name in self.nested)


def copied_files(
    primary: Checkpoint, secondary: Checkpoint, vocabulary: Vocabulary, template: ChildTemplate
) -> list[CopiedFiles]:
    """All that the child takes over, each group from the one parent that it belongs to."""
    models = {"primary": primary, "secondary": secondary}
    found = []
    for role, patterns in ((vocabulary.tokenizer_source, TOKENIZER_FILES), (template.role, TEMPLATE_FILES)):
        if role is not None:
            found.append(CopiedFiles(role, models[role].tokenizer_folder, patterns))
    found.append(CopiedFiles("primary", primary.companion_folder, COMPANION_FILES))
    if (role := modules_source(primary, secondary)) is not None:
        nested = tuple(name for module in models[role].modules for name in module.files)
        found.append(CopiedFiles(role, models[role].companion_folder, MODULE_FILES, nested))
    if vocabulary.tokenizer_source == "secondary":
        code, _ = code_of_tokenizer(primary.companion_folder, secondary.companion_folder)
        found.append(CopiedFiles("secondary", secondary.companion_folder, (), tuple(sorted(code))))
    return found


def check_copied_json(copied: Iterable[CopiedFiles]) -> list[Mismatch]:
    """A line of each file that the child gets as it stands and that is no JSON; it blocks where its tokens stand there.

    Nobody else need open these files before the child is loaded.
    """
    mismatches = []
    for group in copied:
        files = {path.relative_to(group.folder).as_posix(): path for path in group.paths if path.is_file()}
        tokens_file = "tokenizer.json" if "tokenizer.json" in files else "vocab.json"
        for name, path in sorted(files.items()):
            is_readable = name.endswith(".json") and file_size(path) <= MAX_TOKENIZER_BYTES
            fault = json_fault(read_bytes(path, MAX_TOKENIZER_BYTES)) if is_readable else None
            if fault is not None:
                states = ("no valid JSON" if owner == group.role else "not taken" for owner in PARENTS)
                mismatches.append(judge_copied_json(name, states, fault, name == tokens_file))
    return mismatches


def judge_copied_json(name: str, states: Iterable[str], fault: str, holds_tokens: bool) -> Mismatch:
    """What follows from a file that is no JSON. states: of it in each parent."""
    fault = f"{fault[:1].upper()}{fault[1:]}."
    if holds_tokens:
        return Mismatch("blocking", name, *states, f"{fault} The child could not speak: get this file anew.")
    return Mismatch("notice", name, *states, f"{fault} The child has it as it is; what reads it may fail.")


def check_links(copied: Iterable[CopiedFiles], primary: Checkpoint, secondary: Checkpoint) -> None:
    """Raises SlerpMergeError where a link that leads out of a parent's folder would bring a file into the child.

    Weights may lie anywhere: nothing but weights comes through them.
    """
    made_from = (
        CopiedFiles("primary", primary.companion_folder, ("config.json", GENERATION_NAME)),
        CopiedFiles("secondary", secondary.companion_folder, (GENERATION_NAME,)),
    )
    for group in (*made_from, *copied):
        for path in group.paths:
            if not stays_within(path, group.folder):
                raise SlerpMergeError(
                    f"{path} is a link that leads outside its folder, to {path.resolve()}, and would be copied.",
                    "A downloaded model has no business there. If you made the link yourself, add --follow-links.",
                )
