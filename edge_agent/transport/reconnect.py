"""When the next connection to the broker is tried, and which protocol it offers. Pure rules, no I/O.

A device waits longer after each attempt, with jitter, so that a fleet does not come back all at once. It waits longest
where another client took over its session: two devices of one name must not fight for ever.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

RETRY_FIRST_S, RETRY_LAST_S = 0.5, 60.0
TAKEN_OVER_S = 120.0
STEADY_S = 300.0
"""A connection that lasted this long was a good one: the next wait starts from the beginning."""
_HANG_UPS = 3


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a connection that reached the broker's port ended.

    Attributes:
        connected: the broker had accepted it.
        refused: the broker said no, with a reason.
        unsupported: the reason was the protocol.
        silent: the broker said nothing at all until the limit.
        taken_over: another client of the same name came.
        over_an_answer: the broker took exception to one answer, which will not be in the way next time.
    """

    lasted_s: float
    connected: bool = False
    refused: bool = False
    unsupported: bool = False
    silent: bool = False
    taken_over: bool = False
    over_an_answer: bool = False


class Reconnect:
    """The rules for one broker. Only the network thread touches it.

    Args:
        protocol: `mqtt.protocol`; only `auto` changes from connection to connection.
        speaks_5: the broker is known to speak MQTT 5.

    Attributes:
        version5: the next connection offers MQTT 5, else 3.1.1.
        retry_s: the next wait, without its jitter.
    """

    def __init__(self, protocol: str, *, speaks_5: bool) -> None:
        self.version5 = protocol != "3.1.1"
        self.speaks_5 = speaks_5
        self.retry_s = RETRY_FIRST_S
        self._auto = protocol == "auto"
        self._hang_ups = 0
        self._by_hang_up = False

    def wait_after(self, ending: Ending | None) -> float:
        """How many seconds to wait before the next attempt.

        Args:
            ending: of the last connection; None where the broker's port was not even reached.
        """
        if ending is not None:
            if ending.connected and ending.lasted_s > STEADY_S:
                self.retry_s = RETRY_FIRST_S
            if self._auto:
                self._choose_protocol(ending)
        if ending is not None and ending.over_an_answer:
            return RETRY_FIRST_S * random.uniform(0.5, 1.5)
        wait_s = TAKEN_OVER_S if ending is not None and ending.taken_over else self.retry_s
        self.retry_s = min(RETRY_LAST_S, self.retry_s * 2)
        return wait_s * random.uniform(0.5, 1.5)

    def _choose_protocol(self, ending: Ending) -> None:
        """Chooses the protocol that the next connection offers.

        A broker that does not speak MQTT 5 says so, or just hangs up. A hang-up has many causes, so only several in a
        row lead to one attempt with 3.1.1, and a connection made that way is followed by one with 5 again.
        """
        if ending.unsupported:
            self.version5, self.retry_s = not self.version5, RETRY_FIRST_S
        elif ending.connected:
            self._hang_ups = 0
            self.version5 = self.version5 or self._by_hang_up
        elif not ending.refused and not ending.silent and not self.speaks_5:
            self._hang_ups += 1
            self._by_hang_up = self._hang_ups % (_HANG_UPS + 1) == _HANG_UPS
            self.version5 = not self._by_hang_up
