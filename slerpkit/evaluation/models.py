"""Parents and child as transformers loads them, one in memory at a time.

Which models can be asked, on what device and in what dtype, and whether a child loads as it should. What else they are
asked is not known here. Only local files are read, and no code that a model brings along is run. Read loading.py and
devices.py before this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.child.verify import Verification
from slerpkit.devices import accelerator_memory, accelerators, check_device, free_memory, torch_threads_kept
from slerpkit.evaluation.loading import (
    code_it_names,
    config_of,
    find_architecture,
    load_without_weights,
    quiet_transformers,
    version_numbers,
)
from slerpkit.lazy import numpy, torch
from slerpkit.merge.events import Noted
from slerpkit.messages import SlerpMergeError, format_bytes, format_names, shorten
from slerpkit.parents.adapters import CONFIG_NAME
from slerpkit.parents.checkpoint import GENERATION_NAME, has_tokenizer, open_checkpoint
from slerpkit.parents.tensors import TORCH_NAMES, TensorReader, dtype_width
from slerpkit.parity.configs import is_encoder_decoder

if TYPE_CHECKING:
    from slerpkit.merge.events import Observer
    from slerpkit.parents.checkpoint import Checkpoint

WORKING_BYTES = 1_200_000_000  # beside a model's weights: a window's logits over a large vocabulary, and libraries
# Heads over encoders, of some of which older versions of transformers say that they can generate; and bare models.
READER_NAME = re.compile(
    r"(For(MaskedLM|PreTraining|(\w+)?Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)"
    r"|(?<!LMHead)(?<!DoubleHeads)(?<!MT)(?<!EncoderDecoder)Model)$"
)
PROBE = "Once upon a time"
SAME_FAULT = "Load the primary the same way: if it shows the same, the fault is its own."
OWN_FAULT = "Load it with transformers: if it shows the same, the fault is its own."
NO_NUMBERS = "Its weights may overflow, or not be finite: see its report's warnings, or merge with --dtype float32."
SMALL_MODEL_PARAMETERS = 5_000_000  # below this torch's threads only wait for each other


@dataclass(frozen=True)
class ComparedModels:
    """The models that are held against each other, in the order in which they are shown."""

    folders: tuple[tuple[str, Path], ...]  # (role, folder)
    device: str = "auto"  # as RunOptions.device
    adapter_bases: Mapping[Path, Path] = dataclasses.field(default_factory=dict)  # as MergeRecipe.adapter_bases

    @functools.cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Each model opened, by its role. Raises SlerpMergeError as open_checkpoint does."""
        return {role: open_checkpoint(folder, self.adapter_bases.get(folder)) for role, folder in self.folders}

    def tokenizer_folder(self, role: str) -> Path:
        """A model's own folder, or another's here where it stands as weights alone, to take the tokenizer from.

        Raises SlerpMergeError where none of them has one.
        """
        own = self.checkpoints[role].tokenizer_folder
        others = [
            checkpoint.tokenizer_folder for other, checkpoint in reversed(self.checkpoints.items()) if other != role
        ]
        folder = next((folder for folder in (own, *others) if has_tokenizer(folder)), None)
        if folder is None:
            what = "None of these models has a tokenizer, so there is nothing to read or write a text with."
            raise SlerpMergeError(what, "Put the tokenizer's files into a parent's folder.")
        return folder


class DeviceOutOfMemory(SlerpMergeError):
    """A device had no memory left for a model."""

    def __init__(self, name: str, device: str) -> None:
        hint = "Give it --device cpu." if device != "cpu" else "Close other programs, or use a machine with more."
        super().__init__(f"The device {device} ran out of memory with {name}.", hint)


@contextlib.contextmanager
def out_of_memory_named(name: str, device: str) -> Iterator[None]:
    """Turns a device's or the system's lack of memory into DeviceOutOfMemory."""
    try:
        yield
    except MemoryError as error:
        raise DeviceOutOfMemory(name, device) from error
    except RuntimeError as error:
        if re.search(r"out of memory|can't allocate memory|not enough memory", str(error), re.IGNORECASE):
            raise DeviceOutOfMemory(name, device) from error
        raise


def generates_text(checkpoint: Checkpoint) -> bool:
    """Whether a model seems to write texts, by what its config calls it; transformers need not load for it."""
    return bool(checkpoint.config.get("architectures")) and not READER_NAME.search(checkpoint.architecture)


def check_generates_text(checkpoint: Checkpoint, reads_on: bool) -> None:
    """Raises SlerpMergeError where a model cannot generate text; reads_on: or cannot predict a text token by token."""
    architecture = find_architecture(checkpoint)
    what = None
    if not (generates_text(checkpoint) and architecture.can_generate()):
        what = f"{checkpoint.name} is a {checkpoint.architecture}, which reads texts and cannot write any."
    elif reads_on and is_encoder_decoder(checkpoint):
        what = f"{checkpoint.name} is a {checkpoint.architecture}, which does not predict a text from its beginning."
    if what is not None:
        raise SlerpMergeError(what, "Merge it without tasting; its parents can be inspected.")
    code = code_it_names(checkpoint)
    stands_beside = checkpoint.base is None and (checkpoint.folder / CONFIG_NAME).is_file()
    if code is not None or stands_beside:
        asked = f"names the code {code}" if code is not None else "holds an adapter beside its weights"
        what = f"{checkpoint.name} {asked}, which would be loaded with it."
        raise SlerpMergeError(what, "Take that out of its folder; it was not loaded.")


def choose_device_and_dtype(models: ComparedModels) -> tuple[str, str]:
    """(device, dtype) that each of the models fits, alone: the stored dtype on an accelerator, float32 on the
    processor where there is room, which there is faster and exact.

    Raises SlerpMergeError where a model is too large for any.
    """
    stored = max((checkpoint.dtypes[0] for checkpoint in models.checkpoints.values()), key=dtype_width)
    largest = max(models.checkpoints.values(), key=lambda checkpoint: checkpoint.parameter_count)
    count = largest.parameter_count
    for device in [name for name, is_there in accelerators().items() if is_there] if models.device != "cpu" else []:
        fits = count * dtype_width(stored) + WORKING_BYTES < accelerator_memory(device)
        if models.device == device or (models.device == "auto" and fits):
            return device, stored
    if models.device not in ("auto", "cpu"):
        check_device(models.device)
    wide = "float64" if stored == "float64" else "float32"
    for dtype in (wide, stored):
        if count * dtype_width(dtype) + WORKING_BYTES < free_memory():
            return "cpu", dtype
    needed = format_bytes(count * dtype_width(stored) + WORKING_BYTES)
    what = f"{largest.name} needs about {needed} of memory to be asked anything; {format_bytes(free_memory())} are free"
    raise SlerpMergeError(f"{what}.", "Close other programs, or use a machine with more memory. The merge needs less.")


def with_fallback_to_cpu(models: ComparedModels, observe: Observer, work: Callable[[str, str], Any]) -> Any:
    """What `work(device, dtype)` makes; once more on the processor where an accelerator that was chosen runs full."""
    device, dtype = choose_device_and_dtype(models)
    try:
        return work(device, dtype)
    except DeviceOutOfMemory as error:
        if device == "cpu" or models.device != "auto":
            raise
        observe(Noted(f"{error.message} Once more, on the processor."))
    # Not within the block above: the error would hold on to the model that did not fit.
    return work(*choose_device_and_dtype(dataclasses.replace(models, device="cpu")))


@contextlib.contextmanager
def loaded_model(models: ComparedModels, role: str, device: str, dtype: str) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer) as transformers has them; given back when the block ends, so that one is there at a time.

    Raises SlerpMergeError where transformers cannot load them, DeviceOutOfMemory where there is no memory for them.
    """
    transformers, checkpoint = quiet_transformers(), models.checkpoints[role]
    architecture = find_architecture(checkpoint)
    how = {"dtype" if version_numbers(transformers.__version__) >= (4, 56) else "torch_dtype": getattr(torch, dtype)}
    model = None
    try:
        with out_of_memory_named(checkpoint.name, device):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    models.tokenizer_folder(role), trust_remote_code=False
                )
                model, report = load_whole(architecture, checkpoint, **how)
                model = model.to(device).eval()
            except (OSError, ValueError, KeyError, ImportError) as error:
                what = f"transformers cannot load {checkpoint.name} ({role}): {shorten(str(error), 300)}"
                raise SlerpMergeError(what, f"{OWN_FAULT} The merge is not touched by this.") from error
            if report["missing_keys"]:
                what = f"{checkpoint.name} ({role}) lacks weights: {format_names(sorted(report['missing_keys']))}."
                raise SlerpMergeError(what, "Complete them: what transformers puts in their place is chance.")
            with torch.inference_mode(), torch_threads_kept():
                if checkpoint.parameter_count < SMALL_MODEL_PARAMETERS:
                    torch.set_num_threads(1)
                yield model, tokenizer
    except SlerpMergeError:
        raise
    except Exception as error:  # configs and tokenizers of strangers fail inside other libraries, each in its own way
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        what = f"{checkpoint.name} ({role}) could not be asked: {reason}"
        raise SlerpMergeError(what, OWN_FAULT) from error
    finally:
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def load_whole(architecture: Any, checkpoint: Checkpoint, **how: Any) -> tuple[Any, dict[str, Any]]:
    """(model, what transformers says of its keys). An adapter comes as it is merged: its base with other numbers."""
    how = {"output_loading_info": True, **how}
    if checkpoint.base is None:
        return architecture.from_pretrained(checkpoint.folder, local_files_only=True, **how)
    tensors = {}
    with TensorReader() as reader:
        for name, info in checkpoint.tensors.items():
            stored = numpy.empty(info.read_bytes, "u1")
            reader.read_into(info, 0, memoryview(stored))
            dtype = getattr(torch, TORCH_NAMES[info.read_dtype])
            tensors[name] = torch.from_numpy(stored).view(dtype).reshape(info.shape)
    model, report = architecture.from_pretrained(None, config=config_of(checkpoint), state_dict=tensors, **how)
    if (checkpoint.companion_folder / GENERATION_NAME).is_file():
        model.generation_config = type(model.generation_config).from_pretrained(checkpoint.companion_folder)
    return model, report


def verify_with_transformers(folder: Path, with_logits: bool = False) -> Verification:
    """Holds a child against its class and its tokenizer as transformers has them; with_logits: also lets it read.

    Raises SlerpMergeError where a key is missing, unexpected or of another shape, where the tokenizer fails, or where
    logits are not finite. What cannot be tried here is a warning.
    """
    checkpoint = open_checkpoint(folder)
    checks, untried = [], []
    loading = load_without_weights(checkpoint)
    for kind, names in loading.faults.items():
        raise SlerpMergeError(f"{loading.architecture} loads the child with {kind}: {format_names(names)}.", SAME_FAULT)
    if loading.unchecked is None:
        checks.append(f"{loading.architecture} loads it with no missing, unexpected or mismatched key")
    else:
        untried.append(f"not checked with transformers: {loading.unchecked}")
    if has_tokenizer(folder):
        checks.append(f"its tokenizer loads with {count_of_tokens(folder)} tokens")
    reads_on = generates_text(checkpoint) and not is_encoder_decoder(checkpoint)
    if with_logits and reads_on and loading.unchecked is None:
        found, right = try_logits(checkpoint)
        (checks if right else untried).append(found)
    return Verification(tuple(checks), tuple(untried))


def count_of_tokens(folder: Path) -> int:
    """How many tokens transformers has of a folder's tokenizer. Raises SlerpMergeError where it does not load."""
    try:
        return len(quiet_transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SlerpMergeError(f"transformers cannot load the child's tokenizer: {error}", SAME_FAULT) from error


def try_logits(checkpoint: Checkpoint) -> tuple[str, bool]:
    """(what is said of a child's logits for a short text, whether they were computed).

    Raises SlerpMergeError where one of them is infinite or not a number.
    """
    models = ComparedModels((("child", checkpoint.folder),))
    try:
        check_generates_text(checkpoint, reads_on=True)
        device, dtype = choose_device_and_dtype(models)
        with loaded_model(models, "child", device, dtype) as (model, tokenizer):
            ids = tokenizer(PROBE, return_tensors="pt")["input_ids"].to(device)
            are_finite = bool(torch.isfinite(model(input_ids=ids).logits).all())
    except SlerpMergeError as error:  # no tokenizer or no memory, say: that tells nothing of the child
        return f"its logits were not computed: {error.message.rstrip('.')}", False
    if not are_finite:
        raise SlerpMergeError("The child's logits for a short text are infinite or not a number.", SAME_FAULT)
    return "its logits for a short text are finite", True
