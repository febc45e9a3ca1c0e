"""The Hugging Face Hub: what it has of a model that is not here, and the way of its files to this machine.

All goes through huggingface_hub: its cache, its login, its environment variables. A look fetches the config and the
headers of the weights, a few kilobytes of a model of any size. Read hub_cache.py and checkpoint.py before this.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from slerpkit.files import read_json_list
from slerpkit.lazy import huggingface_hub
from slerpkit.messages import SlerpMergeError, explain_os_error, format_bytes, format_names, printable, shorten
from slerpkit.parents.adapters import CONFIG_NAME as ADAPTER_CONFIG
from slerpkit.parents.adapters import WEIGHTS as ADAPTER_WEIGHTS
from slerpkit.parents.adapters import is_adapter, named_base, open_adapter
from slerpkit.parents.checkpoint import (
    CARD_NAME,
    PARENT_FILES,
    PICKLE_INDEX,
    PICKLE_SINGLE,
    WEIGHTS_INDEX,
    WEIGHTS_SINGLE,
    find_weight_files,
    open_checkpoint,
    read_index,
)
from slerpkit.parents.hub_cache import COMMIT, REMOTE_MODELS, HubName, RemoteModel, cached_names
from slerpkit.parents.modules import MODULES_NAME
from slerpkit.parents.resolver import hub_name_of
from slerpkit.parents.safetensors_header import check_layout, parse_header_entry
from slerpkit.parents.tensors import TensorInfo

T = TypeVar("T")

CONNECTIONS = 8  # at once, for small files and headers
MAX_UNASKED_BYTES = 100_000_000  # of a model's files beside its weights; some tokenizers have a third of that
MAX_HUB_CARD_BYTES = 1_000_000  # a larger one is no card
TOLD_FIRST = ("config.json", ADAPTER_CONFIG, WEIGHTS_INDEX, MODULES_NAME)
NEVER_NEEDED = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.md", "*.safetensors")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HubUnreachable(SlerpMergeError):
    """The Hub cannot be asked, or may not be."""


def locate(folder: Path) -> Path:
    """A model's folder, also for one that is named and not here, or not here whole: that is looked up on the Hub.

    It then has the config and the headers of its weights. Raises SlerpMergeError where the Hub does not let it.
    """
    named = hub_name_of(folder)
    if named is None:
        return folder
    here = named.snapshot or folder  # perhaps it came meanwhile
    if not must_be_looked_up(here):
        return here
    try:
        return look_up(named).folder
    except HubUnreachable as error:
        if not here.is_dir():
            raise
        try:
            open_checkpoint(here)  # which says what of it is not here
        except SlerpMergeError as lack:
            raise SlerpMergeError(lack.message, f"{lack.hint}. {error.message}") from error
        raise


def locate_base(folder: Path, given: Path | None) -> Path | None:
    """Where an adapter's base is, the one given or that of its config; None for a model that is no adapter.

    Raises SlerpMergeError where the Hub, or the adapter, does not let it be known.
    """
    if not is_adapter(folder):
        return given
    if given is not None:
        return locate(given)
    adapter = open_adapter(folder)
    try:
        return locate(named_base(adapter))
    except SlerpMergeError as error:
        raise SlerpMergeError(error.message, f"{error.hint} {adapter.way_to_name_base}") from error


def must_be_looked_up(folder: Path) -> bool:
    """Whether a model is named and not here whole, and has not been looked up yet."""
    return hub_name_of(folder) is not None and folder not in REMOTE_MODELS and not is_whole(folder)


def is_whole(folder: Path) -> bool:
    """Whether a folder has a config and every file of weights that it speaks of, or is none of a model at all."""
    if is_adapter(folder):
        return any((folder / name).is_file() for name in ADAPTER_WEIGHTS)
    if not (folder / "config.json").is_file():
        return False
    try:
        find_weight_files(folder)
    except SlerpMergeError:
        return False
    return True


def look_up(named: HubName) -> RemoteModel:
    """What the Hub has of a model: sizes, config, and the headers of its weights by ranged requests.

    Raises SlerpMergeError for an unknown, gated or private model, without a network, and where no weights are there
    that a merge could read.
    """
    with errors_explained(named):
        info = huggingface_hub.HfApi().model_info(named.name, revision=named.revision, files_metadata=True)
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit):
        raise SlerpMergeError(f"The Hub gives {named} no commit.", "Try again, or give the folder of a download.")
    found = HubName(named.name, commit)
    listed = {entry.rfilename: int(entry.size or 0) for entry in info.siblings or () if is_plain(entry.rfilename)}
    first = [name for name in listed if matches(name, TOLD_FIRST)]
    if not first:
        raise refuse_contents(named, listed)
    fetch_small(named, first[:1])  # by the branch's or the tag's name, which the cache then knows
    fetch_small(found, first[1:])
    names = [] if is_of_adapter(listed) else weight_names(found, listed)
    nested = module_files(found, listed) + [name for name in ADAPTER_WEIGHTS if name in listed and not names][:1]
    check_small({name: listed[name] for name in nested}, found)
    fetch_small(found, nested)  # whole: without them it is not known whether two models fit
    with errors_explained(named):
        tables = at_once(lambda name: read_remote_header(found, name, listed[name]), names)
    small = [name for name in listed if matches(name, PARENT_FILES) and not matches(name, NEVER_NEEDED)]
    small += [CARD_NAME] if listed.get(CARD_NAME, MAX_HUB_CARD_BYTES + 1) <= MAX_HUB_CARD_BYTES else []
    sizes = {name: listed[name] for name in (*dict.fromkeys([*first, *nested, *small]), *names)}
    remote = REMOTE_MODELS[found.snapshot_of(commit)] = RemoteModel(found, sizes, dict(zip(names, tables)))
    return remote


def look_closer(remote: RemoteModel) -> None:
    """Fetches all else that a model has beside its weights: tokenizer, template, code. Raises as look_up does."""
    names = [name for name in remote.sizes if name not in remote.weights and not (remote.folder / name).is_file()]
    check_small({name: remote.sizes[name] for name in names}, remote.named)
    fetch_small(remote.named, names)


def module_files(found: HubName, listed: Mapping[str, int]) -> list[str]:
    """What lies in the folders that a list of modules, which is here, names: settings, and weights in one format."""
    index = found.snapshot_of(found.revision or "") / MODULES_NAME
    entries = read_json_list(index) if MODULES_NAME in listed else []
    places = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    folders = tuple(f"{place}/" for place in places if isinstance(place, str) and place)
    inside = [name for name in listed if folders and name.startswith(folders)]
    return [name for name in inside if name.removesuffix(PICKLE_SINGLE) + WEIGHTS_SINGLE not in listed]


def check_small(sizes: Mapping[str, int], named: HubName) -> None:
    """Raises SlerpMergeError where what is fetched before anybody is asked is no small matter."""
    if (total := sum(sizes.values())) > MAX_UNASKED_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        what = f"{named.name} has {format_bytes(total)} beside its weights, {largest} the largest of it."
        raise SlerpMergeError(what, f"If that is as it should be: hf download {named.name}")


def at_once(work: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """What some requests yield, a few at a time. Ctrl-C waits for none of them."""
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        return list(pool.map(work, names))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def is_plain(name: str) -> bool:
    """Whether a repository's path is one that a folder can have: nothing that leads out of it."""
    return bool(name) and not name.startswith("/") and not {"..", "."} & set(name.split("/")) and "\\" not in name


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a repository's path matches; a pattern without a slash means a file or a folder at the top."""
    top = name.partition("/")[0]
    return any(fnmatch.fnmatchcase(name if "/" in pattern else top, pattern) for pattern in patterns)


def weight_names(found: HubName, listed: Mapping[str, int]) -> list[str]:
    """The files of weights that a merge reads. Raises SlerpMergeError where there are none that it could."""
    folder = found.snapshot_of(found.revision or "")
    if WEIGHTS_SINGLE in listed:
        return [WEIGHTS_SINGLE]
    if WEIGHTS_INDEX in listed:
        return [file.name for file in read_index("safetensors", folder / WEIGHTS_INDEX, listed).files]
    raise refuse_contents(found, listed)


def is_of_adapter(listed: Container[str]) -> bool:
    """Whether a repository holds an adapter and no model of its own."""
    has_model = any(name in listed for name in (WEIGHTS_SINGLE, WEIGHTS_INDEX, PICKLE_SINGLE, PICKLE_INDEX))
    return ADAPTER_CONFIG in listed and not has_model and any(name in listed for name in ADAPTER_WEIGHTS)


def refuse_contents(named: HubName, listed: Mapping[str, int]) -> SlerpMergeError:
    """The refusal of a repository that has nothing to merge, which says what it has instead."""
    if PICKLE_SINGLE in listed or PICKLE_INDEX in listed:
        what = f"{named} has its weights in torch's own format alone, which cannot be looked into from afar."
        return SlerpMergeError(what, f"Download it first: hf download {named.name}")
    if any(name.endswith(".gguf") for name in listed):
        what = f"{named} holds a GGUF model, which is quantised."
        return SlerpMergeError(what, "Name the model that it was made from; its page on the Hub links to that.")
    what = f"{named} holds no model that can be merged, only {format_names(list(listed)) or 'nothing'}."
    return SlerpMergeError(what, "Name a repository with config.json and safetensors.")


def fetch_small(named: HubName, names: Iterable[str]) -> None:
    """Fetches small files into the cache. Raises SlerpMergeError where the Hub or the disk does not let it."""

    def fetch(name: str) -> None:
        huggingface_hub.hf_hub_download(named.name, name, revision=named.revision)

    with errors_explained(named):
        at_once(fetch, list(names))


def read_remote_header(found: HubName, name: str, size: int) -> dict[str, TensorInfo]:
    """The tensors of a file on the Hub, as read_header tells those of one that is here."""
    header = huggingface_hub.HfApi().parse_safetensors_file_metadata(found.name, name, revision=found.revision)
    file = found.snapshot_of(found.revision or "") / name
    start = size - max((info.data_offsets[1] for info in header.tensors.values()), default=0)
    tensors = {}
    for tensor, info in header.tensors.items():
        entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        tensors[tensor] = parse_header_entry(file, tensor, entry, start)
    check_layout(file, tensors.values(), start, size)
    return tensors


@contextlib.contextmanager
def errors_explained(named: HubName, shows_bars: bool = False) -> Iterator[None]:
    """Whatever the library raises becomes a SlerpMergeError with its remedy; no token is ever part of it.

    The library prints nothing meanwhile: neither bars, unless they are wanted, nor what it tries again.
    """
    bars_were_off = huggingface_hub.utils.are_progress_bars_disabled()
    level = huggingface_hub.utils.logging.get_verbosity()
    if not shows_bars:
        huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        yield
    except SlerpMergeError:
        raise
    except Exception as error:  # the library's own, those of two HTTP clients, and the disk's
        raise explain_hub_error(error, named) from error
    finally:
        huggingface_hub.utils.logging.set_verbosity(level)
        if not bars_were_off:
            huggingface_hub.utils.enable_progress_bars()


def explain_hub_error(error: Exception, named: HubName) -> SlerpMergeError:
    """What the library raised, in words."""
    errors = huggingface_hub.utils
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_lost = is_connection_error(error)
    page = f"{huggingface_hub.constants.ENDPOINT}/{named.name}"
    if isinstance(error, errors.GatedRepoError):
        hint = f"Open {page}, accept them, then {LOG_IN}, with the account that accepted."
        return SlerpMergeError(f"{named.name} is gated: its makers ask you to accept their terms first.", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = f"Its page shows its branches and tags: {page}. Without @, the main branch is taken."
        return SlerpMergeError(f"{named.name} has no revision {named.revision}.", hint)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        what = f"{named.name} is no folder here, and the Hub knows no such model, or it is private."
        return SlerpMergeError(what, f"{suggestion(named.name)}For a private one {LOG_IN}.")
    if isinstance(error, errors.OfflineModeIsEnabled) or huggingface_hub.constants.HF_HUB_OFFLINE:
        what = f"{named} is no folder here and not whole in the cache, and HF_HUB_OFFLINE keeps from asking the Hub."
        return HubUnreachable(what, f"{suggestion(named.name, ask=False)}Unset HF_HUB_OFFLINE, or give a folder.")
    if status == 403:
        return SlerpMergeError(f"The Hub does not let you read {named.name}.", f"Ask its owner, then {LOG_IN}.")
    if status == 429:
        return SlerpMergeError("The Hub has had too many requests from here.", "Wait a few minutes.")
    if status is not None and status >= 500:
        return SlerpMergeError(f"The Hub is out of order (status {status}).", "Try again later.")
    if isinstance(error, OSError) and error.errno is not None and not is_lost:
        cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
        fault = explain_os_error(error, Path(str(error.filename or cache)), "write to")
        hint = "Free some space there, or set HF_HOME to a folder on another disk."
        return SlerpMergeError(fault.message, hint)
    if is_lost:
        what = f"{named} is no folder here, and the Hub cannot be reached ({huggingface_hub.constants.ENDPOINT})."
        hint = f"{suggestion(named.name, ask=False)}Check the network, or give the folder of a download."
        return HubUnreachable(what, hint)
    reason = printable(shorten((str(error).splitlines() or [""])[0], 120))
    return SlerpMergeError(f"The Hub's answer on {named} is not understood: {type(error).__name__} {reason}".rstrip(),
                           f"Download it with `hf download {named.name}`, and give its name again.")  # fmt: skip


# By name, for which HTTP client the library has is the library's business.
CONNECTION_ERRORS = {"ConnectionError", "ConnectError", "NetworkError", "TimeoutException", "Timeout", "ProtocolError",
                     "TransportError", "IncompleteRead", "ChunkedEncodingError", "LocalEntryNotFoundError"}  # fmt: skip


def is_connection_error(error: Exception) -> bool:
    """Whether the network was lost, or is not there."""
    return bool({kind.__name__ for kind in type(error).__mro__} & CONNECTION_ERRORS)


def suggestion(name: str, ask: bool = True) -> str:
    """A model nearly of this name, as a question: from here, and where the Hub may be asked, of the same maker's."""
    names = {cached.name for cached in cached_names()}
    with contextlib.suppress(OSError):  # there is no such folder, or none that may be listed
        names |= {path.as_posix() for path in Path(name).parent.iterdir() if path.is_dir()}
    if ask:
        with contextlib.suppress(Exception):  # whatever keeps from it, a suggestion is no more than that
            maker = name.partition("/")[0]
            names |= {model.id for model in huggingface_hub.HfApi().list_models(author=maker, limit=200)}
    near = difflib.get_close_matches(name, names, 1, 0.75)  # itself, where only the revision is wrong
    return f"Did you mean {printable(near[0])}? " if near and near[0] != name else ""
