"""The child's tokens, and which of the parents' rows stand for them.

Tokens are text and ids; how a tokenizer cuts a text is never asked. Tensors are known here by how many rows they have.
Read report.py, embeddings.py and tokenizer_source.py before this.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import file_size, matching_files, read_bytes, read_json, read_json_if_there
from slerpkit.lazy import numpy, tokenizers
from slerpkit.messages import SlerpMergeError, format_bytes, is_utf8, library_faults_named
from slerpkit.parents.checkpoint import TOKENIZER_CORE_FILES, has_tokenizer
from slerpkit.parity.embeddings import row_count, token_tensors, vocabulary_rows
from slerpkit.parity.report import NO_ROW, OF_BASE, AppendedToken, Mismatch, RowMap, Vocabulary
from slerpkit.parity.sentencepiece_file import find_sentencepiece, read_pieces
from slerpkit.parity.token_sources import pad_rows, place_given_rows, row_of
from slerpkit.parity.tokenizer_source import choose_tokenizer

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.recipe import MergeRecipe

MAX_TOKENIZER_BYTES = 64_000_000
SAVE_TOKENIZER = "Load its tokenizer with transformers and save it: that writes tokenizer.json."
# Parents of one base share nearly all of the smaller vocabulary's tokens.
MIN_SHARE_IN_COMMON = 0.5


def open_tokenizer(path: Path) -> Any:
    """A tokenizer.json as the tokenizers library has it. Raises SlerpMergeError where that cannot read it."""
    if file_size(path) > MAX_TOKENIZER_BYTES:
        raise SlerpMergeError(f"{path} is larger than {format_bytes(MAX_TOKENIZER_BYTES)}.", "It may be another file.")
    return read_tokenizer(read_bytes(path, MAX_TOKENIZER_BYTES), path)


def read_tokenizer(data: bytes, path: Path) -> Any:
    """The tokenizer in a tokenizer.json's content. Raises SlerpMergeError where the library cannot read it."""
    hint = "Update the tokenizers package, or compare the file with its source's."
    with library_faults_named(f"{path} cannot be read by the tokenizers library", hint):
        return tokenizers.Tokenizer.from_buffer(data)


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens that a tokenizer's settings add to its vocabulary, with their ids."""
    tokens = read_json_if_there(folder / "added_tokens.json")
    decoder = read_json_if_there(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for digits, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and re.fullmatch("[0-9]{1,9}", digits):
            tokens[token["content"]] = int(digits)
    return {
        content: token_id
        for content, token_id in tokens.items()
        if type(token_id) is int and token_id >= 0 and is_utf8(content)
    }


def all_added_tokens(folder: Path) -> set[str]:
    """What is added to the words of a folder's tokenizer, such as the marks of a chat, by any of its files.

    Raises SlerpMergeError where tokenizer.json cannot be read.
    """
    path = folder / "tokenizer.json"
    decoder = open_tokenizer(path).get_added_tokens_decoder() if path.is_file() else {}
    return {*added_tokens(folder), *(token.content for token in decoder.values())}


def read_tokens(folder: Path, role: str) -> dict[str, int]:
    """Every token of a folder's tokenizer with its id.

    role: whose it is; a folder may be named like another model's. Raises SlerpMergeError where there is no tokenizer,
    or none that can be read without running code.
    """
    if (folder / "tokenizer.json").is_file():
        tokens = open_tokenizer(folder / "tokenizer.json").get_vocab(with_added_tokens=True)
    elif (folder / "vocab.json").is_file():
        tokens = read_json(folder / "vocab.json")
    elif (folder / "vocab.txt").is_file():
        lines = read_bytes(folder / "vocab.txt").decode("utf-8", "replace").rstrip("\n").split("\n")
        tokens = {line.rstrip("\r"): token_id for token_id, line in enumerate(lines)}
    elif (model := find_sentencepiece(folder)) is not None:
        tokens = read_pieces(model)
        stated = added_tokens(folder)
        if any(stated.get(piece, token_id) != token_id for piece, token_id in tokens.items()):
            what = f"the {role} numbers the pieces of {model.name} in a way of its class's own"
            raise SlerpMergeError(what, SAVE_TOKENIZER)
    else:
        what = f"the {role} has no tokenizer.json, vocab.json, vocab.txt or sentencepiece model"
        raise SlerpMergeError(what, SAVE_TOKENIZER)
    if not all(type(token_id) is int and token_id >= 0 for token_id in tokens.values()):
        raise SlerpMergeError(f"the {role} has a vocabulary whose ids are no numbers", "Download it again.")
    return {**added_tokens(folder), **tokens}


def have_same_files(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tokenizer, byte for byte where its vocabulary stands."""
    shared = set.intersection(
        *({path.name for path in matching_files(folder, TOKENIZER_CORE_FILES)} for folder in (first, second))
    ) - {"tokenizer_config.json"}
    compared = {"tokenizer.json"} & shared or shared
    return bool(compared) and all(
        read_bytes(first / name, MAX_TOKENIZER_BYTES) == read_bytes(second / name, MAX_TOKENIZER_BYTES)
        for name in compared
    )


def have_same_tokens(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tokenizer, with the same tokens added to it."""
    return have_same_files(first, second) and added_tokens(first) == added_tokens(second)


def extend_tokenizer(tokenizer: Any, tokens: Iterable[tuple[str, tuple[tuple[str, bool], ...]]]) -> None:
    """Adds tokens, (content, flags), behind the last id of a tokenizer of the tokenizers library."""
    for content, flags in tokens:
        token = tokenizers.AddedToken(content, **dict(flags))
        (tokenizer.add_special_tokens if dict(flags)["special"] else tokenizer.add_tokens)([token])


TOKEN_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
# An ordinary token of the other's becomes a word of its own; within words the tokenizer stays as it is.
WHOLE_WORD = tuple((flag, flag == "single_word") for flag in TOKEN_FLAGS)
NOT_SPECIAL = tuple((flag, False) for flag in TOKEN_FLAGS)  # and found wherever its text stands


def tokens_to_append(
    folders: Sequence[Path],
    tokens: Sequence[Mapping[str, int]],
    rows: Sequence[int],
    source: int,
    is_union: bool,
    named: Iterable[str],
) -> list[AppendedToken]:
    """The tokens that the tokenizer's source lacks and the child gets, with the ids that the library gives them.

    folders, tokens, rows: of the primary and the secondary. source: 0 or 1, the parent that the tokenizer is from.
    is_union: whether all of the other's are wanted. named: those that a recipe speaks of. Raises SlerpMergeError where
    either has no tokenizer.json, or where the ids leave no room for more.
    """
    named = [token for token in dict.fromkeys(named) if token and token not in tokens[source]]
    if not is_union and not named:
        return []
    other = 1 - source
    if max(tokens[source].values()) >= rows[source]:
        what = f"The tokenizer of {folders[source]} has ids beyond the {rows[source]} rows of its embedding."
        raise SlerpMergeError(what, "There is no union with it; choose --tokenizer primary or secondary.")
    for folder in (folders[source], folders[other]):
        if not (folder / "tokenizer.json").is_file():
            hint = "Save its tokenizer with transformers, or choose --tokenizer primary or secondary."
            raise SlerpMergeError(f"The union of two tokenizers needs tokenizer.json, which {folder} lacks.", hint)
    tokenizer, other_tokenizer = (open_tokenizer(folders[number] / "tokenizer.json") for number in (source, other))
    add_configured_tokens(tokenizer, folders[source])
    flags = {
        token.content: tuple((flag, getattr(token, flag)) for flag in TOKEN_FLAGS)
        for token in other_tokenizer.get_added_tokens_decoder().values()
    }
    missing = tokens[other].keys() - tokens[source].keys() - {""} if is_union else set()
    in_order = sorted((tokens[other][content], content) for content in missing if tokens[other][content] < rows[other])
    wanted = {**{content: WHOLE_WORD for _, content in in_order}, **dict.fromkeys(named, NOT_SPECIAL)}
    additions = [(content, flags.get(content, its_flags)) for content, its_flags in wanted.items()]
    extend_tokenizer(tokenizer, additions)
    appended = [AppendedToken(content, tokenizer.token_to_id(content), its_flags) for content, its_flags in additions]
    ids = {*tokens[source].values(), *(token.token_id for token in appended)}
    if len(ids) < len(tokens[source]) + len(appended):
        file = folders[source] / "tokenizer.json"
        what = f"The ids of {file} leave gaps that new tokens would fall into, among others' ids."
        raise SlerpMergeError(what, "There is no union with it; choose --tokenizer primary or secondary.")
    return appended


def add_configured_tokens(tokenizer: Any, folder: Path) -> None:
    """Adds the tokens that a folder's settings add to its tokenizer.json, with the ids that they state.

    Raises SlerpMergeError where the library would give one another id.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted((token_id, text) for text, token_id in added_tokens(folder).items() if text not in vocabulary)
    extend_tokenizer(tokenizer, [(content, NOT_SPECIAL) for _, content in tokens])
    for token_id, content in tokens:
        if tokenizer.token_to_id(content) != token_id:
            hint = "Load the tokenizer with transformers and save it, so that its files agree."
            raise SlerpMergeError(f"The tokenizer files of {folder} do not agree on the id of {content!r}.", hint)


def align_vocabularies(
    primary: Checkpoint, secondary: Checkpoint, recipe: MergeRecipe, base: Checkpoint | None = None
) -> tuple[Vocabulary, list[Mismatch]]:
    """(the child's tokens and which rows of the parents stand for them, what is to know of it).

    Of the recipe it follows the tokenizer, the rows given to tokens, and the padding. Reads the tokenizers only where
    they differ, or where the rows do. Raises SlerpMergeError where a tokenizer that was asked for is not there, where
    there is no union, or where rows that are given are not there.
    """
    asked = "auto" if recipe.tokenizer == "union" else recipe.tokenizer
    tokenizer_source, reason = choose_tokenizer(asked, primary.tokenizer_folder, secondary.tokenizer_folder)
    source = int(tokenizer_source == "secondary")
    models = [model for model in (primary, secondary, base) if model is not None]
    rows = tuple(vocabulary_rows(model) for model in models)
    tables = [token_tensors(model) for model in models]
    limits = [max([count or 0, *map(row_count, infos.values())]) for count, infos in zip(rows, tables)]
    names = tuple(map(frozenset, tables))
    by_number = Vocabulary(tokenizer_source, reason, rows, rows[source], names, longest=limits[source])
    folders = [model.tokenizer_folder for model in models]
    if base is not None and not has_tokenizer(folders[2]) and rows[2] == rows[0]:
        folders[2] = folders[0]  # many a base stands there as weights alone
    same = all(have_same_tokens(folders[0], folder) for folder in folders[1:])
    same_rows = len(set(rows)) == 1 and all(
        row_count(info) == row_count(tables[0].get(name, info))
        for others in tables[1:]
        for name, info in others.items()
    )
    is_padded = None not in rows and rows[source] % recipe.pad_to_multiple_of > 0
    by_recipe = bool(recipe.token_sources) or is_padded
    if same and not by_recipe and (same_rows or None in rows):
        return by_number, []
    try:
        if None in rows:
            raise SlerpMergeError("no matrix with a row for each token is known", "State vocab_size in config.json.")
        tokens = [read_tokens(folder, role) for folder, role in zip(folders, ("primary", "secondary", "base"))]
    except SlerpMergeError as error:
        if by_recipe:
            hint = "Take what it says of tokens and of padding out of the recipe, or save both tokenizers again."
            raise SlerpMergeError(f"The rows of the recipe cannot be placed: {error.message}", hint) from error
        if None in rows or not all(have_same_files(folders[0], folder) for folder in folders[1:]):
            return by_number, judge_unread_tokens(rows, error, any(map(has_tokenizer, folders)), recipe.tokenizer)
        tokens = tokens_by_number([added_tokens(folder) for folder in folders], min(limits))
    if same_rows and not by_recipe and all(model_tokens == tokens[0] for model_tokens in tokens):
        return by_number, []
    wants_union = recipe.tokenizer == "union" and not same
    if (wants_union or by_recipe) and limits[source] > rows[source]:
        what = f"The embedding of {folders[source]} goes on behind its vocabulary, where new tokens would stand."
        raise SlerpMergeError(what, "There is no union with it; choose --tokenizer primary or secondary.")
    named = (given.token for given in recipe.token_sources)
    appended = tokens_to_append(folders, tokens, rows, source, wants_union, named)
    added = all_added_tokens(folders[source]) if recipe.pad_to_multiple_of > 1 else ()
    added = {tokens[source].get(content) for content in added}
    return match_rows(by_number, tokens, appended, limits, recipe, added)


def tokens_by_number(added: Sequence[Mapping[str, int]], count: int) -> list[dict[str, int]]:
    """Tokens of one tokenizer that nobody can read: one for each id, beside those that each model's settings add."""
    taken = {token_id for tokens in added for token_id in tokens.values()}
    unread = {f"id {token_id}": token_id for token_id in range(count) if token_id not in taken}
    return [{**unread, **tokens} for tokens in added]


def judge_unread_tokens(
    rows: Sequence[int | None], error: SlerpMergeError, any_tokenizer: bool, asked: str
) -> list[Mismatch]:
    """What follows where tokens cannot be compared: rows go by number where there are as many on each side."""
    reason = error.message.rstrip(".")
    severity, why = "notice", f"Tokens are not compared, so rows are blended by number: {reason}."
    if asked == "union":
        severity, why = "blocking", f"There is no union of tokens that cannot be read: {reason}."
    elif None not in rows and len(set(rows)) > 1:
        severity, why = "blocking", f"Rows differ in number, and tokens cannot be compared: {reason}."
    elif not any_tokenizer:
        return []
    is_of_base = severity == "blocking" and len(rows) > 2 and rows[0] == rows[1] != rows[2]
    counts = (f"{count} rows" if count is not None else "unknown" for count in (rows[0], rows[1 + is_of_base]))
    return [Mismatch(severity, "vocabulary" + OF_BASE * is_of_base, *counts, why)]


def match_rows(
    by_number: Vocabulary,
    tokens: Sequence[Mapping[str, int]],
    appended: Sequence[AppendedToken],
    limits: Sequence[int],
    recipe: MergeRecipe,
    added: Collection[int | None],
) -> tuple[Vocabulary, list[Mismatch]]:
    """(the vocabulary with its map of rows, the line of the parity table about it).

    The child's rows are those of the parent that its tokenizer is from, in their order, then the appended ones, then
    padding. Beside each stands every other model's row for the same token, unless the recipe gives it another.
    limits: rows of each model's longest table. added: ids of what is added to the words of the tokenizer's source.
    """
    source = int(by_number.tokenizer_source == "secondary")
    maps = rows_by_token(source, tokens, appended, limits)
    new_tokens = {token.content: token.token_id for token in appended}
    child_tokens = {**tokens[source], **new_tokens}
    place_given_rows(maps, child_tokens, tokens, limits, recipe.token_sources)
    maps = pad_rows(maps, child_tokens.values(), {*added, *new_tokens.values()}, recipe.pad_to_multiple_of)
    vocabulary = dataclasses.replace(
        by_number, row_map=RowMap(tuple(maps)), longest=len(maps[0]), appended=tuple(appended)
    )
    rows = vocabulary.map_of(by_number.parent_rows)
    in_place = numpy.logical_and.reduce([source_rows == rows.sources[0] for source_rows in rows.sources])
    own, new = (numpy.isin(numpy.arange(len(in_place)), [*known.values()]) for known in (tokens[source], new_tokens))
    stands = numpy.logical_or.reduce([source_rows != NO_ROW for source_rows in rows.sources])
    counts = {
        "matched": int((own & rows.is_blended & in_place).sum()),
        "moved": int((own & rows.is_blended & ~in_place).sum()),
        "kept": int((own & ~rows.is_blended).sum()),
        "padding": int((stands & ~own & ~new).sum()),
        "appended": len(appended),
        "left_out": len(tokens[1 - source].keys() - child_tokens.keys()) if recipe.tokenizer != "union" else 0,
    }
    vocabulary = dataclasses.replace(vocabulary, rows=len(in_place), counts=tuple(counts.items()))
    return vocabulary, [describe_rows(vocabulary, counts, tokens)]


def rows_by_token(
    source: int, tokens: Sequence[Mapping[str, int]], appended: Sequence[AppendedToken], limits: Sequence[int]
) -> list[numpy.ndarray]:
    """RowMap.sources: for each of the child's tokens, and each row of its tokenizer's source, the rows that make it."""
    length = max([limits[source], *(token.token_id + 1 for token in appended)])
    maps = [numpy.full(length, NO_ROW) for _ in limits]
    maps[source][: limits[source]] = numpy.arange(limits[source])
    for content, token_id in sorted(tokens[source].items()):
        for number, model_tokens in enumerate(tokens):
            row = row_of(model_tokens.get(content), limits[number])
            if number != source and token_id < limits[source] and row != NO_ROW:
                maps[number][token_id] = row
    is_blended = numpy.logical_and.reduce([rows != NO_ROW for rows in maps])
    for number, rows in enumerate(maps):
        rows[~is_blended & (number != source)] = NO_ROW
    other = 1 - source
    for token in appended:
        maps[source][token.token_id] = NO_ROW
        maps[other][token.token_id] = row_of(tokens[other].get(token.content), limits[other])
    return maps


def describe_rows(vocabulary: Vocabulary, counts: Mapping[str, int], tokens: Sequence[Mapping[str, int]]) -> Mismatch:
    """The line of the parity table that says how many rows matched, moved and were kept.

    It blocks, unless it is accepted, where less than half of the smallest vocabulary is in common: parents that were
    fine-tuned from one base share nearly all of it, even if one has grown or been cut. Tokenizers that were trained
    apart share single bytes and short words; then most of the child's rows are one parent's alone, under layers that
    are a blend of two.
    """
    sizes = [f"{rows} rows, {len(known)} tokens" for rows, known in zip(vocabulary.parent_rows, tokens[:2])]
    source, other = "primary", "secondary"
    if vocabulary.tokenizer_source == "secondary":
        source, other = other, source
    words = {
        "matched": "in place",
        "moved": "moved",
        "kept": f"kept from the {source}",
        "padding": f"of padding from the {source}",
        "appended": f"appended from the {other}",
    }
    why = f"Rows follow tokens: {', '.join(f'{counts[key]} {text}' for key, text in words.items() if counts[key])}."
    if counts["left_out"]:
        why += f" {counts['left_out']} of the {other}'s are left out; --tokenizer union would append them."
    in_common, smallest = len(set(tokens[0]).intersection(*tokens[1:])), min(map(len, tokens))
    if in_common < MIN_SHARE_IN_COMMON * smallest:
        why = f"The tokenizers have {in_common or 'no'} token{'s' * (in_common > 1)} in common. {why}"
        return Mismatch("blocking", "vocabulary", *sizes, why, accepted_as="vocabulary")
    return Mismatch("resolved", "vocabulary", *sizes, why)
