"""Tokenizers: whose the child gets, and which of the parents' rows stand for its tokens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import file_size, read_bytes, read_json, read_json_if_there
from slerpkit.lazy import numpy, tokenizers
from slerpkit.messages import SlerpMergeError, format_bytes
from slerpkit.parents.checkpoint import TOKENIZER_CORE_FILES
from slerpkit.parity.embeddings import token_tensors, vocabulary_rows
from slerpkit.parity.report import AppendedToken, Mismatch, RowMap, Vocabulary

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint

MAX_TOKENIZER_BYTES = 64_000_000


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of any kind."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_CORE_FILES)


def choose_tokenizer(asked: str, primary: Path, secondary: Path) -> tuple[str | None, str]:
    """(role, reason) of the parent whose tokenizer the child gets; `asked` is auto, primary or secondary.

    Raises SlerpMergeError where the one that was asked for has none.
    """
    folders = {"primary": primary, "secondary": secondary}
    there = [role for role, folder in folders.items() if has_tokenizer(folder)]
    if asked != "auto":
        if asked not in there:
            raise SlerpMergeError(
                f"The {asked} model has no tokenizer to copy.", "Choose the other, or leave it to auto."
            )
        return asked, "as asked"
    if len(there) < 2:
        return (there[0], "only it has a tokenizer") if there else (None, "neither parent has a tokenizer")
    mapped = [role for role in there if (folders[role] / "special_tokens_map.json").is_file()]
    if len(mapped) == 1:
        return mapped[0], "it alone has special_tokens_map.json"
    return "primary", f"{'both have' if mapped else 'neither has'} special_tokens_map.json"


def open_tokenizer(path: Path) -> Any:
    """A tokenizer.json as the tokenizers library has it. Raises SlerpMergeError where that cannot read it."""
    if file_size(path) > MAX_TOKENIZER_BYTES:
        raise SlerpMergeError(f"{path} is larger than {format_bytes(MAX_TOKENIZER_BYTES)}.", "Download it again.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises bare Exception for a fault of the file, or panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        hint = "Download it again, or update the tokenizers package."
        raise SlerpMergeError(f"{path} cannot be read by the tokenizers library ({error})", hint) from error


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens that a tokenizer's settings add to its vocabulary, with their ids."""
    tokens = read_json_if_there(folder / "added_tokens.json")
    decoder = read_json_if_there(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and re.fullmatch("[0-9]{1,9}", number):
            tokens[token["content"]] = int(number)
    return {content: number for content, number in tokens.items() if type(number) is int and number >= 0}


def read_tokens(folder: Path) -> dict[str, int]:
    """Every token of a folder's tokenizer with its id.

    Raises SlerpMergeError where there is no tokenizer, or none that can be read without running code.
    """
    if (folder / "tokenizer.json").is_file():
        tokens = open_tokenizer(folder / "tokenizer.json").get_vocab(with_added_tokens=True)
    elif (folder / "vocab.json").is_file():
        tokens = read_json(folder / "vocab.json")
    elif (folder / "vocab.txt").is_file():
        lines = read_bytes(folder / "vocab.txt").decode("utf-8", "replace").rstrip("\n").split("\n")
        tokens = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    else:
        what = f"{folder.name} has no tokenizer.json, vocab.json or vocab.txt"
        raise SlerpMergeError(what, "Load its tokenizer with transformers and save it: that writes tokenizer.json.")
    if not all(type(number) is int and number >= 0 for number in tokens.values()):
        raise SlerpMergeError(f"{folder.name} has a vocabulary whose ids are no numbers", "Download it again.")
    return {**added_tokens(folder), **tokens}


def have_same_tokens(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tokenizer, byte for byte where its vocabulary stands."""
    names = [
        {path.name for pattern in TOKENIZER_CORE_FILES for path in folder.glob(pattern)} - {"tokenizer_config.json"}
        for folder in (first, second)
    ]
    shared = {"tokenizer.json"} & names[0] & names[1] or names[0] & names[1]
    return (
        bool(shared)
        and all(
            len({read_bytes(folder / name, MAX_TOKENIZER_BYTES) for folder in (first, second)}) == 1 for name in shared
        )
        and added_tokens(first) == added_tokens(second)
    )


def extend_tokenizer(tokenizer: Any, tokens: Iterable[tuple[str, tuple[tuple[str, bool], ...]]]) -> None:
    """Adds tokens, (content, flags), behind the last id of a tokenizer of the tokenizers library."""
    for content, flags in tokens:
        token = tokenizers.AddedToken(content, **dict(flags))
        (tokenizer.add_special_tokens if dict(flags)["special"] else tokenizer.add_tokens)([token])


TOKEN_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
# An ordinary token of the other's becomes a word of its own; within words the donor's tokenizer stays as it is.
WHOLE_WORD = tuple((flag, flag == "single_word") for flag in TOKEN_FLAGS)


def tokens_to_append(
    donor: Path, other: Path, known: Mapping[str, int], found: Mapping[str, int]
) -> list[AppendedToken]:
    """Tokens of `found`, the other's, that `known`, the donor's, lacks, with the ids that the library gives them.

    Raises SlerpMergeError where either has no tokenizer.json.
    """
    for folder in (donor, other):
        if not (folder / "tokenizer.json").is_file():
            hint = "Save its tokenizer with transformers, or choose --tokenizer primary or secondary."
            raise SlerpMergeError(f"The union of two tokenizers needs tokenizer.json, which {folder} lacks.", hint)
    tokenizer, beside = (open_tokenizer(folder / "tokenizer.json") for folder in (donor, other))
    add_configured_tokens(tokenizer, donor)
    flags = {
        token.content: tuple((flag, getattr(token, flag)) for flag in TOKEN_FLAGS)
        for token in beside.get_added_tokens_decoder().values()
    }
    missing = sorted((number, content) for content, number in found.items() if content and content not in known)
    tokens = [(content, flags.get(content, WHOLE_WORD)) for _, content in missing]
    extend_tokenizer(tokenizer, tokens)
    appended = [AppendedToken(content, tokenizer.token_to_id(content), marks) for content, marks in tokens]
    if len({*known.values(), *(token.number for token in appended)}) < len(known) + len(appended):
        raise SlerpMergeError(
            f"The ids of {donor / 'tokenizer.json'} leave gaps that new tokens would fall into, among others' ids.",
            "There is no union with it; choose --tokenizer primary or secondary.",
        )
    return appended


def add_configured_tokens(tokenizer: Any, folder: Path) -> None:
    """Adds the tokens that a folder's settings add to its tokenizer.json, with the ids that they state."""
    known = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted((number, content) for content, number in added_tokens(folder).items() if content not in known)
    extend_tokenizer(tokenizer, [(content, (("special", False), ("normalized", False))) for _, content in tokens])
    for number, content in tokens:
        if tokenizer.token_to_id(content) != number:
            hint = "Load the tokenizer with transformers and save it, so that its files agree."
            raise SlerpMergeError(f"The tokenizer files of {folder} do not agree on the id of {content!r}.", hint)


def align_vocabularies(
    primary: Checkpoint, secondary: Checkpoint, tokenizer: str = "auto", base: Checkpoint | None = None
) -> tuple[Vocabulary, list[Mismatch]]:
    """The child's tokens, and which rows of the parents stand for them; what was found, for the parity table.

    tokenizer: as in MergeRecipe. Reads the tokenizers only where they differ, or where the rows do.
    Raises SlerpMergeError where a tokenizer that was asked for is not there.
    """
    asked = "auto" if tokenizer == "union" else tokenizer
    role, reason = choose_tokenizer(asked, primary.folder, secondary.folder)
    parents = [parent for parent in (primary, secondary, base) if parent is not None]
    rows = tuple(vocabulary_rows(parent) for parent in parents)
    donor = int(role == "secondary")
    names = tuple(frozenset(token_tensors(parent)) for parent in parents)
    plain = Vocabulary(role, reason, rows, rows[donor], names)
    folders = [parent.folder for parent in parents]
    if base is not None and not has_tokenizer(base.folder) and rows[2] == rows[0]:
        folders[2] = primary.folder  # many a base stands there as weights alone
    same = all(have_same_tokens(folders[0], folder) for folder in folders[1:])
    if same and (len(set(rows)) == 1 or None in rows):
        return plain, []
    try:
        if None in rows:
            raise SlerpMergeError("no matrix with a row for each token is known", "State vocab_size in config.json.")
        tokens = [read_tokens(folder) for folder in folders]
    except SlerpMergeError as error:
        if not same:
            return plain, tokens_not_known(plain, error, any(map(has_tokenizer, folders)), tokenizer)
        # The same ids, even if nobody can read what they stand for.
        tokens = [{str(number): number for number in range(min(rows))}] * len(rows)
    if all(part == tokens[0] for part in tokens) and len(set(rows)) == 1:
        return plain, []
    appended: list[AppendedToken] = []
    if tokenizer == "union" and not same:
        if max(tokens[donor].values()) >= rows[donor]:
            what = f"The tokenizer of {folders[donor]} has ids beyond the {rows[donor]} rows of its embedding."
            raise SlerpMergeError(what, "There is no union with it; choose --tokenizer primary or secondary.")
        there = {content: number for content, number in tokens[1 - donor].items() if number < rows[1 - donor]}
        appended = tokens_to_append(folders[donor], folders[1 - donor], tokens[donor], there)
    return match_rows(plain, tokens, appended, donor)


def tokens_not_known(vocabulary: Vocabulary, error: SlerpMergeError, speaks: bool, tokenizer: str) -> list[Mismatch]:
    """What follows where tokens cannot be compared: rows go by number where there are as many on each side."""
    rows, reason = vocabulary.parent_rows, error.message.rstrip(".")
    shown = [f"{count} rows" if count is not None else "unknown" for count in rows[:2]]
    if tokenizer == "union":
        return [
            Mismatch("blocking", "vocabulary", *shown, f"There is no union of tokens that cannot be read: {reason}.")
        ]
    if None not in rows and len(set(rows)) > 1:
        base_rows = f" (the base has {rows[2]})" if len(rows) > 2 else ""
        why = f"Rows differ in number{base_rows}, and tokens cannot be compared: {reason}."
        return [Mismatch("blocking", "vocabulary", *shown, why)]
    why = f"Tokens are not compared, so rows are blended by number: {reason}."
    return [Mismatch("notice", "vocabulary", *shown, why)] if speaks else []


def match_rows(
    plain: Vocabulary, tokens: Sequence[Mapping[str, int]], appended: Sequence[AppendedToken], donor: int
) -> tuple[Vocabulary, list[Mismatch]]:
    """The rows of each parent that stand for the child's tokens: the donor's in their order, then the appended."""
    rows, other = plain.parent_rows, 1 - donor
    count = max([rows[donor], *(token.number + 1 for token in appended)])
    found = [numpy.full(count, -1) for _ in rows]
    found[donor][: rows[donor]] = numpy.arange(rows[donor])
    has_token = numpy.zeros(count, bool)
    for token, number in sorted(tokens[donor].items()):
        if number < rows[donor]:
            has_token[number] = True
            for side in range(len(rows)):
                there = tokens[side].get(token, -1)
                if side != donor and 0 <= there < rows[side]:
                    found[side][number] = there
    is_blended = numpy.logical_and.reduce([part >= 0 for part in found])
    in_place = numpy.logical_and.reduce([part == found[0] for part in found])
    for side, part in enumerate(found):
        part[~is_blended & (side != donor)] = -1
    for token in appended:
        found[donor][token.number], found[other][token.number] = -1, tokens[other][token.content]
    counts = {
        "matched": int((is_blended & in_place).sum()),
        "moved": int((is_blended & ~in_place).sum()),
        "kept": int((has_token & ~is_blended).sum()),
        "padding": int(((found[donor] >= 0) & ~has_token).sum()),
        "appended": len(appended),
        "left_out": 0 if appended else len(tokens[other].keys() - tokens[donor].keys()),
    }
    vocabulary = dataclasses.replace(
        plain, rows=count, row_map=RowMap(tuple(found)), appended=tuple(appended), counts=tuple(counts.items())
    )
    return vocabulary, [describe_rows(vocabulary, counts, [len(part) for part in tokens[:2]])]


def describe_rows(vocabulary: Vocabulary, counts: Mapping[str, int], sizes: Sequence[int]) -> Mismatch:
    """The line of the parity table that says how many rows matched, moved and were kept."""
    shown = [f"{rows} rows, {size} tokens" for rows, size in zip(vocabulary.parent_rows, sizes)]
    if not counts["matched"] + counts["moved"]:
        return Mismatch("blocking", "vocabulary", *shown, "The tokenizers have no token in common.")
    donor, other = ("secondary", "primary") if vocabulary.role == "secondary" else ("primary", "secondary")
    words = {
        "matched": "in place",
        "moved": "moved",
        "kept": f"kept from the {donor}",
        "padding": f"of padding from the {donor}",
        "appended": f"appended from the {other}",
    }
    parts = ", ".join(f"{counts[key]} {text}" for key, text in words.items() if counts[key])
    lost = f" {counts['left_out']} of the {other}'s are left out; --tokenizer union would append them."
    return Mismatch(
        "resolved", "vocabulary", *shown, f"Rows follow tokens: {parts}.{lost if counts['left_out'] else ''}"
    )
