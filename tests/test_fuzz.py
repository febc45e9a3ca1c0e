"""Two thousand damaged or hostile models: each has a right child, or one clear refusal, soon and in little memory."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from slerpkit.child.report import MergeReport
from slerpkit.messages import SlerpMergeError
from slerpkit.recipe import MergeRecipe, RunOptions
from slerpkit.schedule import Schedule
from slerpkit.story import execute_merge, prepare_merge
from tests.builders import (
    DEVICE,
    HIDDEN,
    LLAMA_CONFIG,
    VOCABULARY,
    add_tokenizer,
    distance,
    load_tensors,
    make_checkpoint,
    reference_slerp,
)
from tests.conftest import fingerprint

SEEDS_OF_EACH = 80
LONGEST_SECONDS = 5
MOST_BYTES = 500_000_000
NUMBERS = [0, -1, 1, 2, 47, 48, 49, 2**31, 2**62, 2**63, 2**64, 10**30, 1e308, -0.5, float("nan"), float("inf")]
JUNK = [
    *NUMBERS,
    None,
    True,
    "",
    "x",
    "\x1b[31m[red]\x07",
    "../../x",
    "é" * 300,
    [],
    {},
    [[]],
    {"a": {}},
    [1, "a", None],
]


def small_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Parents in each format, whole; `victim` and its kin are copied before they are harmed."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = {**LLAMA_CONFIG, "num_hidden_layers": 1}
    for seed, (name, how) in enumerate(
        {"primary": {}, "victim": {}, "sharded": {"shards": 2}, "pickled": {"storage": "bin"}}.items()
    ):
        make_checkpoint(folder / name, small_tensors(seed), config, **how)
        add_tokenizer(folder / name)
        settings = {"eos_token_id": 2, "suppress_tokens": [1, 2], "temperature": 0.5}
        (folder / name / "generation_config.json").write_text(json.dumps(settings))
        (folder / name / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


# ── Ways to harm a file ──


def flip_bytes(chance: random.Random, data: bytes) -> bytes:
    harmed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        if harmed:
            harmed[chance.randrange(len(harmed))] = chance.randrange(256)
    return bytes(harmed)


def cut_or_grow(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(len(data) + 1)
    return chance.choice(
        [data[:place], data + data[:place], data[:place] + bytes(50) + data[place:], data[place:], b""]
    )


def harm_text(chance: random.Random, data: bytes) -> bytes:
    """Bytes that stand for something in JSON, at any place."""
    marks = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\xff", b"\x00", b"\\ud800", b"1e999", b"-", b"null"]
    marks += [b"[" * 100_000, b'{"a":' * 5_000, b'"__metadata__"', b"9" * 5_000]
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.choice(marks) + data[place + chance.choice([0, 0, 1, 5]) :]


def harm_value(chance: random.Random, value: Any, depth: int = 0) -> Any:
    """A JSON value with a part of it exchanged, removed, added or moved a little."""
    if isinstance(value, dict) and value and depth < 4 and chance.random() < 0.85:
        value = dict(value)
        key = chance.choice(list(value))
        act = chance.random()
        if act < 0.7:
            value[key] = harm_value(chance, value[key], depth + 1)
        elif act < 0.8:
            del value[key]
        elif act < 0.9:
            value[chance.choice(["", "x", "model.layers.7.x.weight", "\x1b]0;x\x07", "[bold]"])] = value[key]
        else:
            value[chance.choice(list(value))] = value[key]
        return value
    if isinstance(value, list) and value and chance.random() < 0.6:
        value = list(value)
        value[chance.randrange(len(value))] = harm_value(chance, value[0], depth + 1)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 2, 1000, -value, 2**40])
    return chance.choice(JUNK)


def harm_json(chance: random.Random, data: bytes) -> bytes:
    return json.dumps(harm_value(chance, json.loads(data))).encode()


def harm_header(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else, and whose length may lie too."""
    (length,) = struct.unpack("<Q", data[:8])
    try:
        header = harm_value(chance, json.loads(data[8 : 8 + length]))
    except (ValueError, RecursionError):  # it was harmed before, beyond reading
        return data
    text = json.dumps(header).encode()
    if chance.random() < 0.2:
        text = harm_text(chance, text)
    stated = chance.choice([len(text)] * 6 + [0, 1, len(text) + 1, 2**32, 2**63, 2**64 - 1])
    return struct.pack("<Q", stated) + text + data[8 + length :]


def harm_pickle(chance: random.Random, data: bytes) -> bytes:
    """The table of a zip file's tensors, stored as it is, has its own place in the file."""
    begin = data.find(b"\x80\x02")
    end = data.find(b".PK", begin)
    harmed = bytearray(data)
    for _ in range(chance.choice([1, 2, 5])):
        harmed[chance.randrange(begin, end)] = chance.randrange(256)
    return bytes(harmed)


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (Path("touched"),))


def other_pickle(chance: random.Random, data: bytes) -> bytes:
    values = [Malicious(), {"x": Malicious()}, [1, 2], {"model": 3}, {3: 4}, "x" * 1000, {"a": {"b": {}}}]
    return pickle.dumps(chance.choice(values), protocol=chance.choice([0, 2, 4]))


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ATTACKS: dict[str, tuple[str, str, Callable[[random.Random, bytes], bytes]]] = {
    "header's values": ("victim", WEIGHTS, harm_header),
    "header's values again": ("victim", WEIGHTS, lambda chance, data: harm_header(chance, harm_header(chance, data))),
    "header's text": ("victim", WEIGHTS, lambda c, data: data[:8] + harm_text(c, data[8:600]) + data[600:]),
    "header's bytes": ("victim", WEIGHTS, lambda c, data: flip_bytes(c, data[:500]) + data[500:]),
    "length of a file": ("victim", WEIGHTS, cut_or_grow),
    "values of weights": ("victim", WEIGHTS, lambda c, data: data[:-4000] + flip_bytes(c, data[-4000:])),
    "index's values": ("sharded", INDEX, harm_json),
    "index's text": ("sharded", INDEX, harm_text),
    "length of a shard": ("sharded", "model-00002-of-00002.safetensors", cut_or_grow),
    "config's values": ("victim", "config.json", harm_json),
    "config's values twice": ("victim", "config.json", lambda c, data: harm_json(c, harm_json(c, data))),
    "config's text": ("victim", "config.json", harm_text),
    "config's bytes": ("victim", "config.json", flip_bytes),
    "pickle's table": ("pickled", "pytorch_model.bin", harm_pickle),
    "pickle's bytes": ("pickled", "pytorch_model.bin", lambda c, data: flip_bytes(c, data[:1500]) + data[1500:]),
    "length of a pickle": ("pickled", "pytorch_model.bin", cut_or_grow),
    "another pickle": ("pickled", "pytorch_model.bin", other_pickle),
    "tokenizer's values": ("victim", "tokenizer.json", harm_json),
    "tokenizer's text": ("victim", "tokenizer.json", harm_text),
    "tokenizer's settings": ("victim", "tokenizer_config.json", harm_json),
    "settings' tokens": (
        "victim",
        "tokenizer_config.json",
        lambda c, data: harm_json(c, json.dumps({"added_tokens_decoder": {"48": {"content": "x", "id": 5}}}).encode()),
    ),
    "chat template": (
        "victim",
        "tokenizer_config.json",
        lambda c, data: json.dumps({"chat_template": c.choice([*JUNK, "{% for", [{"name": 3}]])}).encode(),
    ),
    "added tokens": ("victim", "added_tokens.json", lambda c, data: harm_json(c, b'{"x": 48, "y": 49}')),
    "generation's values": ("victim", "generation_config.json", harm_json),
    "generation's text": ("victim", "generation_config.json", harm_text),
    "model card": ("victim", "README.md", lambda c, data: flip_bytes(c, data) + c.randbytes(9)),
}  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process has held so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """A model's tensors as its format's own library reads them."""
    pickled = folder / "pytorch_model.bin"
    return torch.load(pickled, weights_only=True) if pickled.exists() else load_tensors(folder)


def assert_right_child(report: MergeReport, t: float) -> int:
    """What the parents' own libraries read makes every tensor of the child; returns how many were held against it."""
    left, right = weights_of(report.plan.parents.primary.folder), weights_of(report.plan.parents.secondary.folder)
    merged, checked = load_tensors(report.child), 0
    assert merged.keys() <= left.keys()
    follows = report.plan.parity.vocabulary.tensors[0] if report.plan.parity.vocabulary.row_map else ()
    for name, found in merged.items():
        v0, v1 = left[name], right.get(name)
        if v1 is None or name in follows or not found.is_floating_point():
            continue  # a tied head, rows in another order, whole numbers: they have tests of their own
        assert found.shape == v0.shape == v1.shape
        if all(torch.isfinite(v.double()).all() and v.double().norm() < 1e18 for v in (v0, v1)):
            assert distance(found, v0, v1, reference_slerp(v0, v1, t)) <= 0.51, name
            checked += 1
    return checked


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_harmed_model_has_a_right_child_or_is_refused(tmp_path, models, attack, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever would write beside itself does it here
    victim, file, harm = ATTACKS[attack]
    whole = (models / victim / file).read_bytes() if (models / victim / file).exists() else b""
    before, peak, made, refused, checked = fingerprint(models), peak_bytes(), 0, 0, 0
    parents = {"primary": models / "primary", "secondary": tmp_path / "victim"}
    for seed in range(SEEDS_OF_EACH):
        chance = random.Random(f"{attack} {seed}")
        shutil.rmtree(tmp_path / "victim", ignore_errors=True)
        shutil.copytree(models / victim, tmp_path / "victim")
        (tmp_path / "victim" / file).write_bytes(harm(chance, whole))
        harmed = fingerprint(tmp_path / "victim")
        roles = ["primary", "secondary"] if seed % 2 else ["secondary", "primary"]
        first, second = (parents[role] for role in roles)
        settings = {"tokenizer": chance.choice(["auto", "auto", "primary", "secondary", "union"])}
        recipe = MergeRecipe(first, second, Schedule.constant(0.3), **settings)
        started = time.monotonic()
        try:
            report = execute_merge(prepare_merge(recipe, RunOptions(tmp_path / "child", DEVICE)))
        except SlerpMergeError as error:
            assert error.message and error.hint
            refused += 1
            assert not (tmp_path / "child").exists()
        else:
            made += 1
            try:
                checked += assert_right_child(report, 0.3)
            except RuntimeError:  # torch refuses any fault of a zip file, in parts without weights too
                made -= 1
                refused += 1
            except (SafetensorError, pickle.UnpicklingError) as error:
                pytest.fail(f"seed {seed}: a child was made of what its own library refuses: {error}")
            shutil.rmtree(tmp_path / "child")
        assert time.monotonic() - started < LONGEST_SECONDS, seed
        assert fingerprint(tmp_path / "victim") == harmed
        assert {path.name for path in tmp_path.iterdir()} == {"victim"}, seed
    assert made + refused == SEEDS_OF_EACH
    assert checked >= made, "children were made and not looked at"
    assert fingerprint(models) == before
    assert peak_bytes() - peak < MOST_BYTES


def test_there_are_two_thousand_of_them():
    assert len(ATTACKS) * SEEDS_OF_EACH >= 2000
