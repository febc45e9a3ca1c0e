"""Whether a model is quantised, and with what: its config says so, or its tensors look so.

Names, shapes and dtypes are asked, never a value. Read report.py before this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slerpkit.parents.tensors import TORCH_NAMES
from slerpkit.parity.report import Mismatch

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint

# Tensors that only quantised checkpoints have, and the scheme that leaves them.
QUANTISED_NAMES = (
    (re.compile(r"\.(g_idx|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(absmax|quant_map|quant_state\S*)$"), "bitsandbytes 4-bit"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes 8-bit"),
    (re.compile(r"_proj_(blocks|scales)$"), "MXFP4"),
    (re.compile(r"\.(weight_packed|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_inv$"), "FP8"),
    (re.compile(r"\.(q_scale_max|q_invperm)$"), "EXL2"),
    (re.compile(r"\.(trellis|suh|svh)$"), "EXL3"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.weight\._(data|scale)$"), "quanto"),
)
ANY_QUANTISED_NAME = re.compile("|".join(pattern.pattern for pattern, _ in QUANTISED_NAMES))
# What stands beside packed integers: the numbers that make weights of them again.
SCALE_NAME = re.compile(r"scale|biases$|zero|absmax|codebook|centroid|quant")
# Wider ones are positions and ids.
PACKED_DTYPES = ("I8", "U8", "I16", "U16", "I32", "U32")
# What to do about a scheme, where there is more to do than to take the original model.
QUANTISATION_REMEDIES = {
    "bitsandbytes": "or load it with transformers, call dequantize() on it and save that",
    "FP8": "or load it with FineGrainedFP8Config(dequantize=True) of transformers 5 and save that",
    "MXFP4": "or load it with Mxfp4Config(dequantize=True) of transformers and save that",
}
SPELLINGS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "mxfp4": "MXFP4"}


def quantisation_scheme(checkpoint: Checkpoint) -> str | None:
    """The name of the scheme a checkpoint is quantised with, from its config or its tensors; None where it is not."""
    stated = stated_scheme(checkpoint.config)
    return stated or stored_scheme(checkpoint) or ("an unnamed scheme" if stated is not None else None)


def stated_scheme(config: Mapping[str, Any]) -> str | None:
    """The scheme that a config names; empty where it speaks of one without a name, None where it does not."""
    settings = config.get("quantization_config")
    if isinstance(settings, dict):
        bits = next((f" {number}-bit" for number in (4, 8) if settings.get(f"load_in_{number}bit")), "")
        method = str(settings.get("quant_method") or ("bitsandbytes" if bits else ""))
        if method:
            return SPELLINGS.get(method.lower(), method) + bits
    mlx = config.get("quantization")  # as MLX states it, alone or beside the other
    if isinstance(mlx, dict) and mlx.get("bits"):
        return f"MLX {mlx['bits']}-bit"
    return "" if isinstance(settings, dict) else None


def stored_scheme(checkpoint: Checkpoint) -> str | None:
    """The scheme that a checkpoint's tensors look like, whatever its config says; None where they are weights."""
    for name, info in checkpoint.tensors.items():
        if ANY_QUANTISED_NAME.search(name):
            return next(scheme for pattern, scheme in QUANTISED_NAMES if pattern.search(name))
        if info.dtype.startswith("F8_"):
            return "FP8"
        if info.dtype not in TORCH_NAMES:
            return f"packed {info.dtype}"
    return packed_integers(checkpoint)


def packed_integers(checkpoint: Checkpoint) -> str | None:
    """What matrices of integers there are in place of weights: called so, or beside their scales."""
    endings: dict[str, set[str]] = {}
    for name in checkpoint.tensors:
        module, _, ending = name.rpartition(".")
        endings.setdefault(module, set()).add(ending)
    for name, info in checkpoint.tensors.items():
        if len(info.shape) < 2 or not info.element_count or info.dtype not in PACKED_DTYPES:
            continue
        module, _, ending = name.rpartition(".")
        scales = sorted(other for other in endings[module] - {ending} if SCALE_NAME.search(other))
        if {"scales", "biases"} <= set(scales):
            return "MLX"
        if scales or ending.endswith("weight"):
            return f"{TORCH_NAMES[info.dtype]} for weights{f' beside {scales[0]}' if scales else ''}"
    return None


def check_quantisation(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """One blocking line where either parent is quantised."""
    schemes = quantisation_scheme(primary), quantisation_scheme(secondary)
    if not any(schemes):
        return []
    remedies = [QUANTISATION_REMEDIES.get(scheme.partition(" ")[0]) for scheme in schemes if scheme]
    advice = ["use the original, unquantised model", *dict.fromkeys(remedy for remedy in remedies if remedy)]
    why = f"Quantised weights cannot be interpolated; {', '.join(advice)}."
    return [Mismatch("blocking", "quantisation", *(scheme or "not quantised" for scheme in schemes), why)]
