#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "rich>=13.7",
#   "questionary>=2.0.1",
#   "prompt_toolkit>=3.0.36",
#   "colorama>=0.4.6",
#   "torch>=2.4",
#   "transformers>=4.45",
#   "tokenizers>=0.20",
#   "huggingface-hub>=0.23.2",
#   "safetensors>=0.4.5",
#   "numpy>=1.24",
#   "pyyaml>=6.0",
#   "pytest>=8.0",
# ]
# ///
"""slerpmerge: merge two language-model checkpoints by spherical linear interpolation (SLERP).

    python slerpmerge.py            asks three questions and makes a working child
    python slerpmerge.py --demo     shows the whole thing on two tiny models it makes itself
    python slerpmerge.py --help     every question as a flag

How the data flows, which is also the order of the sections below:

    primary folder ──┐  §4 headers        §6 plan             §7 streamed merge
                     ├─► Checkpoint ─► §5 parity ─► MergePlan ─► workers ─► shards ─┐
    secondary folder ┘   (no weights)      │           │         measure,           │
                                           │           │         then blend         ▼
        difference map ◄── §8 inspection ◄─┘           └─► §9 companions ─► StagedChild
                                                                                    │
               ┌──────────── child folder ◄── one rename ◄── sync ◄── §10 verified ◄┘
               ▼                  ▲
        what it says and knows    │ the best t
        (§12 judgement) ─► §13 sweep over trial children

     §1  imports and constants          §9  companions: tokenizer, config, card, report
     §2  vocabulary                     §10 verified child
     §3  maths, pure                    §11 the story, in two functions; demo parents
     §4  parents; recipes; vocabularies §12 judgement: what parents and child say and know
     §5  parity; kinship                §13 sweep: a good t is found
     §6  plan                           §14 view (rich)
     §7  streamed merge                 §15 wizard (questionary)
     §8  inspection: how parents differ §16 command line

A section uses only names of the sections before it. Sections 0 to 13 never touch the screen: they
tell what happens through one callable, `observe(event)`, always called on the main thread.
A newcomer reads §11 first.
"""

# ════════════════════════════════════════════════════════════════════════════════════════════════
# §1  Imports and constants
# ════════════════════════════════════════════════════════════════════════════════════════════════

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import difflib
import errno
import functools
import gc
import heapq
import importlib
import io
import itertools
import json
import math
import mmap
import os
import pickle
import pickletools
import queue
import re
import shlex
import shutil
import signal
import stat
import struct
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy
    import torch
    from prompt_toolkit.completion import Completer
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

__version__ = "0.2.0"

# ── Arithmetic ──
COLINEAR_DOT = 0.9995  # |cosine| above which SLERP is numerically a straight line (1.8 degrees)
TINY_NORM = 1e-8  # a norm at or below this has no direction worth following
CHUNK_ELEMENTS = 524_288  # elements read, computed and written at once: few enough calls, and near the cache
NORM_ROW = 256  # elements whose squares are added one after the other; a longer sum in float32 loses digits
MOST_PIECES = 16  # that a chunk is cut into for an accelerator short of memory; then the processor takes over
SPAN_CHUNKS = 4  # chunks that one worker takes at a time
MAX_THREADS = 8  # reading and writing saturate before more cores than this help

# ── Files ──
MAX_SHARD_BYTES = 5_000_000_000  # 5 GB, the shard size that hubs and loaders expect
MAX_HEADER_BYTES = 16_000_000  # of tensors' names and places; the largest models have a tenth of it in a file
MAX_JSON_BYTES = 16_000_000  # of a config or an index, which are read into memory several times their size
MAX_TOKENIZER_BYTES = 64_000_000
MAX_TEXT_BYTES = 100_000_000  # of a text that models are measured on
MAX_DIMENSIONS = 64
MAX_LAYER_INDEX = 99_999  # a number in a tensor's name above this is not a layer
WEIGHTS_SINGLE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
CARD_NAME = "README.md"
RECIPE_NAME = "merge_recipe.yaml"
REPORT_NAME = "merge_report.json"
JOURNAL_NAME = "journal.json"
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# Copied whole from the tokenizer's donor, so that no two halves of a tokenizer ever meet.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
)
# How the tokenizer's donor, or the parent that was asked for, puts a conversation.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
# The files without which a folder has no tokenizer at all.
TOKENIZER_CORES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
)
GENERATION_NAME = "generation_config.json"
# Copied from the primary: how it prepares its inputs, the code it ships.
COMPANION_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "*.py",
)

# All that a merge reads of a parent.
PARENT_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    GENERATION_NAME,
    *TOKENIZER_FILES,
    *TEMPLATE_FILES,
    *COMPANION_FILES,
)

# ── Numbers as they lie on disk ──
# safetensors' names; bytes per element. Sub-byte types are packed quantised weights: refused by name.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64",
}  # fmt: skip
LANGUAGE_CONFIGS = ("text_config", "llm_config", "language_config")  # a language model's place in a larger one
# Keys whose value is the id of a token: they follow the tokenizer.
TOKEN_ID_KEY = re.compile(r"token_(id|index)s?$|suppress_tokens$|forced_decoder_ids$")
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
CHILD_DTYPES = ("auto", "bfloat16", "float16", "float32")
COMPONENTS = (("attention", ("attn", "attention")), ("mlp", ("mlp", "feed_forward", "ffn", "fc1", "fc2")))
SIBLINGS_DEGREES = 30  # fine-tunes of one base lie nearer than this, by far
STRANGERS_DEGREES = 70  # models with nothing in common lie at ninety, give or take a degree
TOKENIZER_CHOICES = ("auto", "primary", "secondary", "union")
TEMPLATE_CHOICES = ("auto", "primary", "secondary")
METHODS = ("slerp", "slerp-norm", "lerp", "nuslerp")
GRANULARITIES = ("tensor", "row", "column")


class LazyModule:
    """Stands for a module until an attribute of it is asked for; torch alone costs more than a second."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # asked once; the next time it is simply there
        return value


if not TYPE_CHECKING:
    numpy, torch = LazyModule("numpy"), LazyModule("torch")


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §2  Vocabulary: errors, recipe, checkpoints, parity, plan, report, events
# ════════════════════════════════════════════════════════════════════════════════════════════════


class SlerpMergeError(Exception):
    """Something the world did, in words for the person at the prompt.

    message: what happened, to which file or tensor. hint: what to do about it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def format_bytes(count: float) -> str:
    """A byte count in decimal units, as disks and hubs state them: 2.2 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_count(count: int) -> str:
    """A parameter count as people say it: 1.1B, 7.2B, 350M."""
    for limit, unit in ((999_500_000, "B"), (999_500, "M"), (999.5, "K")):
        if count >= limit:
            size = {"B": 1e9, "M": 1e6, "K": 1e3}[unit]
            return f"{count / size:.1f}{unit}" if count < 99.5 * size else f"{count / size:.0f}{unit}"
    return str(count)


def format_seconds(seconds: float) -> str:
    """A duration as people say it: under 0.1 s, 0.8 s, 42 s, 3 min 05 s."""
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def printable(text: str, keep: str = "") -> str:
    """Text from a stranger's file without control characters, which could drive the terminal or fake a line."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def shorten(value: Any, most: int = 60) -> str:
    """Any value for people; long ones are cut."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else text[: most - 1] + "…"


def format_names(names: Sequence[str], most: int = 6) -> str:
    """A list of names that stays readable when there are thousands of them."""
    shown = ", ".join(map(printable, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def component_of(tensor_name: str) -> str:
    """attention, mlp or other (norms among them): what people give a gradient of its own."""
    if "norm" in tensor_name:
        return "other"
    found = (name for name, marks in COMPONENTS if any(mark in tensor_name for mark in marks))
    return next(found, "other")


def find_layer(tensor_name: str) -> tuple[str, int] | None:
    """(stack, index) of a tensor inside a stack of layers: its name up to the first number, and that number.

    The first number is the layer; later ones are experts or parts of it. None outside every stack.
    """
    parts = tensor_name.split(".")
    for place, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) < 9 and int(part) <= MAX_LAYER_INDEX:
            return ".".join(parts[:place]), int(part)
    return None


@dataclass(frozen=True)
class ScheduleRule:
    """One line of a schedule: the gradient that tensors get whose name holds `name_filter`."""

    gradient: tuple[float, ...]  # one value is a constant; more are anchors over the layers
    name_filter: str = "*"  # a case-sensitive substring; "*" matches every name

    def matches(self, tensor_name: str) -> bool:
        return self.name_filter == "*" or self.name_filter in tensor_name

    def value_at(self, position: float) -> float:
        """The gradient's value at `position` (0 to 1), linear between anchors, as mergekit reads a list."""
        scaled = position * (len(self.gradient) - 1)
        index = int(scaled)
        following = self.gradient[min(index + 1, len(self.gradient) - 1)]
        return (1 - (scaled - index)) * self.gradient[index] + (scaled - index) * following


@dataclass(frozen=True)
class Schedule:
    """Which t each tensor gets. The first rule whose filter matches wins."""

    rules: tuple[ScheduleRule, ...]

    @classmethod
    def constant(cls, t: float) -> Schedule:
        return cls((ScheduleRule((t,)),))

    def t_for(self, tensor_name: str, position: float) -> float:
        """t for a tensor whose layer stands at `position` in its stack (0 first, 1 last; 0 outside layers).

        Raises SlerpMergeError when no rule matches the name.
        """
        for rule in self.rules:
            if rule.matches(tensor_name) and rule.gradient:
                return rule.value_at(position)
        raise SlerpMergeError(
            f"The schedule of t has no value for the tensor {tensor_name}.",
            "Add a last value without a filter; it is used for everything that no filter matches.",
        )

    def values(self) -> Iterator[float]:
        for rule in self.rules:
            yield from rule.gradient

    def describe(self) -> str:
        """In words: t = 0.5, or each filter with its gradient."""
        parts = []
        for rule in self.rules:
            gradient = ", ".join(f"{value:g}" for value in rule.gradient)
            parts.append(f"t = {gradient}" if rule.name_filter == "*" else f"{rule.name_filter}: t = {gradient}")
        return "; ".join(parts)


@dataclass(frozen=True)
class LayerSlice:
    """A run of the child's layers and the layers of both parents that make them, one by one.

    `schedule` gives t. Where a recipe weights each parent instead, `weights` holds both schedules.
    """

    primary_start: int
    secondary_start: int
    length: int
    schedule: Schedule
    weights: tuple[Schedule, Schedule] | None = None
    base_start: int | None = None  # None: as in the primary


@dataclass(frozen=True)
class MergeRecipe:
    """Everything the person decided. Order matters: t = 0 is the primary, t = 1 the secondary."""

    primary: Path
    secondary: Path
    save_directory: Path
    schedule: Schedule = Schedule.constant(0.5)
    method: str = "slerp"  # one of METHODS
    granularity: str = "tensor"  # one of GRANULARITIES; what nuslerp takes as one vector
    base: Path | None = None  # where given, what each parent learned since is blended, and added to it
    weights: tuple[Schedule, Schedule] | None = None  # instead of t: t = w1 / (w0 + w1)
    normalize: bool = True  # False: LERP with the weights as they are, whatever their sum
    slices: tuple[LayerSlice, ...] = ()  # none: every layer with its own counterpart
    cast_dtype: str | None = None  # the parents are rounded to this before they are blended
    extrapolate: bool = False  # allows t outside 0 to 1
    dot_threshold: float = COLINEAR_DOT
    epsilon: float = TINY_NORM
    dtype: str = "auto"  # one of CHILD_DTYPES; auto keeps the primary's, tensor by tensor
    max_shard_bytes: int = MAX_SHARD_BYTES
    tokenizer: str = "auto"  # one of TOKENIZER_CHOICES
    chat_template: str = "auto"  # one of TEMPLATE_CHOICES; auto is the tokenizer donor's
    device: str = "auto"  # auto, cpu, cuda or mps
    threads: int = 0  # 0 chooses
    overwrite: bool = False
    restart: bool = False  # discards what an earlier run left unfinished
    recipe_file: Path | None = None  # where the blend was read from, if from a file

    def describe_blend(self) -> str:
        """t, or the weights, in words; slice by slice where there are slices."""

        def words(part: LayerSlice | MergeRecipe) -> str:
            if part.weights is None:
                return part.schedule.describe()
            first, second = (weight.describe().replace("t = ", "") for weight in part.weights)
            return f"weights {first} and {second}"

        if not self.slices:
            return words(self)
        return " · ".join(
            f"layers {part.primary_start} to {part.primary_start + part.length - 1}"
            f" with {part.secondary_start} to {part.secondary_start + part.length - 1}: {words(part)}"
            for part in self.slices
        )


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes lie, as its file's header says and its file's size confirms."""

    name: str
    dtype: str  # safetensors' name: BF16, F32, ...
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the start of the file
    byte_count: int

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True)
class Checkpoint:
    """A parent as far as its headers tell: nothing here holds a weight."""

    folder: Path
    name: str  # what people call it: org/name from a cache or config, else the folder's name
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    storage: str  # "safetensors" or "pickle"
    stamps: dict[str, tuple[int, int]] = dataclasses.field(
        default_factory=dict
    )  # file name: bytes, ns of its last change

    @property
    def parameter_count(self) -> int:
        return sum(info.element_count for info in self.tensors.values())

    @property
    def byte_count(self) -> int:
        return sum(info.byte_count for info in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Stored dtypes in torch's names, the one with the most bytes first."""
        bytes_by_dtype: dict[str, int] = {}
        for info in self.tensors.values():
            bytes_by_dtype[info.dtype] = bytes_by_dtype.get(info.dtype, 0) + info.byte_count
        ranked = sorted(bytes_by_dtype, key=lambda dtype: -bytes_by_dtype[dtype])
        return tuple(TORCH_NAMES.get(dtype, dtype) for dtype in ranked)

    @property
    def architecture(self) -> str:
        architectures = self.config.get("architectures")
        return str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown architecture"


@dataclass(frozen=True)
class Mismatch:
    """One difference between the parents and what follows from it."""

    severity: str  # "blocking", "mended" or "notice"
    subject: str  # the config key, tensor or file
    primary: str
    secondary: str
    consequence: str  # why it blocks, the rule that mends it, or what to know


@dataclass(frozen=True, eq=False)
class RowMap:
    """Which rows of the sources make each row of a tensor that has a row for each token.

    A row that every source has is blended; one that a single source has is kept as it is.
    """

    sources: tuple[numpy.ndarray, ...]  # of each source: (the child's rows,), int64, its row or -1

    @functools.cached_property
    def is_blended(self) -> numpy.ndarray:
        """(the child's rows,), bool."""
        return numpy.logical_and.reduce([rows >= 0 for rows in self.sources])

    @functools.cached_property
    def blended(self) -> tuple[numpy.ndarray, ...]:
        """As `sources`, with -1 for the rows that are kept."""
        return tuple(numpy.where(self.is_blended, rows, -1) for rows in self.sources)

    def is_kept(self, side: int) -> numpy.ndarray:
        """(the child's rows,), bool: kept from this source."""
        return (self.sources[side] >= 0) & ~self.is_blended

    def first(self, order: Sequence[int]) -> RowMap:
        """The map of some of the sources, in another order."""
        return RowMap(tuple(self.sources[side] for side in order))


@dataclass(frozen=True)
class AppendedToken:
    """A token that the child's tokenizer gets beside its donor's."""

    content: str
    number: int  # its id in the child
    flags: tuple[tuple[str, bool], ...]  # special, lstrip, rstrip, normalized, single_word


@dataclass(frozen=True)
class Vocabulary:
    """The child's tokens: whose they are, and which of the parents' rows stand for them."""

    role: str | None  # the tokenizer's donor: "primary", "secondary", or None where neither has one
    reason: str
    parent_rows: tuple[int | None, ...]  # primary, secondary, base; None where config and tensors do not tell
    rows: int | None  # the child's
    tensors: tuple[frozenset[str], ...] = ()  # of each parent: the names of those with a row for each token
    row_map: RowMap | None = None  # None: every row with the one of the same number
    appended: tuple[AppendedToken, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()  # matched, moved, kept, padding, appended, left out

    def place_of(self, number: int, side: int = 0) -> int | None:
        """The child's id of the token that has the id `number` in a parent (0 primary, 1 secondary)."""
        if self.row_map is None or number < 0:
            return number
        found = numpy.flatnonzero(self.row_map.sources[side] == number)
        return int(found[0]) if len(found) else None

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "by_token": self.row_map is not None, **dict(self.counts)}


@dataclass(frozen=True)
class LayerPlace:
    """Where a tensor of the child comes from, and where it stands among the layers."""

    secondary: int  # the number of its layer there; -1 where it has the same name everywhere
    base: int
    position: float  # 0 first, 1 last in its slice or stack, 1 in one of a single layer, 0 outside layers
    slice_number: int  # -1 outside the recipe's slices


@dataclass(frozen=True)
class TensorPair:
    """What the child's tensor of this name is made from."""

    name: str
    primary: TensorInfo
    secondary: TensorInfo | None  # None: the primary's stands alone
    base: TensorInfo | None = None
    place: LayerPlace = LayerPlace(-1, -1, 0.0, -1)
    rows: RowMap | None = None  # where rows follow tokens

    @property
    def shape(self) -> tuple[int, ...]:
        """The child's."""
        shape = self.primary.shape
        if self.rows is None:
            return shape
        count = len(self.rows.is_blended)
        return (count, *shape[1:]) if shape[0] != 1 else (1, count)


@dataclass(frozen=True)
class ParityReport:
    """Every difference found, not the first, and the pairs of tensors that follow."""

    mismatches: tuple[Mismatch, ...]
    pairs: tuple[TensorPair, ...]
    vocabulary: Vocabulary = Vocabulary(None, "neither parent has a tokenizer", (None, None), None)
    offered_template: str | None = None  # the parent whose chat template would fit a child that has none

    def of_severity(self, severity: str) -> tuple[Mismatch, ...]:
        return tuple(mismatch for mismatch in self.mismatches if mismatch.severity == severity)

    def raise_if_blocking(self) -> None:
        blocking = self.of_severity("blocking")
        if not blocking:
            return
        lines = [
            printable(f"{m.subject}: primary {m.primary}, secondary {m.secondary}. {m.consequence}") for m in blocking
        ]
        hint = "Choose two models of the same architecture and shape, such as two fine-tunes of one base model."
        if any(m.subject == "quantisation" for m in blocking):
            hint = "Choose the original, unquantised models; quantise the child afterwards."
        raise SlerpMergeError("These parents cannot make a right child:\n  " + "\n  ".join(lines), hint)


@dataclass(frozen=True)
class Kinship:
    """How far apart the parents' matrices stand, from a sample of them: whether they come from one base model."""

    degrees: float | None  # over all that was sampled; None where there was nothing to compare
    by_component: tuple[tuple[str, float], ...]  # (attention, mlp or other; degrees)

    @property
    def verdict(self) -> str:
        """siblings, relatives, strangers, or unknown."""
        if self.degrees is None:
            return "unknown"
        if self.degrees < SIBLINGS_DEGREES:
            return "siblings"
        return "relatives" if self.degrees < STRANGERS_DEGREES else "strangers"

    def describe(self) -> str:
        """The verdict in words, with the figures."""
        if self.degrees is None:
            return "unknown: no matrices to compare"
        parts = ", ".join(f"{component} {degrees:.1f}" for component, degrees in self.by_component)
        return f"{self.verdict}: {self.degrees:.1f} degrees apart ({parts})"

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "degrees": self.degrees, "components": dict(self.by_component)}

    @property
    def warning(self) -> str | None:
        """What a person should know before, and after, strangers are merged."""
        if self.verdict != "strangers":
            return None
        return (
            f"The parents look like {self.describe()}. Fine-tunes of one base model lie a few degrees apart; "
            "these share a shape and not an origin, and children of such parents seldom speak."
        )


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the child: what it is made from, how, and where its bytes go."""

    name: str
    dtype: str  # the child's, safetensors' name
    shape: tuple[int, ...]
    rule: str  # "slerp", "lerp" or "copy"; slerp may still fall back to lerp or copy once measured
    t: float
    sources: tuple[TensorInfo, ...]  # (primary, secondary), (primary, secondary, base), or the one that is copied
    weights: tuple[float, float] | None = None  # of a LERP that is not (1 - t, t)
    granularity: str = "tensor"
    rows: RowMap | None = None  # of `sources`, where rows follow tokens
    offset: int = 0  # bytes from the start of the child's shard

    @property
    def is_measured(self) -> bool:
        """Whether the parents are held against each other before the child's tensor is written."""
        return len(self.sources) > 1 and (self.rule != "copy" or not self.sources[0].is_float)

    @property
    def row_elements(self) -> int:
        """Elements that stand for one token, where rows follow tokens."""
        return self.element_count // len(self.rows.is_blended)

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    @property
    def byte_count(self) -> int:
        return self.element_count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardPlan:
    """One file of the child: its header, ready to write, and the tensors behind it."""

    file_name: str
    header: bytes
    jobs: tuple[TensorJob, ...]

    @property
    def byte_count(self) -> int:
        return len(self.header) + sum(job.byte_count for job in self.jobs)


@dataclass(frozen=True)
class MergePlan:
    """All that will be done, decided before a byte is written."""

    recipe: MergeRecipe
    primary: Checkpoint
    secondary: Checkpoint
    base: Checkpoint | None
    parity: ParityReport
    shards: tuple[ShardPlan, ...]
    threads: int
    peak_memory_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int
    kinship: Kinship
    remarks: tuple[str, ...]  # what the person may want to know before it starts
    read_bytes_per_second: float  # of a short probe of the parents' files
    expected_seconds: float

    @property
    def jobs(self) -> Iterator[TensorJob]:
        for shard in self.shards:
            yield from shard.jobs

    @property
    def child_bytes(self) -> int:
        return sum(job.byte_count for job in self.jobs)

    @property
    def tokenizer_role(self) -> str | None:
        return self.parity.vocabulary.role

    @property
    def template_role(self) -> str | None:
        """The parent whose chat template the child has."""
        asked = self.recipe.chat_template
        return self.tokenizer_role if asked == "auto" or self.tokenizer_role is None else asked

    def parent(self, role: str) -> Checkpoint:
        return {"primary": self.primary, "secondary": self.secondary}[role]

    def count(self, rule: str) -> int:
        return sum(job.rule == rule for job in self.jobs)


@dataclass(frozen=True)
class Blend:
    """child = primary_weight * v0 + secondary_weight * v1, and why these weights."""

    primary_weight: float
    secondary_weight: float
    rule: str  # "slerp", "lerp" or "copy"
    reason: str  # "" when the asked method was followed
    angle_degrees: float | None  # between the parents; None where a norm is zero or not finite
    norms: tuple[float, float] | None = None  # |v0|, |v1|; None where the tensor was copied unmeasured


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of the parents differs, or what each of them learned there since their base."""

    name: str
    parameters: int
    degrees: float | None  # the angle between v0 and v1; None where it is not known
    norms: tuple[float, float] | None  # |v0|, |v1|; None where they were not measured


@dataclass(frozen=True)
class MapCell:
    """The same of all the tensors of one component of one layer, taken as one vector."""

    degrees: float | None
    norm_ratio: float | None  # |v1| / |v0|


@dataclass(frozen=True)
class MapGrid:
    """One stack of layers: a row for each layer, a column for each component."""

    stack: str
    components: tuple[str, ...]
    rows: tuple[tuple[int, tuple[MapCell, ...]], ...]  # (layer, its cells)


@dataclass(frozen=True)
class DifferenceMap:
    """How the parents differ, layer by component, and in the tensors outside every layer."""

    vectors: str  # "weights" or "task vectors"
    grids: tuple[MapGrid, ...]
    outside: tuple[tuple[str, MapCell], ...]
    tensors: tuple[TensorDifference, ...]

    @property
    def cells(self) -> list[MapCell]:
        inside = [cell for grid in self.grids for _, cells in grid.rows for cell in cells]
        return inside + [cell for _, cell in self.outside]

    def as_dict(self) -> dict[str, Any]:
        return {
            "vectors": self.vectors,
            "cells": [
                {"stack": grid.stack, "layer": layer, "component": component, **dataclasses.asdict(cell)}
                for grid in self.grids
                for layer, cells in grid.rows
                for component, cell in zip(grid.components, cells)
            ],
            "outside": [{"name": name, **dataclasses.asdict(cell)} for name, cell in self.outside],
            "tensors": [dataclasses.asdict(difference) for difference in self.tensors],
        }


@dataclass(frozen=True)
class WorkBegan:
    """A stretch of work whose end can be foreseen, beside a merge."""

    what: str
    total: int


@dataclass(frozen=True)
class WorkAdvanced:
    """So much of it is done."""

    amount: int


@dataclass(frozen=True)
class WorkEnded:
    """It is over."""


@dataclass(frozen=True)
class Noted:
    """Something the person may want to know while work goes on."""

    text: str


@dataclass(frozen=True)
class ParentOpened:
    """A parent's headers were read."""

    role: str  # "primary", "secondary" or "base"
    checkpoint: Checkpoint


@dataclass(frozen=True)
class ParityChecked:
    """The parents were held against each other."""

    report: ParityReport


@dataclass(frozen=True)
class PlanReady:
    """All is decided; nothing is written yet."""

    plan: MergePlan


@dataclass(frozen=True)
class MergeResumed:
    """Something of an earlier run stood in the staging folder."""

    kept: int  # finished files that are taken over; 0 where the merge starts anew
    total: int
    reason: str  # why it starts anew


@dataclass(frozen=True)
class MergeStopped:
    """The merge ends early; finished files stay in the staging folder for the next run."""

    kept: int
    total: int


@dataclass(frozen=True)
class ChildPublished:
    """The child stands under its name."""

    child: Path


@dataclass(frozen=True)
class DeviceChosen:
    """Where the arithmetic will run, and why."""

    device: str
    reason: str


@dataclass(frozen=True)
class BytesMerged:
    """The child grew by this many bytes."""

    byte_count: int


@dataclass(frozen=True)
class TensorMerged:
    """One tensor is whole. Comes in the child's order."""

    job: TensorJob
    blend: Blend
    seconds: float  # from its first byte read to its last byte written
    non_finite: int  # values in the child that are infinite or not a number


@dataclass(frozen=True)
class ShardWritten:
    """One file of the child holds all its tensors."""

    file_name: str
    byte_count: int


@dataclass(frozen=True)
class CompanionCopied:
    """A file beside the weights is in place."""

    file_name: str
    source: str  # "primary", "secondary" or "made"


@dataclass(frozen=True)
class ChildVerified:
    """The child was read back and is right."""

    checks: tuple[str, ...]  # what was found right, in words
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class MergeResult:
    """What streaming the tensors yielded."""

    tensors: tuple[TensorMerged, ...]
    seconds: float  # first byte read to last byte written
    device: str
    resumed_files: int = 0  # taken over from an earlier run

    def count(self, rule: str) -> int:
        return sum(merged.blend.rule == rule for merged in self.tensors)


@dataclass(frozen=True)
class MergeReport:
    """The finished child and how it came about."""

    child: Path
    plan: MergePlan
    result: MergeResult
    checks: tuple[str, ...]
    warnings: tuple[str, ...]
    sync_seconds: float
    total_seconds: float  # of execute_merge

    def as_dict(self) -> dict[str, Any]:
        """The report of `--json`."""
        child_bytes = self.plan.child_bytes
        parity = self.plan.parity
        return {
            "child": str(self.child),
            "tensors": len(self.result.tensors),
            "slerped": self.result.count("slerp"),
            "lerped": self.result.count("lerp"),
            "copied": self.result.count("copy"),
            "bytes": child_bytes,
            "seconds": self.result.seconds,
            "sync_seconds": self.sync_seconds,
            "total_seconds": self.total_seconds,
            "bytes_per_second": child_bytes / max(self.result.seconds, 1e-9),
            "device": self.result.device,
            "resumed_files": self.result.resumed_files,
            "threads": self.plan.threads,
            "method": self.plan.recipe.method,
            "blend": self.plan.recipe.describe_blend(),
            "tokenizer_from": self.plan.tokenizer_role,
            "chat_template_from": self.plan.template_role,
            "vocabulary": parity.vocabulary.as_dict(),
            "mended": [dataclasses.asdict(m) for m in parity.of_severity("mended")],
            "notices": [dataclasses.asdict(m) for m in parity.of_severity("notice")],
            "kinship": self.plan.kinship.as_dict(),
            "remarks": list(self.plan.remarks),
            "warnings": list(self.warnings),
            "checks": list(self.checks),
        }


Event = (
    ParentOpened
    | ParityChecked
    | PlanReady
    | MergeResumed
    | MergeStopped
    | ChildPublished
    | DeviceChosen
    | BytesMerged
    | TensorMerged
    | ShardWritten
    | CompanionCopied
    | ChildVerified
    | WorkBegan
    | WorkAdvanced
    | WorkEnded
    | Noted
)
Observer = Callable[[Event], None]


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §3  Maths, pure
# ════════════════════════════════════════════════════════════════════════════════════════════════


def lerp(primary: torch.Tensor, secondary: torch.Tensor, t: float) -> torch.Tensor:
    """(1 - t) primary + t secondary, in the precision of its arguments; t = 0 gives the primary."""
    return (1 - t) * primary + t * secondary


def exact_sum(values: Iterable[float]) -> float:
    """The float64 nearest to the true sum, whatever the order; infinite where a value is not finite."""
    values = list(values)
    try:
        return math.fsum(values) if all(map(math.isfinite, values)) else math.inf
    except OverflowError:
        return math.inf


def slerp_weights(cosine: float, t: float) -> tuple[float, float]:
    """(sin((1-t) theta), sin(t theta)) / sin theta, with theta = acos(cosine). float64.

    Formula: K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def cosine_between(dot: float, primary_norm: float, secondary_norm: float) -> float:
    """v0 . v1 / (|v0| |v1|); not a number where a norm is zero or a sum is not finite."""
    if not (math.isfinite(dot + primary_norm + secondary_norm) and primary_norm and secondary_norm):
        return math.nan
    # Divided one after the other: the product of two small norms could underflow.
    return dot / primary_norm / secondary_norm


def degrees_of(cosine: float) -> float | None:
    """The angle of a cosine that rounding may have put outside -1 to 1; None where it is not finite."""
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if math.isfinite(cosine) else None


def slerp_coefficients(
    dot: float,  # v0 . v1
    primary_norm: float,  # |v0|
    secondary_norm: float,  # |v1|
    t: float,
    method: str = "slerp",
    dot_threshold: float = COLINEAR_DOT,
    epsilon: float = TINY_NORM,
) -> Blend:
    """The two weights that blend a pair of tensors, from three sums over them. float64 throughout.

    `slerp` weights the raw tensors, the convention of dvschultz's gist and of mergekit; `slerp-norm`
    follows the arc between the directions and interpolates the norms. Both fall back to LERP where a
    norm is at most epsilon, where |cosine| exceeds dot_threshold (nearly parallel or antiparallel:
    the arc is a line, or is not defined), or where the sums are not finite.
    """
    measurable = math.isfinite(dot + primary_norm + secondary_norm)
    cosine = cosine_between(dot, primary_norm, secondary_norm)
    angle = degrees_of(cosine)
    norms = primary_norm, secondary_norm
    straight = functools.partial(Blend, 1 - t, t, "lerp", angle_degrees=angle, norms=norms)
    if method == "lerp":
        return straight(reason="")
    if not measurable:
        return straight(reason="not finite")
    if min(primary_norm, secondary_norm) <= epsilon or not math.isfinite(cosine):
        return straight(reason="zero")
    if method == "nuslerp":
        dot_threshold = 1.0  # its own limit, |sin theta| < 1e-8, is a cosine of 1 in float64
    # Towards opposite directions the weights know no bounds, and float32 sums are good to 1e-6.
    if abs(cosine) > dot_threshold or abs(cosine) >= 1 or cosine < -1 + 1e-6:
        return straight(reason="parallel" if cosine > 0 else "antiparallel")
    weight_primary, weight_secondary = slerp_weights(cosine, t)
    if method == "slerp-norm":
        norm = (1 - t) * primary_norm + t * secondary_norm
        weight_primary *= norm / primary_norm
        weight_secondary *= norm / secondary_norm
    return Blend(weight_primary, weight_secondary, "slerp", "", angle, norms)


def vector_weights(sums: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """NuSLERP's weights for many pairs of vectors at once.

    sums: (3, vectors), float64: v0 . v0, v1 . v1, v0 . v1 of each pair. Returns two tensors (vectors,), float64.
    A pair that is parallel, antiparallel, of no length or not finite gets LERP's weights.
    """
    cosine = (sums[2] / torch.sqrt(sums[0] * sums[1])).clamp(-1, 1)
    theta = torch.acos(cosine)
    sine = torch.sin(theta)
    curved = (sine >= 1e-8) & torch.isfinite(cosine)
    sine = torch.where(curved, sine, 1.0)
    weights = torch.sin((1 - t) * theta) / sine, torch.sin(t * theta) / sine
    return torch.where(curved, weights[0], 1 - t), torch.where(curved, weights[1], t)


def slerp(
    primary: torch.Tensor,  # any shape, taken as one flat vector
    secondary: torch.Tensor,  # the same shape
    t: float,
    method: str = "slerp",
    dot_threshold: float = COLINEAR_DOT,
    epsilon: float = TINY_NORM,
) -> torch.Tensor:
    """SLERP of two whole tensors held in memory, in float64: the plain form that the stream is held against."""
    v0, v1 = primary.double(), secondary.double()
    blend = slerp_coefficients(
        float(torch.sum(v0 * v1)), float(v0.norm()), float(v1.norm()), t, method, dot_threshold, epsilon
    )
    return blend.primary_weight * v0 + blend.secondary_weight * v1


# ── §3b  Scales: which colour a value of a map has, on the screen and in a picture ───────────────

ANGLE_RAMP = ((38, 70, 120), (42, 140, 150), (140, 190, 90), (250, 200, 70), (225, 85, 55))  # near to far
RATIO_RAMP = ((50, 100, 180), (235, 235, 230), (200, 90, 50))  # the secondary shorter, alike, longer


@dataclass(frozen=True)
class MapScale:
    """What the colours of one map stand for."""

    title: str
    value: Callable[[MapCell], float | None]
    text: Callable[[float], str]
    place: Callable[[float], float]  # 0 to 1 along the ramp
    ramp: tuple[tuple[int, int, int], ...]
    ends: str  # in words

    def colour(self, value: float) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255."""
        scaled = min(max(self.place(value), 0.0), 1.0) * (len(self.ramp) - 1)
        index = min(int(scaled), len(self.ramp) - 2)
        return tuple(
            round(low + (scaled - index) * (high - low)) for low, high in zip(self.ramp[index], self.ramp[index + 1])
        )


def map_scales(found: DifferenceMap) -> tuple[MapScale, MapScale]:
    """Scales for the angles and for the norm ratios of a map, each from its own least to its greatest."""
    angles = [cell.degrees for cell in found.cells if cell.degrees is not None] or [0.0]
    ratios = [cell.norm_ratio for cell in found.cells if cell.norm_ratio] or [1.0]
    low, high = min(angles), max(angles)
    widest = max(max(abs(math.log(ratio)) for ratio in ratios), 1e-3)
    subject = "parents" if found.vectors == "weights" else "task vectors"
    return (
        MapScale(
            f"Angle between the {subject}, degrees",
            lambda cell: cell.degrees,
            lambda value: f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}",
            lambda value: (value - low) / max(high - low, 1e-9),
            ANGLE_RAMP,
            f"{low:.2f} to {high:.2f}",
        ),
        MapScale(
            "Norm of the secondary over the primary's",
            lambda cell: cell.norm_ratio,
            lambda value: f"{value:.2f}" if value < 9.995 else f"{value:.0f}",
            lambda value: 0.5 + math.log(value) / widest / 2 if value > 0 else 0.0,
            RATIO_RAMP,
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        ),
    )


def ink_on(colour: tuple[int, int, int]) -> str:
    """black or white, whichever reads better on a colour."""
    return "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 else "white"


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §4  Parents opened, headers only
# ════════════════════════════════════════════════════════════════════════════════════════════════


def explain_os_error(error: OSError, path: Path, doing: str) -> SlerpMergeError:
    """The operating system's refusal, in words. `doing` completes "Could not ..."."""
    reason = error.strerror or str(error)
    hints = {
        "ENOSPC": "Free some space, or choose a save directory on another disk.",
        "EDQUOT": "Your quota is used up; choose a save directory elsewhere.",
        "EACCES": "Check who owns it and its permissions.",
        "EPERM": "Check who owns it and its permissions.",
        "EROFS": "That disk is mounted read-only; choose another place.",
        "ENOENT": "Check the path; it may have been moved or deleted.",
        "EIO": "The disk reports a fault; copy or download the file again.",
    }
    if not doing.startswith("read"):
        hints["EIO"] = "The disk reports a fault; choose a save directory on another one."
    name = next((name for name in hints if error.errno == getattr(errno, name, None)), "")
    return SlerpMergeError(f"Could not {doing} {path}: {reason}.", hints.get(name, "Check the path and the disk."))


def clean_path(text: str) -> Path:
    """A path as people type or paste it: quotes, `~`, `$HOME`, spaces around it, escaped spaces."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif os.name != "nt":
        text = re.sub(r"\\([^\w\\])", r"\1", text)  # as a terminal pastes a dropped folder
    return Path(os.path.expandvars(text)).expanduser()


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # org/name, as the Hugging Face hub has it


def find_model(text: str) -> Path:
    """A model's folder as people type it: a path, or the org/name of a model in the Hugging Face cache."""
    path = clean_path(text)
    if not path.exists():
        # As Windows writes it, or completed behind a quote that was opened and not closed.
        for other in (str(path).replace("\\", "/"), str(path).lstrip("'\"")):
            if Path(other).exists():
                return Path(other)
        if HUB_NAME.fullmatch(path.as_posix()) and (snapshot := cached_snapshot(path.as_posix())) is not None:
            return snapshot
    return path


def cached_snapshot(name: str) -> Path | None:
    """The newest snapshot of org/name in the Hugging Face cache that is there whole; None where there is none."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    snapshots = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime) if folder.is_dir() else []
    return next((snapshot for snapshot in snapshots if open_if_whole(snapshot) is not None), None)


def open_if_whole(folder: Path) -> Checkpoint | None:
    """A model's headers; None where the folder holds no whole model."""
    try:
        return open_checkpoint(folder)
    except (SlerpMergeError, OSError):
        return None


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """A small file, whole. Raises SlerpMergeError where it cannot be read or is larger than `limit` bytes."""
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(min(size, limit) + 1)
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    if max(size, len(data)) > limit:
        raise SlerpMergeError(
            f"{path} is larger than {format_bytes(limit)}, too large for what it should be.",
            "Download this file again from where the model comes from.",
        )
    return data


def parse_json_object(data: bytes, source: Path) -> dict[str, Any]:
    """A JSON object from a stranger's file; a name given twice, or nesting without end, is refused."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the name {twice!r} stands there twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise SlerpMergeError(f"{source} does not hold valid JSON: {reason}.", "Download this file again.") from error
    if not isinstance(value, dict):
        raise SlerpMergeError(f"{source} holds no JSON object.", "Download this file again.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    return parse_json_object(read_bytes(path), path)


def read_json_if_there(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is none."""
    return read_json(path) if path.is_file() else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A small JSON file, as people like to read it."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A small text file, UTF-8. Raises SlerpMergeError where the disk refuses."""
    try:
        # Half a surrogate pair from a stranger's config stays the escape it was.
        path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        raise explain_os_error(error, path, "write") from error


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Gives small files new content, by renames once all of it is written; a link in the way is not followed."""
    fresh = {path: path.with_name(f".{path.name}.new") for path in contents}
    try:
        for path, content in contents.items():
            fresh[path].unlink(missing_ok=True)
            with open(fresh[path], "xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for path, new in fresh.items():
            new.replace(path)
    except OSError as error:
        for new in fresh.values():
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
        raise explain_os_error(error, path, "write") from error


def read_judged_text(path: Path) -> str:
    """A text to be predicted. Raises SlerpMergeError where there is none, or none in it."""
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "is not there"
        raise SlerpMergeError(f"The text {path} {why}.", "Give a text file, in UTF-8.")
    if file_size(path) > MAX_TEXT_BYTES:
        what = f"The text {path} is larger than {format_bytes(MAX_TEXT_BYTES)}."
        raise SlerpMergeError(what, "A megabyte or less tells as much, sooner.")
    data = read_bytes(path, MAX_TEXT_BYTES)
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SlerpMergeError(f"The text {path} is not UTF-8: {error}.", "Save it as UTF-8.") from error
    if not text.strip():
        raise SlerpMergeError(f"The text {path} is empty.", "Give a file with some pages of text.")
    return text


def file_size(path: Path) -> int:
    """A file's size in bytes. Raises SlerpMergeError where the system will not tell."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise explain_os_error(error, path, "look at") from error


def check_path(path: Path, what: str) -> None:
    """Raises SlerpMergeError for a path that the system cannot even look for, such as one of absurd length."""
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        name = printable(shorten(str(path), 200))
        raise SlerpMergeError(f"The {what} {name} is no usable path: {reason}.", "Check the path.") from error


def broken_file(path: Path, reason: str) -> SlerpMergeError:
    """The error for a file whose content cannot be believed."""
    return SlerpMergeError(
        f"{path} is damaged or incomplete: {reason}.",
        "Its download was probably cut short. Delete this file and download it again.",
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header alone; no weight is read.

    Format: 8 bytes little-endian header length, JSON header, data. https://github.com/huggingface/safetensors
    Raises SlerpMergeError where the header is not valid, or promises what the file does not hold.
    """
    size = file_size(path)
    try:
        with open(path, "rb") as stream:
            start = stream.read(8)
            header_length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if header_length > min(size - 8, MAX_HEADER_BYTES):
                raise broken_file(path, f"its header should be {header_length} bytes, the file has {size}")
            raw_header = stream.read(header_length)
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    header = parse_json_object(raw_header, path)
    header.pop("__metadata__", None)
    data_start = 8 + header_length
    tensors = {name: parse_header_entry(path, name, entry, data_start) for name, entry in header.items()}
    check_extents(path, tensors.values(), data_start, size)
    validate_with_library(path)
    return tensors


def parse_header_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One tensor's line of a safetensors header, believed only after its parts agree with each other."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_typed = isinstance(dtype, str) and len(shape) <= MAX_DIMENSIONS
        well_typed = well_typed and all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        well_typed = False
    if not well_typed:
        raise broken_file(path, f"its entry for {name!r} is not understood")
    expected = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else end - begin
    if end - begin != expected:
        raise broken_file(path, f"{name!r} has {end - begin} bytes where its shape and dtype need {expected}")
    return TensorInfo(name, dtype, shape, path, data_start + begin, end - begin)


def check_extents(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Tensors must lie end to end and fill the file exactly, as the format demands."""
    position = data_start
    for info in sorted(tensors, key=lambda info: (info.offset, info.byte_count)):
        if info.offset != position:
            fault = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise broken_file(path, f"{info.name!r} {fault}")
        position += info.byte_count
    if position != size:
        raise broken_file(path, f"its header speaks of {position} bytes, the file has {size}")


def validate_with_library(path: Path) -> None:
    """The format's own library has the last word on whether a header is valid."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise broken_file(path, f"the safetensors library says: {error}") from error


@dataclass(frozen=True)
class PickledStorage:
    """A stretch of a `.bin` file that tensors are cut from."""

    key: str
    dtype: str
    element_count: int

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle has no business changing a storage's description")


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as a `.bin` file's pickle describes it."""

    storage: PickledStorage
    first_element: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle has no business changing a tensor's description")


class UnpickledDict(OrderedDict):
    """An OrderedDict that takes the attributes torch leaves on a state dict, and drops them."""

    def __setstate__(self, state: Any) -> None:
        """`_metadata` and the like say nothing about tensors."""


class DescriptionUnpickler(pickle.Unpickler):
    """Reads what tensors a `.bin` file describes and can build nothing else.

    A pickle names the functions that rebuild its objects. Here each of the few names that a state dict
    needs stands for a plain description; every other name is refused. Nothing of torch is called, so
    no weight is loaded and nothing of the file's choosing runs: stricter than `weights_only=True`.
    """

    storage_dtypes = {
        "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
        "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
        "BoolStorage": "BOOL",
    }  # fmt: skip
    # Opcodes of a state dict. What is left out can allocate without limit, or has no place in one.
    allowed_opcodes = frozenset(
        """
        PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 BINFLOAT
        STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
        EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
        GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE BINPERSID
        """.split()  # noqa: SIM905
    )

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        super().__init__(stream, encoding="utf-8")
        self.path = path
        self.storages: dict[str, PickledStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in self.storage_dtypes:
            return self.storage_dtypes[name]
        known = {
            ("collections", "OrderedDict"): UnpickledDict,
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise SlerpMergeError(
                f"{self.path} wants to run code ({module}.{name}); it was not loaded.",
                "Weights need no code. Use a safetensors copy of this model from a source that you trust.",
            )
        return known[module, name]

    @staticmethod
    def rebuild_tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> PickledTensor:
        numbers = (first, *shape, *strides)
        if not isinstance(storage, PickledStorage) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise pickle.UnpicklingError("a tensor's description is not understood")
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise pickle.UnpicklingError("a tensor has not as many strides as dimensions")
        return PickledTensor(storage, first, tuple(shape), tuple(strides))

    def persistent_load(self, identifier: Any) -> PickledStorage:
        kind, dtype, key, _location, count, *_ = identifier
        if kind != "storage" or dtype not in DTYPE_BYTES or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage's description is not understood")
        return self.storages.setdefault(str(key), PickledStorage(str(key), dtype, count))

    @classmethod
    def measure(cls, data: bytes) -> int:
        """The length of the pickle that `data` begins with. Raises ValueError where it does not end there.

        Refuses opcodes and memo numbers that could exhaust memory before find_class is ever asked.
        """
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name not in cls.allowed_opcodes:
                raise pickle.UnpicklingError(f"the opcode {opcode.name} has no place in a state dict")
            if "PUT" in opcode.name and int(argument) > len(data):
                raise pickle.UnpicklingError("a memo number is out of range")
            if opcode.name == "STOP":
                return position + 1
        raise ValueError("it has no end")

    @classmethod
    def load_next(cls, stream: BinaryIO, path: Path) -> tuple[Any, dict[str, PickledStorage]]:
        """(the next pickle of a stream, the storages it speaks of), described. Leaves the stream behind it."""
        start = stream.tell()
        for window in (1 << 20, MAX_HEADER_BYTES):  # a table of tensors seldom needs more than the first
            stream.seek(start)
            data = stream.read(window)
            try:
                length = cls.measure(data)
                break
            except ValueError:
                if len(data) < window or window == MAX_HEADER_BYTES:
                    raise
        stream.seek(start + length)
        unpickler = cls(io.BytesIO(data[:length]), path)
        return unpickler.load(), unpickler.storages


LEGACY_PICKLE_MAGIC = 0x1950A86A20F9469CFC6C  # torch's number for files written before version 1.6


def read_pickle_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one `.bin` file of torch, either format, without reading a weight.

    Raises SlerpMergeError where the file is damaged, wants to run code, or holds what is no tensor.
    """
    try:
        with open(path, "rb") as stream:
            if zipfile.is_zipfile(stream):
                state, extents = read_zip_pickle(stream, path)
            else:
                state, extents = read_legacy_pickle(stream, path)
    except SlerpMergeError:
        raise
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    except Exception as error:
        # Damaged pickles fail in as many ways as there are opcodes; every one of them means the same.
        raise broken_file(path, f"its table of tensors cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise broken_file(path, "it holds no state dict")
    size = file_size(path)
    for name in state:
        if not isinstance(name, str) or not is_utf8(name) or name == "__metadata__":
            raise broken_file(path, f"{name!r} is no name that a safetensors file can hold")
    return {name: pickled_tensor_info(path, name, entry, extents, size) for name, entry in state.items()}


def is_utf8(text: str) -> bool:
    """False for halves of surrogate pairs, which a pickle can hold and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_zip_pickle(stream: BinaryIO, path: Path) -> tuple[Any, dict[str, range]]:
    """The state dict's description, and which bytes of the file each storage has, for torch's zip format."""
    with zipfile.ZipFile(stream) as archive:
        members = {member.filename: member for member in archive.infolist()}
        table = next((name for name in members if name.split("/", 1)[-1] == "data.pkl"), None)
        if table is None or members[table].file_size > MAX_HEADER_BYTES:
            raise broken_file(path, "it has no table of tensors, or one of absurd size")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise broken_file(path, "a part of it is compressed, which torch never does")
        byte_order = members.get(table[: -len("data.pkl")] + "byteorder")
        if byte_order is not None and (byte_order.file_size > 16 or archive.read(byte_order) != b"little"):
            raise broken_file(path, "it was written on a big-endian machine")
        state, _ = DescriptionUnpickler.load_next(io.BytesIO(archive.read(table)), path)
        prefix = table[: -len("data.pkl")] + "data/"
        offsets = sorted([*(member.header_offset for member in members.values()), archive.start_dir])
        extents = {}
        for name, member in members.items():
            if name.startswith(prefix):
                stream.seek(member.header_offset)
                mark, name_length, extra_length = struct.unpack("<4s22xHH", stream.read(30))
                begin = member.header_offset + 30 + name_length + extra_length
                extent = range(begin, begin + member.file_size)
                # What follows is the next header, behind a description of the data at most.
                following = offsets[bisect.bisect_right(offsets, member.header_offset)]
                stated = mark, stream.read(name_length)
                if stated != (b"PK\3\4", name.encode()) or not 0 <= following - extent.stop <= 24:
                    raise broken_file(path, f"the place of its storage {name!r} is stated in two ways")
                extents[name[len(prefix) :]] = extent
    return state, extents


def read_legacy_pickle(stream: BinaryIO, path: Path) -> tuple[Any, dict[str, range]]:
    """The same for the format before torch 1.6: five pickles, then each storage behind its 8-byte length."""
    stream.seek(0)
    magic, _ = DescriptionUnpickler.load_next(stream, path)
    if magic != LEGACY_PICKLE_MAGIC:
        raise broken_file(path, "it is not a file that torch wrote")
    DescriptionUnpickler.load_next(stream, path)  # protocol version
    system, _ = DescriptionUnpickler.load_next(stream, path)
    if not system.get("little_endian", True):
        raise broken_file(path, "it was written on a big-endian machine")
    state, storages = DescriptionUnpickler.load_next(stream, path)
    keys, _ = DescriptionUnpickler.load_next(stream, path)
    extents = {}
    for key in keys:
        storage = storages[key]
        if struct.unpack("<q", stream.read(8))[0] != storage.element_count:
            raise broken_file(path, "a storage is not as long as its description")
        begin = stream.tell()
        extents[key] = range(begin, begin + storage.element_count * DTYPE_BYTES[storage.dtype])
        stream.seek(extents[key].stop)
    return state, extents


def pickled_tensor_info(path: Path, name: str, entry: Any, extents: Mapping[str, range], size: int) -> TensorInfo:
    """Where a described tensor's bytes lie in its file, once everything it claims has been checked."""
    if not isinstance(entry, PickledTensor):
        raise SlerpMergeError(
            f"{path} holds something other than a tensor under {name!r}.",
            "This looks like a training checkpoint. Load it in its own framework and save the model's weights alone.",
        )
    dense = 1
    for length, stride in zip(reversed(entry.shape), reversed(entry.strides)):
        if length > 1 and stride != dense:
            raise SlerpMergeError(
                f"{path} holds the tensor {name!r} transposed or sliced.",
                "Load this model with transformers and save it with save_pretrained, then merge that copy.",
            )
        dense *= max(length, 1)
    width = DTYPE_BYTES[entry.storage.dtype]
    byte_count = math.prod(entry.shape) * width
    first = entry.first_element * width
    if first + byte_count > entry.storage.element_count * width:
        raise broken_file(path, f"{name!r} reaches beyond its storage")
    extent = extents.get(entry.storage.key, range(0))
    offset = extent.start + first
    if offset + byte_count > min(extent.stop, size):
        raise broken_file(path, f"the bytes of {name!r} are not all there")
    return TensorInfo(name, entry.storage.dtype, entry.shape, path, offset, byte_count)


def list_shards(folder: Path, index_name: str) -> tuple[Path, ...]:
    """The files an index names, each inside the folder and there. Raises SlerpMergeError otherwise."""
    index_path = folder / index_name
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SlerpMergeError(f"{index_path} names no weights.", "Download this file again.")
    shards = []
    for file_name in sorted({str(file_name) for file_name in weight_map.values()}):
        if file_name in ("", ".", "..") or any(mark in file_name for mark in "/\\:\0"):
            raise SlerpMergeError(
                f"{index_path} names a file outside its own folder: {file_name!r}.",
                "An index has no business there. Do not trust this download; get the model from its source.",
            )
        check_path(folder / file_name, "file")
        if not (folder / file_name).is_file():
            raise SlerpMergeError(
                f"{index_path} names {file_name}, which is not there.", "Download the missing file into that folder."
            )
        shards.append(folder / file_name)
    return tuple(shards)


def find_weight_files(folder: Path) -> tuple[str, tuple[Path, ...]]:
    """("safetensors" or "pickle", files) of a model folder; safetensors wins where both stand."""
    for storage, single, index in (
        ("safetensors", WEIGHTS_SINGLE, WEIGHTS_INDEX),
        ("pickle", PICKLE_SINGLE, PICKLE_INDEX),
    ):
        if (folder / single).is_file():
            return storage, (folder / single,)
        if (folder / index).is_file():
            return storage, list_shards(folder, index)
    if any(folder.glob("*.gguf")):
        raise SlerpMergeError(
            f"{folder} holds a GGUF model, which is quantised.",
            "Merge the original safetensors models, then convert the child to GGUF.",
        )
    if (folder / "adapter_config.json").is_file():
        raise SlerpMergeError(
            f"{folder} holds a LoRA adapter, not a whole model.",
            "Merge the adapter into its base model first (peft: merge_and_unload), and save that.",
        )
    if any(folder.glob("*-of-*.safetensors")) or any(folder.glob("*-of-*.bin")):
        raise SlerpMergeError(
            f"{folder} holds shards of weights, but not their index ({WEIGHTS_INDEX} or {PICKLE_INDEX}).",
            "Download the index into that folder too; it says which shard holds what.",
        )
    raise SlerpMergeError(
        f"{folder} holds no weights ({WEIGHTS_SINGLE}, {WEIGHTS_INDEX}, {PICKLE_SINGLE} or {PICKLE_INDEX}).",
        "Choose the folder that holds config.json and the weights of a transformers model.",
    )


def public_name(folder: Path, config: Mapping[str, Any]) -> str:
    """What people call the model of a folder: org/name where the place or the config tells, else its name."""
    for part in (folder, *folder.parents):
        if part.name.startswith("models--"):  # a Hugging Face cache: models--org--name/snapshots/revision
            return part.name[len("models--") :].replace("--", "/")
    claimed = config.get("_name_or_path")
    if isinstance(claimed, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", claimed) and claimed.endswith("/" + folder.name):
        return claimed
    return folder.name


def open_checkpoint(folder: Path) -> Checkpoint:
    """A parent's config and tensor table, from a local folder. Reads headers only.

    Raises SlerpMergeError where there is no folder, no config, no weights, or where they are damaged.
    """
    check_path(folder, "folder")
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        hint = "Give the folder that holds a model's config.json and weights."
        if HUB_NAME.fullmatch(folder.as_posix()):
            hint += f" A model of the hub must be there first: hf download {folder.as_posix()}"
        raise SlerpMergeError(f"The folder {folder} {what}.", hint)
    if not (folder / "config.json").is_file():
        find_weight_files(folder)  # a GGUF or adapter folder is told so by name
        raise SlerpMergeError(f"{folder} has no config.json.", "Download config.json from where the model comes from.")
    check_files(folder)
    storage, files = find_weight_files(folder)
    for file in files:
        check_kind(file, folder)
    stamps = stamps_of(folder, [file.name for file in files])
    config = read_json(folder / "config.json")
    read = read_header if storage == "safetensors" else read_pickle_header
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read(file).items():
            if name in tensors:
                raise broken_file(file, f"the tensor {name!r} also stands in {tensors[name].file.name}")
            tensors[name] = info
    check_index_is_met(folder, storage, tensors)
    if not tensors:
        raise SlerpMergeError(f"{folder} holds no tensors.", "Download the model's weights again.")
    return Checkpoint(folder, public_name(folder.resolve(), config), config, tensors, storage, stamps)


def stays_within(path: Path, folder: Path) -> bool:
    """Whether a file of a model lies in its folder, links followed, or where a hub's cache keeps what it links to."""
    real = path.resolve()
    of_cache = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return of_cache or is_inside(real, folder.resolve())


def nested_files(folder: Path) -> Iterator[Path]:
    """Every file and folder below a folder; folders that are links are named and not entered."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(place, name)


def check_kind(path: Path, folder: Path) -> None:
    """Raises SlerpMergeError where a file of a model is a link to somewhere else, or no file at all."""
    if not stays_within(path, folder):
        raise SlerpMergeError(
            f"{path} is a link that leads outside its folder, to {path.resolve()}.",
            "A model has no business there. If you made the link yourself, put the file itself in its place.",
        )
    if path.exists() and not (path.is_file() or (path.is_dir() and not path.is_symlink())):
        raise SlerpMergeError(f"{path} is neither a file nor a folder.", "Remove it, or download the model again.")


def check_files(folder: Path) -> None:
    """Holds every file of a model that a merge may read or copy against `check_kind`."""
    for path in [path for pattern in PARENT_FILES for path in folder.glob(pattern)]:
        check_kind(path, folder)
        for inside in nested_files(path) if path.is_dir() else ():
            check_kind(inside, folder)


def stamps_of(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(bytes, nanoseconds of the last change) of every file of a parent that a merge reads, `names` among them."""
    found = {}
    known = {path for pattern in PARENT_FILES for path in folder.glob(pattern)}
    for path in sorted(known | {folder / name for name in names}):
        with contextlib.suppress(OSError):  # gone meanwhile; whoever needs it will say so
            status = path.stat()
            found[path.name] = (status.st_size, status.st_mtime_ns)
    return found


def check_index_is_met(folder: Path, storage: str, tensors: Mapping[str, TensorInfo]) -> None:
    """What an index promises must stand where it says, or a shard is from another model."""
    single, index = (WEIGHTS_SINGLE, WEIGHTS_INDEX) if storage == "safetensors" else (PICKLE_SINGLE, PICKLE_INDEX)
    if (folder / single).is_file():
        return
    weight_map = read_json(folder / index)["weight_map"]
    astray = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    if astray:
        raise SlerpMergeError(
            f"{folder / index} promises tensors that its files do not hold: {format_names(astray)}.",
            "The shards and the index are from different downloads. Download the model again.",
        )


class FileHandles:
    """Open files of one thread, for reads and writes at a place. Few at a time; portable everywhere.

    Each `purpose` has a handle, and so a place, of its own: both parents may be the same file.
    """

    most_open = 16  # a model can have hundreds of shards

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[Path, str, int], io.FileIO] = OrderedDict()

    def at(self, path: Path, mode: str, offset: int, purpose: int = 0) -> io.FileIO:
        """The file, unbuffered, standing at `offset` bytes."""
        handle = self._open.get((path, mode, purpose))
        if handle is None:
            if len(self._open) >= self.most_open:
                self._open.popitem(last=False)[1].close()
            handle = self._open[path, mode, purpose] = io.FileIO(path, mode)
        self._open.move_to_end((path, mode, purpose))
        handle.seek(offset)
        return handle

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


class TensorReader:
    """Reads stretches of tensors into buffers: the one way weights come in, for every format."""

    def __init__(self, handles: FileHandles) -> None:
        self._handles = handles

    def begin(self, info: TensorInfo, start: int, purpose: int = 0) -> Callable[[memoryview], None]:
        """A function that fills one buffer after another with the tensor's bytes, from byte `start` on.

        Both raise SlerpMergeError where the file cannot be read or ends early.
        """
        try:
            handle = self._handles.at(info.file, "r", info.offset + start, purpose)
        except OSError as error:
            raise explain_os_error(error, info.file, f"read the tensor {info.name} from") from error
        return functools.partial(self._fill, handle, info)

    def read_into(self, info: TensorInfo, start: int, view: memoryview) -> None:
        """Fills `view` with the tensor's bytes from byte `start` on."""
        self.begin(info, start)(view)

    def read_rows(self, info: TensorInfo, rows: numpy.ndarray, view: memoryview, purpose: int = 0) -> None:
        """Fills `view` with some rows of a tensor, in the order of `rows`; with zeros where one is -1.

        Rows that follow one another there are read at once.
        """
        if not len(rows):
            return
        width = len(view) // len(rows)
        goes_on = (numpy.diff(rows) == 1) & (rows[:-1] >= 0) | (rows[1:] < 0) & (rows[:-1] < 0)
        starts = [0, *(numpy.flatnonzero(~goes_on) + 1).tolist(), len(rows)]
        for start, stop in zip(starts, starts[1:]):
            part = view[start * width : stop * width]
            if rows[start] < 0:
                part[:] = bytes(len(part))
            else:
                self.begin(info, int(rows[start]) * width, purpose)(part)

    @staticmethod
    def _fill(handle: io.FileIO, info: TensorInfo, view: memoryview) -> None:
        try:
            filled = handle.readinto(view)
            while filled < len(view):  # a signal or a network disk may cut a read short
                count = handle.readinto(view[filled:])
                if not count:
                    raise broken_file(info.file, f"it ends inside {info.name!r}; it changed since it was opened")
                filled += count
        except OSError as error:
            raise explain_os_error(error, info.file, f"read the tensor {info.name} from") from error


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies somewhere below it."""
    return path == folder or folder in path.parents


def existing_folder(path: Path) -> Path:
    """The nearest folder above `path` that exists: where its bytes will come to lie."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())


def staging_area(save_directory: Path) -> Path:
    """The hidden folder beside the save directory in which a child grows."""
    target = save_directory.resolve()
    return target.with_name(f".{target.name}.slerpmerge-staging")


def is_plain_file(path: Path) -> bool:
    """Whether a path is a file itself, and no link, pipe or folder."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_plain_folder(path: Path) -> bool:
    """Whether a path is a folder itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def check_save_directory(save_directory: Path, parents: Sequence[Path], overwrite: bool) -> None:
    """Raises SlerpMergeError where a child must not, or cannot, be put at `save_directory`."""
    check_path(save_directory, "save directory")
    target = save_directory.resolve()
    check_path(staging_area(target), "folder in which the child would grow,")
    if os.path.ismount(target):
        raise SlerpMergeError(
            f"The save directory {save_directory} is a disk of its own, which no finished child can take the place of.",
            f"Give a folder on it, such as {save_directory / 'child'}.",
        )
    for parent in parents:
        folder = parent.resolve()
        if is_inside(target, folder) or is_inside(folder, target):
            where = "is a parent's folder" if target == folder else "overlaps a parent's folder"
            raise SlerpMergeError(
                f"The save directory {save_directory} {where} ({parent}).",
                "Parents are never written to. Give the child a folder of its own.",
            )
    if target.exists() and not target.is_dir():
        raise SlerpMergeError(f"The save directory {save_directory} is a file.", "Give another name for the child.")
    if target.is_dir() and any(target.iterdir()):
        check_replaceable(save_directory, overwrite)
    existing = next(folder for folder in (target.parent, *target.parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise SlerpMergeError(
            f"The save directory {save_directory} cannot be made: {existing} is not writable.",
            "Choose a place you may write to, or change the permissions.",
        )


def check_replaceable(save_directory: Path, overwrite: bool) -> None:
    """A folder that is not empty may be replaced only when asked for, and only if it is a model's."""
    if not overwrite:
        raise SlerpMergeError(
            f"The save directory {save_directory} is not empty.", "Give a new folder, or allow it with --overwrite."
        )
    if not (save_directory / "config.json").is_file():
        raise SlerpMergeError(
            f"The save directory {save_directory} holds files that are not a model's; nothing was overwritten.",
            "Overwriting replaces a whole folder. Give a new folder, or empty this one yourself.",
        )


# ── §4b  Recipes in: mergekit's YAML, with the line of every fault ───────────────────────────────

RECIPE_METHODS = {"slerp": "slerp", "nuslerp": "nuslerp", "linear": "lerp"}
RECIPE_KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name", "slerpmerge",
)  # fmt: skip
RECIPE_PARAMETERS = {
    "slerp": ("t",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "linear": ("weight", "normalize"),
}
OWN_SETTINGS = (
    "version", "method", "t", "slices_t", "dot_threshold", "epsilon", "extrapolate", "primary", "secondary", "base",
    "chat_template",
)  # fmt: skip


class RecipeFile:
    """A recipe as nodes of YAML, so that every complaint can name its line."""

    def __init__(self, path: Path) -> None:
        import yaml

        self.path = path
        try:
            self.root = yaml.compose(read_bytes(path, 1_000_000).decode("utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}" if mark else ""
            reason = getattr(error, "problem", None) or str(error)
            raise SlerpMergeError(f"{path}{place}: this is not valid YAML: {reason}.", "Mend that line.") from error
        if self.root is None:
            raise SlerpMergeError(f"{path} is empty.", "A recipe names at least merge_method and two models.")

    def fault(self, node: Any, what: str, hint: str) -> SlerpMergeError:
        return SlerpMergeError(f"{self.path}, line {node.start_mark.line + 1}: {what}.", hint)

    def mapping(self, node: Any, allowed: Sequence[str], what: str) -> dict[str, Any]:
        """The nodes of a mapping by key. Unknown keys are refused, with the nearest known one."""
        if node.id != "mapping":
            raise self.fault(node, f"{what} should be a mapping of keys to values", f"Known: {', '.join(allowed)}.")
        found: dict[str, Any] = {}
        for key, value in node.value:
            name = self.text(key, "a key")
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, 1)
                hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(allowed)}."
                raise self.fault(key, f"{name!r} is not known in {what}", hint)
            if name in found:
                raise self.fault(key, f"{name!r} stands twice in {what}", "Keep one of them.")
            found[name] = value
        return found

    def items(self, node: Any, what: str) -> list[Any]:
        if node.id != "sequence" or not node.value:
            raise self.fault(node, f"{what} should be a list", "Write each entry on a line of its own, after a dash.")
        return node.value

    def text(self, node: Any, what: str) -> str:
        if node.id != "scalar":
            raise self.fault(node, f"{what} should be a single value", "Write it on the same line.")
        return node.value

    def number(self, node: Any, what: str) -> float:
        text = self.text(node, what)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if node.tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") or not math.isfinite(value):
            raise self.fault(node, f"{what} should be a number, not {text!r}", "Write it like 0.5.")
        return value

    def truth(self, node: Any, what: str) -> bool:
        text = self.text(node, what).lower()
        if text not in ("true", "false"):
            raise self.fault(node, f"{what} should be true or false, not {text!r}", "Write true or false.")
        return text == "true"

    def rules(self, node: Any, what: str) -> tuple[ScheduleRule, ...]:
        """A number, a list of numbers (a gradient), or a list of {filter, value}, as mergekit reads them."""
        if node.id == "sequence" and node.value and node.value[0].id == "mapping":
            found = []
            for entry in node.value:
                parts = self.mapping(entry, ("filter", "value"), f"an entry of {what}")
                if "value" not in parts:
                    hint = "Write `value:` with a number or a list."
                    raise self.fault(entry, f"an entry of {what} has no value", hint)
                silent = "filter" not in parts or parts["filter"].tag == "tag:yaml.org,2002:null"
                name_filter = "*" if silent else self.text(parts["filter"], "filter")
                found.append(ScheduleRule(self.gradient(parts["value"], what), name_filter))
            return tuple(found)
        return (ScheduleRule(self.gradient(node, what)),)

    def gradient(self, node: Any, what: str) -> tuple[float, ...]:
        if node.id == "sequence":
            return tuple(self.number(entry, f"each value of {what}") for entry in self.items(node, what))
        return (self.number(node, what),)


class RecipeReader:
    """Makes of a mergekit recipe the fields of a MergeRecipe. Refuses by name, and with its line, what it cannot do."""

    def __init__(self, path: Path) -> None:
        self.file = RecipeFile(path)
        self.top = self.file.mapping(self.file.root, RECIPE_KEYS, "a recipe")
        self.method = self.read_method()
        self.scopes: list[dict[str, Any]] = []  # nodes of `parameters`, the widest last
        self.body = self.top
        if "parameters" in self.top:
            self.scopes.insert(0, self.parameters(self.top["parameters"]))
        if "modules" in self.top:
            self.body = self.only_module(self.top["modules"])
            if "parameters" in self.body:
                self.scopes.insert(0, self.parameters(self.body["parameters"]))

    def read_method(self) -> str:
        if "merge_method" not in self.top:
            raise self.file.fault(self.file.root, "merge_method is missing", "Write `merge_method: slerp`.")
        method = self.file.text(self.top["merge_method"], "merge_method")
        if method not in RECIPE_METHODS:
            known = ", ".join(RECIPE_METHODS)
            near = difflib.get_close_matches(method, RECIPE_METHODS, 1)
            hint = f"Did you mean {near[0]}?" if near else f"Known here: {known}. For others use mergekit."
            raise self.file.fault(self.top["merge_method"], f"the method {method!r} is not done here", hint)
        return method

    def parameters(self, node: Any) -> dict[str, Any]:
        return self.file.mapping(node, RECIPE_PARAMETERS[self.method], f"parameters of {self.method}")

    def only_module(self, node: Any) -> dict[str, Any]:
        if node.id != "mapping" or len(node.value) != 1:
            raise self.file.fault(node, "modules should name exactly one", "Merge one module at a time.")
        return self.file.mapping(node.value[0][1], ("models", "slices", "parameters"), "a module")

    def model(self, node: Any, what: str) -> Path:
        """A model's folder: relative to the recipe's own where it exists there."""
        if node.id == "mapping":
            node = self.file.mapping(node, ("model", "path", "name"), what).get("model", node)
        text = self.file.text(node, what)
        folder = clean_path(text)
        beside = self.file.path.parent / folder
        folder = beside if beside.exists() else folder
        if "+" in text and not folder.exists():
            hint = "Merge the adapter into its model first, and name the result."
            raise self.file.fault(node, f"{text!r} adds a LoRA adapter to a model", hint)
        return folder

    def schedule(self, name: str, scopes: Sequence[dict[str, Any]], node: Any) -> Schedule:
        """A parameter's rules, from the narrowest scope to the widest: the next is asked where no filter matches."""
        rules = [rule for scope in scopes if name in scope for rule in self.file.rules(scope[name], name)]
        if not rules:
            hint = f"Write `{name}:` under parameters."
            raise self.file.fault(node, f"{self.method} needs the parameter {name}", hint)
        return Schedule(tuple(rules))

    def flag(self, name: str, default: bool) -> bool:
        for scope in self.scopes:
            if name in scope:
                return self.file.truth(scope[name], name)
        return default

    def read(self) -> dict[str, Any]:
        """Fields of MergeRecipe. Raises SlerpMergeError with file and line."""
        own = self.own_settings()
        models = self.models()
        folders = [folder for folder, _, _ in models[0][1]]
        sides, base = self.sides(folders)
        fields: dict[str, Any] = {"primary": sides[0], "secondary": sides[1], "method": RECIPE_METHODS[self.method]}
        if base is not None:
            fields["base"] = base
        cuts = [self.slice(scope, sources, sides, base) for scope, sources in models]
        if "slices_t" in own:
            exact = own.pop("slices_t")
            cuts = [dataclasses.replace(cut, schedule=t, weights=None) for cut, t in zip(cuts, exact)]
        if "slices" in self.body:
            fields["slices"] = tuple(cuts)
        fields["schedule"], fields["weights"] = cuts[0].schedule, cuts[0].weights
        if self.method == "linear":
            fields["normalize"] = self.flag("normalize", True)
        if self.method == "nuslerp" and not self.flag("nuslerp_flatten", True):
            fields["granularity"] = "row" if self.flag("nuslerp_row_wise", False) else "column"
        return {**fields, **self.dtypes(), **self.tokenizer(sides), **own, "recipe_file": self.file.path}

    def models(self) -> list[tuple[list[dict[str, Any]], list[tuple[Path, Any, dict[str, Any]]]]]:
        """For each slice, or the one whole: (scopes of its parameters, [(folder, node, keys) of each source])."""
        if ("models" in self.body) == ("slices" in self.body):
            raise self.file.fault(self.file.root, "a recipe needs either models or slices", "Give one of them.")
        if "models" in self.body:
            entries = self.file.items(self.body["models"], "models")
            return [(self.scopes, [self.source(entry, ("model", "parameters")) for entry in entries])]
        found = []
        for node in self.file.items(self.body["slices"], "slices"):
            keys = self.file.mapping(node, ("sources", "parameters", "base_model"), "a slice")
            if "sources" not in keys:
                raise self.file.fault(node, "a slice has no sources", "List its models with their layer_range.")
            scopes = [self.parameters(keys["parameters"]), *self.scopes] if "parameters" in keys else self.scopes
            entries = self.file.items(keys["sources"], "sources")
            found.append((scopes, [self.source(entry, ("model", "layer_range", "parameters")) for entry in entries]))
        return found

    def source(self, node: Any, allowed: Sequence[str]) -> tuple[Path, Any, dict[str, Any]]:
        keys = self.file.mapping(node, allowed, "a model's entry")
        if "model" not in keys:
            raise self.file.fault(node, "an entry names no model", "Write `model:` with a folder.")
        return self.model(keys["model"], "model"), node, keys

    def sides(self, folders: Sequence[Path]) -> tuple[tuple[Path, Path], Path | None]:
        """((t = 0, t = 1), base of the task vectors) from the models listed and base_model."""
        stated = self.model(self.top["base_model"], "base_model") if "base_model" in self.top else None
        node = self.body.get("models") or self.body["slices"]
        if self.method != "slerp":
            others = [folder for folder in folders if folder != stated or self.method == "linear"]
            if len(others) != 2:
                raise self.file.fault(node, f"{len(others)} models are listed", f"{self.method} blends two here.")
            return (others[0], others[1]), None if self.method == "linear" else stated
        if stated is None:
            raise self.file.fault(self.file.root, "base_model is missing", "slerp needs it: it decides which is t = 0.")
        others = [folder for folder in folders if folder != stated]
        if len(others) != 1:
            what = f"{len(others)} models beside base_model are listed"
            raise self.file.fault(node, what, "slerp blends base_model with exactly one other.")
        return (stated, others[0]), None

    def slice(
        self,
        scopes: list[dict[str, Any]],
        sources: Sequence[tuple[Path, Any, dict[str, Any]]],
        sides: tuple[Path, Path],
        base: Path | None,
    ) -> LayerSlice:
        by_folder = {folder: (node, keys) for folder, node, keys in sources}
        for folder in sides:
            if folder not in by_folder:
                raise self.file.fault(sources[0][1], f"a slice leaves out {folder}", "Name both models in each slice.")
        for folder, node, _ in sources:
            if folder not in (*sides, base):
                raise self.file.fault(node, f"a third model, {folder}", "Only two models are blended here.")
        listed = [folder for folder in (*sides, base) if folder in by_folder]
        ranges = [self.layer_range(*by_folder[folder]) for folder in listed]
        for folder, layers in zip(listed, ranges):
            if len(layers) != len(ranges[0]):
                what = f"layer ranges of different length: {len(ranges[0])} and {len(layers)}"
                raise self.file.fault(by_folder[folder][0], what, "Each layer needs its counterpart.")
        weights = None
        schedule = Schedule.constant(0.5)
        if self.method == "slerp":
            schedule = self.schedule("t", scopes, sources[0][1])
        else:
            own = [by_folder[folder][1].get("parameters") for folder in sides]
            own_scopes = [[self.parameters(node)] if node is not None else [] for node in own]
            first, second = (self.schedule("weight", [*extra, *scopes], sources[0][1]) for extra in own_scopes)
            weights = first, second
        base_start = ranges[2].start if len(ranges) > 2 else None
        return LayerSlice(ranges[0].start, ranges[1].start, len(ranges[0]), schedule, weights, base_start)

    def layer_range(self, node: Any, keys: Mapping[str, Any]) -> range:
        if "slices" not in self.body:
            return range(0)
        if "layer_range" not in keys:
            raise self.file.fault(node, "layer_range is missing", "Write `layer_range: [first, one past the last]`.")
        ends = [self.file.number(end, "layer_range") for end in self.file.items(keys["layer_range"], "layer_range")]
        if len(ends) != 2 or any(end != int(end) for end in ends) or not 0 <= ends[0] < ends[1] <= MAX_LAYER_INDEX:
            raise self.file.fault(
                keys["layer_range"], "layer_range should be two rising whole numbers", "Write it like [0, 32]."
            )
        return range(int(ends[0]), int(ends[1]))

    def dtypes(self) -> dict[str, Any]:
        """`dtype` rounds the parents first and is the child's too, unless `out_dtype` says otherwise."""
        found: dict[str, Any] = {}
        for key, field in (("dtype", "cast_dtype"), ("out_dtype", "dtype")):
            if key in self.top:
                value = self.file.text(self.top[key], key)
                if value not in CHILD_DTYPES[1:]:
                    known = ", ".join(CHILD_DTYPES[1:])
                    raise self.file.fault(self.top[key], f"{key} cannot be {value!r}", f"Known: {known}.")
                found[field] = value
        if "cast_dtype" in found:
            found.setdefault("dtype", found["cast_dtype"])
        return found

    def tokenizer(self, sides: tuple[Path, Path]) -> dict[str, Any]:
        """tokenizer_source, or tokenizer with its source: base, or one of the two models."""
        node = self.top.get("tokenizer_source")
        if "tokenizer" in self.top:
            node = self.file.mapping(self.top["tokenizer"], ("source",), "tokenizer").get("source")
        if "chat_template" in self.top:
            chosen = self.file.text(self.top["chat_template"], "chat_template")
            if chosen != "auto":
                what = f"chat_template {chosen!r} is not done here"
                raise self.file.fault(self.top["chat_template"], what, "Leave it out, or write auto.")
        if node is None:
            return {}
        source = self.file.text(node, "tokenizer_source")
        if source == "base":
            return {"tokenizer": "primary"}
        if source == "union":
            return {"tokenizer": "union"}
        folder = self.model(node, "tokenizer_source")
        if folder not in sides:
            what = f"the tokenizer's source {source!r} is not one of the two models"
            raise self.file.fault(node, what, "Name one of them.")
        return {"tokenizer": "primary" if folder == sides[0] else "secondary"}

    def own_settings(self) -> dict[str, Any]:
        """What this tool's own recipes say beyond mergekit's; the parents' identity there is for people."""
        if "slerpmerge" not in self.top:
            return {}
        keys = self.file.mapping(self.top["slerpmerge"], OWN_SETTINGS, "slerpmerge")
        found: dict[str, Any] = {}
        if "method" in keys:
            found["method"] = self.file.text(keys["method"], "method")
        for name in ("dot_threshold", "epsilon"):
            if name in keys:
                found[name] = self.file.number(keys[name], name)
        if "chat_template" in keys:
            found["chat_template"] = self.file.text(keys["chat_template"], "chat_template")
        if "extrapolate" in keys:
            found["extrapolate"] = self.file.truth(keys["extrapolate"], "extrapolate")
        if "t" in keys:  # t as it was given, which weights would only reproduce up to a rounding
            found["schedule"], found["weights"] = Schedule(self.file.rules(keys["t"], "t")), None
        if "slices_t" in keys:
            nodes = self.file.items(keys["slices_t"], "slices_t")
            found["slices_t"] = [Schedule(self.file.rules(node, "slices_t")) for node in nodes]
        return found


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of MergeRecipe that a mergekit recipe gives.

    Raises SlerpMergeError with the line where it is wrong or asks for what is not done here.
    """
    return RecipeReader(path).read()


# ── §4c  Vocabularies: whose tokens the child speaks, and which rows stand for them ─────────────


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of any kind."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_CORES)


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


def language_scopes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where a config speaks of its language model: the part that is one inside a larger model, then the whole."""
    parts = [config.get(key) for key in LANGUAGE_CONFIGS]
    return [*(part for part in parts if isinstance(part, dict)), config]


def stated_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every token id that a config states, its language model's too."""
    scopes = reversed(language_scopes(config))
    return {key: value for scope in scopes for key, value in scope.items() if TOKEN_ID_KEY.search(key)}


def vocabulary_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the embedding: the config's vocab_size, where a matrix confirms it; or those of the one embedding."""
    for scope in language_scopes(checkpoint.config):
        rows = scope.get("vocab_size")
        if isinstance(rows, int) and any(holds_tokens(info, rows) for info in checkpoint.tensors.values()):
            return rows
    found = {
        info.shape[0]
        for info in checkpoint.tensors.values()
        if EMBEDDING_NAME.search(info.name) and len(info.shape) == 2 and holds_tokens(info, info.shape[0])
    }
    return found.pop() if len(found) == 1 else None


# Words in the names of tensors; which tensor is which follows from its shape where that is clear.
EMBEDDING_NAME = re.compile(
    r"embed_tokens\.weight|word_embeddings?\.weight|wte\.weight|embed_in\.weight|shared\.weight"
)
TOKEN_NAME = re.compile(r"emb|wte|shared|head|output|proj_out|decoder\.(weight|bias)$|predictions\.bias$|logits")
OTHER_ROWS_NAME = re.compile(r"posit|pos_emb|wpe|token_type|norm", re.IGNORECASE)


def holds_tokens(info: TensorInfo, rows: int | None) -> bool:
    """Whether a tensor can have a row for each token, as an embedding, a head and a head's bias have, by its shape."""
    if not info.is_float or not info.element_count or find_layer(info.name) or OTHER_ROWS_NAME.search(info.name):
        return False
    if rows is None or rows not in info.shape[: 1 + (info.shape[:1] == (1,))]:
        return False
    return len(info.shape) == 2 or (len(info.shape) == 1 and info.name.endswith("bias"))


def beside_tokens(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a single token has: of (tokens, width) the width; of (tokens,) and (1, tokens) nothing."""
    return shape[1:] if shape[0] != 1 else ()


def token_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors with a row for each token. Where rows are as many as something else in the config, by name too."""
    rows = vocabulary_rows(checkpoint)
    scopes = language_scopes(checkpoint.config)
    sizes = [n for scope in scopes for key, n in scope.items() if type(n) is int and not key.endswith("_id")]
    in_doubt = sizes.count(rows) > sum(scope.get("vocab_size") == rows for scope in scopes)
    return {
        name: info
        for name, info in checkpoint.tensors.items()
        if holds_tokens(info, rows) and (not in_doubt or TOKEN_NAME.search(name))
    }


def open_tokenizer(path: Path) -> Any:
    """A tokenizer.json as the tokenizers library has it. Raises SlerpMergeError where that cannot read it."""
    from tokenizers import Tokenizer

    if file_size(path) > MAX_TOKENIZER_BYTES:
        raise SlerpMergeError(f"{path} is larger than {format_bytes(MAX_TOKENIZER_BYTES)}.", "Download it again.")
    try:
        return Tokenizer.from_file(str(path))
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
        {path.name for pattern in TOKENIZER_CORES for path in folder.glob(pattern)} - {"tokenizer_config.json"}
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
    from tokenizers import AddedToken

    for content, flags in tokens:
        token = AddedToken(content, **dict(flags))
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
    settle_tokenizer(tokenizer, donor)
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


def settle_tokenizer(tokenizer: Any, folder: Path) -> None:
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
    return Mismatch("mended", "vocabulary", *shown, f"Rows follow tokens: {parts}.{lost if counts['left_out'] else ''}")


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §5  Parity: can these two make a right child?
# ════════════════════════════════════════════════════════════════════════════════════════════════

# Keys that change what the weights mean while every shape stays equal. Matched against the last part of a key.
BEHAVIOUR_KEY = re.compile(
    r"(^|_)n?_?(num_)?(attention_|key_value_|kv_|linear_\w+_|mamba_)?heads?(_kv)?$|head_dim|head_size|d_kv|d_head"
    r"|rope|rotary|(norm|layernorm)_eps|eps$|epsilon$|hidden_act|activation|act_fn|sliding|window|max_window_layers"
    r"|experts_per_tok|moe_k$|moe_topk|num_selected_experts|topk|scoring_func|routed_scaling"
    r"|layer_types|layers_block_type|softcap|alibi|parallel_attn|multi_query|parallel_residual|qk_norm|qk_layernorm"
    r"|scale_attn|query_pre_attn|attention_multiplier|residual_multiplier|embedding_multiplier|logit_scale"
    r"|logits_scaling|position_embedding_type|relative_attention|state_size|time_step|do_layer_norm_before|patch_size"
    r"|image_token|is_decoder|is_encoder_decoder|scale_embedding"
)
# Keys that say how a model was made or run, not what it is.
SILENT_KEY = re.compile(
    r"dropout|drop_rate|pdrop$|^_|transformers_version|use_cache|initializer|init_std|gradient_checkpointing"
    r"|^output_|return_dict|torchscript|pretraining_tp|task_specific_params|finetuning_task|auto_map|unsloth"
    r"|router_aux_loss|^use_bfloat16$|^bad_words|^prefix$|problem_type"
)
CAPACITY_KEY = re.compile(r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|model_max_length")
DEPTH_KEY = re.compile(r"(num_hidden_layers|n_layers?|num_layers)$")
VOCABULARY_KEY = re.compile(r"vocab_size$|padded_vocab_size")
DTYPE_KEYS = ("dtype", "torch_dtype")
# Buffers that older versions saved and newer ones recompute.
BUFFER_NAME = re.compile(r"rotary_emb\w*\.(inv_freq|cos_cached|sin_cached)$|attn\.masked_bias$|position_ids$")
MASK_NAME = re.compile(r"(attn|attention)\.bias$")
# Tensors that only quantised checkpoints have, and the scheme that leaves them.
QUANTISED_NAMES = (
    (re.compile(r"\.(g_idx|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(absmax|quant_map|quant_state\S*)$"), "bitsandbytes 4-bit"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes 8-bit"),
    (re.compile(r"_proj_(blocks|scales)$"), "MXFP4"),
    (re.compile(r"\.(weight_packed|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_inv$"), "FP8"),
)
# What to do about a scheme, where there is more to do than to take the original model.
QUANTISATION_REMEDIES = {
    "bitsandbytes": "or load it with transformers, call dequantize() on it and save that",
    "FP8": "or load it with FineGrainedFP8Config(dequantize=True) of transformers 5 and save that",
    "MXFP4": "or load it with Mxfp4Config(dequantize=True) of transformers and save that",
}


# Rotary settings that stood by themselves, and their names among the others.
ROPE_KEYS = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}


def canonical_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under one spelling: transformers 5 keeps them together, earlier versions apart."""
    canonical = dict(config)
    if "rope_type" in canonical:
        return canonical  # these are the rotary settings themselves
    together = canonical.pop("rope_parameters", None)
    scaling = canonical.pop("rope_scaling", None)
    rope = dict(together) if isinstance(together, dict) else {}
    rope.update(scaling if isinstance(scaling, dict) else {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    for key, name in ROPE_KEYS.items():
        if key in canonical:
            rope.setdefault(name, canonical.pop(key))
    if rope or "num_attention_heads" in canonical:
        canonical["rope_parameters"] = {"rope_type": "default", **rope}  # unscaled, where nothing is said
    return canonical


def canonical_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """A sliding window that is switched off is none, however wide it would be; a null says so too."""
    canonical = dict(config)
    window = canonical.get("sliding_window") and canonical.get("use_sliding_window", True)
    if "sliding_window" in canonical and not window:
        canonical["sliding_window"] = False
    if canonical.get("use_sliding_window") is False:
        canonical.pop("max_window_layers", None)
    return canonical


def canonical_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Head counts that are implied, written out, so that saying less is not a difference."""
    canonical = dict(config)
    heads, hidden = canonical.get("num_attention_heads"), canonical.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        if canonical.get("head_dim") is None:
            canonical["head_dim"] = hidden // heads
        if canonical.get("num_key_value_heads") is None:
            canonical["num_key_value_heads"] = heads
    return canonical


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; a null says the same as silence and is left out."""
    flat: dict[str, Any] = {}
    for key, value in canonical_window(canonical_heads(canonical_rope(config))).items():
        if isinstance(value, dict) and key not in ("id2label", "label2id", "quantization_config"):
            flat.update(flatten_config(value, f"{prefix}{key}."))
        elif value is not None:
            flat[prefix + key] = value
    return flat


def same_value(left: Any, right: Any) -> bool:
    """Equal as numbers: 10000 and 10000.0 are one value, true and 1 are not."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return left == right


def compare_configs(primary: Checkpoint, secondary: Checkpoint, any_depth: bool = False) -> list[Mismatch]:
    """Every config key on which the parents differ, judged by what it does to the child.

    any_depth: the recipe says which layers go together, so depth and settings per layer may differ.
    """
    left, right = flatten_config(primary.config), flatten_config(secondary.config)
    found = []
    for key in sorted(left.keys() | right.keys()):
        last = key.rpartition(".")[2]
        if last in DTYPE_KEYS or SILENT_KEY.search(last) or key.startswith("quantization_config"):
            continue
        if last in ("tie_word_embeddings", "tie_encoder_decoder") or VOCABULARY_KEY.search(last):
            continue  # judged by the weights themselves
        if any_depth and (DEPTH_KEY.search(last) or isinstance(left.get(key), list)):
            continue
        if key in left and key in right and same_value(left[key], right[key]):
            continue
        if last == "sliding_window" and not left.get(key) and not right.get(key):
            continue  # none, and not spoken of
        found.append(judge_config_key(key, left.get(key), right.get(key)))
    return found


def judge_config_key(key: str, left: Any, right: Any) -> Mismatch:
    """What follows from one config key on which the parents differ. None: that side does not state it."""
    last = key.rpartition(".")[2]
    shown = [shorten(value) if value is not None else "not stated" for value in (left, right)]
    both_speak = left is not None and right is not None
    if key in ("model_type", "architectures"):
        return Mismatch("blocking", key, *shown, "Different architectures give their weights different meanings.")
    if both_speak and DEPTH_KEY.search(last):
        return Mismatch("blocking", key, *shown, "Models of different depth have no layer for layer match.")
    behaviour = BEHAVIOUR_KEY.search(last) or ".rope_parameters." in f".{key}"
    behaviour = behaviour and not TOKEN_ID_KEY.search(last)
    if both_speak and behaviour:
        return Mismatch("blocking", key, *shown, "Equal shapes hide this: the weights would be used in another way.")
    if CAPACITY_KEY.search(last):
        return Mismatch("notice", key, *shown, "The child keeps the primary's limit.")
    if TOKEN_ID_KEY.search(last):
        return Mismatch("notice", key, *shown, "The child has that of the tokenizer's donor.")
    if behaviour:
        return Mismatch("notice", key, *shown, "One config is silent; make sure that both mean the same.")
    return Mismatch("notice", key, *shown, "The child keeps the primary's value.")


def quantisation_scheme(checkpoint: Checkpoint) -> str | None:
    """The name of the scheme a checkpoint is quantised with, from its config or its tensors; None where it is not."""
    settings = checkpoint.config.get("quantization_config")
    if isinstance(settings, dict):
        bits = next((f" {number}-bit" for number in (4, 8) if settings.get(f"load_in_{number}bit")), "")
        method = str(settings.get("quant_method") or ("bitsandbytes" if bits else "an unnamed scheme"))
        known = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "mxfp4": "MXFP4"}
        return known.get(method.lower(), method) + bits
    for name, info in checkpoint.tensors.items():
        for pattern, scheme in QUANTISED_NAMES:
            if pattern.search(name):
                return scheme
        if info.dtype.startswith("F8_"):
            return "FP8"
        if info.dtype not in TORCH_NAMES:
            return f"packed {info.dtype}"
    return None


def check_quantisation(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """One blocking line where either parent is quantised."""
    schemes = quantisation_scheme(primary), quantisation_scheme(secondary)
    if not any(schemes):
        return []
    shown = [scheme or "not quantised" for scheme in schemes]
    remedies = [QUANTISATION_REMEDIES.get(scheme.partition(" ")[0]) for scheme in schemes if scheme]
    other = ", ".join(dict.fromkeys(remedy for remedy in remedies if remedy))
    why = "Quantised weights cannot be interpolated; use the original, unquantised model"
    return [Mismatch("blocking", "quantisation", *shown, f"{why}, {other}." if other else f"{why}.")]


def is_known_buffer(info: TensorInfo) -> bool:
    """A tensor that a model recomputes when it loads: rotary frequencies, causal masks, position ids."""
    is_mask = MASK_NAME.search(info.name) and len(info.shape) == 4 and info.shape[2] == info.shape[3]
    return bool(BUFFER_NAME.search(info.name) or is_mask)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the head shares the embedding's weights, as the config tells; None where it is silent."""
    stated = (scope.get("tie_word_embeddings") for scope in [config, *language_scopes(config)])
    return next((value for value in stated if isinstance(value, bool)), None)


def find_tied_source(head: TensorInfo, owner: Checkpoint, other: Checkpoint) -> TensorInfo | None:
    """The embedding that serves `other` as the head that `owner` stores: a row per token, of the same width."""
    if is_tied(other.config) is False or len(head.shape) != 2 or head.name not in token_tensors(owner):
        return None
    candidates = [info for info in token_matrices(other) if info.shape[1:] == head.shape[1:]]
    return candidates[0] if len(candidates) == 1 else None


def token_matrices(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The matrices with a row for each token, the input embedding first; then its head, its copies, or others."""
    found = [info for info in token_tensors(checkpoint).values() if len(info.shape) == 2 and info.shape[0] != 1]
    # Where several share their weights, an embedding is stored under its own name or as the shared one.
    ranks = (re.compile(r"shared"), EMBEDDING_NAME, re.compile(r"embeddings|embed_tokens|wte"), re.compile("emb"))

    def rank(info: TensorInfo) -> int:
        return next((place for place, mark in enumerate(ranks) if mark.search(info.name)), len(ranks))

    return sorted(found, key=lambda info: (rank(info), natural_order(info.name)))


def copies_of_embedding(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Matrices that hold the embedding's own bytes once more, as a head stored although it is tied does.

    Reads them where there are any.
    """
    embedding, *others = token_matrices(checkpoint) or [None]
    return [info for info in others if info.shape == embedding.shape and have_same_bytes(embedding, info)]


def own_heads(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Heads that differ from the embedding: as large, and not an embedding of another kind by name."""
    embedding, *others = token_matrices(checkpoint) or [None]
    heads = [info for info in others if not re.search(r"emb(?!ed_out)|wte|shared", info.name)]
    return [info for info in heads if info.shape == embedding.shape and not have_same_bytes(embedding, info)]


def have_same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors of one shape hold the same bytes; stops at the first difference."""
    if first.dtype != second.dtype:
        return False
    if (first.file, first.offset) == (second.file, second.offset):
        return True
    reader = TensorReader(handles := FileHandles())
    rooms = [memoryview(bytearray(min(CHUNK_ELEMENTS, first.byte_count))) for _ in range(2)]
    try:
        for start in range(0, first.byte_count, CHUNK_ELEMENTS):
            parts = [room[: min(CHUNK_ELEMENTS, first.byte_count - start)] for room in rooms]
            for info, part in zip((first, second), parts):
                reader.read_into(info, start, part)
            if parts[0] != parts[1]:
                return False
    finally:
        handles.close()
    return True


def settle_heads(primary: Checkpoint) -> tuple[Checkpoint, list[Mismatch]]:
    """The primary without the copies of its embedding that its config says are tied; what was found.

    A stored head that differs from the embedding is a head of its own, whatever the config says of it.
    """
    if not is_tied(primary.config):
        return primary, []
    copies = [info.name for info in copies_of_embedding(primary)]
    heads = [info.name for info in own_heads(primary)]
    found = []
    if copies:
        why = "Tied to the embedding and equal to it; the child does without the copy."
        found.append(Mismatch("mended", format_names(copies), "stored although tied", "not needed", why))
    if heads:
        why = "It differs from the embedding, so the child has it, and says that it is not tied."
        found.append(Mismatch("mended", format_names(heads), "stored although tied", "see the primary", why))
    rest = {name: info for name, info in primary.tensors.items() if name not in copies}
    return dataclasses.replace(primary, tensors=rest), found


def main_stack(checkpoint: Checkpoint) -> tuple[str, int]:
    """(stack, layers) of the language model's layers: the stack as deep as the config says, else the largest."""
    sizes: dict[str, int] = {}
    depths: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        if (place := find_layer(name)) is not None:
            sizes[place[0]] = sizes.get(place[0], 0) + info.byte_count
            depths[place[0]] = max(depths.get(place[0], 0), place[1] + 1)
    stated = [stack for stack in sizes if depths[stack] == stated_depth(checkpoint.config)]
    stack = max(stated or sizes, key=lambda stack: sizes[stack], default="")
    return stack, depths.get(stack, 0)


def stated_depth(config: Mapping[str, Any]) -> int | None:
    """The number of layers a config states, its own or its language model's; None where it states none."""
    for scope in (config, config.get("text_config")):
        for key, value in (scope or {}).items():
            if DEPTH_KEY.search(key) and isinstance(value, int):
                return value
    return None


def renumber(tensor_name: str, index: int) -> str:
    """The name of the same tensor in another layer."""
    stack, _ = find_layer(tensor_name)
    rest = tensor_name[len(stack) + 1 :].partition(".")[2] if stack else tensor_name.partition(".")[2]
    return ".".join(part for part in (stack, str(index), rest) if part)


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor stands in its stack of layers: 0 first, 1 last, 0 outside layers, 1 in a stack of one."""
    places = {name: find_layer(name) for name in names}
    last_index: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            stack, index = place
            last_index[stack] = max(index, last_index.get(stack, 0))

    def position(place: tuple[str, int] | None) -> float:
        if place is None:
            return 0.0
        stack, index = place
        return index / last_index[stack] if last_index[stack] else 1.0

    return {name: position(place) for name, place in places.items()}


def child_layout(primary: Checkpoint, slices: Sequence[LayerSlice]) -> Iterator[tuple[str, TensorInfo, LayerPlace]]:
    """(the child's name, the primary's tensor, the layer's place) for every tensor of the child."""
    positions = layer_positions(primary.tensors)
    stack = main_stack(primary)[0] if slices else None
    layers: dict[int, list[TensorInfo]] = {}
    for name, info in primary.tensors.items():
        found = find_layer(name)
        if found is not None and found[0] == stack:
            layers.setdefault(found[1], []).append(info)
        else:
            yield name, info, LayerPlace(-1, -1, positions[name], -1)
    child_index = 0
    for number, cut in enumerate(slices):
        for step in range(cut.length):
            source = cut.primary_start + step
            place = LayerPlace(
                secondary=cut.secondary_start + step,
                base=source if cut.base_start is None else cut.base_start + step,
                position=step / (cut.length - 1) if cut.length > 1 else 1.0,
                slice_number=number,
            )
            for info in layers.get(source, []):
                yield renumber(info.name, child_index), info, place
            child_index += 1


def name_in(info: TensorInfo, index: int) -> str:
    """The name that the primary's tensor has in the layer `index` of another model; its own at -1."""
    return info.name if index < 0 else renumber(info.name, index)


def check_slices(slices: Sequence[LayerSlice], primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """Layers that a recipe asks for and a parent does not have."""
    found = []
    depths = [main_stack(parent)[1] for parent in (primary, secondary)]
    for cut in slices:
        ends = cut.primary_start + cut.length, cut.secondary_start + cut.length
        if ends[0] > depths[0] or ends[1] > depths[1]:
            shown = [f"{depth} layers, asked up to {end}" for depth, end in zip(depths, ends)]
            found.append(Mismatch("blocking", "layer_range", *shown, "A slice asks for layers that are not there."))
    return found


def pair_tensors(
    primary: Checkpoint,
    secondary: Checkpoint,
    slices: Sequence[LayerSlice] = (),
    base: Checkpoint | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[list[TensorPair], list[Mismatch]]:
    """Each tensor of the child with its sources, and every tensor that does not pair."""
    pairs: list[TensorPair] = []
    found: list[Mismatch] = []
    only_primary: list[str] = []
    used: set[str] = set()
    for name, left, place in child_layout(primary, slices):
        there = name_in(left, place.secondary)
        used.add(there)
        right = secondary.tensors.get(there)
        if is_known_buffer(left):  # never blended: the model computes it, and versions store it in their own ways
            if right is None:
                found.append(Mismatch("mended", name, "saved", "not saved", "A buffer; the primary's is kept."))
            pairs.append(TensorPair(name, left, None, None, place))
            continue
        if right is None and (right := find_tied_source(left, primary, secondary)) is not None:
            why = f"The secondary's head is tied to {right.name}, which takes part in its place."
            found.append(Mismatch("mended", name, "stored", "tied", why))
        if right is None:
            only_primary.append(name)
            continue
        ground = None
        if base is not None:
            ground = base.tensors.get(name_in(left, place.base)) or find_tied_source(left, primary, base)
        rows = rows_of(vocabulary, left, right, ground)
        found += compare_tensors(left, right, rows)
        if base is not None:
            found += check_ground(left, ground, rows)
        pairs.append(TensorPair(name, left, right, ground, place, rows))
    stack = main_stack(secondary)[0] if slices else None
    extra = [n for n in secondary.tensors if n not in used and not (stack and (find_layer(n) or ("",))[0] == stack)]
    return pairs, found + judge_unpaired(primary, secondary, only_primary, extra)


def rows_of(vocabulary: Vocabulary | None, *sources: TensorInfo | None) -> RowMap | None:
    """The map of rows for tensors that have one for each token on every side; None where rows go by number."""
    if vocabulary is None or vocabulary.row_map is None:
        return None
    follows = all(info is None or info.name in names for info, names in zip(sources, vocabulary.tensors))
    return vocabulary.row_map if follows else None


def check_ground(left: TensorInfo, ground: TensorInfo | None, rows: RowMap | None) -> list[Mismatch]:
    """The base model's tensor that a pair's task vectors start from must be there, of the same shape."""
    if ground is not None and same_shape(left, ground, rows):
        return []
    there = "missing" if ground is None else str(list(ground.shape))
    why = "The base model must hold every tensor that both parents learned on."
    return [Mismatch("blocking", f"{left.name} of the base", str(list(left.shape)), there, why)]


def same_shape(left: TensorInfo, right: TensorInfo, rows: RowMap | None) -> bool:
    """Whether two tensors can be blended: of one shape, or of one shape for each token where rows follow tokens."""
    if rows is None:
        return left.shape == right.shape
    return len(left.shape) == len(right.shape) and beside_tokens(left.shape) == beside_tokens(right.shape)


DIFFERENT_VOCABULARIES = "Vocabularies of different size."


def compare_tensors(left: TensorInfo, right: TensorInfo, rows: RowMap | None = None) -> list[Mismatch]:
    """Shape and dtype of one tensor on both sides. rows: where rows follow tokens, their number may differ."""
    found = []
    if not same_shape(left, right, rows):
        shapes = str(list(left.shape)), str(list(right.shape))
        rows_only = len(left.shape) == len(right.shape) and left.shape[1:] == right.shape[1:]
        why = DIFFERENT_VOCABULARIES if rows_only else "Tensors of different shape cannot be blended."
        found.append(Mismatch("blocking", left.name, *shapes, why))
    if left.dtype != right.dtype and not (left.is_float and right.is_float):
        why = "Only real numbers of different dtypes can be blended."
        found.append(Mismatch("blocking", left.name, left.dtype, right.dtype, why))
    return found


def judge_unpaired(
    primary: Checkpoint, secondary: Checkpoint, only_primary: Sequence[str], extra: Iterable[str]
) -> list[Mismatch]:
    """Tensors that a single parent has: left out where a rule says why, blocking otherwise."""
    found, unexplained = [], []
    for name in extra:
        info = secondary.tensors[name]
        if is_known_buffer(info):
            found.append(Mismatch("mended", name, "not saved", "saved", "A buffer; the child is made without it."))
        elif (source := find_tied_source(info, secondary, primary)) is not None:
            why = f"The child's head stays tied to {source.name}, as the primary's; the secondary's is left out."
            found.append(Mismatch("mended", name, "tied", "stored", why))
        else:
            unexplained.append(name)
    found.sort(key=lambda m: m.subject)
    sizes = [
        elements_by_layer(parent.tensors[name] for name in names)
        for parent, names in ((primary, only_primary), (secondary, unexplained))
    ]
    if sizes[0] and sizes[0] == sizes[1] and len(only_primary) != len(unexplained):
        shown = [f"{len(names)} tensors, such as {names[0]}" for names in (only_primary, unexplained)]
        why = (
            "The same weights laid out in two ways, fused in one parent and apart in the other. Load each parent "
            "with the same version of transformers (from_pretrained, then save_pretrained) and merge those copies."
        )
        return [*found, Mismatch("blocking", f"layout of {len(sizes[0])} layers", *shown, why)]
    missing = missing_tensors(primary, only_primary, "primary") + missing_tensors(secondary, unexplained, "secondary")
    return found + missing


def elements_by_layer(infos: Iterable[TensorInfo]) -> dict[Any, int]:
    """How many elements each layer's tensors hold together."""
    sizes: dict[Any, int] = {}
    for info in infos:
        place = find_layer(info.name)
        sizes[place] = sizes.get(place, 0) + info.element_count
    return {} if None in sizes else sizes


# ── Names: one model, saved by versions that put other prefixes before them ─────────────────────

OLD_ENDINGS = ((".gamma", ".weight"), (".beta", ".bias"))  # layer norms, as checkpoints of 2019 have them


def name_like(other: Checkpoint, model: Checkpoint) -> tuple[Checkpoint, list[Mismatch]]:
    """`other` with its tensors under the names that `model` has for them, where only prefixes differ.

    A prefix is exchanged if it has the other's parts, or some of them, in whatever order (`language_model.model` for
    `model.language_model`), and every tensor under it then meets one of the same shape without a counterpart.
    """
    free = {modern_name(name): info for name, info in model.tensors.items() if name not in other.tensors}
    strange = [name for name, info in other.tensors.items() if name not in model.tensors and not is_known_buffer(info)]
    if not free or not strange:
        return other, []
    renamed: dict[str, str] = {}

    def rename(targets: Mapping[str, str]) -> None:
        """Takes the new names if they are all there, each for one tensor, of its shape."""
        met = {free[there].name for name, there in targets.items() if fits(other.tensors[name], free.get(there))}
        if len(met) == len(targets):
            renamed.update({name: free.pop(there).name for name, there in targets.items()})

    for name in strange:
        rename({name: modern_name(name)})
    for old, new in exchangeable_prefixes(other, [name for name in strange if name not in renamed], free):
        rename(
            {name: exchange_prefix(name, old, new) for name in strange if name not in renamed and has_prefix(name, old)}
        )
    if not renamed:
        return other, []
    tensors = {
        renamed.get(name, name): dataclasses.replace(info, name=renamed.get(name, name))
        for name, info in other.tensors.items()
    }
    first = next(iter(renamed))
    why = f"The same tensors under other names, {len(renamed)} of them; the child has the primary's names."
    return dataclasses.replace(other, tensors=tensors), [Mismatch("mended", "names", renamed[first], first, why)]


def exchangeable_prefixes(
    other: Checkpoint, strange: Iterable[str], free: Mapping[str, TensorInfo]
) -> list[tuple[str, str]]:
    """(prefix there, prefix here), the longest first, and of one length the one that most tensors speak for.

    free: tensors without a counterpart yet, by modern name.
    """
    by_ending: dict[tuple[Any, ...], list[str]] = {}
    for name in free:
        by_ending.setdefault(ending_of(name), []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name in map(modern_name, strange):
        for candidate in by_ending.get(ending_of(name), []):
            pair = different_prefixes(name, candidate)
            parts = [set(prefix.split(".")) - {""} for prefix in pair]
            of_one_kind = parts[0] <= parts[1] or parts[1] <= parts[0]
            if of_one_kind and not any(part.isdecimal() for part in parts[0] | parts[1]):
                votes[pair] += 1
    return sorted(votes, key=lambda pair: (-len(pair[0]), -votes[pair], pair))


def ending_of(name: str) -> tuple[Any, ...]:
    """What two names of one tensor share: their last part, and every number."""
    parts = name.split(".")
    return parts[-1], *(part for part in parts if part.isdecimal())


def modern_name(name: str) -> str:
    """A tensor's name with the ending that it has today."""
    for old, new in OLD_ENDINGS:
        name = name[: -len(old)] + new if name.endswith(old) else name
    return name


def different_prefixes(left: str, right: str) -> tuple[str, str]:
    """Two dotted names without the parts they end in alike."""
    parts = left.split("."), right.split(".")
    shared = 0
    while shared < min(map(len, parts)) and parts[0][-1 - shared] == parts[1][-1 - shared]:
        shared += 1
    return ".".join(parts[0][: len(parts[0]) - shared]), ".".join(parts[1][: len(parts[1]) - shared])


def has_prefix(name: str, prefix: str) -> bool:
    """Whether a name stands under a prefix; every name does under an empty one."""
    return not prefix or name.startswith(prefix + ".")


def exchange_prefix(name: str, old: str, new: str) -> str:
    """A name, its ending made modern, with another prefix."""
    rest = modern_name(name)[len(old) + bool(old) :]
    return f"{new}.{rest}" if new else rest


def fits(info: TensorInfo, counterpart: TensorInfo | None) -> bool:
    """Same shape, rows aside where both are matrices: these may follow other tokens."""
    if counterpart is None or len(info.shape) != len(counterpart.shape):
        return False
    return info.shape == counterpart.shape or (len(info.shape) == 2 and info.shape[1] == counterpart.shape[1])


def missing_tensors(holder: Checkpoint, names: Sequence[str], role: str) -> list[Mismatch]:
    """One blocking line for all the tensors that a single side holds."""
    if not names:
        return []
    shown = ("present", "missing") if role == "primary" else ("missing", "present")
    subject = format_names(sorted(names, key=natural_order))
    why = f"{len(names)} tensor{'s' * (len(names) > 1)} of {holder.name} without a counterpart."
    return [Mismatch("blocking", subject, *shown, why)]


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(0, int(p), "") if p.isascii() and p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def check_dtypes(primary: Checkpoint, secondary: Checkpoint, recipe_dtype: str) -> list[Mismatch]:
    """Tensors stored in different floating-point dtypes, in one line a combination."""
    combinations: dict[tuple[str, str], int] = {}
    for name, left in primary.tensors.items():
        right = secondary.tensors.get(name) if not is_known_buffer(left) else None
        if right is not None and left.is_float and right.is_float and left.dtype != right.dtype:
            combinations[left.dtype, right.dtype] = combinations.get((left.dtype, right.dtype), 0) + 1
    kept = "the primary's" if recipe_dtype == "auto" else recipe_dtype
    return [
        Mismatch(
            "mended",
            f"dtype of {count} tensor{'s' * (count > 1)}",
            TORCH_NAMES.get(left, left),
            TORCH_NAMES.get(right, right),
            f"Blended in float32 (float64 where one is), saved in {kept}.",
        )
        for (left, right), count in combinations.items()
    ]


def read_text_if_there(path: Path) -> str | None:
    """A small text file, or None; what is not UTF-8 shows as replacement characters."""
    return read_bytes(path).decode("utf-8", "replace") if path.is_file() else None


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The chat template of a parent, from its own file, its tokenizer's config or its processor's."""
    template = read_text_if_there(checkpoint.folder / "chat_template.jinja")
    if template is not None:
        return template
    settings = (
        read_json_if_there(checkpoint.folder / name) for name in ("tokenizer_config.json", "chat_template.json")
    )
    value = next((found for part in settings if (found := part.get("chat_template"))), None)
    return value if isinstance(value, str) or value is None else json.dumps(value)


def declared_licence(checkpoint: Checkpoint) -> str | None:
    """The licence named in the front matter of a parent's model card."""
    card = read_text_if_there(checkpoint.folder / CARD_NAME) or ""
    front = re.match(r"---\n(.*?)\n---", card.replace("\r\n", "\n"), re.DOTALL)
    found = re.search(r"^license:[ \t]*[\"']?([\w.-]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


def compare_companions(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """Differences outside the weights that the person may want to know of."""
    found = []

    def note(subject: str, left: str | None, right: str | None, why: str) -> None:
        if left != right:
            shown = [value if value is not None else "none" for value in (left, right)]
            found.append(Mismatch("notice", subject, *map(shorten, shown), why))

    tokens = [special_tokens(parent) for parent in (primary, secondary)]
    for name in sorted(tokens[0].keys() | tokens[1].keys()):
        note(name, tokens[0].get(name), tokens[1].get(name), "The child has those of the tokenizer's donor.")
    settings = [read_json_if_there(parent.folder / GENERATION_NAME) for parent in (primary, secondary)]
    for stated in settings:
        stated.pop("transformers_version", None)
    if settings[0] != settings[1]:
        shown = [json.dumps(stated, sort_keys=True) if stated else None for stated in settings]
        why = "The child generates as the primary does, and stops where the tokenizer's donor does."
        note(GENERATION_NAME, *shown, why)
    why = "A child is bound by both; read them before you share it."
    note("licence", declared_licence(primary), declared_licence(secondary), why)
    return found


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """bos_token, eos_token, ... of a parent's tokenizer, by name."""
    settings = read_json_if_there(checkpoint.folder / "tokenizer_config.json")
    settings.update(read_json_if_there(checkpoint.folder / "special_tokens_map.json"))
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    contents = {
        name: settings[name].get("content") if isinstance(settings[name], dict) else settings[name]
        for name in names
        if settings.get(name) is not None
    }
    return {name: str(content) for name, content in contents.items()}


def check_talk(
    primary: Checkpoint, secondary: Checkpoint, vocabulary: Vocabulary, asked: str
) -> tuple[list[Mismatch], str | None]:
    """(what is to know of the chat templates, the role whose template is on offer for a child without one).

    asked: as MergeRecipe.chat_template.
    """
    parents = {"primary": primary, "secondary": secondary}
    templates = {role: chat_template(parent) for role, parent in parents.items()}
    if asked == "auto" and len(set(templates.values())) == 1:
        return [], None
    sizes = [f"{len(template)} characters" if template else "none" for template in templates.values()]
    shown = sizes if sizes[0] != sizes[1] else ["one", "another"]
    line = functools.partial(Mismatch, subject="chat template", primary=shown[0], secondary=shown[1])
    if vocabulary.role is None:
        severity = "notice" if asked == "auto" else "blocking"
        return [line(severity, consequence="Without a tokenizer, which neither parent has, it is of no use.")], None
    donor = parents[vocabulary.role]
    role = {"primary": "secondary", "secondary": "primary"}[vocabulary.role] if asked == "auto" else asked
    if asked == "auto" and templates[vocabulary.role]:
        return [line("notice", consequence="The child talks as the tokenizer's donor does.")], None
    if not templates[role]:
        return [line("blocking", consequence=f"The {role} has none to take.")], None
    unknown = [] if role == vocabulary.role else unknown_marks(templates[role], parents[role], donor, vocabulary)
    if unknown:
        why = f"The {role}'s speaks of {format_names(unknown)}, which the child's tokenizer does not know."
        severity = "notice" if asked == "auto" else "blocking"
        return [line(severity, consequence=f"{why} --tokenizer {role} takes both.")], None
    if asked == "auto":
        why = f"The child has none; --chat-template {role} takes the {role}'s, which fits its tokens."
        return [line("notice", consequence=why)], role
    return [line("mended", consequence=f"The child has the {role}'s, as asked, and also stops where that does.")], None


def unknown_marks(template: str, owner: Checkpoint, donor: Checkpoint, vocabulary: Vocabulary) -> list[str]:
    """Marks that a chat template puts around a conversation and that would be no tokens in the child."""
    if have_same_tokens(owner.folder, donor.folder):
        return []
    marks = set(added_tokens(owner.folder))
    try:
        if (owner.folder / "tokenizer.json").is_file():
            added = open_tokenizer(owner.folder / "tokenizer.json").get_added_tokens_decoder()
            marks |= {token.content for token in added.values()}
        known = read_tokens(donor.folder).keys() | {token.content for token in vocabulary.appended}
    except SlerpMergeError:  # it stays unknown what they are
        known = set()
    return sorted(mark for mark in marks if mark and mark in template and mark not in known)


def child_generation_config(
    primary: Checkpoint, secondary: Checkpoint, vocabulary: Vocabulary, template_role: str | None = None
) -> tuple[dict[str, Any], list[Mismatch]]:
    """generation_config.json of the child, empty where neither parent has one; what was mended in it.

    It is the primary's, or else the secondary's, with the ids of the tokenizer's donor, and none that has no row.
    template_role: a parent other than the donor whose chat template the child has; it also stops where that does.
    """
    parents = {"primary": primary, "secondary": secondary}
    stated = {role: read_json_if_there(parent.folder / GENERATION_NAME) for role, parent in parents.items()}
    source = "primary" if stated["primary"] else "secondary"
    donor = vocabulary.role or source
    settings = stated[source]
    if settings and source != donor:
        settings = follow_tokens(settings, stated[donor] or stated_ids(parents[donor].config), vocabulary, source)
    if template_role not in (None, donor):
        ends = [
            number
            for role in (donor, template_role)
            for number in ids_of(
                {**stated_ids(parents[role].config), **stated[role]}.get("eos_token_id"), vocabulary, role
            )
        ]
        settings |= {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
    kept, found = {}, []
    for key, value in settings.items():
        ids = value if isinstance(value, list) else [value]
        is_id = TOKEN_ID_KEY.search(key) is not None
        astray = [n for n in ids if is_id and type(n) is int and not has_row(n, vocabulary)]
        rest = [n for n in ids if n not in astray]
        if astray:
            why = f"The child's vocabulary has no {format_names(list(map(str, astray)))}; left out."
            name = f"{GENERATION_NAME}: {key}"
            found.append(Mismatch("mended", name, *(shorten(stated[role].get(key)) for role in parents), why))
        if not astray or rest:
            kept[key] = value if not astray else rest if len(rest) > 1 else rest[0]
    return kept, found


def has_row(number: int, vocabulary: Vocabulary) -> bool:
    """Whether a token's id can be one of the child's."""
    return vocabulary.rows is None or 0 <= number < vocabulary.rows


def ids_of(value: Any, vocabulary: Vocabulary, role: str) -> list[int]:
    """A parent's token id, or list of ids, as the child's ids; those that the child has no token for are left out."""
    ids = value if isinstance(value, list) else [value]
    places = [vocabulary.place_of(number, int(role == "secondary")) for number in ids if type(number) is int]
    return [place for place in places if place is not None]


def follow_tokens(
    settings: Mapping[str, Any], donor: Mapping[str, Any], vocabulary: Vocabulary, role: str
) -> dict[str, Any]:
    """Settings of the parent `role` with the token ids of the donor's settings, whole.

    Of ids that the donor does not state, the child has those of the same tokens.
    """
    result: dict[str, Any] = {key: value for key, value in donor.items() if TOKEN_ID_KEY.search(key)}
    for key, value in settings.items():
        if isinstance(value, dict):
            inner = donor.get(key)
            result[key] = follow_tokens(value, inner if isinstance(inner, dict) else {}, vocabulary, role)
        elif not TOKEN_ID_KEY.search(key) or value is None:
            result.setdefault(key, value)
        elif key not in result and (ids := ids_of(value, vocabulary, role)):
            result[key] = ids if isinstance(value, list) else ids[0]
    return {key: result[key] for key in (*settings, *donor) if key in result}  # in the settings' own order


def check_base(primary: Checkpoint, base: Checkpoint | None, any_depth: bool) -> list[Mismatch]:
    """What keeps a base model from being one, beyond the shapes of its tensors."""
    if base is None:
        return []
    found = [*check_quantisation(primary, base), *compare_configs(primary, base, any_depth)]
    return [dataclasses.replace(m, subject=f"{m.subject} of the base") for m in found if m.severity == "blocking"]


def check_same_model(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """A notice where both parents are one folder."""
    if primary.folder.resolve() != secondary.folder.resolve():
        return []
    why = "The child will be a copy of it."
    return [Mismatch("notice", "the same model twice", primary.name, secondary.name, why)]


def misfit(primary: Checkpoint, other: Checkpoint) -> str | None:
    """Why a model cannot be merged with the primary, in a few words; None where headers show no reason."""
    if primary.folder.resolve() == other.folder.resolve():
        return "the primary itself"
    found = check_quantisation(primary, other) + compare_configs(primary, other)
    found += pair_tensors(primary, name_like(other, primary)[0])[1]
    for m in found:
        if m.severity == "blocking" and m.consequence != DIFFERENT_VOCABULARIES:
            return f"{shorten(m.subject, 30)}: {shorten(m.secondary, 24)}, not {shorten(m.primary, 24)}"
    return None


def check_parity(
    primary: Checkpoint,
    secondary: Checkpoint,
    dtype: str = "auto",
    slices: Sequence[LayerSlice] = (),
    base: Checkpoint | None = None,
    tokenizer: str = "auto",
    template: str = "auto",
) -> ParityReport:
    """Every difference between two parents, each blocking, mended or a notice; and the pairs of tensors.

    dtype, slices, tokenizer, template: as in MergeRecipe. base: what both parents' task vectors start from, where
    they are asked for. Reads headers and small files; of weights, only a head that should not be there.
    """
    alike, renamed = name_like(secondary, primary)
    ground = None if base is None else name_like(base, primary)[0]
    vocabulary, found = align_vocabularies(primary, alike, tokenizer, ground)
    settled, heads = settle_heads(primary)
    pairs, unpaired = pair_tensors(settled, alike, slices, ground, vocabulary)
    talk, offered = check_talk(primary, secondary, vocabulary, template)
    found += [
        *check_quantisation(primary, secondary),
        *compare_configs(primary, secondary, any_depth=bool(slices)),
        *check_base(primary, base, any_depth=bool(slices)),
        *check_slices(slices, primary, alike),
        *heads,
        *renamed,
        *unpaired,
        *check_dtypes(primary, alike, dtype),
        *talk,
        *compare_companions(primary, secondary),
        *child_generation_config(primary, secondary, vocabulary)[1],
        *check_same_model(primary, secondary),
    ]
    rank = {"blocking": 0, "mended": 1, "notice": 2}
    found.sort(key=lambda m: rank[m.severity])
    return ParityReport(tuple(found), tuple(pairs), vocabulary, offered)


# ── Kinship: do these parents belong together? ──────────────────────────────────────────────────

KINSHIP_MATRICES = 96  # sampled at most, spread over the layers
KINSHIP_ELEMENTS = 1 << 16  # of each, from its middle: 25 MB of both parents together in 16 bits


def measure_kinship(pairs: Sequence[TensorPair]) -> Kinship:
    """The angle between the parents' matrices, by component, from a sample; without torch, within a second.

    Vectors such as norms are left out: those of strangers look alike too. So are embeddings where layers have
    matrices: their rows are not in the same order everywhere.
    """
    matrices = [
        pair
        for pair in pairs
        if pair.secondary and not pair.rows and is_matrix(pair.primary) and is_matrix(pair.secondary)
    ]
    matrices = [pair for pair in matrices if find_layer(pair.name)] or matrices
    sums: dict[str, list[float]] = {}
    reader = TensorReader(handles := FileHandles())
    try:
        for pair in matrices[:: -(-len(matrices) // KINSHIP_MATRICES) or 1]:
            found = sums.setdefault(component_of(pair.name), [0.0, 0.0, 0.0])
            with numpy.errstate(all="ignore"):  # what is not finite is left out
                v0, v1 = (read_middle(reader, info) for info in (pair.primary, pair.secondary))
                products = [float(a @ b) for a, b in ((v0, v0), (v1, v1), (v0, v1))]
            totals = [total + product for total, product in zip(found, products)]
            if math.isfinite(sum(totals)):
                found[:] = totals
    finally:
        handles.close()
    angles = [(component, angle) for component in sums if (angle := angle_of(*sums[component])) is not None]
    return Kinship(angle_of(*(sum(part) for part in zip(*sums.values()))) if sums else None, tuple(angles))


def is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor has a direction to speak of: real numbers in two dimensions or more."""
    return info.is_float and len(info.shape) > 1 and info.element_count > 0


def read_middle(reader: TensorReader, info: TensorInfo) -> Any:
    """Up to KINSHIP_ELEMENTS values from the middle of a tensor, as a flat float64 array of numpy."""
    width = DTYPE_BYTES[info.dtype]
    count = min(KINSHIP_ELEMENTS, info.element_count)
    data = bytearray(count * width)
    reader.read_into(info, (info.element_count - count) // 2 * width, memoryview(data))
    if info.dtype != "BF16":
        return numpy.frombuffer(data, f"<f{width}").astype("f8")
    # A bfloat16 is the upper half of a float32.
    return (numpy.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype("f8")


def angle_of(primary_squared: float, secondary_squared: float, dot: float) -> float | None:
    """Degrees between two vectors, from v0 . v0, v1 . v1 and v0 . v1; None where one has no length."""
    return degrees_of(cosine_between(dot, math.sqrt(primary_squared), math.sqrt(secondary_squared)))


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §6  Plan: everything decided before a byte is written
# ════════════════════════════════════════════════════════════════════════════════════════════════

PROCESS_BYTES = 245_000_000  # the interpreter with torch and the screen's libraries loaded, measured on Linux
PROBE_BYTES = 1 << 20  # per sample of the read probe
PROBE_SAMPLES = 8
# Rough costs behind the expected time, measured on one core of a 2023 server.
ARITHMETIC_SECONDS_PER_ELEMENT = 1.3e-9
WRITE_BYTES_PER_SECOND = 1.5e9


def check_t(t: float, recipe: MergeRecipe, tensor_name: str = "") -> None:
    """Raises SlerpMergeError where t lies outside 0 to 1 and the recipe does not allow it."""
    if not (0 <= t <= 1 or (recipe.extrapolate and math.isfinite(t))):
        raise SlerpMergeError(
            f"t = {t:g}{' for ' + tensor_name if tensor_name else ''} lies outside 0 to 1.",
            "0 is the primary, 1 the secondary, 0.5 the middle between them; beyond them only with --extrapolate.",
        )


def check_schedule(schedule: Schedule, recipe: MergeRecipe) -> None:
    """Raises SlerpMergeError where a schedule has no value, or a t that is not allowed. Weights may be any number."""
    if not schedule.rules or not all(rule.gradient for rule in schedule.rules):
        raise SlerpMergeError("The schedule of t has a rule without a value.", "Give each at least one, such as 0.5.")
    if recipe.weights is None:
        for t in schedule.values():
            check_t(t, recipe)


def check_recipe(recipe: MergeRecipe) -> None:
    """Raises SlerpMergeError where a recipe asks for what cannot be."""
    for name, value, allowed in (
        ("method", recipe.method, METHODS),
        ("granularity", recipe.granularity, GRANULARITIES),
        ("child's dtype", recipe.dtype, CHILD_DTYPES),
        ("tokenizer", recipe.tokenizer, TOKENIZER_CHOICES),
        ("chat template", recipe.chat_template, TEMPLATE_CHOICES),
        ("device", recipe.device, ("auto", "cpu", "cuda", "mps")),
    ):
        if value not in allowed:
            raise SlerpMergeError(f"The {name} cannot be {value!r}.", f"Choose one of: {', '.join(allowed)}.")
    if recipe.granularity != "tensor" and recipe.method != "nuslerp":
        raise SlerpMergeError(
            f"The granularity {recipe.granularity!r} goes with the method nuslerp alone.", "Add --method nuslerp."
        )
    for part in recipe.slices or (recipe,):
        for schedule in part.weights or (part.schedule,):
            check_schedule(schedule, recipe)
    if not 0 < recipe.dot_threshold <= 1:
        raise SlerpMergeError(
            f"The dot threshold {recipe.dot_threshold:g} is no cosine between 0 and 1.", f"Usual is {COLINEAR_DOT}."
        )
    if not 0 <= recipe.epsilon < math.inf:
        raise SlerpMergeError(f"Epsilon cannot be {recipe.epsilon:g}.", f"Usual is {TINY_NORM:g}.")
    if recipe.max_shard_bytes < 1 or recipe.threads < 0:
        raise SlerpMergeError("Shard size and threads cannot be negative or zero.", "Leave them out for good values.")


def choose_threads(asked: int) -> int:
    """Worker threads: as asked, else the usable cores up to MAX_THREADS."""
    if asked:
        return asked
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, usable)


def parameters_for(pair: TensorPair, recipe: MergeRecipe) -> tuple[Schedule, tuple[Schedule, Schedule] | None, float]:
    """(t's schedule, the weights' schedules, position) of one tensor.

    In a recipe of slices a layer follows its own; what stands before the layers follows the first slice, what
    stands behind them the last, both at position 0, as mergekit has it.
    """
    position = pair.place.position
    if not recipe.slices:
        return recipe.schedule, recipe.weights, position
    number = pair.place.slice_number
    if number < 0:
        number = 0 if re.search(r"emb|wte|wpe", pair.name) else len(recipe.slices) - 1
    part = recipe.slices[number]
    return part.schedule, part.weights, position


def blend_parameter(pair: TensorPair, recipe: MergeRecipe) -> tuple[float, tuple[float, float] | None]:
    """(t, weights of a LERP that is not (1 - t, t)) of one tensor."""
    schedule, weights, position = parameters_for(pair, recipe)
    if weights is None:
        return schedule.t_for(pair.name, position), None
    first, second = (part.t_for(pair.name, position) for part in weights)
    total = first + second
    if recipe.method == "nuslerp":
        t = second / total if abs(total) >= 1e-6 else 0.5
    elif not recipe.normalize:
        return second, (first, second)
    elif total == 0:
        raise SlerpMergeError(f"The weights for {pair.name} add up to 0.", "Give weights whose sum is not 0.")
    else:
        t = second / total
    check_t(t, recipe, pair.name)
    return t, None


def plan_job(pair: TensorPair, recipe: MergeRecipe) -> TensorJob:
    """The rule for one tensor, as far as headers tell."""
    info, rows = pair.primary, pair.rows
    dtype = info.dtype
    if info.is_float and recipe.dtype != "auto":
        dtype = SAFETENSORS_NAMES[recipe.dtype]
    job = functools.partial(TensorJob, pair.name, dtype, pair.shape)
    if pair.secondary is None or math.prod(pair.shape) == 0:
        return job("copy", 0.0, (info,))
    if not info.is_float:
        return job("copy", 0.0, (info, pair.secondary))  # the second is read to see that it is equal
    t, weights = blend_parameter(pair, recipe)
    if t in (0.0, 1.0) and weights is None:
        order = (0, 1) if t == 0.0 else (1, 0)
        copied = tuple((info, pair.secondary)[side] for side in order)
        return job("copy", t, copied, rows=rows.first(order)) if rows else job("copy", t, copied[:1])
    sources = (info, pair.secondary) if pair.base is None else (info, pair.secondary, pair.base)
    rule = "lerp" if recipe.method == "lerp" or not info.shape else "slerp"
    one_axis = len(info.shape) < 2 or (rows is not None and info.shape[0] == 1)
    granularity = "tensor" if one_axis else recipe.granularity  # a single axis is one vector either way
    return job(rule, t, sources, weights, granularity, rows)


def cut_shards(jobs: Sequence[TensorJob], max_shard_bytes: int) -> list[list[TensorJob]]:
    """Consecutive tensors, in layer order, into files of at most `max_shard_bytes` of tensor data.

    A tensor larger than that has a file of its own.
    """
    groups: list[list[TensorJob]] = [[]]
    filled = 0
    for job in jobs:
        if groups[-1] and filled + job.byte_count > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(job)
        filled += job.byte_count
    return groups


def lay_out_shard(file_name: str, group: Sequence[TensorJob]) -> ShardPlan:
    """The header of one safetensors file and the place of each tensor behind it.

    Wider dtypes come first, as the format's library writes them, so that every tensor is aligned.
    """
    ordered = sorted(group, key=lambda job: -DTYPE_BYTES[job.dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for job in ordered:
        end = begin + job.byte_count
        entries[job.name] = {"dtype": job.dtype, "shape": list(job.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = tuple(
        dataclasses.replace(job, offset=len(header) + entries[job.name]["data_offsets"][0]) for job in ordered
    )
    return ShardPlan(file_name, header, placed)


def plan_shards(jobs: Sequence[TensorJob], max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """The child's files: one, or numbered ones with an index beside them."""
    groups = cut_shards(jobs, max_shard_bytes)
    if len(groups) == 1:
        return (lay_out_shard(WEIGHTS_SINGLE, groups[0]),)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return tuple(lay_out_shard(name, group) for name, group in zip(names, groups))


def probe_reading(parents: Sequence[Checkpoint]) -> float:
    """Bytes per second of a few short reads spread over the parents' files; some milliseconds."""
    infos = [info for parent in parents for info in parent.tensors.values()]
    infos = sorted(infos, key=lambda info: -info.byte_count)[: 4 * PROBE_SAMPLES]
    reader = TensorReader(handles := FileHandles())
    buffer = bytearray(PROBE_BYTES)
    count, seconds = 0, 0.0
    try:
        for info in infos[:: max(1, len(infos) // PROBE_SAMPLES)][:PROBE_SAMPLES]:
            stretch = min(PROBE_BYTES, info.byte_count)
            started = time.perf_counter()
            reader.read_into(info, (info.byte_count - stretch) // 2, memoryview(buffer)[:stretch])
            seconds += time.perf_counter() - started
            count += stretch
    finally:
        handles.close()
    return count / max(seconds, 1e-6)


def estimate_memory(threads: int, granularity: str = "tensor") -> int:
    """Peak resident bytes of a merge on the processor: the process and each worker's buffers, whatever the model."""
    per_worker = CHUNK_ELEMENTS * (3 * 2 + 3 * 4)  # three buffers of two bytes a value, three in float32
    if granularity != "tensor":
        per_worker += CHUNK_ELEMENTS * 3 * 8  # and three in float64
    return PROCESS_BYTES + threads * per_worker


def plan_merge(
    recipe: MergeRecipe,
    primary: Checkpoint,
    secondary: Checkpoint,
    parity: ParityReport,
    base: Checkpoint | None = None,
) -> MergePlan:
    """A rule per tensor, the child's files, and what it will cost. Writes nothing.

    Raises SlerpMergeError where the recipe, the save directory or the free disk space do not allow it.
    """
    parents = [parent for parent in (primary, secondary, base) if parent is not None]
    check_save_directory(recipe.save_directory, [parent.folder for parent in parents], recipe.overwrite)
    pairs = sorted(parity.pairs, key=lambda pair: natural_order(pair.name))
    jobs = [plan_job(pair, recipe) for pair in pairs]
    shards = plan_shards(jobs, recipe.max_shard_bytes)
    threads = choose_threads(recipe.threads)
    rate = probe_reading(parents)
    read_bytes = sum(info.byte_count for job in jobs for info in job.sources)
    elements = sum(job.element_count for job in jobs)
    child_bytes = sum(shard.byte_count for shard in shards)
    plan = MergePlan(
        recipe=recipe,
        primary=primary,
        secondary=secondary,
        base=base,
        parity=parity,
        shards=shards,
        threads=threads,
        peak_memory_bytes=estimate_memory(threads, recipe.granularity),
        disk_needed_bytes=child_bytes + companion_bytes((primary, secondary)),
        disk_free_bytes=shutil.disk_usage(existing_folder(recipe.save_directory)).free,
        kinship=measure_kinship(pairs),
        remarks=(*unmatched_filters(recipe, jobs), *remarks_on_base(pairs)),
        read_bytes_per_second=rate,
        expected_seconds=read_bytes / rate
        + child_bytes / WRITE_BYTES_PER_SECOND
        + elements * ARITHMETIC_SECONDS_PER_ELEMENT / threads,
    )
    check_disk_space(plan)
    return plan


def remarks_on_base(pairs: Sequence[TensorPair]) -> Iterator[str]:
    """A base that is no relative of the primary is probably the wrong one."""
    kinship = measure_kinship([dataclasses.replace(pair, secondary=pair.base) for pair in pairs if pair.base])
    if kinship.verdict == "strangers":
        yield f"The base and the primary look like {kinship.describe()}. It is hardly what the parents learned from."


def unmatched_filters(recipe: MergeRecipe, jobs: Sequence[TensorJob]) -> Iterator[str]:
    """Filters that no tensor's name holds: probably misspelt."""
    schedules = [part for cut in recipe.slices or (recipe,) for part in (cut.schedule, *(cut.weights or ()))]
    filters = dict.fromkeys(rule.name_filter for schedule in schedules for rule in schedule.rules)
    for name_filter in filters:
        if name_filter != "*" and not any(name_filter in job.name for job in jobs):
            yield f"The filter {name_filter!r} matches no tensor."


def companion_bytes(parents: Sequence[Checkpoint]) -> int:
    """An upper bound for the tokenizer, config and card beside the weights."""
    patterns = ("config.json", GENERATION_NAME, *TOKENIZER_FILES, *TEMPLATE_FILES, *COMPANION_FILES)
    files = (file for parent in parents for pattern in patterns for file in parent.folder.glob(pattern))
    every = (inside for file in files for inside in ([file] if file.is_file() else nested_files(file)))
    return 65_536 + sum(file.stat().st_size for file in every if file.is_file())


def staged_bytes(save_directory: Path) -> int:
    """What an earlier run left on the disk; the next takes it over or removes it."""
    found = 0
    for path in staging_area(save_directory).rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            found += min(status.st_size, getattr(status, "st_blocks", math.inf) * 512)
    return found


def check_disk_space(plan: MergePlan) -> None:
    """Raises SlerpMergeError where the child does not fit on its disk."""
    if plan.disk_needed_bytes > plan.disk_free_bytes + staged_bytes(plan.recipe.save_directory):
        raise SlerpMergeError(
            f"The child needs {format_bytes(plan.disk_needed_bytes)}, but only {format_bytes(plan.disk_free_bytes)} "
            f"are free at {existing_folder(plan.recipe.save_directory)}.",
            "Free some space, choose a save directory on another disk, or a smaller dtype with --dtype.",
        )


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §7  Streamed merge
# ════════════════════════════════════════════════════════════════════════════════════════════════
#
# Each tensor is cut into chunks (read, computed and written at once) and runs of chunks into spans (what
# a worker takes at a time). Workers first measure every span of a tensor: three float32 sums of products
# a chunk. The main thread adds them up exactly and in float64 finds the tensor's two weights. Workers
# then blend every span and write it at its place. Chunks and the exact sum depend on the tensor alone,
# so the child's bits do not depend on how many workers there are or who was first.
#
# Both passes read. Keeping a tensor between them was measured slower: a second read of a file in the
# page cache costs less than writing what was read to memory beyond the processor's cache.


class FolderLock:
    """Says that a living process works in a folder. The system lets go of it when the process ends, however it ends.

    Raises SlerpMergeError where another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        while True:
            if os.path.lexists(self._path) and not is_plain_file(self._path):
                raise SlerpMergeError(f"{self._path} is in the way; it is no file of this tool's.", "Remove it.")
            self._descriptor = os.open(self._path, flags, 0o600)
            try:
                self._hold()
            except OSError as error:
                os.close(self._descriptor)
                raise SlerpMergeError(
                    f"Another run is making this child just now, in {folder}.",
                    "Wait for it, stop it, or give another save directory.",
                ) from error
            with contextlib.suppress(OSError):
                if os.name == "nt" or os.path.samestat(os.fstat(self._descriptor), self._path.lstat()):
                    return
            os.close(self._descriptor)  # its holder removed it just before; look again

    def _hold(self) -> None:
        """Raises OSError where another process holds the lock. A disk without locks, as some in networks, has none."""
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK):
                raise

    def release(self) -> None:
        """Lets go, and leaves no trace in the folder."""
        try:
            self._path.unlink()  # while it is held, so that nobody gets hold of a file about to go
            os.close(self._descriptor)
        except OSError:  # Windows removes no open file
            os.close(self._descriptor)
            with contextlib.suppress(OSError):
                self._path.unlink()


@contextlib.contextmanager
def interruptions_held() -> Iterator[list[Any]]:
    """Lets Ctrl-C and the like wait until a step that must not be cut in two is over. Yields those that do."""
    held: list[Any] = []
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not None}
    for number in before:
        signal.signal(number, lambda number, frame: held.append((number, frame)))
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in held[:1]:
        if callable(before[number]):
            before[number](number, frame)


class BackgroundSync:
    """One thread that asks the disk for finished files while the merge goes on."""

    def __init__(self) -> None:
        self._tasks: queue.Queue[tuple[Path, Callable[[], None]] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="sync", daemon=True)
        self._thread.start()

    def submit(self, path: Path, then: Callable[[], None] = lambda: None) -> None:
        """Asks for one file; `then` is called once it is on the disk. Raises what went wrong with one before it."""
        if self._error is not None:
            raise self._error
        self._tasks.put((path, then))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if not self._given_up:
                    sync_to_disk(task[0])
                    if not self._given_up:
                        task[1]()
            except BaseException as error:  # handed to whoever waits
                self._error = error

    def finish(self) -> None:
        """Waits until all is on the disk that was asked for; raises what went wrong."""
        self.stop(math.inf)
        if self._error is not None:
            raise self._error

    def stop(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Waits for what was asked for until `seconds` are over or it is `enough`, then gives up the rest."""
        self._tasks.put(None)
        limit = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < limit and not enough():
            self._thread.join(0.1)  # a wait without end would be deaf to Ctrl-C on Windows
        self._given_up = True


def plan_identity(plan: MergePlan) -> dict[str, Any]:
    """All that the bits of the child's files depend on, as JSON can hold it."""
    import hashlib

    settled = (
        "save_directory",
        "threads",
        "overwrite",
        "restart",
        "chat_template",
        "recipe_file",
    )  # these change no weight
    values = {field.name: getattr(plan.recipe, field.name) for field in dataclasses.fields(plan.recipe)}
    recipe = {
        name: str(value.resolve()) if isinstance(value, Path) else repr(value)
        for name, value in values.items()
        if name not in settled
    }
    parents = {"primary": plan.primary, "secondary": plan.secondary, "base": plan.base}
    layout = hashlib.sha256(b"".join(shard.header for shard in plan.shards)).hexdigest()
    stamps = {
        role: {name: list(stamp) for name, stamp in parent.stamps.items()}
        for role, parent in parents.items()
        if parent is not None
    }
    return {"version": __version__, "recipe": recipe, "parents": stamps, "layout": layout}


def identity_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why files made for one identity are of no use for another, in words; None where they are."""
    if before["version"] != now["version"]:
        return f"slerpmerge {before['version']} began it"
    for name, value in now["recipe"].items():
        if before["recipe"].get(name) != value:
            return f"its {name.replace('_', ' ')} was another"
    for role, stamps in now["parents"].items():
        changed = [name for name, _ in set_of(stamps) ^ set_of(before["parents"].get(role, {}))]
        if changed:
            return f"the {role}'s {min(changed)} has changed since"
    return None if before["layout"] == now["layout"] else "its files were laid out differently"


def set_of(stamps: Mapping[str, Sequence[int]]) -> set[tuple[str, tuple[int, ...]]]:
    """Stamps as a set, to be held against others."""
    return {(name, tuple(stamp)) for name, stamp in stamps.items()}


class Journal:
    """Which files of an unfinished child are finished and on the disk, and for what recipe and parents they were made.

    One JSON object, replaced as a whole by one rename, with its own checksum: a torn one is as good as none.
    """

    def __init__(self, area: Path, plan: MergePlan) -> None:
        self.path = area / JOURNAL_NAME
        self.folder = area / "child"
        self.shards = {shard.file_name: shard for shard in plan.shards}
        self.identity = plan_identity(plan)
        self.device = ""  # where the arithmetic ran; another could round differently
        self.finished: dict[str, list[TensorMerged]] = {}
        self._stamps: dict[str, tuple[int, int]] = {}

    def load(self) -> str:
        """Takes over the finished files that an earlier run left; returns why there are none, or nothing.

        Raises SlerpMergeError where the disk does not let it be read.
        """
        import hashlib

        if not is_plain_file(self.path):
            return "it has no journal"
        text, _, checksum = read_bytes(self.path, MAX_TOKENIZER_BYTES).rpartition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != checksum:
            return "its journal is torn"
        try:
            content = json.loads(text)
            if (reason := identity_difference(content["identity"], self.identity)) is not None:
                return reason
            found = {name: (entry["stamp"], self.read_tensors(name, entry)) for name, entry in content["files"].items()}
            device = str(content["device"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return "its journal cannot be read"
        if device != "cpu" and not accelerators().get(device):
            return f"it was begun on {device}, which is not there now"
        self.device = device
        for name, (stamp, merged) in found.items():
            if is_plain_file(self.folder / name) and list(self.stamp(name)) == stamp:
                self._stamps[name], self.finished[name] = self.stamp(name), merged
        return "" if self.finished else "none of its files was finished"

    def read_tensors(self, file_name: str, entry: Mapping[str, Any]) -> list[TensorMerged]:
        """The tensors of a finished file as they were recorded. Raises ValueError and the like where that is not so."""
        jobs = {job.name: job for job in self.shards[file_name].jobs}
        merged = []
        for name, (first, second, rule, reason, angle, norms), seconds, non_finite in entry["tensors"]:
            angle = None if angle is None else float(angle)
            norms = None if norms is None else (float(norms[0]), float(norms[1]))
            blend = Blend(float(first), float(second), str(rule), str(reason), angle, norms)
            merged.append(TensorMerged(jobs.pop(name), blend, float(seconds), int(non_finite)))
        if jobs:
            raise ValueError("tensors are missing")
        return merged

    def stamp(self, file_name: str) -> tuple[int, int]:
        """(bytes, nanoseconds of the last change) of a file of the child."""
        status = (self.folder / file_name).lstat()
        return status.st_size, status.st_mtime_ns

    def add(self, file_name: str, tensors: Sequence[TensorMerged]) -> None:
        """Records a file that is on the disk."""
        import hashlib

        self.finished[file_name], self._stamps[file_name] = list(tensors), self.stamp(file_name)
        files = {
            name: {
                "stamp": list(self._stamps[name]),
                "tensors": [
                    [m.job.name, dataclasses.astuple(m.blend), m.seconds, m.non_finite] for m in self.finished[name]
                ],
            }
            for name in self.finished
        }
        text = json.dumps({"identity": self.identity, "device": self.device, "files": files}).encode()
        fresh = self.path.with_suffix(".new")
        try:
            fresh.unlink(missing_ok=True)
            with open(fresh, "xb") as stream:
                stream.write(text + b"\n" + hashlib.sha256(text).hexdigest().encode())
            sync_to_disk(fresh)
            fresh.replace(self.path)
        except OSError as error:
            del self.finished[file_name]
            raise explain_os_error(error, self.path, "write") from error


GIVES_WAY = "An unfinished child stands there and gives way"


def leftover_remarks(plan: MergePlan) -> Iterator[str]:
    """What a run that ended early left for this one, in words."""
    journal = Journal(staging_area(plan.recipe.save_directory), plan)
    if is_plain_file(journal.path) and not plan.recipe.restart:
        reason = journal.load()
        kept = f"{len(journal.finished)} of {len(plan.shards)} files of an earlier run are kept."
        yield f"{GIVES_WAY}: {reason}." if reason else kept


class StagedChild:
    """The child while it grows: in a hidden folder beside the save directory, published by one rename.

    Leaving the `with` block by an error keeps the files that are finished, for the same merge to carry on with; where
    there are none, all is as it was. Another run that makes the same child is refused meanwhile: a lock in the hidden
    folder, which dies with its process, tells.
    """

    def __init__(self, plan: MergePlan, observe: Observer) -> None:
        self.plan = plan
        self.observe = observe
        self.target = plan.recipe.save_directory.resolve()
        self.area = staging_area(self.target)
        self.folder = self.area / "child"
        self.replaced = self.area / "replaced"  # a child that stood there before, until the new one does
        self.journal = Journal(self.area, plan)
        self._is_trusted = True
        self._made: list[Path] = []

    def __enter__(self) -> StagedChild:
        try:
            if os.path.lexists(self.area) and not is_plain_folder(self.area):
                raise SlerpMergeError(f"{self.area} is in the way; it is no folder of this tool's.", "Remove it.")
            for folder in reversed([self.area, *self.area.parents]):
                if not folder.exists():
                    folder.mkdir()
                    self._made.append(folder)
            self._lock = FolderLock(self.area)
        except BaseException as error:
            self._remove_made()
            if isinstance(error, OSError):
                raise explain_os_error(error, self.area, "make the folder") from error
            raise
        try:
            with interruptions_held():
                resumed = self._take_over()
            if resumed is not None:
                self.observe(resumed)
            self._sync = BackgroundSync()
        except BaseException as error:  # nothing is removed that a later run could use
            self._lock.release()
            with contextlib.suppress(OSError):
                self.area.rmdir()
            self._remove_made()
            if isinstance(error, OSError):
                raise explain_os_error(error, self.area, "prepare the folder") from error
            raise
        return self

    def _take_over(self) -> MergeResumed | None:
        """Whatever a run that ended early left: a child half replaced goes back, finished files stay, the rest goes."""
        for path in (self.folder, self.replaced):
            if os.path.lexists(path) and not is_plain_folder(path):
                path.unlink()  # a link or a file; what a link leads to is none of ours
        is_empty = self.target.is_dir() and not any(self.target.iterdir())
        if self.replaced.is_dir() and (is_empty or not self.target.exists()):
            if is_empty:
                self.target.rmdir()
            self.replaced.rename(self.target)
        if self.target.is_dir() and any(self.target.iterdir()):
            check_replaceable(self.target, self.plan.recipe.overwrite)
        leftover = self.folder.is_dir() and any(self.folder.iterdir())
        reason = "as asked" if self.plan.recipe.restart else self.journal.load()
        self._remove_unfinished()
        self.folder.mkdir(exist_ok=True)
        return MergeResumed(len(self.journal.finished), len(self.plan.shards), reason) if leftover else None

    def finish_file(self, file_name: str, tensors: Sequence[TensorMerged]) -> None:
        """Asks the disk for a finished file of weights in the background; once it is there, the journal has it."""
        self._sync.submit(self.folder / file_name, lambda: self.journal.add(file_name, tensors))

    def distrust(self) -> None:
        """Says that nothing of this child is of use to a later run."""
        self._is_trusted = False

    def sync(self) -> float:
        """Waits until every file is on the disk; returns the seconds waited."""
        started = time.perf_counter()
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name not in self.journal.shards:
                self._sync.submit(path)
        self._sync.finish()
        sync_to_disk(self.folder)
        return time.perf_counter() - started

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            with interruptions_held() as held:
                # A person who pressed Ctrl-C does not wait for the disk.
                self._sync.stop(30 if isinstance(error, Exception) else 0.5, enough=lambda: bool(held))
                self._leave()
            return
        try:
            with interruptions_held():
                self._publish()
        except BaseException as fault:
            if self.folder.exists():
                self._leave()
            if isinstance(fault, OSError):
                raise explain_os_error(fault, self.target, "put the finished child at") from fault
            raise

    def _publish(self) -> None:
        if self.target.is_dir():
            if any(self.target.iterdir()):
                check_replaceable(self.target, self.plan.recipe.overwrite)
                shutil.rmtree(self.replaced, ignore_errors=True)
                self.target.rename(self.replaced)
            else:
                self.target.rmdir()  # not every system renames onto an empty folder
        try:
            self.folder.rename(self.target)
        except BaseException:
            if self.replaced.exists():
                self.replaced.rename(self.target)
            raise
        sync_to_disk(self.target.parent)
        self.observe(ChildPublished(self.target))
        self._remove_area()

    def _leave(self) -> None:
        """After an error: only what the next run can use stays."""
        if not self._is_trusted:
            self.journal.finished.clear()
        if self.journal.finished:
            self._remove_unfinished()
            self._lock.release()
            self.observe(MergeStopped(len(self.journal.finished), len(self.plan.shards)))
        else:
            self._remove_area()
            self._remove_made()

    def _remove_unfinished(self) -> None:
        for path in list(self.folder.iterdir()) if is_plain_folder(self.folder) else ():
            if is_plain_folder(path):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in self.journal.finished:
                path.unlink()
        if not self.journal.finished:
            self._remove_journal()
        if self.target.is_dir() and any(self.target.iterdir()):
            shutil.rmtree(self.replaced, ignore_errors=True)

    def _remove_journal(self) -> None:
        for path in (self.journal.path, self.journal.path.with_suffix(".new")):
            if is_plain_folder(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _remove_area(self) -> None:
        for folder in (self.folder, self.replaced):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # what cannot be removed now, the next run removes
            self._remove_journal()
        self._lock.release()
        with contextlib.suppress(OSError):  # the next run may be there already
            self.area.rmdir()

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # somebody else put something there meanwhile
                folder.rmdir()


def check_parents_unchanged(plan: MergePlan, child: StagedChild) -> None:
    """Raises SlerpMergeError where a parent's file is not the one that was there when the merge began."""
    for parent in (plan.primary, plan.secondary, plan.base):
        if parent is None:
            continue
        changed = set_of(parent.stamps) ^ set_of(stamps_of(parent.folder, parent.stamps))
        if changed:
            child.distrust()
            raise SlerpMergeError(
                f"{parent.folder} changed during the merge: {format_names(sorted({name for name, _ in changed}))}.",
                "Nothing was saved, for the child would be of neither. Leave the parents alone and run it again.",
            )


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk. Folders: where the system can."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no call for it
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not path.is_dir():  # some network disks cannot sync a folder; the files themselves are safe
            raise explain_os_error(error, path, "write to the disk") from error


class ShardWriter:
    """Writes stretches of tensors into the child's files, each at the place the plan gives it."""

    def __init__(self, folder: Path, shard: ShardPlan) -> None:
        self.path = folder / shard.file_name
        self.shard = shard
        self.unfinished = len(shard.jobs)

    def create(self) -> None:
        """The file with its header, and room for all that follows."""
        try:
            with open(self.path, "xb") as stream:
                stream.write(self.shard.header)
                stream.truncate(self.shard.byte_count)
        except OSError as error:
            raise explain_os_error(error, self.path, "create") from error

    def begin(self, handles: FileHandles, offset: int) -> Callable[[memoryview], None]:
        """A function that writes one buffer after another, from byte `offset` of the file on.

        Both raise SlerpMergeError where the disk refuses, as a full one does.
        """
        try:
            handle = handles.at(self.path, "r+", offset)
        except OSError as error:
            raise explain_os_error(error, self.path, "write") from error
        return functools.partial(self._write, handle)

    def _write(self, handle: io.FileIO, view: memoryview) -> None:
        try:
            written = handle.write(view)
            while written < len(view):
                written += handle.write(view[written:])
        except OSError as error:
            raise explain_os_error(error, self.path, "write") from error


class ChunkBuffer:
    """Room for one chunk of any dtype, as bytes for files and as flat tensors for torch."""

    def __init__(self) -> None:
        # Mapped memory is aligned as vector units like it, and takes no room until it is used.
        backing = mmap.mmap(-1, CHUNK_ELEMENTS * max(DTYPE_BYTES.values()))
        self.memory = memoryview(backing)
        self._bytes = torch.frombuffer(backing, dtype=torch.uint8)
        self._typed: dict[str, torch.Tensor] = {}

    def typed(self, dtype: str) -> torch.Tensor:
        """All of this memory as a flat tensor; dtype is safetensors' name."""
        if dtype not in self._typed:
            self._typed[dtype] = self._bytes.view(torch_dtype(dtype))
        return self._typed[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for safetensors' name of it."""
    return getattr(torch, TORCH_NAMES[name])


@dataclass(frozen=True)
class Sums:
    """What a span tells about a pair of tensors."""

    primary_squared: tuple[float, ...]  # v0 . v0, a partial sum for each chunk
    secondary_squared: tuple[float, ...]  # v1 . v1
    dot: tuple[float, ...]  # v0 . v1
    identical: bool  # every byte agrees
    columns: torch.Tensor | None = None  # (3, columns), float64: the same for each column, where they are vectors


def total_sums(sums: Sequence[Sums]) -> tuple[float, float, float]:
    """(v0 . v1, |v0|, |v1|) over all spans of a tensor. The sum is exact, so that no order shows in it."""
    primary_squared, secondary_squared, dot = (
        exact_sum(value for part in sums for value in getattr(part, name))
        for name in ("primary_squared", "secondary_squared", "dot")
    )
    return dot, math.sqrt(primary_squared), math.sqrt(secondary_squared)


class ChunkArithmetic:
    """The arithmetic on one chunk, with one worker's scratch memory on one device.

    Precision: float32, or float64 where a source is float64. Results are rounded once, to the child's dtype.
    """

    def __init__(self, device: str, cast_dtype: str | None = None) -> None:
        self.device = device
        self.elements = CHUNK_ELEMENTS  # that it takes at once, at most
        self.cast = getattr(torch, cast_dtype) if cast_dtype else None
        self._scratch: dict[tuple[int, Any], torch.Tensor] = {}

    def scratch(self, side: int, dtype: torch.dtype) -> torch.Tensor:
        if (side, dtype) not in self._scratch:
            self._scratch[side, dtype] = torch.empty(self.elements, dtype=dtype, device=self.device)
        return self._scratch[side, dtype]

    def shrink(self) -> None:
        """Gives its memory back, and takes half as much from now on."""
        self._scratch.clear()
        self.elements = -(-self.elements // 2)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def load(self, side: int, raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The chunk in working precision on the device; itself where it already is."""
        raw = self.round(raw)
        if raw.dtype == dtype and self.device == "cpu":
            return raw
        return self.scratch(side, dtype)[: raw.numel()].copy_(raw)

    def round(self, raw: torch.Tensor) -> torch.Tensor:
        """The chunk rounded to the recipe's dtype, where it has one."""
        return raw if self.cast is None or raw.dtype == self.cast else raw.to(self.cast)

    def load_pair(self, chunk: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """v0 and v1 in working precision; with a third part, the base, what each learned since; and the base."""
        loaded = [self.load(side, raw, dtype) for side, raw in enumerate(chunk)]
        if len(loaded) == 3:
            for side in (0, 1):
                out = self.scratch(side, dtype)[: loaded[2].numel()]
                loaded[side] = torch.sub(loaded[side], loaded[2], out=out)
        return loaded

    def measure(self, chunk: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[float, float, float]:
        """(v0 . v0, v1 . v1, v0 . v1) of one chunk, summed in working precision."""
        v0, v1, *_ = self.load_pair(chunk, dtype)
        # torch.sum adds pairwise and is off by 1e-7 here; torch.dot in float32 was measured off by 1e-5.
        squares = squared_norm(v0), squared_norm(v1)
        room = self.scratch(3, dtype)[: v0.numel()] if v0 is chunk[0] else v0  # what was read is compared later
        sums = *squares, torch.mul(v0, v1, out=room).sum().item()
        if not math.isfinite(sum(sums)) and dtype == torch.float32 and self.device != "mps":
            return self.measure(chunk, torch.float64)  # large values overflow a float32 square
        return sums

    def measure_vectors(self, chunk: Sequence[torch.Tensor], dtype: torch.dtype, width: int, axis: int) -> torch.Tensor:
        """The same three sums for each vector of a chunk of whole rows `width` long: (3, vectors), float64, on the cpu.

        axis 1: the rows are the vectors; axis 0: the columns are.
        """
        v0, v1 = (part.view(-1, width) for part in self.load_pair(chunk, dtype)[:2])
        # In float64, for a vector is short and its sum has no digits to spare. MPS knows none.
        wide = dtype if self.device == "mps" else torch.float64
        if wide != dtype:
            rooms = [self.scratch(side, wide)[: v0.numel()].view(-1, width) for side in (0, 1)]
            v0, v1 = rooms[0].copy_(v0), rooms[1].copy_(v1)
        room = self.scratch(3, wide)[: v0.numel()].view(-1, width)
        sums = [torch.mul(a, b, out=room).sum(dim=axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))]
        return torch.stack(sums).cpu().double()

    def blend(
        self,
        chunk: Sequence[torch.Tensor],
        dtype: torch.dtype,
        weights: tuple[float, float],
        out: torch.Tensor,
    ) -> None:
        """out = w0 * v0 + w1 * v1, and the base where there is one, rounded to out's dtype."""
        v0, v1, *base = self.load_pair(chunk, dtype)
        result = torch.mul(v0, weights[0], out=self.scratch(0, dtype)[: v0.numel()])
        result.add_(v1, alpha=weights[1])
        if base:
            result.add_(base[0])
        out.copy_(self.round(result))

    def blend_vectors(
        self,
        chunk: Sequence[torch.Tensor],
        dtype: torch.dtype,
        weights: Sequence[torch.Tensor],  # two, shaped to stand beside the rows or above the columns
        width: int,
        out: torch.Tensor,
    ) -> None:
        """The same with weights of its own for each vector."""
        v0, v1, *base = (part.view(-1, width) for part in self.load_pair(chunk, dtype))
        first, second = (part.to(self.device, dtype) for part in weights)
        result = torch.mul(v0, first, out=self.scratch(0, dtype)[: v0.numel()].view(-1, width))
        result.addcmul_(v1, second)
        if base:
            result += base[0]
        out.view(-1, width).copy_(self.round(result))


@dataclass
class TensorProgress:
    """One tensor on its way through the workers. The main thread alone changes it."""

    job: TensorJob
    number: int
    writer: ShardWriter | None  # None where the parents are only measured
    known: TensorMerged | None  # of a file that an earlier run finished
    spans: tuple[range, ...]  # of element numbers
    sums: list[Sums | None]
    unfinished: int = 0  # spans of the pass at hand
    blend: Blend | None = None
    vector_weights: tuple[torch.Tensor, torch.Tensor] | None = None  # of columns, each blended on its own
    check_finite: bool = False  # whether blending could overflow the child's dtype
    non_finite: int = 0
    started: float = 0.0
    finished: float = 0.0


def chunk_elements(job: TensorJob) -> int:
    """Elements per chunk: whole rows where a job takes rows or columns for vectors, or where rows follow tokens."""
    if job.granularity == "tensor" and job.rows is None:
        return CHUNK_ELEMENTS
    width = matrix_width(job)
    if width > CHUNK_ELEMENTS:
        raise SlerpMergeError(
            f"{job.name} is {width} elements wide, too wide to be blended {job.granularity} by {job.granularity}.",
            "Use the granularity tensor.",
        )
    return CHUNK_ELEMENTS // width * width


def matrix_width(job: TensorJob) -> int:
    """Elements in a row, when a tensor is laid out so that its vectors are the rows, or are the columns; of a token.

    mergekit's nuslerp_row_wise takes vectors along dimension 0, which here are columns of a matrix of shape[0] rows;
    without it they run along the last dimension.
    """
    if job.granularity == "tensor":
        return job.row_elements
    return job.shape[-1] if job.granularity == "column" else math.prod(job.shape[1:])


def cut_spans(job: TensorJob) -> tuple[range, ...]:
    """Stretches of elements, each a few whole chunks long but for the last."""
    step = SPAN_CHUNKS * chunk_elements(job)
    return tuple(range(start, min(start + step, job.element_count)) for start in range(0, job.element_count, step))


def rows_in(job: TensorJob, part: range) -> slice:
    """The rows that a stretch of whole rows has, where rows follow tokens."""
    return slice(part.start // job.row_elements, part.stop // job.row_elements)


class MergeWorker:
    """One thread's means to measure and blend spans: open files, and buffers for one chunk."""

    def __init__(self, device: str, cast_dtype: str | None) -> None:
        self.handles = FileHandles()
        self.reader = TensorReader(self.handles)
        self.device = device
        self.cast_dtype = cast_dtype
        self.arithmetic = {device: ChunkArithmetic(device, cast_dtype)}
        self.sources = ChunkBuffer(), ChunkBuffer(), ChunkBuffer()
        self.out = ChunkBuffer()

    def arithmetic_for(self, dtype: torch.dtype) -> ChunkArithmetic:
        """MPS has no float64; what needs it is done on the processor."""
        return self.arithmetic_on("cpu" if self.device == "mps" and dtype == torch.float64 else self.device)

    def arithmetic_on(self, device: str) -> ChunkArithmetic:
        if device not in self.arithmetic:
            self.arithmetic[device] = ChunkArithmetic(device, self.cast_dtype)
        return self.arithmetic[device]

    @staticmethod
    def working_dtype(job: TensorJob) -> torch.dtype:
        return torch.float64 if any(info.dtype == "F64" for info in job.sources) else torch.float32

    def compute(
        self, dtype: torch.dtype, count: int, run: Callable[[ChunkArithmetic, slice], Any], whole: bool = False
    ) -> list[Any]:
        """Results of `run` over the `count` elements of a chunk: on the device, where it has the memory at once.

        Else in ever smaller pieces, and at last on the processor, as all that follows. A chunk that must stay whole
        goes there at once.
        """
        while True:
            arithmetic = self.arithmetic_for(dtype)
            if whole and count > arithmetic.elements:
                arithmetic = self.arithmetic_on("cpu")
            step = count if whole else min(count, arithmetic.elements)
            try:
                return [run(arithmetic, slice(start, start + step)) for start in range(0, count, step)]
            except (RuntimeError, AssertionError) as error:
                if arithmetic.device == "cpu":
                    raise
                if "out of memory" not in str(error).lower():
                    cause = (str(error).splitlines() or ["no reason given"])[0]
                    hint = "Run it again with --device cpu; it then starts anew."
                    raise SlerpMergeError(f"The device {arithmetic.device} failed: {cause}.", hint) from error
                arithmetic.shrink()
                if arithmetic.elements < CHUNK_ELEMENTS / MOST_PIECES:
                    self.device = "cpu"

    def read_chunks(self, job: TensorJob, span: range, blended: bool) -> Iterator[tuple[range, list[torch.Tensor]]]:
        """(elements, chunk of each source) over a span; flat, in their stored dtypes, valid until the next.

        blended: zeros stand for rows that will be kept, which then add nothing to a sum.
        """
        step = chunk_elements(job)
        fill = self.fill_rows if job.rows else self.fill_on
        fills = [fill(job, span, side, blended) for side in range(len(job.sources))]
        for start in range(span.start, span.stop, step):
            part = range(start, min(start + step, span.stop))
            chunk = []
            for fill, info, buffer in zip(fills, job.sources, self.sources):
                fill(buffer.memory[: len(part) * DTYPE_BYTES[info.dtype]])
                chunk.append(buffer.typed(info.dtype)[: len(part)])
            yield part, chunk

    def fill_on(self, job: TensorJob, span: range, side: int, blended: bool) -> Callable[[memoryview], None]:
        """A function that fills one buffer after another with a span of a source."""
        info = job.sources[side]
        return self.reader.begin(info, span.start * DTYPE_BYTES[info.dtype], side)

    def fill_rows(self, job: TensorJob, span: range, side: int, blended: bool) -> Callable[[memoryview], None]:
        """The same, with the rows that stand for the child's tokens."""
        info, maps = job.sources[side], job.rows.blended if blended else job.rows.sources
        rows = maps[side][rows_in(job, span)]
        done = 0

        def fill(view: memoryview) -> None:
            nonlocal done
            count = len(view) // (job.row_elements * DTYPE_BYTES[info.dtype])
            self.reader.read_rows(info, rows[done : done + count], view, side)
            done += count

        return fill

    def measure(self, progress: TensorProgress, number: int) -> Sums:
        """First pass over a span of a pair."""
        job = progress.job
        dtype = self.working_dtype(job)
        sums, identical = [], True
        columns = None
        for _, chunk in self.read_chunks(job, progress.spans[number], blended=True):
            left, right, *_ = chunk
            alike = left.dtype == right.dtype
            if job.sources[0].is_float:
                found = self.measure_chunk(job, chunk, dtype)
                if job.granularity == "row":
                    columns = found[0] if columns is None else columns + found[0]
                    found = [tuple(found[0].sum(dim=1).tolist())]
                sums += found
                alike = alike and all(map(could_be_equal, found))
            identical = identical and alike and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
        return Sums(*(tuple(row[place] for row in sums) for place in range(3)), identical, columns)

    def measure_chunk(self, job: TensorJob, chunk: Sequence[torch.Tensor], dtype: torch.dtype) -> list[Any]:
        """Three sums of products of each piece of a chunk, or of each of its columns where these are the vectors."""
        if job.granularity == "row":
            width = matrix_width(job)
            return self.compute(dtype, len(chunk[0]), lambda on, _: on.measure_vectors(chunk, dtype, width, 0), True)
        return self.compute(dtype, len(chunk[0]), lambda on, piece: on.measure([raw[piece] for raw in chunk], dtype))

    def blend(self, progress: TensorProgress, number: int) -> int:
        """Second pass over a span: blends or copies it, writes it. Returns its non-finite values, where asked."""
        job, blend, span = progress.job, progress.blend, progress.spans[number]
        width = DTYPE_BYTES[job.dtype]
        write = progress.writer.begin(self.handles, job.offset + span.start * width)
        non_finite = 0
        for part, chunk in self.read_chunks(job, span, blended=False):
            out = self.out.typed(job.dtype)[: len(part)]
            if blend.rule == "copy":
                out.copy_(
                    self.arithmetic_for(torch.float32).round(chunk[0]) if chunk[0].is_floating_point() else chunk[0]
                )
            else:
                self.blend_chunk(progress, chunk, out)
            if job.rows is not None:
                self.keep_rows(job, part, chunk, out)
            if progress.check_finite:
                non_finite += count_non_finite(out)
            write(self.out.memory[: len(part) * width])
        return non_finite

    def blend_chunk(self, progress: TensorProgress, chunk: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """out = w0 * v0 + w1 * v1, with the tensor's weights, or those of each of its vectors."""
        job, dtype = progress.job, self.working_dtype(progress.job)
        weights = progress.blend.primary_weight, progress.blend.secondary_weight
        if progress.vector_weights is None and job.granularity != "column":
            self.compute(
                dtype, len(out), lambda on, piece: on.blend([raw[piece] for raw in chunk], dtype, weights, out[piece])
            )
            return

        def by_vectors(on: ChunkArithmetic, _: slice) -> None:
            own = progress.vector_weights
            if own is None:
                sums = on.measure_vectors(chunk, dtype, matrix_width(job), axis=1)
                own = [part.unsqueeze(1) for part in vector_weights(sums, job.t)]
            on.blend_vectors(chunk, dtype, own, matrix_width(job), out)

        self.compute(dtype, len(out), by_vectors, whole=True)

    def keep_rows(self, job: TensorJob, part: range, chunk: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Puts the rows of tokens that a single parent has into `out` as they are."""
        width = job.row_elements
        for side, raw in enumerate(chunk[:2]):
            places = torch.from_numpy(numpy.flatnonzero(job.rows.is_kept(side)[rows_in(job, part)]))
            if len(places):
                kept = self.arithmetic_for(torch.float32).round(raw.view(-1, width)[places])
                out.view(-1, width)[places] = kept.to(out.dtype)


def squared_norm(values: torch.Tensor) -> float:
    """v . v of a flat tensor, in its own precision.

    torch's norm runs through memory once and writes nothing, but adds one after the other: in float32 it was
    measured off by 2e-8 over rows of 256 random values (9e-7 where all are equal), by 3e-6 over 16,384.
    torch.sum then adds the rows pairwise.
    """
    whole = values.numel() // NORM_ROW * NORM_ROW
    if whole < NORM_ROW * NORM_ROW:  # few rows: their roundings would not even out
        return values.square().sum().item()
    rows = torch.linalg.vector_norm(values[:whole].view(-1, NORM_ROW), dim=1).square_().sum()
    return (rows + values[whole:].square().sum()).item() if whole < values.numel() else rows.item()


def could_be_equal(sums: tuple[float, float, float]) -> bool:
    """Equal bytes have equal norms, or sums that are no number; only then is it worth looking at every byte."""
    return sums[0] == sums[1] or not math.isfinite(sum(sums))


def count_non_finite(tensor: torch.Tensor) -> int:
    """Infinite or not-a-number values of a floating-point tensor; 0 of any other."""
    if not tensor.is_floating_point():
        return 0
    if math.isfinite(tensor.sum().item()):
        return 0  # one infinite or undefined value would have made the sum so; this is 40 times as fast
    return tensor.numel() - int(torch.isfinite(tensor).sum())


class WorkerTeam:
    """Threads that take tasks from two queues, measuring and blending, and answer into a third.

    At most half of them blend while there is something to measure. A system lets one thread at a time
    write to a file, and others that want to only wait; reading and arithmetic fill that time (measured: a sixth).
    """

    def __init__(self, device: str, threads: int, cast_dtype: str | None) -> None:
        self._ready = threading.Condition()  # guards the four below
        self._to_measure: deque[Any] = deque()
        self._to_blend: list[tuple[int, int, Any]] = []  # a heap: the first tensor's first span goes first
        self._blending = 0
        self._stopping = False
        self._most_blending = max(1, threads // 2)
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        workers = [MergeWorker(device, cast_dtype) for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), name=f"merge-{number}", daemon=True)
            for number, worker in enumerate(workers)
        ]

    def __enter__(self) -> WorkerTeam:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._ready:
            self._stopping = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(self, method: str, progress: TensorProgress, number: int) -> None:
        """Asks for a pass, "measure" or "blend", over one span of a tensor."""
        task = method, progress, number
        with self._ready:
            if method == "blend":
                heapq.heappush(self._to_blend, (progress.number, number, task))
            else:
                self._to_measure.append(task)
            self._ready.notify()

    def _take(self) -> tuple[str, TensorProgress, int] | None:
        """The next task for a free thread; None when it shall go home."""
        with self._ready:
            self._ready.wait_for(lambda: self._stopping or self._to_measure or self._to_blend)
            if self._stopping:
                return None
            if self._to_blend and (self._blending < self._most_blending or not self._to_measure):
                self._blending += 1
                return heapq.heappop(self._to_blend)[-1]
            return self._to_measure.popleft()

    def _finish(self, task: tuple[str, TensorProgress, int], answer: Any) -> None:
        if task[0] == "blend":
            with self._ready:
                self._blending -= 1
        self._answers.put((task, answer))

    def next_answer(self) -> tuple[TensorProgress, int, str, Any]:
        """(progress, span number, method, result) of the next finished task; raises what the task raised."""
        while True:
            try:
                task, answer = self._answers.get(timeout=0.2)  # a wait without end would be deaf to Ctrl-C on Windows
                break
            except queue.Empty:
                continue
        if isinstance(answer, BaseException):
            raise answer
        method, progress, number = task
        return progress, number, method, answer

    def _work(self, worker: MergeWorker) -> None:
        torch.set_num_threads(1)  # the workers are the parallelism; torch's own would fight them
        with torch.inference_mode():
            while task := self._take():
                method, progress, number = task
                try:
                    answer = getattr(worker, method)(progress, number)
                except BaseException as error:  # handed to the main thread, which raises it
                    answer = error
                self._finish(task, answer)
        worker.handles.close()


def choose_device(asked: str, threads: int) -> tuple[str, str]:
    """(device, reason). `auto` times a chunk on each device there is, transfers included, and takes the faster.

    Raises SlerpMergeError where a device is asked for that is not there.
    """
    available = [name for name, is_there in accelerators().items() if is_there]
    if asked not in ("auto", "cpu") and asked not in available:
        raise SlerpMergeError(
            f"This machine has no {asked.upper()} device that torch can use.",
            "Leave the device to auto; a merge is bound by reading and writing, and the processor does it well.",
        )
    if asked != "auto":
        return asked, "as asked"
    if not available:
        return "cpu", "there is no accelerator, and a merge hardly needs one"
    rates = {"cpu": probe_device("cpu") * threads}
    for name in available:
        with contextlib.suppress(RuntimeError, AssertionError):  # it has no memory left, or does not work
            rates[name] = probe_device(name)
    best = max(rates, key=lambda name: rates[name])
    shown = ", ".join(f"{name} {format_bytes(rate)}/s" for name, rate in rates.items())
    return best, f"the fastest in a short probe ({shown}); reading and writing bound a merge, not arithmetic"


def accelerators() -> dict[str, bool]:
    """The devices torch knows beside the processor, and whether each is there."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


def probe_device(device: str) -> float:
    """Bytes per second of measuring and blending a chunk of bfloat16 on a device, by one worker."""
    arithmetic = ChunkArithmetic(device)
    left, right = (torch.randn(CHUNK_ELEMENTS).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    best = math.inf
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        arithmetic.measure((left, right), torch.float32)
        arithmetic.blend((left, right), torch.float32, (0.5, 0.5), out)
        best = min(best, time.perf_counter() - started)
    return left.nbytes / best


class MergeStream:
    """Leads every tensor through its two passes, a few at a time, and tells what happens in the child's order."""

    def __init__(self, plan: MergePlan, child: StagedChild, team: WorkerTeam, observe: Observer) -> None:
        self.recipe = plan.recipe
        self.child = child
        self.team = team
        self.observe = observe
        self.spans_ahead = 4 * plan.threads  # enough that no worker waits, few enough to stay flat
        self.spans_under_way = 0
        self.waiting = self._all_progress(plan)
        self.in_order: deque[TensorProgress] = deque()
        self.done: list[TensorMerged] = []

    def _all_progress(self, plan: MergePlan) -> Iterator[TensorProgress]:
        number = 0
        for shard in plan.shards:
            writer = ShardWriter(self.child.folder, shard)
            known = {merged.job.name: merged for merged in self.child.journal.finished.get(shard.file_name, ())}
            if not known:
                writer.create()
            for job in shard.jobs:
                spans = () if known else cut_spans(job)
                yield TensorProgress(job, number, writer, known.get(job.name), spans, [None] * len(spans))
                number += 1

    def run(self) -> tuple[TensorMerged, ...]:
        exhausted = False
        while True:
            while not exhausted and (self.spans_under_way < self.spans_ahead or len(self.in_order) < 2):
                progress = next(self.waiting, None)
                if progress is None:
                    exhausted = True
                else:
                    self.admit(progress)
            if not self.in_order:
                return tuple(self.done)
            self.receive(*self.team.next_answer())

    def admit(self, progress: TensorProgress) -> None:
        progress.started = time.perf_counter()
        self.in_order.append(progress)
        self.spans_under_way += len(progress.spans)
        if progress.known is not None:
            self.observe(BytesMerged(progress.job.byte_count))
            self.finish(progress)
        elif progress.job.is_measured:
            self.begin_pass(progress, "measure")
        else:
            progress.blend = Blend(1.0, 0.0, "copy", f"t = {progress.job.t:g}", None)
            progress.check_finite = progress.job.sources[0].is_float
            self.begin_pass(progress, "blend")

    def begin_pass(self, progress: TensorProgress, method: str) -> None:
        progress.unfinished = len(progress.spans)
        for number in range(len(progress.spans)):
            self.team.submit(method, progress, number)
        if not progress.spans:
            self.finish(progress)  # a tensor of no elements

    def receive(self, progress: TensorProgress, number: int, method: str, answer: Any) -> None:
        progress.unfinished -= 1
        if method == "measure":
            progress.sums[number] = answer
            if not progress.unfinished:
                self.decide(progress)
                self.begin_pass(progress, "blend")
            return
        progress.non_finite += answer
        self.spans_under_way -= 1
        self.observe(BytesMerged(len(progress.spans[number]) * DTYPE_BYTES[progress.job.dtype]))
        if not progress.unfinished:
            self.finish(progress)

    def decide(self, progress: TensorProgress) -> None:
        """The blend of a tensor from the sums over all its spans."""
        job = progress.job
        sums, progress.sums = progress.sums, []
        if not job.sources[0].is_float:
            reason = "not a real number" if all(part.identical for part in sums) else "differs; the primary's is kept"
            progress.blend = Blend(1.0, 0.0, "copy", reason, None)
            return
        dot, *norms = total_sums(sums)
        if all(part.identical for part in sums) and job.weights is None:
            angle = 0.0 if 0 < norms[0] < math.inf else None
            progress.blend = Blend(1.0, 0.0, "copy", "identical", angle, (norms[0], norms[1]))
        else:
            method = "lerp" if job.rule == "lerp" else self.recipe.method
            progress.blend = slerp_coefficients(
                dot, *norms, job.t, method, self.recipe.dot_threshold, self.recipe.epsilon
            )
            if job.weights is not None:
                first, second = job.weights
                progress.blend = dataclasses.replace(progress.blend, primary_weight=first, secondary_weight=second)
            if job.granularity == "row":
                # In the order of the spans, so that the sum's bits do not depend on who was first.
                columns = functools.reduce(torch.add, (part.columns for part in sums))
                progress.vector_weights = vector_weights(columns, job.t)
        simple = len(job.sources) == 2 and job.granularity == "tensor" and job.rows is None
        progress.check_finite = not simple or self.could_overflow(job, progress.blend, norms)

    @staticmethod
    def could_overflow(job: TensorJob, blend: Blend, norms: tuple[float, float]) -> bool:
        """No value exceeds its tensor's norm, so small norms rule out an overflow without a look at any value."""
        largest = abs(blend.primary_weight) * norms[0] + abs(blend.secondary_weight) * norms[1]
        return not largest < torch.finfo(torch_dtype(job.dtype)).max

    def finish(self, progress: TensorProgress) -> None:
        progress.finished = time.perf_counter()
        while self.in_order and self.in_order[0].finished:
            first = self.in_order.popleft()
            seconds = first.finished - first.started
            merged = first.known or TensorMerged(first.job, first.blend, seconds, first.non_finite)
            self.done.append(merged)
            self.observe(merged)
            first.writer.unfinished -= 1
            if not first.writer.unfinished:
                shard = first.writer.shard
                if first.known is None:
                    self.child.finish_file(shard.file_name, self.done[-len(shard.jobs) :])
                self.observe(ShardWritten(shard.file_name, shard.byte_count))


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Gives torch its own thread count back after the workers set it to one."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stream_merge(plan: MergePlan, child: StagedChild, observe: Observer) -> MergeResult:
    """Writes the child's weights into the staging folder, every tensor measured and blended in bounded memory.

    Raises SlerpMergeError where a parent cannot be read or the child cannot be written.
    """
    kept = len(child.journal.finished)
    if kept and plan.recipe.device == "auto":
        device, reason = child.journal.device, "where the finished files were made"
    else:
        device, reason = choose_device(plan.recipe.device, plan.threads)
    child.journal.device = device
    observe(DeviceChosen(device, reason))
    with torch_threads_kept():
        started = time.perf_counter()
        with WorkerTeam(device, plan.threads, plan.recipe.cast_dtype) as team:
            tensors = MergeStream(plan, child, team, observe).run()
        seconds = time.perf_counter() - started
    write_index(plan, child.folder)
    return MergeResult(tensors, seconds, device, kept)


def write_index(plan: MergePlan, folder: Path) -> None:
    """model.safetensors.index.json, where the child has more than one file."""
    if len(plan.shards) == 1:
        return
    index = {
        "metadata": {
            "total_parameters": sum(job.element_count for job in plan.jobs),
            "total_size": plan.child_bytes,
        },
        "weight_map": {job.name: shard.file_name for shard in plan.shards for job in shard.jobs},
    }
    write_json(folder / WEIGHTS_INDEX, index)


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §8  Inspection: how the parents differ, measured in one pass, nothing written
# ════════════════════════════════════════════════════════════════════════════════════════════════

MAP_NAME = "difference_map.svg"


def inspected_job(pair: TensorPair) -> TensorJob:
    """A pair as the workers measure it. The child's part of a job is not used."""
    sources = tuple(info for info in (pair.primary, pair.secondary, pair.base) if info is not None)
    return TensorJob(pair.name, pair.primary.dtype, pair.shape, "slerp", 0.5, sources, rows=pair.rows)


def measure_differences(pairs: Iterable[TensorPair], recipe: MergeRecipe, observe: Observer) -> DifferenceMap:
    """Angle and norms of every pair of tensors of real numbers, by the workers that a merge measures with.

    Of the recipe it follows the device, the threads, and dtype as the parents are rounded to. Reads each parent once.
    Raises SlerpMergeError where a parent cannot be read.
    """
    jobs = [inspected_job(pair) for pair in pairs if pair.secondary and pair.primary.is_float]
    jobs = sorted((job for job in jobs if job.element_count), key=lambda job: natural_order(job.name))
    threads = choose_threads(recipe.threads)
    device = "cpu" if recipe.device == "auto" else choose_device(recipe.device, threads)[0]
    observe(WorkBegan("Measuring how the parents differ", sum(map(read_bytes_of, jobs))))
    with torch_threads_kept(), WorkerTeam(device, threads, recipe.cast_dtype) as team:
        found = tuple(measured_in_order(jobs, team, 4 * threads, observe))
    observe(WorkEnded())
    return build_map(found, vectors_of(recipe))


def vectors_of(recipe: MergeRecipe) -> str:
    """What the angles of a recipe's merge lie between."""
    return "weights" if recipe.base is None else "task vectors"


def read_bytes_of(job: TensorJob) -> int:
    """Bytes of all the sources of a tensor."""
    return sum(info.byte_count for info in job.sources)


def measured_in_order(
    jobs: Sequence[TensorJob], team: WorkerTeam, spans_ahead: int, observe: Observer
) -> Iterator[TensorDifference]:
    """What differs in each tensor, one by one, while the team measures those behind it."""
    waiting = deque(
        TensorProgress(job, number, None, None, spans := cut_spans(job), [None] * len(spans), len(spans))
        for number, job in enumerate(jobs)
    )
    in_order: deque[TensorProgress] = deque()
    under_way = 0
    while waiting or in_order:
        while waiting and under_way < spans_ahead:
            in_order.append(progress := waiting.popleft())
            under_way += len(progress.spans)
            for number in range(len(progress.spans)):
                team.submit("measure", progress, number)
        progress, number, _, answer = team.next_answer()
        progress.sums[number] = answer
        progress.unfinished -= 1
        under_way -= 1
        observe(WorkAdvanced(read_bytes_of(progress.job) * len(progress.spans[number]) // progress.job.element_count))
        while in_order and not in_order[0].unfinished:
            done = in_order.popleft()
            dot, *norms = total_sums(done.sums)
            angle = degrees_of(cosine_between(dot, *norms))
            if angle is not None and all(part.identical for part in done.sums):
                angle = 0.0
            yield difference_of(done.job, angle, (norms[0], norms[1]))


def difference_of(job: TensorJob, degrees: float | None, norms: tuple[float, float] | None) -> TensorDifference:
    """What is known of a tensor; norms that are not finite are not known."""
    known = norms is not None and math.isfinite(sum(norms))
    return TensorDifference(job.name, job.element_count, degrees, norms if known else None)


def component_label(tensor_name: str) -> str:
    """The column of a tensor inside a layer: its name there without numbers, weight and bias; norms together."""
    stack, _ = find_layer(tensor_name)
    rest = tensor_name[len(stack) :].lstrip(".").split(".")[1:]
    parts = [part for part in rest if part not in ("weight", "bias") and not part.isdecimal()]
    if not parts or "norm" in parts[-1] or parts[-1].startswith("ln_"):
        return "norms" if parts else "itself"
    return ".".join(parts)


COLUMN_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as data flows


def column_place(component: str) -> tuple[int, int]:
    """Where a component's column stands: attention, MLP, others, norms last; the best known in their own order."""
    last = component.rpartition(".")[2]
    kind = ("attention", "mlp", "other").index(component_of(component)) + 2 * (component == "norms")
    return kind, COLUMN_ORDER.index(last) if last in COLUMN_ORDER else len(COLUMN_ORDER)


def short_labels(components: Sequence[str]) -> tuple[str, ...]:
    """Column headings as short as they can be told apart: q for self_attn.q_proj."""
    cut = [re.sub(r"_(proj|layer)$", "", name) for name in components]
    for parts in (1, 2, 3):
        short = [".".join(name.split(".")[-parts:]) for name in cut]
        if len(set(short)) == len(short):
            return tuple(short)
    return tuple(components)


def combine_differences(differences: Sequence[TensorDifference]) -> MapCell:
    """Several tensors as one vector: their dot products and squared norms add up."""
    known = [part for part in differences if part.norms is not None]
    if not known:
        return MapCell(None, None)
    norms = [math.sqrt(math.fsum(part.norms[side] ** 2 for part in known)) for side in (0, 1)]
    ratio = norms[1] / norms[0] if norms[0] else None
    if len(known) == 1:
        return MapCell(known[0].degrees, ratio)
    dot = math.fsum(math.prod(part.norms) * math.cos(math.radians(part.degrees or 0.0)) for part in known)
    return MapCell(degrees_of(cosine_between(dot, *norms)), ratio)


def build_map(differences: Sequence[TensorDifference], vectors: str) -> DifferenceMap:
    """The tensors by stack, layer and component."""
    by_place: dict[str, dict[int, dict[str, list[TensorDifference]]]] = {}
    outside = []
    for difference in differences:
        if (place := find_layer(difference.name)) is None:
            outside.append((difference.name.removesuffix(".weight"), combine_differences([difference])))
        else:
            layer = by_place.setdefault(place[0], {}).setdefault(place[1], {})
            layer.setdefault(component_label(difference.name), []).append(difference)
    grids = []
    for stack, layers in by_place.items():
        components = list(dict.fromkeys(name for layer in sorted(layers) for name in layers[layer]))
        components.sort(key=column_place)
        rows = tuple(
            (layer, tuple(combine_differences(layers[layer].get(name, ())) for name in components))
            for layer in sorted(layers)
        )
        grids.append(MapGrid(stack, short_labels(components), rows))
    return DifferenceMap(vectors, tuple(grids), tuple(outside), tuple(differences))


def map_of_merge(result: MergeResult, vectors: str) -> DifferenceMap:
    """The map that a merge measured on its way. Tensors that it copied without a look at both parents are blank."""
    return build_map(
        [
            difference_of(merged.job, merged.blend.angle_degrees, merged.blend.norms)
            for merged in result.tensors
            if merged.job.sources[0].is_float and merged.job.element_count
        ],
        vectors,
    )


def draw_map(found: DifferenceMap, title: str) -> str:
    """A map as an SVG picture: both scales side by side for each stack of layers, then what is outside them."""
    from xml.sax.saxutils import escape

    cell_width, cell_height, margin, gap = 54, 18, 64, 40
    parts: list[str] = []
    scales = map_scales(found)

    def text(x: float, y: float, words: str, style: str = "", ink: str = "#222") -> None:
        parts.append(f'<text x="{x:g}" y="{y:g}" fill="{ink}" {style}>{escape(printable(words))}</text>')

    def cell(x: float, y: float, scale: MapScale, content: MapCell, what: str) -> None:
        value = scale.value(content)
        colour = scale.colour(value) if value is not None else (245, 245, 245)
        shown = scale.text(value) if value is not None else "·"
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{cell_width - 1}" height="{cell_height - 1}" '
            f'fill="#{bytes(colour).hex()}"><title>{escape(printable(what))}: {shown}</title></rect>'
        )
        text(x + cell_width / 2, y + 13, shown, 'text-anchor="middle"', ink_on(colour))

    text(12, 24, title, 'font-size="15" font-weight="bold"')
    top, width = 44.0, 400.0
    for grid in found.grids:
        left = float(margin)
        for scale in scales:
            text(left, top + 12, f"{scale.title}: {scale.ends}", 'font-weight="bold"')
            for column, name in enumerate(grid.components):
                text(left + (column + 0.5) * cell_width, top + 30, shorten(name, 8), 'text-anchor="middle"')
            for row, (layer, cells) in enumerate(grid.rows):
                y = top + 36 + row * cell_height
                text(left - 6, y + 13, str(layer), 'text-anchor="end"')
                for column, content in enumerate(cells):
                    what = f"{grid.stack}.{layer} {grid.components[column]}"
                    cell(left + column * cell_width, y, scale, content, what)
            left += max(len(grid.components) * cell_width, 330) + gap
        width = max(width, left)
        top += 60 + len(grid.rows) * cell_height
    for name, content in found.outside:
        for place, scale in enumerate(scales):
            cell(margin + place * cell_width, top, scale, content, name)
        text(margin + 2 * cell_width + 8, top + 13, name)
        top += cell_height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{top + 16:g}" '
    head += 'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *parts, "</svg>", ""])


def save_map(found: DifferenceMap, path: Path, title: str) -> None:
    """Writes a map as a picture (.svg) or as figures (.json). Raises SlerpMergeError where the disk refuses."""
    if path.suffix.lower() == ".json":
        write_json(path, found.as_dict())
    else:
        write_text(path, draw_map(found, title))


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §9  Companions: tokenizer, config, report, model card
# ════════════════════════════════════════════════════════════════════════════════════════════════


def copy_companions(plan: MergePlan, child: StagedChild, result: MergeResult, observe: Observer) -> None:
    """Everything a model folder holds beside its weights, each file from the one parent it belongs to."""
    observe(CompanionCopied(write_child_config(plan, child.folder), "made"))
    for role, patterns in (
        (plan.tokenizer_role, TOKENIZER_FILES),
        (plan.template_role, TEMPLATE_FILES),
        ("primary", COMPANION_FILES),
    ):
        if role is not None:
            for name in copy_matching(plan.parent(role).folder, child.folder, patterns):
                observe(CompanionCopied(name, role))
    for name in adapt_tokenizer(plan, child.folder):
        observe(CompanionCopied(name, "made"))
    if (source := write_generation_config(plan, child.folder)) is not None:
        observe(CompanionCopied(GENERATION_NAME, source))
    write_text(child.folder / RECIPE_NAME, recipe_text(plan, child.target))
    observe(CompanionCopied(RECIPE_NAME, "made"))
    for name in write_report(plan, result, child.folder):
        observe(CompanionCopied(name, "made"))


def write_generation_config(plan: MergePlan, folder: Path) -> str | None:
    """generation_config.json; returns whose it is, or "made" where ids follow the other parent's tokenizer."""
    role = plan.template_role
    settings, _ = child_generation_config(plan.primary, plan.secondary, plan.parity.vocabulary, role)
    if not settings:
        return None
    for source in ("primary", "secondary"):
        path = plan.parent(source).folder / GENERATION_NAME
        if read_json_if_there(path) == settings:
            list(copy_matching(path.parent, folder, [GENERATION_NAME]))
            return source
    write_json(folder / GENERATION_NAME, settings)
    return "made"


def adapt_tokenizer(plan: MergePlan, folder: Path) -> Iterator[str]:
    """Puts the other parent's chat template and tokens into the donor's copied files; yields the names of those."""
    settings_path, more_path = folder / "tokenizer_config.json", folder / "added_tokens.json"
    settings = read_json_if_there(settings_path)
    before = dict(settings)
    if plan.template_role != plan.tokenizer_role:
        theirs = read_json_if_there(plan.parent(plan.template_role).folder / settings_path.name).get("chat_template")
        settings = {key: value for key, value in settings.items() if key != "chat_template"}
        settings |= {} if theirs is None else {"chat_template": theirs}
    appended = plan.parity.vocabulary.appended
    if appended:
        tokenizer = open_tokenizer(folder / "tokenizer.json")
        settle_tokenizer(tokenizer, folder)
        extend_tokenizer(tokenizer, [(token.content, token.flags) for token in appended])
        write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
        yield "tokenizer.json"
        if isinstance(settings.get("added_tokens_decoder"), dict):
            entries = {str(token.number): {"content": token.content, **dict(token.flags)} for token in appended}
            settings = {**settings, "added_tokens_decoder": {**settings["added_tokens_decoder"], **entries}}
        if more_path.is_file():
            write_json(more_path, {**read_json(more_path), **{token.content: token.number for token in appended}})
            yield more_path.name
    if settings != before:
        write_json(settings_path, settings)
        yield settings_path.name


def copy_matching(source: Path, target: Path, patterns: Sequence[str]) -> Iterator[str]:
    """Copies the files, and whole folders, that match; yields their names. Links are followed, as in a hub's cache."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            try:
                if path.is_dir():
                    shutil.copytree(path, target / path.name, copy_function=shutil.copyfile)
                else:
                    shutil.copyfile(path, target / path.name)
            except OSError as error:
                raise explain_os_error(error, path, "copy") from error
            yield path.name


def write_child_config(plan: MergePlan, folder: Path) -> str:
    """config.json: the primary's, key by key, with what is another in the child. Returns its name."""
    config = dict(plan.primary.config)
    vocabulary = plan.parity.vocabulary
    if vocabulary.role == "secondary":
        config = follow_tokens(config, plan.secondary.config, vocabulary, "primary")
    if plan.recipe.dtype != "auto":
        stated = [key for key in DTYPE_KEYS if key in config] or ["torch_dtype"]
        config.update(dict.fromkeys(stated, plan.recipe.dtype))
        for key, part in config.items():
            if isinstance(part, dict):  # a model inside a model states its own
                config[key] = {k: plan.recipe.dtype if k in DTYPE_KEYS else v for k, v in part.items()}
    rows = vocabulary.parent_rows[0]
    if rows != vocabulary.rows and not any("vocab_size" in scope for scope in language_scopes(config)):
        place = next((key for key in LANGUAGE_CONFIGS if isinstance(config.get(key), dict)), None)
        config |= {"vocab_size": rows} if place is None else {place: {**config[place], "vocab_size": rows}}
    config = with_value(config, "vocab_size", rows, vocabulary.rows)
    stated_tie, tie = is_tied(config), true_tie(plan.primary)
    if stated_tie is None and tie is not None:
        config["tie_word_embeddings"] = tie
    config = with_value(config, "tie_word_embeddings", stated_tie, tie)
    if plan.recipe.slices:
        config = with_depth(config, plan)
    write_json(folder / "config.json", config)
    return "config.json"


def with_value(config: Mapping[str, Any], key: str, before: Any, after: Any) -> dict[str, Any]:
    """A config with a value exchanged wherever it is stated, in models inside the model too."""
    changed = {
        k: with_value(part, key, before, after) if isinstance(part, dict) else part for k, part in config.items()
    }
    if key in changed and changed[key] == before and before is not None:
        changed[key] = after
    return changed


def true_tie(primary: Checkpoint) -> bool | None:
    """Whether the child's head is its embedding, as the weights tell; None where they do not.

    The config's word counts, unless it says tied and a head of another content is stored. Where it is silent, a
    single matrix with a row for each token must serve as both.
    """
    stated = is_tied(primary.config)
    matrices = token_matrices(primary)
    if stated is False or not matrices:
        return stated
    if own_heads(primary):
        return False
    if stated or any(key in primary.config for key in LANGUAGE_CONFIGS):
        return stated
    return True if len(matrices) == 1 + len(copies_of_embedding(primary)) else None


def recipe_text(plan: MergePlan, child: Path) -> str:
    """merge_recipe.yaml, in mergekit's syntax: --recipe makes the same bits of it again.

    Paths run from the child's folder. What mergekit's keys cannot say stands under `slerpmerge`.
    """
    import yaml

    recipe = plan.recipe
    parents = {"primary": plan.primary, "secondary": plan.secondary, "base": plan.base}
    places = {role: relative_place(parent.folder, child) for role, parent in parents.items() if parent is not None}
    method = "slerp"
    if recipe.method == "nuslerp" or recipe.base is not None:
        method = "nuslerp"
    elif recipe.method == "lerp":
        method = "linear"
    content: dict[str, Any] = {"merge_method": method}
    if method == "slerp":
        content["base_model"] = places["primary"]
    elif recipe.base is not None:
        content["base_model"] = places["base"]
    if recipe.slices:
        content["slices"] = [recipe_slice(part, places, method) for part in recipe.slices]
    else:
        whole = LayerSlice(0, 0, 0, recipe.schedule, recipe.weights)
        cut = recipe_slice(whole, places, method)
        content["models"] = [{k: v for k, v in source.items() if k != "layer_range"} for source in cut["sources"]]
        content.update({"parameters": cut["parameters"]} if "parameters" in cut else {})
    settings = {} if recipe.normalize else {"normalize": False}
    if recipe.granularity != "tensor":
        settings |= {"nuslerp_flatten": False, "nuslerp_row_wise": recipe.granularity == "row"}
    if settings:
        content["parameters"] = {**content.get("parameters", {}), **settings}
    if recipe.cast_dtype is not None:
        content["dtype"] = recipe.cast_dtype
    if recipe.dtype not in ("auto", recipe.cast_dtype):
        content["out_dtype"] = recipe.dtype
    if recipe.tokenizer != "auto":
        content["tokenizer_source"] = places.get(recipe.tokenizer, recipe.tokenizer)
    own: dict[str, Any] = {
        "version": __version__,
        "method": recipe.method,
        "dot_threshold": recipe.dot_threshold,
        "epsilon": recipe.epsilon,
        "extrapolate": recipe.extrapolate,
        "chat_template": recipe.chat_template,
    }
    if method != "slerp" and recipe.slices and recipe.slices[0].weights is None:
        own["slices_t"] = [recipe_rules(part.schedule) for part in recipe.slices]
    elif method != "slerp" and recipe.weights is None:
        own["t"] = recipe_rules(recipe.schedule)
    for role, parent in parents.items():
        if parent is not None:
            own[role] = {"name": parent.name, "headers": header_fingerprint(parent)}
    return yaml.safe_dump({**content, "slerpmerge": own}, sort_keys=False, allow_unicode=True)


def recipe_slice(part: LayerSlice, places: Mapping[str, str], method: str) -> dict[str, Any]:
    """One slice as a recipe writes it: slerp has its t, the others a weight for each model."""
    starts = {"primary": part.primary_start, "secondary": part.secondary_start}
    sources: list[dict[str, Any]] = [
        {"model": places[role], "layer_range": [start, start + part.length]} for role, start in starts.items()
    ]
    if method == "slerp":
        return {"sources": sources, "parameters": {"t": recipe_rules(part.schedule)}}
    rest = Schedule(tuple(ScheduleRule(tuple(1 - t for t in r.gradient), r.name_filter) for r in part.schedule.rules))
    for source, weight in zip(sources, part.weights or (rest, part.schedule)):
        source["parameters"] = {"weight": recipe_rules(weight)}
    if "base" in places:
        start = part.primary_start if part.base_start is None else part.base_start
        sources.append({"model": places["base"], "layer_range": [start, start + part.length]})
    return {"sources": sources}


def recipe_rules(schedule: Schedule) -> Any:
    """A schedule as mergekit writes it: a number, a list, or filters with their values."""
    values = [list(rule.gradient) if len(rule.gradient) > 1 else rule.gradient[0] for rule in schedule.rules]
    if len(values) == 1 and schedule.rules[0].name_filter == "*":
        return values[0]
    return [
        {"value": value} if rule.name_filter == "*" else {"filter": rule.name_filter, "value": value}
        for rule, value in zip(schedule.rules, values)
    ]


def relative_place(folder: Path, child: Path) -> str:
    """A parent's path from the child's folder; its own where the two stand on different drives."""
    try:
        place = Path(os.path.relpath(folder.resolve(), child)).as_posix()
    except ValueError:
        place = str(folder.resolve())
    return place


def header_fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over every tensor's name, dtype and shape, whatever the shards."""
    import hashlib

    table = sorted((info.name, info.dtype, list(info.shape)) for info in checkpoint.tensors.values())
    return "sha256:" + hashlib.sha256(json.dumps(table).encode("utf-8")).hexdigest()


def with_depth(config: dict[str, Any], plan: MergePlan) -> dict[str, Any]:
    """The config of a child of another depth: the number of layers, and lists with an entry for each layer."""
    layers = [part.primary_start + step for part in plan.recipe.slices for step in range(part.length)]
    depth = stated_depth(config)
    changed = dict(config)
    for key, value in config.items():
        if DEPTH_KEY.search(key) and value == depth:
            changed[key] = len(layers)
        elif isinstance(value, list) and key.endswith("_only_layers"):  # numbers of layers, not an entry for each
            changed[key] = [number for number, layer in enumerate(layers) if layer in value]
        elif isinstance(value, list) and len(value) == depth and "layer" in key:
            changed[key] = [value[layer] for layer in layers]
        elif isinstance(value, dict) and key == "text_config":
            changed[key] = with_depth(value, plan)
    return changed


# ── §9b  The report that stays with the child, and the card that is made from it ────────────────

MEASURED_BY_MERGE = "v0 . v1 / (|v0| |v1|) over every element of a tensor, in float32 by chunks, added up exactly"


def lasting_report(plan: MergePlan, result: MergeResult, found: DifferenceMap) -> dict[str, Any]:
    """merge_report.json: how the child was made and what was found, with names and no local paths, times or machines.

    What is measured of the child afterwards joins it: "checks", "tastes", "perplexities", "scores", "sweep".
    """
    recipe, parity = plan.recipe, plan.parity
    parents = {"primary": plan.primary, "secondary": plan.secondary, "base": plan.base}
    return {
        "slerpmerge": __version__,
        "child": recipe.save_directory.resolve().name,
        "recipe": {
            **{role: None if parent is None else parent.name for role, parent in parents.items()},
            "method": recipe.method,
            "granularity": recipe.granularity,
            "blend": recipe.describe_blend(),
            "dtype": recipe.dtype if recipe.dtype != "auto" else f"{', '.join(plan.primary.dtypes)} (the primary's)",
            "dot_threshold": recipe.dot_threshold,
            "epsilon": recipe.epsilon,
            "tokenizer_from": plan.tokenizer_role,
            "chat_template_from": plan.template_role,
        },
        "kinship": plan.kinship.as_dict(),
        "parity": {kind: [dataclasses.asdict(m) for m in parity.of_severity(kind)] for kind in ("mended", "notice")},
        "vocabulary": parity.vocabulary.as_dict(),
        "rules": rules_followed(result),
        "angles": {"measured": MEASURED_BY_MERGE, **found.as_dict()},
    }


def rules_followed(result: MergeResult) -> list[dict[str, Any]]:
    """How many tensors were slerped, lerped and copied, why, and the angles between the parents there."""
    groups: dict[tuple[str, str], list[TensorMerged]] = {}
    for merged in result.tensors:
        groups.setdefault((merged.blend.rule, merged.blend.reason), []).append(merged)
    found = []
    for (rule, reason), members in sorted(groups.items(), key=lambda group: -len(group[1])):
        angles = [merged.blend.angle_degrees for merged in members if merged.blend.angle_degrees is not None]
        found.append(
            {
                "rule": f"{rule} ({reason})" if reason else rule,
                "tensors": len(members),
                "parameters": sum(merged.job.element_count for merged in members),
                "degrees": [min(angles), max(angles)] if angles else None,
            }
        )
    return found


def write_report(plan: MergePlan, result: MergeResult, folder: Path) -> Iterator[str]:
    """The report, its map and the child's card; yields their names."""
    found = map_of_merge(result, vectors_of(plan.recipe))
    report = lasting_report(plan, result, found)
    save_map(found, folder / MAP_NAME, f"{plan.primary.name} and {plan.secondary.name}")
    yield MAP_NAME
    write_json(folder / REPORT_NAME, report)
    yield REPORT_NAME
    write_text(folder / CARD_NAME, card_front(report) + card_block(report))
    yield CARD_NAME


def amend_report(folder: Path, changes: Mapping[str, Any]) -> None:
    """Adds what was found of a child to its report and card. Lists grow; of the card only the tool's own part changes.

    Raises SlerpMergeError where the disk refuses; the files are then as before.
    """
    report, card = read_json_if_there(folder / REPORT_NAME), ""
    path = folder / CARD_NAME
    try:
        for key, value in changes.items():
            report[key] = [*report.get(key, []), *value] if isinstance(value, list) else value
        block = card_block(report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{folder / REPORT_NAME} is not as slerpmerge writes it."
        raise SlerpMergeError(what, "Move it away; a new one is then begun.") from error
    if path.exists():  # bytes that are not UTF-8 stay what they are
        card = read_bytes(path).decode("utf-8", "surrogateescape")
    begin = card.find(CARD_MARKS[0])
    end = card.find(CARD_MARKS[1], begin)
    if 0 <= begin < end:
        card = card[:begin] + block.rstrip("\n") + card[end + len(CARD_MARKS[1]) :]
    else:
        card = card.rstrip("\n") + "\n\n" * bool(card) + block
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    replace_files(
        {folder / REPORT_NAME: text.encode("utf-8", "backslashreplace"), path: card.encode("utf-8", "surrogateescape")}
    )


CARD_MARKS = ("<!-- made by slerpmerge from merge_report.json -->", "<!-- until here -->")


def card_front(report: Mapping[str, Any]) -> str:
    """What hubs read of a card, and its title: the part that is the person's to change."""
    recipe = report["recipe"]
    names = [recipe["primary"], recipe["secondary"]]
    front = ["---", "base_model:", *(f"- {json.dumps(name, ensure_ascii=False)}" for name in names)]
    front += ["library_name: transformers", "tags:", "- merge", "- slerp", "---", "", f"# {report['child']}", ""]
    front += [
        f"A merge of **{names[0]}** and **{names[1]}** by spherical linear interpolation,",
        f"made with slerpmerge {report['slerpmerge']}.",
        "",
    ]
    return "\n".join(front) + "\n"


def card_block(report: Mapping[str, Any]) -> str:
    """The part of a card that tells what the report tells, between two marks."""
    parts = [CARD_MARKS[0], ""]
    for section in (card_recipe, card_rules, card_mended, card_sweep, card_perplexities, card_scores, card_tastes):
        lines = section(report)
        parts += [*lines, ""] if lines else []
    return "\n".join([*parts, CARD_MARKS[1], ""])


def card_recipe(report: Mapping[str, Any]) -> list[str]:
    """What the person decided. Names, never local paths."""
    recipe = report.get("recipe")
    if recipe is None:
        return []
    settings = [
        ("primary (t = 0)", recipe["primary"]),
        ("secondary (t = 1)", recipe["secondary"]),
        *([("base of the task vectors", recipe["base"])] if recipe["base"] is not None else []),
        ("method", recipe["method"]),
        ("blend", recipe["blend"]),
        ("dtype", recipe["dtype"]),
        ("dot threshold", f"{recipe['dot_threshold']:g}"),
        ("epsilon", f"{recipe['epsilon']:g}"),
        ("tokenizer from", recipe["tokenizer_from"] or "neither"),
        *(
            [("chat template from", recipe["chat_template_from"])]
            if recipe["chat_template_from"] != recipe["tokenizer_from"]
            else []
        ),
    ]
    return ["## Recipe", "", *markdown_table(("setting", "value"), settings)]


def card_rules(report: Mapping[str, Any]) -> list[str]:
    """What was done with the tensors, and the map of how the parents differ."""
    if "rules" not in report:
        return []
    rows = []
    for entry in report["rules"]:
        degrees = entry["degrees"]
        angles = f"{degrees[0]:.2f}° to {degrees[1]:.2f}°" if degrees else ""
        rows.append((entry["rule"], str(entry["tensors"]), format_count(entry["parameters"]), angles))
    table = markdown_table(("rule", "tensors", "parameters", "angle between the parents"), rows)
    picture = f"![How the parents differ, layer by component]({MAP_NAME})"
    return ["## What was done", "", *table, "", picture]


def card_mended(report: Mapping[str, Any]) -> list[str]:
    """The differences that a stated rule resolved."""
    mended = report.get("parity", {}).get("mended", [])
    lines = [f"- `{table_cell(entry['subject'])}`: {table_cell(entry['consequence'])}" for entry in mended]
    return ["## What was mended", "", *lines] if lines else []


def card_sweep(report: Mapping[str, Any]) -> list[str]:
    """The curve by which t was found."""
    sweep = report.get("sweep")
    if not sweep:
        return []
    names = sweep["names"]
    rows = []
    for trial in sweep["trials"]:
        noise = "" if trial["noise"] is None else f" ± {trial['noise']:.4f}"
        figures = [f"{value:.4f}" for value in trial["values"]]
        label = f"{trial['t']:g}" + (f" ({trial['role']})" if trial["role"] != "child" else "")
        label = f"**{label}**" if trial["t"] == sweep["best_t"] and trial["role"] == "child" else label
        rows.append((label, *figures, f"{trial['over_best']:+.4f}{noise}"))
    heads = ("t", *(f"{name} ({sweep['unit']})" for name in names), "mean loss over the best's")
    return ["## How t was found", "", sweep["measured"], "", *markdown_table(heads, rows), "", sweep["verdict"]]


def card_perplexities(report: Mapping[str, Any]) -> list[str]:
    """Parents and child on the same texts."""
    lines: list[str] = []
    for entry in report.get("perplexities", []):
        rows = [
            (
                model["role"],
                str(model["tokens"]),
                f"{model['perplexity']:.4f}",
                f"{model['bits_per_byte']:.4f}" + (f" ± {model['noise']:.4f}" if model["noise"] is not None else ""),
            )
            for model in entry["models"]
        ]
        table = markdown_table(("model", "tokens", "perplexity", "bits per byte"), rows)
        lines += ["", f"On {table_cell(entry['text'])}. {entry['measured']}", "", *table]
    return ["## Perplexity", *lines] if lines else []


def card_scores(report: Mapping[str, Any]) -> list[str]:
    """Parents and child on the harness's tasks."""
    lines: list[str] = []
    for entry in report.get("scores", []):
        rows = [
            (
                row["task"],
                row["metric"],
                *(f"{value:.4f} ± {error:.4f}" if error is not None else f"{value:.4f}" for value, error in figures),
                *(row["verdicts"]),
            )
            for row in entry["rows"]
            for figures in [[row["figures"][role] for role in ("primary", "secondary", "child")]]
        ]
        heads = ("task", "metric", "primary", "secondary", "child", "child against primary", "child against secondary")
        lines += ["", entry["measured"], "", *markdown_table(heads, rows)]
    return ["## Scores", *lines] if lines else []


def card_tastes(report: Mapping[str, Any]) -> list[str]:
    """What parents and child answered to the same prompts."""
    lines: list[str] = []
    for entry in report.get("tastes", []):
        rows = [(role, answer) for role, answer in entry["answers"].items()]
        lines += ["", f"> {table_cell(entry['prompt'])}", "", *markdown_table(("model", "answer"), rows)]
        lines += ["", entry["measured"]]
    return ["## Tastes", *lines] if lines else []


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(map(table_cell, heads)) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(map(table_cell, row)) + " |" for row in rows]


def table_cell(text: str) -> str:
    """Text that cannot break out of a Markdown table's cell, nor be taken for a mark of the card."""
    text = text.replace("\\", "\\\\").replace("|", "\\|").replace("<!--", "&lt;!--")
    return text.replace("\r", "").replace("\n", "<br>")


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §10  Verified child
# ════════════════════════════════════════════════════════════════════════════════════════════════

RECOMPUTED_TENSORS = 4  # recomputed whole, in float64, straight from the parents
RECOMPUTED_ELEMENTS = 1 << 20  # none larger than this, so that the check stays cheap
STRETCH_ELEMENTS = 1 << 16  # held in float64 at once, a dozen times over
SPOT_CHECKS = 256  # tensors of which a stretch is recomputed
SPOT_ELEMENTS = 512  # elements of such a stretch


def wrong_child(reason: str) -> SlerpMergeError:
    """The error for a child that is not what was planned."""
    return SlerpMergeError(
        f"The child did not pass its own check: {reason}.",
        "Nothing was saved. Run the merge again; if it fails the same way, the disk or memory may be faulty.",
    )


def verify_child(plan: MergePlan, child: StagedChild, result: MergeResult, observe: Observer) -> ChildVerified:
    """Reads the finished child back and holds it against plan, parents and tokenizer. Cheap; no transformers.

    Raises SlerpMergeError where the child is not what was planned. What only may be wrong is a warning.
    """
    try:
        verify_headers(plan, child.folder)
        recomputed, spots = verify_values(plan, child.folder, result)
    except SlerpMergeError:
        child.distrust()
        raise
    checks = [
        f"{len(result.tensors)} tensors stand under the primary's names and shapes",
        f"{recomputed} tensors recomputed whole and {spots} in part from the parents, all equal",
    ]
    warnings = [
        f"{merged.job.name}: {merged.non_finite} values are infinite or not a number"
        for merged in result.tensors
        if merged.non_finite
    ]
    warnings += [
        f"{merged.job.name}: the parents' {TORCH_NAMES[merged.job.dtype]} values differ; the primary's are kept"
        for merged in result.tensors
        if merged.blend.reason.startswith("differs")
    ]
    if not any(merged.non_finite for merged in result.tensors):
        checks.append("no infinite value and none that is not a number")
    tokens, warning = compare_tokenizer_with_rows(plan, child.folder)
    checks += [tokens] if tokens else []
    warnings += [warning] if warning else []
    warnings += ids_without_rows(plan, child.folder)
    verified = ChildVerified(tuple(checks), tuple(warnings))
    observe(verified)
    return verified


def verify_headers(plan: MergePlan, folder: Path) -> None:
    """Every file's header, as written, against the plan; every name and shape against the primary's."""
    found: dict[str, TensorInfo] = {}
    for shard in plan.shards:
        try:
            found.update(read_header(folder / shard.file_name))
        except SlerpMergeError as error:
            raise wrong_child(error.message.rstrip(".")) from error
        for job in shard.jobs:
            info = found.get(job.name)
            if info is None or (info.dtype, info.shape, info.offset) != (job.dtype, job.shape, job.offset):
                raise wrong_child(f"{shard.file_name} does not hold {job.name} as planned")
    for pair in plan.parity.pairs:
        if pair.name not in found or found[pair.name].shape != pair.shape:
            raise wrong_child(f"the primary's tensor {pair.name} is not in it with its shape")


def verify_values(plan: MergePlan, folder: Path, result: MergeResult) -> tuple[int, int]:
    """Recomputes a sample of the child in float64 from the parents' bytes. Returns (whole tensors, stretches)."""
    places = {job.name: folder / shard.file_name for shard in plan.shards for job in shard.jobs}
    reader = TensorReader(handles := FileHandles())
    filled = [merged for merged in result.tensors if merged.job.element_count]
    blended = [m for m in filled if m.blend.rule != "copy" and m.job.element_count <= RECOMPUTED_ELEMENTS]
    blended.sort(key=lambda merged: -merged.job.element_count)
    whole = blended[:: max(1, len(blended) // RECOMPUTED_TENSORS)][:RECOMPUTED_TENSORS]
    spots = [merged for merged in filled if merged.job.granularity == "tensor" or merged.blend.rule == "copy"]
    spots = spots[:: max(1, -(-len(spots) // SPOT_CHECKS))]
    try:
        for merged in whole:
            weights = recompute_weights(plan.recipe, merged, reader)
            for stretch in cut_stretches(merged.job):
                verify_stretch(merged, weights, stretch, places[merged.job.name], reader, plan.recipe)
        for merged in spots:
            weights = merged.blend.primary_weight, merged.blend.secondary_weight
            verify_stretch(merged, weights, middle_stretch(merged.job), places[merged.job.name], reader, plan.recipe)
    finally:
        handles.close()
    return len(whole), len(spots)


def read_stretch(
    reader: TensorReader, info: TensorInfo, stretch: range, rows: numpy.ndarray | None = None
) -> torch.Tensor:
    """Elements of a tensor, flat, in float64; or those of some of its rows, in their order, and zeros for a row -1."""
    width = DTYPE_BYTES[info.dtype]
    data = bytearray(len(stretch) * width)
    if rows is None:
        reader.read_into(info, stretch.start * width, memoryview(data))
    else:
        reader.read_rows(info, rows, memoryview(data))
    return torch.frombuffer(data, dtype=torch_dtype(info.dtype)).double()


def read_sources(
    job: TensorJob, stretch: range, reader: TensorReader, recipe: MergeRecipe, blended: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([v0, v1] or the copied one, base or zeros) of a stretch, in float64; task vectors where there is a base.

    blended: zeros stand for rows that are kept.
    """
    rows: Sequence[Any] = [None] * len(job.sources)
    if job.rows is not None:
        maps = job.rows.blended if blended else job.rows.sources
        rows = [part[rows_in(job, stretch)] for part in maps]
    parts = [read_stretch(reader, info, stretch, part) for info, part in zip(job.sources, rows)]
    if recipe.cast_dtype is not None and job.sources[0].is_float:
        parts = [part.to(getattr(torch, recipe.cast_dtype)).double() for part in parts]
    if len(parts) == 3:
        return [parts[0] - parts[2], parts[1] - parts[2]], parts[2]
    return parts, torch.zeros_like(parts[0])


def whole_row(job: TensorJob) -> int:
    """Elements that a stretch of a tensor cannot be cut within."""
    return 1 if job.granularity == "tensor" and job.rows is None else matrix_width(job)


def cut_stretches(job: TensorJob) -> Iterator[range]:
    """All of a tensor, piece by piece; whole rows where they count."""
    step = max(1, STRETCH_ELEMENTS // whole_row(job)) * whole_row(job)
    for start in range(0, job.element_count, step):
        yield range(start, min(start + step, job.element_count))


def middle_stretch(job: TensorJob) -> range:
    """A few elements from the middle of a tensor; whole rows where they count."""
    row = whole_row(job)
    length = min(max(1, SPOT_ELEMENTS // row) * row, job.element_count)
    start = (job.element_count - length) // 2 // row * row
    return range(start, start + length)


def shares_at(weights: Sequence[Any], job: TensorJob, stretch: range) -> list[Any]:
    """Both parents' weights over a stretch: a number, or one for each element where vectors or rows have their own."""
    shares = [spread(weight, job, stretch) for weight in weights]
    if job.rows is None:
        return shares
    rows = rows_in(job, stretch)
    kept = [torch.from_numpy(job.rows.is_kept(side)[rows]).repeat_interleave(job.row_elements) for side in (0, 1)]
    for side in (0, 1):
        share = torch.as_tensor(shares[side], dtype=torch.float64).expand(len(stretch))
        shares[side] = torch.where(kept[side], 1.0, torch.where(kept[1 - side], 0.0, share))
    return shares


def spread(weight: Any, job: TensorJob, stretch: range) -> Any:
    """A weight for each element of a stretch, from one for each row or column; a number stays one."""
    if not torch.is_tensor(weight):
        return weight
    width = matrix_width(job)
    if job.granularity == "row":
        return weight.repeat(len(stretch) // width)
    return weight[stretch.start // width : stretch.stop // width].repeat_interleave(width)


def recompute_weights(recipe: MergeRecipe, merged: TensorMerged, reader: TensorReader) -> tuple[Any, Any]:
    """A tensor's weights again, from float64 sums over all of both parents; or those of each of its vectors."""
    job = merged.job
    if job.weights is not None:
        return job.weights
    if job.granularity != "tensor":
        axis = 0 if job.granularity == "row" else 1
        parts = []
        for stretch in cut_stretches(job):
            v0, v1 = (part.view(-1, matrix_width(job)) for part in read_sources(job, stretch, reader, recipe, True)[0])
            parts.append(torch.stack([(a * b).sum(axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))]))
        return vector_weights(torch.cat(parts, dim=1) if axis else torch.stack(parts).sum(0), job.t)
    totals = [0.0, 0.0, 0.0]
    for stretch in cut_stretches(job):
        v0, v1 = read_sources(job, stretch, reader, recipe, blended=True)[0]
        for place, (a, b) in enumerate(((v0, v0), (v1, v1), (v0, v1))):
            totals[place] += float(torch.dot(a, b))
    method = "lerp" if job.rule == "lerp" else recipe.method
    norms = math.sqrt(totals[0]), math.sqrt(totals[1])
    blend = slerp_coefficients(totals[2], *norms, job.t, method, recipe.dot_threshold, recipe.epsilon)
    # At the very threshold float32 sums may fall on the other side than float64 ones; both are right.
    used = blend if blend.rule == merged.blend.rule else merged.blend
    return used.primary_weight, used.secondary_weight


def verify_stretch(
    merged: TensorMerged,
    weights: Sequence[Any],
    stretch: range,
    path: Path,
    reader: TensorReader,
    recipe: MergeRecipe,
) -> None:
    """Holds a stretch of the child against its parents: equal but for the rounding to the child's dtype."""
    job = merged.job
    parts, base = read_sources(job, stretch, reader, recipe)
    terms = [parts[0]]
    if merged.blend.rule != "copy" or job.rows is not None:
        terms = [share * part for share, part in zip(shares_at(weights, job, stretch), parts)] + [base]
    stored = read_stretch(reader, TensorInfo(job.name, job.dtype, job.shape, path, job.offset, job.byte_count), stretch)
    if not job.sources[0].is_float:
        if not torch.equal(parts[0], stored):
            raise wrong_child(f"{job.name} differs from the primary's")
        return
    roundings = [torch_dtype(job.dtype)] + ([getattr(torch, recipe.cast_dtype)] if recipe.cast_dtype else [])
    limits = [torch.finfo(dtype) for dtype in roundings]
    expected = sum(terms)
    # Half a unit of the last place for each rounding, and what float32 sums and products may lose before it.
    allowed = sum(0.5 * limit.eps * expected.abs() + limit.smallest_normal for limit in limits)
    lost = 1e-12 if MergeWorker.working_dtype(job) == torch.float64 else 2e-6
    allowed = allowed + lost * sum(term.abs() for term in terms)
    close = (stored - expected).abs() <= allowed * 1.01  # false where either is not a number
    off = ~close & (expected.abs() <= min(limit.max for limit in limits))
    if bool(off.any()):
        raise wrong_child(f"{job.name} differs from what its parents make")


def compare_tokenizer_with_rows(plan: MergePlan, folder: Path) -> tuple[str | None, str | None]:
    """(what was found right, what may be wrong) of the child's tokenizer beside its embedding."""
    path, rows = folder / "tokenizer.json", plan.parity.vocabulary.rows
    if not path.is_file() or rows is None:
        return None, None
    try:
        ids = open_tokenizer(path).get_vocab(with_added_tokens=True).values()
    except SlerpMergeError as error:
        return None, error.message.replace(str(path), path.name)
    highest = max(ids, default=-1)
    if len(set(ids)) < len(ids):
        return None, f"the tokenizer gives {len(ids) - len(set(ids))} of its tokens the id of another"
    if highest >= rows:
        return None, f"the tokenizer knows the id {highest}, but the embedding has only {rows} rows"
    return f"every token id (up to {highest}) has its row among {rows}", None


def ids_without_rows(plan: MergePlan, folder: Path) -> list[str]:
    """Warnings of the ids in config.json, such as eos_token_id, that the embedding has no row for."""
    vocabulary = plan.parity.vocabulary
    warnings = []
    for key, value in stated_ids(read_json(folder / "config.json")).items():
        ids = value if isinstance(value, list) else [value]
        if any(type(n) is int and n >= 0 and not has_row(n, vocabulary) for n in ids):
            rows = vocabulary.rows
            warnings.append(f"config.json: {key} is {shorten(value)}, the embedding has only {rows} rows")
    return warnings


def quiet_transformers() -> Any:
    """The transformers package, with no bars and warnings of its own on the screen."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def find_architecture(checkpoint: Checkpoint) -> Any:
    """The class of transformers that a checkpoint's config names. Raises SlerpMergeError where it has none."""
    transformers = quiet_transformers()
    architecture = getattr(transformers, checkpoint.architecture, None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise SlerpMergeError(
            f"transformers {transformers.__version__} has no {checkpoint.architecture}; {checkpoint.name} was not "
            "loaded.",
            "It needs code of its own, which is never run here, or a newer transformers.",
        )
    return architecture


def verify_with_transformers(folder: Path) -> tuple[str, ...]:
    """Loads a child as transformers would and returns what was found right, in words.

    The class that config.json names is built without memory for weights (on the meta device), and its
    own loading is given stand-ins of the child's names, shapes and dtypes: each one number, spread out.
    Raises SlerpMergeError where a key is missing, unexpected or of another shape, or the tokenizer fails.
    """
    transformers = quiet_transformers()
    checkpoint = open_checkpoint(folder)
    architecture = find_architecture(checkpoint)
    found = loading_report(transformers, architecture, checkpoint)
    faults = {kind: sorted(map(str, found[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, names in faults.items():
        if names:
            raise SlerpMergeError(
                f"{checkpoint.architecture} loads the child with {kind.replace('_', ' ')}: {format_names(names)}.",
                "Load the primary the same way: if it shows the same, the fault is its own.",
            )
    checks = [f"{checkpoint.architecture} loads it with no missing, unexpected or mismatched key"]
    if has_tokenizer(folder):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise SlerpMergeError(
                f"transformers cannot load the child's tokenizer: {error}",
                "Load the donor's tokenizer the same way: if it shows the same, the fault is its own.",
            ) from error
        checks.append(f"its tokenizer loads with {len(tokenizer)} tokens")
    return tuple(checks)


def lost_on_meta(model: Any, checkpoint: Checkpoint) -> set[str]:
    """Keys that older versions forget to call missing: on the meta device all weights look tied to each other."""
    if not all(parameter.is_meta for parameter in model.parameters()):
        return set()
    tied = set(model._tied_weights_keys or ()) if getattr(model.config, "tie_word_embeddings", False) else set()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    lost = set(model.state_dict()) - set(checkpoint.tensors) - tied
    return {name for name in lost if not any(pattern.search(name) for pattern in ignored)}


def loading_report(transformers: Any, architecture: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """transformers' own account of which keys it missed, did not expect, or found of another shape."""
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SlerpMergeError(
            f"transformers {transformers.__version__} cannot read the child's config.json: {error}",
            "Load the primary the same way: if it shows the same, the fault is its own, or transformers is too old.",
        ) from error
    # Older versions build on the meta device only when told so; newer ones do it themselves and refuse to be told.
    for context in (torch.device("meta"), contextlib.nullcontext()):
        stand_ins = {
            info.name: torch.zeros((), dtype=torch_dtype(info.dtype), device="cpu").expand(info.shape)
            for info in checkpoint.tensors.values()
        }
        try:
            with context, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that weights on the meta device hold nothing is the point
                model, report = architecture.from_pretrained(
                    None, config=config, state_dict=stand_ins, output_loading_info=True, ignore_mismatched_sizes=True
                )
            return {**report, "missing_keys": {*report["missing_keys"], *lost_on_meta(model, checkpoint)}}
        except RuntimeError:
            if isinstance(context, contextlib.nullcontext):
                raise
    raise AssertionError("unreachable: the last context returns or raises")


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §11  The story
# ════════════════════════════════════════════════════════════════════════════════════════════════


def open_parents(
    recipe: MergeRecipe, observe: Observer
) -> tuple[Checkpoint, Checkpoint, Checkpoint | None, ParityReport]:
    """(primary, secondary, base, parity). Raises SlerpMergeError where they cannot make a right child."""
    primary = open_checkpoint(recipe.primary)
    observe(ParentOpened("primary", primary))
    secondary = open_checkpoint(recipe.secondary)
    observe(ParentOpened("secondary", secondary))
    base = None if recipe.base is None else open_checkpoint(recipe.base)
    if base is not None:
        observe(ParentOpened("base", base))
    parity = check_parity(primary, secondary, recipe.dtype, recipe.slices, base, recipe.tokenizer, recipe.chat_template)
    observe(ParityChecked(parity))
    parity.raise_if_blocking()
    return primary, secondary, base, parity


def inspect_parents(recipe: MergeRecipe, observe: Observer) -> DifferenceMap:
    """How the parents of a recipe differ. Reads each of them once and writes nothing.

    Raises SlerpMergeError where a parent, or their parity, forbids it.
    """
    *_, parity = open_parents(recipe, observe)
    return measure_differences(parity.pairs, recipe, observe)


def prepare_merge(recipe: MergeRecipe, observe: Observer) -> MergePlan:
    """Looks at both parents and decides everything. Reads headers and a few MB to time it; writes nothing.

    Raises SlerpMergeError where the recipe, a parent, their parity, the save directory or the disk forbids it.
    """
    check_recipe(recipe)
    primary, secondary, base, parity = open_parents(recipe, observe)
    plan = plan_merge(recipe, primary, secondary, parity, base)
    plan = dataclasses.replace(plan, remarks=(*plan.remarks, *leftover_remarks(plan)))
    observe(PlanReady(plan))
    return plan


def execute_merge(plan: MergePlan, observe: Observer) -> MergeReport:
    """Makes the planned child. It appears under its name whole and checked, or not at all.

    Raises SlerpMergeError where the world does not let it; parents and save directory are then as before.
    """
    started = time.perf_counter()
    with StagedChild(plan, observe) as child:
        result = stream_merge(plan, child, observe)
        copy_companions(plan, child, result, observe)
        verified = verify_child(plan, child, result, observe)
        warnings = (plan.kinship.warning,) if plan.kinship.warning else ()
        warnings += verified.warnings
        amend_report(child.folder, {"checks": list(verified.checks), "warnings": list(warnings)})
        sync_seconds = child.sync()
        check_parents_unchanged(plan, child)
    total_seconds = time.perf_counter() - started
    return MergeReport(child.target, plan, result, verified.checks, warnings, sync_seconds, total_seconds)


# ── §11b  Demo parents: two tiny real models, made on the spot ──────────────────────────────────

DEMO_TOPICS = {
    "demo-sailor": "the sea is wide and the {} sails over the {} waves until the {} wind sleeps . ",
    "demo-gardener": "the garden is warm and the {} grows under the {} leaves until the {} rain falls . ",
}
DEMO_WORDS = ("small", "old", "quiet", "green", "bright", "slow", "happy", "silver")
DEMO_PROMPT = "the"


def demo_text(topic: str, lines: int, seed: int) -> str:
    """Sentences on one topic, the same for the same seed."""
    import random

    chooser = random.Random(seed)
    return "".join(DEMO_TOPICS[topic].format(*chooser.choices(DEMO_WORDS, k=3)) for _ in range(lines))


def make_demo_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 384 entries, trained on the demo's own sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([demo_text(topic, 50, 0) for topic in DEMO_TOPICS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def teach_demo_model(model: Any, tokens: torch.Tensor, steps: int, seed: int) -> None:
    """A few steps of AdamW on windows of 32 tokens."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - 33, (16,), generator=generator)
        batch = torch.stack([tokens[start : start + 32] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_demo_parents(folder: Path) -> tuple[Path, Path]:
    """Trains a tiny Llama on two topics, then one copy of it on each. Returns their folders. Some seconds."""
    import copy

    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    tokenizer = make_demo_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    base = LlamaForCausalLM(config)
    texts = {topic: torch.tensor(tokenizer(demo_text(topic, 120, 1))["input_ids"]) for topic in DEMO_TOPICS}
    teach_demo_model(base, torch.cat(list(texts.values())), steps=50, seed=2)
    folders = []
    for topic, tokens in texts.items():
        parent = copy.deepcopy(base)
        teach_demo_model(parent, tokens, steps=25, seed=3)
        parent.to(torch.bfloat16).save_pretrained(folder / topic)
        tokenizer.save_pretrained(folder / topic)
        folders.append(folder / topic)
    return folders[0], folders[1]


def generate_text(folder: Path, prompt: str, new_tokens: int = 24) -> str:
    """What the model of a folder says after `prompt`, greedily, on the processor."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §12  Judgement: what parents and child say and know
# ════════════════════════════════════════════════════════════════════════════════════════════════
#
# Every finding is an entry of merge_report.json, a plain dictionary, from which screen and card are drawn.

WINDOW_TOKENS = 1024  # of context at most; half of them are new in each step
TASTE_TOKENS = 120  # of an answer, at most
WORKING_BYTES = 1_200_000_000  # beside a model's weights: a window's logits over a large vocabulary, and libraries
# Heads over encoders; older versions of transformers say of some of them that they can generate.
READER_NAME = re.compile(r"For(MaskedLM|(\w+)?Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)$")
LOGIT_ROWS = 256  # turned into float32 at once
MOST_NATS = 700  # a token, beyond which a perplexity is no number any more
SMALL_MODEL_PARAMETERS = 5_000_000  # below this torch's threads only wait for each other


@dataclass(frozen=True)
class Lineup:
    """The models that are held against each other, in the order in which they are shown."""

    folders: tuple[tuple[str, Path], ...]  # (role, folder)
    device: str = "auto"  # as MergeRecipe.device

    @functools.cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        return {role: open_checkpoint(folder) for role, folder in self.folders}

    def tokenizer_folder(self, role: str) -> Path:
        """A model's own tokenizer, or that of another model here where it stands as weights alone."""
        own = self.checkpoints[role].folder
        others = [checkpoint.folder for other, checkpoint in reversed(self.checkpoints.items()) if other != role]
        found = next((folder for folder in (own, *others) if has_tokenizer(folder)), None)
        if found is None:
            what = "None of these models has a tokenizer, so there is nothing to read or write a text with."
            raise SlerpMergeError(what, "Put the tokenizer's files into a parent's folder.")
        return found


class DeviceFull(SlerpMergeError):
    """A device had no memory left for a model."""

    def __init__(self, name: str, device: str) -> None:
        hint = "Give it --device cpu." if device != "cpu" else "Close other programs, or use a machine with more."
        super().__init__(f"The device {device} ran out of memory with {name}.", hint)


@contextlib.contextmanager
def memory_watched(name: str, device: str) -> Iterator[None]:
    """Turns a device's or the system's lack of memory into DeviceFull."""
    try:
        yield
    except MemoryError as error:
        raise DeviceFull(name, device) from error
    except RuntimeError as error:
        if re.search(r"out of memory|can't allocate memory|not enough memory", str(error), re.IGNORECASE):
            raise DeviceFull(name, device) from error
        raise


def check_can_speak(checkpoint: Checkpoint, reads_on: bool) -> None:
    """Raises SlerpMergeError where a model cannot generate text; reads_on: or cannot predict a text token by token."""
    architecture = find_architecture(checkpoint)
    what = None
    if not architecture.can_generate() or READER_NAME.search(checkpoint.architecture):
        what = f"{checkpoint.name} is a {checkpoint.architecture}, which reads texts and cannot write any."
    elif reads_on and is_encoder_decoder(checkpoint):
        what = f"{checkpoint.name} is a {checkpoint.architecture}, which does not predict a text from its beginning."
    if what is not None:
        raise SlerpMergeError(what, "Merge it without tasting; its parents can be inspected.")
    kernels = [value for key, value in checkpoint.config.items() if "attn_implementation" in key and "/" in str(value)]
    if kernels or (checkpoint.folder / "adapter_config.json").is_file():
        asked = f"names the code {kernels[0]}" if kernels else "holds an adapter beside its weights"
        what = f"{checkpoint.name} {asked}, which would be loaded with it."
        raise SlerpMergeError(what, "Take that out of its folder; it was not loaded.")


def is_encoder_decoder(checkpoint: Checkpoint) -> bool:
    """Whether a model reads a whole text before it writes one, as its config or its kind tells."""
    stated = checkpoint.config.get("is_encoder_decoder")
    return stated if isinstance(stated, bool) else checkpoint.config.get("model_type") in ("t5", "bart", "whisper")


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


def choose_place(lineup: Lineup) -> tuple[str, str]:
    """(device, dtype) that all of a lineup fits, one model at a time: the stored dtype on an accelerator, float32 on
    the processor where there is room, which there is faster and exact.

    Raises SlerpMergeError where a model is too large for any.
    """
    stored = max((checkpoint.dtypes[0] for checkpoint in lineup.checkpoints.values()), key=dtype_width)
    largest = max(lineup.checkpoints.values(), key=lambda checkpoint: checkpoint.parameter_count)
    count = largest.parameter_count
    for device in [name for name, is_there in accelerators().items() if is_there] if lineup.device != "cpu" else []:
        fits = count * dtype_width(stored) + WORKING_BYTES < accelerator_memory(device)
        if lineup.device == device or (lineup.device == "auto" and fits):
            return device, stored
    if lineup.device not in ("auto", "cpu"):
        choose_device(lineup.device, 1)  # says that it is not there
    wide = "float64" if stored == "float64" else "float32"
    for dtype in (wide, stored):
        if count * dtype_width(dtype) + WORKING_BYTES < free_memory():
            return "cpu", dtype
    needed = format_bytes(count * dtype_width(stored) + WORKING_BYTES)
    what = f"{largest.name} needs about {needed} of memory to be asked anything; {format_bytes(free_memory())} are free"
    raise SlerpMergeError(f"{what}.", "Close other programs, or use a machine with more memory. The merge needs less.")


def dtype_width(name: str) -> int:
    """Bytes of a number of torch's dtype of this name."""
    return DTYPE_BYTES[SAFETENSORS_NAMES[name]]


def on_fitting_place(lineup: Lineup, observe: Observer, work: Callable[[str, str], Any]) -> Any:
    """What `work(device, dtype)` makes; once more on the processor where an accelerator that was chosen runs full."""
    device, dtype = choose_place(lineup)
    try:
        return work(device, dtype)
    except DeviceFull as error:
        if device == "cpu" or lineup.device != "auto":
            raise
        observe(Noted(f"{error.message} Once more, on the processor."))
    # Not within the block above: the error would hold on to the model that did not fit.
    return work(*choose_place(dataclasses.replace(lineup, device="cpu")))


@contextlib.contextmanager
def speaking_model(lineup: Lineup, role: str, device: str, dtype: str) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer) as transformers has them; given back when the block ends, so that one is there at a time.

    Raises SlerpMergeError where transformers cannot load them, DeviceFull where there is no memory for them.
    """
    transformers, checkpoint = quiet_transformers(), lineup.checkpoints[role]
    architecture = find_architecture(checkpoint)
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    how = {"dtype" if version >= (4, 56) else "torch_dtype": getattr(torch, dtype)}
    model = None
    try:
        with memory_watched(checkpoint.name, device):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    lineup.tokenizer_folder(role), trust_remote_code=False
                )
                model, found = architecture.from_pretrained(
                    checkpoint.folder, local_files_only=True, output_loading_info=True, **how
                )
                model = model.to(device).eval()
            except (OSError, ValueError, KeyError, ImportError) as error:
                what = f"transformers cannot load {checkpoint.name} ({role}): {shorten(str(error), 300)}"
                raise SlerpMergeError(what, "The merge is not touched by this.") from error
            if found["missing_keys"]:
                what = f"{checkpoint.name} ({role}) lacks weights: {format_names(sorted(found['missing_keys']))}."
                raise SlerpMergeError(what, "What transformers puts in their place is chance; nothing was asked of it.")
            with torch.inference_mode(), torch_threads_kept():
                if checkpoint.parameter_count < SMALL_MODEL_PARAMETERS:
                    torch.set_num_threads(1)
                yield model, tokenizer
    except SlerpMergeError:
        raise
    except Exception as error:  # configs and tokenizers of strangers fail inside other libraries, each in its own way
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        what = f"{checkpoint.name} ({role}) could not be asked: {reason}"
        raise SlerpMergeError(what, "Load it with transformers: if it shows the same, the fault is its own.") from error
    finally:
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def context_limit(checkpoint: Checkpoint) -> int | None:
    """Tokens that a model can look back on, as its config states it."""
    for scope in language_scopes(checkpoint.config):
        for key, value in scope.items():
            if CAPACITY_KEY.search(key) and type(value) is int and value > 1:
                return value
    return None


# ── §12b  Taste: the same prompts, answered side by side ────────────────────────────────────────


def taste(lineup: Lineup, prompts: Sequence[str], observe: Observer) -> list[dict[str, Any]]:
    """What each model answers to each prompt, greedily, so that it can be repeated: an entry for each prompt.

    Raises SlerpMergeError where a model cannot be loaded or cannot generate, or where a prompt is empty or too long.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise SlerpMergeError("A prompt is empty.", "Give a question, or the beginning of a sentence.")
    for checkpoint in lineup.checkpoints.values():
        check_can_speak(checkpoint, reads_on=False)

    def work(device: str, dtype: str) -> list[dict[str, Any]]:
        answers: dict[str, list[tuple[str, bool]]] = {}
        observe(WorkBegan("Tasting", len(lineup.folders) * len(prompts)))
        for role, _ in lineup.folders:
            answers[role] = answers_of(lineup, role, prompts, (device, dtype), observe)
        observe(WorkEnded())
        entries = []
        for number, prompt in enumerate(prompts):
            talked = [role for role in answers if answers[role][number][1]]
            through = f"through the chat templates of {', '.join(talked)}" if talked else "without a chat template"
            measured = f"Greedy, at most {TASTE_TOKENS} tokens, {through}, {dtype} on {device}."
            found = {role: answers[role][number][0] for role in answers}
            entries.append({"prompt": prompt, "measured": measured, "answers": found})
        return entries

    return on_fitting_place(lineup, observe, work)


def answers_of(
    lineup: Lineup, role: str, prompts: Sequence[str], place: tuple[str, str], observe: Observer
) -> list[tuple[str, bool]]:
    """One model's answers. A function of its own, so that no name holds on to the model when the next one loads."""
    with speaking_model(lineup, role, *place) as (model, tokenizer):
        found = []
        for prompt in prompts:
            found.append(answer_to(prompt, model, tokenizer, lineup.checkpoints[role]))
            observe(WorkAdvanced(1))
        return found


def answer_to(prompt: str, model: Any, tokenizer: Any, checkpoint: Checkpoint) -> tuple[str, bool]:
    """(a model's greedy answer, whether its chat template was applied)."""
    talks = bool(getattr(tokenizer, "chat_template", None))
    text = prompt
    if talks:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a program of a stranger's, run in a sandbox, fails in its own ways
            what = f"The chat template of {checkpoint.name} cannot take the prompt: {shorten(str(error), 200)}"
            raise SlerpMergeError(what, "Give another prompt, or mend the template in its folder.") from error
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not talks, return_token_type_ids=False)
    count = inputs["input_ids"].shape[1]
    limit = context_limit(checkpoint)
    room = TASTE_TOKENS if limit is None else min(TASTE_TOKENS, limit - count)
    if room < 1 or not count:
        what = f"The prompt has {count} tokens; {checkpoint.name} takes from 1 to {(limit or 2) - 1}."
        raise SlerpMergeError(what, "Give another prompt.")
    ends = model.generation_config.eos_token_id
    padding = model.generation_config.pad_token_id
    padding = padding if padding is not None else ends[0] if isinstance(ends, list) else ends
    output = model.generate(
        **inputs.to(model.device), max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=padding
    )
    start = 0 if is_encoder_decoder(checkpoint) else count
    return tokenizer.decode(output[0][start:], skip_special_tokens=True).strip(), talks


# ── §12c  Perplexity: how well parents and child predict a text ─────────────────────────────────


@dataclass(frozen=True)
class TextLoss:
    """How well one model predicts one text, by a window that slides over it."""

    steps: tuple[int, ...]  # tokens that each step of the window predicts
    byte_count: int  # of the text that those stand for, in UTF-8
    nats: tuple[float, ...]  # of each step: -log p, summed over its tokens

    @property
    def tokens(self) -> int:
        return sum(self.steps)

    @property
    def perplexity(self) -> float:
        return math.exp(math.fsum(self.nats) / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return math.fsum(self.nats) / math.log(2) / self.byte_count

    @property
    def items(self) -> tuple[tuple[float, float], ...]:
        """(bits, bytes) of each step, whose sums make bits_per_byte."""
        width = self.byte_count / self.tokens
        return tuple((nats / math.log(2), count * width) for nats, count in zip(self.nats, self.steps))


def ratio_of(items: Iterable[Sequence[float]]) -> float:
    """The sum of the first over the sum of the second part of each item: bits per byte, or a mean where those are 1."""
    amounts, weights = zip(*items)
    return math.fsum(amounts) / math.fsum(weights)


def standard_error(items: Sequence[Sequence[float]]) -> float | None:
    """Of ratio_of independent items; None where there are too few to tell.

    Formula: W. G. Cochran, Sampling Techniques (1977), chapter 6, the variance of a ratio estimate.
    """
    count = len(items)
    if count < 2:
        return None
    ratio, total = ratio_of(items), math.fsum(weight for _, weight in items)
    residuals = math.fsum((amount - ratio * weight) ** 2 for amount, weight in items)
    return math.sqrt(count / (count - 1) * residuals) / total


def error_of_difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float | None:
    """Standard error of the difference of two ratios: paired where the items are the same ones, else of both."""
    if [weight for _, weight in left] == [weight for _, weight in right]:
        return standard_error([(a - b, weight) for (a, weight), (b, _) in zip(left, right)])
    errors = standard_error(left), standard_error(right)
    return None if None in errors else math.hypot(*errors)


def window_of(lineup: Lineup) -> int:
    """Tokens of context for all of a lineup: what each of them can look back on."""
    limits = [limit for checkpoint in lineup.checkpoints.values() if (limit := context_limit(checkpoint))]
    return min(WINDOW_TOKENS, *limits) if limits else WINDOW_TOKENS


def sliding_windows(count: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, tokens that are predicted for the first time) of a window moved over `count` tokens by its half."""
    covered = 1  # nothing stands before the first token to predict it from
    for begin in range(0, count, max(1, window // 2)):
        end = min(begin + window, count)
        if end > covered:
            yield begin, end, end - covered
        covered = end
        if end == count:
            return


def text_loss(model: Any, tokenizer: Any, text: str, window: int, advance: Callable[[int], object]) -> TextLoss:
    """-log p of every token of a text but the first, each seen with half a window or more before it, where there is.

    As the transformers documentation computes "perplexity of fixed-length models", with a stride of half a window.
    advance: told the bytes of the text that are done. Raises SlerpMergeError where the text has no two tokens, or a
    probability is no number.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise SlerpMergeError("The text has fewer than two tokens, so there is none to predict.", "Give a longer one.")
    tokens = torch.tensor(ids, device=model.device)
    size, done = len(text.encode()), 0
    nats, steps = [], []
    for begin, end, fresh in sliding_windows(len(ids), window):
        logits = model(input_ids=tokens[begin:end].unsqueeze(0), use_cache=False).logits[0, -fresh - 1 : -1]
        targets = tokens[end - fresh : end]
        nats.append(
            math.fsum(
                float(torch.nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="sum"))
                for part in (slice(start, start + LOGIT_ROWS) for start in range(0, fresh, LOGIT_ROWS))
            )
        )
        steps.append(fresh)
        before, done = done, size * sum(steps) // (len(ids) - 1)
        advance(done - before)
    if not math.fsum(nats) < MOST_NATS * sum(steps):
        what = "A model gives a probability that is no number, or next to none."
        raise SlerpMergeError(what, "Something is wrong with its weights.")
    first = "" if ids[0] in tokenizer.all_special_ids else tokenizer.decode(ids[:1])
    return TextLoss(tuple(steps), max(1, size - len(first.encode())), tuple(nats))


def lose_on_texts(
    lineup: Lineup, role: str, texts: Sequence[str], place: tuple[str, str], window: int, advance: Callable[[int], Any]
) -> list[TextLoss]:
    """One model's losses on several texts; `advance` as in text_loss."""
    with speaking_model(lineup, role, *place) as (model, tokenizer):
        return [text_loss(model, tokenizer, text, window, advance) for text in texts]


def compare_perplexity(lineup: Lineup, paths: Sequence[Path], observe: Observer) -> list[dict[str, Any]]:
    """How well each model predicts each text: an entry for each. One model is in memory at a time.

    Raises SlerpMergeError where a text is empty, or a model cannot be loaded or does not predict texts.
    """
    texts = [read_judged_text(path) for path in paths]
    for checkpoint in lineup.checkpoints.values():
        check_can_speak(checkpoint, reads_on=True)
    window = window_of(lineup)

    def work(device: str, dtype: str) -> list[dict[str, Any]]:
        total = len(lineup.folders) * sum(len(text.encode()) for text in texts)
        observe(WorkBegan("Reading the text" + "s" * (len(texts) > 1), total))
        found = {
            role: lose_on_texts(lineup, role, texts, (device, dtype), window, lambda n: observe(WorkAdvanced(n)))
            for role, _ in lineup.folders
        }
        observe(WorkEnded())
        how = describe_window(window, dtype, device)
        return [
            perplexity_entry(path, text, how, {role: losses[number] for role, losses in found.items()})
            for number, (path, text) in enumerate(zip(paths, texts))
        ]

    return on_fitting_place(lineup, observe, work)


def describe_window(window: int, dtype: str, device: str) -> str:
    """How a text was read, in words."""
    return f"Sliding window of {window} tokens, {max(1, window // 2)} of them new in each step; {dtype} on {device}."


def perplexity_entry(path: Path, text: str, how: str, losses: Mapping[str, TextLoss]) -> dict[str, Any]:
    """What merge_report.json holds of one text."""
    import hashlib

    if any(len(loss.nats) < 2 for loss in losses.values()):
        how += " The text is shorter than a window and a half, so how far chance goes in it is not known."
    child = losses["child"]
    return {
        "text": path.name,
        "bytes": len(text.encode()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "measured": how,
        "models": [
            {
                "role": role,
                "tokens": loss.tokens,
                "perplexity": loss.perplexity,
                "bits_per_byte": loss.bits_per_byte,
                "noise": standard_error(loss.items),
            }
            for role, loss in losses.items()
        ],
        "child_against": {
            role: {
                "bits_per_byte": child.bits_per_byte - loss.bits_per_byte,
                "noise": error_of_difference(child.items, loss.items),
            }
            for role, loss in losses.items()
            if role != "child"
        },
    }


# ── §12d  Scores: the field's harness, and what its differences are worth ───────────────────────

NO_FIGURES = "The harness gives these tasks no figure that is a mean over their items."
NOISE_LEVEL = 0.05  # a difference that chance makes more often than this is noise


def load_harness() -> Any:
    """The package lm_eval. Raises SlerpMergeError where it is not installed, or not whole."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        harness = importlib.import_module("lm_eval")
        importlib.import_module("accelerate")  # its models of transformers need it
    except ImportError as error:
        what = f"Scores need the evaluation harness, which is not installed ({error})."
        raise SlerpMergeError(what, 'pip install "lm-eval[hf]"') from error
    import logging

    for name in ("lm_eval", "datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return harness


@functools.cache  # the index of all its tasks takes some ten seconds, and is asked for before a merge and after it
def task_manager(include_path: Path | None, with_defaults: bool) -> Any:
    """The harness's index of tasks. Raises SlerpMergeError where a task's file cannot be read."""
    try:
        return importlib.import_module("lm_eval.tasks").TaskManager(
            include_path=str(include_path) if include_path else None, include_defaults=with_defaults
        )
    except Exception as error:  # a task file can be wrong in as many ways as YAML can
        what = f"The harness cannot read the tasks in {include_path}: {shorten(str(error), 300)}"
        raise SlerpMergeError(what, "Mend that file, or try it with lm_eval itself.") from error


def find_tasks(tasks: Sequence[str], include_path: Path | None) -> tuple[list[str], Any]:
    """(names of the harness's tasks that are meant, its task manager). Raises SlerpMergeError for one it does not have.

    The harness's own thousands of tasks are only looked through where a name is not one of `include_path`.
    """
    load_harness()
    if include_path is not None and not include_path.is_dir():
        raise SlerpMergeError(
            f"The folder of tasks {include_path} is not there.", "Give the folder of their YAML files."
        )
    folder = None if include_path is None else include_path.resolve()
    for with_defaults in (True,) if folder is None else (False, True):
        manager = task_manager(folder, with_defaults)
        missing = [task for task in tasks if not manager.match_tasks([task])]
        if not missing:
            return list(dict.fromkeys(name for task in tasks for name in manager.match_tasks([task]))), manager
    near = difflib.get_close_matches(missing[0], manager.all_tasks, 3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists what there is."
    raise SlerpMergeError(f"The harness has no task {format_names(missing)}.", hint)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keeps the harness's own prints and bars off the screen, and what git says where it looks for a commit."""
    evaluator = importlib.import_module("lm_eval.evaluator")
    before = getattr(evaluator, "get_git_commit_hash", None)
    evaluator.get_git_commit_hash = lambda: None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        evaluator.get_git_commit_hash = before


def harness_results(lineup: Lineup, role: str, tasks: Sequence[str], manager: Any, device: str) -> dict[str, Any]:
    """The harness's own result for one model, with its samples; all settings are its defaults.

    Raises SlerpMergeError for whatever goes wrong in it.
    """
    harness = load_harness()
    folder, name, tokenizer = dict(lineup.folders)[role], lineup.checkpoints[role].name, lineup.tokenizer_folder(role)
    model = {"pretrained": str(folder), "trust_remote_code": False}
    if not has_tokenizer(folder):
        model["tokenizer"] = str(tokenizer)
    try:
        with hushed(), memory_watched(name, device):
            result = harness.simple_evaluate(
                model="hf", model_args=model, tasks=list(tasks), task_manager=manager, device=device, log_samples=True
            )
    except SlerpMergeError:
        raise
    except Exception as error:  # tasks are programs and data of others; each fails in its own way
        what = f"The harness could not evaluate {name}: {shorten(f'{type(error).__name__}: {error}', 300)}"
        hint = "Try it with lm_eval itself: if it shows the same, the fault is the task's."
        raise SlerpMergeError(what, hint) from error
    answers = (sample.get("filtered_resps") for samples in result["samples"].values() for sample in samples)
    if "nan" in re.findall(r"\bnan\b", str(list(answers))):
        raise SlerpMergeError(f"{name} gives a probability that is no number.", "Something is wrong with its weights.")
    return result


def judged_metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(task, metric, filter) of every figure of a result that is the mean of a value known for each item.

    Others, such as a perplexity over words, have no value of an item that more or less of would mean anything.
    """
    for task, figures in result["results"].items():
        samples = result["samples"].get(task, ())
        for key in figures:
            metric, comma, filtered = key.partition(",")
            known = [sample for sample in samples if sample.get("filter", "none") == filtered]
            if comma and not metric.endswith("_stderr") and known and is_number(known[0].get(metric)):
                items = items_of(result, task, metric, filtered)
                if math.isclose(math.fsum(items) / len(items), figures[key], rel_tol=1e-6, abs_tol=1e-9):
                    yield task, metric, filtered


def is_number(value: Any) -> bool:
    """Whether a harness's value is a single number, numpy's own among them."""
    return isinstance(value, (bool, int, float)) or type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0


def items_of(result: Mapping[str, Any], task: str, metric: str, filtered: str) -> list[float]:
    """A metric's value for each item of a task, in the order of the items."""
    samples = [sample for sample in result["samples"][task] if sample.get("filter", "none") == filtered]
    return [float(sample[metric]) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def is_higher_better(result: Mapping[str, Any], task: str, metric: str) -> bool:
    """What a task says of its metric; where it says nothing, more is better."""
    return result.get("higher_is_better", {}).get(task, {}).get(metric, True) is not False


def sign_test(better: int, worse: int) -> float:
    """How often chance alone makes a difference as uneven as this, two-sided. Exact.

    Over items of right and wrong it is McNemar's test: Q. McNemar, Psychometrika 12 (1947), 153-157, in its exact form.
    """
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def verdict_on(child: Sequence[float], parent: Sequence[float], higher_is_better: bool) -> tuple[str, float]:
    """(in words, p) what a difference between child and parent on the same items is worth."""
    gains = [(a - b) * (1 if higher_is_better else -1) for a, b in zip(child, parent)]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    p = sign_test(better, worse)
    word = "noise" if p > NOISE_LEVEL else "better" if better > worse else "worse"
    return f"{word} (better on {better}, worse on {worse} of {len(gains)}; p = {p:.2g})", p


def score(lineup: Lineup, tasks: Sequence[str], include_path: Path | None, observe: Observer) -> list[dict[str, Any]]:
    """Parents and child on the harness's tasks, with its own figures: one entry.

    Raises SlerpMergeError where the harness, a task or a model does not let them be had.
    """
    names, manager = find_tasks(tasks, include_path)
    for checkpoint in lineup.checkpoints.values():
        check_can_speak(checkpoint, reads_on=False)
    device = choose_place(lineup)[0]
    results = {}
    observe(WorkBegan("Scoring with the harness", len(lineup.folders)))
    for role, _ in lineup.folders:
        results[role] = harness_results(lineup, role, names, manager, device)
        observe(WorkAdvanced(1))
    observe(WorkEnded())
    rows = [score_row(results, task, metric, filtered) for task, metric, filtered in judged_metrics(results["child"])]
    if not rows:
        raise SlerpMergeError(NO_FIGURES, "Choose others, such as tasks of multiple choice.")
    version = getattr(load_harness(), "__version__", results["child"].get("lm_eval_version", ""))
    measured = f"lm-eval {version}, its defaults, on {device}; child against parent: exact sign test on the same items."
    return [{"tasks": names, "measured": measured, "rows": rows}]


def score_row(results: Mapping[str, Mapping[str, Any]], task: str, metric: str, filtered: str) -> dict[str, Any]:
    """One figure of all the models, the harness's own, and the child's differences from each parent."""
    key, error_key = f"{metric},{filtered}", f"{metric}_stderr,{filtered}"
    figures, items = {}, {}
    for role, result in results.items():
        error = result["results"][task].get(error_key)
        figures[role] = [float(result["results"][task][key]), float(error) if is_number(error) else None]
        items[role] = items_of(result, task, metric, filtered)
    higher = is_higher_better(results["child"], task, metric)
    parents = [role for role in results if role != "child"]
    judged = [verdict_on(items["child"], items[parent], higher) for parent in parents]
    return {
        "task": task,
        "metric": metric if filtered == "none" else f"{metric} ({filtered})",
        "items": len(items["child"]),
        "figures": figures,
        "verdicts": [words for words, _ in judged],
        "p": dict(zip(parents, (p for _, p in judged))),
    }


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §13  Sweep: a good t is found, by texts or tasks of the person's choice
# ════════════════════════════════════════════════════════════════════════════════════════════════
#
# A grid first, then both sides of the best at half the distance, and again. Every trial child is made by the same
# two functions as any other, read, and removed; what was found is in a journal, so that a stopped sweep goes on.

SWEEP_GRID = (0.1, 0.3, 0.5, 0.7, 0.9)
SWEEP_STEPS = (0.1, 0.05, 0.025)  # around the best so far
MOST_TRIALS = 2 + len(SWEEP_GRID) + 2 * len(SWEEP_STEPS)  # both parents among them
MEMORY_FOLDER = Path("/dev/shm")  # files in memory, where the system has it
TRIAL_PREFIX = "slerpmerge-trial-"


@dataclass(frozen=True)
class Yardstick:
    """What trial children are measured by: texts that they should predict, or else tasks of the harness."""

    texts: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None


@dataclass(frozen=True)
class Trial:
    """What the yardstick says of one model."""

    role: str  # "primary", "secondary" or "child"
    t: float
    values: tuple[float, ...]  # as they are shown, one for each text or task
    items: tuple[tuple[tuple[float, float], ...], ...]  # of each (loss, weight), whose ratio counts; less is better

    @property
    def loss(self) -> float:
        """The mean over texts or tasks, each counting the same."""
        return math.fsum(map(ratio_of, self.items)) / len(self.items)

    def noise_against(self, other: Trial) -> float | None:
        """Standard error of the difference of two losses."""
        errors = [error_of_difference(a, b) for a, b in zip(self.items, other.items)]
        return None if None in errors else math.hypot(*errors) / len(errors)


def sweep_area(save_directory: Path) -> Path:
    """The hidden folder beside the save directory that a sweep keeps its journal in."""
    target = save_directory.resolve()
    return target.with_name(f".{target.name}.slerpmerge-sweep")


class SweepJournal:
    """What a sweep has found so far, and the one trial child that is there at a time.

    Leaving the `with` block removes the trial child. What was found stays until `forget`.
    """

    def __init__(self, plan: MergePlan, identity: Mapping[str, Any]) -> None:
        self.plan = plan
        self.identity = json.loads(json.dumps(identity))
        self.area = sweep_area(plan.recipe.save_directory)
        self.path = self.area / JOURNAL_NAME
        self.trials: list[Trial] = []
        self.names: list[str] = []  # of the figures
        self.storage: Path | None = None

    def __enter__(self) -> SweepJournal:
        try:
            if os.path.lexists(self.area) and not is_plain_folder(self.area):
                raise SlerpMergeError(f"{self.area} is in the way; it is no folder of this tool's.", "Remove it.")
            self.area.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.area)
        except OSError as error:
            raise explain_os_error(error, self.area, "make the folder") from error
        content: dict[str, Any] = {}
        if is_plain_file(self.path):
            with contextlib.suppress(SlerpMergeError):  # a torn one is as good as none
                content = read_json(self.path)
        remove_trial(content.get("storage"))
        if content.get("identity") == self.identity and not self.plan.recipe.restart:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a journal of another making begins anew
                self.trials = [
                    Trial(entry["role"], entry["t"], tuple(entry["values"]), entry["items"])
                    for entry in content["trials"]
                ]
                self.names = [str(name) for name in content["names"]]
        try:
            self.storage = trial_storage(self.plan, self.area)
            self._write()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise explain_os_error(error, self.area, "write in") from error
            raise
        return self

    def _write(self) -> None:
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        content = {"identity": self.identity, "storage": str(self.storage), "names": self.names, "trials": trials}
        replace_files({self.path: json.dumps(content).encode()})

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._write()

    def __exit__(self, *_: object) -> None:
        with interruptions_held():
            remove_trial(str(self.storage))
            self._lock.release()
            if not self.trials:
                forget_sweep(self.plan.recipe.save_directory)


def forget_sweep(save_directory: Path) -> None:
    """Removes a sweep's journal, once its child stands."""
    area = sweep_area(save_directory)
    if is_plain_folder(area):
        shutil.rmtree(area, ignore_errors=True)


def trial_storage(plan: MergePlan, area: Path) -> Path:
    """A new folder for trial children: in memory where one fits there beside itself once more, loaded; else on disk."""
    needed = 1.05 * plan.disk_needed_bytes
    loaded = 2 * plan.child_bytes + WORKING_BYTES
    try:
        fits = shutil.disk_usage(MEMORY_FOLDER).free > needed and free_memory() > needed + loaded
        if fits and os.access(MEMORY_FOLDER, os.W_OK):
            return Path(tempfile.mkdtemp(prefix=TRIAL_PREFIX, dir=MEMORY_FOLDER))
    except OSError:  # no such folder here, or none to write to: the disk then
        fits = False
    return Path(tempfile.mkdtemp(prefix=TRIAL_PREFIX, dir=area))


def remove_trial(storage: Any) -> None:
    """Removes a folder of trial children, if it is one."""
    path = Path(storage) if isinstance(storage, str) else Path()
    if path.name.startswith(TRIAL_PREFIX) and is_plain_folder(path):
        shutil.rmtree(path, ignore_errors=True)


class Sweep:
    """One search for t. `run` returns what merge_report.json holds of it."""

    def __init__(self, plan: MergePlan, yardstick: Yardstick, observe: Observer) -> None:
        self.plan = plan
        self.yardstick = yardstick
        self.observe = observe
        self.texts = [read_judged_text(path) for path in yardstick.texts]
        self.parents = (("primary", plan.primary.folder), ("secondary", plan.secondary.folder))
        self.lineup = Lineup(self.parents, plan.recipe.device)
        self.window = window_of(self.lineup)
        self.tasks: tuple[list[str], Any] = ([], None)
        for checkpoint in self.lineup.checkpoints.values():
            check_can_speak(checkpoint, reads_on=bool(self.texts))
        if not self.texts:
            self.tasks = find_tasks(yardstick.tasks, yardstick.include_path)

    def run(self) -> dict[str, Any]:
        return on_fitting_place(self.lineup, self.observe, self.run_on)

    def run_on(self, device: str, dtype: str) -> dict[str, Any]:
        self.place = device, dtype
        per_model = sum(len(text.encode()) for text in self.texts) or 1
        with SweepJournal(self.plan, self.identity()) as self.journal:
            known = len(self.journal.trials)
            if known:
                self.observe(Noted(f"Carrying on: {known} models are measured already."))
            self.observe(WorkBegan("Finding a good t", MOST_TRIALS * per_model))
            self.observe(WorkAdvanced(known * per_model))
            for role, t in (("primary", 0.0), ("secondary", 1.0)):
                self.try_model(role, t)
            for t in SWEEP_GRID:
                self.try_model("child", t)
            for step in SWEEP_STEPS:
                best = self.best().t
                for t in (round(best - step, 4), round(best + step, 4)):
                    if 0 < t < 1:
                        self.try_model("child", t)
            self.observe(WorkEnded())
            return self.entry(self.journal.trials)

    def identity(self) -> dict[str, Any]:
        """All that the figures depend on."""
        import hashlib

        identity = plan_identity(self.plan)
        identity["recipe"].pop("schedule")
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in self.texts]
        folder = self.yardstick.include_path
        stamps = {} if folder is None else stamps_of(folder, [path.name for path in folder.iterdir() if path.is_file()])
        tasks = self.tasks[0], str(folder), stamps
        return {**identity, "texts": hashes, "tasks": tasks, "place": self.place, "window": self.window}

    def best(self) -> Trial:
        """The child that loses least; of equal ones the one nearest the middle."""
        children = [trial for trial in self.journal.trials if trial.role == "child"]
        return min(children, key=lambda trial: (trial.loss, abs(trial.t - 0.5)))

    def try_model(self, role: str, t: float) -> None:
        """Measures a parent, or a child made for it, unless the journal has it."""
        if any((trial.role, trial.t) == (role, t) for trial in self.journal.trials):
            return
        folder = dict(self.parents).get(role) or self.make_trial(t)
        values, items = self.measure(role, folder)
        trial = Trial(role, t, values, items)
        self.journal.add(trial)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in zip(self.journal.names, values))
        self.observe(Noted(f"t = {t:<6g} {role:<10} {shown}"))

    def make_trial(self, t: float) -> Path:
        """A child at t, in place of the one before it."""
        folder = self.journal.storage / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = dataclasses.replace(
            self.plan.recipe, schedule=Schedule.constant(t), save_directory=folder, overwrite=False, restart=True
        )
        return execute_merge(prepare_merge(recipe, ignore), ignore).child

    def measure(self, role: str, folder: Path) -> tuple[tuple[float, ...], tuple[Any, ...]]:
        """(figures to show, items whose losses count) of one model, as a trial has them."""
        lineup = Lineup((*self.parents, (role, folder)) if role == "child" else self.parents, self.lineup.device)
        if self.texts:
            losses = lose_on_texts(
                lineup, role, self.texts, self.place, self.window, lambda count: self.observe(WorkAdvanced(count))
            )
            self.journal.names = [path.name for path in self.yardstick.texts]
            return tuple(loss.bits_per_byte for loss in losses), tuple(loss.items for loss in losses)
        names, manager = self.tasks
        result = harness_results(lineup, role, names, manager, self.place[0])
        self.observe(WorkAdvanced(1))
        chosen: dict[str, tuple[str, str]] = {}
        for task, metric, filtered in judged_metrics(result):
            chosen.setdefault(task, (metric, filtered))
        if not chosen:
            raise SlerpMergeError(NO_FIGURES, "Sweep by others, such as tasks of multiple choice.")
        self.journal.names = [f"{task}: {metric}" for task, (metric, _) in chosen.items()]
        values, items = [], []
        for task, (metric, filtered) in chosen.items():
            found = items_of(result, task, metric, filtered)
            higher = is_higher_better(result, task, metric)
            values.append(math.fsum(found) / len(found))
            items.append(tuple((-value if higher else value, 1.0) for value in found))
        return tuple(values), tuple(items)

    def entry(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """What merge_report.json holds of a sweep."""
        best = self.best()
        device, dtype = self.place
        how = describe_window(self.window, dtype, device) if self.texts else f"The harness's tasks, on {device}."
        steps = f"A grid of t from {SWEEP_GRID[0]} to {SWEEP_GRID[-1]}, then narrowed to steps of {SWEEP_STEPS[-1]}."
        return {
            "names": self.journal.names,
            "unit": "bits per byte" if self.texts else "the harness's figure",
            "less_is_better": bool(self.texts),
            "measured": f"{steps} {how} Noise is the standard error of the difference from the best child, "
            "which was picked on these very items, so that its gain is a little flattered.",
            "best_t": best.t,
            "trials": [
                {
                    "role": trial.role,
                    "t": trial.t,
                    "values": list(trial.values),
                    "loss": trial.loss,
                    "over_best": trial.loss - best.loss,
                    "noise": None if trial is best else trial.noise_against(best),
                }
                for trial in sorted(trials, key=lambda trial: trial.t)
            ],
            "verdict": self.verdict(trials, best),
        }

    @staticmethod
    def verdict(trials: Sequence[Trial], best: Trial) -> str:
        """What was found, in words; a difference within twice its standard error is called noise."""
        words = []
        for trial in trials:
            if trial.role != "child":
                gain, noise = trial.loss - best.loss, trial.noise_against(best)
                doubt = ", which is noise" if noise is not None and abs(gain) <= 2 * noise else ""
                doubt = ", on too short a text to tell that from noise" if noise is None else doubt
                words.append(f"{abs(gain):.4f} {'less' if gain > 0 else 'more'} than the {trial.role}{doubt}")
        near = [
            f"{trial.t:g}"
            for trial in sorted(trials, key=lambda trial: trial.t)
            if trial.role == "child"
            and trial is not best
            and (noise := trial.noise_against(best)) is not None
            and trial.loss - best.loss <= 2 * noise
        ]
        alike = f" Not to be told from it: t = {', '.join(near)}." if near else ""
        return f"The best child, at t = {best.t:g}, loses {' and '.join(words)}.{alike}"


def ignore(event: Event) -> None:
    """An observer of work that nobody watches."""


def find_t(plan: MergePlan, yardstick: Yardstick, observe: Observer) -> dict[str, Any]:
    """The t at which a child of the plan's parents loses least on texts or tasks, and the curve that shows it.

    Follows the plan's recipe in all but its schedule. Raises SlerpMergeError where the texts, tasks or models do not
    allow it. What was found stays in a journal beside the save directory until `forget_sweep`.
    """
    if plan.recipe.slices or plan.recipe.weights is not None:
        what = "A sweep looks for one t of whole models; this recipe has slices or weights of its own."
        raise SlerpMergeError(what, "Sweep without the recipe, or merge it as it is.")
    return Sweep(plan, yardstick, observe).run()


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §14  View: events become a picture (rich)
# ════════════════════════════════════════════════════════════════════════════════════════════════

WIDEST_PANEL = 110  # longer lines are hard to read
NARROW_COLUMNS = 80  # below this, tables become stacked lines
REFRESHES_PER_SECOND = 8
PLAIN_STEP_PERCENT = 5  # how often a line is printed where there is no terminal
MARKS = {"blocking": ("✗", "x", "red"), "mended": ("✓", "+", "green"), "notice": ("•", "-", "yellow")}
MOST_NOTICES = 12


def is_unicode(console: Console) -> bool:
    """Whether the terminal shows more than ASCII."""
    return (console.encoding or "").lower().replace("-", "").startswith("utf")


def displayable(console: Console, text: str) -> str:
    """Printable text, in characters that the terminal's encoding has."""
    encoding = console.encoding or "ascii"
    text = printable(text, keep="\n")
    if not is_unicode(console):
        text = text.replace("°", " degrees").replace("…", "...")
    return text.encode(encoding, "backslashreplace").decode(encoding)


def mark_of(console: Console, severity: str) -> Text:
    """The sign for a severity, in its colour."""
    from rich.text import Text

    fancy, plain, colour = MARKS[severity]
    return Text(fancy if is_unicode(console) else plain, style=f"bold {colour}")


def panel(console: Console, content: RenderableType, title: str) -> RenderableType:
    """A titled frame; plain ASCII where the terminal cannot show more."""
    from rich import box
    from rich.panel import Panel

    frame = box.ROUNDED if is_unicode(console) else box.ASCII
    width = min(console.width, WIDEST_PANEL)
    return Panel(content, title=title, title_align="left", box=frame, border_style="cyan", padding=(0, 1), width=width)


def fact_table(console: Console, facts: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and its value."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(displayable(console, value)))
    return table


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """A parent in one line: name, architecture, size, dtypes."""
    dtypes = ", ".join(checkpoint.dtypes[:3])
    size = f"{format_count(checkpoint.parameter_count)} parameters, {format_bytes(checkpoint.byte_count)}"
    return f"{checkpoint.name}: {checkpoint.architecture}, {size}, {dtypes}"


def render_parity(console: Console, report: ParityReport) -> RenderableType:
    """Every mismatch with its mark, both values, and what is done about it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not report.mismatches:
        return panel(console, Text("The parents match in every respect that was checked."), "Parity")
    shown = [m for m in report.mismatches if m.severity != "notice"]
    notices = report.of_severity("notice")
    shown += notices[:MOST_NOTICES]
    more = f"and {len(notices) - MOST_NOTICES} more to know; --json lists them all"
    if console.width < NARROW_COLUMNS:
        content: RenderableType = stacked_mismatches(console, shown)
    else:
        content = Table(box=None, padding=(0, 1), pad_edge=False, expand=True)
        content.add_column("", width=1)
        content.add_column("what", width=min(24, max(len(m.subject) for m in shown)), overflow="fold")
        for heading, ratio in (("primary", 2), ("secondary", 2), ("what follows", 4)):
            content.add_column(heading, ratio=ratio, overflow="fold")
        for m in shown:
            cells = (Text(displayable(console, value)) for value in (m.subject, m.primary, m.secondary, m.consequence))
            content.add_row(mark_of(console, m.severity), *cells)
    if len(notices) > MOST_NOTICES:
        content = Group(content, Text(more, style="dim"))
    title = f"Parity: {len(report.of_severity('mended'))} mended, {len(notices)} to know"
    blocking = len(report.of_severity("blocking"))
    return panel(console, content, f"Parity: {blocking} blocking" if blocking else title)


def stacked_mismatches(console: Console, mismatches: Iterable[Mismatch]) -> RenderableType:
    """Mismatches one below the other, for narrow terminals."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = []
    for m in mismatches:
        lines.append(Text.assemble(mark_of(console, m.severity), " ", (displayable(console, m.subject), "bold")))
        lines.append(Text(f"  primary {displayable(console, m.primary)}"))
        lines.append(Text(f"  secondary {displayable(console, m.secondary)}"))
        lines.append(Text(f"  {displayable(console, m.consequence)}", style="dim"))
    return Group(*lines)


def describe_rules(plan: MergePlan) -> str:
    """How many tensors there are, and how many fall to each rule."""
    parts = [f"{plan.count(rule)} to {rule}" for rule in ("slerp", "lerp", "copy") if plan.count(rule)]
    return f"{sum(1 for _ in plan.jobs)} ({', '.join(parts)})"


def describe_method(recipe: MergeRecipe) -> str:
    """The method, with what is taken as one vector, and of what."""
    granularity = f" by {recipe.granularity}" if recipe.granularity != "tensor" else ""
    vectors = " of task vectors" if recipe.base is not None else ""
    extrapolated = ", beyond the parents" if recipe.extrapolate else ""
    return f"{recipe.method}{granularity}{vectors}{extrapolated}"


CURVE_LEVELS = "▁▂▃▄▅▆▇█"
CURVE_COLUMNS = 24  # a curve is drawn with at most this many cells


def draw_curve(console: Console, values: Sequence[float]) -> str:
    """t over the layers in one line: a bar for each, or a digit from 0 to 9 where bars cannot be shown."""
    if len(values) > CURVE_COLUMNS:
        steps = CURVE_COLUMNS - 1
        values = [values[round(step * (len(values) - 1) / steps)] for step in range(CURVE_COLUMNS)]
    if not is_unicode(console):  # tenths: 5 is 0.5, and 9 stands for all above
        return "".join(str(min(max(int(t * 10 + 1e-9), 0), 9)) for t in values)
    last = len(CURVE_LEVELS) - 1
    return "".join(CURVE_LEVELS[min(max(round(t * last), 0), last)] for t in values)


def schedule_curves(console: Console, schedule: Schedule, layers: int = 16) -> list[tuple[str, str]]:
    """(component, curve) of a schedule before any model is known, as a decoder of so many layers would have it."""
    examples = {"attention": "self_attn.q_proj.weight", "mlp": "mlp.up_proj.weight", "other": "input_layernorm.weight"}
    positions = [layer / (layers - 1) for layer in range(layers)]
    rows = []
    for component, name in examples.items():
        values = [schedule.t_for(f"model.layers.{layer}.{name}", p) for layer, p in enumerate(positions)]
        rows.append((component, draw_curve(console, values)))
    return rows if len({curve for _, curve in rows}) > 1 else [("all", rows[0][1])]


def t_by_component(plan: MergePlan) -> list[tuple[str, str, list[float]]]:
    """(stack, component, t over its layers); a component whose tensors differ stands once for each difference."""
    by_tensor: dict[tuple[str, str], dict[int, float]] = {}
    for job in plan.jobs:
        if (place := find_layer(job.name)) is not None:
            rest = job.name[len(place[0]) :].lstrip(".").partition(".")[2]
            by_tensor.setdefault((place[0], rest), {})[place[1]] = job.t
    groups: dict[tuple[str, str, tuple[float, ...]], list[str]] = {}
    for (stack, rest), by_layer in by_tensor.items():
        values = tuple(by_layer[layer] for layer in sorted(by_layer))
        groups.setdefault((stack, component_of(rest), values), []).append(rest)
    alone = Counter((stack, component) for stack, component, _ in groups)
    return [
        (stack, component if alone[stack, component] == 1 else format_names(names, 2), list(values))
        for (stack, component, values), names in groups.items()
    ]


def render_curves(console: Console, plan: MergePlan) -> RenderableType:
    """t over the layers, for each component of each stack, as it will be used; then the tensors outside layers."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = []
    for stack, component, values in t_by_component(plan):
        name = displayable(console, f"{stack}  {component:<10}")
        curve = f"{draw_curve(console, values)}  {values[0]:.4g} to {values[-1]:.4g}"
        narrow = console.width < NARROW_COLUMNS or len(name) > 50
        lines.append(Text(f"{name}\n  {curve}" if narrow else f"{name:<26}  {curve}"))
    outside: dict[float, list[str]] = {}
    for job in plan.jobs:
        if find_layer(job.name) is None:
            outside.setdefault(job.t, []).append(job.name)
    for t, names in outside.items():
        lines.append(Text(displayable(console, f"{t:.4g} for {format_names(names, 3)}")))
    return panel(console, Group(*lines), "t of every tensor")


def render_plan(console: Console, plan: MergePlan) -> RenderableType:
    """What will be made, from what, and what it will cost."""
    recipe = plan.recipe
    shards = f"{len(plan.shards)} file{'s' * (len(plan.shards) > 1)}"
    speed = format_bytes(plan.read_bytes_per_second)
    donor = f"from the {plan.tokenizer_role}: " if plan.tokenizer_role else "none: "
    facts = [
        ("primary", describe_checkpoint(plan.primary)),
        ("secondary", describe_checkpoint(plan.secondary)),
        ("child", str(recipe.save_directory)),
        ("blend", f"{describe_method(recipe)}, {recipe.describe_blend()}"),
        *([("base", describe_checkpoint(plan.base))] if plan.base is not None else []),
        ("kinship", plan.kinship.describe()),
        ("tensors", describe_rules(plan)),
        ("files", f"{shards}, {format_bytes(plan.child_bytes)}"),
        ("tokenizer", donor + plan.parity.vocabulary.reason),
        ("disk", f"{format_bytes(plan.disk_needed_bytes)} needed, {format_bytes(plan.disk_free_bytes)} free"),
        ("memory", f"about {format_bytes(plan.peak_memory_bytes)} at the peak, {plan.threads} threads"),
        ("time", f"{format_seconds(plan.expected_seconds)} expected, reading {speed}/s"),
    ]
    facts += [("mind", remark) for remark in plan.remarks]
    return panel(console, fact_table(console, facts), "Plan")


def plan_as_dict(plan: MergePlan) -> dict[str, Any]:
    """The plan as `--dry-run --json` prints it."""
    return {
        "child": str(plan.recipe.save_directory),
        "tensors": sum(1 for _ in plan.jobs),
        **{f"to_{rule}": plan.count(rule) for rule in ("slerp", "lerp", "copy")},
        "files": [shard.file_name for shard in plan.shards],
        "bytes": plan.child_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "disk_needed_bytes": plan.disk_needed_bytes,
        "disk_free_bytes": plan.disk_free_bytes,
        "expected_seconds": plan.expected_seconds,
        "t": {job.name: job.t for job in plan.jobs},
        "kinship": plan.kinship.as_dict(),
        "remarks": list(plan.remarks),
        "tokenizer_from": plan.tokenizer_role,
        "chat_template_from": plan.template_role,
        "vocabulary": plan.parity.vocabulary.as_dict(),
        "mended": [dataclasses.asdict(m) for m in plan.parity.of_severity("mended")],
        "notices": [dataclasses.asdict(m) for m in plan.parity.of_severity("notice")],
    }


def describe_outcome(report: MergeReport) -> str:
    """How many tensors were slerped, lerped and copied, and why some were not slerped."""
    result = report.result
    reasons: dict[str, int] = {}
    for merged in result.tensors:
        if merged.blend.rule == "lerp" and merged.blend.reason:
            reasons[merged.blend.reason] = reasons.get(merged.blend.reason, 0) + 1
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    counts = ", ".join(f"{result.count(r)} {r}ed" for r in ("slerp", "lerp") if result.count(r))
    copied = f"{result.count('copy')} copied" if result.count("copy") else ""
    return ", ".join(part for part in (counts, copied) if part) + (f" (of the lerped: {why})" if why else "")


def render_report(console: Console, report: MergeReport) -> RenderableType:
    """The closing summary: what stands where, how fast it was, what to know, what to do next."""
    from rich.console import Group
    from rich.text import Text

    plan, result = report.plan, report.result
    parameters = format_count(sum(job.element_count for job in plan.jobs))
    speed = format_bytes(plan.child_bytes / max(result.seconds, 1e-9))
    merging = f"{format_seconds(result.seconds)} to merge ({speed}/s)"
    facts = [
        ("child", str(report.child)),
        ("size", f"{parameters} parameters, {format_bytes(plan.child_bytes)}"),
        ("tensors", describe_outcome(report)),
        ("time", f"{merging}, {format_seconds(report.total_seconds)} in all"),
        ("tokenizer", f"from the {plan.tokenizer_role}" if plan.tokenizer_role else "none"),
        *(("mended", f"{m.subject}: {m.consequence}") for m in plan.parity.of_severity("mended")[:MOST_NOTICES]),
    ]
    lines: list[RenderableType] = [fact_table(console, facts), Text()]
    lines += [Text.assemble(mark_of(console, "mended"), " ", displayable(console, check)) for check in report.checks]
    warnings = list(report.warnings[:MOST_NOTICES])
    if len(report.warnings) > MOST_NOTICES:
        warnings.append(f"and {len(report.warnings) - MOST_NOTICES} more; --json lists them all")
    lines += [Text.assemble(mark_of(console, "notice"), " ", displayable(console, warning)) for warning in warnings]
    if (advice := near_parallel_advice(report)) is not None:
        lines.append(Text.assemble(mark_of(console, "notice"), " ", advice))
    return panel(console, Group(*lines), "Done")


def near_parallel_advice(report: MergeReport) -> str | None:
    """Plain words where most tensors were so near each other that SLERP had nothing to follow."""
    recipe, tensors = report.plan.recipe, report.result.tensors
    near = sum(merged.blend.reason == "parallel" for merged in tensors)
    if recipe.base is not None or 2 * near < len(tensors):
        return None
    return (
        f"{near} of {len(tensors)} tensors lie less than {math.degrees(math.acos(recipe.dot_threshold)):.1f} degrees "
        "apart, where SLERP is a straight line. What each parent learned since their common base lies further apart: "
        "to blend that, name the base with --base."
    )


def next_commands(report: MergeReport) -> list[str]:
    """Commands to try the child with, ready to paste."""
    child = repr(str(report.child))
    if report.plan.tokenizer_role and report.plan.primary.architecture.endswith("ForCausalLM"):
        speak = f"pipeline('text-generation', {child})('Once upon a time', max_new_tokens=40)"
        code = f"from transformers import pipeline; print({speak}[0]['generated_text'])"
    else:
        code = f"from transformers import AutoModel; print(AutoModel.from_pretrained({child}))"
    plain = not set('"$`!%\\') & set(code)  # double quotes are understood everywhere, but keep these special
    speak = f'python -c "{code}"' if plain or os.name == "nt" else f"python -c {shlex.quote(code)}"
    folder = shlex.quote(str(report.child))
    return [
        speak,
        f"python llama.cpp/convert_hf_to_gguf.py {folder}",
        f"hf upload {shlex.quote(report.child.name)} {folder}",
    ]


def render_error(console: Console, error: SlerpMergeError) -> RenderableType:
    """Cause, then remedy. Comes last on the screen."""
    from rich.text import Text

    arrow = "→" if is_unicode(console) else "->"
    cause, remedy = displayable(console, error.message), displayable(console, error.hint)
    return Text.assemble(mark_of(console, "blocking"), " ", cause, "\n", (f"{arrow} ", "bold"), remedy)


ANGLE_COLOURS = ((5, "blue"), (15, "cyan"), (30, "green"), (60, "yellow"), (91, "red"), (181, "magenta"))


class LayerStrip:
    """One cell for each layer of the language model, coloured by the angle between the parents there."""

    def __init__(self, names: Iterable[str]) -> None:
        places = Counter(place for name in names if (place := find_layer(name)) is not None)
        stacks = Counter(stack for stack, _ in places.elements())
        self.stack = max(stacks, key=lambda stack: stacks[stack], default=None)
        self.layers = sorted(layer for stack, layer in places if stack == self.stack)
        self.angles: dict[int, list[float]] = {}

    def add(self, event: TensorMerged) -> None:
        """Takes a finished tensor's angle."""
        place = find_layer(event.job.name)
        if place is not None and place[0] == self.stack and event.blend.angle_degrees is not None:
            self.angles.setdefault(place[1], []).append(event.blend.angle_degrees)

    def render(self, console: Console) -> Text:
        """The strip, in as many cells as there is room for; where there is no Unicode, an angle's tens."""
        from rich.text import Text

        count = min(len(self.layers), max(10, console.width - 12))
        text = Text("layers  " if count else "", style="dim", no_wrap=True)
        for cell in range(count):
            part = self.layers[cell * len(self.layers) // count : (cell + 1) * len(self.layers) // count]
            angles = [angle for layer in part for angle in self.angles.get(layer, ())]
            if not angles:
                text.append("·" if is_unicode(console) else ".")
                continue
            mean = sum(angles) / len(angles)
            colour = next(colour for limit, colour in ANGLE_COLOURS if mean < limit)
            text.append("█" if is_unicode(console) else str(min(int(mean / 10), 9)), style=f"not dim {colour}")
        return text


# ── §14b  What was measured: maps, curves, tables ───────────────────────────────────────────────

MAP_CELL_COLUMNS = 7  # of a cell at most; narrower where there are many
PLOT_ROWS = 9
ROLES = ("primary", "secondary", "child")


def render_map(console: Console, found: DifferenceMap) -> RenderableType:
    """Two heat maps, layer by component: angles, then norm ratios; then the tensors outside layers."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for number, scale in enumerate(map_scales(found)):
        lines: list[RenderableType] = []
        for grid in found.grids:
            if len(found.grids) > 1:
                lines.append(Text(displayable(console, grid.stack), style="bold"))
            lines += draw_grid(console, grid, scale)
        for name, cell in found.outside:
            lines.append(
                Text.assemble(draw_cell(console, cell, scale, MAP_CELL_COLUMNS), " ", displayable(console, name))
            )
        title = f"{scale.title}: {scale.ends}"
        parts += [panel(console, Group(*lines), title)] if number or lines else []
    return Group(*parts)


def draw_grid(console: Console, grid: MapGrid, scale: MapScale) -> list[Text]:
    """A line for the headings and one for each layer. Headings that are too long are numbers, told below."""
    from rich.text import Text

    room = min(console.width, WIDEST_PANEL) - 10
    width = max(3, min(MAP_CELL_COLUMNS, room // max(1, len(grid.components))))
    numbered = any(len(name) >= width for name in grid.components)
    heads = [str(number) if numbered else name for number, name in enumerate(grid.components, 1)]
    lines = [Text("layer ".rjust(6) + "".join(f"{head:^{width}}" for head in heads), style="bold", no_wrap=True)]
    for layer, cells in grid.rows:
        line = Text(f"{layer:>5} ", no_wrap=True)
        for cell in cells:
            line.append_text(draw_cell(console, cell, scale, width))
        lines.append(line)
    if numbered:
        legend = "  ".join(f"{number} {name}" for number, name in enumerate(grid.components, 1))
        lines.append(Text(displayable(console, legend), style="dim"))
    return lines


def draw_cell(console: Console, cell: MapCell, scale: MapScale, width: int) -> Text:
    """A value on its colour, in as many digits as there is room for."""
    from rich.text import Text

    value = scale.value(cell)
    if value is None:
        return Text(f"{'·' if is_unicode(console) else '.':^{width}}", style="dim")
    text = scale.text(value)
    if len(text) >= width:
        text = text[:width].rstrip(".") if "." in text[:width] else "99+"[:width]
    colour = scale.colour(value)
    return Text(f"{text:^{width}}", style=f"{ink_on(colour)} on rgb({','.join(map(str, colour))})")


def render_tastes(console: Console, entries: Iterable[Mapping[str, Any]]) -> RenderableType:
    """The answers to each prompt side by side, or one below the other where it is narrow."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for entry in entries:
        answers = {role: displayable(console, text) or "(nothing)" for role, text in entry["answers"].items()}
        if console.width < NARROW_COLUMNS:
            lines = [Text.assemble((f"{role}: ", "bold"), text) for role, text in answers.items()]
            content: RenderableType = Group(*lines)
        else:
            content = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
            for role in answers:
                content.add_column(role, ratio=1, overflow="fold")
            content.add_row(*map(Text, answers.values()))
        measured = Text(displayable(console, entry["measured"]), style="dim")
        parts.append(panel(console, Group(content, measured), displayable(console, shorten(entry["prompt"], 70))))
    return Group(*parts)


def figure_table(console: Console, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of figures, right-aligned but for its first column."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(displayable(console, cell)) for cell in row))
    return table


def with_noise(console: Console, value: float, noise: float | None, form: str = ".4f") -> str:
    """A figure with its standard error, where that is known."""
    sign = "±" if is_unicode(console) else "+-"
    return f"{value:{form}}" if noise is None else f"{value:{form}} {sign} {noise:.4f}"


def render_perplexities(console: Console, entries: Iterable[Mapping[str, Any]]) -> RenderableType:
    """How well parents and child predict each text, and what the differences are worth."""
    from rich.console import Group
    from rich.text import Text

    parts = []
    for entry in entries:
        rows = [
            (
                model["role"],
                f"{model['tokens']:,}",
                f"{model['perplexity']:.4f}",
                with_noise(console, model["bits_per_byte"], model["noise"]),
            )
            for model in entry["models"]
        ]
        lines: list[RenderableType] = [figure_table(console, ("model", "tokens", "perplexity", "bits per byte"), rows)]
        for role, difference in entry["child_against"].items():
            amount, noise = difference["bits_per_byte"], difference["noise"]
            word = "better" if amount < 0 else "worse"
            if noise is None or abs(amount) <= 2 * noise:
                word = "not to be told apart" if noise is not None else f"{word}, as far as so short a text tells"
            shown = with_noise(console, amount, noise, "+.4f")
            lines.append(Text(f"child against {role}: {shown} bits per byte: {word}"))
        lines.append(Text(displayable(console, entry["measured"]), style="dim"))
        parts.append(panel(console, Group(*lines), f"Perplexity on {displayable(console, entry['text'])}"))
    return Group(*parts)


def render_scores(console: Console, entries: Iterable[Mapping[str, Any]]) -> RenderableType:
    """The harness's figures for all three, and what the child's differences are worth."""
    from rich.console import Group
    from rich.text import Text

    parts = []
    for entry in entries:
        lines: list[RenderableType] = []
        rows = [
            (row["task"], row["metric"], *(with_noise(console, *row["figures"][role]) for role in ROLES))
            for row in entry["rows"]
        ]
        lines.append(figure_table(console, ("task", "metric", *ROLES), rows))
        for row in entry["rows"]:
            for role, verdict in zip(ROLES, row["verdicts"]):
                lines.append(Text(displayable(console, f"{row['metric']}, child against {role}: {verdict}")))
        lines.append(Text(displayable(console, entry["measured"]), style="dim"))
        parts.append(panel(console, Group(*lines), "Scores"))
    return Group(*parts)


def render_sweep(console: Console, entry: Mapping[str, Any]) -> RenderableType:
    """The curve over t, one for each text or task and one for their mean; both parents are its ends."""
    from rich.console import Group
    from rich.text import Text

    trials, names = entry["trials"], list(entry["names"])
    curves = [(name, [trial["values"][place] for trial in trials]) for place, name in enumerate(names)]
    if len(names) > 1 and entry["less_is_better"]:
        curves.append(("mean of all", [trial["loss"] for trial in trials]))
    lines: list[RenderableType] = []
    for number, (name, values) in enumerate(curves):
        lines.append(Text(displayable(console, f"{name}, {entry['unit']}"), style="bold"))
        noise = [trial["noise"] if number == len(curves) - 1 else None for trial in trials]
        lines += [Text(line, no_wrap=True) for line in draw_plot(console, trials, values, noise, entry["best_t"])]
    marks = (
        "● child  ◆ best  ■ parent  │ noise against the best" if is_unicode(console) else "o child  # best  @ parent"
    )
    lines += [Text(marks, style="dim"), Text(displayable(console, entry["verdict"]))]
    lines.append(Text(displayable(console, entry["measured"]), style="dim"))
    return panel(console, Group(*lines), f"A good t: {entry['best_t']:g}")


def draw_plot(
    console: Console,
    trials: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    noise: Sequence[float | None],
    best_t: float,
) -> list[str]:
    """Values over t as rows of characters, with their scale at the left and t below."""
    marks = {"child": "●", "best": "◆", "parent": "■", "noise": "│"}
    marks = marks if is_unicode(console) else {"child": "o", "best": "#", "parent": "@", "noise": "|"}
    width = max(24, min(console.width, WIDEST_PANEL) - 18)
    low, high = min(values), max(values)
    cells = [[" "] * width for _ in range(PLOT_ROWS)]

    def row_of(value: float) -> int:
        share = (high - value) / (high - low) if high > low else 0.5
        return min(max(round(share * (PLOT_ROWS - 1)), 0), PLOT_ROWS - 1)

    places = [round(trial["t"] * (width - 1)) for trial in trials]
    for place, value, error in zip(places, values, noise):
        if error is not None:
            for row in range(row_of(value + error), row_of(value - error) + 1):
                cells[row][place] = marks["noise"]
    for trial, place, value in zip(trials, places, values):
        kind = "parent" if trial["role"] != "child" else "best" if trial["t"] == best_t else "child"
        cells[row_of(value)][place] = marks[kind]
    lines = []
    for number, row in enumerate(cells):
        label = f"{high - number * (high - low) / (PLOT_ROWS - 1):9.4f} " if number % 4 == 0 else " " * 10
        lines.append(label + "".join(row).rstrip())
    ticks = [" "] * (width + 2)
    for t in (0, 0.25, 0.5, 0.75, 1):
        text = f"{t:g}"
        start = min(round(t * (width - 1)), width + 1 - len(text))
        ticks[start : start + len(text)] = text
    return [*lines, " " * 10 + "".join(ticks).rstrip()]


class MergeView:
    """Turns events into a live picture on a terminal, and into plain lines elsewhere."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.live: Any = None
        self.progress: Any = None
        self.task: Any = None
        self.total_bytes = 0
        self.merged_bytes = 0
        self.next_percent = PLAIN_STEP_PERCENT
        self.line = ""
        self.strip = LayerStrip(())
        self.work: Any = None  # the bar of work beside a merge
        self.work_task: Any = None

    def __enter__(self) -> MergeView:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def observe(self, event: Event) -> None:
        """Takes any event; those that mean nothing to the eye are let pass."""
        if self.quiet:
            return
        if isinstance(event, PlanReady):
            self.total_bytes = event.plan.child_bytes
            self.strip = LayerStrip(job.name for job in event.plan.jobs)
        elif isinstance(event, MergeResumed) and event.kept:
            self.console.print(f"Carrying on: {event.kept} of {event.total} files stand already.", highlight=False)
        elif isinstance(event, DeviceChosen):
            self.start(event)
        elif isinstance(event, BytesMerged):
            self.advance(event.byte_count)
        elif isinstance(event, TensorMerged):
            self.line = describe_tensor(event)
            self.strip.add(event)
        elif isinstance(event, WorkBegan):
            self.begin_work(event)
        elif isinstance(event, WorkAdvanced):
            self.advance_work(event.amount)
        elif isinstance(event, Noted):
            self.console.print(displayable(self.console, event.text), style="dim", highlight=False, markup=False)
        elif isinstance(event, (ChildVerified, WorkEnded)):
            self.stop()

    def begin_work(self, event: WorkBegan) -> None:
        """A bar for work beside a merge; a line where there is no terminal."""
        self.stop()
        self.work = self.work_task = None
        if not self.console.is_terminal:
            self.console.print(f"{event.what} ...", highlight=False, markup=False)
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.work = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
            transient=True,
            refresh_per_second=REFRESHES_PER_SECOND,
        )
        self.work_task = self.work.add_task(event.what, total=event.total)
        self.live = self.work
        self.work.start()

    def advance_work(self, amount: int) -> None:
        if self.work is not None:
            self.work.advance(self.work_task, amount)

    def start(self, event: DeviceChosen) -> None:
        self.console.print(f"Merging on {event.device}: {event.reason}.", style="dim", highlight=False, markup=False)
        if not self.console.is_terminal:
            return
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
        )
        self.task = self.progress.add_task("", total=self.total_bytes, speed="")
        self.live = Live(
            console=self.console, get_renderable=self.render, refresh_per_second=REFRESHES_PER_SECOND, transient=True
        )
        self.live.start()

    def advance(self, byte_count: int) -> None:
        self.merged_bytes += byte_count
        if self.progress is not None:
            self.progress.update(self.task, completed=self.merged_bytes)
            return
        percent = 100 * self.merged_bytes // max(self.total_bytes, 1)
        if percent >= self.next_percent:
            self.next_percent = percent - percent % PLAIN_STEP_PERCENT + PLAIN_STEP_PERCENT
            text = f"{percent:3d} %  {format_bytes(self.merged_bytes)} of {format_bytes(self.total_bytes)}"
            self.console.print(text, highlight=False, markup=False)

    def render(self) -> RenderableType:
        """The live picture: a bar over all bytes, and the tensor at hand."""
        from rich.console import Group
        from rich.text import Text

        speed = self.progress.tasks[0].speed
        self.progress.update(self.task, speed=f"{format_bytes(speed)}/s" if speed else "")
        overflow = "ellipsis" if is_unicode(self.console) else "crop"
        line = Text(displayable(self.console, self.line), style="dim", no_wrap=True, overflow=overflow)
        return Group(self.progress.get_renderable(), self.strip.render(self.console), line)

    def stop(self) -> None:
        if self.live is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone needs no tidying
                self.live.stop()
            self.live = None


def describe_tensor(event: TensorMerged) -> str:
    """One line for the tensor at hand: its name, rule and angle."""
    blend = event.blend
    angle = f", {blend.angle_degrees:.2f}°" if blend.angle_degrees is not None else ""
    reason = f" ({blend.reason})" if blend.reason else ""
    return f"{event.job.name}  {blend.rule}{reason}{angle}"


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §15  Wizard (questionary)
# ════════════════════════════════════════════════════════════════════════════════════════════════

BLENDS = (
    ("even", "0.5", "both parents alike"),
    ("lean to primary", "0.3", "more of the primary"),
    ("lean to secondary", "0.7", "more of the secondary"),
    (
        "attention and mlp",
        "self_attn=0,0.5,0.3,0.7,1 mlp=1,0.5,0.7,0.3,0 0.5",
        "attention one way, MLP the other: the well-known gradient",
    ),
    ("primary at the ends", "0,0.5,1,0.5,0", "secondary in the middle"),
    ("secondary at the ends", "1,0.5,0,0.5,1", "primary in the middle"),
    ("ramp", "0,0.1,0.5,0.9,1", "from primary to secondary, smoothly"),
)
OTHER_BLENDS = (
    ("a number", "or a gradient of your own, such as 0,0.5,1"),
    ("filter=gradient ...", "one for each component, such as self_attn=0,1 mlp=1,0 0.5"),
    ("task vectors", "blend what each parent learned since a common base"),
    ("find a good blend", "on a text of yours: tries several, and makes the best"),
    ("a recipe file", "its path, ending in .yaml or .yml"),
)
TASK_VECTORS = "task vectors"
FIND_BLEND = "find a good blend"
BLEND_HELP = "Say a name from the list, such as even, or a number: 0 is the primary alone, 1 the secondary alone"


def parse_number(text: str) -> float:
    """A number. Raises SlerpMergeError, in words for the prompt."""
    try:
        t = float(text)
    except ValueError:
        t = math.nan
    if not math.isfinite(t):
        raise SlerpMergeError(f"{text!r} is not a number.", f"{BLEND_HELP}.")
    return t


def parse_rule(text: str) -> ScheduleRule:
    """`0.5`, a gradient `0,0.5,1`, or either for names that hold a text: `self_attn=0,1`."""
    name_filter, equals, values = text.rpartition("=")
    if equals and not name_filter:
        raise SlerpMergeError(f"{text!r} has no name before the =.", "Write it like self_attn=0,0.5,1.")
    return ScheduleRule(tuple(parse_number(part.strip()) for part in values.split(",")), name_filter or "*")


def order_rules(rules: Iterable[ScheduleRule]) -> Schedule:
    """Filters as they were given, then the bare value, which is for the rest."""
    rules = list(rules)
    if sum(rule.name_filter == "*" for rule in rules) > 1:
        raise SlerpMergeError("There are two values for the rest of the tensors.", "A gradient has commas: 0.5,0.6.")
    return Schedule(tuple(sorted(rules, key=lambda rule: rule.name_filter == "*")))


def parse_blend(text: str) -> Schedule:
    """An answer to `Blend`: a blend's name or the beginning of one, a number, a gradient, or filters with theirs."""
    wanted = " ".join(text.lower().split())
    matches = [name for name, _, _ in BLENDS if wanted and name.startswith(wanted)]
    if len(matches) > 1:
        raise SlerpMergeError(f"{text!r} could be {' or '.join(matches)}.", "Type more of it.")
    named = [meaning for name, meaning, _ in BLENDS if name in matches]
    rules = [parse_rule(part) for part in (named[0] if len(named) == 1 else text).split()]
    schedule = order_rules(rules)
    for t in schedule.values():
        if not 0 <= t <= 1:
            raise SlerpMergeError(f"{t:g} is not a number from 0 to 1.", f"{BLEND_HELP}.")
    if not rules or schedule.rules[-1].name_filter != "*":
        raise SlerpMergeError(f"{text!r} leaves out the other tensors.", "Add a value for the rest, such as 0.5.")
    return schedule


def answer_check(check: Callable[[Any], object]) -> Callable[[Any], bool | str]:
    """A validator for a prompt from a function that raises: the answer stays, its reason is shown below."""

    def validate(answer: Any) -> bool | str:
        try:
            check(answer)
        except SlerpMergeError as error:
            width = max(20, shutil.get_terminal_size().columns - 2)
            return textwrap.fill(printable(f"{error.message} {error.hint}"), width, break_on_hyphens=False)
        return True

    return validate


def proposed_save_directory(primary: Path, secondary: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """A readable name under the current folder that is not taken yet: of both parents, and of the blend if given."""
    whole = [public_name(folder.resolve(), {}).rpartition("/")[2] for folder in (primary, secondary)]
    names = [re.sub(r"[^\w.-]+", "-", name) or "model" for name in whole]
    settings = settings or {}
    blend = [settings.get("method", "slerp")]
    if (schedule := settings.get("schedule")) is not None and len(list(schedule.values())) == 1:
        blend.append(f"{next(schedule.values()):g}")
    first = "-".join([*names, *blend])
    numbered = (Path(f"{first}-{number}") for number in range(2, 1000))
    return next(path for path in (Path(first), *numbered) if not path.exists())


def check_fit(primary_folder: Path, secondary_folder: Path) -> None:
    """Raises SlerpMergeError, short enough for a prompt, where a second parent cannot be merged with the first."""
    secondary = open_checkpoint(secondary_folder)
    blocking = check_parity(open_checkpoint(primary_folder), secondary).of_severity("blocking")
    if blocking:
        first = blocking[0]
        more = f" And {len(blocking) - 1} more." if len(blocking) > 1 else ""
        raise SlerpMergeError(
            f"It does not fit the primary: {first.subject} is {first.secondary}, not {first.primary}.{more}",
            first.consequence,
        )


def check_fit_of_base(primary_folder: Path, base_folder: Path) -> None:
    """Raises SlerpMergeError where a model cannot be what the parents were fine-tuned from."""
    reason = misfit(open_checkpoint(primary_folder), open_checkpoint(base_folder))
    if reason is not None:
        raise SlerpMergeError(f"It is no base of the primary: {reason}.", "Give the model both were fine-tuned from.")


def check_recipe_parents(fields: dict[str, Any], parents: tuple[Path, Path]) -> dict[str, Any]:
    """A recipe's fields, where it merges the parents that were answered. Raises SlerpMergeError where it does not."""
    named = fields["primary"], fields["secondary"]
    if [folder.resolve() for folder in named] != [folder.resolve() for folder in parents]:
        raise SlerpMergeError(
            f"The recipe has {named[0]} at t = 0 and {named[1]} at t = 1, not the models you gave.",
            "Run it as it is with --recipe, or answer with another blend.",
        )
    return fields


FOUND_LEVELS = 2  # folders below the current one that are looked into for models
FOUND_ENTRIES = 2000  # entries of folders that are looked at, at most


class ModelFinder:
    """Looks, in the background, for models on this machine: last used places, folders hereabouts, the hub's cache."""

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = places
        self.found: list[Checkpoint] = []
        self.primary: Path | None = None  # once it is answered, what fits it comes first
        self._misfits: dict[tuple[Path, Path], str | None] = {}
        self._thread = threading.Thread(target=self._look, name="finder", daemon=True)

    def start(self) -> None:
        """Begins to look; the person reads and types meanwhile."""
        self._thread.start()

    def _look(self) -> None:
        seen = set()
        for folder in self._folders():
            with contextlib.suppress(OSError, SlerpMergeError):
                real = folder.resolve()
                if real not in seen and (folder / "config.json").is_file():
                    seen.add(real)
                    if (checkpoint := open_if_whole(folder)) is not None:
                        self.found.append(checkpoint)
                        self.misfit_of(checkpoint)

    def _folders(self) -> Iterator[Path]:
        yield from self.places
        yield from folders_below(Path(), FOUND_LEVELS)
        yield from folders_below(Path("models"), FOUND_LEVELS)
        from huggingface_hub import constants, scan_cache_dir

        cache = Path(constants.HF_HUB_CACHE)
        if not cache.is_dir():
            return
        try:
            repositories = scan_cache_dir(cache).repos
        except Exception:  # whatever is wrong with a cache, a model in it can still be typed
            return
        for repository in sorted(repositories, key=lambda repository: repository.repo_id):
            if repository.repo_type == "model":
                snapshots = sorted(repository.revisions, key=lambda revision: -revision.last_modified)
                whole = (revision.snapshot_path for revision in snapshots if open_if_whole(revision.snapshot_path))
                yield from itertools.islice(whole, 1)

    def misfit_of(self, checkpoint: Checkpoint) -> str | None:
        """Why a found model cannot be merged with the primary; None where it can, or where there is no primary yet."""
        if self.primary is None:
            return None
        key = self.primary, checkpoint.folder
        if key not in self._misfits:
            primary = open_if_whole(self.primary)
            self._misfits[key] = misfit(primary, checkpoint) if primary is not None else None
        return self._misfits[key]

    def offers(self, text: str) -> list[tuple[str, str]]:
        """(what to type, what it is) of found models whose name holds `text`; those that fit the primary first."""
        offers = []
        for checkpoint in list(self.found):
            name, reason = short_name(checkpoint.folder), self.misfit_of(checkpoint)
            if text.lower() in name.lower():
                count, size = format_count(checkpoint.parameter_count), format_bytes(checkpoint.byte_count)
                size = f"{count} {checkpoint.dtypes[0]} {size}"
                offers.append((reason is not None, name, f"{reason}; {size}" if reason else size))
        return [(name, what) for _, name, what in sorted(offers)]


def short_name(folder: Path) -> str:
    """The shortest text that finds a model again: org/name in the cache, a path from here, or its whole path."""
    name = public_name(folder, {})
    if folder.parent.name == "snapshots" and HUB_NAME.fullmatch(name) and find_model(name) == folder:
        return name
    with contextlib.suppress(ValueError):
        return str(folder.resolve().relative_to(Path.cwd()))
    return str(folder)


MOST_COLUMNS_OF_A_NAME = 40  # in a menu, so that what stands beside it has room


def shortened(name: str) -> str:
    """A name for a menu, its middle left out where it is long."""
    half = MOST_COLUMNS_OF_A_NAME // 2
    return name if len(name) <= MOST_COLUMNS_OF_A_NAME else f"{name[: half - 1]}...{name[2 - half :]}"


def folders_below(folder: Path, levels: int) -> Iterator[Path]:
    """A folder, and the folders below it down to some levels; hidden ones are left out."""
    if not folder.is_dir():
        return
    yield folder
    if levels:
        with contextlib.suppress(OSError):
            for path in sorted(itertools.islice(folder.iterdir(), FOUND_ENTRIES)):
                if path.is_dir() and not path.name.startswith("."):
                    yield from folders_below(path, levels - 1)


def model_completer(finder: ModelFinder | None) -> Completer:
    """Completes paths, and where there is a finder the models that it found."""
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.document import Document
    from questionary.prompts.path import GreatUXPathCompleter

    paths = GreatUXPathCompleter(only_directories=True, expanduser=True)

    class ModelCompleter(Completer):
        def get_completions(self, document: Any, event: Any) -> Iterator[Any]:
            text = document.text_before_cursor
            bare = text[1:] if text[:1] in ("'", '"') else text  # a quote before a pasted path
            offers = finder.offers(bare) if finder is not None else []
            for name, what in offers:
                yield Completion(name, -len(text), display=shortened(printable(name)), display_meta=printable(what))
            for path in paths.get_completions(Document(bare), event):
                whole = (bare[: len(bare) + path.start_position] + path.text).rstrip("/\\")
                is_hidden = Path(whole).name.startswith(".") and not bare.rpartition("/")[2].startswith(".")
                if whole not in dict(offers) and not is_hidden:
                    yield path

    return ModelCompleter()


def settings_folder() -> Path:
    """Where this person's programs keep their settings, as the system has it."""
    if os.name == "nt":
        base = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "slerpmerge"


class Memory:
    """The folders and the blend of the last merge, to be offered again. Nothing else, and nowhere else."""

    most_places = 12

    def __init__(self) -> None:
        self.path = settings_folder() / "settings.json"
        try:
            self.content = read_json_if_there(self.path)
        except SlerpMergeError:  # a torn file is no loss
            self.content = {}

    def folder(self, name: str) -> Path | None:
        """A remembered folder, where it is still there."""
        value = self.content.get(name)
        return Path(value) if isinstance(value, str) and Path(value).is_dir() else None

    @property
    def places(self) -> list[Path]:
        """Models used of late, the last first."""
        values = self.content.get("places")
        return [Path(value) for value in values if isinstance(value, str)] if isinstance(values, list) else []

    def remember(self, recipe: MergeRecipe, blend: str | None) -> None:
        """Keeps what a merge was made of. A disk that does not take it is no reason to stop."""
        used = [folder.resolve() for folder in (recipe.primary, recipe.secondary)]
        places = [*used, recipe.save_directory.resolve(), *(place for place in self.places if place not in used)]
        content = {
            "primary": str(used[0]),
            "secondary": str(used[1]),
            "blend": blend or self.content.get("blend"),
            "places": list(dict.fromkeys(map(str, places)))[: self.most_places],
        }
        with contextlib.suppress(OSError, SlerpMergeError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, content)

    def forget(self) -> bool:
        """Removes what was remembered; whether there was anything."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True


HELP = {
    "primary": "The model at t = 0. Its config, names and dtype are the child's. Give its folder, or the"
    " org/name of one in the Hugging Face cache; Tab lists what was found here.",
    "secondary": "The model at t = 1: best another fine-tune of the same base. Tab lists what fits the primary first.",
    "save_directory": "A new folder for the child. It appears there whole and checked, or not at all.",
    "blend": "How much of the secondary each layer gets. A name from the list; a number from 0 to 1; a gradient such as"
    " 0,0.5,1; filters such as self_attn=0,1 mlp=1,0 0.5; task vectors; or a recipe file.",
    "start": "y starts, n leaves, c changes an answer and keeps the rest, i inspects how the parents differ, s saves"
    " the merge as a recipe and leaves.",
    "text": "A text file that a good child should predict well: some pages, such as neither parent was trained on. With"
    " a second one, for the other parent's skill, the best balance is sought.",
    "next": "t lets parents and child answer the same prompts side by side, p compares how well they predict a text"
    " file; what is found joins the child's card. Enter leaves.",
    "prompt": "A question, or the beginning of a sentence. Each model answers it; Enter alone begins.",
    "change": "Say which answer to give anew; the others stay as they are.",
    "confirm": "Type y or n; Enter alone takes the one in capitals.",
    "base": "The model that both parents were fine-tuned from.",
    "recipe": "Where the recipe goes; --recipe reads it again, and mergekit understands it.",
}
ANSWER_NAMES = {"primary": "primary", "secondary": "secondary", "save_directory": "save directory", "schedule": "blend"}


class Wizard:
    """Asks what no flag has answered. Merges nothing."""

    def __init__(self, console: Console, memory: Memory, on_first_prompt: Callable[[], object]) -> None:
        self.console = console
        self.memory = memory
        self.finder = ModelFinder(memory.places)
        self.on_first_prompt = on_first_prompt
        self.asked = False
        self.blend_text: str | None = None  # the last answer to Blend, as it was typed
        self.proposed: Path | None = None  # the last proposed save directory

    def ask(self, question: Any) -> Any:
        """The answer. Raises KeyboardInterrupt on Ctrl-C and EOFError on Ctrl-D."""
        self.let_refusals_wrap(question)
        if not self.asked:
            self.asked = True

            def begin() -> None:
                self.finder.start()
                self.on_first_prompt()

            # Models are found and libraries load behind the first prompt's back, once it stands on the screen.
            once = iter([begin])
            question.application.after_render += lambda _: next(once, lambda: None)()
        return question.unsafe_ask()

    @staticmethod
    def let_refusals_wrap(question: Any) -> None:
        """The library shows the reason of a refusal in a single line, cut at the terminal's edge."""
        from prompt_toolkit.filters import to_filter
        from prompt_toolkit.layout import FormattedTextControl

        for window in question.application.layout.find_all_windows():
            if isinstance(window.content, FormattedTextControl) and window.height == 1:
                window.height = None
                window.wrap_lines = to_filter(True)
                window.dont_extend_height = to_filter(True)

    def ask_text(
        self,
        message: str,
        parse: Callable[[str], Any],
        subject: str,  # of HELP
        instruction: str | None = None,
        completer: Completer | None = None,
        check: Callable[[Any], object] = lambda value: None,
    ) -> Any:
        """What `parse` makes of the answer. Where it or `check` raises, that is refused in place. A ? shows help."""
        import questionary

        while True:
            question = questionary.text(
                message,
                completer=completer,
                complete_while_typing=False,
                validate=answer_check(lambda text: text.strip() == "?" or check(parse(text))),
                validate_while_typing=False,
                instruction=instruction,
            )
            answer = self.ask(question)
            if answer.strip() != "?":
                return parse(answer)
            self.say(HELP[subject])

    def ask_folder(
        self,
        message: str,
        subject: str,
        check: Callable[[Path], object],
        default: Path | None = None,
        finder: ModelFinder | None = None,
    ) -> Path:
        """A folder that passes `check`: a model's where there is a finder for models."""

        def parse(text: str) -> Path:
            if not text.strip() and default is None:
                raise SlerpMergeError("A folder is needed.", "Type or paste its path; Tab completes it, ? helps.")
            if not text.strip():
                return default
            return find_model(text) if finder is not None else clean_path(text)

        shown = "Tab lists what is here, ? helps"
        if default is not None:
            shown = short_name(default) if finder is not None else str(default)
        return self.ask_text(message, parse, subject, f"({shown})", model_completer(finder), check)

    def ask_primary(self, default: Path | None) -> dict[str, Any]:
        default = default if default is not None and open_if_whole(default) is not None else None
        return {"primary": self.ask_folder("Primary model", "primary", open_checkpoint, default, self.finder)}

    def ask_secondary(self, primary: Path, default: Path | None) -> dict[str, Any]:
        def check(folder: Path) -> None:
            check_fit(primary, folder)

        self.finder.primary = primary
        if default is not None and (default.resolve() == primary.resolve() or answer_check(check)(default) is not True):
            default = None
        found = self.ask_folder("Secondary model", "secondary", check, default, self.finder)
        if found.resolve() == primary.resolve():
            self.say("  That is the primary itself; the child will be a copy of it.")
        return {"secondary": found}

    def ask_save_directory(self, answers: Mapping[str, Any], default: Path | None) -> dict[str, Any]:
        """The child's folder, and what is to happen to what stands there."""
        parents = answers["primary"], answers["secondary"]
        needed, free = open_checkpoint(parents[0]).byte_count, shutil.disk_usage(existing_folder(Path())).free
        self.say(f"  The child needs about {format_bytes(needed)}; {format_bytes(free)} are free here.")
        self.proposed = proposed_save_directory(*parents, answers)
        proposed = default or self.proposed
        while True:
            folder = self.ask_folder(
                "Save directory",
                "save_directory",
                lambda folder: check_save_directory(folder, parents, overwrite=True),
                proposed,
            )
            stands = folder.is_dir() and any(folder.iterdir())
            if stands and not answers.get("overwrite"):
                if not self.confirm(f"{folder} holds a model; replace it once the child is whole?", default=False):
                    proposed = self.proposed
                    continue
                return {"save_directory": folder, "overwrite": True}
            unfinished = is_plain_file(staging_area(folder) / JOURNAL_NAME) and "restart" not in answers
            if unfinished and not self.confirm("An unfinished merge stands there. Carry on with it?", default=True):
                return {"save_directory": folder, "restart": True}
            return {"save_directory": folder}

    def ask_blend(self, parents: tuple[Path, Path]) -> dict[str, Any]:
        """The fields of MergeRecipe that a blend decides. What is drawn before it is taken."""
        from prompt_toolkit.completion import WordCompleter

        self.show_blends()
        names = [name for name, _, _ in BLENDS] + [TASK_VECTORS, FIND_BLEND]
        completer: Completer = WordCompleter(names, sentence=True, ignore_case=True)
        default = self.default_blend()

        def parse(text: str) -> tuple[str, dict[str, Any]]:
            text = text.strip() or default
            if len(text) > 1 and TASK_VECTORS.startswith(text.lower()):
                return TASK_VECTORS, {"method": "slerp"}
            if len(text) > 1 and FIND_BLEND.startswith(text.lower()):
                return FIND_BLEND, {}
            if text.strip("'\"").lower().endswith((".yaml", ".yml")):
                return text, check_recipe_parents(read_recipe(clean_path(text)), parents)
            return text, {"schedule": parse_blend(text)}

        while True:
            answer, fields = self.ask_text("Blend", parse, "blend", f"({default})", completer)
            self.blend_text = answer
            if fields == {"method": "slerp"}:
                self.finder.primary = parents[0]
                base = self.ask_folder(
                    "Base model", "base", lambda folder: check_fit_of_base(parents[0], folder), finder=self.finder
                )
                return {"base": base, "schedule": Schedule.constant(0.5)}
            if not fields:
                return {"schedule": Schedule.constant(0.5), "sweep_texts": self.ask_texts()}
            drawn_already = answer.lower() in names
            if drawn_already or "primary" in fields or self.accept_curves(fields["schedule"]):
                return fields

    def ask_texts(self) -> tuple[Path, ...]:
        """One text file to find a blend on, or two for its balance."""
        texts = [self.ask_text_file("Text file")]
        if (second := self.ask_text_file("A second one, for the other parent's skill", optional=True)) is not None:
            texts.append(second)
        return tuple(texts)

    def ask_text_file(self, message: str, optional: bool = False) -> Path | None:
        """A text that can be predicted; None where it may be left out, and was."""
        from questionary.prompts.path import GreatUXPathCompleter

        def parse(text: str) -> Path | None:
            if not text.strip() and not optional:
                raise SlerpMergeError("A text file is needed.", "Type or paste its path; Tab completes it, ? helps.")
            return clean_path(text) if text.strip() else None

        def check(path: Path | None) -> None:
            if path is not None:
                read_judged_text(path)

        shown = "(Enter: none)" if optional else "(Tab completes, ? helps)"
        return self.ask_text(message, parse, "text", shown, GreatUXPathCompleter(expanduser=True), check)

    def ask_next(self) -> str:
        """After a merge: "taste", "perplexity" or "leave"."""
        words = {"t": "taste", "taste": "taste", "p": "perplexity", "perplexity": "perplexity", "": "leave"}

        def parse(text: str) -> str:
            wanted = text.strip().lower()
            if wanted not in words:
                raise SlerpMergeError(f"{text!r} is no answer to this.", HELP["next"])
            return words[wanted]

        return self.ask_text("What now?", parse, "next", "(t taste, p perplexity, Enter leaves, ?)")

    def ask_prompts(self) -> list[str]:
        """Prompts for a taste, until an empty one."""
        prompts: list[str] = []
        while prompt := self.ask_text("Prompt", str.strip, "prompt", "(Enter: begin)" if prompts else "(Enter: none)"):
            prompts.append(prompt)
        return prompts

    def default_blend(self) -> str:
        """The last blend, where it can be used again; else even."""
        last = self.blend_text or self.memory.content.get("blend")
        try:
            if isinstance(last, str) and (last == TASK_VECTORS or parse_blend(last)):
                return last
        except SlerpMergeError:  # from an older version, or a stranger's hand
            pass
        return "even"

    def show_blends(self) -> None:
        """Every blend with its curve over the layers, so that none is taken unseen."""
        from rich.padding import Padding
        from rich.text import Text

        rows = []
        for name, text, meaning in BLENDS:
            curves = schedule_curves(self.console, order_rules(map(parse_rule, text.split())), layers=8)
            drawn = curves[0][1] if len(curves) == 1 else "  ".join(f"{part} {curve}" for part, curve in curves)
            rows.append((f"{name:<22}{drawn}", meaning))
        for line, meaning in [*rows, *((f"{name:<22}", meaning) for name, meaning in OTHER_BLENDS)]:
            text = Text(f"  {line:<32}", style="bold")
            if len(text) + len(meaning) < min(self.console.width, WIDEST_PANEL):
                self.console.print(text.append(f"  {meaning}", style="not bold"))
            else:
                self.console.print(text, Padding(Text(meaning), (0, 0, 0, 6)))

    def accept_curves(self, schedule: Schedule) -> bool:
        for component, curve in schedule_curves(self.console, schedule):
            self.say(f"    {component:<12}{curve}")
        return len(schedule.rules) == 1 and len(schedule.rules[0].gradient) == 1 or self.confirm("Take it?", True)

    def decide(self, default_start: bool) -> str:
        """After the panels: "start", "leave", "change", "inspect" or "save"."""
        words = {"y": "start", "yes": "start", "n": "leave", "no": "leave"}
        words |= {"c": "change", "i": "inspect", "s": "save"}

        def parse(text: str) -> str:
            text = text.strip().lower() or ("y" if default_start else "n")
            if text not in words:
                raise SlerpMergeError(f"{text!r} is no answer to this.", HELP["start"])
            return words[text]

        return self.ask_text("Start the merge?", parse, "start", "(Y/n/c/i/s/?)" if default_start else "(y/N/c/i/s/?)")

    def which_answer(self, names: Sequence[str]) -> str:
        """The field of MergeRecipe to be answered anew."""
        fields = {ANSWER_NAMES[name]: name for name in names}

        def parse(text: str) -> str:
            wanted = " ".join(text.lower().split())
            meant = [field for shown, field in fields.items() if wanted and shown.startswith(wanted)]
            if len(meant) != 1:
                what = "could be more than one of them" if meant else "is none of them"
                raise SlerpMergeError(f"{text!r} {what}.", f"Say {', '.join(fields)}.")
            return meant[0]

        return self.ask_text("Change which answer?", parse, "change", f"({', '.join(fields)})")

    def ask_recipe_file(self) -> Path:
        """Where to save a recipe: a new file."""

        def parse(text: str) -> Path:
            path = clean_path(text) if text.strip() else Path(RECIPE_NAME)
            if path.suffix not in (".yaml", ".yml") or path.exists() or not path.resolve().parent.is_dir():
                raise SlerpMergeError(f"{path} is no new .yaml file in a folder that is there.", "Give another name.")
            return path

        return self.ask_text("Recipe file", parse, "recipe", f"({RECIPE_NAME})")

    def say(self, line: str) -> None:
        self.console.print(line, style="dim", highlight=False, markup=False)

    def confirm(self, message: str, default: bool) -> bool:
        """Yes or no."""

        def parse(text: str) -> bool:
            wanted = text.strip().lower() or ("yes" if default else "no")
            if not ("yes".startswith(wanted) or "no".startswith(wanted)):
                raise SlerpMergeError(f"{text!r} is neither yes nor no.", HELP["confirm"])
            return "yes".startswith(wanted)

        return self.ask_text(message, parse, "confirm", "(Y/n)" if default else "(y/N)")


def ask_answers(preset: Mapping[str, Any], wizard: Wizard, before: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of MergeRecipe: those that `preset` gives, and the person's answers for the rest.

    before: what was answered earlier, or in an earlier run, and is offered again.
    """
    answers = dict(preset)
    if "primary" not in answers:
        answers |= wizard.ask_primary(before.get("primary"))
    if "secondary" not in answers:
        answers |= wizard.ask_secondary(answers["primary"], before.get("secondary"))
    if "save_directory" not in answers:
        answers |= wizard.ask_save_directory(answers, before.get("save_directory"))
    if "schedule" not in answers:
        parents = answers["primary"], answers["secondary"]
        answers = {**wizard.ask_blend(parents), **answers}  # what was answered or given by a flag goes first
    return answers


BLEND_FIELDS = (
    "schedule",
    "weights",
    "normalize",
    "slices",
    "base",
    "method",
    "granularity",
    "recipe_file",
    "cast_dtype",
    "sweep_texts",
)


def without_answer(answers: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The answers that stay where one is to be given anew."""
    gone = {"schedule": BLEND_FIELDS, "save_directory": ("save_directory", "overwrite", "restart")}.get(name, (name,))
    return {key: value for key, value in answers.items() if key not in gone}


# ════════════════════════════════════════════════════════════════════════════════════════════════
# §16  Command line
# ════════════════════════════════════════════════════════════════════════════════════════════════

EXIT_DONE, EXIT_REFUSED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
NOTHING_WRITTEN = "Nothing was written."
CLEANED_UP = "The unfinished child was removed; both parents are as they were."


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or plain bytes. Raises SlerpMergeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise SlerpMergeError(f"{text!r} is not a size.", "Write it like 5GB, 500MB or 2GiB.")
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise SlerpMergeError(f"{text!r} is not a size.", "It is less than a byte.")
    return size


def parse_within(kind: Callable[[str], Any], lowest: float, highest: float, what: str) -> Callable[[str], Any]:
    """A flag's type: a number from `lowest` to `highest`, or wrong usage that says `what` it should be."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def usage_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Lets argparse show a SlerpMergeError of a value's parser as wrong usage of its flag."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except SlerpMergeError as error:
            raise argparse.ArgumentTypeError(f"{error.message} {error.hint}") from error

    return convert


def parse_prompt(text: str) -> str:
    """A prompt. Raises SlerpMergeError where it is empty, or no text."""
    if not text.strip() or not is_utf8(text):
        raise SlerpMergeError("The prompt is empty, or not UTF-8.", "Give a question, or the beginning of a sentence.")
    return text


def parse_map_path(text: str) -> Path:
    """A file for a map. Raises SlerpMergeError where its ending names no format."""
    path = clean_path(text)
    if path.suffix.lower() not in (".svg", ".json"):
        raise SlerpMergeError(f"{text!r} ends neither in .svg nor in .json.", "The ending says what is saved.")
    return path


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its help."""
    parser = argparse.ArgumentParser(
        prog="slerpmerge.py",
        description="Merge two language-model checkpoints by spherical linear interpolation (SLERP). "
        "What no flag gives is asked for.",
        epilog="Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.",
    )
    add = parser.add_argument
    folder, model = usage_type(clean_path), usage_type(find_model)
    add("--primary", type=model, metavar="FOLDER", help="the primary model (t = 0)")
    add("--secondary", type=model, metavar="FOLDER", help="the secondary model (t = 1)")
    add("--save-dir", dest="save_directory", type=folder, metavar="FOLDER", help="where the child goes")
    add("--recipe", type=folder, metavar="FILE", help="a mergekit recipe: slerp, nuslerp or linear of two models")
    add("--base", type=model, metavar="FOLDER", help="blend what both parents learned since this model")
    add("--t", dest="rules", type=usage_type(parse_rule), action="append", metavar="[FILTER=]T",
        help="0 to 1, or a comma list: a gradient over the layers; again with a filter for tensors whose name "
        "holds it (default 0.5)")  # fmt: skip
    add("--extrapolate", action="store_true", default=None, help="allow t outside 0 to 1")
    add("--method", choices=METHODS, help="default slerp; slerp-norm also interpolates the norms")
    add("--granularity", choices=GRANULARITIES, help="what nuslerp takes as one vector (default tensor)")
    cosine = parse_within(float, sys.float_info.min, 1, "a cosine above 0, up to 1")
    norm = parse_within(float, 0, sys.float_info.max, "a norm from 0 on")
    add("--dot-threshold", type=cosine, metavar="COSINE", help=f"straight line above this (default {COLINEAR_DOT})")
    add("--epsilon", type=norm, metavar="NORM", help=f"a smaller norm counts as zero (default {TINY_NORM:g})")
    add("--dtype", choices=CHILD_DTYPES, help="of the child (default auto: the primary's)")
    add("--max-shard-size", dest="max_shard_bytes", type=usage_type(parse_size), metavar="SIZE", help="default 5GB")
    add("--tokenizer", choices=TOKENIZER_CHOICES, help="whose tokenizer the child gets; union: with the other's tokens")
    add("--chat-template", choices=TEMPLATE_CHOICES[1:], help="whose it gets (default: the tokenizer's)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="where the arithmetic runs (default auto)")
    count = parse_within(int, 1, 1024, "a number of threads from 1 on")
    add("--threads", type=count, metavar="N", help=f"default: the cores, up to {MAX_THREADS}")
    add("--inspect", action="store_true", help="measure how the parents differ, layer by component; write no child")
    add("--map", dest="maps", type=usage_type(parse_map_path), action="append", default=[], metavar="FILE",
        help="save that map as FILE, .svg or .json")  # fmt: skip
    add("--taste", dest="prompts", type=usage_type(parse_prompt), action="append", default=[], metavar="PROMPT",
        help="let parents and child answer it side by side; may be given again")  # fmt: skip
    add("--perplexity", dest="texts", type=folder, action="append", default=[], metavar="FILE",
        help="compare how well parents and child predict a text; may be given again")  # fmt: skip
    add("--score", dest="tasks", metavar="TASKS", help="evaluate all three on tasks of lm-eval, separated by commas")
    add("--include-path", type=folder, metavar="FOLDER", help="where YAML tasks of your own for --score are")
    add("--sweep", action="store_true", help="find t by the --perplexity texts, or else the --score tasks, and make it")
    add("--child", type=folder, metavar="FOLDER", help="taste, measure or score a child that stands already")
    add("--dry-run", action="store_true", help="check and plan, write nothing")
    add("--yes", action="store_true", help="take every default and start without asking")
    add("--overwrite", action="store_true", default=None, help="replace a model that stands in the save directory")
    add("--restart", action="store_true", default=None, help="discard what an earlier run left unfinished")
    add("--verify", choices=("quick", "full"), help="full: also load the child with transformers")
    add("--json", action="store_true", help="print the report as one JSON object, alone on stdout")
    add("--quiet", action="store_true", help="say nothing but errors")
    add("--no-color", action="store_true", help="no colours; the environment's NO_COLOR does the same")
    add("--forget", action="store_true", help="forget the folders and answers of earlier runs")
    add("--demo", action="store_true", help="make two tiny models, merge them and let the child speak")
    add("--version", action="version", version=f"slerpmerge {__version__}")
    return parser


def recipe_of(answers: Mapping[str, Any]) -> MergeRecipe:
    """The recipe that answers and flags make; what only a sweep asks for is left out."""
    return MergeRecipe(**{name: value for name, value in answers.items() if name != "sweep_texts"})


JUDGEMENT_FLAGS = {"taste": "prompts", "perplexity": "texts", "score": "tasks", "map": "maps"}
CLASHING_FLAGS = {
    "inspect": {"child", "demo", "sweep", "dry_run", "taste", "perplexity", "score"},
    "child": {"demo", "sweep", "dry_run", "map"},
    "demo": {"sweep", "dry_run", "taste", "perplexity", "score", "map"},
    "dry_run": {"map"},
}
RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(MergeRecipe))
ANSWER_FLAGS = {"primary": "--primary", "secondary": "--secondary", "save_directory": "--save-dir", "schedule": "--t"}


def equivalent_command(recipe: MergeRecipe, more: Sequence[str] = ()) -> str:
    """The command line that does the same without asking, ready to paste."""
    defaults = MergeRecipe(recipe.primary, recipe.secondary, recipe.save_directory)
    words = ["--save-dir", str(recipe.save_directory)]
    if recipe.recipe_file is not None:
        words += ["--recipe", str(recipe.recipe_file)]
        defaults = dataclasses.replace(defaults, **read_recipe(recipe.recipe_file))
    else:
        words = ["--primary", short_name(recipe.primary), "--secondary", short_name(recipe.secondary), *words]
        for rule in () if "--sweep" in more else recipe.schedule.rules:
            values = ",".join(map(shortest_number, rule.gradient))
            words.append(f"--t={values}" if rule.name_filter == "*" else f"--t={rule.name_filter}={values}")
        words += ["--base", short_name(recipe.base)] if recipe.base is not None else []
    flags = ("method", "granularity", "dtype", "dot_threshold", "epsilon", "max_shard_bytes", "tokenizer",
             "chat_template", "device", "threads")  # fmt: skip
    for name in flags:
        value = getattr(recipe, name)
        if value != getattr(defaults, name):
            flag = "max-shard-size" if name == "max_shard_bytes" else name.replace("_", "-")
            words += [f"--{flag}", shortest_number(value) if isinstance(value, float) else str(value)]
    words += [f"--{name}" for name in ("extrapolate", "overwrite", "restart") if getattr(recipe, name)]
    quote = shlex.quote if os.name != "nt" else lambda word: f'"{word}"' if " " in word else word
    return " ".join(["python", *map(quote, [sys.argv[0] or "slerpmerge.py", *words, *more, "--yes"])])


def shortest_number(value: float) -> str:
    """A number in the fewest digits that mean it."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


class CommandLine:
    """One run: flags and answers in, a child or one clear message out."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from rich.console import Console

        self.arguments = arguments
        if arguments.no_color:
            os.environ["NO_COLOR"] = "1"
            os.environ["PROMPT_TOOLKIT_COLOR_DEPTH"] = "DEPTH_1_BIT"
        # With --json the report alone goes to stdout; what people read goes beside it.
        # Bound to its stream, so that a bar goes on where a library's own prints are held back.
        self.console = Console(file=sys.stderr if arguments.json else sys.stdout, highlight=False)
        self.interactive = sys.stdin.isatty() and self.console.is_terminal and not arguments.json
        self.view = MergeView(self.console, quiet=arguments.quiet or arguments.json)
        self.memory = Memory()
        self.wizard = Wizard(self.console, self.memory, load_in_background)
        self.wrote = NOTHING_WRITTEN
        self.late_fault: SlerpMergeError | None = None  # of something that did not keep the run from its end

    def finish(self) -> int:
        """The status of a run that came to its end; raises what went wrong beside it."""
        if self.late_fault is not None:
            raise self.late_fault
        return EXIT_DONE

    def show(self, picture: RenderableType) -> None:
        if not (self.arguments.quiet or self.arguments.json):
            self.console.print(picture)

    def run(self) -> int:
        if self.arguments.forget:
            self.show("Forgotten." if self.memory.forget() else "There was nothing to forget.")
            return EXIT_DONE
        self.check_flags()
        if self.arguments.demo:
            return self.run_demo()
        if self.arguments.child is not None:
            return self.run_judgement()
        if self.arguments.inspect:
            return self.run_inspection()
        preset = self.preset()
        if self.lacks_answers(preset):
            return EXIT_USAGE
        if self.interactive and any(name not in preset for name in ("primary", "secondary", "save_directory")):
            self.show(f"[bold]slerpmerge {__version__}[/]  two parents, one child. Tab completes, Ctrl-C leaves.")
        preset = self.with_defaults(preset)
        remembered = {name: self.memory.folder(name) for name in ("primary", "secondary")}
        answers = ask_answers(preset, self.wizard, remembered)
        changeable = [name for name in ANSWER_NAMES if name not in preset] if self.interactive else []
        while True:
            try:
                plan = self.prepare(answers)
            except SlerpMergeError as error:
                if not changeable or self.arguments.dry_run:
                    raise
                self.show(render_error(self.console, error))
                decision = "change"
            else:
                if self.arguments.dry_run:
                    if self.arguments.json:
                        print(json.dumps(plan_as_dict(plan)))
                    return EXIT_DONE
                plan = self.offer_template(plan)
                self.announce_sweep(self.yardstick(answers))
                decision = self.decide(plan)
            if decision != "change":
                break
            name = self.wizard.which_answer(changeable or list(ANSWER_NAMES))
            kept = without_answer(answers, name)
            if name in ("primary", "secondary") and answers["save_directory"] == self.wizard.proposed:
                kept = without_answer(kept, "save_directory")  # its name was made of the parents' names
                answers.pop("save_directory")
            answers = ask_answers(kept, self.wizard, answers)
        return self.act(decision, plan, self.yardstick(answers))

    def prepare(self, answers: Mapping[str, Any]) -> MergePlan:
        """The plan that answers and flags make. Raises SlerpMergeError where it, or what is to follow it, cannot be."""
        plan = prepare_merge(recipe_of(answers), self.observe)
        self.check_judgement((plan.primary, plan.secondary), answers)
        self.check_maps([plan.primary, plan.secondary, plan.base], [plan.recipe.save_directory])
        return plan

    def announce_sweep(self, yardstick: Yardstick | None) -> None:
        """Says what a sweep will do, before it is begun."""
        if yardstick is not None:
            names = [path.name for path in yardstick.texts] or list(yardstick.tasks)
            made = f"up to {MOST_TRIALS - 2} children are made one after the other, and the best again"
            self.show(f"t will be found on {format_names(names)}: {made}.")

    def act(self, decision: str, plan: MergePlan, yardstick: Yardstick | None) -> int:
        """Starts the merge, saves it as a recipe, or leaves."""
        if decision == "start":
            return self.merge(plan, yardstick)
        if decision != "save":
            self.show(NOTHING_WRITTEN)
            return EXIT_DONE
        self.save_recipe(plan)
        if yardstick is not None:
            self.show("It has t = 0.5, where a search begins. The command that searches:")
            self.show_command(plan.recipe, yardstick)
        return EXIT_DONE

    def preset(self) -> dict[str, Any]:
        """The fields of MergeRecipe that flags and a recipe file give. A flag goes before the file."""
        given = {name: value for name in RECIPE_FIELDS if (value := getattr(self.arguments, name, None)) is not None}
        if self.arguments.rules:
            given["schedule"] = order_rules(self.arguments.rules)
        if self.arguments.sweep:
            given["schedule"] = Schedule.constant(0.5)  # where it begins
        if self.arguments.recipe is None:
            return given
        decided = ("primary", "secondary", "base", "schedule", "method", "granularity")
        if clashing := [name for name in decided if name in given]:
            flags = ", ".join("--t" if name == "schedule" else f"--{name}" for name in clashing)
            raise SlerpMergeError(f"The recipe already says what {flags} would.", "Leave out the one or the other.")
        return {**read_recipe(self.arguments.recipe), **given}

    def lacks_answers(self, preset: Mapping[str, Any]) -> bool:
        """Whether answers are missing that nobody is there to give; says whose flags would give them."""
        missing = self.missing_flags(preset)
        if missing:
            text = f"slerpmerge: no terminal to ask at; give {', '.join(missing)}"
            print(text + " (--yes takes every default that is left)." * ("--yes" in missing), file=sys.stderr)
        return bool(missing)

    def missing_flags(self, preset: Mapping[str, Any]) -> list[str]:
        """Flags for the answers that nobody is there to give."""
        if self.interactive:
            return []
        missing = [flag for name, flag in ANSWER_FLAGS.items() if name not in preset]
        settled = self.arguments.yes or self.arguments.dry_run or self.arguments.inspect
        if settled and "--t" in missing:
            missing.remove("--t")
        return missing if settled else [*missing, "--yes"]

    def with_defaults(self, preset: dict[str, Any]) -> dict[str, Any]:
        """What --yes and --dry-run take without asking."""
        settled = self.arguments.yes or (self.arguments.dry_run and not self.interactive)
        return {"schedule": Schedule.constant(0.5), **preset} if settled else preset

    def decide(self, plan: MergePlan) -> str:
        """What to do with a plan: "start", "leave", "change" an answer, or "save" a recipe."""
        if plan.kinship.warning:
            self.show(f"[yellow]{plan.kinship.warning}[/]")
        loses = any(remark.startswith(GIVES_WAY) for remark in plan.remarks) and not plan.recipe.restart
        if loses and not self.arguments.yes:
            self.show("[yellow]The finished files of the merge that stands there are of another; they would go.[/]")
        if self.arguments.yes:
            return "start"
        while True:
            decision = self.wizard.decide(plan.kinship.warning is None and not loses)
            if decision != "inspect":
                return decision
            with self.view:
                found = measure_differences(plan.parity.pairs, plan.recipe, self.observe)
            self.show(render_map(self.console, found))

    def save_recipe(self, plan: MergePlan) -> None:
        """Writes the merge as a recipe, and says how to make the child of it."""
        path = self.wizard.ask_recipe_file().resolve()
        write_text(path, recipe_text(plan, path.parent))
        self.wrote = f"The recipe stands in {path}."
        self.show(self.wrote)
        self.show_command(dataclasses.replace(plan.recipe, recipe_file=path))

    def show_command(self, recipe: MergeRecipe, yardstick: Yardstick | None = None) -> None:
        """The command for scripts that does what was answered."""
        more = ["--verify", self.arguments.verify] if self.arguments.verify else []
        more += ["--sweep"] if yardstick is not None else []
        texts = {*self.arguments.texts, *(yardstick.texts if yardstick is not None else ())}
        for flag, values in (("--taste", self.arguments.prompts), ("--perplexity", sorted(texts))):
            more += [word for value in values for word in (flag, str(value))]
        more += ["--score", self.arguments.tasks] if self.arguments.tasks else []
        more += ["--include-path", str(self.arguments.include_path)] if self.arguments.include_path else []
        self.console.print("The same without questions:", style="dim")
        self.console.print(printable(equivalent_command(recipe, more)), soft_wrap=True, markup=False)

    def merge(self, plan: MergePlan, yardstick: Yardstick | None = None) -> int:
        if self.interactive and not self.arguments.yes:
            self.show_command(plan.recipe, yardstick)
        if self.interactive:
            self.memory.remember(plan.recipe, self.wizard.blend_text)
        sweep = None
        if yardstick is not None:
            plan, sweep = self.sweep(plan, yardstick)
        self.wrote = CLEANED_UP
        started = time.perf_counter()
        wait_for_torch()
        with self.view:
            report = execute_merge(plan, self.observe)
        report = dataclasses.replace(report, total_seconds=time.perf_counter() - started)
        self.show(render_report(self.console, report))
        found: dict[str, Any] = {}
        if sweep is not None:
            found |= self.keep(report.child, {"sweep": sweep})
            if self.late_fault is None:
                forget_sweep(plan.recipe.save_directory)
        for path in self.arguments.maps:
            self.save_map(map_of_merge(report.result, vectors_of(plan.recipe)), path)
        report = self.verify_fully(report)
        parents = ("primary", plan.primary.folder), ("secondary", plan.secondary.folder)
        lineup = Lineup((*parents, ("child", report.child)), plan.recipe.device)
        found |= self.judge(lineup, judged_by_sweep=sweep is not None)
        if self.interactive and not self.arguments.yes and self.can_speak(plan):
            self.judge_as_asked(lineup)
        if self.arguments.json:
            print(json.dumps({**report.as_dict(), **found}))
        elif not self.arguments.quiet:
            self.console.print("Try it, convert it, share it:", style="bold")
            for command in next_commands(report):
                self.console.print(printable(command), soft_wrap=True, markup=False)
        return self.finish()

    def check_flags(self) -> None:
        """Raises SlerpMergeError where flags ask for what cannot be had together."""
        arguments = self.arguments
        given = {flag for flag in ("inspect", "child", "demo", "sweep", "dry_run") if getattr(arguments, flag)}
        given |= {flag for flag, name in JUDGEMENT_FLAGS.items() if getattr(arguments, name)}
        for flag, others in CLASHING_FLAGS.items():
            if flag in given and (clashing := sorted(given & others)):
                names = ", ".join(f"--{name.replace('_', '-')}" for name in clashing)
                raise SlerpMergeError(f"--{flag.replace('_', '-')} does not go with {names}.", "Leave out one of them.")
        for path in arguments.maps:
            if not path.resolve().parent.is_dir():
                raise SlerpMergeError(f"The folder of {path} is not there.", "Save the map into one that is.")
            if path.exists() and not arguments.overwrite:
                raise SlerpMergeError(f"{path} exists already.", "Give another name, or --overwrite.")
        if arguments.sweep and (arguments.rules or arguments.recipe):
            raise SlerpMergeError("A sweep finds t itself.", "Leave out --t and --recipe, or --sweep.")
        if arguments.sweep and not (arguments.texts or arguments.tasks):
            what = "A sweep needs something to measure children by."
            raise SlerpMergeError(what, "Give --perplexity FILE, or --score TASK.")
        if arguments.include_path and not arguments.tasks:
            raise SlerpMergeError("--include-path goes with --score.", "Name the tasks too.")

    def yardstick(self, answers: Mapping[str, Any]) -> Yardstick | None:
        """What t is to be found by, where it is to be found."""
        if texts := answers.get("sweep_texts"):
            return Yardstick(texts)
        if not self.arguments.sweep:
            return None
        texts = tuple(self.arguments.texts)
        return Yardstick(texts, () if texts else self.tasks, self.arguments.include_path)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(filter(None, map(str.strip, (self.arguments.tasks or "").split(","))))

    def check_judgement(self, parents: Sequence[Checkpoint], answers: Mapping[str, Any]) -> None:
        """Raises SlerpMergeError, before anything is made, where what was asked for afterwards cannot be done."""
        arguments, texts = self.arguments, [*self.arguments.texts, *answers.get("sweep_texts", ())]
        for path in texts:
            read_judged_text(path)
        if texts or arguments.prompts or self.tasks:
            for parent in parents:
                check_can_speak(parent, reads_on=bool(texts))
            Lineup(tuple((str(number), parent.folder) for number, parent in enumerate(parents))).tokenizer_folder("0")
        if self.tasks:
            find_tasks(self.tasks, arguments.include_path)

    def check_maps(self, models: Iterable[Checkpoint | None], folders: Iterable[Path] = ()) -> None:
        """Raises SlerpMergeError where a map would be written among a model's files."""
        places = [model.folder for model in models if model is not None] + list(folders)
        for path in self.arguments.maps:
            if any(is_inside(path.resolve(), place.resolve()) for place in places):
                raise SlerpMergeError(f"{path} lies in a model's folder.", "Save the map somewhere else.")

    @staticmethod
    def can_speak(plan: MergePlan) -> bool:
        """Whether it is worth offering a taste, by what the config calls itself; transformers need not load for it."""
        kinds = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
        return plan.tokenizer_role is not None and plan.primary.architecture.endswith(kinds)

    def sweep(self, plan: MergePlan, yardstick: Yardstick) -> tuple[MergePlan, dict[str, Any]]:
        """(the plan for the best t, what the sweep found)."""

        def observe(event: Event) -> None:
            if isinstance(event, Noted):
                self.wrote = "The child was not made. What the sweep measured is kept; the same command carries on."
            self.observe(event)

        with self.view:
            entry = find_t(plan, yardstick, observe)
        self.show(render_sweep(self.console, entry))
        schedule = Schedule.constant(entry["best_t"])
        return prepare_merge(dataclasses.replace(plan.recipe, schedule=schedule), self.view.observe), entry

    def judge(self, lineup: Lineup, judged_by_sweep: bool = False) -> dict[str, Any]:
        """What flags ask of parents and child; it joins the child's report and card."""
        arguments = self.arguments
        found: dict[str, Any] = {}
        if arguments.prompts:
            found |= self.find(lineup, "tastes", functools.partial(taste, lineup, arguments.prompts))
        if arguments.texts and not judged_by_sweep:
            found |= self.find(lineup, "perplexities", functools.partial(compare_perplexity, lineup, arguments.texts))
        if self.tasks and not (judged_by_sweep and not arguments.texts):
            scored = functools.partial(score, lineup, self.tasks, arguments.include_path)
            found |= self.find(lineup, "scores", scored)
        return found

    def find(self, lineup: Lineup, kind: str, work: Callable[[Observer], list[Any]]) -> dict[str, list[Any]]:
        """One kind of judgement: found, shown, and added to the child's report."""
        renderers = {"tastes": render_tastes, "perplexities": render_perplexities, "scores": render_scores}
        with self.view:
            entries = work(self.observe)
        self.show(renderers[kind](self.console, entries))
        return self.keep(dict(lineup.folders)["child"], {kind: entries})

    def keep(self, child: Path, found: dict[str, Any]) -> dict[str, Any]:
        """Adds what was found to a child's report, and returns it. Where that cannot be, it is told at the end."""
        try:
            amend_report(child, found)
        except SlerpMergeError as error:
            self.late_fault = error
        return found

    def judge_as_asked(self, lineup: Lineup) -> None:
        """Tastes and perplexities until the person has had enough. What goes wrong is told, and the child stands."""
        while (wanted := self.wizard.ask_next()) != "leave":
            try:
                if wanted == "perplexity":
                    path = self.wizard.ask_text_file("Text file")
                    self.find(lineup, "perplexities", functools.partial(compare_perplexity, lineup, [path]))
                elif prompts := self.wizard.ask_prompts():
                    self.find(lineup, "tastes", functools.partial(taste, lineup, prompts))
            except SlerpMergeError as error:
                self.show(render_error(self.console, error))

    def run_judgement(self) -> int:
        """--child: a child that stands already, and the parents that its recipe names."""
        child = self.arguments.child
        if not (self.arguments.prompts or self.arguments.texts or self.tasks):
            raise SlerpMergeError("There is nothing to ask the child.", "Give --taste, --perplexity or --score.")
        if not (child / RECIPE_NAME).is_file():
            what = f"{child} has no {RECIPE_NAME}, so its parents are not known."
            raise SlerpMergeError(what, "Give the folder of a child that slerpmerge made.")
        fields = read_recipe(child / RECIPE_NAME)
        parents = ("primary", fields["primary"]), ("secondary", fields["secondary"])
        self.check_judgement([open_checkpoint(folder) for _, folder in parents], {})
        found = self.judge(Lineup((*parents, ("child", child)), self.arguments.device or "auto"))
        if self.arguments.json:
            print(json.dumps(found))
        return self.finish()

    def run_inspection(self) -> int:
        """--inspect: how the parents differ. No child, and no save directory."""
        preset = {**self.preset(), "save_directory": Path()}
        preset.setdefault("schedule", Schedule.constant(0.5))
        if self.lacks_answers(preset):
            return EXIT_USAGE
        remembered = {name: self.memory.folder(name) for name in ("primary", "secondary")}
        answers = ask_answers(preset, self.wizard, remembered)
        folders = [answers[name] for name in ("primary", "secondary", "base") if answers.get(name) is not None]
        self.check_maps([], folders)
        wait_for_torch()
        with self.view:
            found = inspect_parents(recipe_of(answers), self.observe)
        self.show(render_map(self.console, found))
        for path in self.arguments.maps:
            self.save_map(found, path)
        if self.arguments.json:
            print(json.dumps(found.as_dict()))
        return EXIT_DONE

    def save_map(self, found: DifferenceMap, path: Path) -> None:
        save_map(found, path, "How the parents differ")
        self.wrote = f"The map stands in {path}."
        self.show(self.wrote)

    def offer_template(self, plan: MergePlan) -> MergePlan:
        """Asks whether a child without a chat template shall have the other parent's, where that fits its tokens."""
        role = plan.parity.offered_template
        if role is None or self.arguments.yes:
            return plan
        if not self.wizard.confirm(f"The child has no chat template; take the {role}'s?", default=True):
            return plan
        return dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, chat_template=role))

    def observe(self, event: Event) -> None:
        if isinstance(event, ParityChecked) and not event.report.of_severity("blocking"):
            self.show(render_parity(self.console, event.report))
        elif isinstance(event, MergeStopped):
            files = f"{event.kept} of {event.total} weight files are finished and kept"
            self.wrote = f"{files}; the same command carries on."
        elif isinstance(event, ChildPublished):
            self.wrote = f"The child stands in {event.child}."
        elif isinstance(event, PlanReady):
            self.show(render_plan(self.console, event.plan))
            if self.arguments.dry_run or len({job.t for job in event.plan.jobs}) > 1:
                self.show(render_curves(self.console, event.plan))
        self.view.observe(event)

    def verify_fully(self, report: MergeReport) -> MergeReport:
        """--verify full, or the wizard's offer of it."""
        wanted = self.arguments.verify == "full"
        if self.arguments.verify is None and self.interactive and not self.arguments.yes:
            wanted = self.wizard.confirm("Load the child with transformers, to be sure?", default=True)
        if not wanted:
            return report
        checks = verify_with_transformers(report.child)
        for check in checks:
            self.show(f"{mark_of(self.console, 'mended')} {check}")
        return dataclasses.replace(report, checks=report.checks + checks)

    def run_demo(self) -> int:
        folder = self.arguments.save_directory or Path(tempfile.mkdtemp(prefix="slerpmerge-demo-"))
        check_save_directory(folder / "demo-child", (), overwrite=True)
        self.show("Teaching two tiny models, one to sail and one to garden (some seconds) ...")
        primary, secondary = make_demo_parents(folder)
        recipe = MergeRecipe(primary, secondary, folder / "demo-child", overwrite=True)
        self.arguments.yes = True
        self.arguments.verify = "full"
        status = self.merge(prepare_merge(recipe, self.observe))
        for name in (primary, secondary, recipe.save_directory):
            self.show(f"[bold]{name.name}[/]: {generate_text(name, DEMO_PROMPT)}")
        return status


def load_in_background() -> None:
    """Starts to load torch while the person types; the first merge then need not wait for it."""
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()


def wait_for_torch() -> None:
    """Loads torch, or waits until the background has. A collector that rested meanwhile goes back to work."""
    importlib.import_module("torch")
    if not gc.isenabled():
        gc.freeze()  # of all that is loaded by now nothing is garbage
        gc.enable()


class Terminated(KeyboardInterrupt):
    """The system asked the process to end, as it does before a machine goes away or when a terminal is lost."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def signals_end_it() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end a merge as Ctrl-C does: tidily, and with what is finished kept."""

    def end(number: int, frame: object) -> None:
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in STOP_SIGNALS if number != signal.SIGINT]
    # What is ignored on purpose, as nohup has it, stays so.
    before = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def prepare_terminal() -> None:
    """Makes old consoles understand colours, and names that a terminal cannot show stop nothing."""
    import colorama

    colorama.just_fix_windows_console()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("NO_COLOR"):  # older versions of prompt_toolkit do not know it
        os.environ.setdefault("PROMPT_TOOLKIT_COLOR_DEPTH", "DEPTH_1_BIT")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status. Every fault of the world ends here, in one message."""
    command_line: CommandLine | None = None
    try:
        prepare_terminal()
        with signals_end_it():
            command_line = CommandLine(build_parser().parse_args(argv))
            return command_line.run()
    except SlerpMergeError as error:
        fault = error
    except (KeyboardInterrupt, EOFError) as error:
        by = f" by {signal.Signals(error.number).name}" if isinstance(error, Terminated) else ""
        with contextlib.suppress(OSError):  # the terminal may be what was lost
            print(f"\nStopped{by}. {command_line.wrote if command_line else NOTHING_WRITTEN}", file=sys.stderr)
        return 128 + error.number if isinstance(error, Terminated) else EXIT_INTERRUPTED
    except ImportError as error:
        fault = SlerpMergeError(f"A package cannot be loaded: {error}.", "pip install -r requirements.txt")
    except (OSError, MemoryError) as error:
        cause = str(error) or "out of memory"
        fault = SlerpMergeError(f"The system refused: {cause}.", "Mend that and try again.")
    show_fault(fault, command_line.wrote if command_line else NOTHING_WRITTEN)
    return EXIT_REFUSED


def show_fault(fault: SlerpMergeError, wrote: str) -> None:
    """The one message that an error ends in, and what stands where if something does."""
    from rich.console import Console

    errors = Console(stderr=True, highlight=False)
    hint = fault.hint if wrote in (NOTHING_WRITTEN, CLEANED_UP) else f"{fault.hint} {wrote}"
    with contextlib.suppress(OSError):
        errors.print(render_error(errors, SlerpMergeError(fault.message, hint)), soft_wrap=not errors.is_terminal)


if __name__ == "__main__":
    gc.disable()  # loading makes a million objects that stay; to look for garbage among them took 0.5 s
    status = main()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not spoil the leaving
    if threading.active_count() > 1:  # libraries still load in the background; nobody waits for them
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
