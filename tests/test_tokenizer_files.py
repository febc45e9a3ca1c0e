"""Tokenizers as files: sentencepiece models are read, and two ways of cutting one vocabulary are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import open_parents
from slerpkit.parity.check import check_parity
from slerpkit.parity.report import Mismatch, ParityReport
from slerpkit.parity.sentencepiece_file import MAX_SENTENCEPIECE_BYTES, read_pieces
from slerpkit.parity.vocabulary import read_tokens
from slerpkit.recipe import MergeRecipe
from tests.builders import HIDDEN, LLAMA_CONFIG, edit_json, llama_tensors, make_checkpoint

MARKS = ["<unk>", "<s>", "</s>"]
PIECES = [*MARKS, *(f"▁piece{number}" for number in range(37))]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def sentencepiece_model(pieces: Sequence[str], score: bytes = b"\0\0\0\0", normalizer: bytes = b"nmt_nfkc") -> bytes:
    """A model as the library writes one: pieces of text, score and kind, then how it was trained, then a normalizer."""
    entries = (field(1, piece.encode()) + b"\x15" + score + b"\x18\x01" for piece in pieces)
    return b"".join(field(1, entry) for entry in entries) + field(2, b"\x10\x28") + field(3, field(1, normalizer))


def make_parent(folder: Path, rows: int = len(PIECES)) -> Path:
    tensors = {**llama_tensors(1), **{name: torch.ones(rows, HIDDEN).bfloat16() for name in (EMBEDDING, HEAD)}}
    return make_checkpoint(folder, tensors, {**LLAMA_CONFIG, "vocab_size": rows})


def check(folder: Path) -> ParityReport:
    recipe = MergeRecipe(folder / "primary", folder / "secondary")
    return check_parity(open_parents(recipe), recipe)


def lines_of(folder: Path, subject: str) -> list[Mismatch]:
    return [found for found in check(folder).mismatches if found.subject == subject]


# ── sentencepiece ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "spm.model", "sentencepiece.model"])
def test_pieces_have_the_ids_of_their_places(tmp_path, name):
    (tmp_path / name).write_bytes(sentencepiece_model(PIECES))
    edit_json(tmp_path / "added_tokens.json", **{"[PAD]": 40})
    assert read_tokens(tmp_path, "primary") == {**{piece: n for n, piece in enumerate(PIECES)}, "[PAD]": 40}


def test_models_of_fairseq_begin_with_four_marks_of_their_own(tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(sentencepiece_model(PIECES))
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={"3": {"content": "<unk>"}})
    tokens = read_tokens(tmp_path, "primary")
    assert [tokens[piece] for piece in ("<s>", "<pad>", "</s>", "<unk>", "▁piece0")] == [0, 1, 2, 3, 4]


def test_pieces_that_a_class_numbers_in_its_own_way_are_not_guessed_at(tmp_path):
    """Pegasus and CamemBERT put more of their own before the pieces; what settings state shows it."""
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model(PIECES))
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={"105": {"content": "<unk>"}})
    with pytest.raises(SlerpMergeError, match="in a way of its class's own"):
        read_tokens(tmp_path, "primary")


MODEL = sentencepiece_model(PIECES)
BROKEN = {
    "empty": b"",
    "text": b"a tokenizer, it says",
    "cut short": MODEL[:-1],
    "no pieces": field(2, b"\x10\x28"),
    "a piece without text": field(1, b"\x18\x01"),
    "a piece twice": sentencepiece_model([*PIECES, "<s>"]),
    "no UTF-8": field(1, field(1, b"\xff\xfe")),
    "a number without an end": b"\x0a" + b"\xff" * 100,
    "longer than it is": b"\x0a\xff\xff\xff\xff\x7f",
    "a kind of field that is none": b"\x0b",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_is_no_sentencepiece_model_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(SlerpMergeError, match="is no sentencepiece model, or is damaged"):
        read_pieces(tmp_path / "tokenizer.model")


def test_a_model_without_end_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as stream:
        stream.truncate(MAX_SENTENCEPIECE_BYTES + 1)
    with pytest.raises(SlerpMergeError):
        read_pieces(tmp_path / "tokenizer.model")


def test_other_fields_of_a_model_are_passed_over(tmp_path):
    strange = b"\x99\x06" + b"\0" * 8 + b"\x9d\x06" + b"\0" * 4 + b"\x90\x06\xff\xff\x03"
    (tmp_path / "tokenizer.model").write_bytes(strange + sentencepiece_model(PIECES))
    assert list(read_pieces(tmp_path / "tokenizer.model")) == PIECES


def test_rows_follow_the_pieces_of_two_models(tmp_path):
    for role, pieces in (("primary", PIECES), ("secondary", [*MARKS, *reversed(PIECES[3:])])):
        make_parent(tmp_path / role)
        (tmp_path / role / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    (line,) = lines_of(tmp_path, "vocabulary")
    assert (line.severity, line.consequence) == ("resolved", "Rows follow tokens: 4 in place, 36 moved.")


def test_a_model_and_a_tokenizer_json_of_its_pieces_are_one(tmp_path):
    for role in ("primary", "secondary"):
        make_parent(tmp_path / role)
    (tmp_path / "primary" / "spiece.model").write_bytes(sentencepiece_model(PIECES))
    unigram = models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=0)
    Tokenizer(unigram).save(str(tmp_path / "secondary" / "tokenizer.json"))
    assert check(tmp_path).mismatches == ()


# ── Cutting ─────────────────────────────────────────────────────────────────────────────────────

LETTERS = ["<unk>", *"abcdefghij", "ab", "cd", "abcd"]
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd")]


def write_bpe(folder: Path, change: Callable[[dict[str, Any]], None] = lambda content: None, **model: Any) -> None:
    make_parent(folder, len(LETTERS))
    settings = {"vocab": {token: n for n, token in enumerate(LETTERS)}, "merges": MERGES, "unk_token": "<unk>", **model}
    tokenizer = Tokenizer(models.BPE(**settings))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Whitespace(), normalizers.NFC()
    content = json.loads(tokenizer.to_str())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def split_digits(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}


def write_lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def swap_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [content["model"]["merges"][n] for n in (1, 0, 2)]


def ignore_merges(content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = True


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (split_digits, "pre-tokenizer"),
        (write_lowercase, "normalizer"),
        (swap_merges, "merges"),
        (ignore_merges, "model"),
    ],
)
def test_one_vocabulary_that_is_cut_in_two_ways_is_told_and_whose_way_the_child_has(tmp_path, change, part):
    write_bpe(tmp_path / "primary")
    write_bpe(tmp_path / "secondary", change)
    (line,) = check(tmp_path).mismatches
    assert (line.severity, line.subject) == ("notice", "tokenizer")
    assert line.primary.startswith(f"{part} ")
    assert line.secondary.startswith(f"{part} ")
    assert "the child cuts it as the primary does" in line.consequence


def spell_merges_as_text(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def leave_defaults_out(content: dict[str, Any]) -> None:
    del content["model"]["ignore_merges"], content["model"]["byte_fallback"], content["model"]["dropout"]


def reverse_vocabulary(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))


@pytest.mark.parametrize("change", [spell_merges_as_text, leave_defaults_out, reverse_vocabulary])
def test_one_way_of_cutting_that_is_spelled_in_two_ways_is_one(tmp_path, change):
    write_bpe(tmp_path / "primary")
    write_bpe(tmp_path / "secondary", change)
    first, second = ((tmp_path / role / "tokenizer.json").read_text() for role in ("primary", "secondary"))
    assert first != second
    assert check(tmp_path).mismatches == ()


def test_another_vocabulary_is_told_by_its_rows_alone(tmp_path):
    write_bpe(tmp_path / "primary")
    more = {token: n for n, token in enumerate([*LETTERS[:-1], "ef"])}
    write_bpe(tmp_path / "secondary", split_digits, vocab=more, merges=[*MERGES[:2], ("e", "f")])
    assert [found.subject for found in check(tmp_path).mismatches] == ["vocabulary"]


def test_a_tokenizer_that_cannot_be_read_is_told_once(tmp_path):
    write_bpe(tmp_path / "primary")
    write_bpe(tmp_path / "secondary", lambda content: content.update(normalizer={"type": "Unheard"}))
    assert [found.subject for found in check(tmp_path).mismatches] == ["vocabulary"]


@pytest.mark.parametrize("content", [{}, {"model": []}, {"model": {"type": "BPE", "vocab": 5, "merges": 7}}])
def test_a_tokenizer_without_rules_is_told_once(tmp_path, content):
    write_bpe(tmp_path / "primary")
    write_bpe(tmp_path / "secondary")
    (tmp_path / "secondary" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert [found.subject for found in check(tmp_path).mismatches] == ["vocabulary"]


def test_rules_are_read_without_the_vocabulary(tmp_path, monkeypatch):
    write_bpe(tmp_path / "primary")
    write_bpe(tmp_path / "secondary", spell_merges_as_text)
    read = []

    def record(data: bytes, path: Path) -> Any:
        read.append(json.loads(data)["model"])
        return Tokenizer.from_buffer(data)

    monkeypatch.setattr("slerpkit.parity.segmentation.read_tokenizer", record)
    assert check(tmp_path).mismatches == ()
    assert [(len(model["vocab"]), len(model["merges"])) for model in read] == [(0, 0), (0, 0)]


@pytest.mark.parametrize(("score", "lines"), [(0, 0), (-1.5, 1)])
def test_scores_of_one_vocabulary_are_compared_as_numbers(tmp_path, score, lines):
    for role, own in (("primary", 0.0), ("secondary", score)):
        make_parent(tmp_path / role, 3)
        model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", own], ["b", own]]}
        (tmp_path / role / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (tmp_path / "primary" / "tokenizer.json").write_text((tmp_path / "primary" / "tokenizer.json").read_text() + "\n")
    assert len(lines_of(tmp_path, "tokenizer")) == lines


@pytest.mark.parametrize("merges", [5, [[1, 2], ["c", "d"]], [None], {"a": "b"}])
def test_merges_that_are_none_are_told_once(tmp_path, merges):
    write_bpe(tmp_path / "primary")
    write_bpe(tmp_path / "secondary", lambda content: content["model"].update(merges=merges))
    assert [found.subject for found in check(tmp_path).mismatches] == ["vocabulary"]


@pytest.mark.parametrize("other", [{"score": b"\0\0\x80\x3f"}, {"normalizer": b"identity"}])
def test_sentencepiece_models_of_one_vocabulary_may_cut_in_two_ways_too(tmp_path, other):
    for role, settings in (("primary", {}), ("secondary", other)):
        make_parent(tmp_path / role)
        (tmp_path / role / "tokenizer.model").write_bytes(sentencepiece_model(PIECES, **settings))
    (line,) = check(tmp_path).mismatches
    assert (line.severity, line.subject) == ("notice", "tokenizer")
