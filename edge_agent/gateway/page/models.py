"""What the page says of one model: its versions, an update that goes on, and what keeps one from coming. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from edge_agent.gateway.page import words
from edge_agent.gateway.page.signs import BAD, BUSY, OK, QUIET, WARN, Document, Fact, Sign
from edge_agent.terminal import human_bytes, span


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """How far a version has come. Where its size is not known, it has nothing of one byte."""

    title: str
    bytes: int
    total_bytes: int
    words: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """
    Attributes:
        standing: `done`, `now` or `ahead`.
    """

    word: str
    standing: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """
    Attributes:
        reason: why it is in its state, and why no other version comes; empty for nothing.
        trying: what the steps are of; empty where no version is on its way.
    """

    name: str
    sign: Sign
    reason: str
    facts: tuple[Fact, ...]
    fetch: Fetch | None
    steps: tuple[Step, ...]
    trying: str
    quarantined: tuple[Fact, ...]
    walls: tuple[str, ...]
    missing_walls: tuple[Fact, ...]


_MODEL_SIGNS = {
    "ready": Sign(OK, "Ready"),
    "idle": Sign(QUIET, "Idle"),
    "loading": Sign(BUSY, "Loading"),
    "absent": Sign(WARN, "No version"),
    "failed": Sign(BAD, "Failed"),
}
_STEPS = {"fetch": "Fetch", "verify": "Verify", "gate": "Try", "activate": "Take over"}
_VIA = {
    "pin": "pinned on this device",
    "desired": "asked for over MQTT",
    "alias": "by the settings",
    "import": "from a version file",
}


def model_of(model: Document, now: int) -> Model:
    """A model's part of the status, as people read it.

    Args:
        now: by the device's clock, in seconds since 1970.
    """
    attempt = model.get("attempt") or {}
    walls = model.get("walls") or {}
    faults = tuple(filter(None, (model.get("quarantined") or {}).values()))
    said = dict.fromkeys(
        text
        for text in (model.get("reason"), model.get("update_problem"))
        if text and not (faults and text.endswith(faults))  # it is said of that version
    )
    trying, steps = _steps(attempt)
    return Model(
        name=model["name"],
        sign=_MODEL_SIGNS.get(model["state"], Sign(QUIET, str(model["state"]))),
        reason="; ".join(said),
        facts=tuple(_versions(model, attempt, now)),
        fetch=_fetch(model.get("progress"), attempt),
        steps=steps,
        trying=trying,
        quarantined=tuple(
            Fact(f"Version {_number(key)}", why) for key, why in (model.get("quarantined") or {}).items()
        ),
        walls=tuple(each.replace("_", " ") for each in walls.get("stand", ())),
        missing_walls=tuple(
            Fact(wall.replace("_", " "), why) for wall, why in walls.get("missing", {}).items()
        ),
    )


def _versions(model: Document, attempt: Document, now: int) -> Iterator[Fact]:
    version, wanted = model.get("version"), model.get("wanted") or {}
    yield Fact("Active", "none" if version is None else f"version {version}", model.get("flavor") or "")
    asked, via = wanted.get("version"), _VIA.get(wanted.get("via", ""), "")
    if asked is None:
        yield Fact("Wanted", "not known yet", via)
    elif asked != version:
        yield Fact("Wanted", f"version {asked}", via, BUSY)
    if pinned := model.get("pinned"):
        yield Fact("Pinned", f"version {_number(pinned)}", "updates do not replace it")
    if previous := model.get("previous"):
        yield Fact("Previous", f"version {_number(previous)}", "to roll back to")
    if attempt.get("step") == "held":
        until = (model.get("link") or {}).get("held_until")
        when = f"until {_clock(until)}" if until else _HELD.get(attempt.get("code") or "", "")
        yield Fact("Held", _version_of(attempt), when, WARN)
    elif attempt.get("code") and str(attempt.get("version")) not in _known_numbers(model):
        when = f"{attempt['code']}, {words.ago(now - attempt['at'])}"
        yield Fact("Tried last", _version_of(attempt), when, BAD)
    if (rate := model.get("tokens_per_s")) is not None:
        yield Fact("Speed", f"{words.rate(rate)} tokens/s", "of the last answer")
    yield Fact("From", str(model.get("uri", "")))


def _known_numbers(model: Document) -> set[str]:
    """Of the versions of which something is said already."""
    return {str(model.get("version")), *map(_number, model.get("quarantined") or ())}


_HELD = {
    "link_held": "the line has no time for it now",
    "activation_held": "it waits for its time to take over",
    "not_in_rollout": "its rollout has not reached this device",
}


def _steps(attempt: Document) -> tuple[str, tuple[Step, ...]]:
    """The way of a version that is on it: its title, and where it stands."""
    step = attempt.get("step")
    if step not in _STEPS or attempt.get("code"):
        return "", ()
    names = list(_STEPS)
    at = names.index(step)
    order = ("done" if place < at else "now" if place == at else "ahead" for place in range(len(names)))
    steps = (Step(word=_STEPS[name], standing=standing) for name, standing in zip(names, order, strict=True))
    return f"Updating to {_version_of(attempt)}", tuple(steps)


def _fetch(progress: Document | None, attempt: Document) -> Fetch | None:
    if not progress:
        return None
    have, total = progress["bytes"], progress["total_bytes"]
    left = "" if progress["eta_s"] is None else f", {span(progress['eta_s'])} left"
    return Fetch(
        title=f"Fetching {_version_of(attempt)}",
        bytes=min(have, total) if total else 0,
        total_bytes=max(1, total or 0),
        words=f"{human_bytes(have)} of {human_bytes(total)}, {human_bytes(progress['bytes_per_s'])}/s{left}",
    )


def _version_of(attempt: Document) -> str:
    version = attempt.get("version")
    return "a version" if version is None else f"version {version}"


def _number(key: str) -> str:
    """The number in the registry of `8-1f0c…`."""
    return str(key).partition("-")[0]


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
