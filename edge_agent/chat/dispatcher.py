"""A model's dispatcher: takes prompts from the journal to the runner, and answers back to the journal.

One thread for each model; it owns the prompt that runs. Flow of a step:

    lease a runner → journal.claim → runner.generate, chunks on the way → journal.answer → the outlet is told

An answer counts once it is in the journal: whoever is told reads it from there. A prompt that was answered
meanwhile (cancelled, too late) is abandoned, and what its runner still says is void.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from edge_agent.chat import messages
from edge_agent.chat.clock import Moment
from edge_agent.chat.journal import Answer, Journal, Prompt, Source
from edge_agent.errors import (
    Cancelled,
    DeadlineExceeded,
    JournalUnavailable,
    ModelFailed,
    PromptError,
    RunnerError,
)
from edge_agent.runner.protocol import Delta, Done

log = logging.getLogger(__name__)

CHUNK_INTERVAL_S = 0.05
"""At most 20 chunks a second: a message a token costs three times the CPU of the generation itself."""

_WAIT_S = 0.5
_JOURNAL_RETRY_S = 1.0


class Runner(Protocol):
    """What a dispatcher needs of a loaded model."""

    def generate(
        self, prompt_id: str, document: dict[str, Any], *, timeout_s: float
    ) -> Iterator[Delta | Done]: ...

    def cancel(self, prompt_id: str) -> None: ...


class Lease(Protocol):
    """A runner for one prompt, and the version that it runs."""

    @property
    def runner(self) -> Runner: ...

    @property
    def version(self) -> int: ...

    @property
    def blame(self) -> Callable[[bytes], None]: ...


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


@dataclass(kw_only=True)
class _Run:
    """The prompt that runs now."""

    prompt: Prompt
    runner: Runner
    version: int
    blame: Callable[[bytes], None]
    started_boot_s: float
    first_boot_s: float | None = None
    text: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    seq: int = 0
    sent_boot_s: float = 0.0
    abandoned: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> str:
        """The request's id, for the runner's own log, and what makes it unique for each row and attempt: a late
        cancel of an earlier prompt can never hit this one."""
        return f"{self.prompt.id}.{self.prompt.row}.{self.prompt.attempts}"


class Dispatcher:
    """One model's queue worker. `notify`, `abandon` and `drain` may come from any thread.

    Args:
        defaults: adds to a document what the settings say for requests that leave it open.
        outlets: by the way a prompt came in.
        now: the clock.

    Attributes:
        service_s: how long a prompt takes, a moving average; what `retry_after_ms` comes from.
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
        self._work = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._run: _Run | None = None

    def run(self) -> None:
        """The thread: steps until `drain`."""
        while not self._stopping.is_set():
            self.step()

    def step(self) -> None:
        """Runs one prompt, or waits a little for a runner or a prompt."""
        self._work.clear()
        if not self._host.wanted_now() and not self._waiting():
            self._host.unload_when_idle()
            self._work.wait(_WAIT_S)
            return
        with self._host.lease() as lease:
            if lease is not None:
                prompt = self._claim()
                if prompt is not None:
                    self._serve(prompt, lease)
                    return
        if lease is None:
            self._host.wait_for_change(_WAIT_S)
        else:
            self._host.unload_when_idle()
            self._work.wait(_WAIT_S)

    def notify(self) -> None:
        """A prompt waits."""
        self._work.set()

    def abandon(self, row: int) -> None:
        """Stops the prompt if it runs now; its answer has been given."""
        with self._lock:
            run = self._run
        if run is not None and run.prompt.row == row:
            run.abandoned.set()
            run.runner.cancel(run.name)

    def stop_claiming(self) -> None:
        """Takes no more prompts."""
        self._stopping.set()
        self._work.set()

    def drain(self, timeout_s: float) -> None:
        """Gives the running prompt `timeout_s`, then puts it back into the queue."""
        self.stop_claiming()
        deadline_s = time.monotonic() + timeout_s
        while (run := self._run) is not None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        if run is not None:
            log.warning("prompt put back request=%s model=%s", run.prompt.id, self.model)
            with contextlib.suppress(JournalUnavailable):  # it counts as a death then, and runs again
                self._journal.release(run.prompt.row)
            run.runner.cancel(run.name)

    def _waiting(self) -> bool:
        try:
            return self._journal.waiting(self.model)
        except JournalUnavailable:
            return False

    def _claim(self) -> Prompt | None:
        if self._stopping.is_set():
            return None
        try:
            return self._journal.claim(self.model)
        except JournalUnavailable:
            return None  # the journal's `trouble` is in the status; the prompt waits there

    def _serve(self, prompt: Prompt, lease: Lease) -> None:
        run = _Run(
            prompt=prompt,
            runner=lease.runner,
            version=lease.version,
            blame=lease.blame,
            started_boot_s=self._now().boot_s,
        )
        with self._lock:
            self._run = run
        try:
            # Cancelled, or too late, between the claim and the line above: nobody has told this run.
            if not self._journal.running(prompt.row):
                run.abandoned.set()
            answer = self._generate(run)
            self._commit(run, answer)
        finally:
            with self._lock:
                self._run = None

    def _generate(self, run: _Run) -> Answer:
        """The prompt's terminal answer, whatever happens."""
        try:
            return self._complete(run)
        except RunnerError as error:
            run.blame(_digest(run.prompt.document))
            log.warning("runner failed request=%s model=%s error=%r", run.prompt.id, self.model, str(error))
            return self._refuse(run, ModelFailed("the model's process failed while it answered this prompt"))
        except PromptError as error:
            return self._refuse(run, error)
        except Exception:
            log.exception("prompt failed request=%s model=%s", run.prompt.id, self.model)
            return self._refuse(run, ModelFailed("the agent failed on this prompt"))

    def _complete(self, run: _Run) -> Answer:
        prompt = run.prompt
        if run.abandoned.is_set():
            raise Cancelled("answered before it could start")
        remaining_s = prompt.deadline_boot_s - self._now().boot_s
        if remaining_s <= 0:
            raise DeadlineExceeded("the deadline passed before the prompt could start")
        log.info(
            "prompt starts request=%s model=%s version=%s attempt=%d",
            prompt.id,
            self.model,
            run.version,
            prompt.attempts,
        )
        for item in run.runner.generate(run.name, self._defaults(prompt.document), timeout_s=remaining_s):
            if isinstance(item, Done):
                return self._finish(run, item)
            if (
                run.abandoned.is_set()
            ):  # a cancel that came before the runner had the prompt did nothing there
                run.runner.cancel(run.name)
                continue
            self._on_text(run, item.text)
        raise ModelFailed("the model gave no answer")

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
        self.service_s += 0.2 * (ended_s - run.started_boot_s - self.service_s)
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

    def _properties(self, run: _Run, status: int) -> dict[str, str]:
        return {"status": str(status), "model": self.model, "version": str(run.version)}

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

    def _commit(self, run: _Run, answer: Answer) -> None:
        """Puts the answer into the journal, however long that takes; nothing else could be accepted anyway."""
        while True:
            try:
                counted = self._journal.answer(
                    run.prompt.row, answer, moment=self._now(), attempt=run.prompt.attempts
                )
                break
            except JournalUnavailable:
                if self._stopping.wait(_JOURNAL_RETRY_S):
                    return
        status = answer.properties["status"]
        log.info(
            "prompt %s request=%s model=%s version=%s status=%s ms=%.0f",
            "answered" if counted else "abandoned", run.prompt.id, self.model, run.version, status,
            (self._now().boot_s - run.started_boot_s) * 1000,
        )  # fmt: skip
        if counted:
            self.answered += 1
            self._outlets[run.prompt.source].answered(run.prompt.row)


def _digest(document: dict[str, Any]) -> bytes:
    """Tells one prompt from another without keeping its text."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()
