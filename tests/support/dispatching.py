"""Partners of a dispatcher that do what a test tells them: a runner, the host that lends it, an outlet, and a clock.

They implement the Protocols that the dispatcher declares. The journal is the real one, and no thread runs: a test
calls `step`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_agent.chat.clock import Moment
from edge_agent.chat.dispatcher import Dispatcher
from edge_agent.chat.journal import Journal
from edge_agent.chat.messages import Form
from edge_agent.chat.prompt import Answer, Arrival, Prompt, Source
from edge_agent.errors import RunnerError
from edge_agent.metrics.measurements import Measurements
from edge_agent.runner.protocol import Called, Delta, Done, Refused, with_system

MODEL = "assistant"


class ScriptedClock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.moment = Moment(boot_id="boot-1", boot_s=100.0, wall_s=1_000_000.0)

    def __call__(self) -> Moment:
        return self.moment

    def advance(self, seconds: float) -> None:
        self.moment = replace(
            self.moment, boot_s=self.moment.boot_s + seconds, wall_s=self.moment.wall_s + seconds
        )


@dataclass(frozen=True, kw_only=True)
class Started:
    """A prompt that the runner was given."""

    name: str
    document: dict[str, Any]
    timeout_s: float
    owner: str = ""


class ScriptedRunner:
    """Says the frames that the test puts into `frames`; an exception among them is raised.

    Its descriptor is always readable, so that the dispatcher never waits for it.

    Attributes:
        on_start: called with the name of each prompt before the runner has it; may raise.
    """

    def __init__(self) -> None:
        self.suspects: frozenset[str] = frozenset()
        self.started: list[Started] = []
        self.cancelled: list[str] = []
        self.frames: deque[Delta | Called | Done | Refused | RunnerError] = deque()
        self.on_start: Callable[[str], None] = lambda name: None
        self._descriptor = os.eventfd(1, os.EFD_CLOEXEC)

    def close(self) -> None:
        os.close(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def start(self, prompt_id: str, document: dict[str, Any], *, timeout_s: float, owner: str = "") -> None:
        self.on_start(prompt_id)
        self.started.append(Started(name=prompt_id, document=document, timeout_s=timeout_s, owner=owner))

    def receive(self, timeout_s: float) -> Delta | Called | Done | Refused | None:
        frame = self.frames.popleft() if self.frames else None
        if isinstance(frame, RunnerError):
            raise frame
        return frame

    def cancel(self, prompt_id: str) -> None:
        self.cancelled.append(prompt_id)

    def say(self, name: str, *texts: str) -> None:
        self.frames.extend(Delta(id=name, text=text) for text in texts)

    def call(self, name: str, tool: str, *parts: str, index: int = 0) -> None:
        """A call of a tool, its arguments in parts."""
        self.frames.extend(Called(id=name, index=index, name=tool, arguments=part) for part in parts)

    def finish(self, name: str, *texts: str, tokens: int = 2, finish_reason: str = "stop") -> None:
        """The last texts of an answer, and its end."""
        self.say(name, *texts)
        usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
        self.frames.append(Done(id=name, finish_reason=finish_reason, usage=usage, timings={}))

    def die(self, *suspects: str) -> None:
        """Its process ends; these prompts had the turn."""
        self.suspects = frozenset(suspects)
        self.frames.append(RunnerError("runner died (exit code -11)"))


@dataclass(kw_only=True)
class ScriptedHost:
    """Lends one runner, or none while `runner` is None.

    Attributes:
        leases: how many are out now.
        on_lease: called while the model would load.
    """

    runner: ScriptedRunner | None
    version: int = 7
    parallel: int = 1
    system_refused: str = ""
    leases: int = 0
    wanted: bool = False
    waits: int = 0
    unloads: int = 0
    crashes: list[frozenset[bytes]] = field(default_factory=list)
    on_lease: Callable[[], None] = lambda: None

    def lease(self) -> ScriptedLoan:
        return ScriptedLoan(self)

    def wait_for_change(self, timeout_s: float) -> None:
        self.waits += 1

    def wanted_now(self) -> bool:
        return self.wanted

    def unload_when_idle(self) -> None:
        self.unloads += 1


class ScriptedLoan:
    """Counts its lease until it is closed. Not a generator: the garbage collector would close one that is forgotten."""

    def __init__(self, host: ScriptedHost) -> None:
        self._host = host

    def __enter__(self) -> ScriptedLease | None:
        host = self._host
        host.on_lease()
        if host.runner is None:
            return None
        host.leases += 1
        return ScriptedLease(
            runner=host.runner,
            version=host.version,
            parallel=host.parallel,
            system_refused=host.system_refused,
            report_crash=host.crashes.append,
        )

    def __exit__(self, *_: object) -> None:
        if self._host.runner is not None:
            self._host.leases -= 1


@dataclass(frozen=True, kw_only=True)
class ScriptedLease:
    runner: ScriptedRunner
    version: int
    parallel: int
    system_refused: str
    report_crash: Callable[[frozenset[bytes]], None]


@dataclass(kw_only=True)
class ScriptedOutlet:
    """Keeps what it is told.

    Attributes:
        on_chunk: called with each chunk; may raise.
    """

    chunks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    on_chunk: Callable[[dict[str, Any]], None] = lambda document: None

    def chunk(self, prompt: Prompt, document: dict[str, Any]) -> None:
        self.on_chunk(document)
        self.chunks.append(document)

    def answered(self, row: int) -> None:
        self.rows.append(row)


class Desk:
    """A dispatcher between a real journal and its scripted partners.

    Attributes:
        system: the settings' system prompt.
    """

    def __init__(self, folder: Path) -> None:
        self.clock = ScriptedClock()
        self.journal = Journal(folder / "journal.db", moment=self.clock())
        self.runner = ScriptedRunner()
        self.host = ScriptedHost(runner=self.runner)
        self.outlet = ScriptedOutlet()
        self.system = ""
        self.measurements = Measurements((MODEL,))
        self.dispatcher = Dispatcher(
            MODEL,
            host=self.host,
            journal=self.journal,
            outlets={Source.MQTT: self.outlet},
            defaults=lambda document: with_system({"temperature": 0.5, **document}, self.system),
            owner_of=lambda client: f"owner of {client}",
            now=self.clock,
            measurements=self.measurements,
        )

    def close(self) -> None:
        self.journal.close()
        self.runner.close()

    @property
    def measured(self) -> dict[str, Any]:
        """What the metrics say of the model."""
        return dict(self.measurements.document()["models"][MODEL])

    @property
    def counted(self) -> dict[str, int]:
        """Its answers, by their code."""
        return dict(self.measured["answers"])

    def accept(
        self,
        request_id: str,
        *,
        deadline_s: float = 60.0,
        stream: bool = False,
        messages: list[dict[str, str]] | None = None,
    ) -> int:
        """A prompt comes: its row. The dispatcher is told, as intake tells it.

        Args:
            messages: of a chat; without them it is a raw prompt.
        """
        arrival = Arrival(
            id=request_id,
            identity=request_id.encode(),
            body_sha256=b"b" * 32,
            source=Source.MQTT,
            model=MODEL,
            document={"messages": messages} if messages else {"prompt": request_id},
            form=Form.JSON,
            stream=stream,
            answer_topic="replies/1",
            correlation=None,
            deadline_s=deadline_s,
        )
        row = self.journal.accept(arrival, moment=self.clock(), queue_depth=100, retry_after_ms=1).row
        self.dispatcher.notify()
        return row

    def start(self, *request_ids: str, stream: bool = False) -> list[str]:
        """Prompts come, and run: the names by which the runner has them."""
        before = len(self.runner.started)
        for request_id in request_ids:
            self.accept(request_id, stream=stream)
        self.dispatcher.step()
        names = [started.name for started in self.runner.started[before:]]
        assert len(names) == len(request_ids), "not all of them run"
        return names

    def end(self, row: int, status: int) -> None:
        """Somebody else answers: a cancel, or a deadline. As intake does it."""
        answer = Answer(payload=b"{}", properties={"status": str(status)})
        assert self.journal.answer(row, answer, moment=self.clock())
        self.dispatcher.abandon(row)

    def answer(self, row: int) -> tuple[dict[str, Any], dict[str, str]]:
        """The document and the properties of an answer."""
        outgoing = self.journal.deliveries.of(row)
        assert outgoing is not None, "it has no answer"
        return json.loads(outgoing.answer.payload), outgoing.answer.properties

    def text(self, row: int) -> str:
        document, properties = self.answer(row)
        assert properties["status"] == "200"
        return str(document["choices"][0]["message"]["content"])

    def status(self, row: int) -> int | None:
        outgoing = self.journal.deliveries.of(row)
        return int(outgoing.answer.properties["status"]) if outgoing else None

    @contextlib.contextmanager
    def journal_locked(self) -> Iterator[None]:
        """Nothing can be committed: another process has the file."""
        self.journal._file._db.execute("PRAGMA busy_timeout=1")
        with contextlib.closing(sqlite3.connect(self.journal.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                other.execute("ROLLBACK")
