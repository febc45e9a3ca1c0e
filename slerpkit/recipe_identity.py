"""Which weights a recipe was saved with: what is written of each model, and whether those of a replay are the same.

Nothing of a model's files counts but its tensors, so that other shards or another format make no other model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from slerpkit.parents.tensors import TensorReader

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.recipe import RecordedModel

SAMPLED_TENSORS, SAMPLED_BYTES = 256, 4096  # at most, and of each: a megabyte of a model, whatever its size


def header_fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over every tensor's name, dtype and shape, whatever the shards."""
    table = sorted((info.name, info.dtype, list(info.shape)) for info in checkpoint.tensors.values())
    return "sha256:" + hashlib.sha256(json.dumps(table).encode("utf-8")).hexdigest()


def sample_fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over some bytes from the middle of tensors spread over the model.

    The same weights have the same one; other weights nearly always another, though not if they differ only elsewhere.
    Raises SlerpMergeError where a file cannot be read.
    """
    infos = sorted(checkpoint.tensors.values(), key=lambda info: info.name)
    digest = hashlib.sha256()
    with TensorReader() as reader:
        for info in infos[:: -(-len(infos) // SAMPLED_TENSORS)]:
            stretch = bytearray(min(SAMPLED_BYTES, info.byte_count))
            reader.read_into(info, (info.byte_count - len(stretch)) // 2, memoryview(stretch))
            digest.update(stretch)
    return "sha256:" + digest.hexdigest()


def recorded_differences(recorded: Iterable[RecordedModel], models: Mapping[str, Checkpoint]) -> Iterator[str]:
    """What to know where the models, by role, are not those that a recipe was saved with."""
    for record in recorded:
        model = models.get(record.role)
        if model is None:
            continue
        saved_with = f"The {record.role} is not the {record.name or 'model'} that this recipe was saved with"
        if record.headers and record.headers != header_fingerprint(model):
            yield f"{saved_with}: its tensors have other names, dtypes or shapes. The child will be another."
        elif record.sample and not model.awaited and record.sample != sample_fingerprint(model):
            yield f"{saved_with}: its weights are others, though names, dtypes and shapes are equal."
