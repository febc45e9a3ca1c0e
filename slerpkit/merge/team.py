"""The workers: processes that do not share an interpreter's lock, or threads; and the tasks that are dealt to them.

Where the system can fork, one process loads what is needed and forks the workers, so that they share its memory. It can
be started long before there is work. Small merges, accelerators and systems that cannot fork are served by threads of
the main process. The workers themselves are in worker.py; which tasks there are is stream.py's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import heapq
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit import devices
from slerpkit.lazy import numpy, torch
from slerpkit.merge.dtypes import convert_float16_by_torch
from slerpkit.merge.plan import choose_workers
from slerpkit.merge.worker import ReleaseTask, serve
from slerpkit.messages import SlerpMergeError

if TYPE_CHECKING:
    from slerpkit.merge.worker import Task

TASKS_AHEAD = 2  # that a worker has at most: one at hand, and one so that it need not wait for the next
SECONDS_TO_END = 20.0  # that workers have to finish what they are at; a slow disk takes some for two tasks of each
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# For a process of its own, whose first argument that is: `python -c` looks for libraries in the current folder first,
# and that may be a stranger's.
SAFE_PATH = "sys.path[:] = [sys.argv[1], *filter(None, sys.path)]"


class WorkerDied(SlerpMergeError):
    """A worker's process ended before its time. What was written before it is as good as ever."""


class Member:
    """One worker, as the main process sees it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.tasks: deque[tuple[Any, Task]] = deque()  # under way: what the caller calls it, and the task
        self.row_maps: set[int] = set()  # that it has been given
        self.process: int | None = None  # known once it is ready


class WorkerTeam:
    """Some workers, and two queues of tasks for them: measuring and others in order, blending by urgency.

    At most half of the workers blend while there is something else to do. A system lets one at a time write to a file,
    and others that want to only wait; reading and arithmetic fill that time (measured: a sixth).
    """

    def __init__(self, count: int, device: str = "cpu", in_processes: bool = False, with_torch: bool = False) -> None:
        """Starts them; they load meanwhile what they need.

        in_processes: where the system can; else threads. with_torch: load it, to convert float16.
        """
        self.count = count
        self.device = device
        self.with_torch = with_torch
        self.in_processes = in_processes and device == "cpu" and hasattr(os, "fork")
        self._members: list[Member] = []
        self._threads: list[threading.Thread] = []
        self._torch_threads = 0  # that torch used before the workers became the parallelism; 0: untouched
        self._server: subprocess.Popen[bytes] | None = None
        self._fates: Connection | None = None
        self._others: deque[tuple[Any, Task]] = deque()
        self._blends: list[tuple[Any, int, Any, Task]] = []  # a heap: the first tensor's first stretch goes first
        self._submitted = 0
        if self.in_processes:
            self._start_processes()
        else:
            self._start_threads()

    def _start_processes(self) -> None:
        pairs = [Pipe() for _ in range(self.count)]
        self._fates, fates_of_server = Pipe()
        theirs = [fates_of_server, *(theirs for _, theirs in pairs)]
        numbers = [connection.fileno() for connection in theirs]
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(PACKAGE_ROOT), *map(str, (int(self.with_torch), *numbers))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=numbers,
                env={**os.environ, **single},
                start_new_session=True,  # Ctrl-C reaches the main process alone
            )
        except OSError as error:
            what = f"The system does not let worker processes be started: {error.strerror or error}."
            raise SlerpMergeError(what, "Close other programs, or merge with --threads 1.") from error
        finally:
            for connection in theirs:
                connection.close()
        self._members = [Member(ours) for ours, _ in pairs]

    def _start_threads(self) -> None:
        if self.with_torch or self.device != "cpu":
            self._torch_threads = torch.get_num_threads()
            torch.set_num_threads(1)  # its own would fight the workers
            convert_float16_by_torch(self.with_torch)
        for number in range(self.count):
            ours, theirs = Pipe()
            self._members.append(Member(ours))
            thread = threading.Thread(target=serve, args=(theirs, self.device), name=f"worker-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def __enter__(self) -> WorkerTeam:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Until every worker has loaded what it needs. Raises SlerpMergeError where one cannot."""
        for member in self._members:
            while member.process is None:
                try:
                    member.process = member.connection.recv() if member.connection.poll(0.2) else None
                except (EOFError, OSError) as error:
                    raise self._death_of(member) from error

    @property
    def processes(self) -> list[int | None]:
        """The number of each worker's process, once it is ready."""
        return [member.process for member in self._members]

    def submit(self, key: Any, task: Task, urgency: Any = None) -> None:
        """Asks for a task, to be answered under `key`; urgency: of one that writes, the least goes first."""
        if urgency is None:
            self._others.append((key, task))
        else:
            self._submitted += 1
            heapq.heappush(self._blends, (urgency, self._submitted, key, task))

    def next_answer(self) -> tuple[Any, Any]:
        """(key, result) of the next finished task.

        Raises what the task raised, or SlerpMergeError where a worker died.
        """
        while True:
            self._deal()
            under_way = {member.connection: member for member in self._members if member.tasks}
            for connection in wait(list(under_way), timeout=0.2):  # one without end would be deaf to Ctrl-C on Windows
                succeeded, result, key = self._receive(under_way[connection])
                if not succeeded:
                    raise result
                return key, result

    def release_files(self) -> None:
        """Has every worker close the files that it read and wrote. Nothing may be under way."""
        for member in self._members:
            self._send(member, None, ReleaseTask())
        for member in self._members:
            self._receive(member)

    def settle(self) -> None:
        """Drops what waits and lets what is under way come to its end, so that nobody writes any more."""
        self._others.clear()
        self._blends.clear()
        limit = time.monotonic() + SECONDS_TO_END
        for member in self._members:
            while member.tasks and time.monotonic() < limit:
                if member.connection.poll(0.1):
                    try:
                        self._receive(member)
                    except SlerpMergeError:  # a worker that died writes nothing either
                        member.tasks.clear()
        if any(member.tasks for member in self._members):
            self.close()

    def serves(self, threads: int, device: str, byte_count: int, dtypes: Collection[str]) -> bool:
        """Whether these are still there, and are what team_for would start."""
        in_processes, with_torch = choose_workers(device, byte_count, dtypes)
        is_there = len(self._members) == self.count == threads and self.device == device
        return is_there and self.in_processes == in_processes and self.with_torch >= with_torch

    def close(self) -> None:
        """Ends the workers: they finish what they are at, and are killed where that takes too long."""
        is_idle = not any(member.tasks for member in self._members)
        for member in self._members:
            member.connection.close()
        for thread in self._threads:
            thread.join(SECONDS_TO_END)
        if self._torch_threads:
            torch.set_num_threads(self._torch_threads)
            convert_float16_by_torch(False)
            self._torch_threads = 0
        if self._server is not None:
            try:
                self._server.wait(None if is_idle else SECONDS_TO_END)  # with a limit it looks only now and then
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    os.killpg(self._server.pid, signal.SIGKILL)
                self._server.wait()
            self._fates.close()
        self._members, self._threads, self._server = [], [], None

    def _deal(self) -> None:
        """Gives every worker what it is to do next; the first half of them writes first, the others read first."""
        for ahead in range(TASKS_AHEAD):
            for number, member in enumerate(self._members):
                if len(member.tasks) > ahead:
                    continue
                writes = number < max(1, len(self._members) // 2)
                if self._blends and (writes or not self._others):
                    self._send(member, *heapq.heappop(self._blends)[2:])
                elif self._others:
                    self._send(member, *self._others.popleft())

    def _send(self, member: Member, key: Any, task: Task) -> None:
        rows, number = None if isinstance(task, ReleaseTask) else task.tensor.rows, None
        sent = task
        if rows is not None:  # large, and the same for every task of a tensor: a worker is given it once
            number = id(rows)
            sent = dataclasses.replace(task, tensor=dataclasses.replace(task.tensor, rows=None))
            rows = None if number in member.row_maps else rows
            member.row_maps.add(number)
        member.tasks.append((key, task))
        try:
            member.connection.send((sent, number, rows))
        except OSError as error:
            raise self._death_of(member) from error

    def _receive(self, member: Member) -> tuple[bool, Any, Any]:
        try:
            succeeded, result = member.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death_of(member) from error
        key, _ = member.tasks.popleft()
        return succeeded, result, key

    def _death_of(self, member: Member) -> WorkerDied:
        """Why a worker is not there any more, in words."""
        number, reason = self._members.index(member), ""
        while self._fates is not None and self._fates.poll(1.0):
            try:
                who, what = self._fates.recv()
            except (EOFError, OSError):
                break
            if who in (None, number):
                reason = what
                break
        hint = "The same command carries on. If the memory ran out, close other programs or give it --threads 1."
        return WorkerDied(f"A worker process ended before its time{': ' if reason else ''}{reason}.", hint)


def fork_workers(with_torch: int, fates_number: int, *numbers: int) -> None:
    """The server process: loads the libraries once, forks a worker for each connection, tells what became of them."""
    fates = Connection(fates_number)
    try:
        numpy.errstate  # noqa: B018  loaded here, so that the workers share it
        if with_torch:
            torch.set_num_threads(1)
            convert_float16_by_torch(True)
    except Exception as error:  # whatever a library does when it loads; the main process says it
        fates.send((None, f"a library cannot be loaded ({error})"))
        return
    gc.freeze()
    workers: dict[int, int] = {}
    for place, number in enumerate(numbers):
        if (process := os.fork()) == 0:
            for other in (fates_number, *numbers):
                if other != number:
                    os.close(other)
            serve(Connection(number), "cpu")
            os._exit(0)
        workers[process] = place
    for number in numbers:
        os.close(number)
    with contextlib.suppress(OSError):  # nobody asks any more
        while workers:
            process, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            killed = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"
            fates.send((workers.pop(process), killed))


# Run by a process of its own; its arguments are where the package is, and the numbers of the connections.
SERVER = f"""
import gc, os, sys
gc.disable()
{SAFE_PATH}
from {fork_workers.__module__} import {fork_workers.__name__} as fork_workers
fork_workers(*map(int, sys.argv[2:]))
os._exit(0)  # without taking the libraries apart first, for which the person would wait
"""


@contextlib.contextmanager
def team_for(
    threads: int, device: str, byte_count: int, dtypes: Collection[str], team: WorkerTeam | None = None
) -> Iterator[WorkerTeam]:
    """The workers for a merge, or an inspection: those given, or its own.

    byte_count: of all that is read once. dtypes: torch's names of those that occur. Raises SlerpMergeError where the
    device is not there.
    """
    if team is not None:
        yield team
        return
    devices.check_device(device)
    with WorkerTeam(threads, device, *choose_workers(device, byte_count, dtypes)) as own:
        yield own
