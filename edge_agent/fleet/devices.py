"""What devices say of themselves, as values.

Owns the reading of two retained topics of each device, `status` and `model/reported`. They are input: a device may be
older or newer than this console, misconfigured or hostile, and none may end it. What can be read is kept, what cannot
is None or empty, and every text is one bounded line without control characters.

    topic, body → Fleet.take → what this device said last → Fleet.devices → Device, sorted by id

Pure. Contract: docs/mqtt.md, *Status* and *Desired and reported models*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edge_agent.fleet.fields import number, objects, part, read_object, text, version, whole, word
from edge_agent.topics import ID_PATTERN, FleetTopics

NEVER_SEEN = "never_seen"
"""The state of a device that was expected, and of which the broker has nothing."""
UNKNOWN = "unknown"
"""The state of a device that has reported models, and whose status is missing or cannot be read."""

MAX_DEVICES = 200_000
MAX_MODELS = 64


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which version a device is to run, and who says so: `pin`, `desired`, `alias` or `import`."""

    version: int | None = None
    via: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The last thing that a device did for a version that it does not run, or began to run with it.

    Attributes:
        step: `held`, `fetch`, `verify`, `gate`, `activate` or `active`.
        code: of docs/operating.md; None where nothing went wrong.
        at: seconds since 1970.
    """

    version: int | None = None
    digest: str = ""
    step: str = ""
    code: str | None = None
    at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A version that failed on this device, and why."""

    version: int | None = None
    code: str = ""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """How many golden prompts a version passed, of how many."""

    passed: int | None = None
    of: int | None = None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What the active version's trial on this device measured."""

    load_ms: float | None = None
    tokens_per_s: float | None = None
    golden: Golden = Golden()


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a version waits for. `held_until` is in seconds since 1970; None if nobody knows."""

    missing_bytes: int | None = None
    held_until: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One model of one device, by the name in the settings.

    Attributes:
        version: the active one.
        state: `absent`, `idle`, `loading`, `ready` or `failed`, or a word that this console does not know.
        previous: the version that a rollback would take.
        tokens_per_s: as measured of late; None while the device is offline.
    """

    name: str
    uri: str = ""
    version: int | None = None
    digest: str = ""
    state: str = ""
    reason: str = ""
    wanted: Wanted | None = None
    attempt: Attempt | None = None
    previous: int | None = None
    quarantined: tuple[Quarantined, ...] = ()
    gate: Gate | None = None
    link: Link | None = None
    tokens_per_s: float | None = None

    def awaits(self) -> int | None:
        """The version that is wanted, and neither runs here nor has been tried."""
        wanted = self.wanted.version if self.wanted is not None else None
        known = {self.version, self.attempt.version if self.attempt is not None else None}
        return None if wanted in known else wanted

    def codes(self) -> frozenset[str]:
        """What is wrong, or waits: of the last attempt, and of each version in quarantine."""
        own = {self.attempt.code} if self.attempt and self.attempt.code else set()
        return frozenset(own | {entry.code for entry in self.quarantined if entry.code})


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why a device is degraded."""

    code: str = ""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What is known of one device.

    Attributes:
        state: `starting`, `ready`, `degraded`, `offline`, `never_seen` or `unknown`, or a word that this console does
            not know.
        seen_at: when it wrote its status, by its own clock, in seconds since 1970. An `offline` that the broker
            published has the time at which the device connected.
        boot_id: another one after each start of the daemon.
        problem: what of its documents cannot be read; empty if all can.
    """

    device_id: str
    state: str = NEVER_SEEN
    agent_version: str = ""
    seen_at: float | None = None
    boot_id: str = ""
    troubles: tuple[Trouble, ...] = ()
    models: tuple[ModelReport, ...] = ()
    problem: str = ""

    def model(self, name: str) -> ModelReport | None:
        return next((model for model in self.models if model.name == name), None)

    def codes(self) -> frozenset[str]:
        """All codes of its troubles and its models."""
        own = {trouble.code for trouble in self.troubles} - {""}
        return frozenset(own.union(*(model.codes() for model in self.models)))

    def document(self) -> dict[str, Any]:
        """The device in `fleet status --json`."""
        fields = asdict(self)
        return {"device": fields.pop("device_id"), **fields}


@dataclass(frozen=True, kw_only=True)
class _Status:
    """What a status says, without its device's name."""

    device: Device
    models: tuple[ModelReport, ...] = ()


class Fleet:
    """What each device said last. One thread's.

    Args:
        expected: devices that are listed even if nothing is known of them.
    """

    def __init__(self, topics: FleetTopics, expected: Iterable[str] = ()) -> None:
        self._topics = topics
        self._status: dict[str, _Status] = {}
        self._reported: dict[str, tuple[ModelReport, ...] | None] = {}
        self._expected = frozenset(expected)

    def take(self, topic: str, body: bytes) -> str | None:
        """Reads what came on a topic. An empty body is a retained message that was removed.

        Returns:
            the device's id; None if it is no device's status or report, or one device too many.
        """
        speaker = self._topics.speaker(topic)
        if speaker is None or speaker[1] not in ("status", "model/reported"):
            return None
        device_id, what = speaker
        known = self._status if what == "status" else self._reported
        if not body:
            known.pop(device_id, None)
        elif device_id not in known and len(known) >= MAX_DEVICES:
            return None
        elif what == "status":
            self._status[device_id] = _status(body)
        else:
            self._reported[device_id] = parse_reported(body)
        return device_id

    def take_all(self, messages: Mapping[str, bytes]) -> None:
        """Reads what was collected, body by topic."""
        for topic, body in messages.items():
            self.take(topic, body)

    @property
    def heard(self) -> bool:
        """Something is known of at least one device."""
        return bool(self._status or self._reported)

    def ids(self) -> list[str]:
        return sorted(self._expected | self._status.keys() | self._reported.keys())

    def devices(self) -> list[Device]:
        """All of them, by id."""
        return [self.device(device_id) for device_id in self.ids()]

    def device(self, device_id: str) -> Device:
        """One device, be it known or not."""
        status, reported = self._status.get(device_id), self._reported.get(device_id, ())
        if status is None:
            state = UNKNOWN if device_id in self._reported else NEVER_SEEN
            status = _Status(device=Device(device_id=device_id, state=state))
        device, models = replace(status.device, device_id=device_id), status.models
        if reported is None:
            return replace(device, models=models, problem=device.problem or "model/reported cannot be read")
        return replace(device, models=_together(models, reported))


def parse_status(body: bytes, device_id: str) -> Device:
    """A device as its status alone shows it. Never raises."""
    status = _status(body)
    return replace(status.device, device_id=device_id, models=status.models)


def parse_reported(body: bytes) -> tuple[ModelReport, ...] | None:
    """The models of a `model/reported`; None if it cannot be read. Never raises."""
    document = read_object(body)
    models = document.get("models") if document else None
    if not isinstance(models, dict):
        return None
    found: list[ModelReport] = []
    for name, entry in models.items():
        if len(found) < MAX_MODELS and ID_PATTERN.fullmatch(name) and isinstance(entry, dict):
            found.append(_model(name, entry))
    return tuple(found)


def _status(body: bytes) -> _Status:
    document = read_object(body)
    state = word(document.get("state")) if document else ""
    if document is None or not state:
        return _Status(device=Device(device_id="", state=UNKNOWN, problem="status cannot be read"))
    device = Device(
        device_id="",
        state=state,
        agent_version=word(document.get("agent_version")),
        seen_at=number(document.get("time")),
        boot_id=word(document.get("boot_id")),
        troubles=tuple(
            Trouble(code=word(entry.get("code")), text=text(entry.get("text")))
            for entry in objects(document.get("troubles"))
        ),
    )
    models = [
        _model(name, entry)
        for entry in objects(document.get("models"))
        if ID_PATTERN.fullmatch(name := word(entry.get("name")))
    ]
    return _Status(device=device, models=tuple(models))


def _together(status: tuple[ModelReport, ...], reported: tuple[ModelReport, ...]) -> tuple[ModelReport, ...]:
    """What was reported, with the speed of the status; models that only the status has come last."""
    speeds = {model.name: model.tokens_per_s for model in status}
    names = {model.name for model in reported}
    return (
        *(replace(model, tokens_per_s=speeds.get(model.name)) for model in reported),
        *(model for model in status if model.name not in names),
    )


def _model(name: str, entry: Mapping[str, Any]) -> ModelReport:
    wanted, attempt, gate, link = (part(entry.get(key)) for key in ("wanted", "attempt", "gate", "link"))
    return ModelReport(
        name=name,
        uri=text(entry.get("uri")),
        version=version(entry.get("version")),
        digest=word(entry.get("digest")),
        state=word(entry.get("state")),
        reason=text(entry.get("reason")),
        wanted=Wanted(version=version(wanted.get("version")), via=word(wanted.get("via")))
        if wanted
        else None,
        attempt=_attempt(attempt) if attempt else None,
        previous=version(entry.get("previous")),
        quarantined=tuple(
            Quarantined(version=version(each.get("version")), code=word(each.get("code")))
            for each in objects(entry.get("quarantined"))
        ),
        gate=_gate(gate) if gate else None,
        link=Link(missing_bytes=whole(link.get("missing_bytes")), held_until=number(link.get("held_until")))
        if link
        else None,
        tokens_per_s=number(entry.get("tokens_per_s")),
    )


def _attempt(entry: Mapping[str, Any]) -> Attempt:
    return Attempt(
        version=version(entry.get("version")),
        digest=word(entry.get("digest")),
        step=word(entry.get("step")),
        code=word(entry.get("code")) or None,
        at=number(entry.get("at")),
    )


def _gate(entry: Mapping[str, Any]) -> Gate:
    golden = part(entry.get("golden")) or {}
    return Gate(
        load_ms=number(entry.get("load_ms")),
        tokens_per_s=number(entry.get("tokens_per_s")),
        golden=Golden(passed=whole(golden.get("passed")), of=whole(golden.get("of"))),
    )
