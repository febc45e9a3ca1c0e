"""check_parity: every difference between the parents; incompatibility: the one that forbids a merge, in a few words.

What is compared, and how it is judged, stands in the modules before this one; here it is put together. Nothing is
written, and nothing is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slerpkit.messages import SlerpMergeError, shorten
from slerpkit.parents.checkpoint import without_wrappers
from slerpkit.parents.resolver import short_name
from slerpkit.parity.chat import (
    check_chat_template,
    child_generation_config,
    compare_code,
    compare_companions,
)
from slerpkit.parity.configs import compare_configs
from slerpkit.parity.copied_files import check_copied_json, copied_files
from slerpkit.parity.embeddings import drop_tied_copies
from slerpkit.parity.labels import align_labels
from slerpkit.parity.modules import pair_modules
from slerpkit.parity.names import rename_to_match
from slerpkit.parity.pairing import DIFFERENT_VOCABULARIES, check_dtypes, check_slices, pair_tensors
from slerpkit.parity.quantisation import check_quantisation, stored_scheme
from slerpkit.parity.report import OF_BASE, Mismatch, ParityReport
from slerpkit.parity.segmentation import compare_segmentation
from slerpkit.parity.soundness import check_soundness, check_wrappers
from slerpkit.parity.vocabulary import align_vocabularies
from slerpkit.recipe import MergeRecipe

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint, Parents
    from slerpkit.recipe import LayerSlice


def accept(mismatches: list[Mismatch], names: Sequence[str]) -> list[Mismatch]:
    """The mismatches, of which those that the person let pass by name are notices."""
    return [
        dataclasses.replace(m, severity="notice", consequence=f"Accepted. {m.consequence}")
        if m.accepted_as in names
        else m
        for m in mismatches
    ]


def check_base(primary: Checkpoint, base: Checkpoint | None, recipe: MergeRecipe) -> list[Mismatch]:
    """What keeps a base model from being one, beyond the shapes of its tensors."""
    if base is None:
        return []
    of_primary = {m.subject for m in (*check_quantisation(primary, primary), *check_soundness(primary, primary))}
    broken = [*check_quantisation(primary, base), *check_soundness(primary, base)]
    settings = accept(compare_configs(primary, base, any_depth=bool(recipe.slices)), recipe.accept)
    mismatches = [m for m in broken if m.subject not in of_primary] + settings
    return [dataclasses.replace(m, subject=m.subject + OF_BASE) for m in mismatches if m.severity == "blocking"]


def check_same_model(primary: Checkpoint, secondary: Checkpoint, slices: Sequence[LayerSlice]) -> list[Mismatch]:
    """A notice where both parents are one folder."""
    if primary.folder.resolve() != secondary.folder.resolve():
        return []
    why = "The child is made of its layers alone." if slices else "The child will be a copy of it."
    return [Mismatch("notice", "the same model twice", primary.name, secondary.name, why)]


def check_common_base(primary: Checkpoint, secondary: Checkpoint, base: Checkpoint | None) -> list[Mismatch]:
    """A notice where both parents are adapters of one model and whole weights are blended."""
    bases = [parent.base for parent in (primary, secondary) if parent.base is not None]
    if base is not None or len(bases) < 2 or bases[0].folder.resolve() != bases[1].folder.resolve():
        return []
    why = (
        f"Both hold the same weights and little else. --base {short_name(bases[0].folder)} blends what each of them "
        "learned (task vectors)."
    )
    return [Mismatch("notice", "adapters of one base", *(model.name for model in bases), why)]


def incompatibility(primary: Checkpoint, other: Checkpoint) -> str | None:
    """Why a model cannot be merged with the primary, in a few words; None where headers show no reason."""
    if primary.folder.resolve() == other.folder.resolve():
        return "the primary itself"
    primary, other = without_wrappers(primary, other)
    renamed, _ = rename_to_match(other, primary)
    _, unpaired = pair_tensors(primary, renamed)
    _, labels = align_labels(primary, renamed)
    own = *check_quantisation(primary, other), *check_soundness(primary, renamed), *pair_modules(primary, other)[1]
    for m in (*own, *compare_configs(primary, other), *labels, *unpaired):
        if m.severity == "blocking" and m.consequence != DIFFERENT_VOCABULARIES:
            return f"{shorten(m.subject, 30)}: {shorten(m.secondary, 24)}, not {shorten(m.primary, 24)}"
    return None


def check_parity(parents: Parents, recipe: MergeRecipe) -> ParityReport:
    """Every difference between the parents, each blocking, resolved or a notice; and the pairs of tensors.

    Where the architectures differ, that alone. Of the recipe it follows dtype, slices, tokenizer and chat template.
    Reads headers and small files; of weights, only a head that should not be there. Raises SlerpMergeError where a
    tokenizer that is asked for is not there.
    """
    primary, secondary, base = parents.primary, parents.secondary, parents.base
    slices = recipe.slices
    renamed_secondary, other_names = rename_to_match(secondary, primary)
    renamed_base = None if base is None else rename_to_match(base, primary)[0]
    vocabulary, row_mismatches = align_vocabularies(primary, renamed_secondary, recipe, renamed_base)
    without_copies, tied_copies = drop_tied_copies(primary)
    labels, label_mismatches = align_labels(primary, renamed_secondary, renamed_base)
    pairs, unpaired = pair_tensors(without_copies, renamed_secondary, slices, renamed_base, vocabulary, labels)
    module_pairs, of_modules = pair_modules(primary, secondary, base)
    template_mismatches, template = check_chat_template(primary, secondary, vocabulary, recipe.chat_template)
    if unpaired and any(parent is not None and stored_scheme(parent) for parent in (primary, secondary, base)):
        unpaired = []  # what packed weights are, and stand beside, follows from that
    mismatches = [
        *accept(row_mismatches, recipe.accept),
        *check_quantisation(primary, secondary),
        *check_soundness(primary, renamed_secondary),
        *accept(compare_configs(primary, secondary, any_depth=bool(slices)), recipe.accept),
        *accept(label_mismatches, recipe.accept),
        *check_base(primary, base, recipe),
        *check_slices(slices, primary, renamed_secondary),
        *tied_copies,
        *check_wrappers(primary, secondary),
        *other_names,
        *unpaired,
        *of_modules,
        *check_dtypes(primary, renamed_secondary, recipe.dtype),
        *template_mismatches,
        *check_copied_json(copied_files(primary, secondary, vocabulary, template)),
        *compare_companions(primary, secondary),
        *compare_code(primary, secondary, vocabulary),
        *compare_segmentation(primary, secondary, vocabulary),
        *child_generation_config(primary, secondary, vocabulary, template)[1],
        *check_same_model(primary, secondary, slices),
        *check_common_base(primary, secondary, base),
    ]
    of_kind = [mismatch for mismatch in mismatches if mismatch.is_of_kind]
    mismatches = [m for m in of_kind if not m.is_of_base] or of_kind or mismatches
    mismatches.sort(key=lambda mismatch: ("blocking", "resolved", "notice").index(mismatch.severity))
    return ParityReport(tuple(mismatches), (*pairs, *module_pairs), vocabulary, template)


def parity_of_headers(parents: Parents, recipe: MergeRecipe) -> ParityReport:
    """Of the parity of parents whose tokenizers are not here yet, what forbids their merge all the same.

    What tokenizers could mend, and what the person may accept, is left out.
    """
    parity = check_parity(parents, recipe)
    certain = [
        m
        for m in parity.of_severity("blocking")
        if m.accepted_as is None and m.subject != "vocabulary" and m.consequence != DIFFERENT_VOCABULARIES
    ]
    return dataclasses.replace(parity, mismatches=tuple(certain))


def check_fit_of_base(primary: Checkpoint, base: Checkpoint) -> None:
    """Raises SlerpMergeError where a model cannot be what the parents were fine-tuned from."""
    reason = incompatibility(primary, base)
    if reason is not None:
        raise SlerpMergeError(f"It is no base of the primary: {reason}.", "Give the model both were fine-tuned from.")
