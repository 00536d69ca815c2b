"""Which version of MQTT the next connection offers, where the settings leave it to the agent. Pure rules, no I/O.

A broker that does not speak MQTT 5 says so (CONNACK 0x84 or 0x01), hangs up, or says nothing at all. The last two have
other causes as well: a broker that starts, that is overloaded, that sits behind a balancer. So they lead to one attempt
with 3.1.1, and a connection that is made that way proves little: the next one offers 5 once more. If that fails in the
same way, 3.1.1 is what the broker speaks, for a day; after that one connection in a day offers 5 first.

A broker that has accepted MQTT 5 is left for no other reason than its own word.
"""

from __future__ import annotations

from dataclasses import dataclass

TRUST_S = 86_400.0
"""How long 3.1.1 is offered first once it is clear that the broker does not speak 5. Brokers are upgraded."""
_HANG_UPS = 3
_SILENCES = 1
"""A silence takes as long as all hang-ups: fifteen seconds."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What became of an offer.

    Attributes:
        accepted: the broker took it.
        unsupported: the broker named the protocol as what it refuses.
        hung_up: it ended the connection without a word.
        silent: it said nothing until the limit.
    """

    accepted: bool = False
    unsupported: bool = False
    hung_up: bool = False
    silent: bool = False


class ProtocolChoice:
    """The rules for one broker. Only the network thread touches it.

    Args:
        protocol: `mqtt.protocol`; only `auto` changes from connection to connection.
        speaks_5: the broker has accepted MQTT 5 before.
        older_until_s: it was clear that it does not speak 5, and 3.1.1 is offered first until then, in wall-clock
            seconds; 0 where nothing is known.

    Attributes:
        version5: the next connection offers MQTT 5, else 3.1.1.
    """

    def __init__(self, protocol: str, *, speaks_5: bool = False, older_until_s: float = 0.0) -> None:
        self.version5 = protocol != "3.1.1"
        self.speaks_5 = speaks_5
        self.older_until_s = older_until_s
        self._auto = protocol == "auto"
        self._vain = 0
        self._doubted = self._guessed = False

    def begin(self, wall_s: float) -> None:
        """A connection is about to be tried.

        Args:
            wall_s: wall-clock seconds; a clock that jumps costs one attempt.
        """
        if self._auto and not self.speaks_5 and self.older_until_s and not self._doubted:
            self.version5 = not 0 < self.older_until_s - wall_s <= TRUST_S
            self._doubted = self.version5

    def note(self, attempt: Attempt, wall_s: float) -> None:
        """What became of the connection that was tried, once it has been accepted or has ended."""
        if not self._auto:
            return
        if attempt.accepted:
            self._accepted(wall_s)
        elif attempt.unsupported:
            self.speaks_5, self.older_until_s = False, 0.0
            self._doubted = self.version5
            self.version5 = not self.version5
        elif (attempt.hung_up or attempt.silent) and not self.speaks_5:
            self._failed(silent=attempt.silent)

    def ended(self) -> None:
        """A connection that had been accepted is over."""
        if self._auto and self._guessed:
            self._guessed, self._doubted, self.version5 = False, True, True

    def _accepted(self, wall_s: float) -> None:
        self._vain = 0
        if self.version5:
            self.speaks_5, self.older_until_s, self._doubted = True, 0.0, False
        elif self._doubted:
            self.older_until_s, self._doubted = wall_s + TRUST_S, False
        elif not 0 < self.older_until_s - wall_s <= TRUST_S:
            self._guessed = True

    def _failed(self, *, silent: bool) -> None:
        self._vain += 1
        if not self.version5:
            if not self.older_until_s or self._vain >= _HANG_UPS:  # neither of them, or no longer this one
                self.version5, self._vain, self.older_until_s = True, 0, 0.0
            return
        self.version5 = not (self._doubted or self._vain >= (_SILENCES if silent else _HANG_UPS))
        if not self.version5:
            self._vain = 0
