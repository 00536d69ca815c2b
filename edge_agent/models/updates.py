"""Keeps every model at the version that its reference means: asks the registry, brings, hands over.

Owns the one thread that syncs: one model after the other, so that one fetch and one candidate at a time is
all that the device has to carry. Flow of a check: sync process → committed version → lifecycle.adopt.
A registry that is out of reach is a normal day: it is noted, and asked again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.errors import EdgeAgentError, TransportError, UnknownReference
from edge_agent.models.lifecycle import ModelLifecycle
from edge_agent.models.sync_process import CacheJob, RegistryJob, SyncJob, SyncResult, TrustJob, run_sync
from edge_agent.settings import Settings

log = logging.getLogger(__name__)

SYNC_TIMEOUT_S = 24 * 3600.0
"""A large model on a slow line; a stalled read ends much sooner."""

_JITTER = (0.9, 1.1)
_WAIT_S = 0.5

OnEvent = Callable[[Mapping[str, Any]], None]


class Updates:
    """`run` is the thread; `check` may be called from any, and waits for its turn.

    Attributes:
        reachable: whether the registry answered the last check; None before the first one.
        checked_at: when that was, in seconds since 1970; None before the first one.
        problems: by model, why its last check brought nothing, empty when it was fine.
    """

    def __init__(self, settings: Settings, lifecycles: Mapping[str, ModelLifecycle]) -> None:
        self._settings = settings
        self._lifecycles = lifecycles
        self._turn = threading.Lock()
        self._due = threading.Event()
        self._closing = threading.Event()
        self.reachable: bool | None = None
        self.checked_at: float | None = None
        self.problems: dict[str, str] = {}

    def run(self) -> None:
        """The thread: checks all models now, then every `registry.poll_interval_s`, or when told to."""
        while not self._closing.is_set():
            self._due.clear()
            for name in self._lifecycles:
                if not self._closing.is_set():
                    self._try(name)
            limit_s = time.monotonic() + self._settings.registry.poll_interval_s * random.uniform(*_JITTER)
            while not self._closing.is_set() and not self._due.is_set() and time.monotonic() < limit_s:
                self._due.wait(_WAIT_S)

    def check_now(self) -> None:
        """Tells the thread to check all models."""
        self._due.set()

    def close(self) -> None:
        """Ends `run`; a running sync is killed (the next one goes on from what it has)."""
        self._closing.set()
        self._due.set()

    def check(self, name: str, on_event: OnEvent = lambda event: None) -> SyncResult:
        """Brings one model up to date and makes it active.

        Raises:
            EdgeAgentError: the registry, the package, the cache or the gate says no.
        """
        with self._turn:
            result = self._sync(name, on_event)
            self._lifecycles[name].adopt(result.key)
            self.problems[name] = ""
            return result

    def _try(self, name: str) -> None:
        try:
            self.check(name)
        except EdgeAgentError as error:
            if self._closing.is_set():
                return
            text = str(error)
            if self.problems.get(name) != text:
                log.warning("update failed model=%s code=%s reason=%r", name, error.code, text)
            self.problems[name] = text

    def _sync(self, name: str, on_event: OnEvent) -> SyncResult:
        try:
            result = run_sync(
                sync_job(self._settings, name),
                timeout_s=SYNC_TIMEOUT_S,
                on_event=on_event,
                should_stop=self._closing.is_set,
            )
        except EdgeAgentError as error:
            self._note(reachable=isinstance(error, UnknownReference) or not isinstance(error, TransportError))
            raise
        self._note(reachable=True)
        if result.new:
            log.info(
                "version fetched model=%s version=%d bytes_fetched=%d bytes_reused=%d",
                name, result.version, result.bytes_fetched, result.bytes_reused,
            )  # fmt: skip
        return result

    def _note(self, *, reachable: bool) -> None:
        if self.reachable is not None and self.reachable != reachable:
            log.info(
                "registry %s uri=%s", "reachable" if reachable else "unreachable", self._settings.registry.uri
            )
        self.reachable, self.checked_at = reachable, time.time()


def sync_job(settings: Settings, name: str) -> SyncJob:
    """What the sync process has to know of the settings."""
    return SyncJob(
        state_dir=str(settings.state_dir),
        registry=RegistryJob(uri=settings.registry.uri, timeout_s=settings.registry.timeout_s),
        name=name,
        ref=settings.models[name].uri,
        trust=TrustJob(
            public_keys=settings.trust.public_keys, allow_unsigned_code=settings.trust.allow_unsigned_code
        ),
        cache=CacheJob(
            quota_bytes=settings.cache.quota_bytes,
            min_free_bytes=settings.cache.min_free_bytes,
            max_bytes_per_s=settings.cache.max_bytes_per_s,
        ),
    )
