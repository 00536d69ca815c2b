"""A model's dispatcher: takes prompts from the journal to the runner, and answers back to the journal.

One thread for each model; it owns the prompts that run, several at once where the runner can. Flow of a step:

    lease a runner → journal.claim → runner.start … runner.receive, chunks on the way → journal.answer
    → the outlet is told

An answer counts once it is in the journal: whoever is told reads it from there. A prompt that was answered
meanwhile (cancelled, too late) is abandoned, and what its runner still says is void. A runner that dies costs
the prompt whose turn it was; the others go back into the queue.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from edge_agent.chat import messages
from edge_agent.chat.clock import Moment
from edge_agent.chat.journal import Journal
from edge_agent.chat.prompt import Answer, Prompt, Source
from edge_agent.errors import (
    DeadlineExceeded,
    JournalUnavailable,
    ModelFailed,
    PromptError,
    RunnerError,
    error_of,
)
from edge_agent.runner.protocol import Delta, Done, Refused

log = logging.getLogger(__name__)

CHUNK_INTERVAL_S = 0.05
"""At most 20 chunks a second: a message a token costs three times the CPU of the generation itself."""

_WAIT_S = 0.5
_MAX_FRAMES = 64
_JOURNAL_RETRY_S = 1.0


class Runner(Protocol):
    """What a dispatcher needs of a loaded model.

    Attributes:
        suspects: after its death, the prompts whose turn it was.
    """

    suspects: frozenset[str]

    def fileno(self) -> int: ...

    def start(self, prompt_id: str, document: dict[str, Any], *, timeout_s: float) -> None: ...

    def receive(self, timeout_s: float) -> Delta | Done | Refused | None: ...

    def cancel(self, prompt_id: str) -> None: ...


class Lease(Protocol):
    """A runner for one prompt, and the version that it runs."""

    @property
    def runner(self) -> Runner: ...

    @property
    def version(self) -> int: ...

    @property
    def parallel(self) -> int: ...

    @property
    def blame(self) -> Callable[[frozenset[bytes]], None]: ...


class Host(Protocol):
    """Where runners come from: the model's lifecycle."""

    def lease(self) -> AbstractContextManager[Lease | None]: ...

    def wait_for_change(self, timeout_s: float) -> None: ...

    def wanted_now(self) -> bool: ...

    def unload_when_idle(self) -> None: ...


class Outlet(Protocol):
    """Where answers go, for one way that prompts come in. Told from the dispatcher's thread; must not block."""

    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None: ...

    def answered(self, row: int) -> None: ...


@dataclass(kw_only=True, eq=False)
class _Run:
    """A prompt that runs.

    Attributes:
        lease: kept until the prompt is settled.
        answer: its terminal answer, None while it runs.
        put_back: it goes back into the queue instead.
        settle_at_s: monotonic time of the next attempt to tell the journal.
    """

    prompt: Prompt
    lease: Lease
    release: ExitStack
    started_boot_s: float
    first_boot_s: float | None = None
    text: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    seq: int = 0
    sent_boot_s: float = 0.0
    abandoned: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    put_back: bool = False
    settle_at_s: float = 0.0

    @property
    def name(self) -> str:
        """The request's id, for the runner's own log, and what makes it unique for each row and attempt: a late
        cancel of an earlier prompt can never hit this one."""
        return f"{self.prompt.id}.{self.prompt.row}.{self.prompt.attempts}"

    @property
    def live(self) -> bool:
        """The runner has it and has not ended it."""
        return self.answer is None and not self.put_back


class _Wake:
    """A flag that any thread sets and `select` waits for."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._descriptor

    def set(self) -> None:
        os.eventfd_write(self._descriptor, 1)

    def wait(self, timeout_s: float, *others: int) -> None:
        """Returns when the flag is set, one of the other descriptors is readable, or after `timeout_s`; clears it."""
        with contextlib.suppress(OSError, ValueError):  # another one was closed: its owner finds out
            select.select([self._descriptor, *others], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)


class Dispatcher:
    """One model's queue worker. `notify`, `abandon` and `drain` may come from any thread.

    Args:
        defaults: adds to a document what the settings say for requests that leave it open.
        outlets: by the way a prompt came in.
        now: the clock.

    Attributes:
        service_s: after how long one of the prompts that run ends, a moving average; `retry_after_ms` comes from it.
    """

    def __init__(
        self,
        model: str,
        *,
        host: Host,
        journal: Journal,
        outlets: dict[Source, Outlet],
        defaults: Callable[[dict[str, Any]], dict[str, Any]],
        now: Callable[[], Moment],
    ) -> None:
        self.model = model
        self.service_s = 2.0
        self.tokens_per_s: float | None = None
        self.answered = 0
        self._host = host
        self._journal = journal
        self._outlets = outlets
        self._defaults = defaults
        self._now = now
        self._wake = _Wake()
        self._may_claim = True
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._runs: dict[str, _Run] = {}

    def run(self) -> None:
        """The thread: steps until `drain`, and until what runs has ended."""
        while self._runs or not self._stopping.is_set():
            self.step()

    def step(self) -> None:
        """One turn: takes prompts that the runner has room for, then what the runner says; waits a little for
        either, or for a runner."""
        if self._runs:
            self._fill()
        else:
            self._seek()
        if any(run.live for run in self._runs.values()):
            self._listen()
        self._settle()

    def notify(self) -> None:
        """A prompt waits."""
        self._may_claim = True
        self._wake.set()

    def abandon(self, row: int) -> None:
        """Stops the prompt if it runs now; its answer has been given."""
        for run in self._running():
            if run.prompt.row == row:
                run.abandoned.set()
                run.lease.runner.cancel(run.name)

    def stop_claiming(self) -> None:
        """Takes no more prompts."""
        self._stopping.set()
        self._wake.set()

    def drain(self, timeout_s: float) -> None:
        """Gives the running prompts `timeout_s`, then puts them back into the queue."""
        self.stop_claiming()
        deadline_s = time.monotonic() + timeout_s
        while self._runs and time.monotonic() < deadline_s:
            time.sleep(0.02)
        for run in self._running():
            log.warning("prompt put back request=%s model=%s", run.prompt.id, self.model)
            with contextlib.suppress(JournalUnavailable):  # it counts as a death then, and runs again
                self._journal.release(run.prompt.row)
            run.lease.runner.cancel(run.name)

    def _running(self) -> list[_Run]:
        with self._lock:
            return list(self._runs.values())

    # --- From the queue to the runner ------------------------------------------------------------------

    def _seek(self) -> None:
        """With nothing running: starts what waits, else waits a little for a prompt or a runner."""
        if not self._host.wanted_now() and not self._waiting():
            self._host.unload_when_idle()
            self._wake.wait(_WAIT_S)
            return
        started = self._start_next()
        if started:
            self._fill()
        elif started is None:
            self._host.wait_for_change(_WAIT_S)
        else:
            self._host.unload_when_idle()
            self._wake.wait(_WAIT_S)

    def _fill(self) -> None:
        """Starts prompts while the runner has room for more."""
        parallel = next(iter(self._runs.values())).lease.parallel
        while self._may_claim and len(self._runs) < parallel and self._start_next():
            pass

    def _start_next(self) -> bool | None:
        """Starts the oldest prompt that waits. False when there is none, None when there is no runner for it."""
        if self._stopping.is_set():
            return False
        self._may_claim = False  # before the journal is asked: what comes later sets it again
        with ExitStack() as stack:
            lease = stack.enter_context(self._host.lease())  # a load may take minutes
            if lease is None:
                return None
            if self._stopping.is_set():
                return False
            prompt = self._claim()
            if prompt is None:
                return False
            self._may_claim = True
            self._start(prompt, lease, stack.pop_all())
            return True

    def _waiting(self) -> bool:
        try:
            return self._journal.waiting(self.model)
        except JournalUnavailable:
            return False

    def _claim(self) -> Prompt | None:
        try:
            return self._journal.claim(self.model)
        except JournalUnavailable:
            return None  # the journal's `trouble` is in the status; the prompt waits there

    def _start(self, prompt: Prompt, lease: Lease, release: ExitStack) -> None:
        now_s = self._now().boot_s
        run = _Run(prompt=prompt, lease=lease, release=release, started_boot_s=now_s)
        with self._lock:
            self._runs[run.name] = run
        log.info(
            "prompt starts request=%s model=%s version=%s attempt=%d",
            prompt.id, self.model, lease.version, prompt.attempts,
        )  # fmt: skip
        try:
            remaining_s = prompt.deadline_boot_s - now_s
            if remaining_s <= 0:
                raise DeadlineExceeded("the deadline passed before the prompt could start")
            lease.runner.start(run.name, self._defaults(prompt.document), timeout_s=remaining_s)
        except PromptError as error:
            run.answer = self._refuse(run, error)
        except RunnerError:
            return  # `_listen` hears of its death
        except Exception as error:  # noqa: BLE001 - the other prompts go on
            run.answer = self._fail(run, error)
        # Cancelled, or too late, since the claim: nobody has told this run, or the runner did not have it yet.
        if run.abandoned.is_set() or not self._journal.running(prompt.row):
            run.abandoned.set()
            lease.runner.cancel(run.name)

    # --- What the runner says --------------------------------------------------------------------------

    def _listen(self) -> None:
        """Takes what the runner has said, else waits until it says something or somebody wakes this thread."""
        runner = next(run.lease.runner for run in self._runs.values() if run.live)
        try:
            for count in range(_MAX_FRAMES):
                frame = runner.receive(0)
                if frame is None:
                    if count == 0:
                        self._wake.wait(_WAIT_S, runner.fileno())
                    return
                self._take(frame)
        except RunnerError as error:
            self._on_death(runner, error)

    def _take(self, frame: Delta | Done | Refused) -> None:
        run = self._runs.get(frame.id)
        if run is None or not run.live:  # it was given up here, and the runner had not heard of it
            return
        try:
            if isinstance(frame, Refused):
                error = error_of(frame.code, frame.message, among=(PromptError,), otherwise=ModelFailed)
                run.answer = self._refuse(run, error)
            elif isinstance(frame, Done):
                run.answer = self._finish(run, frame)
            elif not run.abandoned.is_set():
                self._on_text(run, frame.text)
        except Exception as error:  # noqa: BLE001 - the other prompts go on
            run.answer = self._fail(run, error)

    def _on_death(self, runner: Runner, error: RunnerError) -> None:
        """The prompts whose turn it was get 500, since they may be the cause; the others run again.

        When the agent stops, all of them run again: it ends runners itself, and nobody is to blame.
        """
        runs = [run for run in self._runs.values() if run.live]
        if not runs:
            return
        if self._stopping.is_set():
            for run in runs:
                run.put_back = True
            return
        suspects = [run for run in runs if run.name in runner.suspects] or runs
        suspects[0].lease.blame(frozenset(_digest(run.prompt.document) for run in suspects))
        for run in runs:
            if run in suspects:
                log.warning(
                    "runner failed request=%s model=%s error=%r", run.prompt.id, self.model, str(error)
                )
                failed = ModelFailed("the model's process failed while it answered this prompt")
                run.answer = self._refuse(run, failed)
            else:
                log.info("prompt put back request=%s model=%s", run.prompt.id, self.model)
                run.put_back = True
                self._may_claim = True

    def _on_text(self, run: _Run, text: str) -> None:
        now_s = self._now().boot_s
        if run.first_boot_s is None:
            run.first_boot_s = now_s
        run.text.append(text)
        run.pending.append(text)
        if now_s - run.sent_boot_s >= CHUNK_INTERVAL_S:
            self._send_chunk(run, None)
            run.sent_boot_s = now_s

    def _finish(self, run: _Run, done: Done) -> Answer:
        prompt, ended_s = run.prompt, self._now().boot_s
        timings = messages.timings(
            queued_s=prompt.accepted_boot_s,
            started_s=run.started_boot_s,
            first_s=run.first_boot_s if run.first_boot_s is not None else ended_s,
            ended_s=ended_s,
            tokens=done.usage.get("completion_tokens", 0),
            measured=done.timings,
        )
        self._send_chunk(run, done.finish_reason)
        self.service_s += 0.2 * ((ended_s - run.started_boot_s) / len(self._runs) - self.service_s)
        self.tokens_per_s = timings["tokens_per_s"] or self.tokens_per_s
        document = messages.completion(
            request_id=prompt.id,
            created_s=int(self._now().wall_s),
            model=self.model,
            text="".join(run.text),
            finish_reason=done.finish_reason,
            usage=done.usage,
            timings=timings,
        )
        return Answer(
            payload=messages.encode_answer(document, prompt.form), properties=self._properties(run, 200)
        )

    def _refuse(self, run: _Run, error: PromptError) -> Answer:
        document = messages.error_document(run.prompt.id, error)
        payload = messages.encode_answer(document, run.prompt.form)
        return Answer(payload=payload, properties=self._properties(run, error.status))

    def _fail(self, run: _Run, error: Exception) -> Answer:
        """The answer where something happened that nobody foresaw."""
        log.error("prompt failed request=%s model=%s", run.prompt.id, self.model, exc_info=error)
        run.lease.runner.cancel(run.name)
        return self._refuse(run, ModelFailed("the agent failed on this prompt"))

    def _properties(self, run: _Run, status: int) -> dict[str, str]:
        return {"status": str(status), "model": self.model, "version": str(run.lease.version)}

    def _send_chunk(self, run: _Run, finish_reason: str | None) -> None:
        if not run.prompt.stream or run.abandoned.is_set():
            return
        document = messages.chunk(
            request_id=run.prompt.id,
            created_s=int(run.prompt.accepted_wall_s),
            model=self.model,
            seq=run.seq,
            text="".join(run.pending),
            finish_reason=finish_reason,
        )
        run.seq += 1
        run.pending.clear()
        self._outlets[run.prompt.source].chunk(run.prompt, document)

    # --- Back to the journal ---------------------------------------------------------------------------

    def _settle(self) -> None:
        """Tells the journal what became of prompts, however long that takes: nothing is lost meanwhile."""
        now_s = time.monotonic()
        for run in self._running():
            if run.live or now_s < run.settle_at_s:
                continue
            try:
                if run.put_back:
                    self._journal.release(run.prompt.row)
                elif run.answer is not None:
                    self._commit(run, run.answer)
            except JournalUnavailable:
                if not self._stopping.is_set():
                    run.settle_at_s = now_s + _JOURNAL_RETRY_S
                    continue
            with self._lock:
                del self._runs[run.name]
            run.release.close()
        if self._runs and not any(run.live for run in self._runs.values()):
            self._wake.wait(_JOURNAL_RETRY_S)

    def _commit(self, run: _Run, answer: Answer) -> None:
        counted = self._journal.answer(
            run.prompt.row, answer, moment=self._now(), attempt=run.prompt.attempts
        )
        status = answer.properties["status"]
        log.info(
            "prompt %s request=%s model=%s version=%s status=%s ms=%.0f",
            "answered" if counted else "abandoned", run.prompt.id, self.model, run.lease.version, status,
            (self._now().boot_s - run.started_boot_s) * 1000,
        )  # fmt: skip
        if counted:
            self.answered += 1
            self._outlets[run.prompt.source].answered(run.prompt.row)


def _digest(document: dict[str, Any]) -> bytes:
    """Tells one prompt from another without keeping its text."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()
