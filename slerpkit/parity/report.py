"""The words of parity: a mismatch, the child's vocabulary, the sources of a tensor, the report.

Descriptions alone: what differs is found and judged by the modules after this one. Read parents/tensors.py before it.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slerpkit.lazy import numpy
from slerpkit.messages import SlerpMergeError, printable
from slerpkit.parents.tensors import renumber

if TYPE_CHECKING:
    from slerpkit.parents.tensors import TensorInfo


OF_BASE = " of the base"  # ends the subject where it is the base that is held against the primary
KINDS = ("model_type", "architectures")  # config keys that say what a model is
MAX_BLOCKING = 8  # lines of a refusal


@dataclass(frozen=True)
class Mismatch:
    """One difference between the parents, or of the base, and what follows from it."""

    severity: str  # "blocking", "resolved" or "notice"
    subject: str  # the config key, tensor or file
    primary: str
    secondary: str
    consequence: str  # why it blocks, the rule that resolves it, or what to know
    accepted_as: str | None = None  # the name by which the person may let it pass; None: nobody can

    def __str__(self) -> str:
        other = "base" if self.is_of_base else "secondary"
        return f"{self.subject}: primary {self.primary}, {other} {self.secondary}. {self.consequence}"

    @property
    def is_of_base(self) -> bool:
        """Whether it is the base's; `secondary` is then what the base has."""
        return self.subject.endswith(OF_BASE)

    @property
    def is_of_kind(self) -> bool:
        """Whether the models are of two architectures: then nothing else is worth telling."""
        key = self.subject.removesuffix(OF_BASE).rpartition(".")[2]
        return self.severity == "blocking" and key in KINDS

    def as_dict(self) -> dict[str, str]:
        """What reports hold of it."""
        return {field: getattr(self, field) for field in ("severity", "subject", "primary", "secondary", "consequence")}


NO_ROW, ZEROS = -1, -2  # in a RowMap, of a source that has no row for a token, or stands there with zeros


@dataclass(frozen=True, eq=False)
class RowMap:
    """Which rows of the sources make each row of a tensor that has a row for each token, or for each label.

    Sources are numbered: 0 the primary, 1 the secondary, 2 the base. A row that every source has is blended; one that
    a single source has is kept as it is.
    """

    sources: tuple[numpy.ndarray, ...]  # of each source: (the child's rows,), int64: its row, NO_ROW or ZEROS

    @functools.cached_property
    def is_blended(self) -> numpy.ndarray:
        """(the child's rows,), bool."""
        return numpy.logical_and.reduce([rows != NO_ROW for rows in self.sources])

    @functools.cached_property
    def blended(self) -> tuple[numpy.ndarray, ...]:
        """As `sources`, with NO_ROW for the rows that are kept."""
        return tuple(numpy.where(self.is_blended, rows, NO_ROW) for rows in self.sources)

    def is_kept(self, source: int) -> numpy.ndarray:
        """(the child's rows,), bool: kept from this source."""
        return (self.sources[source] != NO_ROW) & ~self.is_blended

    def cut(self, row_counts: Sequence[int], source: int) -> RowMap:
        """The map of a table of which each source has its own number of rows.

        source: the one whose tokens these are. Its rows are kept where another has none, and the table ends with them
        and those that are appended to them.
        """
        sources = [numpy.where(rows < count, rows, NO_ROW) for rows, count in zip(self.sources, row_counts)]
        has_row = [rows != NO_ROW for rows in sources]
        is_there = numpy.where(self.sources[source] != NO_ROW, has_row[source], numpy.logical_or.reduce(has_row))
        length = len(is_there) if is_there.all() else int(is_there.argmin())
        is_kept = has_row[source] & ~numpy.logical_and.reduce(has_row)
        for number, rows in enumerate(sources):
            rows[is_kept & (number != source)] = NO_ROW
        return RowMap(tuple(rows[:length] for rows in sources))

    def select(self, order: Sequence[int]) -> RowMap:
        """The map of some of the sources, in another order."""
        return RowMap(tuple(self.sources[source] for source in order))


@dataclass(frozen=True)
class AppendedToken:
    """A token that the child's tokenizer gets beside those of the parent that it is from."""

    content: str
    token_id: int  # in the child
    flags: tuple[tuple[str, bool], ...]  # special, lstrip, rstrip, normalized, single_word


@dataclass(frozen=True)
class Vocabulary:
    """The child's tokens: whose they are, and which of the parents' rows stand for them."""

    tokenizer_source: str | None  # the parent it is from: "primary", "secondary", or None where neither has one
    reason: str
    parent_rows: tuple[int | None, ...]  # primary, secondary, base; None where config and tensors do not tell
    rows: int | None  # the child's
    tensors: tuple[frozenset[str], ...] = ()  # of each parent: the names of those with a row for each token
    row_map: RowMap | None = None  # of the longest table; None: every row with the one of the same number
    appended: tuple[AppendedToken, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()  # matched, moved, kept, padding, appended, left out
    longest: int = 0  # rows of the child's longest table, as an embedding that goes on behind its head

    @property
    def id_count(self) -> int | None:
        """How many ids have a row in some table of the child's; None where that is not known."""
        return None if self.rows is None else max(self.rows, self.longest)

    @functools.cached_property
    def _table_maps(self) -> dict[tuple[int, ...], RowMap]:
        """The maps of the tables so far, one of a kind: workers are given each but once."""
        return {}

    def map_of(self, row_counts: tuple[int, ...]) -> RowMap | None:
        """The map of a table that has so many rows in each parent; None where rows go by number."""
        if self.row_map is not None and row_counts not in self._table_maps:
            source = int(self.tokenizer_source == "secondary")
            self._table_maps[row_counts] = self.row_map.cut(row_counts, source)
        return self._table_maps.get(row_counts)

    def with_appended(self, tokens: Mapping[str, int]) -> dict[str, int]:
        """The child's tokens with their ids, from those of the parent that its tokenizer is from."""
        return {**tokens, **{token.content: token.token_id for token in self.appended}}

    def child_id_of(self, token_id: int, role: str) -> int | None:
        """The child's id of the token that has this id in a parent, "primary" or "secondary"; None for none."""
        if self.row_map is None or token_id < 0:
            return token_id
        child_ids = numpy.flatnonzero(self.row_map.sources[int(role == "secondary")] == token_id)
        return int(child_ids[0]) if len(child_ids) else None

    def as_dict(self) -> dict[str, Any]:
        """What reports hold of it."""
        return {"rows": self.rows, "by_token": self.row_map is not None, **dict(self.counts)}


@dataclass(frozen=True)
class Labels:
    """The child's labels, which are the primary's: which of the parents' rows stand for them."""

    tensors: tuple[frozenset[str], ...] = ()  # of each parent: the names of those with a row for each label
    row_map: RowMap | None = None  # None: every row with the one of the same number

    def map_of(self, row_counts: tuple[int, ...]) -> RowMap | None:
        """The map of a tensor with a row for each label: all have as many."""
        return self.row_map


@dataclass(frozen=True)
class ChildTemplate:
    """How the child talks: the chat template that it has."""

    role: str | None = None  # the parent whose it is, even if that has none; None: neither's
    name: str | None = None  # of a template of neither's
    text: str | None = None  # that template
    turn_ends: tuple[int, ...] = ()  # the child's ids of the tokens that end a turn in that
    offered: str | None = None  # the parent whose template would fit a child that has none

    @property
    def source(self) -> str | None:
        """Where it is from, in a word."""
        return self.role or self.name


@dataclass(frozen=True)
class LayerSource:
    """Which layers a tensor of the child comes from, and where it stands among the child's."""

    position: float = 0.0  # 0 first, 1 last in its slice or stack, 1 in one of a single layer, 0 outside layers
    secondary_layer: int | None = None  # None: the tensor has the same name there
    base_layer: int | None = None
    slice_number: int | None = None  # None outside the recipe's slices
    alone: str | None = None  # the parent, "primary" or "secondary", that the layer is copied from; None: both


@dataclass(frozen=True)
class TensorSources:
    """What the child's tensor of this name is made from."""

    name: str
    primary: TensorInfo  # the secondary's, where its layer is copied
    secondary: TensorInfo | None  # None: the one stands alone
    base: TensorInfo | None = None
    layer: LayerSource = LayerSource()
    rows: RowMap | None = None  # where rows follow tokens or labels
    folder: str = ""  # below the model's, of a module that keeps its weights there, and begins their names with it

    @property
    def source_names(self) -> tuple[str, str]:
        """What the tensor is called in the primary and in the secondary, by the primary's names."""
        layer = self.layer.secondary_layer
        return self.primary.name, self.primary.name if layer is None else renumber(self.primary.name, layer)

    @property
    def shape(self) -> tuple[int, ...]:
        """The child's: the primary's, with a row for each of the child's tokens or labels where rows follow them."""
        shape = self.primary.shape
        if self.rows is None:
            return shape
        row_count = len(self.rows.is_blended)
        return (row_count, *shape[1:]) if shape[0] != 1 else (1, row_count)


@dataclass(frozen=True)
class ParityReport:
    """Every difference found, not the first, and the pairs of tensors that follow."""

    mismatches: tuple[Mismatch, ...]
    pairs: tuple[TensorSources, ...]
    vocabulary: Vocabulary = Vocabulary(None, "neither parent has a tokenizer", (None, None), None)
    template: ChildTemplate = ChildTemplate()

    @property
    def acceptable(self) -> tuple[str, ...]:
        """The settings to accept where they alone forbid the merge; none where something else does too."""
        names = dict.fromkeys(mismatch.accepted_as for mismatch in self.of_severity("blocking"))
        return () if None in names else tuple(names)

    @property
    def accepted(self) -> tuple[Mismatch, ...]:
        """The differences that the person let pass."""
        return tuple(m for m in self.of_severity("notice") if m.accepted_as)

    def of_severity(self, severity: str) -> tuple[Mismatch, ...]:
        """The mismatches of a severity, as Mismatch has it."""
        return tuple(mismatch for mismatch in self.mismatches if mismatch.severity == severity)

    def as_dict(self) -> dict[str, Any]:
        """What reports hold of it."""
        return {
            "vocabulary": self.vocabulary.as_dict(),
            "resolved": [m.as_dict() for m in self.of_severity("resolved")],
            "notices": [m.as_dict() for m in self.of_severity("notice")],
        }

    def raise_if_blocking(self) -> None:
        """Raises SlerpMergeError, with every mismatch that no rule resolves, where there is one."""
        blocking = self.of_severity("blocking")
        if not blocking:
            return
        lines = [printable(str(mismatch)) for mismatch in blocking[:MAX_BLOCKING]]
        lines += [f"and {len(blocking) - MAX_BLOCKING} more"] * (len(blocking) > MAX_BLOCKING)
        what = "These two cannot be merged"
        hint = "Choose two models of the same architecture and shape, such as two fine-tunes of one base model."
        if all(mismatch.is_of_base for mismatch in blocking):
            what = "This base does not go with these two"
            hint = "Choose as base the model that both were fine-tuned from, or leave it out."
        if self.acceptable:
            flags = " ".join(f"--accept {shlex.quote(name)}" for name in self.acceptable)
            hint += f" If you know that the child comes out right all the same: {printable(flags)}"
        if any(m.subject == "quantisation" for m in blocking):
            hint = "Choose the original, unquantised models; quantise the child afterwards."
        raise SlerpMergeError(f"{what}:\n  " + "\n  ".join(lines), hint)
