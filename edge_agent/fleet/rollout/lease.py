"""Which of several consoles acts. Pure: both clocks are passed in.

Owns what one console knows of the lease that stands in the retained state. A broker keeps the last write and compares
nothing, so the lease is held by what is heard, not by what is written:

- A console acts only `SETTLE_S` after its own state has come back from the broker, if no other came since; and only
  for `LEASE_S`, less a margin, after it sent the newest one that came back. Both are counted by its own steady clock:
  one that was stopped for a minute finds its lease gone.
- Another one claims it after `LEASE_S` in which it heard no change; not by what a clock elsewhere wrote, unless that is
  minutes ago.
- Two that claim at once both hear both claims, in the broker's one order: the last one has it.
- A state with a lower number than one's own comes from a console that was stopped in between: it is written over.

Not guaranteed where a broker gives two subscribers two orders (a cluster that is split): ADR 18.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edge_agent.fleet.rollout.state import Lease, Phase, State

LEASE_S = 30.0
RENEW_S = 8.0
SETTLE_S = 2.0
_MARGIN_S = 4.0
"""For what is under way when a lease runs out, and for steady clocks that are not equally fast."""
_LONG_AGO_S = 300.0
"""Two consoles' clocks differ less than this, or the one is waited for though it is gone."""


@dataclass
class Claim:
    """One console's part. One thread's.

    Attributes:
        console: this one's random name.
        top: the highest number of its own that came back from the broker.
    """

    console: str
    top: int = 0
    _heard: State | None = None
    _heard_s: float = 0.0
    _sent: dict[int, float] = field(default_factory=dict)
    _given_out: int = 0
    _acts_from_s: float = float("inf")
    _acts_until_s: float = 0.0

    def begins(self, mono_s: float) -> None:
        """It listens since now."""
        self._heard_s = mono_s

    def hears(self, state: State, mono_s: float) -> bool:
        """A state came from the broker.

        Returns:
            False for one that is older than this console's own: write that one again.
        """
        mine = state.lease is not None and state.lease.console == self.console
        if mine:
            self._confirmed(state, mono_s)
            return True
        if state.seq < self.top:
            return False
        self._acts_until_s = 0.0
        self._note(state, mono_s)
        return True

    def _confirmed(self, state: State, mono_s: float) -> None:
        sent_s = self._sent.get(state.seq)
        if sent_s is not None:
            if not self.holds(mono_s):
                self._acts_from_s = mono_s + SETTLE_S
            self._sent = {seq: at_s for seq, at_s in self._sent.items() if seq > state.seq}
            self._acts_until_s = max(self._acts_until_s, sent_s + LEASE_S - _MARGIN_S)
            self.top = max(self.top, state.seq)
        self._note(state, mono_s)

    def _note(self, state: State, mono_s: float) -> None:
        known = self._heard
        if known is None or (known.seq, known.lease) != (state.seq, state.lease):
            self._heard, self._heard_s = state, mono_s

    def is_free(self, now: float, mono_s: float) -> bool:
        """Nobody else acts, and this console may claim the lease.

        Args:
            now: seconds since 1970.
        """
        lease = self._heard.lease if self._heard else None
        if lease is None or lease.console == self.console or lease.expires_at + _LONG_AGO_S < now:
            return True
        return mono_s - self._heard_s >= LEASE_S

    def claims(self, state: State, now: float, mono_s: float) -> State:
        """The state to publish in order to have the lease, or to have it longer."""
        if not self.holds(mono_s):
            self._sent.clear()
        lease = Lease(console=self.console, expires_at=now + LEASE_S)
        state = replace(state, lease=lease, at=now, seq=self._number_after(state))
        self._sent[state.seq] = mono_s
        return state

    def releases(self, state: State, now: float) -> State:
        """The state to publish in order to give the lease back."""
        self._acts_until_s = 0.0
        return replace(state, lease=None, at=now, seq=self._number_after(state))

    def _number_after(self, state: State) -> int:
        self._given_out = max(state.seq, self.top, self._given_out) + 1
        return self._given_out

    def holds(self, mono_s: float) -> bool:
        """It has the lease, as far as it has heard; it may not act yet."""
        return mono_s < self._acts_until_s

    def may_act(self, mono_s: float) -> bool:
        return self._acts_from_s <= mono_s < self._acts_until_s


def taken_over(state: State, now: float) -> State:
    """A state of another console in this one's time: what nobody watched is not counted as watched, and no two clocks
    are compared."""
    by_s = now - state.at
    suspects = {device_id: min(now, since + by_s) for device_id, since in state.suspects.items()}
    soak_until = state.soak_until
    if state.phase is Phase.SOAKING:
        soak_until = min(soak_until + by_s, now + state.plan.limits.soak_s)
    return replace(state, soak_until=soak_until, suspects=suspects)
