"""Which version a device wants. Pure.

Strongest first: quarantine (never) > local pin > desired (MQTT) > the settings' uri.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_agent.cache.record import version_of
from edge_agent.cache.state import ModelState
from edge_agent.errors import (
    CacheBusy,
    ContentError,
    EdgeAgentError,
    MemoryShort,
    RunnerError,
    SettingsError,
    StoreError,
)
from edge_agent.package.reference import ModelRef

MAX_DESIRED_BYTES = 64 << 10
MAX_WITHIN_S = 86_400.0
"""The longest time over which a fleet's checks are spread."""


IMPORTED = "import"
"""Stands in a state for the reference, where a version file was the last to say which version it means."""


@dataclass(frozen=True, kw_only=True)
class Desired:
    """What `model/desired` says.

    Attributes:
        uris: for each model named there its `models:/…`, empty to follow the settings again.
        within_s: in the course of how many seconds to ask the registry.
    """

    uris: Mapping[str, str]
    within_s: float = 0.0


class BadDesired(ContentError):
    """A desired state that is not understood: it is reported, not obeyed."""

    code = "desired_invalid"


def wanted_ref(settings_ref: ModelRef, state: ModelState) -> ModelRef:
    """What to ask the registry for: the desired reference, else the settings'."""
    return ModelRef.parse(state.desired) if state.desired else settings_ref


def needs_fallback(error: EdgeAgentError) -> bool:
    """True where a model's own version cannot run here, as far as this error tells.

    False where it was not looked at: the registry is out of reach or has no such version, another process works
    on the cache, or the version is held.
    """
    about_the_version = ContentError | RunnerError | MemoryShort | StoreError
    return isinstance(error, about_the_version) and not isinstance(error, CacheBusy | BadDesired)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The version that a device wants.

    Attributes:
        version: its number; None where the registry has not said yet what the reference means.
        via: who wants it: `pin`, `desired`, `alias` (the settings' uri), or `import` (a version file, where the
            registry has said nothing since).
    """

    version: int | None
    via: str

    def document(self) -> dict[str, Any]:
        """For status and `model/reported`."""
        return {"version": self.version, "via": self.via}


def wanted_version(settings_ref: ModelRef, state: ModelState) -> Wanted:
    """Which version is wanted, and why."""
    if state.pinned:
        return Wanted(version=version_of(state.pinned), via="pin")
    ref = wanted_ref(settings_ref, state)
    said_of, said = state.resolved or ("", None)
    if ref.version is None and said_of == IMPORTED:
        return Wanted(version=said, via="import")
    version = ref.version or (said if said_of == str(ref) else None)
    return Wanted(version=version, via="desired" if state.desired else "alias")


def parse_desired(payload: bytes, *, refs: Mapping[str, ModelRef]) -> Desired:
    """Reads `model/desired`.

    Args:
        payload: `{"models": {NAME: {"uri": …} or {"version": 7} or null}, "within_s": 300}`, where `within_s` may be
            left out; empty clears all.
        refs: the settings' reference of each configured model.

    Raises:
        BadDesired: not understood as a whole; nothing of it is obeyed.
    """
    if not payload.strip():
        return Desired(uris=dict.fromkeys(refs, ""))
    document = _document("the desired state", payload)
    models = document.get("models") if set(document) <= {"models", "within_s"} else None
    if not isinstance(models, dict):
        raise BadDesired('the desired state is not {"models": {…}}')
    uris = {
        name: _desired_uri(name, entry, refs)
        for name, entry in models.items()
        if entry is not None or name in refs  # a rollout leaves null behind, and settings lose models
    }
    return Desired(uris=uris, within_s=_within_s(document))


def parse_sync(payload: bytes) -> float:
    """Reads `ctl/sync`: in the course of how many seconds to ask the registry; 0 for at once.

    Args:
        payload: empty, or `{"within_s": 300}`.

    Raises:
        BadDesired: it is something else.
    """
    if not payload.strip():
        return 0.0
    document = _document("the request to check", payload)
    if not set(document) <= {"within_s"}:
        raise BadDesired('the request to check is not empty, and not {"within_s": 300}')
    return _within_s(document)


def _document(what: str, payload: bytes) -> Mapping[str, Any]:
    """
    Raises:
        BadDesired: it is too long, or no JSON object.
    """
    if len(payload) > MAX_DESIRED_BYTES:
        raise BadDesired(f"{what} has more than {MAX_DESIRED_BYTES} bytes")
    try:
        document = json.loads(payload.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadDesired(f"{what} is not JSON") from error
    if not isinstance(document, dict):
        raise BadDesired(f"{what} is no JSON object")
    return document


def _within_s(document: Mapping[str, Any]) -> float:
    value = document.get("within_s", 0)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_WITHIN_S:
        return float(value)
    raise BadDesired(f"within_s is a number of seconds, at most {MAX_WITHIN_S:.0f}")


def _desired_uri(name: str, entry: Any, refs: Mapping[str, ModelRef]) -> str:
    if name not in refs:
        raise BadDesired(f"no model is called {name[:80]!r} here")
    if entry is None:
        return ""
    if isinstance(entry, dict) and set(entry) == {"uri"} and isinstance(entry["uri"], str):
        try:
            return str(ModelRef.parse(entry["uri"]))
        except SettingsError as error:
            raise BadDesired(f"model {name}: {error.message}") from error
    if isinstance(entry, dict) and set(entry) == {"version"}:
        version = entry["version"]
        if isinstance(version, int) and not isinstance(version, bool) and 0 < version < 10**18:
            return str(refs[name].at_version(version))
    raise BadDesired(f'model {name} needs {{"uri": "models:/…"}}, {{"version": 7}} or null')
