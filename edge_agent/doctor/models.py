"""The configured models: which version runs and what keeps it, whether memory holds them, and on how many threads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_agent import printable
from edge_agent.cache.record import VersionRecord, version_of
from edge_agent.cache.store import Store
from edge_agent.doctor import cache
from edge_agent.doctor.finding import Finding, ok, warn
from edge_agent.host import memory
from edge_agent.serving.learned import Learned
from edge_agent.serving.memory_budget import MemoryBudget
from edge_agent.serving.threads import ThreadChoice
from edge_agent.settings import Settings
from edge_agent.terminal import human_bytes, standing_of
from edge_agent.updates.heard import Heard
from edge_agent.updates.operations import inventory


def check(settings: Settings, status: Mapping[str, Any] | None) -> Iterator[Finding]:
    """
    Args:
        status: as the daemon says it; None where none runs.
    """
    yield from _check_versions(settings, status)
    yield from _check_memory(settings)
    yield from _check_fallbacks(settings)
    yield from _check_threads(settings)


def _check_versions(settings: Settings, status: Mapping[str, Any] | None) -> Iterator[Finding]:
    """A pin, a desired state, a hold: nothing is wrong, and whoever waits for another version looks for them."""
    for model in status["models"] if status else _on_disk(settings):
        runs = f"version {model['version']}" if model["version"] else "no version yet"
        notes = [printable.line(note) for _, note in standing_of(model)]
        yield ok("models.version", "; ".join([f"{model['name']}: {runs}", *notes]))


def _on_disk(settings: Settings) -> Iterator[Mapping[str, Any]]:
    store = Store(settings.state_dir)
    heard = Heard(settings.registry.uri, store, time.time)
    for model in inventory(settings, store, heard, state=cache.state_or_empty(store)):
        if model["name"] in settings.models:
            yield {**model, "version": version_of(model["active"]) if model["active"] else None}


def _check_memory(settings: Settings) -> Iterator[Finding]:
    """Memory for all models at once and one more, since an update is loaded beside the active version."""
    store = Store(settings.state_dir)
    budget = MemoryBudget(0, learned=Learned(store.learned_file))
    found = {}
    for name, model in settings.models.items():
        records = store.versions(name)
        if records:
            found[name] = max(
                budget.expected_bytes(record, store.folder(record), model.context_tokens)
                for record in records
            )
    if not found:
        yield ok(
            "models.memory",
            f"{human_bytes(memory.available_bytes())} available; no version is in the cache yet",
        )
        return
    # The memory of models that are loaded now is no longer available, but `needed` includes it.
    needed = sum(found.values())
    available = memory.available_bytes() + _loaded_bytes()
    line = f"{human_bytes(needed)} expected for {', '.join(found)}, {human_bytes(available)} available"
    if needed > available and len(found) > 1:
        yield warn(
            "models.memory",
            f"{line}: models are loaded one at a time, and a prompt waits for its model",
            "use smaller or fewer models",
        )
    elif needed > available:
        yield warn(
            "models.memory", f"{line}: the context may be smaller than configured", "use a smaller model"
        )
    elif needed + max(found.values()) > available:
        yield warn(
            "models.memory",
            f"{line}: no room for an update beside the active version",
            "prompts wait while an update is loaded; free some memory to avoid this",
        )
    else:
        yield ok("models.memory", line)


def _check_fallbacks(settings: Settings) -> Iterator[Finding]:
    """Reports each model that its fallback serves, and why its own version does not run."""
    state = cache.state_or_empty(Store(settings.state_dir))
    for name, model in settings.models.items():
        if why := state.model(name).instead:
            yield warn(
                "models.fallback",
                f"{name}: its fallback {model.fallback} runs: {why}",
                "install what its own version needs, or register a version that runs here",
            )
        elif model.fallback:
            yield ok("models.fallback", f"{name}: runs its own version; {model.fallback} is not needed")


def _check_threads(settings: Settings) -> Iterator[Finding]:
    threads = settings.inference.threads
    if threads > len(os.sched_getaffinity(0)):
        yield warn(
            "models.threads",
            f"inference.threads is {threads}, but this process may use {len(os.sched_getaffinity(0))} CPUs",
            "set inference.threads to the number of physical cores, or to 0",
        )
    elif threads:
        yield ok("models.threads", f"{threads}, from inference.threads")
    else:
        yield from _check_measured_threads(settings)


def _check_measured_threads(settings: Settings) -> Iterator[Finding]:
    store = Store(settings.state_dir)
    choice = ThreadChoice(0, learned=Learned(store.learned_file))
    records = _active(settings)
    if not records:
        yield ok("models.threads", "measured when a model is loaded for the first time")
    for record in records:
        found = choice.candidates(record.digest)
        said = (
            f"{found[0]} threads"
            if len(found) == 1
            else f"not measured yet, one of {', '.join(map(str, found))}"
        )
        yield ok("models.threads", f"{record.name}: {said}; inference.threads overrides this")


def _active(settings: Settings) -> list[VersionRecord]:
    store = Store(settings.state_dir)
    state = cache.state_or_empty(store)
    active = {name: state.model(name).active for name in settings.models}
    return [record for name, key in active.items() if key and (record := store.record(name, key))]


def _loaded_bytes() -> int:
    """Resident memory of all runners on this host, including the daemon's."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        if b"edge_agent.runner.child" in arguments:
            total += memory.resident_bytes(int(process.name))
    return total
