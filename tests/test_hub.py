"""Parents by name: looked up before anything large is fetched, fetched as the library does it, streamed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file

import slerpmerge
from slerpkit.child.upload import parse_repository, repository_name
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.hub import is_plain
from tests.builders import LLAMA_CONFIG, edit_json, llama_tensors, make_checkpoint
from tests.hub import Hub, serve_hub

SCRIPT = str(Path(slerpmerge.__file__))
WIDE = {**LLAMA_CONFIG, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 400}
SHARDS = 7
WHOLE = re.compile(r"\.safetensors$")


def wide_tensors(seed: int, layers: int = 6) -> dict[str, torch.Tensor]:
    """A Llama whose shards are larger than what a look at a header asks for."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": random(400, 64), "lm_head.weight": random(400, 64)}
    tensors["model.norm.weight"] = random(64)
    for layer in range(layers):
        for name, shape in (("self_attn.q_proj", (64, 64)), ("mlp.up_proj", (96, 64)), ("mlp.down_proj", (64, 96))):
            tensors[f"model.layers.{layer}.{name}.weight"] = random(*shape)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = random(64)
    return tensors


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Cuts a model as published ones are cut: the embedding first, the layers in turn, the head in the last file."""
    (folder / "model.safetensors").unlink()
    order = sorted(tensors, key=lambda name: ("lm_head" in name, "norm.w" in name and "layers" not in name, name))
    order.sort(key=lambda name: "embed" not in name)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        group = order[number * len(order) // shards : (number + 1) * len(order) // shards]
        save_file({name: tensors[name] for name in group}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@dataclass
class Bench:
    """A hub with two models that fit each other, and a folder to merge in."""

    hub: Hub
    folder: Path
    commits: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.folder / "home" / "hub"

    @property
    def here(self) -> Path:
        return self.folder / "here"

    def publish(self, name: str, tensors: dict[str, torch.Tensor], shards: int = 1, **how: bool) -> Path:
        made = make_checkpoint(
            self.folder / "published" / name, tensors, {**WIDE, "tie_word_embeddings": "lm_head.weight" not in tensors}
        )
        if shards > 1:
            save_sharded(made, tensors, shards)
        self.commits[name] = self.hub.add(name, made, **how)
        return made

    def start(self, *words: str, token: str | None = None, **environment: str) -> subprocess.Popen[str]:
        self.here.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            cwd=self.here,
            env={**self.hub.environment(self.folder / "home", token), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, token: str | None = None, **environment: str) -> tuple[int, str, str]:
        """(status, stdout, stderr) of the tool, its lines unwrapped."""
        process = self.start(*words, token=token, COLUMNS="400", **environment)
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err
        return process.returncode, out, err

    def merge(self, primary: str = "ada/finch", secondary: str = "ada/wren", *more: str, **how: str) -> tuple:
        return self.run("--primary", primary, "--secondary", secondary, "--save-dir", "child", *more, **how)

    def weights_here(self) -> list[Path]:
        return [path for path in self.cache.rglob("*.safetensors") if path.is_file()]

    def reference(self) -> bytes:
        """The child's weights as folders of the same models make them."""
        made = self.here / "reference" / "model.safetensors"
        if made.exists():
            return made.read_bytes()
        published = self.folder / "published" / "ada"
        status, _, err = self.run(
            "--primary", str(published / "finch"), "--secondary", str(published / "wren"), "--save-dir", "reference",
            "--yes",
        )  # fmt: skip
        assert status == 0, err
        return made.read_bytes()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with serve_hub() as hub:
        bench = Bench(hub, tmp_path)
        for seed, name in enumerate(("ada/finch", "ada/wren")):
            bench.publish(name, wide_tensors(seed), shards=SHARDS)
        yield bench


# ── The look, before anything is fetched ──


def test_a_pair_that_does_not_fit_is_refused_before_a_tokenizer_or_a_weight_is_fetched(bench: Bench) -> None:
    folder = bench.publish("ada/stork", llama_tensors(1))
    edit_json(folder / "config.json", **LLAMA_CONFIG)
    (folder / "tokenizer.json").write_text("x" * 1_000_000)
    status, _, err = bench.merge("ada/finch", "ada/stork", "--yes", "--download")
    assert status == 1
    assert "num_hidden_layers: primary 6, secondary 2" in err
    assert bench.weights_here() == []
    assert bench.hub.bytes_sent("tokenizer") == 0
    assert not (bench.here / "child").exists()


def test_a_look_at_large_files_fetches_their_headers_alone(bench: Bench) -> None:
    big = {"model.embed_tokens.weight": torch.zeros(400, 64)}
    big |= {f"model.layers.{layer}.mlp.up_proj.weight": torch.zeros(2000, 500) for layer in range(2)}
    bench.publish("ada/ostrich", big, shards=2)
    bench.publish("ada/emu", big, shards=2)
    status, out, err = bench.merge("ada/ostrich", "ada/emu", "--dry-run")
    assert status == 0, err
    assert "fetch 16.2 MB of weights from the Hugging Face Hub" in " ".join(out.split())
    assert bench.hub.bytes_sent() < 500_000
    assert bench.weights_here() == []


def test_what_is_not_here_is_fetched_with_consent_alone(bench: Bench) -> None:
    status, out, err = bench.merge("ada/finch", "ada/wren", "--yes")
    assert status == 1
    assert "ada/finch at" in out
    assert "are still on the Hub" in err
    assert "Add --download" in err
    assert bench.weights_here() == []


# ── The download ──


def test_two_names_make_the_child_that_their_folders_make(bench: Bench) -> None:
    status, _, err = bench.merge("ada/finch", f"{bench.hub.url}/ada/wren/tree/main", "--yes", "--download")
    assert status == 0, err
    assert (bench.here / "child" / "model.safetensors").read_bytes() == bench.reference()
    places = {name: f"{name}@{commit}" for name, commit in bench.commits.items()}
    recipe = yaml.safe_load((bench.here / "child" / "merge_recipe.yaml").read_text())
    assert [model["model"] for model in recipe["models"]] == [places["ada/finch"], places["ada/wren"]]
    report = json.loads((bench.here / "child" / "merge_report.json").read_text())
    assert (report["recipe"]["primary"], report["recipe"]["secondary"]) == (places["ada/finch"], places["ada/wren"])
    for name in ("README.md", "merge_recipe.yaml", "merge_report.json"):
        assert str(bench.folder) not in (bench.here / "child" / name).read_text()
    requests = len(bench.hub.requests)
    status, _, err = bench.run("--recipe", "child/merge_recipe.yaml", "--save-dir", "again", "--yes")
    assert status == 0, err
    assert (bench.here / "again" / "model.safetensors").read_bytes() == bench.reference()
    assert len(bench.hub.requests) == requests, "all of it is here"


def test_weights_are_fetched_once_and_nothing_that_a_merge_does_not_need(bench: Bench) -> None:
    folder = bench.folder / "published" / "ada" / "finch"
    unneeded = ("pytorch_model.bin", "model.gguf", "original/consolidated.00.pth", "consolidated.safetensors",
                "optimizer.pt", "onnx/model.onnx", "notes.md", "tf_model.h5")  # fmt: skip
    for name in unneeded:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(50_000))
    (folder / "generation_config.json").write_text('{"max_length": 9}')
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", "--download")
    assert status == 0, err
    for name in unneeded:
        assert bench.hub.bytes_sent(re.escape(name)) == 0
    for name in ("finch", "wren"):
        for file in (bench.folder / "published" / "ada" / name).glob("model-*.safetensors"):
            looks = 100_001  # what the library asks for to read a header
            sent = [request.sent for request in bench.hub.requests
                    if request.path.endswith(f"{name}/resolve/{bench.commits['ada/' + name]}/{file.name}")
                    and request.method == "GET"]  # fmt: skip
            size = file.stat().st_size
            assert sorted(sent) == sorted([min(size, looks), size])
    assert (bench.here / "child" / "generation_config.json").exists()


def test_a_download_that_is_cut_off_goes_on_with_the_same_command(bench: Bench) -> None:
    bench.hub.bytes_per_second = 40_000
    process = bench.start("--primary", "ada/finch", "--secondary", "ada/wren", "--save-dir", "child", "--yes",
                          "--download")  # fmt: skip
    limit = time.monotonic() + 60
    while len(bench.weights_here()) < 3 and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "What was fetched of the parents is kept; the same command carries on" in err
    kept = {path.name for path in bench.weights_here()}
    assert 3 <= len(kept) < 2 * SHARDS
    assert list(bench.cache.rglob("*.incomplete")) == []
    bench.hub.bytes_per_second = None
    bench.hub.requests.clear()
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", "--download")
    assert status == 0, err
    fetched = [r for r in bench.hub.requests if r.method == "GET" and WHOLE.search(r.path) and "finch" in r.path]
    again = [r for r in fetched if Path(r.path).name in kept]
    assert all(sum(r.path == request.path for r in fetched) == 1 for request in again), "their headers alone"
    assert (bench.here / "child" / "model.safetensors").read_bytes() == bench.reference()


def test_a_connection_that_breaks_is_taken_up_again_by_the_library(bench: Bench) -> None:
    large = {
        "model.embed_tokens.weight": torch.ones(400, 64),
        "model.layers.0.mlp.up_proj.weight": torch.ones(999, 500),
    }
    bench.publish("ada/heron", large)
    bench.publish("ada/crane", large)
    bench.hub.breaks_after = 900_000
    status, _, err = bench.merge("ada/heron", "ada/crane", "--yes", "--download")
    assert bench.hub.breaks_after is None
    assert status == 0, err


@pytest.mark.skipif(sys.platform == "win32", reason="no size limit for a folder there")
def test_a_disk_that_is_too_small_is_known_before_and_streaming_offered(bench: Bench, monkeypatch) -> None:
    code = (
        "import shutil, sys, collections; usage = collections.namedtuple('usage', 'total used free');"
        "shutil.disk_usage = lambda path: usage(10**9, 0, 700_000); import slerpmerge;"
        "sys.exit(slerpmerge.main(sys.argv[1:]))"
    )
    words = ["--primary", "ada/finch", "--secondary", "ada/wren", "--save-dir", "child", "--yes", "--download"]
    environment = {**bench.hub.environment(bench.folder / "home"), "PYTHONPATH": str(Path(SCRIPT).parent)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, cwd=bench.folder, text=True,
                          capture_output=True, timeout=60, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 1
    assert "do not fit into the 700 KB free" in " ".join(done.stderr.split())
    assert "Add --stream-parents" in " ".join(done.stderr.split())
    done = subprocess.run([sys.executable, "-c", code, *words, "--stream-parents"], env=environment, text=True,
                          cwd=bench.folder, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_modules_of_an_embedding_model_come_whole_streamed_or_not(bench: Bench) -> None:
    for seed, name in enumerate(("finch", "wren")):
        folder = bench.folder / "published" / "ada" / name
        dense = folder / "2_Dense"
        dense.mkdir()
        save_file({"linear.weight": torch.full((64, 64), float(seed))}, dense / "model.safetensors")
        (dense / "config.json").write_text('{"in_features": 64, "out_features": 64}')
        (dense / "notes.txt").write_text("kept")
        kinds = {"": "Transformer", "2_Dense": "Dense"}
        modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
        (folder / "modules.json").write_text(json.dumps(modules))
    for how in ("--stream-parents", "--download"):
        status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", how, "--overwrite")
        assert status == 0, err
        (weight,) = load_file(bench.here / "child" / "2_Dense" / "model.safetensors").values()
        assert torch.equal(weight, torch.full((64, 64), 0.5))
        assert (bench.here / "child" / "2_Dense" / "notes.txt").read_text() == "kept"


def test_the_licences_of_parents_by_name_are_held_against_each_other(bench: Bench) -> None:
    for name, licence in (("finch", "mit"), ("wren", "apache-2.0")):
        (bench.folder / "published" / "ada" / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    status, out, err = bench.merge("ada/finch", "ada/wren", "--dry-run")
    assert (status, "apache-2.0" in out) == (0, True), err


# ── What keeps from it ──


REFUSALS = [
    ("ada/fnich", "the Hub knows no such model", "Did you mean ada/finch?"),
    ("ada/finch@v9", "ada/finch has no revision v9", "/ada/finch"),
    ("ada/gated", "ada/gated is gated", "hf auth login"),
    ("ada/private", "or it is private", "HF_TOKEN"),
    ("ada/gguf", "holds a GGUF model", "made from"),
    ("ada/pickled", "in torch's own format alone", "hf download ada/pickled"),
    ("ada/empty", "holds no model that can be merged, only notes.txt", "config.json"),
]


@pytest.mark.parametrize(("name", "cause", "remedy"), REFUSALS)
def test_what_cannot_be_had_is_refused_with_its_remedy(bench: Bench, name: str, cause: str, remedy: str) -> None:
    bench.publish("ada/gated", wide_tensors(2), gated=True)
    bench.publish("ada/private", wide_tensors(2), private=True)
    for other, file in (("gguf", "model.gguf"), ("pickled", "pytorch_model.bin"), ("empty", "notes.txt")):
        folder = bench.folder / "published" / other
        folder.mkdir()
        (folder / file).write_text("{}")
        bench.hub.add(f"ada/{other}", folder)
    (bench.folder / "published" / "pickled" / "config.json").write_text("{}")
    status, out, err = bench.merge("ada/wren", name, "--yes")
    assert status == 1
    assert cause in err
    assert remedy in err
    assert "hf_secret" not in out + err


def test_a_token_opens_what_is_gated_and_private_and_is_shown_nowhere(bench: Bench) -> None:
    bench.publish("ada/gated", wide_tensors(2), gated=True)
    bench.publish("ada/private", wide_tensors(3), private=True)
    status, out, err = bench.merge("ada/gated", "ada/private", "--yes", "--download", token=bench.hub.token)
    assert status == 0, err
    written = [path.read_bytes() for path in (bench.here / "child").rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in data for data in (*written, out.encode(), err.encode()))


def test_without_a_network_and_when_told_to_stay_offline(bench: Bench) -> None:
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", HF_ENDPOINT="http://127.0.0.1:9")
    assert (status, "the Hub cannot be reached" in err) == (1, True)
    assert "Check the network" in err
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", HF_HUB_OFFLINE="1")
    assert (status, "HF_HUB_OFFLINE keeps from asking the Hub" in err) == (1, True)
    assert bench.hub.requests == []


def test_a_path_mistyped_is_answered_with_what_stands_beside_it(bench: Bench) -> None:
    (bench.here / "models" / "sailor").mkdir(parents=True)
    status, _, err = bench.merge("ada/finch", "models/sialor", "--yes")
    assert (status, "Did you mean models/sailor?" in err) == (1, True)


def test_a_hub_that_is_out_of_order_is_named(bench: Bench) -> None:
    bench.hub.status = 503
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes")
    assert (status, "The Hub is out of order (status 503)" in err) == (1, True)


def test_paths_of_a_repository_that_lead_out_of_its_folder_are_not_fetched() -> None:
    assert is_plain("additional_chat_templates/tool.jinja")
    assert not any(map(is_plain, ("../config.json", "/etc/passwd", "a/../../b", "", "a\\b", "./a")))


def test_a_model_that_is_half_here_says_what_is_missing_where_the_hub_cannot_be_asked(bench: Bench) -> None:
    assert bench.merge("ada/finch", "ada/wren", "--yes", "--download")[0] == 0
    weights = sorted(path for path in bench.weights_here() if "--wren" in str(path) and path.is_symlink())
    if not weights:
        pytest.skip("the cache has no links there")
    weights[2].unlink()
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", "--overwrite", HF_HUB_OFFLINE="1")
    assert status == 1
    assert f"ada/wren is only half downloaded: model.safetensors.index.json names {weights[2].name}" in err
    assert "hf download ada/wren" in err
    weights[1].resolve().unlink()
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", "--overwrite", HF_HUB_OFFLINE="1")
    assert f"what {weights[1].name} lead to in the cache is not there any more" in err
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", "--overwrite", "--download")
    assert status == 0, err


# ── Small disks ──


class DiskWatch:
    """How many of a model's weight files stand in the cache at once, and all of their bytes."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.most: dict[str, int] = {}
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            try:
                files, sizes = self.bench.weights_here(), []
            except OSError:  # a folder of the cache went meanwhile
                continue
            for name in ("finch", "wren"):
                own = [path for path in files if f"--{name}" in str(path)]
                self.most[name] = max(self.most.get(name, 0), len(own))
                for path in own:
                    try:
                        sizes.append(path.stat().st_size)
                    except OSError:
                        continue
            self.peak = max(self.peak, sum(sizes))

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_streamed_parents_make_the_same_child_with_a_few_files_on_the_disk(bench: Bench) -> None:
    with DiskWatch(bench) as watch:
        status, out, err = bench.merge("ada/finch", "ada/wren", "--yes", "--stream-parents")
    assert status == 0, err
    assert (bench.here / "child" / "model.safetensors").read_bytes() == bench.reference()
    assert set(watch.most.values()) <= {1, 2, 3}
    assert bench.weights_here() == []
    assert "of it on the disk at once" in out
    whole = re.search(r"(\d+) tensors recomputed whole and (\d+) in part", out)
    assert whole is not None
    assert int(whole[2]) == len(load_file(bench.here / "child" / "model.safetensors"))
    for name in ("finch", "wren"):
        for file in (bench.folder / "published" / "ada" / name).glob("model-*.safetensors"):
            pattern = rf"{name}/resolve/.*/{file.name}"
            gets = [r for r in bench.hub.requests if r.method == "GET" and re.search(pattern, r.path)]
            assert len(gets) == 2, "its header, and the file once"


def test_a_streamed_merge_that_is_interrupted_goes_on(bench: Bench) -> None:
    words = ("--yes", "--stream-parents", "--max-shard-size", "40KB")
    bench.hub.bytes_per_second = 400_000
    process = bench.start("--primary", "ada/finch", "--secondary", "ada/wren", "--save-dir", "child", *words)
    limit = time.monotonic() + 90
    while not list(bench.here.glob(".*/child-*/model-00004*")) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command carries on" in err
    bench.hub.bytes_per_second = None
    status, out, err = bench.merge("ada/finch", "ada/wren", *words)
    assert status == 0, err
    assert "of an earlier run" in out
    child = {}
    for path in (bench.here / "child").glob("*.safetensors"):
        child.update(load_file(path))
    bench.reference()
    expected = load_file(bench.here / "reference" / "model.safetensors")
    assert child.keys() == expected.keys()
    assert all(torch.equal(child[name], expected[name]) for name in child)
    assert bench.weights_here() == []


@pytest.mark.skipif(os.name == "nt", reason="the cache has no links there")
def test_a_dropped_file_that_another_snapshot_shares_stays_there(bench: Bench) -> None:
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", "--download")
    assert status == 0, err
    folder = bench.folder / "published" / "ada" / "finch"
    (folder / "README.md").write_text("new")
    newer = bench.hub.add("ada/finch", folder, revision="v2")
    blobs_before = {path.name for path in (bench.cache / "models--ada--finch" / "blobs").iterdir()}
    status, _, err = bench.run("--primary", "ada/finch@v2", "--secondary", "ada/wren", "--save-dir", "other", "--yes",
                               "--stream-parents")  # fmt: skip
    assert status == 0, err
    assert blobs_before <= {path.name for path in (bench.cache / "models--ada--finch" / "blobs").iterdir()}
    snapshots = bench.cache / "models--ada--finch" / "snapshots"
    assert not list((snapshots / newer).glob("*.safetensors"))
    assert len([p for p in (snapshots / bench.commits["ada/finch"]).glob("*.safetensors") if p.is_file()]) == SHARDS


def test_what_is_streamed_cannot_be_held_against_its_child(bench: Bench) -> None:
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", "--stream-parents", "--taste", "Hello")
    assert status == 2
    assert "Leave out --stream-parents" in err


# ── The way back: a child on the Hub ──


def call(bench: Bench, code: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a line of Python that takes the bench's hub for the Hub."""
    environment = {**bench.hub.environment(bench.folder / "home", token), "PYTHONPATH": str(Path(SCRIPT).parent)}
    words = [sys.executable, "-c", f"from pathlib import Path; from slerpkit.child.upload import *; {code}"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)


def test_a_child_is_uploaded_whole_and_private(bench: Bench) -> None:
    status, _, err = bench.merge("ada/finch", "ada/wren", "--yes", "--download")
    assert status == 0, err
    child = bench.here / "child"
    done = call(bench, f"print(upload(Path({str(child)!r}), 'ada/child', True))", bench.hub.token)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{bench.hub.url}/ada/child"
    assert bench.hub.made_private == {"ada/child": True}
    uploaded = bench.hub.uploads["ada/child"]
    own = {path.relative_to(child).as_posix(): path.read_bytes() for path in child.rglob("*") if path.is_file()}
    own = {name: data for name, data in own.items() if not name.startswith(".cache/")}
    assert {name: data for name, data in uploaded.items() if name != ".gitattributes"} == own


def test_a_child_that_is_to_be_private_goes_into_no_public_repository(bench: Bench) -> None:
    bench.hub.made_private["ada/child"] = False
    code = f"upload(Path({str(bench.folder / 'published' / 'ada' / 'finch')!r}), 'ada/child', True)"
    (bench.folder / "published" / "ada" / "finch" / "README.md").write_text("---\ntags:\n- merge\n---\n")
    done = call(bench, code, bench.hub.token)
    assert "ada/child stands on the Hub already, where everybody can see it" in done.stderr
    assert bench.hub.uploads == {}


def test_without_a_login_an_upload_says_how_to_get_one(bench: Bench) -> None:
    done = call(bench, "logged_in_user()")
    assert "Nobody is logged in to the Hub here" in done.stderr
    done = call(bench, "print(logged_in_user())", bench.hub.token)
    assert done.stdout == "ada\n"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("primary-secondary-slerp-0.5", "primary-secondary-slerp-0.5"),
        ("Ünï child", "Uni-child"),
        ("a--b..c (2)", "a-b-c-2"),
        ("-x.", "x"),
        (".hidden.git", "hidden"),
        ("模型", "child"),
        ("y" * 200, "y" * 96),
    ],
)
def test_a_proposed_name_is_one_that_the_hub_takes(folder: str, name: str) -> None:
    assert repository_name(folder) == name
    validate_repo_id(name)
    assert parse_repository(repository_name(folder), "ada") == f"ada/{name}"


@pytest.mark.parametrize("text", ["a b", "ada/", "a/b/c", "ada/x--y", "ada/x..y", "ada/x.git", "", "ada/-x", "ada/x."])
def test_a_name_that_the_hub_does_not_take_is_refused(text: str) -> None:
    with pytest.raises(SlerpMergeError, match="no name that the Hub takes"):
        parse_repository(text, "ada")


# ── Adapters ──


def publish_adapter(bench: Bench, name: str, base: str, seed: int) -> None:
    """An adapter of the first layer's query, by names alone, as it is published."""
    generator = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    shapes = {"A": (2, 64), "B": (64, 2)}
    tensors = {f"{prefix}{side}.weight": torch.randn(*shape, generator=generator) for side, shape in shapes.items()}
    folder = bench.folder / "published" / name
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    bench.commits[name] = bench.hub.add(name, folder)


@pytest.mark.parametrize("how", ["--download", "--stream-parents"])
def test_an_adapter_and_its_base_come_from_the_hub(bench: Bench, how: str) -> None:
    """Looked up first, then fetched once, though both parents are of the one base."""
    publish_adapter(bench, "bob/alto", "ada/finch", 1)
    publish_adapter(bench, "bob/bass", "ada/finch", 2)
    status, _, err = bench.merge("bob/alto", "bob/bass", "--yes", how)
    assert status == 0, err
    child, stored = load_file(bench.here / "child" / "model.safetensors"), wide_tensors(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(child[name], stored[name])
    assert all(torch.equal(child[other], stored[other]) for other in stored if other != name)
    recipe = (bench.here / "child" / "merge_recipe.yaml").read_text()
    assert f"ada/finch@{bench.commits['ada/finch']}+bob/alto@{bench.commits['bob/alto']}" in recipe


def test_an_adapters_base_that_the_hub_does_not_know_is_told_with_the_way_to_name_it(bench: Bench) -> None:
    publish_adapter(bench, "bob/alto", "ada/gone", 1)
    status, _, err = bench.merge("bob/alto", "ada/finch", "--yes", "--download")
    assert status == 1
    assert "ada/gone" in err
    assert "BASE+" in err
    status, _, err = bench.merge("ada/finch+bob/alto", "ada/wren", "--yes", "--download")
    assert status == 0, err
