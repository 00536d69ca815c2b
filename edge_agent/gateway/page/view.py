"""What the page says of a device, as values for its templates: words, tones and numbers that people read. Pure.

Owns how a state is told, and nothing of how it looks. Reads the daemon's documents; what a daemon of another version
does not say is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from edge_agent.gateway.page import Look, picture, words
from edge_agent.gateway.page.picture import Picture
from edge_agent.terminal import human_bytes

Document = Mapping[str, Any]
OK, BUSY, WARN, BAD, QUIET, PLAIN = "ok", "busy", "warn", "bad", "quiet", "plain"
"""Tones: a sign has a word beside its colour."""


@dataclass(frozen=True)
class Sign:
    tone: str
    word: str


@dataclass(frozen=True)
class Fact:
    """A line of a list: `name: value`. `note` says more of it, in small letters."""

    name: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """How far a version has come. `share` is from 0 to 1; None where nobody knows."""

    title: str
    bytes: int
    total_bytes: int
    words: str


@dataclass(frozen=True, kw_only=True)
class Step:
    word: str
    standing: str
    """`done`, `now` or `ahead`."""


@dataclass(frozen=True, kw_only=True)
class Model:
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


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A row of the table. `at` is for programs."""

    at: str
    ago: str
    model: str
    sign: Sign
    queue: str
    first_token: str
    total: str
    tokens: str
    rate: str


@dataclass(frozen=True, kw_only=True)
class View:
    device_id: str
    about: tuple[str, ...]
    sign: Sign
    sentence: str
    troubles: tuple[Fact, ...]
    models: tuple[Model, ...]
    facts: tuple[Fact, ...]
    prompts: tuple[Prompt, ...]
    pictures: tuple[Picture, ...]

    @property
    def several(self) -> bool:
        """Whether a prompt's model has to be said."""
        return len(self.models) > 1

    @property
    def title(self) -> str:
        return f"{self.device_id}: {self.sign.word}" if self.device_id else self.sign.word


def view_of(look: Look) -> View:
    """All of it."""
    status, recent = look.status, look.recent
    sign, sentence = _standing(look)
    prompts = recent.get("prompts", [])
    now = status.get("time", 0)
    return View(
        device_id=recent.get("device_id", ""),
        about=tuple(_about(status, recent, now)),
        sign=sign,
        sentence=sentence,
        troubles=tuple(Fact(each["code"], each["text"]) for each in status.get("troubles", [])),
        models=tuple(_model(each, now) for each in status.get("models", [])),
        facts=tuple(_facts(status, now)) if status else (),
        prompts=tuple(_prompt(each, now) for each in reversed(prompts)),
        pictures=_pictures(prompts),
    )


# --- The device -----------------------------------------------------------------------------------------


def _about(status: Document, recent: Document, now: int) -> Iterator[str]:
    if version := status.get("agent_version"):
        yield f"edge-agent {version}"
    if started := recent.get("started_at"):
        yield f"up {words.span(now - started)}"
    if (waiting := status.get("queue_depth")) is not None:
        yield (
            f"{waiting} {'prompt' if waiting == 1 else 'prompts'} at work"
            if waiting
            else "nothing in the queue"
        )


def _standing(look: Look) -> tuple[Sign, str]:
    if look.problem:
        return Sign(BAD, "Not answering"), f"The daemon does not answer: {look.problem}"
    models = look.status.get("models", [])
    match look.status.get("state"):
        case "ready":
            return Sign(OK, "Ready"), "Prompts are answered."
        case "starting":
            return Sign(
                BUSY, "Starting"
            ), "The first model is being fetched or loaded. Prompts wait in the queue."
        case "degraded" if not models:
            return Sign(WARN, "Needs attention"), "No model is configured."
        case "degraded":
            answers = models[0]["state"] in ("ready", "idle", "loading")
            return Sign(WARN, "Needs attention"), (
                "Prompts are answered, but somebody should look at this device."
                if answers
                else f"{models[0]['name']} gives no answers."
            )
    return Sign(QUIET, str(look.status.get("state", "unknown"))), ""


def _facts(status: Document, now: int) -> Iterator[Fact]:
    if broker := status.get("broker"):
        place = f"{broker['host']}:{broker['port']}"
        if broker["connected"]:
            yield Fact("Broker", "connected", place)
        else:
            yield Fact("Broker", "not connected", broker.get("problem") or place, WARN)
    if registry := status.get("registry"):
        yield _registry(registry, now)
    if cache := status.get("cache"):
        used = f"{human_bytes(cache['bytes'])} of {human_bytes(cache['quota_bytes'])}"
        yield Fact("Cache", used, f"{human_bytes(cache['free_bytes'])} free on the disk")
    if (link := status.get("link") or {}).get("bytes_per_day"):
        used = "?" if link["used_bytes"] is None else human_bytes(link["used_bytes"])
        yield Fact("Line today", f"{used} of {human_bytes(link['bytes_per_day'])}")
    if walls := status.get("walls"):
        landlock = f"Landlock {walls['landlock']}" if walls["landlock"] else "no Landlock"
        seccomp = "seccomp" if walls["seccomp"] else "no seccomp"
        whole = bool(walls["landlock"] and walls["seccomp"])
        yield Fact("Walls", f"{landlock}, {seccomp}", "what this host can build", "" if whole else WARN)


def _registry(registry: Document, now: int) -> Fact:
    if not registry["uri"]:
        return Fact("Registry", "none")
    place = _place(registry["uri"])
    if registry["last_check"] is None:
        return Fact("Registry", "not asked yet", place)
    asked = f"{place}, asked {words.ago(now - registry['last_check'])}"
    if not registry["reachable"]:
        return Fact("Registry", "out of reach", registry["problem"] or asked, WARN)
    return Fact("Registry", "refuses this device", registry["problem"], WARN) if registry["problem"] else Fact(
        "Registry", "reachable", asked)  # fmt: skip


def _place(uri: str) -> str:
    """Where it is, without what an address may carry beside that."""
    try:
        parts = urlsplit(uri)
        where = parts.hostname and (f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname)
    except ValueError:
        where = None
    return where or uri.partition(":")[0]


# --- A model --------------------------------------------------------------------------------------------

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


def _model(model: Document, now: int) -> Model:
    attempt = model.get("attempt") or {}
    walls = model.get("walls") or {}
    faults = tuple((model.get("quarantined") or {}).values())
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
    left = "" if progress["eta_s"] is None else f", {words.span(progress['eta_s'])} left"
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


# --- Prompts --------------------------------------------------------------------------------------------


_RESULTS = {"ok": Sign(PLAIN, "answered"), "cancelled": Sign(QUIET, "cancelled")}


def _prompt(prompt: Document, now: int) -> Prompt:
    asked, said = prompt.get("prompt_tokens"), prompt.get("completion_tokens")
    return Prompt(
        at=datetime.fromtimestamp(prompt["at"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        ago=words.ago(now - prompt["at"]),
        model=prompt["model"],
        sign=_RESULTS.get(prompt["code"]) or Sign(BAD, prompt["code"].replace("_", " ")),
        queue=words.took(prompt.get("queue_ms")),
        first_token=words.took(prompt.get("first_token_ms")),
        total=words.took(prompt.get("total_ms")),
        tokens=f"{asked} + {said}" if asked or said else "–",
        rate=words.rate(prompt.get("tokens_per_s")),
    )


def _pictures(prompts: list[Document]) -> tuple[Picture, ...]:
    if not prompts:
        return ()
    rates, firsts = (
        [each.get(key) if each["code"] == "ok" else math.nan for each in prompts]
        for key in ("tokens_per_s", "first_token_ms")
    )
    return (
        picture.picture_of("Speed", rates, lambda value: f"{words.rate(value)} tokens/s"),
        picture.picture_of("Time to the first token", firsts, words.took),
    )
