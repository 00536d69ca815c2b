"""The state of each model: the content of `state.json`, as frozen values and as JSON.

Pure. A version is named by its key, `<version>-<first 12 digits of its digest>`, as its folder is. The
lifecycle decides the changes; the store writes them with one rename.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edge_agent.cache.attempt import MAX_FAULT, Attempt, Fault, Measured
from edge_agent.cache.record import KEY, VersionRecord, whole
from edge_agent.errors import Quarantined, SettingsError, StoreError
from edge_agent.package.reference import MODEL_NAME, ModelRef

MAX_QUARANTINED = 32
"""Quarantined versions of one model; the oldest entries are dropped first. Together with the lengths below, this keeps
`state.json` far below the size up to which the store reads it."""
_MAX_REASON = 1_000
_MAX_URI = 600


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """One model of the settings.

    Attributes:
        active: key of the version that answers, None before the first one.
        previous: key of the version to go back to.
        candidate: key of the version that is being tried, or waits for its time.
        candidate_tries: how often it has been tried, 0 while it waits; the number stays high when agents died while
            trying it.
        quarantined: key → why it is not tried again, oldest first.
        measured: key → what it showed in its gate, of the active version and of the previous one.
        attempt: the last version of the model's own that was tried, and how far it got; None where none was.
        resolved: what the registry, or a version file, said last of the reference that is followed: (which, version).
        pinned: key of the version that an operator pinned: it runs whatever the registry says.
        desired: `models:/…` that came over MQTT and overrides the settings' uri; empty for none.
        instead: why a version of the fallback is active; empty while one of the model's own is.
    """

    active: str | None = None
    previous: str | None = None
    candidate: str | None = None
    candidate_tries: int = 0
    quarantined: Mapping[str, Fault] = field(default_factory=dict)
    measured: Mapping[str, Measured] = field(default_factory=dict)
    attempt: Attempt | None = None
    resolved: tuple[str, int] | None = None
    pinned: str | None = None
    desired: str = ""
    instead: str = ""

    def others(self) -> dict[str, Any]:
        """The versions beside the active one, as status shows them."""
        return {
            "previous": self.previous,
            "candidate": self.candidate,
            "pinned": self.pinned,
            "quarantined": self.reasons,
        }

    @property
    def reasons(self) -> dict[str, str]:
        """Why versions are in quarantine, for people."""
        return {key: fault.reason for key, fault in self.quarantined.items()}

    def refuse_quarantined(self, key: str) -> None:
        """
        Raises:
            Quarantined: the version failed before; the message says why.
        """
        if fault := self.quarantined.get(key):
            raise Quarantined(f"version {key} is in quarantine: {fault.reason}")

    def noting(self, attempt: Attempt | None) -> ModelState:
        """How far the last attempt got."""
        return replace(self, attempt=attempt)

    def trying(self, key: str) -> ModelState:
        """Recorded before a candidate's runner starts, so that a crash during the trial is noticed."""
        tries = self.candidate_tries + 1 if self.candidate == key else 1
        return replace(self, candidate=key, candidate_tries=tries)

    def waiting_for(self, key: str | None) -> ModelState:
        """A version is here, and is tried when its time comes; None for no such version."""
        tried = self.attempt
        attempt = None if tried and tried.is_open and tried.is_of(key) else tried
        return replace(self, candidate=key, candidate_tries=0, attempt=attempt)

    def given_up(self) -> ModelState:
        """The trial did not finish, which says nothing about the candidate."""
        return replace(self, candidate=None, candidate_tries=0)

    def interrupted(self, key: str) -> ModelState:
        """The agent was stopped during a trial: that counts for nothing, and the next start goes on with it.

        A version in quarantine was tried because an operator wanted that; nobody else does.
        """
        if self.candidate != key:
            return self
        if key in self.quarantined:
            return self.given_up()
        return replace(self.waiting_for(key), candidate_tries=max(0, self.candidate_tries - 1))

    def refused(self, key: str, fault: Fault) -> ModelState:
        """A candidate failed. It is not tried again, unless no other version could answer."""
        if self.active in (None, key):
            return self.given_up()
        return replace(self.given_up(), quarantined=_with(self.quarantined, key, fault))

    def switched(self, key: str, *, measured: Measured | None = None, instead: str = "") -> ModelState:
        """A version became the active one.

        Args:
            measured: what it showed in its gate, where it was just in there.
            instead: why it is a version of the fallback; empty for one of the model's own.
        """
        quarantined = {other: fault for other, fault in self.quarantined.items() if other != key}
        previous = self.active if self.active != key else self.previous
        known = {**self.measured, key: measured} if measured else self.measured
        return replace(
            self.given_up(),
            active=key,
            previous=previous,
            quarantined=quarantined,
            measured={one: of for one, of in known.items() if one in (key, previous)},
            instead=instead[:_MAX_REASON],
        )

    def stepped_back(self, fault: Fault | None, *, to: str | None = None, instead: str = "") -> ModelState:
        """The previous version takes the active one's place.

        Args:
            fault: why the active version is quarantined; None when it is only damaged and may come back.
            to: a version of the fallback, where there is no previous one.
            instead: see `switched`.
        """
        to = to or self.previous
        if self.active is None or to is None:
            raise ValueError("there is no version to go back to")
        quarantined = _with(self.quarantined, self.active, fault) if fault else self.quarantined
        pinned = None if self.pinned == self.active else self.pinned
        return replace(
            self.given_up(),
            active=to,
            previous=None if fault else self.active,
            quarantined=quarantined,
            pinned=pinned,
            instead=instead[:_MAX_REASON],
        )

    def without(self, key: str) -> ModelState:
        """A version was removed from the cache."""
        return replace(
            self,
            previous=None if self.previous == key else self.previous,
            pinned=None if self.pinned == key else self.pinned,
            quarantined={other: fault for other, fault in self.quarantined.items() if other != key},
        )

    def role(self, key: str) -> str:
        """The version's role in its model: the strongest of those that apply."""
        if key in self.quarantined:
            return "quarantined"
        roles = {self.active: "active", self.candidate: "candidate", self.previous: "previous"}
        return roles.get(key) or ("pinned" if key == self.pinned else "cached")

    @property
    def protected(self) -> frozenset[str]:
        """Keys that eviction leaves alone."""
        return frozenset(key for key in (self.active, self.previous, self.candidate, self.pinned) if key)


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """All models.

    Attributes:
        models: by the settings' name.
        rebuilt: why the file had to be rebuilt from the committed versions, empty when it never was.
    """

    models: Mapping[str, ModelState] = field(default_factory=dict)
    rebuilt: str = ""

    def model(self, name: str) -> ModelState:
        """The model's state; an unknown name has an empty one."""
        return self.models.get(name, ModelState())

    def with_model(self, name: str, model: ModelState) -> CacheState:
        return replace(self, models={**self.models, name: model})

    def encode(self) -> bytes:
        document = {
            "format": 1,
            "rebuilt": self.rebuilt,
            "models": {
                name: {
                    "active": model.active,
                    "previous": model.previous,
                    "candidate": model.candidate,
                    "candidate_tries": model.candidate_tries,
                    "quarantined": model.reasons,
                    "codes": {key: fault.code for key, fault in model.quarantined.items()},
                    "measured": {key: of.fields() for key, of in model.measured.items()},
                    "attempt": model.attempt.fields() if model.attempt else None,
                    "resolved": model.resolved,
                    "pinned": model.pinned,
                    "desired": model.desired,
                    "instead": model.instead,
                }
                for name, model in self.models.items()
            },
        }
        return json.dumps(document, indent=1).encode() + b"\n"


def parse(data: bytes) -> CacheState:
    """Reads `state.json`.

    Raises:
        StoreError: it is not what this agent writes.
    """
    try:
        document = json.loads(data.decode("utf-8"))
        if document["format"] != 1:
            raise ValueError("format")
        models = {_name(name): _model(fields) for name, fields in document["models"].items()}
        return CacheState(models=models, rebuilt=str(document["rebuilt"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"state.json is damaged ({type(error).__name__})") from error


def rebuild(records: Iterable[VersionRecord], *, reason: str) -> CacheState:
    """A state made from the committed versions: each model's highest version is active, the next one previous.

    Where some of a model's versions have served, only those count: the others may have been in quarantine, or may
    never have passed the gate. Of two commits with the same version number, the later one is higher; a version of
    the fallback is lower than all of the model's own. Quarantine and pins are lost.
    """
    known = list(records)
    with_served = {record.name for record in known if record.served}
    models: dict[str, ModelState] = {}
    for record in sorted(known, key=lambda r: (not r.fallback, r.version, r.created_at), reverse=True):
        if record.name in with_served and not record.served:
            continue
        model = models.get(record.name)
        if model is None:
            models[record.name] = ModelState(
                active=record.key, instead="no other version is known to run" if record.fallback else ""
            )
        elif model.previous is None:
            models[record.name] = replace(model, previous=record.key)
    return CacheState(models=models, rebuilt=reason)


def _with(quarantined: Mapping[str, Fault], key: str, fault: Fault) -> dict[str, Fault]:
    """With one more entry, within the bound."""
    others = [(other, why) for other, why in quarantined.items() if other != key]
    short = replace(fault, reason=fault.reason[:MAX_FAULT])
    return dict([*others, (key, short)][-MAX_QUARANTINED:])


def _model(fields: Any) -> ModelState:
    quarantined: dict[str, Fault] = {}
    codes = fields.get("codes") or {}
    for key, reason in fields["quarantined"].items():
        quarantined = _with(quarantined, _key(key), Fault.parse(codes.get(key), reason))
    return ModelState(
        active=_optional_key(fields["active"]),
        previous=_optional_key(fields["previous"]),
        candidate=_optional_key(fields["candidate"]),
        candidate_tries=whole(fields.get("candidate_tries", 0)),
        quarantined=quarantined,
        measured=_measured(fields),
        attempt=Attempt.parse(fields.get("attempt")),
        resolved=_resolved(fields.get("resolved")),
        pinned=_optional_key(fields["pinned"]),
        desired=_desired(fields.get("desired", "")),
        instead=str(fields.get("instead", ""))[:_MAX_REASON],
    )


def _desired(uri: Any) -> str:
    """What MQTT asked for; nothing where a damaged file has no reference there. It comes again with each connection."""
    desired = str(uri)[:_MAX_URI]
    try:
        ModelRef.parse(desired)
    except SettingsError:
        return ""
    return desired


def _measured(fields: Any) -> dict[str, Measured]:
    kept = (fields["active"], fields["previous"])
    known = (fields.get("measured") or {}).items()
    return {key: measured for key, of in known if key in kept and (measured := Measured.parse(of))}


def _resolved(value: Any) -> tuple[str, int] | None:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
        return None
    return value[0][:_MAX_URI], whole(value[1])


def _name(name: str) -> str:
    if not MODEL_NAME.fullmatch(name):
        raise ValueError("name")
    return name


def _key(key: str) -> str:
    if not KEY.fullmatch(key):
        raise ValueError("key")
    return key


def _optional_key(key: str | None) -> str | None:
    return None if key is None else _key(key)
