"""What the last checks heard, for people: when the registry was asked and what it was, and which versions wait.

Owned by all who ask the registry; any thread may read it. A copy is on the disk, so that a restart, and a command
without a daemon, say the same: a hint, which the next check replaces. A file of another registry, or a damaged one,
says nothing.

Flash wears out with what is written, and a registry is asked for years: what a check notes twice is written once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from edge_agent.cache import disk, durable
from edge_agent.cache.attempt import is_code, is_number
from edge_agent.cache.record import version_of
from edge_agent.cache.state import ModelState
from edge_agent.cache.store import Store
from edge_agent.errors import ActivationHeld, EdgeAgentError, RegistryRefused, StoreError, TransportError
from edge_agent.package.reference import MODEL_NAME
from edge_agent.updates.choice import Wanted
from edge_agent.updates.waiting import Waiting

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20
_MAX_REASON = 1_000
SAME_CHECK_S = 2.0
"""A check notes the registry when that answers and when the check ends: one time, if there is no download between."""


@dataclass(frozen=True, kw_only=True)
class Hold:
    """A version that waits for its time, or is not for this device yet.

    Attributes:
        code: of the error that says so.
        reason: for people.
        until_s: seconds since 1970; None where nobody knows.
    """

    version: int
    code: str
    reason: str
    until_s: int | None

    @classmethod
    def of(cls, waiting: Waiting) -> Self:
        return cls(
            version=waiting.version,
            code=waiting.code,
            reason=waiting.reason[:_MAX_REASON],
            until_s=waiting.held_until,
        )

    def document(self) -> dict[str, Any]:
        """For status, `models show`, and the disk."""
        return {
            "version": self.version,
            "code": self.code,
            "reason": self.reason,
            "held_until": self.until_s,
        }

    @classmethod
    def parse(cls, fields: Any) -> Self | None:
        """Reads what `document` gave; None for anything else."""
        if not isinstance(fields, dict):
            return None
        version, code, reason, until_s = (
            fields.get(key) for key in ("version", "code", "reason", "held_until")
        )
        if not (is_number(version) and is_code(code) and isinstance(reason, str)):
            return None
        if until_s is not None and not is_number(until_s):
            return None
        return cls(version=int(version), code=code, reason=reason[:_MAX_REASON], until_s=until_s)

    def still_holds(self, state: ModelState, wanted: Wanted, now_s: float) -> bool:
        """Whether it does, by what became of the model since.

        Args:
            now_s: seconds since 1970.
        """
        if state.pinned or wanted.version != self.version:
            return False
        if self.code == ActivationHeld.code:  # it is here, and an operator may have activated it
            put_off = state.candidate if state.candidate_tries == 0 else None
            return put_off is not None and version_of(put_off) == self.version
        is_over = self.until_s is not None and now_s >= self.until_s
        is_active = state.active is not None and version_of(state.active) == self.version
        return not (is_over or is_active)


class Heard:
    """Of one device.

    Args:
        uri: of the registry.
        clock: seconds since 1970.

    Attributes:
        reachable: whether the registry answered when it was asked last; None where it never was.
        problem: code of what it did wrong then: out of reach, or it refused; empty for nothing.
        asked_at: when that was, in seconds since 1970.
    """

    def __init__(self, uri: str, store: Store, clock: Callable[[], float]) -> None:
        self.reachable: bool | None = None
        self.problem = ""
        self.asked_at: float | None = None
        self._uri = uri
        self._file = store.heard_file
        self._clock = clock
        self._holds: dict[str, Hold] = {}
        self._changing = threading.Lock()
        self._read()

    def note_registry(self, error: EdgeAgentError | None) -> None:
        """It was asked: it answered, or with which error that ended. One that refuses was reached."""
        reachable = not isinstance(error, TransportError)
        problem = error.code if isinstance(error, TransportError | RegistryRefused) else ""
        with self._changing:
            if self.reachable is not None and self.reachable != reachable:
                if reachable:
                    log.info("registry reachable uri=%s", self._uri)
                else:
                    log.info("registry unreachable code=%s uri=%s", TransportError.code, self._uri)
            is_new = (self.reachable, self.problem) != (reachable, problem)
            now = self._clock()
            if is_new or self.asked_at is None or abs(now - self.asked_at) >= SAME_CHECK_S:
                self.reachable, self.problem, self.asked_at = reachable, problem, now
                self._write()

    def note_hold(self, name: str, waiting: Waiting | None) -> None:
        """
        Args:
            name: of a model, in the settings.
            waiting: what it waits for; None for nothing.
        """
        hold = Hold.of(waiting) if waiting else None
        with self._changing:
            if self._holds.get(name) == hold:
                return
            others = {other: known for other, known in self._holds.items() if other != name}
            self._holds = {**others, name: hold} if hold else others
            self._write()

    def hold(self, name: str, state: ModelState, wanted: Wanted) -> Hold | None:
        """What a model waits for, as far as that is known; None for nothing."""
        hold = self._holds.get(name)
        return hold if hold and hold.still_holds(state, wanted, self._clock()) else None

    def document(self) -> dict[str, Any]:
        """The registry, for status."""
        return {
            "uri": self._uri,
            "reachable": self.reachable,
            "problem": self.problem,
            "last_check": self.asked_at,
        }

    @property
    def _mark(self) -> str:
        """Says which registry it was, and does not name it."""
        return hashlib.sha256(self._uri.encode()).hexdigest()

    def _write(self) -> None:
        document = {
            "format": 1,
            "registry": self._mark,
            "reachable": self.reachable,
            "problem": self.problem,
            "at": self.asked_at,
            "holds": {name: hold.document() for name, hold in self._holds.items()},
        }
        try:
            durable.write_hint(self._file, json.dumps(document).encode() + b"\n")
        except OSError as error:  # it is shown as long as this process lives
            log.info("what was heard is not written down reason=%r", error.strerror)

    def _read(self) -> None:
        try:
            data = disk.read_bounded(self._file, _MAX_BYTES)
            document = json.loads(data) if data is not None else None
        except (StoreError, ValueError, RecursionError):
            return
        if not isinstance(document, dict) or (document.get("format"), document.get("registry")) != (
            1,
            self._mark,
        ):
            return
        reachable, problem, at_s = (document.get(key) for key in ("reachable", "problem", "at"))
        if isinstance(reachable, bool) and (problem == "" or is_code(problem)) and is_number(at_s):
            self.reachable, self.problem, self.asked_at = reachable, str(problem), at_s
        holds = document.get("holds")
        for name, fields in holds.items() if isinstance(holds, Mapping) else ():
            if MODEL_NAME.fullmatch(name) and (hold := Hold.parse(fields)):
                self._holds[name] = hold
