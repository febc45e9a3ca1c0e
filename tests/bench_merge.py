"""How fast, how flat, how exact: slerpmerge against the cost of copying the files, and against a peer.

    python tests/bench_merge.py                             a 1.1 B-parameter pair in bfloat16
    python tests/bench_merge.py --layers 70                 one three times as large
    python tests/bench_merge.py --method lerp --t 0,0.5,1   another blend
    python tests/bench_merge.py --also "--method lerp" "--t 0,0.5,1"   more blends, held against the first
    python tests/bench_merge.py --adapter 8 64              adapters of the primary, held against a plain parent
    python tests/bench_merge.py --sync                      until everything is on the disk
    python tests/bench_merge.py --inspect                   also inspection, against reading both parents once
    python tests/bench_merge.py --script OTHER/slerpmerge.py   another version on the same pair, run by run
    python tests/bench_merge.py --peer PATH_TO_MERGEKIT_YAML

The floor comes first: reading both parents and writing one copy, in the same run and cache state (the parents in the
system's page cache, where the file system has one). Every figure is a median of the runs, which alternate. Processor
seconds are user and system seconds of all processes of a run; they are steadier than wall seconds on a shared machine.
Memory is the largest sum over a run's processes of the proportional set size (Linux; elsewhere the largest resident
size of the main process). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "slerpmerge.py"
COPY_BYTES = 1 << 20  # the buffer size at which plain copying was fastest

# A 1.1 B-parameter Llama at 22 layers; more layers make it larger.
HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY, HEADS = 2048, 5632, 256, 32_000, 32


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama with this many layers, in the order of its layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (KEY_VALUE, HIDDEN)),
            ("self_attn.v_proj", (KEY_VALUE, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (INTERMEDIATE, HIDDEN)),
            ("mlp.up_proj", (INTERMEDIATE, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, INTERMEDIATE)),
            ("input_layernorm", (HIDDEN,)),
            ("post_attention_layernorm", (HIDDEN,)),
        ):
            found[f"model.layers.{layer}.{name}.weight"] = shape
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE // (HIDDEN // HEADS), "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def build_parents(folder: Path, layers: int) -> None:
    """Two related parents: the secondary is the primary with independent noise, some degrees away."""
    import torch
    from safetensors.torch import save_file

    names = list(shapes(layers).items())
    # The largest power of two of tensors that keeps a shard near a gigabyte.
    per_shard = 100
    groups = [names[start : start + per_shard] for start in range(0, len(names), per_shard)]
    weight_map: dict[str, str] = {}
    for role in ("primary", "secondary"):
        (folder / role).mkdir(parents=True)
        (folder / role / "config.json").write_text(json.dumps(config(layers)))
    generator = torch.Generator().manual_seed(7)
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        pair: dict[str, dict[str, torch.Tensor]] = {"primary": {}, "secondary": {}}
        for name, shape in group:
            weight = torch.empty(shape).normal_(0, 0.02, generator=generator)
            noise = torch.empty(shape).normal_(0, 0.008, generator=generator)
            pair["primary"][name] = weight.to(torch.bfloat16)
            pair["secondary"][name] = (weight + noise).to(torch.bfloat16)
            weight_map[name] = file
        for role, tensors in pair.items():
            save_file(tensors, folder / role / file, metadata={"format": "pt"})
    if len(groups) > 1:
        for role in pair:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / role / "model.safetensors.index.json").write_text(json.dumps(index))


def build_adapter(folder: Path, rank: int) -> None:
    """A LoRA adapter of the primary, on every matrix of its layers."""
    import torch
    from safetensors.torch import save_file

    (folder / f"adapter-{rank}").mkdir()
    primary = json.loads((folder / "primary" / "config.json").read_text())
    tensors = {}
    for name, shape in shapes(primary["num_hidden_layers"]).items():
        if ".layers." in name and len(shape) == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1]) / rank
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank) * 0.01
    save_file(tensors, folder / f"adapter-{rank}" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": str(folder / "primary")}
    (folder / f"adapter-{rank}" / "adapter_config.json").write_text(json.dumps(settings))


def build_hollow_parents(folder: Path, layers: int = 32) -> None:
    """A 7 B-shaped pair of headers over files that are all hole."""
    entries: dict[str, object] = {}
    end = 0
    for name, shape in shapes(layers).items():
        size = 2
        wide = [4096 if n == HIDDEN else 11_008 if n == INTERMEDIATE else 4096 if n == KEY_VALUE else n for n in shape]
        for n in wide:
            size *= n
        entries[name] = {"dtype": "BF16", "shape": wide, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    for role in ("hollow-primary", "hollow-secondary"):
        (folder / role).mkdir(parents=True)
        (folder / role / "config.json").write_text(json.dumps(config(layers)))
        with (folder / role / "model.safetensors").open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + end)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remove(folder: Path) -> None:
    if folder.exists():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


def settle(folder: Path | None = None) -> None:
    """Brings the machine into the same state before every measurement.

    Earlier writes must not be paid for by the next one. And where this machine is a virtual one, memory
    that was free for a while must first be had back from its host, which costs several times what the
    writing does: a scratch copy, written and removed, has it back before the clock starts.
    """
    if hasattr(os, "sync"):
        os.sync()
    if folder is not None:
        scratch = folder / "scratch"
        block = bytes(COPY_BYTES)
        with scratch.open("wb", buffering=0) as stream:
            for file in weight_files(folder / "primary"):
                for _ in range(0, int(1.3 * file.stat().st_size), COPY_BYTES):
                    stream.write(block)
        scratch.unlink()


def measure_floor(folder: Path, sync: bool = False) -> float:
    """Seconds to read both parents and write one copy, with one thread and plain reads; sync: until the disk has it."""
    copy = folder / "copy"
    copy.mkdir()
    settle(folder)
    buffer = memoryview(bytearray(COPY_BYTES))
    started = time.perf_counter()
    for role in ("primary", "secondary"):
        for file in weight_files(folder / role):
            target = (copy / file.name).open("wb", buffering=0) if role == "primary" else None
            with file.open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if target:
                        target.write(buffer[:count])
            if target:
                if sync:
                    os.fsync(target.fileno())
                target.close()
    seconds = time.perf_counter() - started
    remove(copy)
    return seconds


def forget_cached(folder: Path) -> None:
    """Asks the system to read the parents from their disk the next time, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        os.sync()
        for file in [file for role in ("primary", "secondary") for file in weight_files(folder / role)]:
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_reading(folder: Path) -> float:
    """Seconds to read both parents once, with one thread and plain reads."""
    buffer = memoryview(bytearray(COPY_BYTES))
    started = time.perf_counter()
    for role in ("primary", "secondary"):
        for file in weight_files(folder / role):
            with file.open("rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass
    return time.perf_counter() - started


def measure_inspection(folder: Path, runs: int) -> dict[str, float]:
    """Inspection over reading, medians of alternating runs: from memory, and where it can be had from the disk."""
    sys.path.insert(0, str(SCRIPT.parent))
    from slerpkit.merge.team import WorkerTeam
    from slerpkit.recipe import MergeRecipe, RunOptions
    from slerpkit.story import inspect_parents

    recipe, options = MergeRecipe(folder / "primary", folder / "secondary"), RunOptions(Path(), device="cpu")
    team = WorkerTeam(usable_cores(), in_processes=True)
    team.wait()
    found: dict[str, list[tuple[float, float]]] = {"cached": [], "from_disk": []}
    measure_reading(folder)
    for kind, pairs in found.items():
        for _ in range(runs):
            if kind == "from_disk":
                forget_cached(folder)
            reading = measure_reading(folder)
            if kind == "from_disk":
                forget_cached(folder)
            started = time.perf_counter()
            inspect_parents(recipe, options, team=team)
            pairs.append((reading, time.perf_counter() - started))
    team.close()
    return {
        f"{kind}_{name}": round(value, 2)
        for kind, pairs in found.items()
        for name, value in (
            ("reading_seconds", statistics.median(reading for reading, _ in pairs)),
            ("inspect_over_reading", statistics.median(inspecting / reading for reading, inspecting in pairs)),
        )
    }


@dataclass(frozen=True)
class Run:
    """What a command cost, and what it said."""

    seconds: float
    user_seconds: float  # of the processor, all processes
    system_seconds: float
    peak_bytes: int  # of all processes together
    output: str


def family(process: int) -> list[int]:
    """A process and all that descend from it, as Linux lists them."""
    found = [process]
    for member in found:
        try:
            tasks = Path(f"/proc/{member}/task").iterdir()
            children = " ".join((task / "children").read_text() for task in tasks)
        except OSError:  # gone meanwhile
            continue
        found += map(int, children.split())
    return found


def proportional_bytes(process: int) -> int:
    """The proportional set size of a process: what it shares is divided by those that share it. 0 where it is gone."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


class MemoryWatch(threading.Thread):
    """Looks every tenth of a second how much memory a process and its descendants have together."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.peak_bytes = 0
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.1):
            total = sum(map(proportional_bytes, family(self.process)))
            self.peak_bytes = max(self.peak_bytes, total)


def run_measured(command: list[str], folder: Path | None = None, environment: dict[str, str] | None = None) -> Run:
    """What a command cost. Fails loudly where it does."""
    settle(folder)
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        watch = MemoryWatch(process.pid) if Path("/proc/self/smaps_rollup").exists() else None
        user = system = 0.0
        peak = 0
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            user, system = usage.ru_utime, usage.ru_stime
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        else:
            process.wait()
        seconds = time.perf_counter() - started
        if watch is not None:
            watch.over.set()
            watch.join()
            peak = watch.peak_bytes
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{text[-3000:]}")
    return Run(seconds, user, system, peak, text)


def file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on, as Linux calls it; unknown elsewhere."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    place = str(folder.resolve())
    around = [(len(point), kind) for _, point, kind, *_ in mounts if (place + "/").startswith(point.rstrip("/") + "/")]
    return max(around)[1] if around else "unknown"


def measure_slerpmerge(
    folder: Path, arguments: argparse.Namespace, blend: str, script: Path = SCRIPT
) -> dict[str, float]:
    """What a merge reports of itself, with its wall time and peak; blend: flags, as a person writes them."""
    child = folder / "child"
    remove(child)
    command = [
        sys.executable, str(script), "--primary", str(folder / "primary"), "--secondary", str(folder / "secondary"),
        "--save-dir", str(child), "--device", arguments.device, "--yes", "--json", *blend.split(),
    ]  # fmt: skip
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    run = run_measured(command, folder)
    report = json.loads(run.output.strip().splitlines()[-1])
    return {
        "whole": run.seconds,
        "user": run.user_seconds,
        "system": run.system_seconds,
        "peak": run.peak_bytes,
        "merge": report["seconds"],
        "sync": report["sync_seconds"],
        "bytes": report["bytes"],
    }


def measure_peer(folder: Path, executable: str, t: str) -> dict[str, float]:
    """mergekit's wall time and memory for the same pair and blend, with its default settings."""
    recipe = folder / "peer.yaml"
    recipe.write_text(
        f"merge_method: slerp\nbase_model: {folder / 'primary'}\nmodels:\n- model: {folder / 'primary'}\n"
        f"- model: {folder / 'secondary'}\nparameters:\n  t: [{t}]\ndtype: bfloat16\n"
    )
    child = folder / "peer-child"
    remove(child)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = run_measured([executable, str(recipe), str(child)], folder, environment)
    remove(child)
    return {"whole": run.seconds, "peak": run.peak_bytes}


def measure_dry_run(folder: Path) -> float:
    """Wall seconds of --dry-run on a 7 B-shaped pair, headers alone."""
    build_hollow_parents(folder)
    command = [
        sys.executable, str(SCRIPT), "--dry-run", "--yes", "--json", "--save-dir", str(folder / "hollow-child"),
        "--primary", str(folder / "hollow-primary"), "--secondary", str(folder / "hollow-secondary"),
    ]  # fmt: skip
    return statistics.median(run_measured(command).seconds for _ in range(9))


def measure_first_prompt() -> float | None:
    """Seconds from the command to its first prompt on a real pseudo-terminal; None where there is none."""
    try:
        import pty
    except ImportError:
        return None
    times = []
    for _ in range(9):
        started = time.perf_counter()
        process, terminal = pty.fork()
        if process == 0:
            os.execv(sys.executable, [sys.executable, str(SCRIPT)])
        seen = b""
        while b"Primary model" not in seen:
            seen += os.read(terminal, 4096)
            if b"\x1b[6n" in seen:  # it asks where the cursor stands; a terminal answers
                os.write(terminal, b"\x1b[1;1R")
                seen = seen.replace(b"\x1b[6n", b"")
        times.append(time.perf_counter() - started)
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)
    return statistics.median(times)


def measure_accuracy(folder: Path, t: float) -> dict[str, float]:
    """The bfloat16 child against float64, every element of every tensor. Constant t and plain slerp only."""
    import math

    import torch
    from safetensors import safe_open

    def open_all(role: str) -> dict[str, object]:
        return {name: f for file in weight_files(folder / role) for f in [safe_open(file, "pt")] for name in f.keys()}  # noqa: SIM118

    primary, secondary, child = open_all("primary"), open_all("secondary"), open_all("child")
    elements = right = 0
    worst = 0.0
    for name in child:
        v0, v1, made = (part[name].get_tensor(name).flatten() for part in (primary, secondary, child))
        chunks = [slice(start, start + (1 << 20)) for start in range(0, len(v0), 1 << 20)]
        sums = [0.0, 0.0, 0.0]
        for chunk in chunks:
            a, b = v0[chunk].double(), v1[chunk].double()
            for place, (x, y) in enumerate(((a, a), (b, b), (a, b))):
                sums[place] += float(torch.dot(x, y))
        cosine = sums[2] / math.sqrt(sums[0] * sums[1])
        theta = math.acos(max(-1.0, min(1.0, cosine)))
        s0, s1 = 1 - t, t
        if abs(cosine) <= 0.9995:
            s0, s1 = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
        for chunk in chunks:
            p, q = s0 * v0[chunk].double(), s1 * v1[chunk].double()
            exact = p + q
            found = made[chunk].double()
            right += int((nearest_bfloat16(exact) == found).sum())
            elements += len(found)
            # A unit of the last place of the exact value; float32 products lose up to 2**-23 of their size.
            unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-37))) - 7)
            explained = (p.abs() + q.abs()) * 2**-22
            worst = max(worst, float((((found - exact).abs() - explained) / unit).max()))
    return {"correctly_rounded": right / elements, "worst_unit_of_last_place": worst}


def nearest_bfloat16(exact):
    """float64 to the nearest bfloat16 in one rounding, ties to even; torch's own cast rounds twice, by float32."""
    import torch

    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-126))) - 7)
    return torch.round(exact / unit) * unit  # torch.round takes ties to even


def in_own_process(task: str, *words: str) -> str:
    """Runs a part of this file that needs torch, so that this process stays small."""
    return run_measured([sys.executable, __file__, "--task", task, *words]).output


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help="22 makes 1.1 B parameters, 70 three times as many")
    parser.add_argument("--folder", type=Path, help="where parents and children lie meanwhile (default: temporary)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--t", default="0.5")
    parser.add_argument("--method", default="slerp")
    parser.add_argument("--also", nargs="+", default=[], metavar="FLAGS", help="flags of other blends to measure")
    parser.add_argument("--adapter", nargs="+", type=int, default=[], metavar="RANK", help="adapters for secondary")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--script", type=Path, help="the slerpmerge.py of another version, to be measured too")
    parser.add_argument("--peer", metavar="PATH_TO_MERGEKIT_YAML", help="also measure mergekit on the same pair")
    parser.add_argument("--accuracy", action="store_true", help="also hold every element against float64")
    parser.add_argument(
        "--sync", action="store_true", help="also hold it against a copy that is on the disk by the end"
    )
    parser.add_argument("--inspect", action="store_true", help="also measure --inspect against reading both parents")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.task:
        task, folder, value = arguments.task
        if task == "build":
            build_parents(Path(folder), int(value))
        elif task == "adapter":
            build_adapter(Path(folder), int(value))
        elif task == "inspect":
            print(json.dumps(measure_inspection(Path(folder), int(value))))
        else:
            print(json.dumps(measure_accuracy(Path(folder), float(value))))
        return
    with tempfile.TemporaryDirectory(prefix="slerpmerge-bench-", dir=arguments.folder) as name:
        bench(Path(name), arguments)


def bench(folder: Path, arguments: argparse.Namespace) -> None:
    in_own_process("build", str(folder), str(arguments.layers))
    measure_floor(folder)  # brings the parents into the cache, as a second run would find them
    plain = f"--method {arguments.method} --t {arguments.t}"
    for rank in arguments.adapter:
        in_own_process("adapter", str(folder), str(rank))
        arguments.also.append(f"--secondary {folder}/adapter-{rank}")
    floors, synced, peers, others = [], [], [], []
    merges: dict[str, list[dict[str, float]]] = {blend: [] for blend in [plain, *arguments.also]}
    for number in range(arguments.runs):
        floors.append(measure_floor(folder))
        print(f"run {number + 1}: floor {floors[-1]:.2f} s")
        if arguments.sync:
            synced.append(measure_floor(folder, sync=True))
            print(f"run {number + 1}: floor with its copy on the disk {synced[-1]:.2f} s")
        for blend, rows in merges.items():
            rows.append(measure_slerpmerge(folder, arguments, blend))
            print(f"run {number + 1}: {blend}: {rows[-1]}")
        if arguments.script:
            others.append(measure_slerpmerge(folder, arguments, plain, arguments.script))
            print(f"run {number + 1}: other version {others[-1]}")
        if arguments.peer:
            peers.append(measure_peer(folder, arguments.peer, arguments.t))
            print(f"run {number + 1}: peer {peers[-1]}")

    def median(rows: list[dict[str, float]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    ours = merges[plain]
    floor, merge, whole = statistics.median(floors), median(ours, "merge"), median(ours, "whole")
    result: dict[str, object] = {
        "file_system": file_system(folder),
        "cores": usable_cores(),
        "layers": arguments.layers,
        "bytes": ours[0]["bytes"],
        "method": arguments.method,
        "t": arguments.t,
        "floor_seconds": round(floor, 3),
        "merge_seconds": round(merge, 3),
        "merge_over_floor": round(merge / floor, 2),
        "whole_seconds": round(whole, 2),
        "processor_seconds": round(median(ours, "user") + median(ours, "system"), 2),
        "sync_seconds": round(median(ours, "sync"), 2),
        "peak_megabytes": round(median(ours, "peak") / 1e6),
    }
    if others:
        result["other"] = {
            "merge_seconds": round(median(others, "merge"), 3),
            "merge_over_floor": round(median(others, "merge") / floor, 2),
            "whole_seconds": round(median(others, "whole"), 2),
            "processor_seconds": round(median(others, "user") + median(others, "system"), 2),
            "peak_megabytes": round(median(others, "peak") / 1e6),
        }
    if synced:
        result["synced_floor_seconds"] = round(statistics.median(synced), 3)
        ratios = ((row["merge"] + row["sync"]) / seconds for row, seconds in zip(ours, synced))
        result["synced_over_floor"] = round(statistics.median(ratios), 2)
    if arguments.also:
        result["also"] = {
            blend.replace(f"{folder}/", ""): {
                "merge_seconds": round(median(rows, "merge"), 3),
                "merge_over_first": round(statistics.median(a["merge"] / b["merge"] for a, b in zip(rows, ours)), 2),
                "whole_over_first": round(statistics.median(a["whole"] / b["whole"] for a, b in zip(rows, ours)), 2),
                "peak_megabytes": round(median(rows, "peak") / 1e6),
            }
            for blend, rows in merges.items()
            if blend != plain
        }
    if peers:
        result["peer_seconds"] = round(median(peers, "whole"), 2)
        result["peer_megabytes"] = round(median(peers, "peak") / 1e6)
        result["faster_than_peer"] = round(median(peers, "whole") / whole, 1)
    if arguments.accuracy:
        result.update(json.loads(in_own_process("accuracy", str(folder), arguments.t).splitlines()[-1]))
    if arguments.inspect:
        result.update(json.loads(in_own_process("inspect", str(folder), str(arguments.runs)).splitlines()[-1]))
    result["dry_run_seconds"] = round(measure_dry_run(folder), 2)
    first_prompt = measure_first_prompt()
    result["first_prompt_seconds"] = round(first_prompt, 2) if first_prompt is not None else None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
