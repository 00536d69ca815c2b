"""What a version would take of this device, before anything moves: `ctl/plan`.

Owns one thread, which answers one question after the other. A question costs a process that asks the registry for a
manifest at most; it neither waits for the turn of an update nor takes it. Refuses more questions than a few at once.

    ask → the registry: how many bytes → room in the cache and in memory → quarantine, pin, the line → answer
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from edge_agent.cache import eviction
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import (
    ActivationHeld,
    CacheFull,
    EdgeAgentError,
    LinkHeld,
    MemoryShort,
    Pinned,
    QueueFull,
    RegistryRefused,
    SettingsError,
    StoreError,
    TransportError,
    UnknownModel,
    UnknownReference,
)
from edge_agent.package.reference import ModelRef
from edge_agent.settings import Settings
from edge_agent.sync.process import run_outline
from edge_agent.sync.protocol import Outline, SyncJob
from edge_agent.updates.choice import wanted_ref
from edge_agent.updates.link import Link
from edge_agent.updates.syncs import NoteRegistry, job_of

log = logging.getLogger(__name__)

MAX_WAITING = 8
"""Questions that wait; each may take as long as the registry takes to answer."""
TIMEOUT_S = 120.0


class Served(Protocol):
    """What serves a model, as far as a plan looks at it."""

    @property
    def state(self) -> ModelState: ...


class RunOutline(Protocol):
    """Asks what a version would take, as `sync.process.run_outline` does."""

    def __call__(self, job: SyncJob, *, timeout_s: float, should_stop: Callable[[], bool]) -> Outline: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer.

    Attributes:
        missing_bytes: to fetch; None where nobody knows.
        free_bytes: what the cache may take, once everything is removed that nothing needs; None where it cannot be
            looked at.
        fits: cache and memory have room for it; None where nobody knows.
        would_start_at: when the line may be used or, where nothing is missing, when the version may take over, in
            seconds since 1970; None for at once, and where nobody knows.
        code: why it would not be taken, or not yet; None where it would be at once.
        reason: the same, for people.
    """

    missing_bytes: int | None = None
    free_bytes: int | None = None
    fits: bool | None = None
    would_start_at: int | None = None
    code: str | None = None
    reason: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)

    def because(self, error: EdgeAgentError) -> Plan:
        return replace(self, code=error.code, reason=str(error))


@dataclass(frozen=True, kw_only=True)
class _Question:
    name: str
    version: int
    answer: Callable[[Plan], None]


class Plans:
    """`run` is the thread; `ask` may be called from any.

    Args:
        lifecycles: by configured name.
        link: when the line may be used.
        attainable_bytes: of memory, for one model.
        note_registry: told how the registry was.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        lifecycles: Mapping[str, Served],
        *,
        link: Link,
        attainable_bytes: Callable[[], int],
        note_registry: NoteRegistry,
        run_outline: RunOutline = run_outline,
    ) -> None:
        self._settings = settings
        self._store = store
        self._lifecycles = lifecycles
        self._link = link
        self._attainable_bytes = attainable_bytes
        self._note_registry = note_registry
        self._run_outline = run_outline
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Question] = collections.deque()
        self._closing = False

    def ask(self, name: str, version: int, answer: Callable[[Plan], None]) -> None:
        """
        Args:
            name: of a model, in the settings.
            answer: called once, in the thread.

        Raises:
            UnknownModel: the settings have no such model.
            QueueFull: too many wait.
        """
        if name not in self._lifecycles:
            known = ", ".join(self._lifecycles) or "none"
            raise UnknownModel(f"no model is called {name[:80]!r} here; there are: {known}")
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                raise QueueFull(f"{MAX_WAITING} plans wait already")
            self._waiting.append(_Question(name=name, version=version, answer=answer))
            self._changed.notify_all()

    def run(self) -> None:
        """The thread."""
        while self.step():
            pass

    def step(self) -> bool:
        """Waits for a question, and answers it; False where there will be none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return False
            question = self._waiting.popleft()
        try:
            plan = self.plan(question.name, question.version)
        except Exception:  # whatever a question was: the next one is answered
            log.exception("plan failed code=internal model=%s version=%d", question.name, question.version)
            plan = Plan().because(EdgeAgentError("the agent failed on this question"))
        log.info(
            "plan code=%s model=%s version=%d fits=%s", plan.code, question.name, question.version, plan.fits
        )
        question.answer(plan)
        return True

    def close(self) -> None:
        """Ends `run`, and what it asks the registry."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def plan(self, name: str, version: int) -> Plan:
        """What the version would take now.

        Args:
            name: of a model, in the settings.
        """
        plan = Plan()
        try:
            plan = Plan(free_bytes=self._free_bytes())
            outline = self._outline(self._ref(name, version), name)
        except EdgeAgentError as error:
            return plan.because(error)
        except OSError as error:  # no memory, descriptors or space for a process
            return plan.because(StoreError(f"the registry cannot be asked: {error}"))
        return self._judge(plan, outline, self._lifecycles[name].state)

    def _ref(self, name: str, version: int) -> ModelRef:
        return wanted_ref(self._settings.models[name].ref, self._lifecycles[name].state).at_version(version)

    def _outline(self, ref: ModelRef, name: str) -> Outline:
        if not self._settings.registry.uri:
            raise SettingsError("registry.uri: no registry is configured")
        job = job_of(name, ref, settings=self._settings)
        try:
            outline = self._run_outline(job, timeout_s=TIMEOUT_S, should_stop=lambda: self._closing)
        except (TransportError, RegistryRefused, UnknownReference) as error:
            self._note_registry(error)
            raise
        self._note_registry(None)
        return outline

    def _free_bytes(self) -> int:
        cache = self._settings.cache
        with self._store.lock():
            return eviction.attainable_bytes(self._store, cache.quota_bytes, cache.min_free_bytes)

    def _judge(self, plan: Plan, outline: Outline, state: ModelState) -> Plan:
        """The first thing that is in the way is the answer's code."""
        key = f"{outline.version}-{outline.digest[:12]}"
        plan = replace(plan, missing_bytes=outline.missing_bytes, fits=True)
        if key == state.active:
            return plan
        try:
            state.refuse_quarantined(key)
            if state.pinned and state.pinned != key:
                raise Pinned(
                    f"version {state.pinned} is pinned", remedy="`edge-agent models unpin` ends that"
                )
        except EdgeAgentError as error:
            plan = plan.because(error)
        if shortage := self._shortage(plan, outline):
            plan = replace(plan if plan.code else plan.because(shortage), fits=False)
        return self._timed(plan, outline)

    def _shortage(self, plan: Plan, outline: Outline) -> EdgeAgentError | None:
        if outline.needed_bytes > (plan.free_bytes or 0):
            return CacheFull(
                f"it needs {outline.needed_bytes} bytes of the cache, which has room for {plan.free_bytes}"
            )
        memory_bytes = self._attainable_bytes()
        if outline.total_bytes > memory_bytes:
            return MemoryShort(
                f"it has {outline.total_bytes} bytes of weights, and {memory_bytes} bytes of memory are there"
            )
        return None

    def _timed(self, plan: Plan, outline: Outline) -> Plan:
        """When it would begin, where it must wait."""
        try:
            held = self._link.fetch_held() if outline.missing_bytes else self._link.activation_held()
        except StoreError as error:  # nobody knows what came today
            return plan if plan.code else plan.because(error)
        if held is None:
            return plan
        if not plan.code:
            kind = LinkHeld if outline.missing_bytes else ActivationHeld
            plan = plan.because(kind(f"held by {held.by}"))
        return replace(plan, would_start_at=None if held.until_s is None else round(held.until_s))
