"""When the next connection to the broker is tried. Pure rules, no I/O.

A device waits longer after each attempt that fails, with jitter, so that a fleet does not come back all at once. A
connection that the broker had accepted starts the waits from their beginning, so that a broker that was away for
seconds is found within seconds, whatever came before. Connections that end soon after they were made count as failures
one after the other: a broker that breaks down under a fleet sees it less and less often.

It waits longest where another client took over its session (`namesake.py`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from edge_agent.errors import BrokerRefused, BrokerUnreachable

RETRY_FIRST_S, RETRY_LAST_S = 0.5, 60.0
TAKEN_OVER_FIRST_S, TAKEN_OVER_S = 15.0, 120.0
"""The first wait is short: coming back once tells the other device of this one."""
STEADY_S = 10.0
"""A connection that lasted this long was a good one."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a connection that reached the broker's port ended.

    Attributes:
        connected: the broker had accepted it.
        refused: the broker said no, with a reason.
        unsupported: the reason was the protocol.
        silent: the broker said nothing at all until the limit.
        hung_up: the broker had worked on it, and ended it without a reason of its own.
        taken_over: another client of the same name came.
        over_an_answer: the broker took exception to one answer, which will not be in the way next time.
    """

    lasted_s: float
    connected: bool = False
    refused: bool = False
    unsupported: bool = False
    silent: bool = False
    hung_up: bool = False
    taken_over: bool = False
    over_an_answer: bool = False

    @property
    def code(self) -> str:
        """For the log."""
        if self.taken_over:
            return "device_id_taken"  # `namesake.py` knows this file
        return BrokerRefused.code if self.refused else BrokerUnreachable.code


class Reconnect:
    """The rules for one broker. Only the network thread touches it.

    Attributes:
        retry_s: the next wait, without its jitter.
    """

    def __init__(self) -> None:
        self.retry_s = RETRY_FIRST_S
        self._short = 0

    def wait_after(self, ending: Ending | None, *, takeovers: int = 0, other_protocol: bool = False) -> float:
        """How many seconds to wait before the next attempt.

        Args:
            ending: of the last connection; None where the broker's port was not even reached.
            takeovers: how often in a row another client of the same name has ended a connection.
            other_protocol: the next attempt offers an older protocol, because of how the last one ended.
        """
        if ending is not None and ending.connected:
            self._short = 0 if ending.lasted_s >= STEADY_S else self._short + 1
            self.retry_s = min(RETRY_LAST_S, RETRY_FIRST_S * 2.0 ** min(self._short, 10))
        if other_protocol or (ending is not None and ending.over_an_answer):
            return _spread(RETRY_FIRST_S)
        if takeovers:
            return _spread(TAKEN_OVER_FIRST_S if takeovers == 1 else TAKEN_OVER_S)
        wait_s = self.retry_s
        self.retry_s = min(RETRY_LAST_S, self.retry_s * 2)
        return _spread(wait_s)


def _spread(wait_s: float) -> float:
    return wait_s * random.uniform(0.5, 1.5)
