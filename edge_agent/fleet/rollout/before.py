"""What was known of each device before a rollout: pages beside its state, on
`{prefix}/v1/@fleet/rollout/NAME/before/N`.

Owns their form. They are written once, before the first device is told anything, and removed at the end: so the state
stays small, a page fits into a packet, and a console that takes over compares with the same numbers. What comes back is
input; a page that cannot be read, or is lost, makes its devices ones of which nothing is known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from edge_agent.fleet.rollout.standing import Before
from edge_agent.topics import ID_PATTERN

PAGE_DEVICES = 500
"""Each takes 150 bytes at most."""
MAX_PAGE_BYTES = 100 << 10
_STATE_CHARACTERS = 16
_MAX_NUMBER = 1e15


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some devices.

    Attributes:
        rollout: the id of the rollout that wrote it; to another one it says nothing.
    """

    rollout: str
    devices: Mapping[str, Before]

    def encode(self) -> bytes:
        entries = {device_id: _entry(before) for device_id, before in self.devices.items()}
        return json.dumps({"rollout": self.rollout, "devices": entries}, separators=(",", ":")).encode()


def pages_of(known: Mapping[str, Before], rollout: str) -> list[Page]:
    """All devices, on pages that fit into a packet."""
    entries = iter(sorted(known.items()))
    found = []
    while page := dict(islice(entries, PAGE_DEVICES)):
        found.append(Page(rollout=rollout, devices=page))
    return found


def _entry(before: Before) -> list[Any]:
    speeds = (before.tokens_per_s, before.gate_tokens_per_s)
    short = [round(speed, 2) if speed is not None else None for speed in speeds]
    return [before.version, before.state[:_STATE_CHARACTERS], *short, before.attempt_at]


def read_page(body: bytes) -> Page | None:
    """Reads what is retained; None for what is no page. Never raises: an entry that cannot be read is left out."""
    if not body or len(body) > MAX_PAGE_BYTES:
        return None
    try:
        document = json.loads(body)
        rollout, entries = document["rollout"], document["devices"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    devices = {
        device_id: before
        for device_id, entry in islice(entries, PAGE_DEVICES)
        if ID_PATTERN.fullmatch(device_id) and (before := _before(entry)) is not None
    }
    return Page(rollout=str(rollout)[:64], devices=devices)


def _before(entry: Any) -> Before | None:
    if not isinstance(entry, list) or len(entry) != 5:
        return None
    version, state, *numbers = entry
    is_version = isinstance(version, int) and not isinstance(version, bool) and 0 < version < 10**18
    if not isinstance(state, str) or not (version is None or is_version) or not all(map(_is_number, numbers)):
        return None
    tokens_per_s, gate_tokens_per_s, attempt_at = numbers
    return Before(
        version=version,
        state=state[:_STATE_CHARACTERS],
        tokens_per_s=tokens_per_s,
        gate_tokens_per_s=gate_tokens_per_s,
        attempt_at=attempt_at,
    )


def _is_number(value: Any) -> bool:
    if value is None:
        return True
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and math.isfinite(value) and 0 <= value <= _MAX_NUMBER
