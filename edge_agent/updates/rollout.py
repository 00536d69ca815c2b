"""A version that reaches a share of the devices first: who takes it, and what a new device outside of it runs. Pure.

The version's tags say so: `edge_agent.rollout`, a percentage, and `edge_agent.rollout_from`, the number of the version
that everybody else has. Only what an alias means is held back; who asks for a version by its number gets it.
"""

from __future__ import annotations

import math
import re

from edge_agent.errors import VersionHeld
from edge_agent.package.place import place_of

LOOK_BACK = 8
"""So many earlier versions a new device asks for where no tag names one."""
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


class NotInRollout(VersionHeld):
    """The version is not for this device yet. Nothing is wrong.

    Attributes:
        version: its number.
        stand_in: the number of the version that everybody else has; None where its tag names none.
    """

    code = "not_in_rollout"

    def __init__(
        self, message: str, *, remedy: str = "", version: int = 0, stand_in: int | None = None
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.version = version
        self.stand_in = stand_in


def in_rollout(*, device_id: str, name: str, version: int, percent: float) -> bool:
    """True when this device is among the `percent` of devices that take a version now."""
    return int(place_of(device_id, name=name, version=version)[:8], 16) % 100 < percent


def check_rollout(
    tag: str | None, *, device_id: str, name: str, version: int, rollout_from: str = ""
) -> None:
    """Holds a version's rollout tag against this device.

    Args:
        tag: the value of `edge_agent.rollout`, a percentage; None or empty when there is none.
        rollout_from: the value of `edge_agent.rollout_from`; what is no number names no version.

    Raises:
        NotInRollout: not yet; a tag that is no percentage is for nobody.
    """
    if not tag:
        return
    try:
        percent = float(tag.strip().removesuffix("%"))
    except ValueError:
        percent = math.nan
    if not math.isfinite(percent):
        why = f"version {version} has the rollout tag {tag[:40]!r}, which is no percentage"
    elif not in_rollout(device_id=device_id, name=name, version=version, percent=percent):
        why = f"version {version} is rolled out to {percent:g} % of the devices, not yet to this one"
    else:
        return
    named = rollout_from.strip()
    stand_in = int(named) if _NUMBER.fullmatch(named) else None
    raise NotInRollout(why, version=version, stand_in=stand_in)


def earlier_versions(version: int) -> range:
    """The numbers that may stand in where no tag names one, newest first."""
    return range(version - 1, max(0, version - 1 - LOOK_BACK), -1)
