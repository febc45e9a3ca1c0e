"""The finished child, read back and held against its plan and its parents.

Every header, a sample of the values recomputed by the workers, and the ids that tokenizer and config speak of.
transformers is not asked here; evaluation/models.py can load the child with it, and be the further check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slerpkit.files import read_json
from slerpkit.merge.team import WorkerDied
from slerpkit.merge.worker import RecomputeTask
from slerpkit.messages import SlerpMergeError, format_names, shorten
from slerpkit.parents.safetensors_header import read_header
from slerpkit.parents.tensors import TORCH_NAMES
from slerpkit.parity.chat import has_row
from slerpkit.parity.configs import stated_ids
from slerpkit.parity.vocabulary import added_tokens, open_tokenizer

if TYPE_CHECKING:
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.staging import StagedChild
    from slerpkit.merge.team import WorkerTeam
    from slerpkit.merge.tensor_plan import MergedTensor, MergeResult, TensorInputs
    from slerpkit.parents.tensors import TensorInfo

RECOMPUTED_TENSORS = 4  # recomputed whole, in float64, straight from the parents
RECOMPUTED_ELEMENTS = 1 << 20  # none larger than this, so that the check stays cheap
SPOT_CHECKS = 256  # tensors of which a stretch is recomputed
SPOT_ELEMENTS = 512  # elements of such a stretch


@dataclass(frozen=True)
class Verification:
    """What was found of a child that was read back and is right."""

    checks: tuple[str, ...]  # what was found right, in words
    warnings: tuple[str, ...]  # what may be wrong


def nothing_further(folder: Path) -> Verification:
    """No further check of a child."""
    return Verification((), ())


def wrong_child(reason: str) -> SlerpMergeError:
    """The error for a child that is not what was planned."""
    return SlerpMergeError(
        f"The child did not pass its own check: {reason}.",
        "Nothing was saved. Run the merge again; if it fails the same way, the disk or memory may be faulty.",
    )


def verify_child(
    plan: MergePlan,
    child: StagedChild,
    result: MergeResult,
    team: WorkerTeam,
    further: Callable[[Path], Verification] = nothing_further,
    checked: tuple[int, int] | None = None,
) -> Verification:
    """Reads the finished child back and holds it against plan, parents and tokenizer. Cheap; no transformers.

    checked: what verify_values found of its values meanwhile, where the parents are not there any more.
    further: one more check, given the child's folder. Raises SlerpMergeError where the child is not what was planned,
    or as that does; nothing of it is then kept. What only may be wrong is a warning.
    """
    try:
        verify_headers(plan, child.folder)
        recomputed, spots = checked or verify_values(plan, child.folder, result.tensors, team)
        more = checked_further(child.folder, further)
    except WorkerDied:  # that says nothing of the child
        raise
    except SlerpMergeError:
        child.distrust()
        raise
    checks = [
        f"{len(result.tensors)} tensors stand under the primary's names and shapes",
        f"{recomputed} tensors recomputed whole and {spots} in part from the parents, all equal",
    ]
    warnings = [plan.kinship.warning] if plan.kinship.warning else []
    warnings += [
        f"{m.subject}: primary {m.primary}, secondary {m.secondary}; accepted, though both use their weights by it"
        for m in plan.parity.accepted
    ]
    warnings += [
        f"{merged.tensor.name}: {merged.non_finite} values are infinite or not a number"
        for merged in result.tensors
        if merged.non_finite
    ]
    warnings += [
        f"{merged.tensor.name}: the parents' {TORCH_NAMES[merged.tensor.dtype]} values differ; the primary's are kept"
        for merged in result.tensors
        if merged.weights.reason.startswith("differs")
    ]
    if not any(merged.non_finite for merged in result.tensors):
        checks.append("no infinite value and none that is not a number")
    tokens, warning = compare_tokenizer_with_rows(plan, child.folder)
    checks += [tokens] if tokens else []
    warnings += [warning] if warning else []
    warnings += ids_without_rows(plan, child.folder)
    return Verification((*checks, *more.checks), (*warnings, *more.warnings))


def checked_further(folder: Path, further: Callable[[Path], Verification]) -> Verification:
    """What a further check finds. Raises SlerpMergeError as that does, and says what became of the child."""
    try:
        return further(folder)
    except SlerpMergeError as error:
        raise SlerpMergeError(error.message, f"Nothing was saved. {error.hint}") from error


def verify_headers(plan: MergePlan, folder: Path) -> None:
    """Every file's header, as written, against the plan; every name and shape against the primary's."""
    found: dict[str, TensorInfo] = {}
    for shard in plan.shards:
        try:
            header = read_header(folder / shard.file_name)
        except SlerpMergeError as error:
            raise wrong_child(error.message.rstrip(".")) from error
        found.update({shard.prefix + name: info for name, info in header.items()})
        for tensor in shard.tensors:
            info = found.get(tensor.name)
            if info is None or (info.dtype, info.shape, info.offset) != (tensor.dtype, tensor.shape, tensor.offset):
                raise wrong_child(f"{shard.file_name} does not hold {tensor.name} as planned")
    for pair in plan.parity.pairs:
        if pair.name not in found or found[pair.name].shape != pair.shape:
            raise wrong_child(f"the primary's tensor {pair.name} is not in it with its shape")


def verify_values(plan: MergePlan, folder: Path, tensors: Sequence[MergedTensor], team: WorkerTeam) -> tuple[int, int]:
    """Has a sample of the child's tensors recomputed from the parents' bytes. Returns (whole tensors, stretches).

    Raises SlerpMergeError where a value is not what its parents make.
    """
    files = {tensor.name: folder / shard.file_name for shard in plan.shards for tensor in shard.tensors}
    filled = [merged for merged in tensors if merged.tensor.element_count]
    blended = [
        merged
        for merged in filled
        if merged.weights.operation != "copy" and merged.tensor.element_count <= RECOMPUTED_ELEMENTS
    ]
    blended.sort(key=lambda merged: -merged.tensor.element_count)
    whole = blended[:: max(1, len(blended) // RECOMPUTED_TENSORS)][:RECOMPUTED_TENSORS]
    spots = [m for m in filled if m.tensor.vectors == "tensor" or m.weights.operation == "copy"]
    spots = spots[:: max(1, -(-len(spots) // SPOT_CHECKS))]

    def ask(merged: MergedTensor, stretch: range, with_weights: bool) -> None:
        tensor, recipe = merged.tensor, plan.recipe
        task = RecomputeTask(
            tensor, stretch, recipe.cast_dtype, files[tensor.name], merged.weights, recipe if with_weights else None
        )
        team.submit(tensor, task)

    for merged in whole:
        ask(merged, range(merged.tensor.element_count), with_weights=True)
    for merged in spots:
        ask(merged, middle_stretch(merged.tensor), with_weights=False)
    try:
        for _ in range(len(whole) + len(spots)):
            tensor, is_right = team.next_answer()
            if not is_right:
                differs = "from what its parents make" if tensor.is_float else "from the primary's"
                raise wrong_child(f"{tensor.name} differs {differs}")
    except BaseException:
        team.settle()
        raise
    return len(whole), len(spots)


def middle_stretch(tensor: TensorInputs) -> range:
    """A few elements from the middle of a tensor; whole rows where they count."""
    row = 1 if tensor.vectors == "tensor" and tensor.rows is None else tensor.vector_width
    length = min(max(1, SPOT_ELEMENTS // row) * row, tensor.element_count)
    start = (tensor.element_count - length) // 2 // row * row
    return range(start, start + length)


def compare_tokenizer_with_rows(plan: MergePlan, folder: Path) -> tuple[str | None, str | None]:
    """(what was found right, what may be wrong) of the child's tokenizer beside its embedding."""
    path, rows = folder / "tokenizer.json", plan.parity.vocabulary.id_count
    if not path.is_file() or rows is None:
        return None, None
    try:
        known = open_tokenizer(path).get_vocab(with_added_tokens=True)
        stated = added_tokens(folder)
    except SlerpMergeError as error:
        return None, error.message.replace(str(path), path.name)
    moved = sorted(token for token, token_id in stated.items() if known.get(token, token_id) != token_id)
    if moved:
        return (
            None,
            f"the ids of {format_names(moved)} in tokenizer.json, which count, are others in the files beside it",
        )
    ids = list({**stated, **known}.values())
    highest = max(ids, default=-1)
    if len(set(ids)) < len(ids):
        return None, f"the tokenizer gives {len(ids) - len(set(ids))} of its tokens the id of another"
    if highest >= rows:
        return None, f"the tokenizer knows the id {highest}, but the embedding has only {rows} rows"
    return f"every token id (up to {highest}) has its row among {rows}", None


def ids_without_rows(plan: MergePlan, folder: Path) -> list[str]:
    """Warnings of the ids in config.json, such as eos_token_id, that the embedding has no row for."""
    vocabulary = plan.parity.vocabulary
    warnings = []
    for key, value in stated_ids(read_json(folder / "config.json")).items():
        ids = value if isinstance(value, list) else [value]
        if any(type(n) is int and n >= 0 and not has_row(n, vocabulary) for n in ids):
            rows = vocabulary.id_count
            warnings.append(f"config.json: {key} is {shorten(value)}, the embedding has only {rows} rows")
    return warnings
