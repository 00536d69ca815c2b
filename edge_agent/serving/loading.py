"""From a committed version to a runner that has it loaded.

Flow of `load`: what [trust] says → the version is leased, memory makes room → a runner starts, and while it imports
its libraries every byte is read again → loaded; on a host where it is new, once with each number of threads that
may be best. Refuses to load what is not verified. A runner that fails, or is closed meanwhile, is dead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_agent.cache.record import VersionRecord
from edge_agent.cache.store import Store, check_files
from edge_agent.errors import PromptError, RunnerError
from edge_agent.host.memory import peak_bytes
from edge_agent.package import trust
from edge_agent.runner.process import RunnerProcess
from edge_agent.runner.protocol import Load, Loaded
from edge_agent.serving.memory_budget import Admission, MemoryBudget, Tenant
from edge_agent.serving.threads import ThreadChoice, measure
from edge_agent.settings import ModelSettings

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
"""A large model from a slow card."""
THREADED_FLAVOR = "onnxruntime-genai"
"""The flavor whose number of threads is measured."""

_PEAK_GROWTH = 1.05
"""A peak is written down again when it has grown by this much: a write is not free on a flash card."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How versions are loaded: what lifecycles get from the settings.

    Attributes:
        threads: how many threads a version runs on.
        budget: memory, shared by all models of this process.
        verify: check every digest before a load.
        public_keys, allow_unsigned_code: `[trust]`, held against each version before each load.
        memory_limit_bytes: for all runners; 0 for none.
        parallel: prompts that one runner answers at once.
        kv_bytes: for what one runner keeps in mind of running and earlier prompts.
    """

    settings: ModelSettings
    threads: ThreadChoice
    budget: MemoryBudget
    parallel: int = 1
    kv_bytes: int = 0
    verify: bool
    public_keys: tuple[str, ...]
    allow_unsigned_code: bool
    memory_limit_bytes: int


@dataclass(kw_only=True)
class LoadedVersion:
    """A version and the runner that has it loaded.

    Attributes:
        told: what the runner said of itself.
        peak_bytes: the most memory that is written down of its runner.
    """

    runner: RunnerProcess
    record: VersionRecord
    told: Loaded
    context_tokens: int
    peak_bytes: int = 0


class VersionLoader:
    """One model's. Any thread; it owns the runners that are being started, so that `close` finds them.

    Args:
        tenant: the model, as the memory budget knows it.
        start_runner: makes a runner process that has not loaded anything yet.

    Attributes:
        memory_report: what the last load had to do without, empty when it had all that it wanted.
    """

    def __init__(
        self, tenant: Tenant, *, loading: Loading, store: Store, start_runner: Callable[[], RunnerProcess]
    ) -> None:
        self.memory_report = ""
        self._tenant = tenant
        self._loading = loading
        self._store = store
        self._start_runner = start_runner
        self._lock = threading.Lock()
        self._starting: set[RunnerProcess] = set()
        self._closed = False

    def load(self, record: VersionRecord) -> LoadedVersion:
        """Checks a version's bytes and loads them in a new runner.

        Raises:
            EdgeAgentError: damaged, or it does not load; no runner is left.
        """
        loading = self._loading
        trust.hold(
            record.trust, public_keys=loading.public_keys, allow_unsigned_code=loading.allow_unsigned_code
        )
        wanted_tokens = self._loading.settings.context_tokens
        with (
            self._store.lease(record) as folder,
            self._loading.budget.admit(self._tenant, record, folder, wanted_tokens) as admission,
        ):
            candidates = self._loading.threads.candidates(record.digest)
            version = self._start(record, folder, admission, candidates[0])
            if len(candidates) > 1 and version.told.flavor.startswith(THREADED_FLAVOR):
                version = self._choose_threads(version, folder, admission, candidates)
            self.memory_report = admission.warning
        return version

    def _choose_threads(
        self, version: LoadedVersion, folder: Path, admission: Admission, candidates: Sequence[int]
    ) -> LoadedVersion:
        """Measures a version that is new on this host with each number of threads, one after the other, so
        that memory holds it once; the fastest stays."""
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
        with self.in_reach(version.runner):
            try:
                return measure(version.runner, signature=version.told.signature)
            except PromptError as error:  # too slow, or no room for a prompt: then nothing is learned
                log.warning("speed not measured model=%s reason=%r", self._tenant.name, str(error))
                return 0.0

    def _start(
        self, record: VersionRecord, folder: Path, admission: Admission, threads: int
    ) -> LoadedVersion:
        """One runner with the version loaded. Its bytes are checked while it imports its libraries.

        Raises:
            EdgeAgentError: damaged, or it does not load; no runner is left.
        """
        started_s = time.monotonic()
        runner = self._start_runner()
        with self.in_reach(runner):
            try:
                check_files(folder, record, read=self._loading.verify)
                told = runner.load(
                    Load(
                        folder=str(folder),
                        context_tokens=admission.context_tokens,
                        max_tokens=self._loading.settings.max_tokens,
                        threads=threads,
                        parallel=self._loading.parallel,
                        kv_bytes=min(self._loading.kv_bytes, admission.spare_bytes),
                    ),
                    timeout_s=LOAD_TIMEOUT_S,
                )
            except RunnerError:
                if not self._closed:
                    log.warning("runner output model=%s output=%r", self._tenant.name, runner.last_output())
                raise
        log.info(
            "model loaded model=%s version=%s flavor=%r pid=%d threads=%d load_ms=%.0f",
            self._tenant.name, record.key, told.flavor, runner.pid, threads,
            (time.monotonic() - started_s) * 1000,
        )  # fmt: skip
        return LoadedVersion(runner=runner, record=record, told=told, context_tokens=admission.context_tokens)

    @contextmanager
    def in_reach(self, runner: RunnerProcess) -> Iterator[None]:
        """For the block, `close` finds a runner that answers no prompts yet; it is dead when the block fails."""
        with self._lock:
            self._starting.add(runner)
            closed = self._closed
        try:
            if closed:
                raise RunnerError("the agent is stopping")
            yield
        except BaseException:
            runner.kill()
            raise
        finally:
            with self._lock:
                self._starting.discard(runner)

    def fits_beside(self, record: VersionRecord) -> bool:
        """Whether memory is likely to hold a second model while the first goes on answering."""
        folder, tokens = self._store.folder(record), self._loading.settings.context_tokens
        return self._loading.budget.fits_beside(record, folder, tokens)

    def note_peak(self, version: LoadedVersion) -> None:
        """What the next load of this version should expect; of the runner's whole life so far."""
        peak = peak_bytes(version.runner.pid) if version.runner.alive else 0
        if peak > version.peak_bytes * _PEAK_GROWTH:
            version.peak_bytes = peak
            self._loading.budget.note_peak(
                version.record, context_tokens=version.context_tokens, peak_bytes=peak
            )

    def starting(self) -> frozenset[RunnerProcess]:
        """The runners that answer no prompts yet."""
        with self._lock:
            return frozenset(self._starting)

    def close(self) -> None:
        """Nothing is loaded any more; what was on its way is killed."""
        with self._lock:
            self._closed = True
        for runner in self.starting():
            runner.kill()
