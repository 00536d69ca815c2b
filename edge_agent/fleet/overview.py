"""A fleet at one look: how many there are of each kind, and those that somebody should look at, the alike together.

Pure. What only waits for its time (`WAITING`) is counted, and is no reason to look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_agent.errors import ActivationHeld, LinkHeld, Quarantined, SyncStopped
from edge_agent.fleet.devices import NEVER_SEEN, UNKNOWN, Device, ModelReport
from edge_agent.updates.rollout import NotInRollout

WAITING = frozenset({LinkHeld.code, ActivationHeld.code, NotInRollout.code, SyncStopped.code})
"""Codes of what is as it should be, and not yet there."""

SILENT_S = 600.0
"""A device that works writes its status every half minute."""

_KINDS = (
    *("failed", "absent", "degraded", "update failed", "quarantined"),
    *("unreadable", "silent", "offline", "never seen"),
)
"""What somebody should look at, in the order in which it is shown."""


@dataclass(frozen=True, kw_only=True)
class Trait:
    """What several devices have in common.

    Attributes:
        kind: one of `_KINDS`.
        code: of docs/operating.md; empty if there is none.
        model, version: which one it is about; empty and None if it is about the device.
    """

    kind: str
    code: str = ""
    model: str = ""
    version: int | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The devices with a trait.

    Attributes:
        text: what one of them says of it.
    """

    trait: Trait
    devices: tuple[str, ...]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many devices there are of each kind.

    Attributes:
        by_model: model → its active version, or `none` → devices.
        by_version: the same over all models.
        by_code: a device counts once for each of its codes.
    """

    by_version: Mapping[str, int]
    by_state: Mapping[str, int]
    by_code: Mapping[str, int]
    by_model: Mapping[str, Mapping[str, int]]
    by_agent_version: Mapping[str, int]


def count(devices: Sequence[Device]) -> Counts:
    versions: dict[str, Counter[str]] = {}
    for device in devices:
        for model in device.models:
            versions.setdefault(model.name, Counter())[_version(model)] += 1
    return Counts(
        by_version=_most_first(sum(versions.values(), Counter())),
        by_state=_most_first(Counter(device.state for device in devices)),
        by_code=_most_first(Counter(code for device in devices for code in device.codes())),
        by_model={name: _most_first(counter) for name, counter in sorted(versions.items())},
        by_agent_version=_most_first(Counter(each.agent_version for each in devices if each.agent_version)),
    )


def findings(devices: Sequence[Device], *, now: float) -> list[Finding]:
    """What somebody should look at: what is worse first, then what more devices have.

    Args:
        now: seconds since 1970.
    """
    having: dict[Trait, list[str]] = {}
    texts: dict[Trait, str] = {}
    for device in devices:
        for trait, text in dict(_traits(device, now)).items():
            having.setdefault(trait, []).append(device.device_id)
            texts.setdefault(trait, text)
    found = [Finding(trait=trait, devices=tuple(ids), text=texts[trait]) for trait, ids in having.items()]
    return sorted(found, key=lambda each: (_KINDS.index(each.trait.kind), -len(each.devices)))


def document(devices: Sequence[Device]) -> dict[str, Any]:
    """`fleet status --json`."""
    counts = count(devices)
    return {
        "devices": [device.document() for device in devices],
        "counts": {key: dict(value) for key, value in vars(counts).items()},
    }


def _traits(device: Device, now: float) -> Iterator[tuple[Trait, str]]:
    """What of a device somebody should look at, with its text. The last text of a trait counts."""
    if device.state == NEVER_SEEN:
        yield Trait(kind="never seen"), "the broker has nothing of it"
        return
    if device.state == UNKNOWN or device.problem:
        yield Trait(kind="unreadable"), device.problem or "it has no status"
    if device.state == "offline":
        yield Trait(kind="offline"), ""
    elif device.seen_at is not None and now - device.seen_at > SILENT_S:
        yield (
            Trait(kind="silent"),
            f"the last word is {device.state!r}, and older than {SILENT_S / 60:.0f} minutes",
        )
    for model in device.models:
        yield from _traits_of(model, answers_later=device.state in ("offline", "starting"))
    yield from _degraded(device)


def _degraded(device: Device) -> Iterator[tuple[Trait, str]]:
    """Its troubles. A version in quarantine is one that its model tells better."""
    told = any(model.quarantined for model in device.models)
    troubles = [each for each in device.troubles if not (told and each.code == Quarantined.code)]
    for trouble in troubles:
        yield Trait(kind="degraded", code=trouble.code), trouble.text
    bad = any(model.state in ("failed", "absent") for model in device.models)
    if device.state == "degraded" and not (troubles or told or bad):
        yield Trait(kind="degraded"), "`edge-agent status` on the device has the reason"


def _traits_of(model: ModelReport, *, answers_later: bool) -> Iterator[tuple[Trait, str]]:
    attempt = model.attempt
    code = (attempt.code if attempt is not None else None) or ""
    if model.state in ("failed", "absent") and code not in WAITING and not answers_later:
        yield Trait(kind=model.state, code=code, model=model.name, version=model.version), model.reason
    elif attempt is not None and code and code not in WAITING:
        yield Trait(kind="update failed", code=code, model=model.name, version=attempt.version), model.reason
    elif (
        version := model.awaits()
    ) is not None and model.reason:  # such as one that the registry does not have
        yield Trait(kind="update failed", model=model.name, version=version), model.reason
    for entry in model.quarantined:
        if attempt is None or (entry.version, entry.code) != (attempt.version, code):
            trait = Trait(kind="quarantined", code=entry.code, model=model.name, version=entry.version)
            yield trait, ""


def _version(model: ModelReport) -> str:
    return "none" if model.version is None else str(model.version)


def _most_first(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
