"""A rollout's state: the document that is retained on `{prefix}/v1/@fleet/rollout/NAME`, as a frozen value and as JSON.

Owns the form of the document and its bounds. It has no list of devices: who belongs to which wave follows from the
plan, and how each stands from what the devices retain themselves. What comes back from the broker is input: whoever
may write there may be a newer console, or nobody's friend. Refuses what has another form as a whole.

    planned → offering → soaking → (offering … | halted) → finishing → done;  paused;  aborting → aborted
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from edge_agent import printable
from edge_agent.documents import page
from edge_agent.errors import EdgeAgentError
from edge_agent.fleet.rollout.plan import (
    MAX_CANARIES,
    MAX_DEVICES,
    MAX_FAILED,
    MAX_SOAK_S,
    MAX_WAVES,
    PLACE_DIGITS,
    Limits,
    Plan,
    Wave,
)
from edge_agent.fleet.rollout.standing import Standing
from edge_agent.package.reference import MODEL_NAME, ModelRef
from edge_agent.topics import ID_PATTERN

SCHEMA = 1
MAX_BYTES = 64 << 10
MAX_SUSPECTS = 64
MAX_EXCUSED = 256
MAX_LISTED = 100
MAX_PAGES = 100
_MAX_REASON = 1_000
_MAX_TIME = 1e11
_MAX_SPEED = 1e6
_PLACE = re.compile(rf"(?:[0-9a-f]{{{PLACE_DIGITS}}})?")
_HEX = re.compile(r"[0-9a-f]{8,32}")


class StateUnreadable(EdgeAgentError):
    """What is retained for a rollout is no state that this version understands."""

    code = "rollout_unreadable"


class Phase(StrEnum):
    """Where a rollout is. `finishing` and `aborting` end by themselves, however often a console dies in them."""

    PLANNED = "planned"
    OFFERING = "offering"
    SOAKING = "soaking"
    PAUSED = "paused"
    HALTED = "halted"
    FINISHING = "finishing"
    DONE = "done"
    ABORTING = "aborting"
    ABORTED = "aborted"


OVER = frozenset((Phase.DONE, Phase.ABORTED))
"""Another rollout of the model may begin."""
WAITING = frozenset((Phase.PAUSED, Phase.HALTED))
"""Nothing happens until somebody says so."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Who acts.

    Attributes:
        console: one run of the command, by a random name.
        expires_at: seconds since 1970, by that console's clock.
    """

    console: str
    expires_at: float


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A request that another console made (`request.py`), and why it was refused; empty if it was not."""

    request: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One device that people should know of."""

    device: str
    standing: str
    code: str


@dataclass(frozen=True, kw_only=True)
class State:
    """A rollout.

    Attributes:
        id: of this rollout; another one for each.
        pages: how many documents hold what was known of the devices before: `before.py`.
        wave: the last one that the version is offered to, from 0.
        goes_back_to: what `paused` and `halted` interrupted.
        at: when it was published. This and all times: seconds since 1970, by the clock of whoever had the lease.
        since: when this phase began.
        soak_until: in `soaking`, when the wave is passed; in `paused`, the seconds that were left; otherwise 0.
        alias_moved: in `finishing`: the registry has confirmed it.
        suspects: devices with a trouble since they took the version → since when.
        excused: devices that count no longer, because an operator resumed in spite of them.
        reason: why it is where it is, for people.
        counts: how many of the devices in the waves so far stand how; for people.
        listed: the first few that have not simply taken it; for people.
        speed: the median of the devices' tokens per second now, by what they were before; for people.
        answered: what became of the last request.
        seq: grows with each time that it is published, from one rollout to the next, too.
    """

    id: str
    plan: Plan
    pages: int = 0
    phase: Phase = Phase.PLANNED
    wave: int = 0
    goes_back_to: Phase | None = None
    at: float
    since: float
    soak_until: float = 0.0
    alias_moved: bool = False
    suspects: Mapping[str, float] = field(default_factory=dict)
    excused: frozenset[str] = frozenset()
    reason: str = ""
    counts: Mapping[Standing, int] = field(default_factory=dict)
    listed: tuple[Listed, ...] = ()
    speed: float | None = None
    lease: Lease | None = None
    answered: Answered | None = None
    seq: int = 0

    def entered(self, phase: Phase, now: float, *, reason: str = "") -> State:
        """The same rollout in another phase."""
        return replace(
            self,
            phase=phase,
            since=now,
            reason=printable.line(reason)[:_MAX_REASON],
            soak_until=0.0,
            suspects={},
        )

    def encode(self) -> bytes:
        """The document. It is far below what a broker takes, however many devices there are."""
        document = {
            "schema": SCHEMA,
            "id": self.id,
            "seq": self.seq,
            "plan": _plan_document(self.plan),
            "pages": self.pages,
            "state": str(self.phase),
            "wave": self.wave,
            "goes_back_to": str(self.goes_back_to) if self.goes_back_to else None,
            "at": self.at,
            "since": self.since,
            "soak_until": self.soak_until,
            "alias_moved": self.alias_moved,
            "suspects": dict(self.suspects),
            "excused": sorted(self.excused),
            "reason": self.reason,
            "counts": {str(standing): count for standing, count in self.counts.items()},
            "listed": [vars(entry) for entry in self.listed],
            "speed": self.speed,
            "lease": vars(self.lease) if self.lease else None,
            "answered": vars(self.answered) if self.answered else None,
        }
        return json.dumps(document, separators=(",", ":")).encode()


def _plan_document(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "version": plan.version,
        "uri": plan.uri,
        "instead_of": plan.instead_of,
        "canaries": list(plan.canaries),
        "waves": [vars(wave) for wave in plan.waves],
        "limits": vars(plan.limits),
    }


def parse(body: bytes) -> State:
    """Reads what is retained.

    Raises:
        StateUnreadable: it has another form, or breaks a bound.
    """
    try:
        return _state(_read_object(body))
    except (ValueError, TypeError, KeyError, RecursionError, EdgeAgentError) as error:
        raise StateUnreadable(
            f"the retained state of the rollout cannot be read ({type(error).__name__}: {error})",
            remedy=f"use the newest edge-agent that writes there, and see who else may ({page('broker.md')})",
        ) from error


def _read_object(body: bytes) -> Mapping[str, Any]:
    if len(body) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    document = json.loads(body)
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {str(document['schema'])[:20]!r}, not {SCHEMA}")
    return dict(document)


def _state(document: Mapping[str, Any]) -> State:
    plan = _plan(document["plan"])
    back = document["goes_back_to"]
    phase = Phase(document["state"])
    state = State(
        id=_match(_HEX, document["id"]),
        plan=plan,
        pages=_whole(document["pages"], 0, MAX_PAGES),
        phase=phase,
        wave=_whole(document["wave"], 0, len(plan.waves) - 1),
        goes_back_to=Phase(back) if back is not None else None,
        at=_number(document["at"], _MAX_TIME),
        since=_number(document["since"], _MAX_TIME),
        soak_until=_number(document["soak_until"], _MAX_TIME),
        alias_moved=document["alias_moved"] is True,
        suspects={
            _match(ID_PATTERN, device): _number(since, _MAX_TIME)
            for device, since in _bounded(document["suspects"], MAX_SUSPECTS).items()
        },
        excused=frozenset(_ids(document["excused"], MAX_EXCUSED)),
        reason=_text(document["reason"]),
        counts={
            Standing(standing): _whole(count, 0, 10 * MAX_DEVICES)
            for standing, count in _bounded(document["counts"], len(Standing)).items()
        },
        listed=tuple(_listed(entry) for entry in _bounded(document["listed"], MAX_LISTED)),
        speed=_number(document["speed"], _MAX_SPEED) if document["speed"] is not None else None,
        lease=_lease(document["lease"]) if document["lease"] is not None else None,
        answered=_answered(document["answered"]) if document["answered"] is not None else None,
        seq=_whole(document["seq"], 0, 1 << 53),
    )
    if phase in WAITING and back not in (Phase.OFFERING, Phase.SOAKING, Phase.PLANNED):
        raise ValueError("it waits, and does not say what for")
    return state


def _plan(document: Mapping[str, Any]) -> Plan:
    waves = tuple(_wave(entry) for entry in _bounded(document["waves"], MAX_WAVES))
    if not waves:
        raise ValueError("no waves")
    limits = document["limits"]
    uri = str(document["uri"])
    if ModelRef.parse(uri).alias is None:
        raise ValueError("its uri names no alias")
    return Plan(
        name=_match(MODEL_NAME, document["name"]),
        version=_whole(document["version"], 1, 10**18 - 1),
        uri=uri,
        instead_of=_whole(document["instead_of"], 1, 10**18 - 1),
        canaries=tuple(_ids(document["canaries"], MAX_CANARIES)),
        waves=waves,
        limits=Limits(
            soak_s=_number(limits["soak_s"], MAX_SOAK_S),
            max_failed=_whole(limits["max_failed"], 0, MAX_FAILED),
            min_speed=_number(limits["min_speed"], 1.0),
        ),
    )


def _wave(entry: Mapping[str, Any]) -> Wave:
    return Wave(
        title=_text(entry["title"])[:20],
        devices=_whole(entry["devices"], 1, MAX_DEVICES),
        upto=_match(_PLACE, entry["upto"]),
    )


def _listed(entry: Mapping[str, Any]) -> Listed:
    return Listed(
        device=_match(ID_PATTERN, entry["device"]),
        standing=_text(entry["standing"]),
        code=_text(entry["code"]),
    )


def _lease(entry: Mapping[str, Any]) -> Lease:
    return Lease(
        console=_match(_HEX, entry["console"]),
        expires_at=_number(entry["expires_at"], _MAX_TIME),
    )


def _answered(entry: Mapping[str, Any]) -> Answered:
    return Answered(request=_match(_HEX, entry["request"]), problem=_text(entry["problem"]))


def _bounded(value: Any, most: int) -> Any:
    """A list or an object that is not too long."""
    if not isinstance(value, list | dict) or len(value) > most:
        raise ValueError(f"no list or object of at most {most}")
    return value


def _ids(value: Any, most: int) -> Iterable[str]:
    return [_match(ID_PATTERN, entry) for entry in _bounded(value, most)]


def _match(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{str(value)[:40]!r} has another form")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is none")
    return printable.line(value[:_MAX_REASON])


def _whole(value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{str(value)[:40]!r} is no whole number from {least} to {most}")
    return value


def _number(value: Any, most: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:40]!r} is no number from 0 to {most:g}")
    return float(value)
