"""A model's dispatcher: takes prompts from the journal to the runner, and their answers back to the journal.

There is one thread for each model. It owns the prompts that run, several at once where the runner can. A step:

    lease a runner → journal.claim → runner.start … runner.receive, chunks on the way → journal.answer
    → the outlet is told

An answer counts once it is in the journal, and whoever is told reads it there. A prompt that was answered
meanwhile (cancelled, or too late) is abandoned, and what its runner still says is void. A runner that dies costs
the prompt whose turn it was; the others go back into the queue.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

from edge_agent.chat.clock import Moment
from edge_agent.chat.journal import Journal
from edge_agent.chat.prompt import Answer, Prompt, Source
from edge_agent.chat.run import Lease, Run, Runner
from edge_agent.chat.wake import Wake
from edge_agent.errors import (
    DeadlineExceeded,
    JournalUnavailable,
    ModelFailed,
    PromptError,
    RunnerError,
    error_of,
)
from edge_agent.metrics.measurements import Measurements
from edge_agent.runner.protocol import Called, Delta, Done, Refused

log = logging.getLogger(__name__)

_WAIT_S = 0.5
_REST_S = 2.0
"""While nothing runs and nothing waits: a prompt that comes ends it, and what it is late for is a runner that has died
meanwhile, or has idled for long enough."""
_MAX_FRAMES = 64
_JOURNAL_RETRY_S = 1.0


class Host(Protocol):
    """Where runners come from: the model's lifecycle."""

    def lease(self) -> AbstractContextManager[Lease | None]: ...

    def wait_for_change(self, timeout_s: float) -> None: ...

    def wanted_now(self) -> bool: ...

    def unload_when_idle(self) -> None: ...


class Outlet(Protocol):
    """Where the answers go to prompts that came in one way. Called in the dispatcher's thread; must not block."""

    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None: ...

    def answered(self, row: int) -> None: ...


class Dispatcher:
    """One model's queue worker. Any thread may call `notify`, `abandon`, `stop_claiming` and `drain`.

    Args:
        defaults: completes a document with what the settings say where the request says nothing.
        outlets: by the way in which a prompt came in.
        owner_of: what a runner is told instead of a client's name; those with one owner share what a model keeps.
        now: the clock.
        measurements: where its answers are counted; one of its own where nobody looks.

    Attributes:
        service_s: seconds until one of the prompts that run ends, a moving average; the source of `retry_after_ms`.
        tokens_per_s: of the last answer whose speed could be measured.
    """

    def __init__(
        self,
        model: str,
        *,
        host: Host,
        journal: Journal,
        outlets: dict[Source, Outlet],
        defaults: Callable[[dict[str, Any]], dict[str, Any]],
        owner_of: Callable[[str], str],
        now: Callable[[], Moment],
        measurements: Measurements | None = None,
    ) -> None:
        self.model = model
        self.service_s = 2.0
        self.tokens_per_s: float | None = None
        self._host = host
        self._journal = journal
        self._outlets = outlets
        self._defaults = defaults
        self._owner_of = owner_of
        self._now = now
        self._measurements = measurements or Measurements((model,))
        self._wake = Wake()
        self._may_claim = True
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._idle = threading.Event()
        self._idle.set()

    def run(self) -> None:
        """The thread: steps until `drain`, and until what runs has ended."""
        while self._runs or not self._stopping.is_set():
            self.step()

    def step(self) -> None:
        """Starts the prompts that the runner has room for, then takes what the runner says. Waits a little where
        there is neither, or no runner."""
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
        """Stops a prompt that has been answered by somebody else, if it runs now."""
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
        self._idle.wait(timeout_s)
        for run in self._running():
            log.info("prompt put back request=%s model=%s", run.prompt.id, self.model)
            with contextlib.suppress(JournalUnavailable):  # it counts as a death then, and runs again
                self._journal.release(run.prompt.row)
            run.lease.runner.cancel(run.name)

    def _running(self) -> list[Run]:
        with self._lock:
            return list(self._runs.values())

    # --- From the queue to the runner ------------------------------------------------------------------

    def _seek(self) -> None:
        """While nothing runs: starts what waits, or waits a little for a prompt or a runner."""
        if not self._host.wanted_now() and not self._waiting():
            self._host.unload_when_idle()
            self._wake.wait(_REST_S)
            return
        started = self._start_next()
        if started:
            self._fill()
        elif started is None:
            self._host.wait_for_change(_WAIT_S)
        else:
            self._host.unload_when_idle()
            self._wake.wait(_REST_S)

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
        run = Run(prompt=prompt, lease=lease, release=release, started_boot_s=now_s)
        with self._lock:
            self._runs[run.name] = run
            self._idle.clear()
        log.info(
            "prompt starts request=%s model=%s version=%s attempt=%d",
            prompt.id, self.model, lease.version, prompt.attempts,
        )  # fmt: skip
        try:
            remaining_s = prompt.deadline_boot_s - now_s
            if remaining_s <= 0:
                raise DeadlineExceeded("the deadline passed before the prompt could start")
            document = self._defaults(prompt.document)
            if lease.system_refused and document.get("messages") != prompt.document.get("messages"):
                raise ModelFailed(lease.system_refused)  # not the client's fault: it brought no system prompt
            lease.runner.start(run.name, document, timeout_s=remaining_s, owner=self._owner_of(prompt.client))
        except PromptError as error:
            run.answer = run.refusal(error)
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

    def _take(self, frame: Delta | Called | Done | Refused) -> None:
        run = self._runs.get(frame.id)
        if run is None or not run.live:  # it ended here before the runner heard of it
            return
        try:
            if isinstance(frame, Refused):
                error = error_of(frame.code, frame.message, among=(PromptError,), otherwise=ModelFailed)
                run.answer = run.refusal(error)
            elif isinstance(frame, Done):
                run.answer = self._finish(run, frame)
            elif isinstance(frame, Called):
                run.take_call(frame)
            elif not run.abandoned.is_set():
                self._send_chunk(run, run.take_text(frame.text, self._now().boot_s))
        except Exception as error:  # noqa: BLE001 - the other prompts go on
            run.answer = self._fail(run, error)

    def _on_death(self, runner: Runner, error: RunnerError) -> None:
        """The prompts whose turn it was get 500, since they may be the cause; the others run again.

        When the agent stops, all of them run again: it ends the runners itself, so no prompt is to blame.
        """
        runs = [run for run in self._runs.values() if run.live]
        if not runs:
            return
        if self._stopping.is_set():
            for run in runs:
                run.put_back = True
            return
        suspects = [run for run in runs if run.name in runner.suspects] or runs
        suspects[0].lease.report_crash(frozenset(run.digest for run in suspects))
        for run in runs:
            if run in suspects:
                log.warning(
                    "runner failed code=%s request=%s model=%s error=%r",
                    error.code,
                    run.prompt.id,
                    self.model,
                    str(error),
                )
                failed = ModelFailed("the model's process failed while it answered this prompt")
                run.answer = run.refusal(failed)
            else:
                log.info("prompt put back request=%s model=%s", run.prompt.id, self.model)
                run.put_back = True
                self._may_claim = True

    def _send_chunk(self, run: Run, document: dict[str, Any] | None) -> None:
        if document is not None:
            self._outlets[run.prompt.source].chunk(run.prompt, document)

    def _finish(self, run: Run, done: Done) -> Answer:
        ended = self._now()
        timings = run.timings(done, ended.boot_s)
        if run.tool_calls:
            self._send_chunk(run, run.chunk(None, calls=True))
        self._send_chunk(run, run.chunk(done.finish_reason))
        shared_s = (ended.boot_s - run.started_boot_s) / len(self._runs)
        self.service_s += 0.2 * (shared_s - self.service_s)
        self.tokens_per_s = timings["tokens_per_s"] or self.tokens_per_s
        run.took = run.measured(done, ended.boot_s)
        return run.completion(done, timings, ended)

    def _fail(self, run: Run, error: Exception) -> Answer:
        """The answer where something happened that nobody foresaw."""
        log.error(
            "prompt failed code=model_failed request=%s model=%s", run.prompt.id, self.model, exc_info=error
        )
        run.lease.runner.cancel(run.name)
        return run.refusal(ModelFailed("the agent failed on this prompt"))

    # --- Back to the journal ---------------------------------------------------------------------------

    def _settle(self) -> None:
        """Tells the journal what became of the prompts, and tries again until it knows: nothing is lost meanwhile."""
        now_s = self._now().boot_s
        for run in self._running():
            if run.live or now_s < run.settle_at_boot_s:
                continue
            try:
                if run.put_back:
                    self._journal.release(run.prompt.row)
                elif run.answer is not None:
                    self._commit(run, run.answer)
            except JournalUnavailable:
                if not self._stopping.is_set():
                    run.settle_at_boot_s = now_s + _JOURNAL_RETRY_S
                    continue
            with self._lock:
                del self._runs[run.name]
                if not self._runs:
                    self._idle.set()
            run.release.close()
        if self._runs and not any(run.live for run in self._runs.values()):
            self._wake.wait(_JOURNAL_RETRY_S)

    def _commit(self, run: Run, answer: Answer) -> None:
        counted = self._journal.answer(
            run.prompt.row, answer, moment=self._now(), attempt=run.prompt.attempts
        )
        ms = (self._now().boot_s - run.started_boot_s) * 1000
        if not counted:  # why, whoever answered it has said: this says when the model had ended it
            log.info(
                "prompt abandoned request=%s model=%s version=%s ms=%.0f",
                run.prompt.id, self.model, run.lease.version, ms,
            )  # fmt: skip
            return
        log.info(
            "prompt answered request=%s code=%s model=%s version=%s status=%s ms=%.0f",
            run.prompt.id, answer.code, self.model, run.lease.version, answer.properties["status"], ms,
        )  # fmt: skip
        self._measurements.note_answer(self.model, answer.code, run.took)
        self._outlets[run.prompt.source].answered(run.prompt.row)
