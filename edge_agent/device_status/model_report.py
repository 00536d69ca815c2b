"""What is reported of one model, as data: what it wants, how far that is, and what its versions have shown.

The fields of docs/mqtt.md, *Desired and reported models*, but for those that status has, too. Words for people stand
beside them, in `reason`.
"""

from __future__ import annotations

from typing import Any

from edge_agent.cache.record import version_of
from edge_agent.cache.state import ModelState
from edge_agent.package.reference import ModelRef
from edge_agent.updates.check import Outlook
from edge_agent.updates.choice import Wanted, wanted_version
from edge_agent.updates.heard import Heard


def progressing(state: ModelState, outlook: Outlook) -> dict[str, Any]:
    """What is the same in `model/reported` and in `edge-agent status --json`."""
    waiting, measured = outlook.waiting, state.measured.get(state.active or "")
    held = waiting if waiting and waiting.of_link else None
    return {
        "progress": outlook.progress,
        "wanted": outlook.wanted.document(),
        "attempt": outlook.attempt.document() if outlook.attempt else None,
        "gate": measured.document() if measured else None,
        "link": {"missing_bytes": held.missing_bytes, "held_until": held.held_until} if held else None,
    }


def on_disk(ref: ModelRef, state: ModelState) -> dict[str, Any]:
    """As `progressing`, where no daemon runs.

    Args:
        ref: of the settings.
    """
    wanted = wanted_version(ref, state)
    return progressing(state, Outlook(wanted=wanted, attempt=state.attempt, waiting=None, progress=None))


def held(name: str, state: ModelState, wanted: Wanted, heard: Heard) -> dict[str, Any]:
    """What `edge-agent status` has besides: the version that waits, where one does.

    Args:
        name: of the settings.
    """
    hold = heard.hold(name, state, wanted)
    return {"held": hold.document() if hold else None}


def versions(state: ModelState) -> dict[str, Any]:
    """The versions beside the active one, by their numbers in the registry."""
    return {
        "previous": version_of(state.previous) if state.previous else None,
        "quarantined": [
            {"version": version_of(key), "code": fault.code} for key, fault in state.quarantined.items()
        ],
    }
