"""From a committed version to a runner that has it loaded.

Flow of `load`: [trust] allows the version → it is leased, and memory makes room → a runner starts, and while it
imports its libraries every byte is read again → loaded; on a host where the version is new, once with each number of
threads that may be best. Refuses to load what is not verified. A runner that fails, or is closed meanwhile, is dead.
What fails once it is closed has not failed: it was stopped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store
from edge_agent.cache.verify import check_files
from edge_agent.errors import AgentStopping, EdgeAgentError, PromptError, RunnerError
from edge_agent.host.confinement import Walls
from edge_agent.package import trust
from edge_agent.runner.protocol import Load, Loaded
from edge_agent.serving.memory_budget import Admission, MemoryBudget, MemoryUser
from edge_agent.serving.runner import Runner, StartRunner
from edge_agent.serving.threads import ThreadChoice, measure
from edge_agent.settings.model import ModelSettings

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
"""A large model from a slow card."""
THREADED_FLAVOR = "onnxruntime-genai"
"""The flavor whose number of threads is measured."""

_PEAK_GROWTH = 1.05
"""A peak is written down again when it has grown by this much: a write is not free on a flash card."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model's versions are loaded: what the settings say, and what all models share.

    Attributes:
        threads: how many threads a version runs on.
        budget: memory, shared by all models of this process.
        verify: check every digest before each load.
        public_keys, allow_unsigned_code: `[trust]`, which each version must satisfy before each load.
        unconfined_code: `[trust]`: code of a package may run where a wall of the minimum is missing.
        memory_limit_bytes: for all runners; 0 for none.
        parallel: prompts that one runner answers at once.
        kv_bytes: for the keys and values of running and earlier prompts that one runner keeps.
    """

    settings: ModelSettings
    threads: ThreadChoice
    budget: MemoryBudget
    parallel: int = 1
    kv_bytes: int = 0
    verify: bool
    public_keys: tuple[str, ...]
    allow_unsigned_code: bool
    unconfined_code: bool = False
    memory_limit_bytes: int


@dataclass(kw_only=True)
class LoadedVersion:
    """A version and the runner that has it loaded.

    Attributes:
        reported: what the runner said of itself when it had loaded.
        peak_bytes: its peak of memory, as it was last written down.
    """

    runner: Runner
    record: VersionRecord
    reported: Loaded
    context_tokens: int
    peak_bytes: int = 0

    @property
    def system_refused(self) -> str:
        """What prompts without a system prompt of their own are told where the model refuses the settings'; empty
        where it takes that one."""
        refusal = self.reported.system_refused
        return f"the model refuses the system prompt of this device's settings: {refusal}" if refusal else ""

    @property
    def walls(self) -> dict[str, object]:
        """What stands around its runner, and what does not and why; for the status."""
        return {"stand": self.reported.walls, "missing": self.reported.missing_walls}

    @property
    def unconfined(self) -> str:
        """Which wall of the minimum is missing around code of the package's own, for people; empty if none is."""
        walls = Walls(missing=self.reported.missing_walls)
        lacking = walls.lacking() if trust.runs_own_code(self.record.trust) else ""
        return f"its code runs without a wall that it should have: {lacking}" if lacking else ""


class VersionLoader:
    """One model's. Any thread; it owns the runners that are being started, so that `close` finds them.

    Args:
        model: as the memory budget knows it.
        clock: monotonic seconds.

    Attributes:
        memory_report: why the last load got less memory than it wanted, empty when it got all of it.
    """

    def __init__(
        self,
        model: MemoryUser,
        *,
        loading: Loading,
        store: Store,
        start_runner: StartRunner,
        clock: Callable[[], float],
    ) -> None:
        self.memory_report = ""
        self._model = model
        self._clock = clock
        self._loading = loading
        self._store = store
        self._start_runner = start_runner
        self._lock = threading.Lock()
        self._starting: set[Runner] = set()
        self._refusals: dict[str, str] = {}  # by version; only of those that refuse the system prompt
        self._closed = False

    def load(self, record: VersionRecord) -> LoadedVersion:
        """Checks a version's bytes and loads them in a new runner.

        Raises:
            AgentStopping: it was closed meanwhile.
            EdgeAgentError: it is damaged, or does not load; no runner is left.
        """
        loading = self._loading
        trust.hold(
            record.trust, public_keys=loading.public_keys, allow_unsigned_code=loading.allow_unsigned_code
        )
        wanted_tokens = self._loading.settings.context_tokens
        with (
            self._store.lease(record) as folder,
            self._loading.budget.admit(self._model, record, folder, wanted_tokens) as admission,
        ):
            candidates = self._loading.threads.candidates(record.digest)
            version = self._start(record, folder, admission, candidates[0])
            if len(candidates) > 1 and version.reported.flavor.startswith(THREADED_FLAVOR):
                version = self._choose_threads(version, folder, admission, candidates)
            self.memory_report = admission.warning
        self._refusals.pop(record.key, None)
        if version.system_refused:
            self._refusals[record.key] = version.system_refused
        return version

    def system_refused(self, key: str) -> str:
        """What a version said of the settings' system prompt when it was loaded last, for people; empty if it takes
        it, or has not been loaded yet."""
        return self._refusals.get(key, "")

    def _choose_threads(
        self, version: LoadedVersion, folder: Path, admission: Admission, candidates: Sequence[int]
    ) -> LoadedVersion:
        """Measures a version that is new on this host with each number of threads, one after the other, so that
        memory holds it once; keeps the fastest."""
        rates: dict[int, float] = {}
        record = version.record
        for threads in candidates:
            if rates:
                version.runner.stop()
                version = self._start(record, folder, admission, threads)
            rates[threads] = self._measure(version)
        best = self._loading.threads.choose(record.digest, rates)
        if best != threads:
            version.runner.stop()
            version = self._start(record, folder, admission, best)
        return version

    def _measure(self, version: LoadedVersion) -> float:
        with self.tracked(version.runner):
            try:
                return measure(version.runner, signature=version.reported.signature)
            except PromptError as error:  # too slow, or no room for a prompt
                log.warning(
                    "speed not measured code=%s model=%s reason=%r", error.code, self._model.name, str(error)
                )
                return 0.0

    def _start(
        self, record: VersionRecord, folder: Path, admission: Admission, threads: int
    ) -> LoadedVersion:
        """Starts a runner and loads the version in it. Checks its bytes while the runner imports its libraries.

        Raises:
            EdgeAgentError: it is damaged, or does not load; no runner is left.
        """
        started_s = self._clock()
        generation, sandbox = self._loading.settings.generation, self._loading.settings.sandbox
        kv_bytes = min(self._loading.kv_bytes, admission.spare_bytes)
        runner = self._start_runner()
        with self.tracked(runner):
            try:
                reported = runner.load(
                    Load(
                        folder=str(folder),
                        context_tokens=admission.context_tokens,
                        max_tokens=int(generation.get("max_tokens", 0)),
                        threads=threads,
                        parallel=self._loading.parallel,
                        kv_bytes=kv_bytes,
                        system=self._loading.settings.system,
                        repetition_penalty=generation.get("repetition_penalty", 0.0),
                        network=sandbox.network,
                        read=[str(path) for path in sandbox.read],
                        confined=trust.runs_own_code(record.trust) and not self._loading.unconfined_code,
                        memory_bytes=admission.limit_bytes + kv_bytes,
                        memory_is_short=admission.is_short,
                        shipped_wrapper=trust.runs_shipped_wrapper(record.trust),
                    ),
                    timeout_s=LOAD_TIMEOUT_S,
                    check=lambda: check_files(folder, record, read=self._loading.verify, go_on=self._go_on),
                )
            except RunnerError as error:
                if not self._closed:
                    output = runner.last_output()
                    log.warning(
                        "runner output code=%s model=%s output=%r", error.code, self._model.name, output
                    )
                raise
        log.info(
            "model loaded model=%s version=%s flavor=%r pid=%d threads=%d load_ms=%.0f",
            self._model.name, record.key, reported.flavor, runner.pid, threads,
            (self._clock() - started_s) * 1000,
        )  # fmt: skip
        return LoadedVersion(
            runner=runner,
            record=record,
            reported=replace(reported, parallel=min(reported.parallel, self._loading.parallel)),
            context_tokens=admission.context_tokens,
        )

    @contextmanager
    def tracked(self, runner: Runner) -> Iterator[None]:
        """Lets `close` find a runner that answers no prompts yet, while the block runs. Kills it if the block fails.

        Raises:
            AgentStopping: in place of what failed because of `close`.
        """
        with self._lock:
            self._starting.add(runner)
        try:
            self._go_on()
            yield
        except BaseException as error:
            runner.kill()
            if self._closed and isinstance(error, EdgeAgentError):
                raise AgentStopping from error
            raise
        finally:
            with self._lock:
                self._starting.discard(runner)

    def _go_on(self) -> None:
        """
        Raises:
            AgentStopping: it was closed.
        """
        if self._closed:
            raise AgentStopping

    def fits_beside(self, record: VersionRecord) -> bool:
        """Whether memory is likely to hold this version beside everything that is loaded now."""
        folder, tokens = self._store.folder(record), self._loading.settings.context_tokens
        return self._loading.budget.fits_beside(record, folder, tokens)

    def note_peak(self, version: LoadedVersion) -> None:
        """Writes down the runner's peak of memory, for the next load of this version."""
        peak = version.runner.peak_bytes()
        if peak > version.peak_bytes * _PEAK_GROWTH:
            version.peak_bytes = peak
            self._loading.budget.note_peak(
                version.record, context_tokens=version.context_tokens, peak_bytes=peak
            )

    def starting(self) -> frozenset[Runner]:
        """The runners that answer no prompts yet."""
        with self._lock:
            return frozenset(self._starting)

    def close(self) -> None:
        """Loads nothing any more, and kills the runners that are being started."""
        with self._lock:
            self._closed = True
        for runner in self.starting():
            runner.kill()
