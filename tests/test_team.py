"""Workers as processes: the same bits, no torch in the main process, and what happens when one of them, or all, die."""

from __future__ import annotations

import _thread
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slerpkit.merge.blocks import BLOCK_ELEMENTS, cut_tasks
from slerpkit.merge.events import MergeStopped, WorkAdvanced
from slerpkit.merge.plan import choose_workers
from slerpkit.merge.team import WorkerTeam
from slerpkit.merge.worker import MeasureTask
from slerpkit.messages import SlerpMergeError
from slerpkit.story import execute_merge
from tests.builders import add_tokenizer, llama_tensors, load_tensors, make_checkpoint, merge, plan_of
from tests.conftest import fingerprint
from tests.test_crash import after

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are threads where a process cannot be forked")
ROOT = Path(__file__).resolve().parents[1]
TASK_BLOCKS = 8
ELEMENTS = 5 * TASK_BLOCKS * BLOCK_ELEMENTS + 12_345  # of the large tensor: five tasks and a short one
SHARD_BYTES = 15_000_000


@pytest.fixture(autouse=True)
def in_processes(monkeypatch):
    """However small the models are, with tasks that these can be cut into."""
    monkeypatch.setattr("slerpkit.merge.blocks.TASK_BLOCKS", TASK_BLOCKS)
    monkeypatch.setattr("slerpkit.merge.plan.SMALL_MERGE_BYTES", 0)


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two models with three tensors that are several tasks large, among many small ones."""
    folders = []
    for seed, name in ((1, "primary"), (2, "secondary")):
        generator = torch.Generator().manual_seed(seed)
        large = {
            f"model.layers.{layer}.large": torch.randn(ELEMENTS, generator=generator).to(torch.bfloat16)
            for layer in range(3)
        }
        folders.append(make_checkpoint(tmp_path / name, {**llama_tensors(seed), **large}))
    return folders[0], folders[1]


def weights_of(child: Path) -> dict[str, str]:
    return {name: hashed for name, hashed in fingerprint(child).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_bits_are_those_of_threads(pair, tmp_path, monkeypatch, threads, parents):
    parents.watch(*pair)
    child = merge(*pair, tmp_path / "child", 0.3, threads=threads, device="cpu").child
    monkeypatch.setattr("slerpkit.merge.plan.SMALL_MERGE_BYTES", 1 << 60)
    alike = merge(*pair, tmp_path / "alike", 0.3, threads=2, device="cpu").child
    assert weights_of(child) == weights_of(alike)


@pytest.mark.parametrize("settings", [{"method": "nuslerp", "vectors": "first_dim"}, {"dtype": "float32"}], ids=str)
def test_rows_that_follow_tokens_reach_the_processes(tmp_path, monkeypatch, settings):
    folders = [
        make_checkpoint(tmp_path / name, llama_tensors(seed)) for seed, name in ((1, "primary"), (2, "secondary"))
    ]
    for folder in folders:
        add_tokenizer(folder)
    path = folders[1] / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    numbers = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: (number * 7) % 48 for word, number in numbers.items()}
    path.write_text(json.dumps(tokenizer), "utf-8")
    child = merge(*folders, tmp_path / "child", 0.3, device="cpu", **settings).child
    monkeypatch.setattr("slerpkit.merge.plan.SMALL_MERGE_BYTES", 1 << 60)
    alike = merge(*folders, tmp_path / "alike", 0.3, device="cpu", **settings).child
    assert weights_of(child) == weights_of(alike)


def test_a_large_tensor_is_spread_over_all_workers(pair, tmp_path):
    plan = plan_of(*pair, tmp_path / "child", device="cpu")
    tensor = next(tensor for tensor in plan.tensors if tensor.element_count == ELEMENTS)
    with WorkerTeam(3, in_processes=True) as team:
        team.wait()
        assert len(set(team.processes)) == 3
        stretches = cut_tasks(tensor)
        for stretch in stretches:
            team.submit(stretch, MeasureTask(tensor, stretch, None))
        team._deal()
        assert [len(member.tasks) for member in team._members] == [2, 2, 2]
        assert {team.next_answer()[0] for _ in stretches} == set(stretches)


@pytest.mark.parametrize(
    ("started_for", "needed_for", "serves"),
    [
        ((1000, ["bfloat16"]), (1000, ["bfloat16"]), True),
        ((1000, ["float16"]), (1000, ["bfloat16"]), True),
        ((1000, ["bfloat16"]), (1000, ["bfloat16", "float16"]), False),
        ((10, ["bfloat16"]), (10, ["float16"]), True),
        ((10, ["bfloat16"]), (1000, ["bfloat16"]), False),
        ((1000, ["bfloat16"]), (10, ["bfloat16"]), False),
    ],
)
def test_workers_that_were_started_early_serve_a_merge_of_their_kind(monkeypatch, started_for, needed_for, serves):
    monkeypatch.setattr("slerpkit.merge.plan.SMALL_MERGE_BYTES", 100)
    with WorkerTeam(1, "cpu", *choose_workers("cpu", *started_for)) as team:
        assert team.serves(1, "cpu", *needed_for) == serves
        assert not team.serves(2, "cpu", *needed_for)
        assert not team.serves(1, "cuda", *needed_for)


def test_a_fault_in_a_process_is_told_with_its_remedy_and_nobody_writes_after_it(pair, tmp_path):
    plan = plan_of(*pair, tmp_path / "child", device="cpu")
    with open(pair[1] / "model.safetensors", "r+b") as stream:
        stream.truncate(30_000_000)  # after its header was believed
    with pytest.raises(SlerpMergeError, match="became shorter while it was read: it ends inside") as caught:
        execute_merge(plan)
    assert "Let nothing write to it" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["primary", "secondary"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_killed_is_one_message_and_the_next_run_carries_on(pair, tmp_path, victim):
    whole = merge(*pair, tmp_path / "whole", 0.3, device="cpu", max_shard_bytes=SHARD_BYTES).child
    plan = plan_of(*pair, tmp_path / "child", 0.3, device="cpu", max_shard_bytes=SHARD_BYTES)
    events, written, killed = [], 0, False
    with WorkerTeam(2, in_processes=True) as team:

        def observe(event: object) -> None:
            nonlocal written, killed
            events.append(event)
            written += event.amount if isinstance(event, WorkAdvanced) else 0
            if written > 2 * ELEMENTS and not killed:
                killed = True
                os.kill(team.processes[victim], signal.SIGKILL)

        with pytest.raises(
            SlerpMergeError, match="A worker process ended before its time: it was killed by SIGKILL"
        ) as caught:
            execute_merge(plan, observe, team)
    assert "The same command carries on" in caught.value.hint
    assert isinstance(events[-1], MergeStopped)
    report = merge(*pair, tmp_path / "child", 0.3, device="cpu", max_shard_bytes=SHARD_BYTES)
    assert report.merged.resumed_files == events[-1].kept > 0
    assert weights_of(report.child) == weights_of(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "primary", "secondary", "whole"]


def test_a_worker_that_is_killed_while_the_child_is_checked_costs_no_finished_file(pair, tmp_path):
    plan = plan_of(*pair, tmp_path / "child", 0.3, device="cpu", max_shard_bytes=SHARD_BYTES)
    refused = pytest.raises(SlerpMergeError, match="A worker process ended before its time")
    with WorkerTeam(1, in_processes=True) as team:
        killed = after("slerpkit.story.copy_companions", 1, lambda: os.kill(team.processes[0], signal.SIGKILL))
        with killed, refused as caught:
            execute_merge(plan, team=team)
    assert "The same command carries on" in caught.value.hint
    report = merge(*pair, tmp_path / "child", 0.3, device="cpu", max_shard_bytes=SHARD_BYTES)
    assert report.merged.resumed_files == len(plan.shards)


def broken(folder: Path, library: str) -> str:
    """A folder for PYTHONPATH, in which a library cannot be loaded."""
    (folder / "broken" / library).mkdir(parents=True)
    (folder / "broken" / library / "__init__.py").write_text("raise ImportError('no such library')")
    return str(folder / "broken")


def test_a_library_that_cannot_be_loaded_is_one_message(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", broken(tmp_path, "numpy"))
    with pytest.raises(SlerpMergeError, match="a package cannot be loaded: no such library.") as caught:
        merge(*pair, tmp_path / "child", device="cpu")
    assert caught.value.hint == "Run: pip install -r requirements.txt"


def test_workers_load_torch_for_float16_alone(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", broken(tmp_path, "torch"))
    merge(*pair, tmp_path / "child", device="cpu")
    with pytest.raises(SlerpMergeError, match="a package cannot be loaded: no such library."):
        merge(*pair, tmp_path / "another", device="cpu", dtype="float16")


def starts(count: int) -> Callable[..., int]:
    """A stand-in for the system's start of a thread, which lets so many begin."""
    begin = _thread.start_new_thread
    places = iter(range(count))

    def start(*arguments: object) -> int:
        if next(places, None) is None:
            raise RuntimeError("can't start new thread")
        return begin(*arguments)

    return start


def system_without_forks(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lets a new interpreter fork so many times."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(
        "import errno, os\n"
        f"fork, places = os.fork, iter(range({count}))\n"
        "def limited():\n"
        "    if next(places, None) is None:\n"
        "        raise BlockingIOError(errno.EAGAIN, 'Resource temporarily unavailable')\n"
        "    return fork()\n"
        "os.fork = limited\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))


class TestLimits:
    """Where the system lets fewer workers be started than were asked for, fewer make the child."""

    def merged(self, pair: tuple[Path, Path], folder: Path) -> list[str]:
        """What is noted of a merge by three workers, whose bits must be right."""
        notes: list[str] = []
        child = merge(*pair, folder / "child", 0.3, observe=lambda event: notes.append(getattr(event, "text", "")),
                      device="cpu", threads=3).child  # fmt: skip
        assert weights_of(child) == weights_of(merge(*pair, folder / "whole", 0.3, device="cpu", threads=1).child)
        return [note for note in notes if "The system lets" in note]

    @pytest.mark.parametrize("count", [1, 2])
    def test_threads(self, pair, tmp_path, monkeypatch, count):
        monkeypatch.setattr("slerpkit.merge.plan.SMALL_MERGE_BYTES", 1 << 60)
        with monkeypatch.context() as limited:
            limited.setattr("_thread.start_new_thread", starts(count))
            merge(*pair, tmp_path / "child", 0.3, device="cpu", threads=3)
        whole = merge(*pair, tmp_path / "whole", 0.3, device="cpu", threads=3).child
        assert weights_of(tmp_path / "child") == weights_of(whole)

    def test_no_thread_at_all(self, pair, tmp_path, monkeypatch):
        monkeypatch.setattr("slerpkit.merge.plan.SMALL_MERGE_BYTES", 1 << 60)
        monkeypatch.setattr("_thread.start_new_thread", starts(0))
        with pytest.raises(SlerpMergeError, match="The system does not let a thread be started") as caught:
            merge(*pair, tmp_path / "child", device="cpu")
        assert "ulimit -u" in caught.value.hint
        assert sorted(path.name for path in tmp_path.iterdir()) == ["primary", "secondary"]

    def test_a_thread_that_never_begins_keeps_nobody_waiting(self, pair, tmp_path, monkeypatch):
        """As where there is no memory for it to begin with."""
        monkeypatch.setattr("slerpkit.merge.plan.SMALL_MERGE_BYTES", 1 << 60)
        monkeypatch.setattr("slerpkit.threads.SECONDS_TO_BEGIN", 0.1)
        monkeypatch.setattr("_thread.start_new_thread", lambda *_: 0)
        with pytest.raises(SlerpMergeError, match="The system does not let a thread be started"):
            merge(*pair, tmp_path / "child", device="cpu")

    @pytest.mark.parametrize("count", [1, 2])
    def test_processes(self, pair, tmp_path, monkeypatch, count):
        system_without_forks(tmp_path, monkeypatch, count)
        assert self.merged(pair, tmp_path) == [f"The system lets only {count} of 3 workers be started."]

    def test_no_process_at_all(self, pair, tmp_path, monkeypatch):
        system_without_forks(tmp_path, monkeypatch, 0)
        with pytest.raises(SlerpMergeError, match="could not be started .Resource temporarily unavailable.") as caught:
            merge(*pair, tmp_path / "child", device="cpu")
        assert "ulimit -u" in caught.value.hint

    @pytest.mark.parametrize("in_processes", [True, False], ids=["processes", "threads"])
    @pytest.mark.parametrize(("limit", "is_enough"), [(8, False), (40, True)])
    def test_open_files(self, pair, tmp_path, in_processes, limit, is_enough):
        code = (
            "import resource, sys; import slerpkit.merge.plan as plan;"
            f"plan.SMALL_MERGE_BYTES = {0 if in_processes else 1 << 60};"
            f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}));"
            "import slerpmerge; sys.exit(slerpmerge.main(sys.argv[1:]))"
        )
        flags = ["--primary", pair[0], "--secondary", pair[1], "--save-dir", tmp_path / "child", "--yes"]
        command = [sys.executable, "-c", code, *flags, "--threads", "8", "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) == is_enough, done.stderr
        assert is_enough or "ulimit -n" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("in_processes", [True, False], ids=["processes", "threads"])
def test_workers_that_have_no_memory_to_begin_with_are_no_wait_without_end(monkeypatch, capfd, in_processes):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("slerpkit.merge.worker.Worker.__init__", fail)
    if in_processes:
        monkeypatch.setattr("slerpkit.merge.team.SERVER", "raise MemoryError")
    refused = pytest.raises(SlerpMergeError, match="A worker process ended before its time")
    with WorkerTeam(2, in_processes=in_processes) as team, refused as caught:
        team.wait()
    assert "--threads 1" in caught.value.hint
    assert capfd.readouterr().err == ""


def test_a_library_that_threads_cannot_load_is_raised_and_no_thread_tells_of_it(monkeypatch, capfd):
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise ImportError("no such library")

    monkeypatch.setattr("slerpkit.merge.worker.numpy", Broken())
    with WorkerTeam(2) as team, pytest.raises(ImportError, match="no such library"):
        team.wait()
    assert capfd.readouterr().err == ""


MERGE_AND_TELL = """
import json, sys, time
from pathlib import Path
from slerpkit.merge.events import WorkAdvanced
from slerpkit.merge.team import WorkerTeam
from slerpkit.recipe import MergeRecipe, RunOptions
from slerpkit.story import execute_merge, prepare_merge

*folders, pause = sys.argv[1:]
primary, secondary, child = map(Path, folders)
with WorkerTeam(2, in_processes=True) as team:
    def observe(event):
        if isinstance(event, WorkAdvanced):
            print(json.dumps(team.processes), flush=True)
            time.sleep(float(pause))
    execute_merge(prepare_merge(MergeRecipe(primary, secondary), RunOptions(child)), observe, team)
print("torch" in sys.modules, flush=True)
"""


def start_merge(folders: tuple[Path, Path], child: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", MERGE_AND_TELL, *map(str, folders), str(child), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_nothing_in_the_current_folder_is_run(pair, tmp_path, monkeypatch):
    """It may be the folder of a model that somebody else has filled."""
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    for name in ("numpy", "torch", "signal", "slerpkit", "yaml"):
        (stranger / f"{name}.py").write_text("open('was_run', 'w').close()\nraise SystemExit('a stranger\\'s')\n")
    monkeypatch.chdir(stranger)
    assert merge(*pair, tmp_path / "child").child.is_dir()
    assert not (stranger / "was_run").exists()


def test_the_main_process_needs_no_torch(pair, tmp_path):
    with start_merge(pair, tmp_path / "child", 0) as merging:
        output, fault = merging.communicate(timeout=60)
    assert (output.split()[-1], merging.returncode) == ("False", 0), fault
    assert load_tensors(tmp_path / "child").keys() == load_tensors(pair[0]).keys()


def test_workers_end_with_the_main_process_however_it_dies_and_the_next_run_is_right(pair, tmp_path):
    with start_merge(pair, tmp_path / "child", 0.2) as merging:
        workers = json.loads(merging.stdout.readline())
        assert all(map(is_alive, workers))
        assert os.getsid(workers[0]) != os.getsid(merging.pid)  # the terminal's Ctrl-C does not reach them
        merging.kill()
    limit = time.monotonic() + 5
    while any(map(is_alive, workers)) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not any(map(is_alive, workers))
    child = merge(*pair, tmp_path / "child", device="cpu").child
    assert weights_of(child) == weights_of(merge(*pair, tmp_path / "other", device="cpu").child)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "other", "primary", "secondary"]


def test_a_worker_that_outlives_its_run_finds_its_folder_gone(pair, tmp_path):
    """A stopped worker of a killed run goes on in the middle of the next run: it must not write into what that made."""
    whole = merge(*pair, tmp_path / "whole", device="cpu").child
    with start_merge(pair, tmp_path / "child", 0.2) as merging:
        workers = json.loads(merging.stdout.readline())
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        merging.kill()
    try:
        let_go = False

        def observe(event: object) -> None:
            nonlocal let_go
            if isinstance(event, WorkAdvanced) and not let_go:
                let_go = True
                for worker in workers:
                    os.kill(worker, signal.SIGCONT)
                time.sleep(0.5)

        child = merge(*pair, tmp_path / "child", observe=observe, device="cpu").child
    finally:
        for worker in filter(is_alive, workers):
            os.kill(worker, signal.SIGKILL)
    assert let_go
    assert weights_of(child) == weights_of(whole)


def test_a_team_serves_one_merge_after_another(pair, tmp_path):
    with WorkerTeam(2, in_processes=True) as team:
        children = [
            execute_merge(plan_of(*pair, tmp_path / f"child-{number}", t, device="cpu"), team=team).child
            for number, t in enumerate((0.2, 0.2, 0.8))
        ]
    assert weights_of(children[0]) == weights_of(children[1]) != weights_of(children[2])
