"""What transformers makes of a checkpoint's names and shapes: which keys its class misses, and which it does not know.

No weights are read, no memory is taken for them, and no code that a model brings along is run. Read
parents/checkpoint.py before this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slerpkit.lazy import torch
from slerpkit.messages import SlerpMergeError, shorten
from slerpkit.parents.tensors import TORCH_NAMES
from slerpkit.parity.embeddings import vocabulary_rows
from slerpkit.parity.pairing import is_left_over
from slerpkit.parity.prediction import prediction_tensors

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parents.tensors import TensorInfo


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


def code_it_names(checkpoint: Checkpoint) -> str | None:
    """The code on a hub that a config has its attention computed by; transformers would load it with the model."""
    named = (value for key, value in checkpoint.config.items() if "attn_implementation" in key and "/" in str(value))
    return next(map(str, named), None)


@dataclass(frozen=True)
class Loading:
    """How the class that a config names takes a checkpoint's tensors."""

    architecture: str
    missing: tuple[str, ...] = ()  # the class makes these up at random
    unexpected: tuple[str, ...] = ()  # and drops these
    mismatched: tuple[str, ...] = ()  # these have another shape there
    unchecked: str | None = None  # why it was not tried, or says nothing, in words

    @property
    def faults(self) -> dict[str, tuple[str, ...]]:
        """The keys of each kind of fault, by what it is called."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "mismatched": self.mismatched}
        return {f"{kind} keys": names for kind, names in kinds.items() if names}


def load_without_weights(checkpoint: Checkpoint) -> Loading:
    """Has the class of a checkpoint load stand-ins of the names, shapes and dtypes that its headers state.

    The class's own loading is used, so its renamings, tied weights and the keys that it ignores count. What cannot be
    tried (a class that transformers does not have, a package that it needs) is no fault of the checkpoint's.
    """
    named = checkpoint.architecture
    if (code := code_it_names(checkpoint)) is not None:
        return Loading(named, unchecked=f"its config names the code {code}, which is never run here")
    try:
        architecture = find_architecture(checkpoint)
        found = loading_report(making_nothing_up(architecture), checkpoint)
    except SlerpMergeError as error:
        return Loading(named, unchecked=error.message.rstrip("."))
    except Exception as error:  # configs of strangers fail inside the library, each in its own way
        if "conversion of the weights" in str(error) and (gaps := gaps_in_lists(checkpoint.tensors)):
            return Loading(named, missing=gaps)  # that go into one tensor with others; the library says it in its log
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        return Loading(named, unchecked=f"this version of transformers does not build it: {reason}")
    loading = Loading(named, *(keys_of(found, kind) for kind in ("missing", "unexpected", "mismatched")))
    of_use_elsewhere = prediction_tensors(checkpoint)
    unexpected = [n for n in loading.unexpected if n not in of_use_elsewhere and not is_left_over(n, checkpoint)]
    loading = dataclasses.replace(loading, unexpected=tuple(unexpected))
    if not set(loading.mismatched) <= set(checkpoint.tensors) and (gaps := gaps_in_lists(checkpoint.tensors)):
        loading = dataclasses.replace(loading, missing=(*loading.missing, *gaps))  # for which it came out too short
    excuse = excuse_for_faults(checkpoint) if loading.faults else None
    return loading if excuse is None else Loading(named, unchecked=excuse)


def excuse_for_faults(checkpoint: Checkpoint) -> str | None:
    """Why another class than the one at hand may take the same keys without fault; None where none would."""
    version, saved_by = quiet_transformers().__version__, str(checkpoint.config.get("transformers_version"))
    if any(key.startswith("AutoModel") for key in checkpoint.config.get("auto_map") or ()):
        return "it brings code of its own, which is never run here, and the class of transformers takes other keys"
    if version_numbers(saved_by) > version_numbers(version):
        return f"transformers {saved_by} saved it, and {version}, which is older, takes other keys"
    return None


def gaps_in_lists(names: Iterable[str]) -> tuple[str, ...]:
    """Names that one member of a list inside a layer, such as its experts, has not and another has."""
    lists: dict[str, dict[str, set[str]]] = {}  # by what stands before the number: the rests, by number
    for name in names:
        if (match := re.match(r"(.*\.\d+\..*?\.)(\d+)(\..*)", name)) is not None:
            before, number, rest = match.groups()
            lists.setdefault(before, {}).setdefault(number, set()).add(rest)
    return tuple(
        f"{before}{number}{rest}"
        for before, members in lists.items()
        for number, rests in members.items()
        for rest in sorted(set().union(*members.values()) - rests)
    )


def version_numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, which say what it can do."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def keys_of(report: dict[str, Any], kind: str) -> tuple[str, ...]:
    """The names of one kind in transformers' account; a shape that stands beside a name is left out."""
    return tuple(sorted(key if isinstance(key, str) else str(key[0]) for key in report[f"{kind}_keys"]))


@functools.cache
def stand_in_class() -> type:
    """A tensor that has a shape and a dtype and stays without memory, whatever device it is asked to go to.

    A conversion of the library's own, such as that of experts into one tensor, thereby takes none either.
    """

    class StandIn(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is torch.Tensor.to:
                dtype = next((part for part in (*args[1:], kwargs.get("dtype")) if isinstance(part, torch.dtype)), None)
                args, kwargs = (args[0], dtype or args[0].dtype), {}
            return super().__torch_function__(func, types, args, kwargs)

    return StandIn


# How classes of transformers, by their age, make up what is missing: at full size, and at random.
MAKING_UP = (
    "_move_missing_keys_from_meta_to_cpu",
    "_move_missing_keys_from_meta_to_device",
    "_initialize_missing_keys",
)


def making_nothing_up(architecture: Any) -> Any:
    """The same class, but for memory that it would take for missing weights."""
    nothing = {name: lambda *_, **__: None for name in MAKING_UP if hasattr(architecture, name)}
    return type(architecture.__name__, (architecture,), {"__module__": architecture.__module__, **nothing})


def stand_in(info: TensorInfo) -> Any:
    """Stands for a stored tensor."""
    dtype = getattr(torch, TORCH_NAMES[info.dtype])
    return torch.empty(info.shape, dtype=dtype, device="meta").as_subclass(stand_in_class())


def config_of(checkpoint: Checkpoint) -> Any:
    """A model's config as transformers has it; of an adapter its base's, with as many tokens as the adapter has."""
    config = quiet_transformers().AutoConfig.from_pretrained(checkpoint.companion_folder, trust_remote_code=False)
    rows = vocabulary_rows(checkpoint)
    if checkpoint.base is not None and rows is not None and hasattr(config, "get_text_config"):
        config.get_text_config().vocab_size = rows
    return config


def loading_report(architecture: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """transformers' own account of which keys it missed, did not expect, or found of another shape."""
    how = {"config": config_of(checkpoint), "output_loading_info": True, "ignore_mismatched_sizes": True}
    # Older versions build on the meta device only when told so; newer ones do it themselves and refuse to be told.
    for context in (torch.device("meta"), contextlib.nullcontext()):
        stand_ins = {info.name: stand_in(info) for info in checkpoint.tensors.values()}
        try:
            with context, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that weights on the meta device hold nothing is the point
                model, report = architecture.from_pretrained(None, state_dict=stand_ins, **how)
        except RuntimeError:
            if isinstance(context, contextlib.nullcontext):
                raise
            continue
        lost = set() if isinstance(context, contextlib.nullcontext) else lost_on_meta(model, checkpoint.tensors)
        return {**report, "missing_keys": {*report["missing_keys"], *lost}}
    raise AssertionError("unreachable: the last context returns or raises")


def lost_on_meta(model: Any, stored: Iterable[str]) -> set[str]:
    """Keys that older versions forget to call missing: on the meta device all weights look tied to each other."""
    prefix = f"{model.base_model_prefix}."
    plain = {name.replace("gamma", "weight").replace("beta", "bias") for name in stored} | set(stored)
    for pattern, replacement in getattr(model, "_checkpoint_conversion_mapping", {}).items():
        plain |= {re.sub(pattern, replacement, name) for name in plain}
    known = plain | {prefix + name for name in plain} | {name.removeprefix(prefix) for name in plain}
    by_tensor: dict[int, set[str]] = {}  # tied weights are one object
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), set()).add(name)
    lost = set().union(*(names for names in by_tensor.values() if not names & known))
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return {name for name in lost if not any(pattern.search(name) for pattern in ignored)}
