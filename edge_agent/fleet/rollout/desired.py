"""`model/desired` of a device, as a rollout changes it: one model's entry, whatever else stands there. Pure.

An entry is taken back with `null`, retained: a device that was away meanwhile learns of it as well. A message that was
removed would leave it at the version for ever. Contract: docs/mqtt.md, *Desired and reported models*.
"""

from __future__ import annotations

import json
from typing import Any

from edge_agent.fleet.fields import read_object

_MAX_BYTES = 64 << 10
"""A device takes no longer one."""


def version_in(body: bytes, name: str) -> int | None:
    """The version that a retained desired state names for this model; None for another form, or nothing."""
    entry = _models(body).get(name)
    version = entry.get("version") if isinstance(entry, dict) else None
    return version if isinstance(version, int) and not isinstance(version, bool) else None


def is_released_in(body: bytes, name: str) -> bool:
    """Whether a retained desired state takes back what it said of this model."""
    models = _models(body)
    return name in models and models[name] is None


def with_version(body: bytes, name: str, version: int | None, *, within_s: int = 0) -> bytes:
    """The document with another entry for this model; entries of other models stay.

    Args:
        body: what is retained now; empty for nothing. What cannot be read was obeyed by nobody, and goes.
        version: None for `null`.
        within_s: in the course of how many seconds the devices ask the registry, each at a place of its own.
    """
    entry = {"version": version} if version is not None else None
    document: dict[str, Any] = {"models": {**_models(body), name: entry}}
    if within_s:
        document["within_s"] = within_s
    return json.dumps(document, separators=(",", ":")).encode()


def _models(body: bytes) -> dict[str, Any]:
    document = read_object(body) if len(body) <= _MAX_BYTES else None
    models = document.get("models") if document else None
    return models if isinstance(models, dict) else {}
