"""Threads that keep nobody waiting who starts them, and one that does tasks in the background.

threading.Thread.start() waits without end for a thread that the system let begin and gave no memory to run. What the
threads do is not known here.
"""

from __future__ import annotations

import _thread
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from slerpkit.messages import PROCESS_HINT, SlerpMergeError

SECONDS_TO_BEGIN = 5.0  # that a thread has; it takes a thousandth of one


class BackgroundThread:
    """A thread that does some work; the process does not wait for it when it ends."""

    running: set[BackgroundThread] = set()
    were_started = False  # in this process; Python is not taken apart around them when it ends

    def __init__(self, work: Callable[[], Any]) -> None:
        """Starts it. Raises SlerpMergeError where the system does not let it begin."""
        self._work = work
        self._begun, self._ended = threading.Event(), threading.Event()
        self._is_wanted = True
        fault: BaseException | None = None
        try:
            _thread.start_new_thread(self._run, ())
            BackgroundThread.were_started = True
            self._is_wanted = self._begun.wait(SECONDS_TO_BEGIN)
        except (RuntimeError, MemoryError) as error:
            self._is_wanted, fault = False, error
        if not self._is_wanted:
            raise SlerpMergeError("The system does not let a thread be started.", PROCESS_HINT) from fault

    def _run(self) -> None:
        if not self._is_wanted:  # it was given up meanwhile
            return
        self.running.add(self)
        self._begun.set()
        work = self._work
        del self._work  # what it holds, as a connection, goes with it
        try:
            work()
        finally:
            del work
            self.running.discard(self)
            self._ended.set()

    def join(self, seconds: float | None = None) -> None:
        """Waits until the work is done, or so many seconds are over."""
        self._ended.wait(seconds)


class TaskThread:
    """One thread that does tasks, one after the other; where it cannot be started, whoever asks for one does it."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._tasks = queue.SimpleQueue()
        self._thread: BackgroundThread | None = None
        self._is_alone = False

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Asks for a task; the future tells when it is done, and what it raised."""
        future: Future[Any] = Future()
        if self._thread is None and not self._is_alone:
            try:
                self._thread = BackgroundThread(self._serve)
            except SlerpMergeError:  # it goes without, only slower
                self._is_alone = True
        if self._is_alone:
            self._carry_out(future, task, arguments)
        else:
            self._tasks.put((future, task, arguments))
        return future

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Ends the thread once it has done what was asked for, or with cancel_futures what it is at."""
        while cancel_futures and not self._tasks.empty():
            if (item := self._tasks.get()) is not None:
                item[0].cancel()
        self._tasks.put(None)
        if wait and self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        while (item := self._tasks.get()) is not None:
            self._carry_out(*item)

    @staticmethod
    def _carry_out(future: Future[Any], task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(task(*arguments))
            except BaseException as error:  # whoever asks for the result gets it
                future.set_exception(error)
