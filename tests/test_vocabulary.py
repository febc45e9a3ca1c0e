"""Vocabularies that differ: rows follow tokens, heads stay true, and the child talks as one parent does, whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from slerpkit.chat_templates import CHAT_TEMPLATES
from slerpkit.child.report import MergeReport
from slerpkit.demo import make_demo_parents
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import open_parents
from slerpkit.parity.check import check_parity
from slerpkit.parity.report import RowMap
from slerpkit.recipe import VECTORS, MergeRecipe, RunOptions, TokenSource
from slerpkit.recipe_file import read_recipe
from slerpkit.story import execute_merge, prepare_merge
from tests.builders import (
    HIDDEN,
    LLAMA_CONFIG,
    assert_same_bits,
    bits,
    distance,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
    merge,
    plan_of,
    reference_slerp,
    replace_tensors,
    set_block_elements,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROLES = "primary", "secondary"
WORDS = [f"w{number}" for number in range(40)]
NEW = [f"new{number}" for number in range(40)]
# Forty tokens of the secondary's own in the middle of what both know.
GROWN = [*WORDS[:20], *NEW, *WORDS[20:]]


def write_tokenizer(folder: Path, words: Sequence[str], special: Sequence[str] = (), **settings: Any) -> None:
    """A tokenizer of whole words, the first for all that it does not know; `special` tokens are added behind."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": words[0], **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


def make_parent(
    folder: Path, seed: int, tokens: Sequence[str], rows: int | None = None, special: Sequence[str] = (), **config: Any
) -> Path:
    """A tiny Llama whose embedding, head and head's bias have a row for each token, and more where asked for."""
    rows = rows or len(tokens) + len(special)
    tensors = llama_tensors(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in ((EMBEDDING, (rows, HIDDEN)), (HEAD, (rows, HIDDEN)), ("lm_head.bias", (rows,))):
        tensors[name] = torch.randn(*shape, generator=generator).to(torch.bfloat16)
    make_checkpoint(folder, tensors, {**LLAMA_CONFIG, "vocab_size": rows, **config})
    write_tokenizer(folder, tokens, special)
    return folder


def rows_by_token(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


def assert_rows_follow_tokens(report: MergeReport, tokenizer_source: str, t: float, method: str = "slerp") -> None:
    """Each token that both parents know has the blend of its two rows, every other the bits that it had."""
    plan = report.plan
    folders = {"primary": plan.parents.primary.folder, "secondary": plan.parents.secondary.folder}
    other = {"primary": "secondary", "secondary": "primary"}[tokenizer_source]
    tokens = {role: rows_by_token(folder) for role, folder in folders.items()}
    known = rows_by_token(report.child)
    both = [token for token in known if token in tokens["primary"] and token in tokens["secondary"]]
    weights = {role: load_tensors(folder) for role, folder in folders.items()}
    child = load_tensors(report.child)
    for name in (EMBEDDING, HEAD, "lm_head.bias"):
        v0, v1 = (weights[role][name][[tokens[role][token] for token in both]] for role in folders)
        found = child[name][[known[token] for token in both]]
        assert distance(found, v0, v1, reference_slerp(v0, v1, t, method)) <= 0.51
        for token in known.keys() - set(both):
            role = tokenizer_source if token in tokens[tokenizer_source] else other
            assert bits(child[name][known[token]]) == bits(weights[role][name][tokens[role][token]]), token
    config = json.loads((report.child / "config.json").read_text())
    assert config["vocab_size"] == len(child[EMBEDDING]) == len(child[HEAD]) == len(child["lm_head.bias"])


def counts(report: MergeReport) -> dict[str, int]:
    return {key: count for key, count in report.as_dict()["vocabulary"].items() if count and type(count) is int}


# ── Rows ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["slerp", "lerp", "nuslerp"])
@pytest.mark.parametrize("tokenizer_source", ["primary", "secondary"])
def test_forty_tokens_in_the_middle_move_the_rest_and_each_finds_its_own(tmp_path, parents, tokenizer_source, method):
    primary = make_parent(tmp_path / "primary", 1, WORDS)
    secondary = make_parent(tmp_path / "secondary", 2, GROWN)
    parents.watch(primary, secondary)
    report = merge(primary, secondary, tmp_path / "child", 0.3, tokenizer=tokenizer_source, method=method)
    assert_rows_follow_tokens(report, tokenizer_source, 0.3, method)
    assert len(rows_by_token(report.child)) == len(load_tensors(report.child)[EMBEDDING])
    expected = {"rows": 40, "matched": 20, "moved": 20, "left_out": 40}
    assert counts(report) == (
        expected if tokenizer_source == "primary" else {"rows": 80, "matched": 20, "moved": 20, "kept": 40}
    )
    (line,) = (m for m in report.plan.parity.mismatches if m.subject == "vocabulary")
    assert (line.severity, line.primary, line.secondary) == ("resolved", "40 rows, 40 tokens", "80 rows, 80 tokens")
    assert "20 in place, 20 moved" in line.consequence
    assert report.verified.warnings == ()


@pytest.mark.parametrize("shuffled", [0, 1])
@pytest.mark.parametrize("chunk", [HIDDEN, 5 * HIDDEN + 3, 1 << 19])
def test_rows_in_any_order_however_a_tensor_is_cut(tmp_path, monkeypatch, chunk, shuffled):
    set_block_elements(monkeypatch, chunk)
    orders = [WORDS, [WORDS[0], *numpy.random.default_rng(3).permutation(WORDS[1:])]]
    primary = make_parent(tmp_path / "primary", 1, orders[shuffled])
    secondary = make_parent(tmp_path / "secondary", 2, orders[1 - shuffled])
    assert_rows_follow_tokens(merge(primary, secondary, tmp_path / "child", 0.6), "primary", 0.6)


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("tokenizer_source", ["primary", "secondary"])
def test_at_the_ends_every_matched_row_is_that_parents_bit_for_bit(tmp_path, tokenizer_source, t):
    primary = make_parent(tmp_path / "primary", 1, GROWN)
    secondary = make_parent(tmp_path / "secondary", 2, [WORDS[0], *reversed(WORDS[1:])])
    report = merge(primary, secondary, tmp_path / "child", t, tokenizer=tokenizer_source)
    source, role = (secondary, "secondary") if t else (primary, "primary")
    child, weights = load_tensors(report.child), load_tensors(source)
    known, there = rows_by_token(report.child), rows_by_token(source)
    for token, row in known.items():
        if token in WORDS or role == tokenizer_source:
            assert bits(child[EMBEDDING][row]) == bits(weights[EMBEDDING][there[token]]), token


def test_rows_that_differ_by_padding_are_as_many_as_the_tokenizers_own(tmp_path):
    primary = make_parent(tmp_path / "primary", 1, WORDS, rows=48)
    secondary = make_parent(tmp_path / "secondary", 2, WORDS, rows=40)
    report = merge(primary, secondary, tmp_path / "child", 0.3)
    assert counts(report) == {"rows": 48, "matched": 40, "padding": 8}
    assert_rows_follow_tokens(report, "primary", 0.3)
    assert bits(load_tensors(report.child)[EMBEDDING][40:]) == bits(load_tensors(primary)[EMBEDDING][40:])
    smaller = merge(primary, secondary, tmp_path / "smaller", 0.3, tokenizer="secondary")
    assert counts(smaller) == {"rows": 40, "matched": 40}


def test_equal_tokenizers_are_blended_row_by_row_padding_too(tmp_path):
    primary, secondary = (make_parent(tmp_path / role, n, WORDS, 48) for n, role in enumerate(("primary", "secondary")))
    report = merge(primary, secondary, tmp_path / "child", 0.3)
    assert report.plan.parity.vocabulary.row_map is None
    v0, v1, found = (load_tensors(folder)[EMBEDDING] for folder in (primary, secondary, report.child))
    assert distance(found, v0, v1, reference_slerp(v0, v1, 0.3)) <= 0.51


def test_one_tokenizer_written_in_two_ways_is_one(tmp_path):
    primary, secondary = (make_parent(tmp_path / role, n, WORDS) for n, role in enumerate(("primary", "secondary")))
    content = json.loads((secondary / "tokenizer.json").read_text())
    (secondary / "tokenizer.json").write_text(json.dumps(content, indent=8))
    assert merge(primary, secondary, tmp_path / "child").plan.parity.mismatches == ()


@pytest.mark.parametrize("file", ["vocab.json", "vocab.txt"])
def test_older_vocabularies_are_read_too_and_settings_add_to_them(tmp_path, file):
    primary = make_parent(tmp_path / "primary", 1, WORDS, special=["<|im_start|>"])
    secondary = make_parent(tmp_path / "secondary", 2, [*reversed(WORDS), "<|im_start|>"])
    (secondary / "tokenizer.json").unlink()
    text = json.dumps({word: n for n, word in enumerate(reversed(WORDS))})
    (secondary / file).write_text(text if file == "vocab.json" else "\n".join(reversed(WORDS)) + "\n")
    edit_json(secondary / "tokenizer_config.json", added_tokens_decoder={"40": {"content": "<|im_start|>"}})
    report = merge(primary, secondary, tmp_path / "child")
    assert counts(report) == {"rows": 41, "matched": 1, "moved": 40}


def test_tokenizers_that_cannot_be_read_leave_rows_by_number_or_are_refused(tmp_path):
    for number, role in enumerate(("primary", "secondary", "larger")):
        make_parent(tmp_path / role, number, WORDS, rows=48 if role == "larger" else 40)
        (tmp_path / role / "tokenizer.json").rename(tmp_path / role / "tokenizer.model")
        (tmp_path / role / "tokenizer.model").write_text(role)
    report = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child")
    (line,) = (m for m in report.plan.parity.mismatches if m.subject == "vocabulary")
    assert line.severity == "notice"
    assert "by number" in line.consequence
    with pytest.raises(SlerpMergeError, match="vocabulary: primary 40 rows, secondary 48 rows"):
        merge(tmp_path / "primary", tmp_path / "larger", tmp_path / "other")


def test_a_tokenizer_that_is_missing_is_told_by_its_models_role_whatever_its_folder_is_called(tmp_path):
    make_parent(tmp_path / "secondary", 1, WORDS, rows=40)
    make_parent(tmp_path / "primary", 2, WORDS, rows=48)
    (tmp_path / "primary" / "tokenizer.json").unlink()
    with pytest.raises(SlerpMergeError, match="the secondary has no tokenizer.json"):
        merge(tmp_path / "secondary", tmp_path / "primary", tmp_path / "child")


def test_one_unreadable_tokenizer_on_both_sides_is_still_one(tmp_path):
    for number, (role, rows) in enumerate({"primary": 48, "secondary": 40}.items()):
        make_parent(tmp_path / role, number, WORDS, rows=rows)
        (tmp_path / role / "tokenizer.json").rename(tmp_path / role / "tokenizer.model")
    report = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child")
    assert counts(report) == {"rows": 48, "matched": 40, "padding": 8}


@pytest.mark.parametrize("model", ["tokenizer.json", "tokenizer.model"])
def test_one_tokenizer_with_a_token_more_is_that_token_more_whoever_can_read_it(tmp_path, model):
    primary = make_parent(tmp_path / "primary", 1, WORDS)
    secondary = make_parent(tmp_path / "secondary", 2, WORDS, rows=41)
    for folder in (primary, secondary):
        (folder / "tokenizer.json").rename(folder / model)
    edit_json(secondary / "added_tokens.json", **{"[PAD]": 40})
    report = merge(primary, secondary, tmp_path / "child", tokenizer="secondary")
    assert counts(report) == {"rows": 41, "matched": 40, "kept": 1}
    assert bits(load_tensors(report.child)[HEAD][40]) == bits(load_tensors(secondary)[HEAD][40])
    assert counts(merge(primary, secondary, tmp_path / "other")) == {"rows": 40, "matched": 40, "left_out": 1}


@pytest.mark.parametrize("source", ["primary", "secondary"])
@pytest.mark.parametrize("in_common", [0, 19, 20])
def test_tokenizers_with_little_in_common_are_refused_unless_it_is_accepted(tmp_path, in_common, source):
    primary = make_parent(tmp_path / "primary", 1, WORDS)
    secondary = make_parent(tmp_path / "secondary", 2, [*NEW[in_common:], *WORDS[:in_common]])
    if in_common < 20:
        named = f"have {in_common or 'no'} token"
        with pytest.raises(SlerpMergeError, match=named) as caught:
            merge(primary, secondary, tmp_path / "child", 0.3, tokenizer=source)
        assert caught.value.hint.endswith("--accept vocabulary")
    report = merge(primary, secondary, tmp_path / "child", 0.3, tokenizer=source, accept=("vocabulary",))
    assert [m.subject for m in report.plan.parity.accepted] == ["vocabulary"] * (in_common < 20)
    assert any("accepted" in warning for warning in report.verified.warnings) is (in_common < 20)
    assert_rows_follow_tokens(report, source, 0.3)


def test_a_vocabulary_that_was_cut_to_a_few_tokens_has_all_of_them_in_common(tmp_path):
    primary, secondary = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, WORDS[:5])
    assert_rows_follow_tokens(merge(primary, secondary, tmp_path / "child", 0.3), "primary", 0.3)


@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_a_base_takes_part_in_rows_that_it_knows(tmp_path, granularity):
    """Where the base lacks a token, nothing was learned since: the row of the tokenizer's own parent stays."""
    primary = make_parent(tmp_path / "primary", 1, WORDS)
    secondary = make_parent(tmp_path / "secondary", 2, [WORDS[0], *reversed(WORDS[1:])])
    base = make_parent(tmp_path / "base", 3, WORDS[:30], rows=33)
    settings = {"method": "nuslerp", "vectors": VECTORS[granularity], "base": base}
    report = merge(primary, secondary, tmp_path / "child", 0.3, **settings)
    assert counts(report) == {"rows": 40, "matched": 2, "moved": 28, "kept": 10}
    child, v0, v1, base_tensor = (
        load_tensors(folder)[EMBEDDING] for folder in (report.child, primary, secondary, base)
    )
    there = [rows_by_token(secondary)[word] for word in WORDS[:30]]
    v0, v1, base_tensor, found = v0[:30].double(), v1[there].double(), base_tensor[:30].double(), child[:30]
    axes = {"tensor": [...], "row": [(slice(None), n) for n in range(HIDDEN)], "column": [(n,) for n in range(30)]}
    exact = base_tensor.clone()
    for place in axes[granularity]:
        exact[place] += reference_slerp(
            v0[place] - base_tensor[place], v1[place] - base_tensor[place], 0.3, threshold=1.0
        )
    assert (found.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(torch.bfloat16).eps / 2
    assert bits(child[30:]) == bits(load_tensors(primary)[EMBEDDING][30:])


def test_a_row_map_tells_blended_from_kept():
    rows = RowMap((numpy.array([0, 1, -1, 2]), numpy.array([3, -1, 0, 1])))
    assert rows.is_blended.tolist() == [True, False, False, True]
    assert [part.tolist() for part in rows.blended] == [[0, -1, -1, 2], [3, -1, -1, 1]]
    assert [rows.is_kept(side).tolist() for side in (0, 1)] == [
        [False, True, False, False],
        [False, False, True, False],
    ]


REVERSED = [WORDS[0], *reversed(WORDS[1:])]


def add_tensors(folder: Path, **more: torch.Tensor) -> None:
    replace_tensors(folder, {**load_tensors(folder), **{name.replace("__", "."): t for name, t in more.items()}})


def test_positions_norms_and_layers_as_long_as_the_vocabulary_stay_in_their_order(tmp_path):
    """Where the vocabulary is as large as something else, names tell; nothing else is put into another order."""
    shapes = {"wpe__weight": (40, 3), "embeddings__LayerNorm__bias": (40,), "transform__dense__weight": (40, 40)}
    folders = []
    for seed, (role, words) in enumerate({"primary": WORDS, "secondary": REVERSED}.items()):
        folders.append(make_parent(tmp_path / role, seed, words, transform_size=40))
        generator = torch.Generator().manual_seed(seed)
        add_tensors(folders[-1], **{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    report = merge(*folders, tmp_path / "child", 0.3)
    assert_rows_follow_tokens(report, "primary", 0.3)
    left, right, child = map(load_tensors, (*folders, report.child))
    for name in (name.replace("__", ".") for name in shapes):
        exact = reference_slerp(left[name], right[name], 0.3)
        assert distance(child[name], left[name], right[name], exact) <= 1.0, name


def test_a_bias_of_one_row_follows_tokens_too(tmp_path):
    """BART and its kin keep (1, tokens)."""
    primary, secondary = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    biases = torch.randn(1, 40), torch.randn(1, 80)
    for folder, bias in zip((primary, secondary), biases):
        add_tensors(folder, final_logits_bias=bias)
    there = [rows_by_token(secondary)[word] for word in WORDS]
    for granularity in ("tensor", "row"):
        settings = {"method": "nuslerp", "vectors": VECTORS[granularity], "overwrite": True}
        found = load_tensors(merge(primary, secondary, tmp_path / "child", 0.3, **settings).child)["final_logits_bias"]
        assert found.shape == (1, 40)
        v0, v1 = biases[0], biases[1][:, there]
        assert distance(found, v0, v1, reference_slerp(v0, v1, 0.3)) <= 1.0
    grown = load_tensors(merge(primary, secondary, tmp_path / "grown", 0.3, tokenizer="secondary").child)
    assert torch.equal(grown["final_logits_bias"][:, 20:60], biases[1][:, 20:60])


def test_a_config_that_does_not_state_its_vocabulary_is_no_obstacle(tmp_path):
    primary, secondary = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    for folder in (primary, secondary):
        edit_json(folder / "config.json", vocab_size=...)
    assert_rows_follow_tokens(merge(primary, secondary, tmp_path / "child", 0.3, tokenizer="union"), "primary", 0.3)


def test_moved_tokens_of_an_embedding_that_is_not_found_are_told(tmp_path):
    folders = []
    for seed, (role, words) in enumerate({"primary": WORDS, "secondary": REVERSED}.items()):
        folder = make_parent(tmp_path / role, seed, words)
        edit_json(folder / "config.json", vocab_size=...)
        tensors = load_tensors(folder)
        tensors["strange.weight"] = tensors.pop(EMBEDDING)
        replace_tensors(folder, tensors)
        folders.append(folder)
    (line,) = (m for m in merge(*folders, tmp_path / "child").plan.parity.mismatches if m.subject == "vocabulary")
    assert (line.severity, "by number" in line.consequence) == ("notice", True)
    with pytest.raises(SlerpMergeError, match="no union of tokens"):
        merge(*folders, tmp_path / "other", tokenizer="union")


def test_lines_of_a_vocabulary_end_where_lines_end(tmp_path):
    words = ["w0", "\u2028", "\x85", "\x0b", *WORDS[1:]]
    primary, secondary = (make_parent(tmp_path / role, n, words) for n, role in enumerate(("primary", "secondary")))
    (secondary / "tokenizer.json").unlink()
    (secondary / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    assert merge(primary, secondary, tmp_path / "child").plan.parity.vocabulary.row_map is None


@pytest.mark.parametrize("key", ["9" * 5000, "\u0663", "-1", "x"])
def test_ids_of_settings_that_are_no_numbers_are_let_pass(tmp_path, key):
    primary, secondary = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    edit_json(secondary / "tokenizer_config.json", added_tokens_decoder={key: {"content": "<|x|>"}})
    assert counts(merge(primary, secondary, tmp_path / "child"))["rows"] == 40


# ── Tables with rows of their own number ────────────────────────────────────────────────────────


def assert_table_follows_tokens(report: MergeReport, name: str, tokenizer_source: str = "primary") -> torch.Tensor:
    """As assert_rows_follow_tokens, of one table at t = 0.3, whose parents may each have another number of rows."""
    folders = report.plan.parents.primary.folder, report.plan.parents.secondary.folder
    source = int(tokenizer_source == "secondary")
    tokens, tables = [rows_by_token(folder) for folder in folders], [load_tensors(folder)[name] for folder in folders]
    found = load_tensors(report.child)[name]
    ids = [[known.get(token, -1) for known in tokens] for token in tokens[source]]
    both = torch.tensor([pair for pair in ids if all(0 <= n < len(table) for n, table in zip(pair, tables))])
    v0, v1 = (table[both[:, number]] for number, table in enumerate(tables))
    assert distance(found[both[:, source]], v0, v1, reference_slerp(v0, v1, 0.3)) <= 0.51
    kept = [row for row in range(len(tables[source])) if row not in set(both[:, source].tolist())]
    assert bits(found[kept]) == bits(tables[source][kept])
    return found


def add_tables(folders: Sequence[Path], name: str, *shapes: tuple[int, ...]) -> None:
    for seed, (folder, shape) in enumerate(zip(folders, shapes)):
        table = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        replace_tensors(folder, {**load_tensors(folder), name: table})


@pytest.mark.parametrize("tokenizer_source", ["primary", "secondary"])
@pytest.mark.parametrize(
    "name", ["mtp.layers.0.embed_tokens.weight", "mtp.0.head.weight", "backbone.blocks.2.word_embeddings.weight"]
)
def test_tables_of_a_layer_that_predicts_more_tokens_follow_them(tmp_path, name, tokenizer_source):
    folders = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    add_tables(folders, name, (40, HIDDEN), (80, HIDDEN))
    report = merge(*folders, tmp_path / "child", 0.3, tokenizer=tokenizer_source)
    assert len(assert_table_follows_tokens(report, name, tokenizer_source)) == report.plan.parity.vocabulary.rows
    assert_rows_follow_tokens(report, tokenizer_source, 0.3)


@pytest.mark.parametrize("holder", [0, 1])
def test_a_table_inside_a_layer_is_no_head_that_the_other_parent_has_tied(tmp_path, holder):
    folders = [make_parent(tmp_path / role, n, WORDS, tie_word_embeddings=True) for n, role in enumerate(ROLES)]
    for folder in folders:
        replace_tensors(folder, {name: t for name, t in load_tensors(folder).items() if not name.startswith("lm_head")})
    add_tables(folders[holder : holder + 1], "model.layers.0.lm_head.weight", (40, HIDDEN))
    with pytest.raises(SlerpMergeError, match=r"model\.layers\.0\.lm_head\.weight"):
        merge(*folders, tmp_path / "child")


def test_other_matrices_of_a_layer_keep_their_order_however_many_rows_they_have(tmp_path):
    folders = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, REVERSED)
    name = "model.layers.0.router.proj.weight"
    add_tables(folders, name, (40, HIDDEN), (40, HIDDEN))
    child, left, right = map(load_tensors, (merge(*folders, tmp_path / "child", 0.3).child, *folders))
    exact = reference_slerp(left[name], right[name], 0.3)
    assert distance(child[name], left[name], right[name], exact) <= 0.51


@pytest.mark.parametrize("tokenizer_source", ["primary", "secondary", "union"])
def test_an_embedding_for_each_layer_may_end_before_the_last_tokens(tmp_path, tokenizer_source):
    folders = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    for folder, rows in zip(folders, (36, 70)):
        edit_json(folder / "config.json", vocab_size_per_layer_input=rows)
    name = "model.embed_tokens_per_layer.weight"
    add_tables(folders, name, (36, 8), (70, 8))
    report = merge(*folders, tmp_path / "child", 0.3, tokenizer=tokenizer_source)
    source = "secondary" if tokenizer_source == "secondary" else "primary"
    table = assert_table_follows_tokens(report, name, source)
    assert len(table) == {"primary": 36, "secondary": 70}[source]
    assert json.loads((report.child / "config.json").read_text())["vocab_size_per_layer_input"] == len(table)
    assert_rows_follow_tokens(report, source, 0.3)


def test_tables_of_another_length_in_one_vocabulary_meet_as_far_as_both_go(tmp_path):
    folders = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, WORDS)
    name = "language_model.embed_tokens_per_layer.weight"
    add_tables(folders, name, (40, 8), (30, 8))
    report = merge(*folders, tmp_path / "child", 0.3)
    assert len(assert_table_follows_tokens(report, name)) == 40
    assert counts(report) == {"rows": 40, "matched": 40}


@pytest.mark.parametrize("tokenizer_source", ["primary", "secondary"])
def test_an_embedding_that_is_longer_than_its_head_follows_tokens_too(tmp_path, tokenizer_source):
    """The last token has no row in the head; behind it are rows that are nobody's tokens."""
    marked = [*WORDS, "<|picture|>"], [*GROWN, "<|picture|>"]
    folders = [make_parent(tmp_path / role, n, marked[n], rows=len(marked[n]) - 1) for n, role in enumerate(ROLES)]
    add_tables(folders, EMBEDDING, (48, HIDDEN), (88, HIDDEN))
    for folder, token_id in zip(folders, (40, 80)):
        edit_json(folder / "config.json", image_token_id=token_id)
    report = merge(*folders, tmp_path / "child", 0.3, tokenizer=tokenizer_source)
    source = ROLES.index(tokenizer_source)
    assert len(assert_table_follows_tokens(report, EMBEDDING, tokenizer_source)) == (48, 88)[source]
    assert len(assert_table_follows_tokens(report, HEAD, tokenizer_source)) == (40, 80)[source]
    config = json.loads((report.child / "config.json").read_text())
    assert (config["vocab_size"], config["image_token_id"]) == ((40, 40), (80, 80))[source]
    assert report.verified.warnings == ()


def test_a_union_behind_an_embedding_that_is_longer_than_its_head_is_refused(tmp_path):
    folders = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    add_tables(folders, EMBEDDING, (48, HIDDEN), (88, HIDDEN))
    with pytest.raises(SlerpMergeError, match="goes on behind its vocabulary"):
        merge(*folders, tmp_path / "child", tokenizer="union")


def test_a_map_is_cut_to_the_rows_that_a_table_has():
    rows = RowMap((numpy.array([0, 1, 2, 3, -1]), numpy.array([1, 0, 3, -1, 2])))
    assert [part.tolist() for part in rows.cut((4, 3), 0).sources] == [[0, 1, 2, 3, -1], [1, 0, -1, -1, 2]]
    assert [part.tolist() for part in rows.cut((3, 4), 0).sources] == [[0, 1, 2], [1, 0, 3]]
    three = RowMap((*rows.sources, numpy.array([0, 1, 2, -1, -1])))
    assert [part.tolist() for part in three.cut((4, 4, 1), 0).sources][1:] == [[1, -1, -1, -1, 2], [0, -1, -1, -1, -1]]


# ── Union ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows", [None, 60])
def test_a_union_appends_the_others_tokens_and_renumbers_none(tmp_path, parents, rows):
    primary = make_parent(tmp_path / "primary", 1, WORDS, rows, special=["<|end|>"] if rows is None else ())
    secondary = make_parent(tmp_path / "secondary", 2, GROWN, special=["<|im_start|>", "<|im_end|>"])
    parents.watch(primary, secondary)
    report = merge(primary, secondary, tmp_path / "child", 0.3, tokenizer="union")
    assert_rows_follow_tokens(report, "primary", 0.3)
    before, after = rows_by_token(primary), rows_by_token(report.child)
    assert {token: after[token] for token in before} == before
    assert after.keys() == {*before, *NEW, "<|im_start|>", "<|im_end|>"}
    tokenizer = AutoTokenizer.from_pretrained(report.child)
    embedding = load_tensors(report.child)[EMBEDDING]
    assert len(embedding) == max(len(tokenizer), rows or 0)
    assert counts(report)["appended"] == 42
    # Words stay words, and what was special is still left out of what people read.
    assert tokenizer("w3 new7 <|im_start|>")["input_ids"] == [after["w3"], after["new7"], after["<|im_start|>"]]
    assert tokenizer.decode([after["w3"], after["<|im_end|>"]], skip_special_tokens=True).strip() == "w3"
    again = merge(report.child, secondary, tmp_path / "again", tokenizer="union")
    assert counts(again).get("appended", 0) == 0


def test_the_plan_counts_a_tokenizer_that_is_spelt_out_again(tmp_path):
    """Some are stored on one line, their merges as strings; written again they take four times as much."""
    letters = [chr(0x100 + number) for number in range(80)]
    pairs = [(first, second) for first in letters for second in letters]
    tokens = [*letters, *("".join(pair) for pair in pairs)]
    primary = make_parent(tmp_path / "primary", 1, tokens)
    secondary = make_parent(tmp_path / "secondary", 2, [*tokens, *NEW])
    content = json.loads((primary / "tokenizer.json").read_text())
    content["model"] = {
        "type": "BPE", "unk_token": letters[0], "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [" ".join(pair) for pair in pairs],
    }  # fmt: skip
    (primary / "tokenizer.json").write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False))
    plan = plan_of(primary, secondary, tmp_path / "child", tokenizer="union")
    child = execute_merge(plan).child
    size = (child / "tokenizer.json").stat().st_size
    assert size > 3 * (primary / "tokenizer.json").stat().st_size
    assert sum(file.stat().st_size for file in child.iterdir()) <= plan.disk_needed_bytes


def test_a_union_keeps_the_settings_in_step(tmp_path):
    primary, secondary = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    decoder = {"0": {"content": "w0", "special": True}}
    edit_json(primary / "tokenizer_config.json", added_tokens_decoder=decoder)
    edit_json(primary / "added_tokens.json", w0=0)
    child = merge(primary, secondary, tmp_path / "child", tokenizer="union").child
    known = rows_by_token(child)
    assert json.loads((child / "added_tokens.json").read_text()) == {"w0": 0, **{token: known[token] for token in NEW}}
    stated = json.loads((child / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {entry["content"]: int(number) for number, entry in stated.items()} == {
        "w0": 0,
        **{t: known[t] for t in NEW},
    }


def test_a_union_in_a_recipe_is_replayed_bit_by_bit(tmp_path):
    primary, secondary = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    child = merge(primary, secondary, tmp_path / "child", 0.3, tokenizer="union").child
    recipe = read_recipe(child / "merge_recipe.yaml")
    assert recipe.tokenizer == "union"
    again = execute_merge(prepare_merge(recipe, RunOptions(tmp_path / "again"))).child
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (child / name).read_bytes(), name


# ── Rows that a recipe gives ────────────────────────────────────────────────────────────────────


def rows_of(folder: Path, *tokens: str) -> list[torch.Tensor]:
    known, table = rows_by_token(folder), load_tensors(folder)[EMBEDDING]
    return [table[known[token]] for token in tokens]


def test_rows_that_a_recipe_gives_stand_where_it_says(tmp_path, parents):
    primary = make_parent(tmp_path / "primary", 1, WORDS, rows=48)
    secondary = make_parent(tmp_path / "secondary", 2, GROWN)
    parents.watch(primary, secondary)
    wanted = (
        TokenSource("w3", "secondary", force=True),  # both have it: the secondary's
        TokenSource("w4", None, force=True),
        TokenSource("w5", "secondary", "new7"),  # both have it, and nothing forces another
        TokenSource("new1", "primary", "w9"),  # the secondary's, blended with the primary's row of another token
        TokenSource("new2", None),  # the secondary's, blended with zeros
        TokenSource("fresh", "secondary", 12),  # nobody's: that row
    )
    report = merge(primary, secondary, tmp_path / "child", 0.5, method="lerp", tokenizer="union", token_sources=wanted)
    w3, w4, w5, new1, new2, fresh = rows_of(report.child, "w3", "w4", "w5", "new1", "new2", "fresh")
    (own_w5, w9), (their_w3, their_w5, their_new1, their_new2) = (
        rows_of(primary, "w5", "w9"),
        rows_of(secondary, "w3", "w5", "new1", "new2"),
    )
    assert bits(w3) == bits(their_w3)
    assert not w4.any()
    assert bits(fresh) == bits(load_tensors(secondary)[EMBEDDING][12])
    for found, first, second in ((w5, own_w5, their_w5), (new1, w9, their_new1), (new2, 0 * their_new2, their_new2)):
        assert distance(found, first, second, reference_slerp(first, second, 0.5, "lerp")) <= 0.51
    assert report.verified.warnings == ()
    assert len({*rows_by_token(report.child).values()}) == len(rows_by_token(report.child)) == 81


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (TokenSource("w1", "secondary", "unheard", force=True), "'unheard', which that does not have"),
        (TokenSource("w1", "primary", 99, force=True), "99, which that does not have"),
        (TokenSource("new3", "secondary", "w1"), "another row of the secondary, which has both"),
    ],
)
def test_rows_that_a_recipe_cannot_give_are_named(tmp_path, wanted, said):
    primary, secondary = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    with pytest.raises(SlerpMergeError, match=said):
        merge(primary, secondary, tmp_path / "child", tokenizer="union", token_sources=(wanted,))


@pytest.mark.parametrize("free", [0, 3])
def test_padding_is_rounded_up_with_rows_that_no_model_says(tmp_path, free):
    special = ["<|end|>"]
    folders = [
        make_parent(tmp_path / role, seed, WORDS, len(WORDS) + len(special) + free, special)
        for seed, role in enumerate(ROLES)
    ]
    report = merge(*folders, tmp_path / "child", 0.3, pad_to_multiple_of=32)
    child = load_tensors(report.child)
    assert {len(child[name]) for name in (EMBEDDING, HEAD, "lm_head.bias")} == {64}
    assert json.loads((report.child / "config.json").read_text())["vocab_size"] == 64
    used = len(WORDS) + len(special) + free
    # Like a row that was free before, or like the last word: never like a mark that ends a text, and never zero.
    copied = used - 1 if free else len(WORDS) - 1
    assert all(bits(row) == bits(child[HEAD][copied]) for row in child[HEAD][used:])
    assert report.as_dict()["vocabulary"]["padding"] == 64 - len(WORDS) - len(special)
    assert len(load_tensors(merge(*folders, tmp_path / "even", 0.3, pad_to_multiple_of=1).child)[HEAD]) == used


def test_a_union_of_what_cannot_be_read_is_refused(tmp_path):
    primary, secondary = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, GROWN)
    (secondary / "tokenizer.json").rename(secondary / "tokenizer.model")
    with pytest.raises(SlerpMergeError, match="no union of tokens"):
        merge(primary, secondary, tmp_path / "child", tokenizer="union")
    (secondary / "vocab.txt").write_text("\n".join(GROWN))
    with pytest.raises(SlerpMergeError, match=r"needs tokenizer\.json"):
        merge(primary, secondary, tmp_path / "child", tokenizer="union")


def test_a_union_keeps_tokens_that_settings_alone_add(tmp_path):
    primary = make_parent(tmp_path / "primary", 1, WORDS, rows=41)
    edit_json(primary / "tokenizer_config.json", added_tokens_decoder={"40": {"content": "<|x|>", "special": True}})
    secondary = make_parent(tmp_path / "secondary", 2, GROWN)
    child = merge(primary, secondary, tmp_path / "child", tokenizer="union").child
    known = rows_by_token(child)
    assert known["<|x|>"] == 40
    assert known["new0"] == 41
    assert AutoTokenizer.from_pretrained(child).convert_tokens_to_ids("<|x|>") == 40
    assert bits(load_tensors(child)[EMBEDDING][40]) == bits(load_tensors(primary)[EMBEDDING][40])


def test_a_union_that_would_give_an_id_twice_is_refused(tmp_path):
    primary = make_parent(tmp_path / "primary", 1, WORDS, rows=60)
    content = json.loads((primary / "tokenizer.json").read_text())
    content["model"]["vocab"] = {word: n + 10 * (n >= 20) for n, word in enumerate(WORDS)}
    (primary / "tokenizer.json").write_text(json.dumps(content))
    secondary = make_parent(tmp_path / "secondary", 2, GROWN)
    with pytest.raises(SlerpMergeError, match="leave gaps"):
        merge(primary, secondary, tmp_path / "child", tokenizer="union")
    edit_json(primary / "tokenizer_config.json", added_tokens_decoder={"55": {"content": "<|x|>"}})
    with pytest.raises(SlerpMergeError, match="do not agree on the id"):
        merge(primary, secondary, tmp_path / "child", tokenizer="union")


def test_a_union_with_ids_beyond_the_embedding_is_refused(tmp_path):
    primary = make_parent(tmp_path / "primary", 1, WORDS, rows=38)
    secondary = make_parent(tmp_path / "secondary", 2, GROWN)
    with pytest.raises(SlerpMergeError, match="beyond the 38 rows"):
        merge(primary, secondary, tmp_path / "child", tokenizer="union")


def test_two_tokens_of_one_id_are_told(tmp_path):
    primary, secondary = (make_parent(tmp_path / role, n, WORDS) for n, role in enumerate(("primary", "secondary")))
    for folder in (primary, secondary):
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"]["twin"] = 7
        (folder / "tokenizer.json").write_text(json.dumps(content))
    (warning,) = merge(primary, secondary, tmp_path / "child").verified.warnings
    assert "gives 1 of its tokens the id of another" in warning


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"w7": 8, "w8": 7}, "the ids of w7, w8 in tokenizer.json"),
        ({"<|x|>": 90}, "knows the id 90"),
        ({"w7": 7}, None),
    ],
)
def test_files_of_a_tokenizer_that_disagree_are_told_and_tokenizer_json_counts(tmp_path, stated, told):
    primary, secondary = (make_parent(tmp_path / role, n, WORDS) for n, role in enumerate(ROLES))
    edit_json(primary / "added_tokens.json", **stated)
    report = merge(primary, secondary, tmp_path / "child", 0.3)
    assert_rows_follow_tokens(report, "primary", 0.3)
    assert [told in warning for warning in report.verified.warnings] == [True] * (told is not None)


@pytest.mark.parametrize("source", ["primary", "secondary"])
@pytest.mark.parametrize("inner", [{}, {"text_config": {"vocab_size": 7}}], ids=["top", "inside too"])
def test_a_vocab_size_that_its_rows_belie_is_put_right_in_the_child(tmp_path, source, inner):
    primary = make_parent(tmp_path / "primary", 1, WORDS)
    secondary = make_parent(tmp_path / "secondary", 2, GROWN)
    edit_json(primary / "config.json", vocab_size=32_000, **inner)
    child = merge(primary, secondary, tmp_path / "child", tokenizer=source).child
    config, rows = json.loads((child / "config.json").read_text()), len(load_tensors(child)[EMBEDDING])
    assert rows == len(load_tensors(tmp_path / source)[EMBEDDING])
    assert {config["vocab_size"], *(config[key]["vocab_size"] for key in inner)} == {rows}


# ── Heads ───────────────────────────────────────────────────────────────────────────────────────


GRANITE = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}


def make_head(folder: Path, seed: int, head: str, **config: Any) -> Path:
    """A tiny Llama whose head is "none", a "copy" of its embedding, or its "own"."""
    tensors = llama_tensors(seed)
    if head == "none":
        del tensors[HEAD]
    elif head == "copy":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    config = {key: value for key, value in {**LLAMA_CONFIG, **config}.items() if value is not ...}
    return make_checkpoint(folder, tensors, config)


@pytest.mark.parametrize(
    ("primary", "secondary", "stored", "tied"),
    [
        (("none", True), ("none", True), False, True),  # tied in both
        (("own", False), ("own", False), True, False),  # in none
        (("own", False), ("none", True), True, False),  # in the secondary
        (("none", True), ("own", False), False, True),  # in the primary: no child grows by a head
        (("copy", True), ("none", True), False, True),  # stored although tied
        (("none", True), ("copy", True), False, True),
        (("copy", True), ("copy", True), False, True),
        (("copy", True), ("own", False), False, True),
        (("own", True), ("own", True), True, False),  # says tied, and is not
        (("own", True), ("none", True), True, False),
        (("own", ...), ("own", ...), True, False),  # says nothing
        (("none", ...), ("none", ...), False, True),
    ],
)
def test_the_child_says_of_its_head_what_its_weights_are(tmp_path, parents, primary, secondary, stored, tied):
    folders = [
        # Of a class whose silence is not known to mean anything.
        make_head(tmp_path / role, seed, head, tie_word_embeddings=tie, **(GRANITE if tie is ... else {}))
        for seed, (role, (head, tie)) in enumerate({"primary": primary, "secondary": secondary}.items())
    ]
    parents.watch(*folders)
    report = merge(*folders, tmp_path / "child", 0.4)
    child = load_tensors(report.child)
    assert (HEAD in child) is stored
    assert json.loads((report.child / "config.json").read_text())["tie_word_embeddings"] is tied
    left, right = map(load_tensors, folders)
    for name in child.keys() & {EMBEDDING, HEAD}:
        v0, v1 = (part.get(name, part[EMBEDDING]) for part in (left, right))
        assert distance(child[name], v0, v1, reference_slerp(v0, v1, 0.4)) <= 0.51
    model, loading = AutoModelForCausalLM.from_pretrained(report.child, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    shared = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert shared is tied


def test_a_head_that_is_left_out_is_told(tmp_path):
    report = merge(
        make_head(tmp_path / "primary", 1, "copy", tie_word_embeddings=True),
        make_head(tmp_path / "secondary", 2, "none", tie_word_embeddings=True),
        tmp_path / "child",
    )
    (line,) = report.plan.parity.of_severity("resolved")
    assert (line.subject, line.primary) == (HEAD, "stored although tied")


@pytest.mark.parametrize("tied", [True, ...])
def test_another_matrix_with_a_row_for_each_token_is_no_head(tmp_path, tied):
    """Gemma 3n and 4 have an embedding for each layer beside the one that is the head."""
    folders = [make_head(tmp_path / role, n, "none", tie_word_embeddings=tied) for n, role in enumerate(("a", "b"))]
    for seed, folder in enumerate(folders):
        generator = torch.Generator().manual_seed(seed)
        add_tensors(folder, model__embed_tokens_per_layer__weight=torch.randn(48, HIDDEN, generator=generator))
    report = merge(*folders, tmp_path / "child")
    assert json.loads((report.child / "config.json").read_text()).get("tie_word_embeddings", ...) is tied
    assert report.plan.parity.mismatches == ()


def test_a_tied_head_follows_tokens_too(tmp_path):
    """The primary's own head meets the row that the secondary's embedding has for the same token."""
    primary = make_parent(tmp_path / "primary", 1, WORDS)
    secondary = make_parent(tmp_path / "secondary", 2, GROWN, tie_word_embeddings=True)
    tensors = {name: tensor for name, tensor in load_tensors(secondary).items() if name != HEAD}
    replace_tensors(secondary, tensors)
    child = load_tensors(merge(primary, secondary, tmp_path / "child", 0.3).child)
    there = [rows_by_token(secondary)[word] for word in WORDS]
    v0, v1 = load_tensors(primary)[HEAD], tensors[EMBEDDING][there]
    assert distance(child[HEAD], v0, v1, reference_slerp(v0, v1, 0.3)) <= 0.51


# ── Talk ────────────────────────────────────────────────────────────────────────────────────────

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
MARKS = ["<|im_start|>", "<|im_end|>"]


def make_talkers(folder: Path, primary_knows: bool) -> tuple[Path, Path]:
    """A primary without a chat template, with or without its marks as tokens, and a secondary that has one."""
    primary = make_parent(folder / "primary", 1, WORDS, rows=44, special=MARKS if primary_knows else ())
    secondary = make_parent(folder / "secondary", 2, GROWN, special=MARKS)
    edit_json(secondary / "tokenizer_config.json", chat_template=TEMPLATE, eos_token="<|im_end|>")
    (secondary / "chat_template.jinja").write_text(TEMPLATE)
    (primary / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.6}))
    (secondary / "generation_config.json").write_text(json.dumps({"eos_token_id": [81, 2]}))
    return primary, secondary


def talk_of(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """(chat template, generation settings) of a child, as transformers reads the one and a file holds the other."""
    return AutoTokenizer.from_pretrained(folder).chat_template, json.loads(
        (folder / "generation_config.json").read_text()
    )


def test_a_chat_template_stays_with_its_tokenizer_unless_asked_for(tmp_path):
    primary, secondary = make_talkers(tmp_path, primary_knows=True)
    report = merge(primary, secondary, tmp_path / "child")
    assert report.plan.parity.template.offered == "secondary"
    assert any("--chat-template secondary" in m.consequence for m in report.plan.parity.of_severity("notice"))
    assert talk_of(report.child) == (None, {"eos_token_id": 2, "temperature": 0.6})
    assert not (report.child / "chat_template.jinja").exists()


def test_a_chat_template_that_was_asked_for_comes_with_its_end_of_text(tmp_path, parents):
    primary, secondary = make_talkers(tmp_path, primary_knows=True)
    parents.watch(primary, secondary)
    report = merge(primary, secondary, tmp_path / "child", chat_template="secondary")
    ends = rows_by_token(report.child)["<|im_end|>"]
    # The primary's own end, then the secondary's two: <|im_end|> and w2, which has the same id here.
    assert talk_of(report.child) == (TEMPLATE, {"eos_token_id": [2, ends], "temperature": 0.6})
    assert report.as_dict()["chat_template_from"] == "secondary"
    assert "| chat template from | secondary |" in (report.child / "README.md").read_text()
    assert "chat_template: secondary" in (report.child / "merge_recipe.yaml").read_text()


def test_a_chat_template_whose_marks_are_no_tokens_of_the_childs_is_not_offered(tmp_path):
    primary, secondary = make_talkers(tmp_path, primary_knows=False)
    parity = merge(primary, secondary, tmp_path / "child").plan.parity
    assert parity.template.offered is None
    assert any("<|im_end|>, <|im_start|>" in m.consequence for m in parity.of_severity("notice"))
    with pytest.raises(SlerpMergeError, match="the child's tokenizer does not know"):
        merge(primary, secondary, tmp_path / "other", chat_template="secondary")
    child = merge(primary, secondary, tmp_path / "union", chat_template="secondary", tokenizer="union").child
    assert talk_of(child)[0] == TEMPLATE


def test_a_chat_template_can_be_left_behind(tmp_path):
    primary, secondary = make_talkers(tmp_path, primary_knows=True)
    both = {"tokenizer": "secondary", "chat_template": "primary"}
    with pytest.raises(SlerpMergeError, match="The primary has none to take"):
        merge(primary, secondary, tmp_path / "child", **both)
    edit_json(primary / "tokenizer_config.json", chat_template="{{ messages }}")
    assert talk_of(merge(primary, secondary, tmp_path / "child", **both).child)[0] == "{{ messages }}"


def test_a_named_chat_template_is_the_childs_and_its_turns_end_it(tmp_path, parents):
    primary, secondary = make_talkers(tmp_path, primary_knows=True)
    parents.watch(primary, secondary)
    report = merge(primary, secondary, tmp_path / "child", chat_template="chatml", tokenizer="primary")
    template, settings = talk_of(report.child)
    assert template == CHAT_TEMPLATES["chatml"]
    assert settings == {"eos_token_id": [2, rows_by_token(report.child)["<|im_end|>"]], "temperature": 0.6}
    assert report.as_dict()["chat_template_from"] == "chatml"
    assert read_recipe(report.child / "merge_recipe.yaml").chat_template == "chatml"
    # A template of a parent's own does not stand beside it.
    other = merge(primary, secondary, tmp_path / "other", chat_template="mistral", tokenizer="secondary").child
    assert talk_of(other)[0] == CHAT_TEMPLATES["mistral"]
    assert not (other / "chat_template.jinja").exists()


def test_a_chat_template_of_ones_own_says_which_marks_are_no_tokens(tmp_path):
    primary, secondary = make_talkers(tmp_path, primary_knows=True)
    text = "{{ bos_token }}<|turn|>{{ messages[0].content }}<|im_end|>"
    report = merge(primary, secondary, tmp_path / "child", chat_template=text, tokenizer="primary")
    assert talk_of(report.child)[0] == text
    assert read_recipe(report.child / "merge_recipe.yaml").chat_template == text
    told = [m.consequence for m in report.plan.parity.of_severity("notice") if m.subject == "chat template"]
    assert told == ["It speaks of <|turn|>, which the child's tokenizer does not know and cuts into pieces."]
    with pytest.raises(SlerpMergeError, match="chat template"):
        merge(primary, secondary, tmp_path / "none", chat_template="chat-ml")


def test_equal_chat_templates_are_not_said_to_differ(tmp_path):
    """Nor are two that stand nowhere, where a template is asked for by name."""
    primary, secondary = make_talkers(tmp_path, primary_knows=True)
    for template, told in ((TEMPLATE, f"{len(TEMPLATE)} characters"), (None, "none")):
        (secondary / "chat_template.jinja").unlink(missing_ok=True)
        for folder in (primary, secondary):
            edit_json(folder / "tokenizer_config.json", chat_template=template)
        plan = prepare_merge(MergeRecipe(primary, secondary, chat_template="chatml"), RunOptions(tmp_path / "child"))
        lines = [line for line in plan.parity.mismatches if line.subject == "chat template"]
        assert lines and {(line.primary, line.secondary) for line in lines} == {(told, told)}


@pytest.mark.parametrize("primary_knows", [True, False])
def test_either_parents_chat_template_is_taken_where_it_fits(tmp_path, primary_knows):
    primary, secondary = make_talkers(tmp_path, primary_knows)
    child = merge(primary, secondary, tmp_path / "child", chat_template="either", tokenizer="primary").child
    assert talk_of(child)[0] == (TEMPLATE if primary_knows else None)
    both = {"chat_template": "either", "tokenizer": "secondary"}
    other = merge(primary, secondary, tmp_path / "other", **both).child
    assert talk_of(other)[0] == TEMPLATE
    assert yaml.safe_load((other / "merge_recipe.yaml").read_text())["chat_template"] == "auto"  # as mergekit calls it
    assert read_recipe(other / "merge_recipe.yaml").chat_template == "either"


def test_token_ids_follow_the_tokenizer_and_settings_the_primary(tmp_path):
    primary, secondary = make_talkers(tmp_path, primary_knows=False)
    edit_json(primary / "config.json", eos_token_id=2, pad_token_id=25)
    edit_json(secondary / "config.json", eos_token_id=81)
    report = merge(primary, secondary, tmp_path / "child", tokenizer="secondary")
    template, generation = talk_of(report.child)
    assert (template, generation) == (TEMPLATE, {"eos_token_id": [81, 2], "temperature": 0.6})
    config = json.loads((report.child / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (81, 1)
    assert config["pad_token_id"] == rows_by_token(secondary)[WORDS[25]] == 65


@pytest.mark.parametrize("ids", [44, [2, 44], [2, 3, -1]])
def test_ids_that_have_no_row_are_left_out_and_told(tmp_path, ids):
    primary, secondary = make_talkers(tmp_path, primary_knows=True)
    edit_json(primary / "generation_config.json", eos_token_id=ids)
    report = merge(primary, secondary, tmp_path / "child")
    expected = {44: {}, (2, 44): {"eos_token_id": 2}, (2, 3, -1): {"eos_token_id": [2, 3]}}
    assert talk_of(report.child)[1] == {**expected[ids if ids == 44 else tuple(ids)], "temperature": 0.6}
    assert any(m.subject.endswith("eos_token_id") for m in report.plan.parity.of_severity("resolved"))


def test_a_template_in_a_file_of_the_processors_is_seen(tmp_path):
    primary, secondary = make_pair(tmp_path)
    for folder in (primary, secondary):
        write_tokenizer(folder, [f"w{n}" for n in range(48)])
    (secondary / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    recipe = MergeRecipe(primary, secondary)
    assert check_parity(open_parents(recipe), recipe).template.offered == "secondary"


# ── A child that speaks ─────────────────────────────────────────────────────────────────────────


def move_vocabulary(folder: Path, target: Path, at: int, count: int) -> Path:
    """A copy of a model with `count` tokens of its own at the id `at`; all others stay in their order."""
    shutil.copytree(folder, target)
    content = json.loads((target / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    moved = {token: number + count * (number >= at) for token, number in vocabulary.items()}
    content["model"]["vocab"] = {**moved, **{f"new{n}": at + n for n in range(count)}}
    (target / "tokenizer.json").write_text(json.dumps(content))
    tensors = load_tensors(target)
    for name in (EMBEDDING, HEAD):
        own = torch.full((count, tensors[name].shape[1]), 0.01, dtype=tensors[name].dtype)
        tensors[name] = torch.cat([tensors[name][:at], own, tensors[name][at:]])
    replace_tensors(target, tensors)
    edit_json(target / "config.json", vocab_size=len(tensors[EMBEDDING]))
    return target


def generate_text(folder: Path, prompt: str, new_tokens: int = 24) -> str:
    """What the model of a folder says after `prompt`, greedily, on the processor."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def test_a_child_speaks_the_same_whatever_order_the_second_vocabulary_is_in(tmp_path, parents):
    primary, secondary = make_demo_parents(tmp_path)
    moved = move_vocabulary(secondary, tmp_path / "moved", 200, 40)
    parents.watch(primary, secondary, moved)
    plain = merge(primary, secondary, tmp_path / "plain")
    child = merge(primary, moved, tmp_path / "child")
    size = len(load_tensors(primary)[EMBEDDING])
    assert counts(child) == {"rows": size, "matched": 200, "moved": size - 200, "left_out": 40}
    assert_same_bits(load_tensors(child.child), load_tensors(plain.child))
    said = [generate_text(report.child, "the") for report in (plain, child)]
    assert said[0] == said[1]
    assert sum(said[0].count(word) for word in ("sea", "garden", "wind", "rain", "waves", "leaves", "sails")) >= 2, (
        said[0]
    )
    grown = merge(primary, moved, tmp_path / "grown", tokenizer="union").child
    assert generate_text(grown, "the") == said[0]
    assert len(AutoTokenizer.from_pretrained(grown)) == len(load_tensors(grown)[EMBEDDING]) == size + 40
    by_secondary = merge(primary, moved, tmp_path / "by secondary", tokenizer="secondary").child
    assert generate_text(by_secondary, "the") == said[0]
    assert len(load_tensors(by_secondary)[EMBEDDING]) == size + 40


def test_an_id_that_stands_for_none_stays_so(tmp_path):
    primary, secondary = make_talkers(tmp_path, primary_knows=False)
    edit_json(primary / "config.json", pad_token_id=-1)
    child = merge(primary, secondary, tmp_path / "child", tokenizer="secondary").child
    assert json.loads((child / "config.json").read_text())["pad_token_id"] == -1


@pytest.mark.parametrize("nested", [False, True])
def test_the_end_of_text_is_found_wherever_it_is_stated(tmp_path, nested):
    primary, secondary = make_talkers(tmp_path, primary_knows=True)
    (primary / "generation_config.json").unlink()
    stated = {"eos_token_id": 5, "vocab_size": 44}
    edit_json(primary / "config.json", eos_token_id=...)
    edit_json(primary / "config.json", **({"text_config": stated} if nested else stated))
    edit_json(secondary / "config.json", eos_token_id=..., **({"text_config": {"vocab_size": 82}} if nested else {}))
    child = merge(primary, secondary, tmp_path / "child", chat_template="secondary").child
    ends = rows_by_token(child)["<|im_end|>"]
    assert json.loads((child / "generation_config.json").read_text())["eos_token_id"] == [5, ends, 2]


def test_no_end_of_text_anywhere_is_none_in_the_child(tmp_path):
    primary, secondary = make_talkers(tmp_path, primary_knows=True)
    for folder in (primary, secondary):
        edit_json(folder / "config.json", eos_token_id=...)
        (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    child = merge(primary, secondary, tmp_path / "child", chat_template="secondary").child
    assert json.loads((child / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_a_template_without_any_tokenizer_is_refused_where_asked_for(tmp_path):
    primary, secondary = make_pair(tmp_path)
    (secondary / "chat_template.jinja").write_text("{{ messages }}")
    report = merge(primary, secondary, tmp_path / "child")
    assert not (report.child / "chat_template.jinja").exists()
    with pytest.raises(SlerpMergeError, match="Without a tokenizer"):
        merge(primary, secondary, tmp_path / "other", chat_template="secondary")
