"""A device's place among all devices for one version: who takes it first. Pure.

The same device always has the same place for a version, and another one for the next, so that no device is always the
first. Both ways to reach a share of a fleet use it: the tag `edge_agent.rollout`, and the waves of a rollout.
"""

from __future__ import annotations

import hashlib


def place_of(device_id: str, *, name: str, version: int) -> str:
    """64 hexadecimal digits, evenly spread over the devices; the lowest comes first.

    Args:
        name: the model's, in the settings that the devices have in common.
    """
    return hashlib.sha256(f"{device_id}\n{name}\n{version}".encode()).hexdigest()
