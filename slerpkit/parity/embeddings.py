"""Tensors with a row for each token: embeddings, heads, and what is tied to what.

Which tensor is which follows from shape and name; of weights, only matrices that may be copies of each other are read.
What stands for which token is not known here (vocabulary.py). Read configs.py before this.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slerpkit.messages import format_names
from slerpkit.parents.tensors import find_layer, have_same_bytes, natural_order
from slerpkit.parity.configs import LANGUAGE_CONFIGS, language_scopes
from slerpkit.parity.report import Mismatch

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parents.tensors import TensorInfo

# Words in the names of tensors; which tensor is which follows from its shape where that is clear.
EMBEDDING_NAME = re.compile(
    r"embed_tokens\.weight|word_embeddings?\.weight|wte\.weight|embed_in\.weight|shared\.weight|tok_embeddings\.weight"
    r"|^(\w+\.)?embeddings?\.weight"
)
# Where several matrices share their weights, the embedding is stored under its own name or as the shared one.
INPUT_EMBEDDING_NAMES = (
    re.compile(r"shared"), EMBEDDING_NAME, re.compile(r"embeddings|embed_tokens|wte"), re.compile("emb"),
)  # fmt: skip
TOKEN_NAME = re.compile(r"emb|wte|shared|head|output|proj_out|decoder\.(weight|bias)$|predictions\.bias$|logits")
# What else is called a head, of however many rows, outside layers.
HEAD_NAME = re.compile(
    r"(^|\.)(\w*head\w*|embed_out|output\w*|\w*proj_out|\w*projector|\w*logits\w*|score|cls|lm_loss)\."
)
UNSTORED_HEAD = (
    "By its config the head is not tied to the embedding, and none is stored, so a random one would be made. If they "
    "are tied, state tie_word_embeddings true in its config.json; otherwise save the model again with its head."
)
# Models whose class does not tie where the config is silent.
UNTIED_BY_DEFAULT = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt_neox", "phi", "phi3", "stablelm",
    "olmo", "olmo2", "deepseek_v3",
)  # fmt: skip
OTHER_ROWS_NAME = re.compile(r"posit|pos_emb|wpe|token_type|norm", re.IGNORECASE)
TIED_BIAS_NAME = re.compile(r"(cls\.predictions|lm_head)\.decoder\.bias")
OUTPUT_HEAD_NAME = re.compile(r"(^|\.)(lm_head|embed_out)\.")
# Inside layers, as in one that predicts several tokens, rows as many as tokens prove nothing without such a name.
TABLE_IN_LAYER_NAME = re.compile(r"\.(\w*embed\w*|\w*emb|wte|\w*head)\.(weight|bias)$")
# An embedding whose rows hold a part for each layer; it may end before the last tokens.
PER_LAYER_NAME = re.compile(r"emb\w*_per_layer\.weight$")
PER_LAYER_KEY = "vocab_size_per_layer_input"


def vocabulary_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the embedding: the config's vocab_size, where a matrix confirms it; or those of the one embedding."""
    for scope in language_scopes(checkpoint.config):
        rows = scope.get("vocab_size")
        if isinstance(rows, int) and any(has_token_rows(info, rows) for info in checkpoint.tensors.values()):
            return rows
    row_counts = {
        info.shape[0]
        for info in checkpoint.tensors.values()
        if EMBEDDING_NAME.search(info.name) and len(info.shape) == 2 and has_token_rows(info, info.shape[0])
    }
    return row_counts.pop() if len(row_counts) == 1 else None


def belied_sizes(checkpoint: Checkpoint) -> list[int]:
    """What a config states as vocab_size, where the rows of the embedding are others; empty where they agree."""
    stated = [scope.get("vocab_size") for scope in language_scopes(checkpoint.config)]
    sizes, rows = [size for size in stated if type(size) is int], vocabulary_rows(checkpoint)
    return [] if rows is None or rows in sizes else list(dict.fromkeys(sizes))


def is_table(info: TensorInfo) -> bool:
    """Whether a tensor has the shape that an embedding, a head and a head's bias have, of however many rows."""
    if not info.is_float or not info.element_count or OTHER_ROWS_NAME.search(info.name):
        return False
    return len(info.shape) == 2 or (len(info.shape) == 1 and info.name.endswith("bias"))


def row_count(info: TensorInfo) -> int:
    """How many tokens a table has something for: of (tokens, width) the first, of (1, tokens) the last."""
    return info.shape[-1] if info.shape[0] == 1 else info.shape[0]


def has_token_rows(info: TensorInfo, rows: int | None) -> bool:
    """Whether a tensor outside layers can have a row for each token, by its shape."""
    return is_table(info) and find_layer(info.name) is None and row_count(info) == rows


def shape_per_token(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a single token has: of (tokens, width) the width; of (tokens,) and (1, tokens) nothing."""
    return shape[1:] if shape[0] != 1 else ()


def token_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors with a row for each token, most with as many rows as the vocabulary has, some with their own number.

    Outside layers the number tells which they are; inside layers, and where rows are as many as something else in the
    config, names must agree. Another number has an embedding with a part for each layer, and an embedding that is
    longer than its head.
    """
    rows = vocabulary_rows(checkpoint)
    scopes = language_scopes(checkpoint.config)
    sizes = [
        n
        for scope in scopes
        for key, n in scope.items()
        if type(n) is int and not key.endswith("_id") and key not in ("vocab_size", PER_LAYER_KEY)
    ]
    outside_layers = TOKEN_NAME if rows in sizes else re.compile("")
    tables = [info for info in checkpoint.tensors.values() if is_table(info)]
    found = longer_or_shorter_tables(tables, rows)
    for info in tables:
        pattern = TABLE_IN_LAYER_NAME if find_layer(info.name) else outside_layers
        if PER_LAYER_NAME.search(info.name) or (row_count(info) == rows and pattern.search(info.name)):
            found.append(info)
    return {info.name: info for info in found}


def longer_or_shorter_tables(tables: Sequence[TensorInfo], rows: int | None) -> list[TensorInfo]:
    """The embedding where it has more rows than the vocabulary, and the head where it has fewer.

    Then the vocabulary's number of rows is that of the other; tables of one kind all have the same.
    """
    found = []
    for pattern, is_longer in ((EMBEDDING_NAME, True), (OUTPUT_HEAD_NAME, False)):
        kind = [info for info in tables if pattern.search(info.name) and find_layer(info.name) is None]
        counts = {row_count(info) for info in kind}
        if rows is not None and len(counts) == 1 and (counts.pop() > rows if is_longer else counts.pop() < rows):
            found += kind
    return found


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the head shares the embedding's weights, as the config tells; None where it is silent."""
    stated = (scope.get("tie_word_embeddings") for scope in [config, *language_scopes(config)])
    return next((value for value in stated if isinstance(value, bool)), None)


def is_untied(config: Mapping[str, Any]) -> bool:
    """Whether the head does not share the embedding's weights, as the config tells or its class is known to mean."""
    stated = [scope.get("tie_word_embeddings") for scope in language_scopes(config)]
    stated = [value for value in stated if isinstance(value, bool)]
    return not any(stated) if stated else config.get("model_type") in UNTIED_BY_DEFAULT


def lacks_head(checkpoint: Checkpoint) -> bool:
    """Whether the head is not tied, and is not stored either."""
    return is_untied(checkpoint.config) and bool(token_matrices(checkpoint)) and not stores_head(checkpoint)


def stores_head(checkpoint: Checkpoint) -> bool:
    """Whether there is a head beside the embedding, as rows or names tell."""
    named = any(HEAD_NAME.search(name) and find_layer(name) is None for name in checkpoint.tensors)
    return named or len(token_matrices(checkpoint)) > 1


def find_tied_source(head: TensorInfo, owner: Checkpoint, other: Checkpoint) -> TensorInfo | None:
    """The embedding that serves `other` as the head that `owner` stores: a row per token, of the same width.

    Or what serves it as the bias of that head, which the class of a masked model ties too.
    """
    if find_layer(head.name) or is_tied(other.config) is False:
        return None
    if (match := TIED_BIAS_NAME.fullmatch(head.name)) is not None:
        return other.tensors.get(f"{match[1]}.bias") if f"{match[1]}.bias" in owner.tensors else None
    if lacks_head(other) or head not in token_matrices(owner):
        return None
    candidates = [info for info in token_matrices(other) if info.shape[1:] == head.shape[1:]]
    return candidates[0] if len(candidates) == 1 else None


def token_matrices(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The matrices outside layers with the vocabulary's rows, the input embedding first; then its head or others."""
    rows = vocabulary_rows(checkpoint)
    tables = [info for info in token_tensors(checkpoint).values() if has_token_rows(info, rows)]
    matrices = [info for info in tables if len(info.shape) == 2 and info.shape[0] != 1]
    return sorted(matrices, key=lambda info: (embedding_rank(info.name), natural_order(info.name)))


def embedding_rank(name: str) -> int:
    """How far a name is from that of the input embedding; 0 is the nearest."""
    ranks = (rank for rank, pattern in enumerate(INPUT_EMBEDDING_NAMES) if pattern.search(name))
    return next(ranks, len(INPUT_EMBEDDING_NAMES))


def copies_of_embedding(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Matrices that hold the embedding's own bytes once more, as a head stored although it is tied does.

    Reads them where there are any.
    """
    embedding, *others = token_matrices(checkpoint) or [None]
    return [info for info in others if info.shape == embedding.shape and is_copy(embedding, info, checkpoint)]


def untied_heads(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Heads that differ from the embedding: as large, and not an embedding of another kind by name."""
    embedding, *others = token_matrices(checkpoint) or [None]
    heads = [info for info in others if not re.search(r"emb(?!ed_out)|wte|shared", info.name)]
    return [info for info in heads if info.shape == embedding.shape and not is_copy(embedding, info, checkpoint)]


def is_copy(embedding: TensorInfo, info: TensorInfo, checkpoint: Checkpoint) -> bool:
    """Whether a tensor holds the embedding's bytes; what is still on the Hub is taken for another."""
    are_here = not {embedding.file.name, info.file.name} & checkpoint.awaited.keys()
    return are_here and have_same_bytes(embedding, info)


def drop_tied_copies(primary: Checkpoint) -> tuple[Checkpoint, list[Mismatch]]:
    """(the primary without the copies of its embedding that its config says are tied, what is to know of them).

    A stored head that differs from the embedding is a head of its own, whatever the config says of it; so is one that
    is still on the Hub, for it makes a right child either way.
    """
    if not is_tied(primary.config):
        return primary, []
    copies = [info.name for info in copies_of_embedding(primary)]
    heads = [info.name for info in untied_heads(primary)]
    mismatches = []
    if copies:
        why = "Tied to the embedding and equal to it; the child does without the copy."
        mismatches.append(Mismatch("resolved", format_names(copies), "stored although tied", "not needed", why))
    if heads:
        why = "It differs from the embedding, so the child has it, and says that it is not tied."
        mismatches.append(Mismatch("resolved", format_names(heads), "stored although tied", "see the primary", why))
    kept = {name: info for name, info in primary.tensors.items() if name not in copies}
    return dataclasses.replace(primary, tensors=kept), mismatches


def head_is_tied(primary: Checkpoint) -> bool | None:
    """Whether the child's head is its embedding, as the weights tell; None where they do not.

    The config's word counts, unless it says tied and a head of another content is stored. Where it is silent, a
    single matrix with a row for each token must serve as both.
    """
    stated = is_tied(primary.config)
    matrices = token_matrices(primary)
    if stated is False or not matrices:
        return stated
    if untied_heads(primary):
        return False
    if stated or any(key in primary.config for key in LANGUAGE_CONFIGS):
        return stated
    return True if len(matrices) == 1 + len(copies_of_embedding(primary)) else None
