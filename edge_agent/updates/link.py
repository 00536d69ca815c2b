"""The line and the moment of a switch, as this device has them now: `[link]`, the clock, the count, the file.

`link_budget.py` has the rules, and this has the words for people.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from edge_agent.cache import line_use
from edge_agent.cache.store import Store
from edge_agent.errors import ActivationHeld, EdgeAgentError, LinkHeld, StoreError
from edge_agent.settings.link import LinkSettings
from edge_agent.sync.protocol import LinkJob
from edge_agent.updates import link_budget
from edge_agent.updates.link_budget import Held, LinkPlan
from edge_agent.updates.waiting import Found, Waiting


class Link:
    """Any thread.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, settings: LinkSettings, store: Store, clock: Callable[[], float]) -> None:
        self._plan = LinkPlan(settings)
        self._store = store
        self._clock = clock

    def bounds(self, *, overruled: bool) -> LinkJob:
        """What a sync may take of the line now.

        Args:
            overruled: an operator wants it now.

        Raises:
            StoreError: nobody knows what came today.
        """
        if overruled:
            return link_budget.no_bounds(self._plan)
        return link_budget.bounds(self._clock(), self._plan, self._used_bytes())

    def fetch_held(self) -> Held | None:
        """Whether a download must wait now.

        Raises:
            StoreError: nobody knows what came today.
        """
        return link_budget.held(self._clock(), self._plan, self._used_bytes())

    def fetch_waits(self, error: LinkHeld, found: Found) -> tuple[Waiting, LinkHeld]:
        """A fetch that a sync did not begin, or did not end.

        Args:
            error: what the sync said.
        """
        now_s = self._clock()
        held = self.fetch_held()
        if held is None:  # the clock was set meanwhile, or a whole file is larger than what the day has left
            tomorrow_s = self._plan.next_day(now_s) if self._plan.bytes_per_day else None
            held = Held(by=error.message, until_s=tomorrow_s)
        told = LinkHeld(
            f"version {found.version} is {self._until(held)}, {found.missing_bytes} bytes are missing",
            remedy="`edge-agent models pull --now` fetches it now",
        )
        return self._waiting(found, held, told), told

    def activation_held(self, *, overruled: bool = False) -> Held | None:
        """Whether a version that is here must wait now. The file is nobody's to overrule but who made it."""
        inhibited = self._inhibited()
        if overruled and not inhibited:
            return None
        return link_budget.activation_held(self._clock(), self._plan, inhibited)

    def check_inhibited(self) -> None:
        """Asked once more when a version has passed its gate.

        Raises:
            ActivationHeld: the file has come meanwhile.
        """
        if inhibited := self._inhibited():
            raise ActivationHeld(inhibited)

    def activation_waits(self, held: Held, found: Found) -> tuple[Waiting, ActivationHeld]:
        """A version that is here, and does not take over now."""
        how = "activate" if held.until_s is None else "pull --now"
        told = ActivationHeld(
            f"version {found.version} is here, and {self._until(held)}",
            remedy=f"`edge-agent models {how}` does not wait",
        )
        return self._waiting(found, held, told), told

    def _waiting(self, found: Found, held: Held, told: EdgeAgentError) -> Waiting:
        return Waiting(
            **asdict(found), until_s=held.until_s, at_s=self._clock(), code=told.code, reason=str(told)
        )

    def is_over(self, waiting: Waiting) -> bool:
        """Whether a wait has ended whose end nobody could tell: the file is gone, the clock is set."""
        if waiting.until_s is not None or not waiting.of_link:
            return False
        if waiting.code == ActivationHeld.code:
            return self.activation_held() is None
        return link_budget.held(self._clock(), self._plan, 0) is None

    def document(self) -> dict[str, Any]:
        """What status shows of the line."""
        try:
            used_bytes: int | None = self._used_bytes() if self._plan.bytes_per_day else None
        except StoreError:  # the next check says so
            used_bytes = None
        return {"bytes_per_day": self._plan.bytes_per_day, "used_bytes": used_bytes}

    def _used_bytes(self) -> int:
        if not self._plan.bytes_per_day:
            return 0
        now_s = self._clock()
        return line_use.used_bytes(self._store, lambda at_s: self._plan.same_day(at_s, now_s))

    def _inhibited(self) -> str:
        """Why the file keeps versions from taking over; empty where it does not. One that cannot be looked at does:
        whoever made it cannot be asked."""
        file = self._plan.inhibit_file
        if not file:
            return ""
        try:
            os.lstat(file)
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            return f"link.inhibit_file {file} cannot be looked at: {error.strerror}"
        return f"link.inhibit_file {file} exists"

    def _until(self, held: Held) -> str:
        if held.until_s is None:
            return f"held: {held.by}"
        by = f": {held.by}" if " " in held.by else f" by {held.by}"
        return f"held until {self._plan.shown(held.until_s, self._clock())}{by}"
