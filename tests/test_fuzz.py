"""Two thousand damaged or hostile models: each has a right child, or one clear refusal, soon and in little memory.

SLERPMERGE_FUZZ_CASES=10000 makes ten thousand of them.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from slerpkit.child.findings import make_finding
from slerpkit.child.report import REPORT_NAME, MergeReport, amend_report
from slerpkit.child.verify import Verification, nothing_further
from slerpkit.evaluation.limits import text_within_limits
from slerpkit.evaluation.models import count_of_tokens
from slerpkit.files import parse_json
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import CARD_NAME, open_checkpoint, open_parents
from slerpkit.parity.check import check_parity
from slerpkit.parity.report import ParityReport
from slerpkit.parity.sentencepiece_file import read_cutting, read_pieces
from slerpkit.recipe import MergeRecipe, RunOptions, check_recipe
from slerpkit.recipe_file import RECIPE_NAME, read_recipe
from slerpkit.recipe_writer import recipe_text
from slerpkit.schedule import Schedule
from slerpkit.screen import panels
from slerpkit.screen.console import OutputConsole, render_error
from slerpkit.story import execute_merge, prepare_merge
from tests.builders import (
    DEVICE,
    HIDDEN,
    LLAMA_CONFIG,
    VOCABULARY,
    add_tokenizer,
    copy_model,
    distance,
    edit_json,
    load_tensors,
    make_checkpoint,
    merge,
    plan_of,
    reference_slerp,
)
from tests.conftest import fingerprint
from tests.test_tokenizer_files import PIECES, sentencepiece_model

CASES = int(os.environ.get("SLERPMERGE_FUZZ_CASES", "2000"))
LONGEST_SECONDS = 5  # of the processor, so that what else runs on a machine does not count
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


# ── What stands in JSON files of a model, and what may stand there instead ──

TURN = "{% for m in messages %}{{ m.content }}{% endfor %}"
# Of each file with settings, keys of many kinds of models; the merge need not know them all.
FILES: dict[str, Any] = {
    "config.json": {
        **LLAMA_CONFIG,
        "num_hidden_layers": 1,
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32},
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "layer_types": ["full_attention"],
        "sliding_window": 16,
        "use_sliding_window": True,
        "head_dim": 4,
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
        "auto_map": {"AutoModel": "modeling.Own", "AutoTokenizer": ["tokenization.Own", None]},
        "text_config": {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "bos_token_id": 1},
        "vocab_size_per_layer_input": VOCABULARY,
        "time_step_limit": [0.0, 1.0],
        "moe_only_layers": [0],
        "is_encoder_decoder": False,
        "transformers_version": "5.0.0",
        "_name_or_path": "org/name",
        "torch_dtype": "bfloat16",
        "tokenizer_class": "LlamaTokenizer",
        "pad_token_id": None,
    },
    "generation_config.json": {
        "eos_token_id": [2, 3],
        "bos_token_id": 1,
        "suppress_tokens": [1, 2],
        "forced_decoder_ids": [[1, 2]],
        "temperature": 0.5,
        "transformers_version": "5.0.0",
        "nested": {"pad_token_id": 4},
    },
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": {"__type": "AddedToken", "content": chr(0x4E00), "lstrip": False, "special": True},
        "eos_token": chr(0x4E02),
        "added_tokens_decoder": {"48": {"content": "<x>", "special": True}, "5": {"content": chr(0x4E05)}},
        "additional_special_tokens": ["<x>"],
        "chat_template": [{"name": "default", "template": TURN}, {"name": "tool_use", "template": "{{ 1 }}"}],
        "model_max_length": 10**30,
        "auto_map": {"AutoTokenizer": ["tokenization.Own", None]},
        "clean_up_tokenization_spaces": False,
    },
    "special_tokens_map.json": {"unk_token": chr(0x4E00), "eos_token": {"content": chr(0x4E02), "special": True}},
    "added_tokens.json": {"<x>": 48, "<y>": 49},
    "chat_template.json": {"chat_template": TURN},
    "preprocessor_config.json": {"image_mean": [0.5], "size": {"height": 8}, "auto_map": {"AutoProcessor": "p.Own"}},
    "processor_config.json": {"processor_class": "Own", "auto_map": {"AutoProcessor": "p.Own"}},
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True},
    "config_sentence_transformers.json": {"prompts": {"query": "find: "}, "similarity_fn_name": "cosine"},
}
DRESSED = ("dressed", "embedder")  # the models that have these files
EMBEDDER_FILES = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json")
# As they are written in a file: some of them json.dumps would never write, or could not.
NUMBERS_IN_JSON = (
    "0", "-0", "-1", "1.5", "47", "48", "49", str(2**31), str(2**63), str(2**64), "1e308", "-1e308", "5e-324", "1e999",
    "-1e999", "1E400", "NaN", "Infinity", "-Infinity", "9" * 250, "9" * 400, "-" + "9" * 4_299, "9" * 5_000,
    "9" * 200_000, "0." + "3" * 5_000, "1e" + "9" * 5_000,
)  # fmt: skip
STRINGS_IN_JSON = (
    '""', '"x"', r'"\ud800"', r'"a\udfffb"', r'"\udc00\ud800"', r'"\u0000"', r'"\u001b]0;x\u0007"', r'"\u202e"',
    '"[/red]"',
    '"[bold"', '"../../x"', '"/etc/passwd"', '"a/b--c"', r'"\n---\n"', '"|<!--"', '"{{ x }}"', '"{% for"', '"é\u0301"',
    '"' + "y" * 100_000 + '"', '"' + "[" * 2_000 + '"', '"NaN"', '"12"', '"--accept"', '"LABEL_0"',
)  # fmt: skip
SHAPES_IN_JSON = (
    "null", "true", "false", "[]", "{}", "[[]]", "[null]", '{"":null}', "[{}]", '{"a":{"b":[1,"x",null]}}', "[1,2,3]",
    '["x"]', '{"0":"x"}', '{"x":0}', "[0.5]", "[" * 800 + "]" * 800, '{"a":' * 300 + "1" + "}" * 300,
    "[" + ",".join(["0"] * 5_000) + "]", '{"content":null}', '[{"name":1,"template":2}]', '{"__float__":"NaN"}',
    '{"__float__":[]}', '{"x":1,"x":2}',
)  # fmt: skip
MARK = "put something else here"


def places_in(value: Any) -> list[tuple[Any, ...]]:
    """The way to each value inside a JSON value; of long lists the first ones alone."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [()] + [(key, *rest) for key, part in inner for rest in places_in(part)]


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """A JSON value with another value at one place."""
    if not way:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[way[0]] = replaced(changed[way[0]], way[1:], new)
    return changed


def plant(chance: random.Random, data: bytes) -> bytes:
    """A JSON file with a string, number or shape of another kind in place of one or two of its values or names."""
    value = json.loads(data)
    ways = places_in(value)[1:] or [()]
    depth = chance.choice([1, 1, 2, 3, 9])
    ways = [way for way in ways if len(way) <= depth] or ways
    chosen = chance.sample(ways, min(len(ways), chance.choice([1, 1, 1, 2])))
    fragments = []
    for number, way in enumerate(sorted(chosen, key=len, reverse=True)):
        value = replaced(value, way, f"{MARK} {number}")
        fragments.append(chance.choice(chance.choice([NUMBERS_IN_JSON, STRINGS_IN_JSON, SHAPES_IN_JSON])))
    text = json.dumps(value, ensure_ascii=False)
    for number, fragment in enumerate(fragments):
        text = text.replace(f'"{MARK} {number}"', fragment)
    if chance.random() < 0.1:  # a name
        name = chance.choice([*way_names(chosen), "config"])
        text = text.replace(f'"{name}":', f"{chance.choice(STRINGS_IN_JSON)}:", 1)
    return text.encode("utf-8", "surrogatepass")


def way_names(ways: list[tuple[Any, ...]]) -> list[str]:
    return [part for way in ways for part in way if isinstance(part, str)]


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
    for name in DRESSED:
        shutil.copytree(folder / "victim", folder / name)
        for file, content in FILES.items():
            if name == "embedder" or file not in EMBEDDER_FILES:
                (folder / name / file).parent.mkdir(exist_ok=True)
                (folder / name / file).write_text(json.dumps(content))
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


def plant_in_header(chance: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = plant(chance, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def hostile_card(chance: random.Random, data: bytes) -> bytes:
    """A model card that is long in ways that could take long."""
    unit = chance.choice(
        [b"---\n", b"\n---", b"license:", b"license: \n", b" ", b"\n", b"\r\n", b"<!--", b"|", b"\xff", b"-"]
    )
    begin = chance.choice([b"", b"---\n", b"---\nlicense: ", b"---\r\nlicense:"])
    return (
        begin
        + unit * chance.choice([1, 1_000, 1_000, 1_000, 3_000_000 // len(unit)])
        + chance.choice([b"", b"\n---\n", data])
    )


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
    **{
        f"{file}, planted": ("embedder" if file in EMBEDDER_FILES else "dressed", file, plant)
        for file in FILES
    },
    "tokenizer.json, planted": ("victim", "tokenizer.json", plant),
    "index, planted": ("sharded", INDEX, plant),
    "header, planted": ("victim", WEIGHTS, plant_in_header),
    "card's text": ("victim", "README.md", hostile_card),
    "model card": ("victim", "README.md", lambda c, data: flip_bytes(c, data) + c.randbytes(9)),
}  # fmt: skip


SEEDS_OF_EACH = math.ceil(CASES / len(ATTACKS))


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


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def assert_json_is_json(report: MergeReport) -> None:
    """Every JSON file of a child is JSON as any program reads it, or was said to be none before the merge."""
    json.dumps(report.as_dict(), allow_nan=False)
    told = {mismatch.subject for mismatch in report.plan.parity.mismatches}
    for file in report.child.rglob("*.json"):
        if file.relative_to(report.child).as_posix() not in told:
            json.loads(file.read_bytes().decode("utf-8"), parse_constant=refuse)


def draw(render: Callable[..., Any], *what: Any) -> None:
    """What a person would be shown, on a terminal that takes UTF-8 and nothing else."""
    console = OutputConsole(io.TextIOWrapper(io.BytesIO(), "utf-8"))
    console.width = 100
    console.print(render(console, *what))
    console.file.flush()


def further_of(attack: str, seed: int) -> Callable[[Path], Verification]:
    """Has transformers load some of the children's tokenizers, and raise what it raises."""
    if seed % 8 or "token" not in attack:
        return nothing_further

    def load(folder: Path) -> Verification:
        return Verification((f"{count_of_tokens(folder)} tokens",), ())

    return load


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
        if victim in DRESSED:  # parents that differ in such a file are refused for that, so often both have it
            partner = parents["primary"] = tmp_path / "partner"
            shutil.rmtree(partner, ignore_errors=True)
            shutil.copytree(models / victim, partner)
            shutil.copyfile(models / "primary" / WEIGHTS, partner / WEIGHTS)
            if chance.random() < 0.6:
                shutil.copyfile(tmp_path / "victim" / file, partner / file)
        harmed = fingerprint(tmp_path / "victim")
        roles = ["primary", "secondary"] if seed % 2 else ["secondary", "primary"]
        first, second = (parents[role] for role in roles)
        settings = {"tokenizer": chance.choice(["auto", "auto", "primary", "secondary", "union"])}
        recipe = MergeRecipe(first, second, Schedule.constant(0.3), **settings)
        started = time.process_time()
        try:
            plan = prepare_merge(recipe, RunOptions(tmp_path / "child", DEVICE))
            draw(panels.render_parity, plan.parity)
            draw(panels.render_plan, plan)
            report = execute_merge(plan, further=further_of(attack, seed))
            draw(panels.render_report, report)
        except SlerpMergeError as error:
            assert error.message and error.hint
            draw(render_error, error)
            refused += 1
            assert not (tmp_path / "child").exists()
        else:
            made += 1
            try:
                checked += assert_right_child(report, 0.3)
                assert_json_is_json(report)
            except RuntimeError:  # torch refuses any fault of a zip file, in parts without weights too
                made -= 1
                refused += 1
            except (SafetensorError, pickle.UnpicklingError) as error:
                pytest.fail(f"seed {seed}: a child was made of what its own library refuses: {error}")
            shutil.rmtree(tmp_path / "child")
        assert time.process_time() - started < LONGEST_SECONDS, seed
        assert fingerprint(tmp_path / "victim") == harmed
        assert {path.name for path in tmp_path.iterdir()} <= {"victim", "partner"}, seed
    assert made + refused == SEEDS_OF_EACH
    assert checked >= made, "children were made and not looked at"
    assert fingerprint(models) == before
    assert peak_bytes() - peak < MOST_BYTES


def test_there_are_two_thousand_of_them():
    assert len(ATTACKS) * SEEDS_OF_EACH >= CASES >= 2000


# ── A child that is given with --child, and a recipe, are strangers' files too ──


@pytest.fixture(scope="module")
def child(models, tmp_path_factory) -> Path:
    recipe = MergeRecipe(models / "primary", models / "victim", Schedule.constant(0.3))
    folder = tmp_path_factory.mktemp("made") / "child"
    execute_merge(prepare_merge(recipe, RunOptions(folder, DEVICE)))
    amend_report(folder, [FINDING])
    return folder


FINDING = make_finding("taste", "Tastes", "Hi", ("a", "b"), [("x", "y")], measured="Greedy.", figures={"n": 1.0})


def test_a_forged_report_is_amended_or_refused(child, tmp_path):
    report, card = (child / REPORT_NAME).read_bytes(), (child / CARD_NAME).read_bytes()
    for seed in range(4 * SEEDS_OF_EACH):
        chance = random.Random(f"report {seed}")
        harmed = {REPORT_NAME: plant(chance, report), CARD_NAME: chance.choice([card, flip_bytes(chance, card)])}
        for name, data in harmed.items():
            (tmp_path / name).write_bytes(data)
        started = time.process_time()
        try:
            amend_report(tmp_path, [FINDING])
        except SlerpMergeError as error:
            draw(render_error, error)
            assert {name: (tmp_path / name).read_bytes() for name in harmed} == harmed
        else:
            json.loads((tmp_path / REPORT_NAME).read_bytes().decode("utf-8"), parse_constant=refuse)
        assert time.process_time() - started < LONGEST_SECONDS, seed
        assert {path.name for path in tmp_path.iterdir()} == harmed.keys()


YAML = (
    "*a", "&a [*a]", "!!python/object/apply:os.system [touch]", "!!int 1_0", "0x" + "f" * 6_000, "0b" + "1" * 6_000,
    "~", "1" + ":59" * 999, ".inf", "-.Inf", ".nan", "2001-01-01", "!!binary x", "!!set {a}", "<<: *b", "'", "|", "- x",
    "%TAG", "`x", "\x85", "1_" * 3_000, "9" * 900_000, "@", "? a", "0o777", "1e" + "9" * 400,
)  # fmt: skip


def harm_yaml(chance: random.Random, text: str) -> str:
    """A recipe with a line or two of it given another value, removed, doubled or moved in."""
    lines = text.splitlines()
    for _ in range(chance.choice([1, 1, 2])):
        number, act = chance.randrange(len(lines)), chance.random()
        value = chance.choice(chance.choice([NUMBERS_IN_JSON, STRINGS_IN_JSON, SHAPES_IN_JSON, YAML]))
        if act < 0.6:
            lines[number] = f"{lines[number].partition(':')[0]}: {value}"
        elif act < 0.7:
            lines.insert(number, chance.choice(lines))
        elif act < 0.8 and len(lines) > 1:
            lines.pop(number)
        elif act < 0.9:
            lines[number] = "  " * chance.randrange(4) + lines[number].strip()
        else:
            lines[number] += value
    return "\n".join(lines)


def test_a_forged_recipe_is_followed_or_refused(child, tmp_path):
    text = (child / RECIPE_NAME).read_text("utf-8")
    path = child.with_name(RECIPE_NAME)
    for seed in range(4 * SEEDS_OF_EACH):
        path.write_text(harm_yaml(random.Random(f"recipe {seed}"), text), encoding="utf-8", errors="surrogatepass")
        started = time.process_time()
        try:
            recipe = read_recipe(path)
            check_recipe(recipe)
            plan = prepare_merge(recipe, RunOptions(tmp_path / "child", DEVICE))
            recipe_text(plan.settled_recipe, plan.parents.by_role, tmp_path).encode("utf-8")
        except SlerpMergeError as error:
            draw(render_error, error)
        assert time.process_time() - started < LONGEST_SECONDS, seed
    assert not any(tmp_path.iterdir())


def test_a_damaged_sentencepiece_model_is_read_or_refused(tmp_path):
    path, whole = tmp_path / "tokenizer.model", sentencepiece_model(PIECES)
    for seed in range(4 * SEEDS_OF_EACH):
        chance = random.Random(f"sentencepiece {seed}")
        path.write_bytes(chance.choice([flip_bytes, cut_or_grow])(chance, whole))
        for read in (read_pieces, read_cutting):
            try:
                read(path)
            except SlerpMergeError as error:
                draw(render_error, error)


# ── Kinds that were found so, each by itself ──


def parity_of(primary: Path, secondary: Path) -> ParityReport:
    recipe = MergeRecipe(primary, secondary)
    return check_parity(open_parents(recipe), recipe)


@pytest.mark.parametrize(("name", "content", "severity"), [
    ("tokenizer.json", "{", "blocking"),
    ("tokenizer.json", '{"x": NaN}', "blocking"),
    ("vocab.json", "[", "notice"),
    ("preprocessor_config.json", "{'size': 8}", "notice"),
    ("processor_config.json", '{"x": Infinity}', "notice"),
    ("preprocessor_config.json", '{"x": %s}' % ("9" * 5_000), "notice"),
])  # fmt: skip
def test_a_companion_that_is_no_json_is_told_before_the_merge(tmp_path, models, name, content, severity):
    folders = [copy_model(models / parent, tmp_path / parent) for parent in ("primary", "victim")]
    for folder in folders:
        (folder / name).write_text(content)
    (line,) = (line for line in parity_of(*folders).mismatches if line.subject == name)
    assert (line.severity, line.primary, line.secondary) == (severity, "no valid JSON", "not taken")
    (folders[0] / "tokenizer.json").unlink()
    if name == "vocab.json":  # and now the child's tokens stand there alone
        (line,) = (line for line in parity_of(*folders).mismatches if line.subject == name)
        assert line.severity == "blocking"


def test_infinities_of_a_config_stay_and_the_child_is_json(tmp_path, models):
    """Mamba 2 and its kin state a limit of Infinity, which Python's json reads and writes, and others refuse."""
    folders = [copy_model(models / parent, tmp_path / parent) for parent in ("primary", "victim")]
    for folder in folders:
        edit_json(folder / "config.json", limits=[0.0, math.inf, -math.inf], words='"Infinity" \\ NaN')
        edit_json(folder / "generation_config.json", exponent=math.inf)
    child = merge(*folders, tmp_path / "child").child
    for name, key in (("config.json", "limits"), ("generation_config.json", "exponent")):
        text, wanted = (child / name).read_text("utf-8"), json.loads((folders[0] / name).read_text())
        assert json.loads(text, parse_constant=refuse)[key] == wanted[key]
    assert json.loads((child / "config.json").read_text())["words"] == '"Infinity" \\ NaN'


@pytest.mark.parametrize("value", ["NaN", "9" * 5_000, "-" + "9" * 301, "[" * 65 + "]" * 65])
def test_what_no_program_could_use_is_refused_by_name(tmp_path, value):
    with pytest.raises(SlerpMergeError, match=r"config.json does not hold valid JSON"):
        parse_json(f'{{"x": {value}}}'.encode(), tmp_path / "config.json")


def test_the_largest_of_what_is_allowed_is_read(tmp_path):
    digits, nested = "9" * 300, "[" * 63 + "]" * 63
    value = parse_json(f'{{"x": {digits}, "y": {nested}, "z": "{"9" * 400}"}}'.encode(), tmp_path)
    assert value["x"] == int(digits)
    assert math.isfinite(float(value["x"]))


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
def test_a_tensors_name_of_thousands_of_characters_is_refused(tmp_path, storage):
    folder = make_checkpoint(tmp_path / "model", {"x" * 1001: torch.ones(2)}, storage=storage)
    with pytest.raises(SlerpMergeError) as caught:
        open_checkpoint(folder)
    assert len(caught.value.message) < 500


def test_a_class_of_millions_of_characters_is_shown_in_no_time(tmp_path, models):
    folders = [copy_model(models / parent, tmp_path / parent) for parent in ("primary", "victim")]
    for folder in folders:
        edit_json(folder / "config.json", architectures=["For" * 1_000_000])
    started = time.monotonic()
    draw(panels.render_plan, plan_of(*folders, tmp_path / "child"))
    draw(render_error, SlerpMergeError("x" * 3_000_000, "y"))
    assert time.monotonic() - started < LONGEST_SECONDS


@pytest.mark.parametrize("path", ["\ud800", "y" * 5_000])
def test_a_modules_folder_that_no_disk_can_have_is_refused(tmp_path, models, path):
    folder = copy_model(models / "embedder", tmp_path / "embedder")
    entries = [{"path": "", "type": "x"}, {"path": path, "type": "y"}]
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(SlerpMergeError, match="no usable path"):
        open_checkpoint(folder)


@pytest.mark.parametrize("fault", [TypeError("a list, not a dict"), type("PanicException", (BaseException,), {})("x")])
def test_whatever_a_library_raises_ends_tidily(tmp_path, models, monkeypatch, fault):
    def load(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    plan = plan_of(models / "primary", models / "victim", tmp_path / "child")
    with pytest.raises(SlerpMergeError, match="cannot load the child's tokenizer: "):
        execute_merge(plan, further=further_of("token", 0))
    assert not any(tmp_path.iterdir())


def test_a_fault_that_nobody_foresaw_leaves_no_staging_folder(tmp_path, models):
    def fail(_: Path) -> Verification:
        raise AttributeError("of a library")

    with pytest.raises(AttributeError):
        execute_merge(plan_of(models / "primary", models / "victim", tmp_path / "child"), further=fail)
    assert not any(tmp_path.iterdir())


def test_with_json_stdout_has_one_object_whatever_libraries_print(tmp_path, models):
    """Python's own prints, and those of code that knows only the descriptor."""
    noise = "import os, sys; from slerpkit import story; copy = story.copy_companions\n"
    noise += "def noisy(*args):\n    print('noise'); os.write(1, b'noise\\n'); copy(*args)\n"
    noise += "story.copy_companions = noisy\nimport slerpmerge\n"
    noise += "from slerpkit.screen import terminal\nterminal.leave(slerpmerge.main())"
    words = ("--primary", models / "primary", "--secondary", models / "victim", "--save-dir", tmp_path / "child")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", noise, *map(str, words), "--t", "0.5", "--yes", "--json"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=True)
    assert json.loads(shown.stdout)["child"] == str(tmp_path / "child")
    assert shown.stderr.count("noise") == 2


# ── Chat templates are programs ──

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "it takes more than": (ENDLESS, "{{ 10 ** (10 ** 10) }}"),
    "it makes": ("{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",),
    "memory": ("{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",),
    "undefined": ("{{ nobody.name }}",),
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely beside the threads of libraries")
@pytest.mark.parametrize(("reason", "template"), [(k, text) for k, texts in TEMPLATES.items() for text in texts])
def test_a_chat_template_without_end_is_ended(monkeypatch, reason, template):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    monkeypatch.setattr("slerpkit.evaluation.limits.MOST_SECONDS", 2 if reason.startswith("it takes") else 60)
    started = time.monotonic()
    with pytest.raises(SlerpMergeError) as caught:
        text_within_limits(lambda: ImmutableSandboxedEnvironment().from_string(template).render(), "It cannot", "Mend.")
    assert reason in caught.value.message.lower()
    assert time.monotonic() - started < 60


def test_a_text_within_limits_is_as_it_was_made():
    assert text_within_limits(lambda: "é\ud800\n" * 1000, "It cannot", "Mend.") == "é\ud800\n" * 1000
