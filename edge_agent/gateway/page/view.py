"""What the page says of a device, as values for its templates: words, tones and numbers that people read. Pure.

Owns how a state is told, and nothing of how it looks. Reads the daemon's documents; a part that is missing in them is
left out. Models are told in `models.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

from edge_agent.gateway.page import Look, picture, words
from edge_agent.gateway.page.models import Model, model_of
from edge_agent.gateway.page.picture import Picture
from edge_agent.gateway.page.signs import BAD, BUSY, OK, PLAIN, QUIET, WARN, Document, Fact, Sign
from edge_agent.terminal import age, human_bytes, span


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
        models=tuple(model_of(each, now) for each in status.get("models", [])),
        facts=tuple(_facts(status, now)) if status else (),
        prompts=tuple(_prompt(each, now) for each in reversed(prompts)),
        pictures=_pictures(prompts),
    )


# --- The device -----------------------------------------------------------------------------------------


def _about(status: Document, recent: Document, now: int) -> Iterator[str]:
    if version := status.get("agent_version"):
        yield f"edge-agent {version}"
    if started := recent.get("started_at"):
        yield f"up {_in_minutes(now - started)}"
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


def _in_minutes(seconds: float) -> str:
    """Not in seconds, where it would change at each look."""
    return span(seconds - seconds % 60) if seconds >= 60 else age(seconds)


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
