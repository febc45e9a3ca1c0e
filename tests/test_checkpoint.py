"""Parents opened by their headers: what every format says, and every way a folder or a file can be wrong."""

from __future__ import annotations

import builtins
import collections
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from slerpkit.files import MAX_OPEN_FILES
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import open_checkpoint
from slerpkit.parents.safetensors_header import read_header
from slerpkit.parents.tensors import TensorInfo, TensorReader
from tests.builders import LLAMA_CONFIG, edit_json, llama_tensors, make_checkpoint

STORAGES = ("safetensors", "bin", "legacy-bin")
PICKLES = ("bin", "legacy-bin")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
ROOT = Path(__file__).resolve().parents[1]


def weights_of(folder: Path) -> Path:
    """The only file of weights in a folder."""
    (file,) = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    return file


def mixed_tensors() -> dict[str, torch.Tensor]:
    """One tensor of every kind that a checkpoint can hold, of awkward sizes."""
    generator = torch.Generator().manual_seed(5)
    tensors = {f"float.{name}": torch.randn(3, 5, generator=generator).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "a.number": torch.tensor(1.5),
        "nothing": torch.zeros(0, 4),
        "ids": torch.arange(7),
        "mask": torch.tensor([[True, False, True]]),
        "pixels": torch.arange(11, dtype=torch.uint8),
        "模型.权重": torch.randn(2, 1, 3, generator=generator),
    }
    return tensors


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def stored_bytes(info: TensorInfo, start: int = 0, length: int | None = None) -> bytes:
    """A stretch of a tensor as the program reads it from disk."""
    buffer = bytearray(info.byte_count - start if length is None else length)
    with TensorReader() as reader:
        reader.read_into(info, start, memoryview(buffer))
    return bytes(buffer)


def as_libraries_load(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, by safetensors and torch themselves."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for file in folder.glob("*.bin"):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def assert_same_tensors(found: dict[str, TensorInfo], expected: dict[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and every byte."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    kinds |= {torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8"}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        info = found[name]
        assert (info.name, info.dtype, info.shape) == (name, kinds[tensor.dtype], tuple(tensor.shape))
        assert stored_bytes(info) == raw_bytes(tensor), name


def assert_refused(folder: Path, match: str, named: Path | str) -> SlerpMergeError:
    """Opening fails in words that name the culprit and tell what to do."""
    with pytest.raises(SlerpMergeError, match=match) as caught:
        open_checkpoint(folder)
    assert str(named) in caught.value.message
    assert caught.value.hint.strip()
    return caught.value


def write_safetensors(folder: Path, header: dict | bytes, data_length: int, header_length: int | None = None) -> Path:
    """A model folder whose only file has this very header, true or not, and so many bytes behind it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG), encoding="utf-8")
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(raw) if header_length is None else header_length)
    (folder / "model.safetensors").write_bytes(length + raw + bytes(data_length))
    return folder


def write_pickle(folder: Path, content: object, storage: str, protocol: int = 2) -> Path:
    """A model folder with anything at all saved by torch as pytorch_model.bin."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG), encoding="utf-8")
    zipped = storage == "bin"
    file = folder / "pytorch_model.bin"
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return folder


class Calls:
    """An object that, unpickled by anyone careless, calls a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class ClaimedTensor:
    """A tensor in a pickle whose first element, shape and strides are whatever we say."""

    def __init__(self, values: torch.Tensor, first: int, shape: tuple, strides: tuple, state: object = None) -> None:
        storage = values._typed_storage()
        self.call = torch._utils._rebuild_tensor_v2, (storage, first, shape, strides, False, collections.OrderedDict())
        self.state = state

    def __reduce__(self) -> tuple:
        return self.call if self.state is None else (*self.call, self.state)


# ── What is there is found ──


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("content", [*DTYPES, "mixed"])
def test_every_format_is_read_as_its_library_reads_it(tmp_path, parents, storage, shards, content):
    tensors = mixed_tensors() if content == "mixed" else llama_tensors(1, DTYPES[content])
    folder = make_checkpoint(tmp_path / "model", tensors, storage=storage, shards=shards)
    parents.watch(folder)
    checkpoint = open_checkpoint(folder)
    assert_same_tensors(checkpoint.tensors, as_libraries_load(folder))
    assert checkpoint.storage == ("safetensors" if storage == "safetensors" else "pickle")
    assert checkpoint.config == LLAMA_CONFIG
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.parameter_count == sum(tensor.numel() for tensor in tensors.values())
    assert checkpoint.byte_count == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("storage", PICKLES)
def test_state_dicts_as_people_save_them(tmp_path, storage):
    """A module's own state dict, parameters, tied weights, and slices of one storage."""
    module = torch.nn.Linear(3, 4)
    storage_of_many = torch.arange(40.0).reshape(10, 4)
    content = module.state_dict()
    content["parameter"] = torch.nn.Parameter(torch.randn(2, 3))
    content["tied"] = content["weight"]
    content["rows"] = storage_of_many[3:6]
    content["column"] = storage_of_many[:, :1][:1]
    folder = write_pickle(tmp_path / "model", content, storage)
    assert_same_tensors(open_checkpoint(folder).tensors, as_libraries_load(folder))


def test_safetensors_wins_where_both_stand(tmp_path):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    other = make_checkpoint(tmp_path / "other", llama_tensors(2), storage="bin", shards=2)
    for file in other.glob("pytorch_model*"):
        shutil.copy(file, folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.storage == "safetensors"
    assert_same_tensors(checkpoint.tensors, llama_tensors(1))


def test_a_single_file_wins_over_an_index(tmp_path):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"gone": "gone.safetensors"}}')
    assert_same_tensors(open_checkpoint(folder).tensors, llama_tensors(1))


def test_links_into_a_cache_are_followed_and_the_model_has_its_public_name(tmp_path):
    cache = tmp_path / "models--some-org--some-model"
    real = make_checkpoint(cache / "blobs", llama_tensors(1), shards=2)
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        try:
            (snapshot / file.name).symlink_to(file)
        except OSError:
            pytest.skip("this system lets nobody make links")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.name == "some-org/some-model"
    assert_same_tensors(checkpoint.tensors, llama_tensors(1))


@pytest.mark.parametrize(
    ("claimed", "name"),
    [("org/model", "org/model"), ("org/another", "model"), ("a/b/model", "model"), (7, "model"), (..., "model")],
)
def test_a_name_that_the_config_claims_is_believed_where_the_folder_agrees(tmp_path, claimed, name):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    edit_json(folder / "config.json", _name_or_path=claimed)
    assert open_checkpoint(folder).name == name


@pytest.mark.parametrize("architectures", [..., None, [], {"a": 1}, "LlamaForCausalLM", 3])
def test_an_odd_statement_of_architectures_is_no_crash(tmp_path, architectures):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    edit_json(folder / "config.json", architectures=architectures)
    assert isinstance(open_checkpoint(folder).architecture, str)


# ── Headers only ──


def write_large(folder: Path, storage: str) -> None:
    """A model of one tensor, large beside what opening may read. The safetensors file is sparse."""
    if storage != "safetensors":
        make_checkpoint(folder, {"model.embed_tokens.weight": torch.zeros(6000, 1000)}, storage=storage)
        return
    rows = 1_000_000 if os.name == "posix" else 6000
    entry = {"dtype": "F32", "shape": [rows, 1000], "data_offsets": [0, 4000 * rows]}
    write_safetensors(folder, {"model.embed_tokens.weight": entry}, 0)
    with open(folder / "model.safetensors", "r+b") as stream:
        stream.truncate(stream.seek(0, os.SEEK_END) + 4000 * rows)


OPEN_AND_TELL = """
import json, sys, tracemalloc
from pathlib import Path
from slerpkit.parents.checkpoint import open_checkpoint

def taken():
    system = Path("/proc/self")
    if not (system / "io").exists():
        return [0, 0]
    read = int((system / "io").read_text().split("rchar:")[1].split()[0])
    return [read, 1024 * int((system / "status").read_text().split("VmHWM:")[1].split()[0])]

import safetensors, numpy  # their own files are not the model's
before = taken()
tracemalloc.start()
checkpoint = open_checkpoint(Path(sys.argv[1]))
read, resident = (after - earlier for after, earlier in zip(taken(), before))
print(json.dumps({"bytes": checkpoint.byte_count, "allocated": tracemalloc.get_traced_memory()[1],
                  "read": read, "resident": resident, "torch": "torch" in sys.modules}))
"""


@pytest.mark.parametrize("storage", STORAGES)
def test_opening_reads_headers_only_and_loads_no_torch(tmp_path, storage):
    write_large(tmp_path / "model", storage)
    command = [sys.executable, "-B", "-c", OPEN_AND_TELL, str(tmp_path / "model")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    told = json.loads(shown)
    assert told["bytes"] >= 24_000_000
    assert told["read"] < 8_000_000
    assert told["resident"] < 16_000_000
    assert told["allocated"] < 8_000_000
    assert not told["torch"]


# ── Bytes come through TensorReader ──


@pytest.mark.parametrize("storage", STORAGES)
def test_any_stretch_of_a_tensor_can_be_read(tmp_path, storage):
    tensors = llama_tensors(1)
    infos = open_checkpoint(make_checkpoint(tmp_path / "model", tensors, storage=storage, shards=2)).tensors
    chooser = random.Random(0)
    for name, tensor in tensors.items():
        start = chooser.randint(0, tensor.nbytes)
        length = chooser.randint(0, tensor.nbytes - start)
        assert stored_bytes(infos[name], start, length) == raw_bytes(tensor)[start : start + length]


def test_two_readers_of_one_file_do_not_disturb_each_other(tmp_path):
    """As when a model is merged with itself: each source has a position of its own in the file."""
    tensors = llama_tensors(1)
    infos = open_checkpoint(make_checkpoint(tmp_path / "model", tensors)).tensors
    names = "model.embed_tokens.weight", "lm_head.weight"
    found = dict.fromkeys(names, b"")
    with TensorReader() as reader:
        fills = [reader.begin(infos[name], 0, source) for source, name in enumerate(names)]
        for _ in range(4):
            for name, fill in zip(names, fills):
                buffer = bytearray(64)
                fill(memoryview(buffer))
                found[name] += bytes(buffer)
    assert found == {name: raw_bytes(tensors[name])[:256] for name in names}


def test_few_files_stay_open_however_many_shards_there_are(tmp_path):
    tensors = {f"t{number}.weight": torch.full((2,), float(number)) for number in range(40)}
    infos = open_checkpoint(make_checkpoint(tmp_path / "model", tensors, shards=40)).tensors
    with TensorReader() as reader:
        opened = [reader._handles.at(info.file, "r", 0) for info in infos.values()]
        assert sum(not handle.closed for handle in opened) <= MAX_OPEN_FILES
        buffer = bytearray(8)
        reader.read_into(infos["t0.weight"], 0, memoryview(buffer))
        assert bytes(buffer) == raw_bytes(tensors["t0.weight"])
    assert all(handle.closed for handle in opened)


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    info = max(open_checkpoint(folder).tensors.values(), key=lambda info: info.offset)
    os.truncate(info.file, info.offset + 3)
    with pytest.raises(SlerpMergeError, match=f"{re.escape(str(info.file))}.*ends inside '{info.name}'"):
        stored_bytes(info)


def test_a_file_that_vanishes_after_it_was_opened_is_named(tmp_path):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    info = open_checkpoint(folder).tensors["lm_head.weight"]
    info.file.unlink()
    with pytest.raises(SlerpMergeError, match=f"read the tensor lm_head.weight from {re.escape(str(info.file))}"):
        stored_bytes(info)


# ── Folders that hold no model ──


def test_a_folder_that_is_missing(tmp_path):
    assert_refused(tmp_path / "nowhere", "does not exist", tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(tmp_path):
    file = weights_of(make_checkpoint(tmp_path / "model", llama_tensors(1)))
    assert_refused(file, "is a file, not a folder", file)


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte"])
def test_a_path_that_no_system_can_have(tmp_path, name):
    assert_refused(tmp_path / name, "no usable path|does not exist", tmp_path)


def test_an_empty_folder(tmp_path):
    assert_refused(tmp_path, "holds no weights", tmp_path)


def test_a_folder_without_weights(tmp_path):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    weights_of(folder).unlink()
    assert_refused(folder, "holds no weights", folder)


def test_a_folder_without_a_config(tmp_path, parents):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    (folder / "config.json").unlink()
    parents.watch(folder)
    assert_refused(folder, r"has no config\.json", folder)


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_without_a_tensor(tmp_path, storage):
    assert_refused(make_checkpoint(tmp_path / "model", {}, storage=storage), "holds no tensors", tmp_path / "model")


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("consolidated.safetensors", "convert_mistral_"),
        ("consolidated-00001-of-00002.safetensors", "convert_mistral_"),
        ("consolidated.00.pth", "convert_llama_"),
    ],
)
def test_weights_in_their_makers_own_layout_alone_are_named(tmp_path, name, script, with_config):
    (tmp_path / name).write_bytes(b"")
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    error = assert_refused(tmp_path, f"{name} alone", tmp_path)
    assert script in error.hint


@pytest.mark.parametrize("with_config", [True, False])
def test_a_gguf_model_is_called_quantised(tmp_path, with_config):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    assert_refused(tmp_path, "GGUF model, which is quantised", tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "does not hold valid JSON"),
        (b'{"model_type": "llama"', "does not hold valid JSON"),
        (b"[1, 2]", "holds no JSON object"),
        (b'{"model_type": "\xff"}', "does not hold valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b'{"a": ' + 100_000 * b"[", "nested too deeply"),
        (b'{"a": ' + 10_000 * b"9" + b"}", "does not hold valid JSON"),
    ],
    ids=["empty", "cut", "list", "not-utf-8", "twice", "deep", "long-number"],
)
def test_a_config_that_is_not_json(tmp_path, content, match):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, match, folder / "config.json")


def test_a_config_of_absurd_size_is_not_loaded(tmp_path):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    os.truncate(folder / "config.json", 70_000_000)
    assert_refused(folder, "larger than 4.0 MB", folder / "config.json")


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    file = weights_of(make_checkpoint(tmp_path / "model", llama_tensors(1)))
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read everything")
    assert_refused(file.parent, "Could not read", file)


# ── Indexes ──


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
def test_an_index_that_names_a_missing_file(tmp_path, storage):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1), storage=storage, shards=2)
    missing = next(folder.glob("*-00002-of-00002.*"))
    missing.unlink()
    assert "index.json" in str(assert_refused(folder, "which is not there", missing.name))


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "place", ["../outside", "{above}/outside", "..\\outside", "sub/outside", "C:outside", "..", ""]
)
def test_an_index_that_names_a_file_outside_its_folder(tmp_path, storage, place):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1), storage=storage, shards=2)
    shard = next(folder.glob("*-00001-of-00002.*"))
    (folder / "sub").mkdir()
    for copy in (tmp_path / "outside", folder / "sub" / "outside"):
        shutil.copy(shard, copy)  # it would open, if it were asked to
    index = next(folder.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["lm_head.weight"] = place.format(above=tmp_path)
    edit_json(index, weight_map=weight_map)
    assert "Do not trust" in assert_refused(folder, "outside its own folder", index).hint


def test_an_index_that_promises_tensors_that_are_not_there(tmp_path):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1), shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.extra.weight": "model-00001-of-00002.safetensors"})
    assert_refused(folder, r"promises tensors .* model\.extra\.weight", index)


def test_an_index_that_gives_a_tensor_to_the_wrong_shard(tmp_path):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1), shards=2)
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].rename(folder / "swap")
    shards[1].rename(shards[0])
    (folder / "swap").rename(shards[1])
    assert_refused(folder, "promises tensors that its files do not hold", folder / "model.safetensors.index.json")


def test_a_tensor_that_stands_in_two_shards(tmp_path):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1), shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    shutil.copy(first, second)
    assert_refused(folder, f"stands in .*{second.name} and in {first.name}", second)


@pytest.mark.parametrize("weight_map", [..., {}, [], "model.safetensors", None])
def test_an_index_without_a_map(tmp_path, weight_map):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1), shards=2)
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map=weight_map)
    assert_refused(folder, "names no weights", index)


@pytest.mark.parametrize("place", [None, 3, ["model-00001-of-00002.safetensors"], {}])
def test_an_index_whose_places_are_no_names(tmp_path, place):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1), shards=2)
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map={"lm_head.weight": place})
    assert_refused(folder, "names .*, which is not there", index)


# ── Safetensors headers that lie ──


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LYING_HEADERS = {
    "offsets-beyond-the-file": ({"a": entry(offsets=(0, 16))}, 12, "its tensors end at byte"),
    "bytes-behind-the-last-tensor": ({"a": entry()}, 20, "its tensors end at byte"),
    "offsets-far-beyond": ({"a": entry("U8", [2**60], (0, 2**60))}, 16, "its tensors end at byte"),
    "first-tensor-not-at-the-start": ({"a": entry(offsets=(4, 20))}, 20, "'a' does not begin where"),
    "hole": ({"a": entry(), "b": entry(offsets=(20, 36))}, 36, "'b' does not begin where"),
    "overlap": ({"a": entry(), "b": entry(offsets=(8, 24))}, 24, "'b' does not begin where"),
    "same-bytes-twice": ({"a": entry(), "b": entry()}, 16, "'b' does not begin where"),
    "too-many-bytes": ({"a": entry(offsets=(0, 20))}, 20, "'a' has 20 bytes, which"),
    "too-few-bytes": ({"a": entry(offsets=(0, 12))}, 12, "'a' has 12 bytes, which"),
    "ends-before-it-begins": ({"a": entry(offsets=(16, 0))}, 16, "entry for 'a' is not understood"),
    "negative-offsets": ({"a": entry(offsets=(-16, 0))}, 16, "entry for 'a' is not understood"),
    "negative-shape": ({"a": entry(shape=[-2, -2])}, 16, "entry for 'a' is not understood"),
    "true-in-a-shape": ({"a": entry(shape=[True, 4])}, 16, "entry for 'a' is not understood"),
    "float-in-a-shape": ({"a": entry(shape=[2.0, 2])}, 16, "entry for 'a' is not understood"),
    "text-in-a-shape": ({"a": entry(shape=["2", 2])}, 16, "entry for 'a' is not understood"),
    "shape-is-a-number": ({"a": entry(shape=4)}, 16, "entry for 'a' is not understood"),
    "shape-overflows": ({"a": entry(shape=[2**61, 2**61])}, 16, "'a' has 16 bytes, which"),
    "endless-dimension": ({"a": entry(shape=[10**4000] * 9)}, 16, "a number in it has 4,001 digits"),
    "endless-dimensions": ({"a": entry(shape=[1] * 65)}, 16, "entry for 'a' is not understood"),
    "float-offsets": ({"a": entry(offsets=(0.0, 16.0))}, 16, "entry for 'a' is not understood"),
    "true-for-an-offset": ({"a": entry("U8", [1], (0, True))}, 1, "entry for 'a' is not understood"),
    "three-offsets": ({"a": entry(offsets=(0, 8, 16))}, 16, "entry for 'a' is not understood"),
    "no-dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, 16, "entry for 'a' is not understood"),
    "dtype-is-a-list": ({"a": entry(dtype=["F32"])}, 16, "entry for 'a' is not understood"),
    "entry-is-a-list": ({"a": [1, 2]}, 16, "entry for 'a' is not understood"),
    "entry-is-null": ({"a": None}, 16, "entry for 'a' is not understood"),
    "entry-without-names": ({"a": ["F32", [2, 2], [0, 16]]}, 16, "entry for 'a' is not understood"),
    "dtype-is-an-object": ({"a": entry(dtype={"F32": None})}, 16, "entry for 'a' is not understood"),
    "more-dimensions-than-torch-has": ({"a": entry(shape=[1] * 63 + [2, 2])}, 16, "entry for 'a' is not understood"),
    "longer-than-torch-can-count": ({"a": entry(shape=[2**63, 0], offsets=(0, 0))}, 0, "entry for 'a' is not"),
    "unknown-dtype": ({"a": entry(dtype="F31")}, 16, "the dtype 'F31', which is not known here"),
    "metadata-is-a-list": ({"__metadata__": [], "a": entry()}, 16, "its metadata is not understood"),
    "metadata-is-no-text": ({"__metadata__": {"format": 1}, "a": entry()}, 16, "its metadata is not understood"),
    "name-twice": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                   b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "'a' stands there twice"),
    "dtype-twice": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1, "'dtype' stands"),
    "not-utf-8": (b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "valid JSON"),
    "not-json": (b"{not json}", 0, "valid JSON"),
    "empty": (b"", 0, "valid JSON"),
    "a-list": (b"[]", 0, "no JSON object"),
    "deep-nesting": (b'{"a":' + 100_000 * b"[", 0, "nested too deeply"),
    "long-number": (b'{"a":{"dtype":"U8","shape":[' + 9_999 * b"1" + b'],"data_offsets":[0,1]}}', 1, "valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "data_length", "match"), LYING_HEADERS.values(), ids=LYING_HEADERS)
def test_a_header_that_lies(tmp_path, parents, header, data_length, match):
    folder = write_safetensors(tmp_path / "model", header, data_length)
    parents.watch(folder)
    assert_refused(folder, match, folder / "model.safetensors")


def is_believed_by_the_library(file: Path) -> bool:
    try:
        with safe_open(file, framework="np"):
            return True
    except (SafetensorError, OSError, ValueError):
        return False


def mutated_header(chooser: random.Random) -> tuple[dict, int]:
    """(a header in which a number may be another than it should be, the bytes that its tensors have)."""
    header, place = {}, 0
    for number in range(chooser.randint(1, 4)):
        dtype, width = chooser.choice([("F32", 4), ("BF16", 2), ("U8", 1), ("F64", 8), ("F8_E4M3", 1)])
        shape = [chooser.randint(0, 3) for _ in range(chooser.randint(0, 3))]
        length = math.prod(shape) * width
        header[f"t{number}"] = entry(dtype, shape, [place, place + length])
        place += length
    tensor = chooser.choice(list(header.values()))
    numbers = chooser.choice([tensor["shape"] or tensor["data_offsets"], tensor["data_offsets"]])
    numbers[chooser.randrange(len(numbers))] += chooser.choice([-1, 0, 0, 1, 2**40])
    return header, place + chooser.choice([-1, 0, 0, 0, 1])


@pytest.mark.parametrize("seed", range(300))
def test_a_header_is_believed_where_the_formats_library_believes_it(tmp_path, seed):
    header, length = mutated_header(random.Random(seed))
    folder = write_safetensors(tmp_path / "model", header, max(0, length))
    try:
        believed = read_header(folder / "model.safetensors").keys() == header.keys()
    except SlerpMergeError:
        believed = False
    assert believed == is_believed_by_the_library(folder / "model.safetensors")


@pytest.mark.parametrize("header", [header for header in LYING_HEADERS.values() if isinstance(header[0], dict)])
def test_what_the_library_refuses_is_refused(tmp_path, header):
    """Guards the table of lies above: most of them are the library's to refuse too."""
    folder = write_safetensors(tmp_path / "model", *header[:2])
    stricter = ("entry-without-names", "dtype-is-an-object", "more-dimensions-than-torch-has")
    allowed = [LYING_HEADERS[name] for name in (*stricter, "longer-than-torch-can-count")]
    assert header in allowed or not is_believed_by_the_library(folder / "model.safetensors")


def test_a_dtype_that_is_not_known_is_no_damage(tmp_path):
    folder = write_safetensors(tmp_path / "model", {"a": entry("F4_NEXT")}, 16)
    error = assert_refused(folder, "holds 'a' in the dtype 'F4_NEXT', which is not known here", "model.safetensors")
    assert "damaged" not in error.message
    assert "Its bytes may be right" in error.hint


def test_a_header_longer_than_is_read_here_is_no_damage(tmp_path):
    folder = write_safetensors(tmp_path / "model", {"a": entry()}, 16, header_length=16_000_001)
    os.truncate(folder / "model.safetensors", 30_000_000)
    error = assert_refused(folder, "has a header of more than 16.0 MB; it was not read", "model.safetensors")
    assert "damaged" not in error.message


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is not limited everywhere")
def test_a_header_needs_no_more_address_space_than_it_has_bytes(tmp_path):
    count = 1 << 33
    folder = write_safetensors(tmp_path / "model", {"a": entry("U8", [count], [0, count])}, 0)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size + count)  # a hole, which takes no room on the disk
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30));"
        "from pathlib import Path; from slerpkit.parents.safetensors_header import read_header;"
        "print(*read_header(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("a\n", "")


@pytest.mark.parametrize("claimed", [2**64 - 1, 2**63, 100_000_001, 95, 90])
def test_a_header_that_claims_to_be_longer_than_it_is(tmp_path, claimed):
    folder = write_safetensors(tmp_path / "model", {"a": entry()}, 16, header_length=claimed)
    assert_refused(folder, "damaged or incomplete|valid JSON", folder / "model.safetensors")


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path):
    folder = write_safetensors(tmp_path / "model", {"a": entry()}, 16, header_length=100_000_001)
    os.truncate(folder / "model.safetensors", 200_000_000)
    assert_refused(folder, "its header should be 100000001 bytes", folder / "model.safetensors")


def test_an_honest_header_of_the_same_make_is_believed(tmp_path):
    """Guards the tests above: their files are refused for the lie alone."""
    header = {"b": entry(offsets=(16, 32)), "a": entry(), "none": entry("U8", [0], (32, 32))}
    folder = write_safetensors(tmp_path / "model", {"__metadata__": {"format": "pt"}, **header}, 32)
    assert set(open_checkpoint(folder).tensors) == set(header)


def test_every_dtype_that_can_be_saved_is_read(tmp_path):
    """Also those that no merge can use: they are named as quantised later, not as damage now."""
    dtypes = [torch.int8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(dtype): torch.zeros(3, dtype=dtype) for dtype in dtypes}
    folder = make_checkpoint(tmp_path / "model", tensors)
    found = read_header(weights_of(folder))
    assert {name: info.byte_count for name, info in found.items()} == {n: t.nbytes for n, t in tensors.items()}


# ── Pickles that are not what they should be ──


@pytest.mark.parametrize("storage", PICKLES)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "where"),
    [
        (os.system, "beside"),
        (os.system, "inside"),
        (os.system, "as a key"),
        (os.system, "instead"),
        (builtins.eval, "beside"),
        (builtins.exec, "inside"),
        (Path.touch, "instead"),
    ],
)
def test_a_pickle_that_wants_to_run_code_runs_none(tmp_path, parents, storage, protocol, function, where):
    marker = tmp_path / "marker"
    command = f'echo x > "{marker}"' if function is os.system else f"open({str(marker)!r}, 'w').close()"
    hostile = Calls(function, marker if function is Path.touch else command)
    content = {
        "beside": {"a": torch.zeros(2), "b": hostile},
        "inside": {"a": torch.zeros(2), "b": [({"c": hostile},)]},
        "as a key": {"a": torch.zeros(2), ("b", hostile): torch.zeros(2)},
        "instead": hostile,
    }[where]
    folder = write_pickle(tmp_path / "model", content, storage, protocol)
    parents.watch(folder)
    pickle.loads(pickle.dumps(hostile))
    assert marker.exists()  # the trap works
    marker.unlink()
    error = assert_refused(folder, "wants to run code .*; it was not loaded", folder / "pytorch_model.bin")
    assert "safetensors" in error.hint
    assert not marker.exists()


@pytest.mark.parametrize("storage", PICKLES)
@pytest.mark.parametrize(
    "content",
    [
        {"model": {"a.weight": torch.zeros(2)}, "epoch": 3},
        {"a.weight": torch.zeros(2), "epoch": 3},
        {"a.weight": torch.zeros(2), "names": ["x", "y"]},
        {"epoch": 3},
    ],
    ids=["nested", "number", "list", "no-tensor"],
)
def test_a_training_checkpoint_is_called_one(tmp_path, storage, content):
    folder = write_pickle(tmp_path / "model", content, storage)
    error = assert_refused(folder, "something other than a tensor under", folder / "pytorch_model.bin")
    assert "training checkpoint" in error.hint


@pytest.mark.parametrize("storage", PICKLES)
def test_a_whole_model_in_a_pickle_is_called_one(tmp_path, storage):
    folder = write_pickle(tmp_path / "model", torch.nn.Linear(2, 2), storage)
    error = assert_refused(folder, r"holds a whole object, as torch.save\(model\) writes it", "pytorch_model.bin")
    assert "damaged" not in error.message
    assert "save_pretrained" in error.hint


@pytest.mark.parametrize("storage", PICKLES)
@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 3, None])
def test_a_pickle_that_holds_no_state_dict(tmp_path, storage, content):
    folder = write_pickle(tmp_path / "model", content, storage)
    assert_refused(folder, "holds no state dict", folder / "pytorch_model.bin")


@pytest.mark.parametrize("storage", PICKLES)
@pytest.mark.parametrize(
    "cut",
    [lambda m: m.t(), lambda m: m[:, :2], lambda m: m[::2], lambda m: m[:1].expand(3, 4)],
    ids=["transposed", "columns", "every-other-row", "expanded"],
)
def test_a_tensor_whose_numbers_do_not_lie_in_order(tmp_path, storage, cut):
    content = {"odd.weight": cut(torch.arange(16.0).reshape(4, 4))}
    folder = write_pickle(tmp_path / "model", content, storage)
    error = assert_refused(folder, "the tensor 'odd.weight' transposed or sliced", folder / "pytorch_model.bin")
    assert "save_pretrained" in error.hint


CLAIMS = {
    "longer-than-its-storage": (0, (17,), (1,)),
    "begins-behind-its-storage": (16, (1,), (1,)),
    "ends-behind-its-storage": (4, (4, 4), (4, 1)),
    "negative-start": (-4, (4,), (1,)),
    "negative-shape": (0, (-4,), (1,)),
    "negative-stride": (3, (4,), (-1,)),
    "true-in-a-shape": (0, (True, 4), (4, 1)),
    "float-in-a-shape": (0, (4.0,), (1,)),
    "huge": (0, (2**61, 2**61), (2**61, 1)),
    "fewer-strides-than-dimensions": (0, (4, 4), (1,)),
    "no-strides": (0, (4, 4), ()),
    "more-strides-than-dimensions": (0, (4,), (4, 1)),
    "state-with-a-negative-shape": (0, (4,), (1,), {"shape": (-4,)}),
    "state-with-a-negative-start": (0, (4,), (1,), {"first_element": -40}),
    "state-with-text-for-a-shape": (0, (4,), (1,), {"shape": "ab"}),
    "state-with-a-number-for-a-storage": (0, (4,), (1,), {"storage": 3}),
}


@pytest.mark.parametrize("storage", PICKLES)
@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_pickled_tensor_that_lies(tmp_path, storage, claim):
    content = {"before": torch.zeros(64), "liar": ClaimedTensor(torch.arange(16.0), *claim)}
    folder = write_pickle(tmp_path / "model", content, storage)
    assert_refused(folder, "damaged or incomplete|transposed or sliced|run code", folder / "pytorch_model.bin")


@pytest.mark.parametrize("storage", PICKLES)
def test_an_honest_claim_of_the_same_make_is_believed(tmp_path, storage):
    """Guards the test above."""
    folder = write_pickle(tmp_path / "model", {"a": ClaimedTensor(torch.arange(16.0), 4, (2, 4), (4, 1))}, storage)
    assert_same_tensors(open_checkpoint(folder).tensors, {"a": torch.arange(4.0, 12.0).reshape(2, 4)})


def rewrite_archive(file: Path, change) -> None:
    """Puts `change(name, data)` in the place of every member of a zip; None leaves it out."""
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members:
            if (changed := change(name, data)) is not None:
                archive.writestr(name, changed)


def test_an_archive_whose_storage_is_shorter_than_its_description(tmp_path):
    """The missing bytes must not be taken from whatever lies behind."""
    folder = write_pickle(tmp_path / "model", {"a": torch.zeros(16), "b": torch.ones(64)}, "bin")
    rewrite_archive(folder / "pytorch_model.bin", lambda name, data: data[:8] if name.endswith("data/0") else data)
    assert_refused(folder, "damaged or incomplete", folder / "pytorch_model.bin")


@pytest.mark.parametrize("length", [15, 17, -1, 2**62])
def test_a_legacy_storage_of_another_length_than_described(tmp_path, length):
    folder = write_pickle(tmp_path / "model", {"a": torch.zeros(16), "b": torch.ones(64)}, "legacy-bin")
    start = open_checkpoint(folder).tensors["a"].offset
    with open(folder / "pytorch_model.bin", "r+b") as stream:
        stream.seek(start - 8)
        stream.write(struct.pack("<q", length))
    assert_refused(folder, "a storage is not as long as its description", folder / "pytorch_model.bin")


@pytest.mark.parametrize("missing", ["data.pkl", "data/0"])
def test_an_archive_that_lacks_a_member(tmp_path, missing):
    folder = write_pickle(tmp_path / "model", {"a": torch.zeros(16), "b": torch.ones(64)}, "bin")
    rewrite_archive(folder / "pytorch_model.bin", lambda name, data: None if name.endswith(missing) else data)
    assert_refused(folder, "damaged or incomplete", folder / "pytorch_model.bin")


def test_a_big_endian_archive_is_not_read_as_a_little_endian_one(tmp_path):
    folder = write_pickle(tmp_path / "model", {"a": torch.ones(4)}, "bin")
    rewrite_archive(folder / "pytorch_model.bin", lambda name, data: b"big" if name.endswith("byteorder") else data)
    assert_refused(folder, "big-endian", folder / "pytorch_model.bin")


def test_a_compressed_archive_is_not_read_as_a_stored_one(tmp_path):
    folder = write_pickle(tmp_path / "model", {"a": torch.ones(4000)}, "bin")
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    assert_refused(folder, "a part is compressed", file)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_something_else(tmp_path, name, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path, "damaged or incomplete", tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path, name):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1))
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    oid = hashlib.sha256(name.encode()).hexdigest()
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 4100000\n")
    refused = assert_refused(folder, "is a Git LFS pointer, and not the file itself", folder / name)
    assert "git lfs pull" in refused.hint


def test_a_folder_of_models_lists_them(tmp_path):
    for name in ("finch", "wren"):
        make_checkpoint(tmp_path / "models" / name, llama_tensors(1))
    refused = assert_refused(tmp_path / "models", "holds finch, wren", tmp_path / "models")
    assert str(tmp_path / "models" / "finch") in refused.hint


def test_a_model_half_downloaded_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--ada--finch" / "snapshots" / ("a" * 40)
    make_checkpoint(snapshot, llama_tensors(1), shards=2)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SlerpMergeError, match=r"ada/finch is only half downloaded: .*model-00002-of-00002") as refused:
        open_checkpoint(snapshot)
    assert refused.value.hint == f"Fetch the rest: hf download ada/finch --revision {'a' * 40}"
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    with pytest.raises(SlerpMergeError) as refused:
        open_checkpoint(snapshot)
    assert refused.value.hint == "Fetch the rest: hf download ada/finch"


# ── Damage ──


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.99, "all but one byte"])
def test_a_truncated_file(tmp_path, parents, storage, kept):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1), storage=storage)
    file = weights_of(folder)
    size = file.stat().st_size
    os.truncate(file, size - 1 if isinstance(kept, str) else int(kept * size))
    parents.watch(folder)
    assert "download" in assert_refused(folder, "damaged or incomplete", file).hint


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
def test_a_truncated_shard_is_named(tmp_path, storage):
    folder = make_checkpoint(tmp_path / "model", llama_tensors(1), storage=storage, shards=3)
    shard = next(folder.glob("*-00002-of-00003.*"))
    os.truncate(shard, shard.stat().st_size - 100)
    assert_refused(folder, "damaged or incomplete", shard)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_refused_or_harmless(tmp_path, storage, seed):
    """Whatever the bytes say: one kind of error, or tensors that lie whole inside their file."""
    tensors = {f"layers.{number}.weight": torch.full((3, 5), float(number)) for number in range(4)}
    folder = make_checkpoint(tmp_path / "model", tensors, storage=storage)
    file = weights_of(folder)
    whole = file.read_bytes()
    chooser = random.Random(seed)
    refused = 0
    for _ in range(120):
        damaged = bytearray(whole)
        for place in chooser.sample(range(len(whole)), chooser.randint(1, 3)):
            damaged[place] = chooser.choice((*b"\x00\x01-09\x7f\xff", chooser.randrange(256)))
        file.write_bytes(damaged)
        try:
            infos = open_checkpoint(folder).tensors.values()
        except SlerpMergeError as error:
            assert str(file) in error.message
            refused += 1
            continue
        for info in infos:
            assert min((*info.shape, info.offset, info.byte_count)) >= 0
            assert info.offset + info.byte_count <= len(damaged)
    assert refused > 10
