"""LoRA adapters as parents: every family against peft's own merge in float32, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slerpkit.messages import SlerpMergeError
from slerpkit.parents import adapted_tensor
from slerpkit.parents.adapted_tensor import AdaptedTensor
from slerpkit.parents.checkpoint import Checkpoint, open_checkpoint
from slerpkit.parents.dtypes import stored_dtype, widen
from slerpkit.parents.tensors import DTYPE_BYTES, TensorReader
from tests.builders import (
    HIDDEN,
    INTERMEDIATE,
    LLAMA_CONFIG,
    VOCABULARY,
    add_tokenizer,
    assert_same_bits,
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
