"""Checkpoints for tests: from safetensors and JSON for speed, from transformers where the real thing counts."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slerpkit.child.report import MergeReport
from slerpkit.merge.events import ignore
from slerpkit.merge.plan import MergePlan
from slerpkit.recipe import recipe_and_options
from slerpkit.schedule import Schedule
from slerpkit.story import execute_merge, prepare_merge

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 16, 24, 48, 2
# Where merges of tests run: SLERPMERGE_TEST_DEVICE=cuda puts every test of values on a GPU.
DEVICE = os.environ.get("SLERPMERGE_TEST_DEVICE", "cpu")

# What a child has where its parents are weights and config alone.
PLAIN_CHILD = [
    "README.md", "config.json", "difference_map.svg", "merge_recipe.yaml", "merge_report.json", "model.safetensors",
]  # fmt: skip

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_tensors(
    seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 0.1, layers: int = LAYERS, likeness: float = 0.97
) -> dict[str, torch.Tensor]:
    """Random weights under a Llama's names. Seeds share a base: acos(likeness squared) apart, here 20 degrees."""
    generator, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000)

    def weight(*shape: int) -> torch.Tensor:
        own, common = torch.randn(*shape, generator=generator), torch.randn(*shape, generator=shared)
        return ((likeness * common + math.sqrt(1 - likeness**2) * own) * scale).to(dtype)

    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "self_attn.q_proj.weight"] = weight(HIDDEN, HIDDEN)
        tensors[prefix + "self_attn.k_proj.weight"] = weight(HIDDEN // 2, HIDDEN)
        tensors[prefix + "self_attn.v_proj.weight"] = weight(HIDDEN // 2, HIDDEN)
        tensors[prefix + "self_attn.o_proj.weight"] = weight(HIDDEN, HIDDEN)
        tensors[prefix + "mlp.gate_proj.weight"] = weight(INTERMEDIATE, HIDDEN)
        tensors[prefix + "mlp.up_proj.weight"] = weight(INTERMEDIATE, HIDDEN)
        tensors[prefix + "mlp.down_proj.weight"] = weight(HIDDEN, INTERMEDIATE)
        tensors[prefix + "input_layernorm.weight"] = weight(HIDDEN)
        tensors[prefix + "post_attention_layernorm.weight"] = weight(HIDDEN)
    tensors["model.norm.weight"] = weight(HIDDEN)
    tensors["lm_head.weight"] = weight(VOCABULARY, HIDDEN)
    return tensors


def make_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] = LLAMA_CONFIG,
    storage: str = "safetensors",
    shards: int = 1,
) -> Path:
    """A model folder: config.json and weights as "safetensors", "bin" (zip) or "legacy-bin"; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ending, stem = ("safetensors", "model") if storage == "safetensors" else ("bin", "pytorch_model")
    names = list(tensors)
    groups = [names[start::shards] for start in range(shards)]
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{number:05d}-of-{shards:05d}.{ending}"
        part = {name: tensors[name].contiguous() for name in group}
        weight_map.update(dict.fromkeys(group, file))
        if storage == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=storage == "bin")
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def make_pair(folder: Path, dtype: torch.dtype = torch.bfloat16, **how: Any) -> tuple[Path, Path]:
    """Two related tiny Llamas, `primary` and `secondary`, below a folder."""
    return (
        make_checkpoint(folder / "primary", llama_tensors(1, dtype), **how),
        make_checkpoint(folder / "secondary", llama_tensors(2, dtype), **how),
    )


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors model folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def replace_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes other weights into a model folder. Tensors loaded from it before may still be mapped to the old file."""
    save_file(dict(tensors), folder / "new.safetensors", {"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")


def reference_slerp(
    v0: torch.Tensor, v1: torch.Tensor, t: float, method: str = "slerp", threshold: float = 0.9995
) -> torch.Tensor:
    """SLERP in float64, written from the formula and sharing no code with the program."""
    import numpy as np

    a, b = (v.detach().to(torch.float64).flatten().numpy() for v in (v0, v1))
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    if method == "lerp" or v0.ndim == 0 or min(norm_a, norm_b) <= 1e-8:
        return torch.from_numpy((1 - t) * a + t * b).reshape(v0.shape)
    unit_a, unit_b = a / norm_a, b / norm_b
    cosine = float(np.clip(unit_a @ unit_b, -1, 1))
    if abs(cosine) > threshold:
        return torch.from_numpy((1 - t) * a + t * b).reshape(v0.shape)
    theta = np.arccos(cosine)
    s0, s1 = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    if method == "slerp-norm":
        result = (s0 * unit_a + s1 * unit_b) * ((1 - t) * norm_a + t * norm_b)
    else:
        result = s0 * a + s1 * b
    return torch.from_numpy(result).reshape(v0.shape)


def units_of_last_place(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance of `found` from a float64 `exact`, in units of the last place of found's dtype."""
    limits = torch.finfo(found.dtype)
    size = exact.abs().clamp_min(limits.smallest_normal)
    unit = torch.exp2(torch.floor(torch.log2(size))) * limits.eps
    return float(((found.double() - exact).abs() / unit).max()) if found.numel() else 0.0


def distance(found: torch.Tensor, v0: torch.Tensor, v1: torch.Tensor, exact: torch.Tensor) -> float:
    """Units of the last place between found and exact, less what the two terms lose in working precision.

    Where the terms nearly cancel, that loss is larger than a unit of what remains.
    """
    doubled = torch.float64 in (v0.dtype, v1.dtype)
    # Weights reach 1.41 at wide angles; each weight, product and sum may lose half a unit, and so may the angle.
    loss = (v0.double().abs() + v1.double().abs()) * (2.0**-50 if doubled else 2.0**-21)
    offset = found.double() - exact
    return units_of_last_place(found, exact + offset.clamp(-loss, loss))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert bits(tensor) == bits(right[name]), name


def add_tokenizer(folder: Path, size: int = VOCABULARY, special_tokens_map: bool = False) -> None:
    """A real tokenizer of `size` single-character tokens, saved by the tokenizers library."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {chr(0x4E00 + number): number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": chr(0x4E00)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if special_tokens_map:
        mapping = {"unk_token": chr(0x4E00)}
        (folder / "special_tokens_map.json").write_text(json.dumps(mapping), encoding="utf-8")


def make_real_model(folder: Path, seed: int, **changes: Any) -> Path:
    """A tiny Llama made and saved by transformers, with a tokenizer; returns its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in LLAMA_CONFIG.items() if key not in ("architectures", "model_type")}
    settings.pop("rope_theta")
    torch.manual_seed(1000)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    torch.manual_seed(seed)
    with torch.no_grad():  # models of different seeds are siblings
        for parameter in model.parameters():
            parameter.add_(0.005 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def make_real_pair(folder: Path) -> tuple[Path, Path]:
    """Two such models that are siblings, `primary` and `secondary`, below a folder."""
    return make_real_model(folder / "primary", 0), make_real_model(folder / "secondary", 1)


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; a value of ... removes the key."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key, value in changes.items():
        content.pop(key, None) if value is ... else content.update({key: value})
    path.write_text(json.dumps(content), encoding="utf-8")


def copy_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def plan_of(primary: Path, secondary: Path, save_directory: Path, t: float = 0.5, **settings: Any) -> MergePlan:
    """A plan on the device of the tests, whatever the machine has; settings: of MergeRecipe and RunOptions."""
    settings = {"schedule": Schedule.constant(t), "device": DEVICE, **settings}
    folders = {"primary": primary, "secondary": secondary, "save_directory": save_directory}
    return prepare_merge(*recipe_and_options({**folders, **settings}))


def merge(
    primary: Path,
    secondary: Path,
    save_directory: Path,
    t: float = 0.5,
    observe: Callable[[Any], None] = ignore,
    **settings: Any,
) -> MergeReport:
    """A child made by that plan."""
    return execute_merge(plan_of(primary, secondary, save_directory, t, **settings), observe)


def staging_beside(save_directory: Path) -> Path:
    """The hidden folder in which the child of a merge under way stands."""
    (folder,) = (path for path in save_directory.parent.iterdir() if path.name.startswith(".") and path.is_dir())
    return next(folder.glob("child-*"), folder / "child-none")


def set_block_elements(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Cuts tensors into blocks of so many elements, and these into rows, so that small ones have several of both."""
    row = max(1, elements // 4)
    monkeypatch.setattr("slerpkit.merge.blocks.BLOCK_ELEMENTS", elements)
    monkeypatch.setattr("slerpkit.merge.arithmetic.ROW", row)
    monkeypatch.setattr("slerpkit.merge.arithmetic.FEW_ELEMENTS", 2 * row)
