"""Whether another device uses this device's name. Pure rules, no I/O; the network thread's.

Two clients with one client id take the session from each other, for ever. With MQTT 5 a broker says so to the one that
it disconnects (0x8E); with 3.1.1, and where the word gets lost, it just hangs up. Three connections in a minute that
the broker accepted, worked on and then hung up on are taken for the same: a broker that stops or is out of reach does
not accept the next one at once. The one that was disconnected comes back once within seconds, so that the other one is
told, too; from then on each waits long, and each further hang-up is the other one's, however late it comes.
"""

from __future__ import annotations

import collections

from edge_agent.errors import EdgeAgentError
from edge_agent.transport.reconnect import Ending

PEACE_S = 300.0
"""Nobody has come for so long: longer than the other one would wait."""
WITHIN_S = 60.0
_HANG_UPS = 3


class DeviceIdTaken(EdgeAgentError):
    """Another client uses this device's client id."""

    code = "device_id_taken"


class Namesake:
    """What the ends of this device's connections tell.

    Attributes:
        takeovers: how often in a row a connection was ended by the other one, as far as that is clear.
    """

    def __init__(self) -> None:
        self.takeovers = 0
        self._ends: collections.deque[float] = collections.deque(maxlen=_HANG_UPS)
        self._last_s = 0.0

    def ended(self, ending: Ending | None, *, now_s: float) -> None:
        """A connection has ended, or was not made.

        Args:
            ending: None where the broker was not reached.
            now_s: monotonic seconds.
        """
        known = self.known(now_s)
        hung_up = ending is not None and ending.connected and ending.hung_up and not ending.over_an_answer
        if ending is not None and (ending.taken_over or (hung_up and known)):
            self._note(now_s)
            return
        if not hung_up:
            self._ends.clear()
            return
        self._ends.append(now_s)
        if len(self._ends) == _HANG_UPS and now_s - self._ends[0] < WITHIN_S:
            self._note(now_s)

    def known(self, now_s: float) -> bool:
        """True while there seems to be another one."""
        if self.takeovers and now_s - self._last_s > PEACE_S:
            self.takeovers = 0
        return self.takeovers > 0

    def trouble(self, now_s: float) -> DeviceIdTaken | None:
        """What somebody should look at."""
        if not self.known(now_s):
            return None
        return DeviceIdTaken(
            "another device seems to use this device_id: the broker ends this device's connections for another's",
            remedy="give each device a device_id of its own",
        )

    def _note(self, now_s: float) -> None:
        self.takeovers += 1
        self._last_s = now_s
