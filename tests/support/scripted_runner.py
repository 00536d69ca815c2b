"""Runners that do what a script says, in this process: whole lives of a model in milliseconds.

A `ScriptedHost` starts the runners, has the memory that they take, and is the clock. A `Life` is one model on it,
with a real store and a real lifecycle.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.errors import EdgeAgentError, RunnerError
from edge_agent.runner.protocol import Delta, Done, Load, Loaded, OnPrompt, Refused, Tried
from edge_agent.serving.footprint import RUNNER_BYTES
from edge_agent.serving.learned import Learned
from edge_agent.serving.lifecycle import ModelLifecycle
from edge_agent.serving.loading import Loading
from edge_agent.serving.memory_budget import MemoryBudget
from edge_agent.serving.threads import ThreadChoice
from edge_agent.settings.model import ModelSettings
from tests.support import committed

RESIDENT_BYTES = RUNNER_BYTES + (100 << 20)
"""What a scripted runner takes: a little more than is estimated for one."""
PLENTY_BYTES = 1 << 40
_LIMIT_S = 20.0


@dataclass(kw_only=True)
class Script:
    """How the runners of one version behave.

    Attributes:
        load_error: how a load ends; None when it succeeds.
        system_refused: why it takes no chat with the settings' system prompt.
        walls, missing_walls: what the runner says of its walls.
        load_waits: a load does not end before `ScriptedHost.let_load`.
        gate_waits: a gate does not end by itself.
        golden: how many golden prompts there are.
        golden_failures: what they got wrong.
        gate_error: how the gate ends instead of with an answer.
        rates: tokens a second, by number of threads.
    """

    load_error: EdgeAgentError | None = None
    load_waits: bool = False
    gate_waits: bool = False
    signature: str = "chat"
    system_refused: str = ""
    system_too_long: bool = False
    walls: list[str] = field(default_factory=list)
    missing_walls: dict[str, str] = field(default_factory=dict)
    golden: int = 2
    golden_failures: list[str] = field(default_factory=list)
    gate_error: RunnerError | None = None
    tokens_per_s: float = 10.0
    peak_bytes: int = 0
    resident_bytes: int = RESIDENT_BYTES
    parallel: int = 4
    rates: Mapping[int, float] = field(default_factory=dict)


class ScriptedHost:
    """Starts runners and has their memory; what happens is in `events`, as `load 2`, `try 2`, `stop 1`, `kill 2`.

    Attributes:
        scripts: by the version's number; a version without one loads and passes.
        memory_bytes: for all runners together.
        now_s: the clock of everything on it.
        name: what `host.identity.of_host` would say.
    """

    def __init__(self) -> None:
        self.scripts: dict[int, Script] = {}
        self.memory_bytes = PLENTY_BYTES
        self.now_s = 1_000.0
        self.name = "this host"
        self.events: list[str] = []
        self.runners: list[ScriptedRunner] = []
        self.changed = threading.Condition()
        self._numbers = itertools.count(1)

    def script(self, version: int, script: Script) -> None:
        """From now on, the version's runners do this."""
        self.scripts[version] = script

    def start_runner(self) -> ScriptedRunner:
        runner = ScriptedRunner(self, next(self._numbers))
        self.runners.append(runner)
        return runner

    def clock(self) -> float:
        return self.now_s

    def available_bytes(self) -> int:
        return self.memory_bytes - sum(runner.resident_bytes() for runner in self.runners)

    def note(self, event: str) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def wait_for(self, event: str) -> None:
        """Returns when it has happened."""
        with self.changed:
            assert self.changed.wait_for(lambda: event in self.events, _LIMIT_S), (event, self.events)

    def let_load(self, version: int) -> None:
        with self.changed:
            self.scripts[version].load_waits = False
            self.changed.notify_all()

    def running(self) -> list[int]:
        """The versions whose runners live."""
        return [runner.version for runner in self.runners if runner.alive]


class ScriptedRunner:
    """One runner; implements `serving.runner.Runner`."""

    def __init__(self, host: ScriptedHost, pid: int) -> None:
        self.suspects: frozenset[str] = frozenset()
        self.version = 0
        self.request: Load | None = None
        self.threads = 0
        self._host = host
        self._pid = pid
        self._alive = True
        self._frames: list[Delta | Done] = []

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def _script(self) -> Script:
        return self._host.scripts.get(self.version, Script())

    def load(self, request: Load, *, timeout_s: float, check: Callable[[], None] = lambda: None) -> Loaded:
        check()
        self.request = request
        self.version = int(Path(request.folder).name.partition("-")[0])
        self._host.note(f"load {self.version}")
        with self._host.changed:
            assert self._host.changed.wait_for(self._may_end_loading, _LIMIT_S), "nobody let it load"
        if not self._alive:
            raise RunnerError("runner died (signal 9)")
        if error := self._script.load_error:
            self.kill()
            raise type(error)(error.message, remedy=error.remedy)
        return Loaded(
            flavor="onnxruntime-genai",
            signature=self._script.signature,
            load_ms=1.0,
            parallel=self._script.parallel,
            system_refused=self._script.system_refused,
            system_too_long=self._script.system_too_long,
            walls=self._script.walls,
            missing_walls=self._script.missing_walls,
        )

    def _may_end_loading(self) -> bool:
        return not (self._alive and self._script.load_waits)

    def try_out(self, *, timeout_s: float, on_prompt: OnPrompt = lambda prompt, of: None) -> Tried:
        self._host.note(f"try {self.version}")
        for prompt in range(1, self._script.golden + 1):
            on_prompt(prompt, self._script.golden)
        if self._script.gate_waits:
            with self._host.changed:
                assert self._host.changed.wait_for(lambda: not self._alive, _LIMIT_S), "nobody ended the gate"
            raise RunnerError("runner died (signal 9)")
        if error := self._script.gate_error:
            self.kill()
            raise type(error)(error.message)
        script = self._script
        return Tried(
            failures=script.golden_failures,
            asked=script.golden,
            tokens_per_s=script.tokens_per_s,
            memory_bytes=script.resident_bytes,
        )

    def fileno(self) -> int:
        return -1

    def start(self, prompt_id: str, document: dict[str, Any], *, timeout_s: float, owner: str = "") -> None:
        tokens = int(document["max_tokens"])
        threads = self.request.threads if self.request else 0
        rate = self._script.rates.get(threads, self._script.tokens_per_s)
        self._frames += [
            Delta(id=prompt_id, text="words"),
            Done(
                id=prompt_id,
                finish_reason="length",
                usage={"completion_tokens": tokens},
                timings={"decode_ms": tokens / rate * 1000},
            ),
        ]

    def receive(self, timeout_s: float) -> Delta | Done | Refused | None:
        return self._frames.pop(0) if self._frames else None

    def generate(
        self, prompt_id: str, document: dict[str, Any], *, timeout_s: float
    ) -> Iterator[Delta | Done]:
        self.start(prompt_id, document, timeout_s=timeout_s)
        while self._frames:
            yield self._frames.pop(0)

    def cancel(self, prompt_id: str) -> None:
        self._frames = [frame for frame in self._frames if frame.id != prompt_id]

    def crash(self) -> None:
        self._end("crash")

    def stop(self) -> None:
        self._end("stop")

    def kill(self) -> None:
        self._end("kill")

    def _end(self, how: str) -> None:
        if self._alive:
            self._alive = False
            self._host.note(f"{how} {self.version}")

    def resident_bytes(self) -> int:
        return self._script.resident_bytes if self._alive and self.version else 0

    def peak_bytes(self) -> int:
        return self._script.peak_bytes if self._alive else 0

    def exit_text(self) -> str:
        return "connection closed" if self._alive else "signal 11"

    def last_output(self) -> str:
        return ""


class Life:
    """One model: its versions are committed, adopted, asked and crashed by number.

    Args:
        budget: of memory; None for one of its own, which never waits.
        measurable: numbers of threads to measure; a single one is not measured.
        settings: of the model.
    """

    def __init__(
        self,
        folder: Path,
        host: ScriptedHost,
        *,
        name: str = "assistant",
        budget: MemoryBudget | None = None,
        measurable: tuple[int, ...] = (1,),
        memory_limit_bytes: int = 0,
        allow_unsigned_code: bool = False,
        unconfined_code: bool = False,
        **settings: Any,
    ) -> None:
        self.host = host
        self.name = name
        self.store = Store(folder / "state")
        self.store.create()
        self.records: dict[int, VersionRecord] = {}
        learned = Learned(self.store.learned_file)
        self.loading = Loading(
            settings=ModelSettings(uri="models:/phi@prod", **settings),
            threads=ThreadChoice(0, learned=learned, measurable=measurable),
            budget=budget or budget_of(host, folder),
            verify=True,
            public_keys=(),
            allow_unsigned_code=allow_unsigned_code,
            unconfined_code=unconfined_code,
            memory_limit_bytes=memory_limit_bytes,
        )
        self.lifecycle = self._start()

    def _start(self) -> ModelLifecycle:
        return ModelLifecycle(
            self.name,
            loading=self.loading,
            store=self.store,
            start_runner=self.host.start_runner,
            clock=self.host.clock,
            host=lambda: self.host.name,
        )

    def restart(self) -> None:
        """As a daemon that ends and starts again."""
        self.lifecycle.close()
        self.lifecycle = self._start()

    def commit(self, *versions: int, **options: Any) -> None:
        for version in versions:
            weights = f"weights of {version} ".encode() * 100
            self.records[version] = committed.commit(
                self.store, version, weights=weights, name=self.name, **options
            )

    def serve(self, *versions: int, **options: Any) -> None:
        """Commits versions and makes one after the other active."""
        for version in versions:
            self.commit(version, **options)
            self.adopt(version)

    def key(self, version: int) -> str:
        return self.records[version].key

    def adopt(self, version: int, **options: Any) -> None:
        self.lifecycle.adopt(self.key(version), **options)

    def ask(self) -> int | None:
        """The version that a prompt gets."""
        with self.lifecycle.lease() as lease:
            return lease.version if lease else None

    def crash(self, *prompts: str) -> None:
        """The active version's runner crashes; these prompts may have been the cause."""
        with self.lifecycle.lease() as lease:
            assert lease is not None, self.lifecycle.reason
            self.newest_runner(lease.version).crash()
            lease.report_crash(frozenset(prompt.encode() for prompt in prompts))

    def newest_runner(self, version: int) -> ScriptedRunner:
        return [runner for runner in self.host.runners if runner.version == version][-1]

    @property
    def active(self) -> int | None:
        """The version that the state on disk says is active."""
        return self._number(self.store.state().model(self.name).active)

    @property
    def previous(self) -> int | None:
        return self._number(self.store.state().model(self.name).previous)

    @property
    def quarantined(self) -> dict[int, str]:
        state = self.store.state().model(self.name)
        return {int(key.partition("-")[0]): reason for key, reason in state.reasons.items()}

    def _number(self, key: str | None) -> int | None:
        return int(key.partition("-")[0]) if key else None


def budget_of(host: ScriptedHost, folder: Path, *, waits: bool = False) -> MemoryBudget:
    """The host's memory for several models.

    Args:
        waits: for other models to end a prompt; else a minute passes at each look at the clock.
    """
    passing = itertools.count(0, 61)
    clock: Callable[[], float] = host.clock if waits else lambda: float(next(passing))
    return MemoryBudget(
        0, learned=Learned(folder / "learned.json"), available=host.available_bytes, clock=clock
    )


class InBackground:
    """Runs an action in a thread; `result` waits for its end and gives its value, or raises its error."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._action()
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(_LIMIT_S)
        assert self.ended, "it did not end"
        if self._error is not None:
            raise self._error
        return self._value
