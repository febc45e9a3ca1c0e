"""Parents and child as transformers loads them, one in memory at a time.

Which models can be asked, on what device and in what dtype, and what transformers itself says of a child's files. What
they are asked is not known here. Only local files are read, and no code that a model brings along is run. Read
parents/checkpoint.py and devices.py before this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.devices import accelerator_memory, accelerators, check_device, free_memory, torch_threads_kept
from slerpkit.lazy import torch
from slerpkit.merge.events import Noted
from slerpkit.messages import SlerpMergeError, format_bytes, format_names, shorten
from slerpkit.parents.checkpoint import has_tokenizer, open_checkpoint
from slerpkit.parents.tensors import TORCH_NAMES, dtype_width
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
SMALL_MODEL_PARAMETERS = 5_000_000  # below this torch's threads only wait for each other


def quiet_transformers() -> Any:
    """The transformers package, with no bars and warnings of its own on the screen.

    The package itself, not its lazy stand-in: names of classes come from strangers' configs, and the stand-in would
    look for them among its modules too.
    """
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def find_architecture(checkpoint: Checkpoint) -> Any:
    """The class of transformers that a checkpoint's config names. Raises SlerpMergeError where it has none."""
    transformers = quiet_transformers()
    architecture = getattr(transformers, checkpoint.architecture, None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise SlerpMergeError(
            f"transformers {transformers.__version__} has no {checkpoint.architecture}; {checkpoint.name} was not "
            "loaded.",
            "It needs code of its own, which is never run here, or a newer transformers.",
        )
    return architecture


def verify_with_transformers(folder: Path) -> tuple[str, ...]:
    """Loads a child as transformers would and returns what was found right, in words.

    The class that config.json names is built without memory for weights (on the meta device), and its
    own loading is given stand-ins of the child's names, shapes and dtypes: each one number, spread out.
    Raises SlerpMergeError where a key is missing, unexpected or of another shape, or the tokenizer fails.
    """
    transformers = quiet_transformers()
    checkpoint = open_checkpoint(folder)
    architecture = find_architecture(checkpoint)
    report = loading_report(transformers, architecture, checkpoint)
    faults = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, names in faults.items():
        if names:
            raise SlerpMergeError(
                f"{checkpoint.architecture} loads the child with {kind.replace('_', ' ')}: {format_names(names)}.",
                "Load the primary the same way: if it shows the same, the fault is its own.",
            )
    checks = [f"{checkpoint.architecture} loads it with no missing, unexpected or mismatched key"]
    if has_tokenizer(folder):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise SlerpMergeError(
                f"transformers cannot load the child's tokenizer: {error}",
                "Load the parent's tokenizer the same way: if it shows the same, the fault is its own.",
            ) from error
        checks.append(f"its tokenizer loads with {len(tokenizer)} tokens")
    return tuple(checks)


def lost_on_meta(model: Any, checkpoint: Checkpoint) -> set[str]:
    """Keys that older versions forget to call missing: on the meta device all weights look tied to each other."""
    if not all(parameter.is_meta for parameter in model.parameters()):
        return set()
    tied = set(model._tied_weights_keys or ()) if getattr(model.config, "tie_word_embeddings", False) else set()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    lost = set(model.state_dict()) - set(checkpoint.tensors) - tied
    return {name for name in lost if not any(pattern.search(name) for pattern in ignored)}


def loading_report(transformers: Any, architecture: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """transformers' own account of which keys it missed, did not expect, or found of another shape."""
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SlerpMergeError(
            f"transformers {transformers.__version__} cannot read the child's config.json: {error}",
            "Load the primary the same way: if it shows the same, the fault is its own, or transformers is too old.",
        ) from error
    # Older versions build on the meta device only when told so; newer ones do it themselves and refuse to be told.
    for context in (torch.device("meta"), contextlib.nullcontext()):
        stand_ins = {
            info.name: torch.zeros((), dtype=getattr(torch, TORCH_NAMES[info.dtype]), device="cpu").expand(info.shape)
            for info in checkpoint.tensors.values()
        }
        try:
            with context, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that weights on the meta device hold nothing is the point
                model, report = architecture.from_pretrained(
                    None, config=config, state_dict=stand_ins, output_loading_info=True, ignore_mismatched_sizes=True
                )
            return {**report, "missing_keys": {*report["missing_keys"], *lost_on_meta(model, checkpoint)}}
        except RuntimeError:
            if isinstance(context, contextlib.nullcontext):
                raise
    raise AssertionError("unreachable: the last context returns or raises")


@dataclass(frozen=True)
class ComparedModels:
    """The models that are held against each other, in the order in which they are shown."""

    folders: tuple[tuple[str, Path], ...]  # (role, folder)
    device: str = "auto"  # as RunOptions.device

    @functools.cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Each model opened, by its role. Raises SlerpMergeError as open_checkpoint does."""
        return {role: open_checkpoint(folder) for role, folder in self.folders}

    def tokenizer_folder(self, role: str) -> Path:
        """A model's own folder, or another's here where it stands as weights alone, to take the tokenizer from.

        Raises SlerpMergeError where none of them has one.
        """
        own = self.checkpoints[role].folder
        others = [checkpoint.folder for other, checkpoint in reversed(self.checkpoints.items()) if other != role]
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
    kernels = [value for key, value in checkpoint.config.items() if "attn_implementation" in key and "/" in str(value)]
    if kernels or (checkpoint.folder / "adapter_config.json").is_file():
        asked = f"names the code {kernels[0]}" if kernels else "holds an adapter beside its weights"
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
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    how = {"dtype" if version >= (4, 56) else "torch_dtype": getattr(torch, dtype)}
    model = None
    try:
        with out_of_memory_named(checkpoint.name, device):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    models.tokenizer_folder(role), trust_remote_code=False
                )
                model, report = architecture.from_pretrained(
                    checkpoint.folder, local_files_only=True, output_loading_info=True, **how
                )
                model = model.to(device).eval()
            except (OSError, ValueError, KeyError, ImportError) as error:
                what = f"transformers cannot load {checkpoint.name} ({role}): {shorten(str(error), 300)}"
                raise SlerpMergeError(what, "The merge is not touched by this.") from error
            if report["missing_keys"]:
                what = f"{checkpoint.name} ({role}) lacks weights: {format_names(sorted(report['missing_keys']))}."
                raise SlerpMergeError(what, "What transformers puts in their place is chance; nothing was asked of it.")
            with torch.inference_mode(), torch_threads_kept():
                if checkpoint.parameter_count < SMALL_MODEL_PARAMETERS:
                    torch.set_num_threads(1)
                yield model, tokenizer
    except SlerpMergeError:
        raise
    except Exception as error:  # configs and tokenizers of strangers fail inside other libraries, each in its own way
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        what = f"{checkpoint.name} ({role}) could not be asked: {reason}"
        raise SlerpMergeError(what, "Load it with transformers: if it shows the same, the fault is its own.") from error
    finally:
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
