"""Runs blocking model code in a thread of its own, so that a cancel is seen while it computes.

Owns one thread. Abandoned work is not killed, because a thread cannot be: it ends at its next item, and the next work
waits for that. To end it at once, kill the process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

_TICK_S = 0.05
_MAX_WAITING = 64

Put = Callable[[Any], None]


class Abandoned(Exception):
    """Raised by `put` in the worker's thread: the rest is no longer wanted."""


class _Job:
    def __init__(self, work: Callable[[Put], None]) -> None:
        self.work = work
        self.items: queue.Queue[Any] = queue.Queue(_MAX_WAITING)
        self.abandoned = threading.Event()
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def put(self, item: Any) -> None:
        while not self.abandoned.is_set():
            try:
                self.items.put(item, timeout=_TICK_S)
                return
            except queue.Full:
                continue
        raise Abandoned

    def run(self) -> None:
        try:
            if not self.abandoned.is_set():
                self.work(self.put)
        except Abandoned:
            pass  # its reader is gone
        except BaseException as error:  # noqa: BLE001 - model code may raise anything; the reader gets it
            self.error = error
        finally:
            self.ended.set()


class Worker:
    """One thread that does one piece of work after another, and ends with the process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="model", daemon=True).start()

    def stream(self, work: Callable[[Put], None]) -> Generator[Any, None, None]:
        """Runs `work(put)` in the thread and yields what it puts, and None every 50 ms while nothing comes.

        Closing the iterator abandons the work.

        Raises:
            BaseException: whatever the work raised.
        """
        job = _Job(work)
        self._jobs.put(job)
        try:
            while True:
                ended = job.ended.is_set()  # before looking, so that everything put until then is seen below
                try:
                    yield job.items.get(timeout=0 if ended else _TICK_S)
                except queue.Empty:
                    if ended:
                        break
                    yield None
            if job.error is not None:
                raise job.error
        finally:
            job.abandoned.set()

    def _run(self) -> None:
        while True:
            self._jobs.get().run()
