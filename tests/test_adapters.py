"""LoRA adapters as parents: every family against peft's own merge in float32, and what is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slerpkit.evaluation.harness import check_harness_loads
from slerpkit.evaluation.models import ComparedModels, loaded_model
from slerpkit.merge.journal import fingerprint_difference
from slerpkit.merge.tensor_plan import MergedTensor
from slerpkit.messages import SlerpMergeError
from slerpkit.parents import adapted_tensor
from slerpkit.parents.adapted_tensor import AdaptedTensor
from slerpkit.parents.adapters import find_with_base
from slerpkit.parents.checkpoint import Checkpoint, describe_checkpoint, open_checkpoint
from slerpkit.parents.dtypes import stored_dtype, widen
from slerpkit.parents.tensors import MAX_KEPT, TensorReader
from slerpkit.recipe import RunOptions
from slerpkit.recipe_file import read_recipe
from slerpkit.screen.flags import answers_given, build_parser, equivalent_command
from slerpkit.screen.lookahead import what_is_lacking
from slerpkit.story import merge_models, prepare_merge
from tests.builders import (
    HIDDEN,
    INTERMEDIATE,
    LLAMA_CONFIG,
    VOCABULARY,
    add_tokenizer,
    assert_same_bits,
    copy_model,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    merge,
    plan_of,
    reference_slerp,
    set_block_elements,
    units_of_last_place,
)
from tests.terminal import Terminal, needs_terminal
from tests.test_command_line import run  # noqa: F401  (a fixture)
from tests.test_judgement import write_text

SMALL = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
KINDS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen": lambda: transformers.Qwen2Config(**SMALL),  # with biases
    "tied": lambda: transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": True}),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear", "lora_alpha": 3}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {r"layers\.0\.(self_attn|mlp)\.\w+_proj": 2, "v_proj": 7},
            "alpha_pattern": {"^model.layers.1.mlp.down_proj": 32, "q_proj": 1.5},
        },
    ),
    "some-layers": ("llama", {"layers_to_transform": [1]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-embeddings": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "modules-to-save": ("llama", {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]}),
    "biases-of-lora": ("qwen", {"bias": "lora_only", "target_modules": ["q_proj", "k_proj"]}),
    "all-biases": ("qwen", {"bias": "all", "target_modules": ["q_proj"]}),
    "lora-bias": ("qwen", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-square": ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "conv1d-and-embeddings": ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
}


def make_base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model of transformers, in which no weight is 0."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def load_base(base: Path, rows: int | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        torch.manual_seed(9)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def make_adapter(base: Path, folder: Path, seed: int = 0, rows: int | None = None, **settings: Any) -> Path:
    """An adapter as peft saves it, whose factors are all random; rows: of an embedding that it made longer."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **settings}
    torch.manual_seed(seed)
    model = peft.get_peft_model(load_base(base, rows), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path, rows: int | None = None) -> dict[str, torch.Tensor]:
    """What merge_and_unload makes of an adapter and its base, in float32."""
    model = peft.PeftModel.from_pretrained(load_base(base, rows), adapter).merge_and_unload()
    tensors = dict(model.state_dict())
    if "lm_head.weight" in tensors and tensors["lm_head.weight"].data_ptr() == next(
        tensors[name].data_ptr() for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))
    ):
        del tensors["lm_head.weight"]  # tied, so it is not saved
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def read_whole(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All of a model as the reader gives it, in float32 or float64."""
    found = {}
    with TensorReader() as reader:
        for name, info in checkpoint.tensors.items():
            data = bytearray(info.read_bytes)
            reader.read_into(info, 0, memoryview(data))
            values = numpy.empty(info.element_count, "f8" if info.read_dtype == "F64" else "f4")
            widen(numpy.frombuffer(data, stored_dtype(info.read_dtype)), values)
            found[name] = torch.from_numpy(values).reshape(info.shape)
    return found


def assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal but for the order in which a product of so small a rank is added up in float32."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        torch.testing.assert_close(
            found[name].float(), tensor.float(), rtol=1e-6, atol=5e-7, msg=lambda found, name=name: f"{name}: {found}"
        )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


# ── As peft merges them ──


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_what_peft_makes_of_its_base(tmp_path, parents, family):
    kind, settings = FAMILIES[family]
    base = make_base(tmp_path / "base", kind)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    parents.watch(base, adapter)
    checkpoint = open_checkpoint(adapter)
    assert any(isinstance(info, AdaptedTensor) for info in checkpoint.tensors.values())
    assert_close(read_whole(checkpoint), merged_by_peft(base, adapter))
    assert {name: info.name for name, info in checkpoint.tensors.items()} == {n: n for n in checkpoint.tensors}


def test_a_child_is_that_of_what_peft_merged_to_one_rounding(tmp_path, base):
    """Values of the child against float64 SLERP of peft's float32 weights, rounded once to the base's bfloat16."""
    adapter = make_adapter(base, tmp_path / "adapter")
    other = make_base(tmp_path / "other", "llama")
    merged, second = merged_by_peft(base, adapter), load_tensors(other)
    child = load_tensors(merge(adapter, other, tmp_path / "child", 0.3).child)
    for name, found in child.items():
        exact = reference_slerp(merged[name], second[name], 0.3)
        assert found.dtype == torch.bfloat16, name
        assert units_of_last_place(found, exact) <= 0.51, name


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_a_copied_adapter_is_its_merged_weights(tmp_path, base, t):
    adapter = make_adapter(base, tmp_path / "adapter")
    folders = (adapter, base) if t == 0 else (base, adapter)
    child = load_tensors(merge(*folders, tmp_path / "child", t).child)
    for name, exact in merged_by_peft(base, adapter).items():
        assert units_of_last_place(child[name], exact.double()) <= 0.51, name


def test_float64_stays_float64(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.float64)
    found = read_whole(open_checkpoint(make_adapter(base, tmp_path / "adapter")))
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    product = tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double() * 1.5
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], load_tensors(base)[name] + product, rtol=1e-14, atol=1e-14)


# ── However it is read ──


def hand_made(folder: Path, base: Path, seed: int = 5, rank: int = 2, **settings: Any) -> Path:
    """An adapter of the matrices of tiny Llamas, as peft would write it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, info in open_checkpoint(base).tensors.items():
        if "layers" in name and len(info.shape) == 2:
            prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            tensors[f"{prefix}A.weight"] = 0.1 * torch.randn(rank, info.shape[1], generator=generator)
            tensors[f"{prefix}B.weight"] = 0.1 * torch.randn(info.shape[0], rank, generator=generator)
    return write_adapter(folder, base, tensors, r=rank, lora_alpha=2 * rank, **settings)


def write_adapter(folder: Path, base: Path, tensors: Mapping[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def store_as_read(adapter: Path, folder: Path) -> Path:
    """A whole model of the very numbers that the reader gives."""
    checkpoint = open_checkpoint(adapter)
    make_checkpoint(folder, read_whole(checkpoint), checkpoint.config)
    return folder


def adapted_names(adapter: Path) -> list[str]:
    return [name for name, info in open_checkpoint(adapter).tensors.items() if isinstance(info, AdaptedTensor)]


def assert_same_child(left: Path, right: Path, names: list[str]) -> None:
    children = [{name: load_tensors(folder)[name] for name in names} for folder in (left, right)]
    assert_same_bits(*children)


@pytest.fixture
def pair(tmp_path: Path, parents: Any) -> tuple[Path, Path]:
    """A hand-made adapter of a tiny Llama, and another Llama that fits it."""
    base = make_checkpoint(tmp_path / "base", llama_tensors(1))
    adapter, other = hand_made(tmp_path / "adapter", base), make_checkpoint(tmp_path / "other", llama_tensors(2))
    parents.watch(base, adapter, other)
    return adapter, other


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """A hand-made adapter and its base, which a test may change."""
    base = make_checkpoint(tmp_path / "base", llama_tensors(1))
    return hand_made(tmp_path / "adapter", base), base


def test_a_stretch_is_the_same_wherever_it_begins_and_whatever_was_read_before(pair, monkeypatch):
    monkeypatch.setattr(adapted_tensor, "MAX_TILE_ELEMENTS", 40)
    monkeypatch.setattr(adapted_tensor, "PANEL_ELEMENTS", 9)
    info = open_checkpoint(pair[0]).tensors["model.layers.1.mlp.up_proj.weight"]
    whole = bytearray(info.read_bytes)
    with TensorReader() as reader:
        reader.read_into(info, 0, memoryview(whole))
        for start, length in ((0, 4), (4 * 63, 4 * 130), (4 * 300, 4 * 84), (4 * 16, 4 * 16), (4, 4 * 300)):
            stretch = bytearray(length)
            reader.read_into(info, start, memoryview(stretch))
            assert stretch == whole[start : start + length]
        rows = numpy.array([5, -1, 3, 4, 23, 0])
        found = numpy.ones((6, HIDDEN), "f4")
        reader.read_rows(info, rows, memoryview(found.view("u1").reshape(-1)))
    table = numpy.frombuffer(whole, "f4").reshape(INTERMEDIATE, HIDDEN)
    expected = [numpy.zeros(HIDDEN, "f4") if row < 0 else table[row] for row in rows]
    numpy.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("storage", ["stored", "transposed"])
def test_tiles_are_those_of_the_whole_product(tmp_path, monkeypatch, storage):
    """Many tiles and panels, the last of each cut short, against the product in one."""
    generator = torch.Generator().manual_seed(2)
    base, a, b = (torch.randn(*shape, generator=generator) for shape in ((23, 7), (3, 7), (23, 3)))
    monkeypatch.setattr(adapted_tensor, "MAX_TILE_ELEMENTS", 5 * 7)
    monkeypatch.setattr(adapted_tensor, "PANEL_ELEMENTS", 10 * 3)
    name = "model.layers.0.x"
    stored = base if storage == "stored" else base.T
    folder = make_checkpoint(tmp_path / "base", {f"{name}.weight": stored})
    tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    adapter = write_adapter(tmp_path / "adapter", folder, tensors, r=3, lora_alpha=6)
    expected = base + 2 * (b @ a)
    found = read_whole(open_checkpoint(adapter))[f"{name}.weight"]
    torch.testing.assert_close(found, expected if storage == "stored" else expected.T, rtol=1e-5, atol=1e-6)


def test_factors_are_read_once_and_little_is_kept(pair, monkeypatch):
    """The right factor once, the left one in panels; and no more readers' room than MAX_KEPT tensors'."""
    monkeypatch.setattr(adapted_tensor, "MAX_TILE_ELEMENTS", 40)
    checkpoint, read = open_checkpoint(pair[0]), []
    stored = TensorReader.begin_stored

    def begin_stored(reader: TensorReader, info: Any, start: int, source: int) -> Any:
        read.append((info.name, start))
        return stored(reader, info, start, source)

    monkeypatch.setattr(TensorReader, "begin_stored", begin_stored)
    with TensorReader() as reader:
        for name in adapted_names(pair[0]):
            info = checkpoint.tensors[name]
            for start in range(0, info.read_bytes, 64):
                reader.read_into(info, start, memoryview(bytearray(64)))
            factors = [name for name, _ in read if "lora" in name]
            assert sorted(factors) == sorted([info.left.name, info.right.name])
            read.clear()
        assert len(reader._kept) == MAX_KEPT


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_child_is_that_of_the_same_numbers_stored(tmp_path, pair, monkeypatch, role, threads):
    """Bit for bit, however many workers there are and however tensors are cut."""
    adapter, other = pair
    plain = store_as_read(adapter, tmp_path / "plain")
    set_block_elements(monkeypatch, 64)
    orders = [(parent, other) if role == "primary" else (other, parent) for parent in (adapter, plain)]
    children = [
        merge(*folders, tmp_path / f"child{number}", 0.4, threads=threads, dtype="bfloat16").child
        for number, folders in enumerate(orders)
    ]
    assert_same_child(*children, adapted_names(adapter))


def test_workers_that_are_processes_make_the_same_bits(tmp_path, pair, monkeypatch):
    adapter, other = pair
    children = [merge(adapter, other, tmp_path / "threads", 0.4).child]
    monkeypatch.setattr("slerpkit.merge.plan.SMALL_MERGE_BYTES", 0)
    children.append(merge(adapter, other, tmp_path / "processes", 0.4).child)
    assert_same_bits(*map(load_tensors, children))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "nuslerp", "vectors": "last_dim"},
        {"method": "nuslerp", "vectors": "first_dim"},
        {"cast_dtype": "bfloat16"},
        {"method": "lerp"},
    ],
)
def test_every_way_to_blend_reads_the_same(tmp_path, pair, settings):
    adapter, other = pair
    plain = store_as_read(adapter, tmp_path / "plain")
    children = [
        merge(parent, other, tmp_path / f"child of {parent.name}", 0.4, dtype="bfloat16", **settings).child
        for parent in (adapter, plain)
    ]
    assert_same_child(*children, adapted_names(adapter))


def test_what_is_shown_and_counted_is_the_bases(pair):
    adapter, other = pair
    plan = plan_of(adapter, other, adapter.parent / "child")
    opened = plan.parents.primary
    assert (opened.name, opened.dtypes, opened.byte_count) == ("adapter", ("bfloat16",), opened.base.byte_count)
    assert {tensor.dtype for tensor in plan.tensors} == {"BF16"}
    assert not any("dtype" in mismatch.subject for mismatch in plan.parity.mismatches)
    assert describe_checkpoint(opened).endswith(", an adapter of base")
    plain = plan_of(other, other, adapter.parent / "child")
    assert plan.peak_memory_bytes > plain.peak_memory_bytes


# ── Tokens and what stands beside ──


def test_an_adapter_brings_its_tokens_along(tmp_path, parents):
    """An embedding made longer, saved with the adapter; a tokenizer in its folder goes before the base's."""
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other")
    add_tokenizer(base)
    add_tokenizer(other)
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    rows = VOCABULARY + 2
    adapter = make_adapter(base, tmp_path / "adapter", rows=rows, modules_to_save=["embed_tokens", "lm_head"])
    add_tokenizer(adapter, rows)
    parents.watch(base, adapter, other)
    expected = merged_by_peft(base, adapter, rows)
    assert_close(read_whole(open_checkpoint(adapter)), expected)
    child = merge(adapter, other, tmp_path / "child", 0.5, dtype="bfloat16").child
    assert (child / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert json.loads((child / "config.json").read_text())["vocab_size"] == rows
    assert json.loads((child / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert not (child / "adapter_config.json").exists()
    name = "model.embed_tokens.weight"
    tensors, second = load_tensors(child), load_tensors(other)
    assert units_of_last_place(tensors[name][-2:], expected[name][-2:].double()) <= 0.51
    known = expected[name][:VOCABULARY], second[name]
    assert units_of_last_place(tensors[name][:VOCABULARY], reference_slerp(*known, 0.5)) <= 0.51
    model = transformers.AutoModelForCausalLM.from_pretrained(child)
    assert model.get_input_embeddings().weight.shape[0] == rows


def test_a_tokenizer_of_the_base_is_the_childs_where_the_adapter_has_none(tmp_path, pair):
    adapter, other = pair
    base = adapter.parent / "copy"
    make_checkpoint(base, llama_tensors(1))
    add_tokenizer(base)
    child = merge(adapter, other, tmp_path / "child", adapter_bases={adapter: base}).child
    assert (child / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


# ── Names ──


def rename(adapter: Path, change: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {change(name): tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda name: name.replace("lora_A.", "lora_A.my_adapter."),
        lambda name: name.removeprefix("base_model.model."),
    ],
    ids=["default", "another", "no-prefix"],
)
def test_names_as_other_versions_write_them(own, change):
    before = read_whole(open_checkpoint(own[0]))
    rename(own[0], change)
    assert_same_bits(read_whole(open_checkpoint(own[0])), before)


@pytest.mark.parametrize("prefix", ["", "model.language_model."])
def test_a_base_may_be_stored_under_other_names_than_its_class_has(tmp_path, own, prefix):
    """What stands before the layers is found by what stands behind it."""
    adapter, base = own
    expected = read_whole(open_checkpoint(adapter))
    tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in load_tensors(base).items()}
    other = make_checkpoint(tmp_path / "renamed", tensors)
    found = read_whole(open_checkpoint(adapter, other))
    assert_same_bits(found, {name.replace("model.", prefix, 1): tensor for name, tensor in expected.items()})


def test_a_pickle_is_read_without_being_run(own):
    adapter, _ = own
    before = read_whole(open_checkpoint(adapter))
    file = adapter / "adapter_model.safetensors"
    torch.save({name: tensor.clone() for name, tensor in load_file(file).items()}, adapter / "adapter_model.bin")
    file.unlink()
    assert_same_bits(read_whole(open_checkpoint(adapter)), before)


def test_a_shard_of_its_own_for_each_tensor_makes_no_difference(tmp_path, own):
    adapter, base = own
    sharded = make_checkpoint(tmp_path / "sharded", load_tensors(base), shards=5)
    assert_same_bits(read_whole(open_checkpoint(adapter, sharded)), read_whole(open_checkpoint(adapter)))


# ── Refused ──

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "alora": ({"alora_invocation_tokens": [3, 4]}, "aLoRA"),
    "kasa": ({"kasa_config": {"beta": 1}}, "KaSA"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "replicated layers"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "loha": ({"peft_type": "LOHA"}, "LoHa"),
    "lokr": ({"peft_type": "LOKR"}, "LoKr"),
    "ia3": ({"peft_type": "IA3"}, "IA3"),
    "oft": ({"peft_type": "OFT"}, "OFT"),
    "vera": ({"peft_type": "VERA"}, "VeRA"),
    "adalora": ({"peft_type": "ADALORA"}, "AdaLoRA"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "prompt tuning"),
    "nothing": ({"peft_type": ...}, "no stated kind"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the base"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
    "rank": ({"r": 3}, "the rank 3"),
    "rank-pattern": ({"rank_pattern": {"q_proj": 1}}, "self_attn.q_proj has the rank 1"),
    "no-number": ({"lora_alpha": "16"}, "no number"),
    "endless-number": ({"lora_alpha": 10**400}, "a number in it has 401 digits"),
    "bad-pattern": ({"alpha_pattern": {"q_proj(": 1}}, "a pattern that is none"),
    "endless-pattern": ({"alpha_pattern": {"(.+)+x": 1}}, "take for ever"),
    "endless-choice": ({"alpha_pattern": {"(.|.)*x": 1}}, "take for ever"),
    "endless-row": ({"rank_pattern": {".*.*.*.*.*.*x": 1}}, "take for ever"),
    "endless-group": ({"alpha_pattern": {"((a|b)*c)*": 1}}, "take for ever"),
}
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "half": ({f"{MODULE}.lora_A.weight": None}, "no whole pair of factors for model.layers.0.self_attn.q_proj"),
    "shape": ({f"{MODULE}.lora_B.weight": torch.ones(HIDDEN + 1, 2)}, "adds factors of"),
    "inner": ({f"{MODULE}.lora_B.weight": torch.ones(HIDDEN, 3)}, "adds factors of"),
    "integers": ({f"{MODULE}.lora_B.weight": torch.ones(HIDDEN, 2, dtype=torch.int64)}, "no whole pair"),
    "magnitude": ({f"{MODULE}.lora_magnitude_vector": torch.ones(HIDDEN)}, "which its base has not"),
    "hadamard": ({f"{MODULE}.hada_w1_a": torch.ones(2, 2)}, "hada_w1_a, which its base has not"),
    "unknown-module": (
        {"base_model.model.score.weight": torch.ones(2, HIDDEN)},
        "score.weight, which its base has not",
    ),
    "unknown-layer": (
        {
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(2, HIDDEN),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.ones(HIDDEN, 2),
        },
        "layers.7.self_attn.q_proj.weight, which its base has not",
    ),
    "another-width": ({"base_model.model.model.embed_tokens.weight": torch.ones(VOCABULARY, 3)}, "in the shape"),
    "another-length": ({"base_model.model.model.norm.weight": torch.ones(3)}, "in the shape (3,)"),
    "twice": ({f"{MODULE}.lora_A.default.weight": torch.ones(2, HIDDEN)}, "twice"),
    "bias": ({f"{MODULE}.lora_B.bias": torch.ones(HIDDEN)}, "q_proj.bias, which its base has not"),
}


def assert_refused(adapter: Path, what: str, base: Path | None = None) -> SlerpMergeError:
    """One error that names the adapter, says what is wrong and what to do."""
    with pytest.raises(SlerpMergeError) as refused:
        open_checkpoint(adapter, base)
    assert str(adapter) in refused.value.message
    assert what in refused.value.message
    assert refused.value.hint
    return refused.value


@pytest.mark.parametrize("name", SETTINGS)
def test_other_kinds_and_odd_settings_are_refused_by_name(own, name):
    changes, what = SETTINGS[name]
    edit_json(own[0] / "adapter_config.json", **changes)
    assert_refused(own[0], what)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_lora_of_the_base_are_refused_by_name(own, name):
    changes, what = TENSORS[name]
    file = own[0] / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()} | changes
    file.unlink()
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    assert_refused(own[0], what)


def test_a_tied_head_that_is_adapted_is_refused(tmp_path):
    base = make_base(tmp_path / "base", "tied")
    pair = {"lora_A.weight": torch.ones(2, HIDDEN), "lora_B.weight": torch.ones(VOCABULARY, 2)}
    tensors = {f"base_model.model.lm_head.{name}": tensor for name, tensor in pair.items()}
    adapter = write_adapter(tmp_path / "adapter", base, tensors, r=2, lora_alpha=2)
    assert "merge_and_unload" in assert_refused(adapter, "lm_head.weight, which its base does not store").hint


def test_no_weights_and_no_changes_are_said(own):
    adapter, _ = own
    file = adapter / "adapter_model.safetensors"
    file.unlink()
    assert "Download" in assert_refused(adapter, "has no weights (adapter_model.safetensors or adapter_model.bin)").hint
    save_file({}, file)
    assert_refused(adapter, "changes nothing")


def test_a_quantised_base_is_refused_with_the_way_to_name_another(own):
    edit_json(own[1] / "config.json", quantization_config={"load_in_4bit": True})
    assert f"BASE+{own[0]}" in assert_refused(own[0], "quantised base").hint


# ── The base ──


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ("", "does not say what its base is"),
        (None, "does not say what its base is"),
        ("acme/finch", "is one of acme/finch, which is not here"),
        ("/nowhere/finch", "is one of /nowhere/finch, which is not here"),
    ],
)
def test_a_base_that_is_not_found_can_be_named(own, named, what):
    adapter, base = own
    expected = read_whole(open_checkpoint(adapter))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=named)
    assert f"BASE+{adapter}" in assert_refused(adapter, what).hint
    assert_same_bits(read_whole(open_checkpoint(adapter, base)), expected)


def test_a_base_is_found_by_name_in_the_cache_at_the_adapters_revision(tmp_path, own, monkeypatch):
    adapter, base = own
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, commit = tmp_path / "hub" / "models--acme--finch", "0123456789" * 4
    copy_model(base, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "v1").write_text(commit)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="acme/finch", revision="v1")
    assert open_checkpoint(adapter).base.name == "acme/finch"
    edit_json(adapter / "adapter_config.json", revision=None)
    assert_refused(adapter, "is one of acme/finch, which is not here")


def test_a_base_that_is_another_model_or_an_adapter_is_refused(tmp_path, own):
    adapter, _ = own
    wider = {**LLAMA_CONFIG, "hidden_size": 8}
    other = make_checkpoint(tmp_path / "other", {n: t[..., :8] for n, t in llama_tensors(2).items()}, wider)
    assert "right one: BASE+" in assert_refused(adapter, "adds factors of", other).hint
    assert_refused(adapter, "has another adapter for its base", hand_made(tmp_path / "second", own[1]))
    with pytest.raises(SlerpMergeError, match="is no adapter, so it has no base"):
        open_checkpoint(other, own[1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_base_that_changes_during_the_merge_is_noticed(tmp_path, own, name):
    adapter, base = own
    other = make_checkpoint(tmp_path / "other", llama_tensors(2))

    def touch(event: Any) -> None:
        if isinstance(event, MergedTensor):
            os.utime(base / name)

    with pytest.raises(SlerpMergeError, match=f"base changed during the merge: {name}"):
        merge(adapter, other, tmp_path / "child", observe=touch)
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize("changed", ["base/model.safetensors", "adapter/adapter_config.json"])
def test_what_was_made_of_another_base_or_adapter_is_not_carried_on(tmp_path, own, changed):
    adapter, _ = own
    other = make_checkpoint(tmp_path / "other", llama_tensors(2))
    before = plan_of(adapter, other, tmp_path / "child").fingerprint
    assert plan_of(adapter, other, tmp_path / "child").fingerprint == before
    os.utime(tmp_path / changed)
    assert changed.partition("/")[2] in fingerprint_difference(
        before, plan_of(adapter, other, tmp_path / "child").fingerprint
    )


# ── Named with its base ──


def test_a_base_named_with_the_adapter_by_flags(run, own, tmp_path):  # noqa: F811
    adapter, base = own
    make_checkpoint(tmp_path / "other", llama_tensors(2))
    expected = merge(adapter, tmp_path / "other", tmp_path / "expected").child
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="")
    base.rename(tmp_path / "moved")
    flags = ("--secondary", "other", "--save-dir", "child", "--yes", "--json")
    assert run("--primary", "adapter", *flags).status == 1
    outcome = run("--primary", "moved+adapter", *flags)
    assert outcome.status == 0, outcome.err
    assert_same_bits(load_tensors(tmp_path / "child"), load_tensors(expected))
    saved = (tmp_path / "child" / "merge_recipe.yaml").read_text()
    assert "../moved+../adapter" in saved
    again = run("--recipe", "child/merge_recipe.yaml", "--save-dir", "again", "--yes", "--json")
    assert again.status == 0, again.err
    assert_same_bits(load_tensors(tmp_path / "again"), load_tensors(expected))
    assert (tmp_path / "again" / "merge_recipe.yaml").read_text() == saved


def test_the_shown_command_names_the_base(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--primary", "base+adapter", "--secondary", "base", "--base", "./base", "--save-dir", "child")
    answers = answers_given(build_parser().parse_args(arguments))
    assert answers.recipe.adapter_bases == {Path("adapter"): Path("base")}
    assert "--primary base+adapter --secondary base" in equivalent_command(answers.recipe, answers.options)


RECIPES = {
    "words": "../base+../adapter",
    "mapping": "{model: ../base, lora: ../adapter}",
    "paths": "{model: {path: ../base}, lora: {path: ../adapter}}",
}


@pytest.mark.parametrize("spelling", RECIPES)
def test_mergekits_spellings_of_an_adapter_with_its_base(own, tmp_path, spelling):
    adapter, _ = own
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="")
    make_checkpoint(tmp_path / "other", llama_tensors(2))
    path = tmp_path / "recipes" / "recipe.yaml"
    path.parent.mkdir()
    text = f"merge_method: slerp\nbase_model: {RECIPES[spelling]}\nmodels:\n- model: {RECIPES[spelling]}\n"
    path.write_text(f"{text}- model: ../other\nparameters: {{t: 0.3}}\n")
    recipe = read_recipe(path)
    assert recipe.primary.resolve() == adapter
    assert {k.resolve(): v.resolve() for k, v in recipe.adapter_bases.items()} == {adapter: tmp_path / "base"}
    plan = prepare_merge(recipe, RunOptions(tmp_path / "child"))
    assert plan.parents.primary.base.folder.resolve() == tmp_path / "base"


def test_an_adapter_with_two_bases_in_one_recipe_is_refused_with_its_line(own, tmp_path):
    make_checkpoint(tmp_path / "other", llama_tensors(2))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "merge_method: slerp\nbase_model: base+adapter\nmodels:\n- model: other+adapter\n- model: other\n"
        "parameters: {t: 0.3}\n"
    )
    with pytest.raises(SlerpMergeError, match="line 4: .*adapter stands there with two models"):
        read_recipe(path)


def test_a_folder_may_have_a_plus_in_its_name(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "a+b", llama_tensors(2))
    assert find_with_base("a+b") == (Path("a+b"), None)
    assert find_with_base("a+b+adapter") == (Path("adapter"), Path("a+b"))
    assert find_with_base("nowhere+adapter") == (Path("adapter"), Path("nowhere"))
    assert find_with_base("'base+adapter'") == (Path("adapter"), Path("base"))


def test_merge_models_takes_a_base_before_an_adapter(own, tmp_path):
    adapter, base = own
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="")
    report = merge_models(f"{base}+{adapter}", base, tmp_path / "child", base=None)
    assert report.content["recipe"]["primary"] == "adapter"
    assert report.content["recipe"]["adapter_bases"] == {"primary": "base"}
    assert "| adapter, an adapter of base |" in (tmp_path / "child" / "README.md").read_text()


# ── Two adapters of one base ──


def test_two_adapters_of_one_base_are_told_of_task_vectors(own, tmp_path):
    adapter, base = own
    second = hand_made(tmp_path / "second", base, seed=6)
    plan = plan_of(adapter, second, tmp_path / "child")
    notices = [m for m in plan.parity.of_severity("notice") if m.subject == "adapters of one base"]
    assert len(notices) == 1
    assert "--base" in notices[0].consequence
    assert "base blends what each" in notices[0].consequence
    with_base = plan_of(adapter, second, tmp_path / "child", base=base, method="nuslerp")
    assert not [m for m in with_base.parity.mismatches if m.subject == "adapters of one base"]


def test_task_vectors_of_two_adapters_are_what_they_learned(own, tmp_path):
    adapter, base = own
    second = hand_made(tmp_path / "second", base, seed=6)
    child = load_tensors(merge(adapter, second, tmp_path / "child", 0.4, base=base, dtype="float32").child)
    stored = load_tensors(base)
    first, other = (read_whole(open_checkpoint(folder)) for folder in (adapter, second))
    for name in adapted_names(adapter):
        origin = stored[name].double()
        exact = origin + reference_slerp(first[name].double() - origin, other[name].double() - origin, 0.4)
        torch.testing.assert_close(child[name].double(), exact, rtol=1e-5, atol=1e-6)
    kept = set(stored) - set(adapted_names(adapter))
    assert_same_bits({n: child[n].bfloat16() for n in kept}, {n: stored[n] for n in kept})


@needs_terminal
def test_the_wizard_offers_what_two_adapters_learned(own, tmp_path):
    adapter, base = own
    hand_made(tmp_path / "second", base, seed=6)
    edit_json(tmp_path / "second" / "adapter_config.json", base_model_name_or_path="")
    with Terminal.start([], folder=tmp_path) as terminal:
        terminal.answer("? Primary model", "adapter")
        terminal.answer("? Secondary model", "second")
        terminal.wait_for("does not say what its base is")
        terminal.send("\x15base+second\r")
        terminal.answer("? Save directory", "child")
        terminal.wait_for("Both are adapters of base; task vectors blend")
        terminal.answer("? Blend  (task vectors)", "")
        terminal.answer("? Base model  (base)", "")
        terminal.answer("? Blend  (even)", "")
        terminal.answer("Start the merge?", "y")
        terminal.wait_for("--secondary base+second")
        terminal.answer("What now?", "")
        assert terminal.exit_status() == 0
    expected = merge(
        adapter, tmp_path / "second", tmp_path / "expected", base=base, adapter_bases={tmp_path / "second": base}
    )
    assert_same_bits(load_tensors(tmp_path / "child"), load_tensors(expected.child))


# ── Spoken with ──


def test_an_adapter_speaks_as_it_is_merged(tmp_path, base):
    add_tokenizer(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(load_base(base), adapter).merge_and_unload()
    models = ComparedModels((("primary", adapter),), "cpu")
    with loaded_model(models, "primary", "cpu", "float32") as (model, tokenizer):
        assert len(tokenizer) == VOCABULARY
        ids = torch.tensor([[5, 9, 2]])
        torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


def test_perplexity_and_taste_of_an_adapter_parent(run, tmp_path, base):  # noqa: F811
    add_tokenizer(base)
    make_adapter(base, tmp_path / "adapter")
    write_text(tmp_path / "text.txt", 100)
    flags = ("--perplexity", "text.txt", "--taste", chr(0x4E00 + 5), "--yes", "--json")
    outcome = run("--primary", "adapter", "--secondary", "base", "--save-dir", "child", *flags)
    assert outcome.status == 0, outcome.err
    assert [finding["kind"] for finding in outcome.report["findings"]] == ["taste", "perplexity"]


def test_the_harness_is_not_asked_of_an_adapter(tmp_path, own):
    with pytest.raises(SlerpMergeError, match="is an adapter, and the harness loads whole models alone"):
        check_harness_loads(open_checkpoint(own[0]))


def test_the_look_at_an_adapter_finds_nothing_amiss(own):
    assert what_is_lacking(*own) == ""
