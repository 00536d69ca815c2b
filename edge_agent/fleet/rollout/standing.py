"""How each device stands to the version that is rolled out. Pure.

Owns what counts as what. A failure of the version counts; what a device lacks, waits for or was told by somebody else
is listed and not counted. Everything is derived from what devices retain on the broker and from what was known of
them before, so that any console comes to the same.

    Device, what was known before → seen_of → Seen
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.errors import (
    CacheFull,
    CannotRun,
    ContentError,
    MemoryShort,
    RegistryRefused,
    RunnerError,
    VersionHeld,
    by_code,
)
from edge_agent.fleet.devices import NEVER_SEEN, UNKNOWN, Device, ModelReport
from edge_agent.fleet.rollout.plan import Plan

GATE_FAILED = "gate_failed"
_CANNOT = frozenset(by_code(CannotRun, MemoryShort, CacheFull, RegistryRefused))
_HELD = frozenset((*by_code(VersionHeld), "not_in_rollout"))
_OF_SOMETHING_ELSE = frozenset(("desired_invalid",))
FAILURES = (frozenset(by_code(ContentError, RunnerError)) | {GATE_FAILED}) - _CANNOT - _OF_SOMETHING_ELSE
"""Codes that are held against a version: its content breaks a rule, or it does not load, answer or stay up."""
_CODE = re.compile(r"[ -~]{1,40}")
"""A newer device may have others than this console knows; a rollout's state has no room for prose."""
_AWAY = ("offline", NEVER_SEEN, UNKNOWN)


class Standing(StrEnum):
    """Of a device to the version. Only the first three say something about the version."""

    TAKEN = "taken"
    FAILED = "failed"
    PENDING = "pending"
    UNREACHABLE = "unreachable"
    HELD = "held"
    CANNOT_RUN = "cannot_run"
    PINNED = "pinned"


@dataclass(frozen=True, kw_only=True)
class Before:
    """What was known of a device when the rollout began.

    Attributes:
        version: that it ran.
        state: of the device.
        tokens_per_s: of its last answers.
        gate_tokens_per_s: in the trial of the version that it ran.
        attempt_at: when it had tried the version that is rolled out now, by its own clock; None if it had not.
    """

    version: int | None = None
    state: str = ""
    tokens_per_s: float | None = None
    gate_tokens_per_s: float | None = None
    attempt_at: float | None = None

    @classmethod
    def of(cls, device: Device, plan: Plan) -> Before:
        model = device.model(plan.name) or ModelReport(name=plan.name)
        tried = model.attempt is not None and model.attempt.version == plan.version
        return cls(
            version=model.version,
            state=device.state,
            tokens_per_s=model.tokens_per_s,
            gate_tokens_per_s=model.gate.tokens_per_s if model.gate else None,
            attempt_at=model.attempt.at if tried and model.attempt else None,
        )


NOTHING_KNOWN = Before()
"""Of a device that appeared after the start."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One device, as a rollout sees it.

    Attributes:
        wave: the first wave that has it.
        desired: what the broker retains for it: the version that it is told to run; None for nothing, and where this
            console may not read it.
        released: the broker retains that nobody tells it any more.
        code: why it has not taken the version; empty if nothing is known.
        trouble: what has become of it since it took the version; empty if nothing has.
        speed: its tokens per second now, by what they were before; None if one of them is not known.
        known: the broker has something of it. It has nothing of a device that was removed, or for a while after the
            broker itself has lost everything.
    """

    device_id: str
    wave: int
    standing: Standing
    desired: int | None = None
    released: bool = False
    code: str = ""
    trouble: str = ""
    speed: float | None = None
    known: bool = True


def seen_of(
    device: Device,
    *,
    plan: Plan,
    wave: int,
    before: Before = NOTHING_KNOWN,
    desired: int | None = None,
    released: bool = False,
) -> Seen:
    """
    Args:
        device: one that reports the model.
        wave: `plan.wave_of` this device.
        before: what was known of it when the rollout began.
        desired, released: see `Seen`.
    """
    model = device.model(plan.name) or ModelReport(name=plan.name)
    standing, code = _standing(device, model, plan.version, before)
    speed = _speed(model, before) if standing is Standing.TAKEN else None
    trouble = _trouble(device, before, speed, plan) if standing is Standing.TAKEN else ""
    return Seen(
        device_id=device.device_id,
        wave=wave,
        standing=standing,
        desired=desired,
        released=released,
        code=code,
        trouble=trouble,
        speed=speed,
        known=device.state != NEVER_SEEN,
    )


def _standing(device: Device, model: ModelReport, version: int, before: Before) -> tuple[Standing, str]:
    """The standing, and the code that explains it."""
    away = device.state in _AWAY
    code = _code(model, version, before)
    if model.version == version:
        if model.state == "failed":
            return Standing.FAILED, code if code in FAILURES else "load_failed"
        return (Standing.PENDING, code) if model.state == "loading" and not away else (Standing.TAKEN, "")
    if code in FAILURES:
        return Standing.FAILED, code
    if model.wanted is not None and model.wanted.via == "pin":
        return Standing.PINNED, code
    if away:
        return Standing.UNREACHABLE, code
    if code in _CANNOT:
        return Standing.CANNOT_RUN, code
    return (Standing.HELD, code) if code in _HELD else (Standing.PENDING, code)


def _code(model: ModelReport, version: int, before: Before) -> str:
    """What the device says of this version: a quarantine lasts, an attempt from before the rollout does not count."""
    for entry in model.quarantined:
        if entry.version == version:
            return entry.code if entry.code in FAILURES else GATE_FAILED
    attempt = model.attempt
    if attempt is None or attempt.version != version:
        return ""
    is_old = before.attempt_at is not None and attempt.at == before.attempt_at
    code = attempt.code or ""
    return "" if is_old or not _CODE.fullmatch(code) else code


def _speed(model: ModelReport, before: Before) -> float | None:
    """Like is compared with like: answers with answers, a trial with a trial."""
    gate = model.gate.tokens_per_s if model.gate else None
    for now, then in ((model.tokens_per_s, before.tokens_per_s), (gate, before.gate_tokens_per_s)):
        if now is not None and then:
            return min(now / then, 1e6)
    return None


def _trouble(device: Device, before: Before, speed: float | None, plan: Plan) -> str:
    ran_it_before = before.version == plan.version
    if device.state in _AWAY:
        return "" if ran_it_before and before.state in _AWAY else "offline"
    if device.state == "degraded" and before.state != "degraded":
        return "degraded"
    is_slow = speed is not None and speed < plan.limits.min_speed
    return "slow" if is_slow and not ran_it_before else ""


def counted(seen: Iterable[Seen]) -> dict[Standing, int]:
    """How many devices stand how."""
    counts = dict.fromkeys(Standing, 0)
    for each in seen:
        counts[each.standing] += 1
    return counts
