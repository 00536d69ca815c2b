"""Which of several consoles acts: with any clocks, any delays, and consoles that stop in between."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.fleet.rollout.lease import LEASE_S, RENEW_S, SETTLE_S, Claim, taken_over
from edge_agent.fleet.rollout.state import Lease, Phase, State
from tests.support.generated_messages import examples
from tests.support.scripted_rollout import plan_of

NOW = 1_790_000_000.0
STATE = State(id="ab" * 8, plan=plan_of(["a", "b"]), at=NOW, since=NOW, seq=5)
A, B = "aa" * 8, "bb" * 8


def held(claim: Claim, mono_s: float = 0.0) -> State:
    """It has claimed, and heard it come back."""
    claim.begins(mono_s)
    state = claim.claims(STATE, NOW, mono_s)
    claim.hears(state, mono_s + 0.1)
    return state


def test_a_claim_counts_once_it_has_come_back_and_settled() -> None:
    claim = Claim(console=A)
    state = claim.claims(STATE, NOW, 0.0)
    assert not claim.may_act(SETTLE_S)
    claim.hears(state, 1.0)
    assert not claim.may_act(SETTLE_S + 0.9)
    assert claim.may_act(SETTLE_S + 1)


def test_it_lasts_from_when_it_was_sent_and_not_from_when_it_came_back() -> None:
    claim = Claim(console=A)
    state = claim.claims(STATE, NOW, 0.0)
    claim.hears(state, 20.0)
    assert not claim.may_act(LEASE_S)


def test_it_goes_on_as_long_as_it_is_renewed() -> None:
    claim, state = Claim(console=A), STATE
    for renewal in range(100):
        state = claim.claims(state, NOW, renewal * RENEW_S)
        claim.hears(state, renewal * RENEW_S + 0.1)
        assert renewal == 0 or claim.may_act(renewal * RENEW_S + 1)


def test_the_later_of_two_claims_has_it() -> None:
    first, second = Claim(console=A), Claim(console=B)
    one, two = first.claims(STATE, NOW, 0.0), second.claims(STATE, NOW, 0.0)
    for claim in (first, second):
        claim.hears(one, 0.5)
        claim.hears(two, 0.6)
    assert not first.may_act(SETTLE_S + 1)
    assert second.may_act(SETTLE_S + 1)


def test_a_lease_that_nothing_renews_is_free_and_one_that_is_renewed_is_not() -> None:
    state, other = held(Claim(console=A)), Claim(console=B)
    other.begins(0.0)
    other.hears(state, 1.0)
    assert not other.is_free(NOW, LEASE_S)
    assert other.is_free(NOW, 1.0 + LEASE_S)
    other.hears(replace(state, seq=state.seq + 1), 30.0)
    assert not other.is_free(NOW + 290, 31.0 + LEASE_S - 2)


def test_a_lease_that_was_given_back_or_is_long_gone_is_free_at_once() -> None:
    claim = Claim(console=A)
    state, other = held(claim), Claim(console=B)
    other.hears(state, 1.0)
    assert other.is_free(NOW + 3_600, 1.0)
    other.hears(claim.releases(state, NOW), 1.5)
    assert other.is_free(NOW, 1.5)
    assert not claim.holds(1.5)


def test_a_console_that_was_stopped_finds_its_lease_gone_and_is_written_over() -> None:
    first, second = Claim(console=A), Claim(console=B)
    old = held(first)
    second.begins(0.0)
    second.hears(old, 0.1)
    new = second.claims(old, NOW, 40.0)
    second.hears(new, 40.1)
    assert not first.may_act(60.0)
    late = replace(old, lease=Lease(console=A, expires_at=NOW))
    assert not second.hears(late, 60.0), "an older state must be written over"
    assert second.may_act(60.0)
    first.hears(new, 61.0)
    assert not first.is_free(NOW, 61.0)


def test_what_nobody_watched_is_not_counted_as_watched() -> None:
    soaking = replace(STATE, phase=Phase.SOAKING, soak_until=NOW + 60, suspects={"a": NOW - 10})
    for skew_s in (-9_000.0, 0.0, 500.0, 1e6):
        there = taken_over(soaking, NOW + skew_s)
        assert there.soak_until - (NOW + skew_s) == 60
        assert NOW + skew_s - there.suspects["a"] == 10


def test_a_soak_that_another_clock_claims_to_end_in_years_is_as_long_as_the_plan_says() -> None:
    soaking = replace(STATE, phase=Phase.SOAKING, soak_until=NOW + 1e9)
    assert taken_over(soaking, NOW).soak_until == NOW + soaking.plan.limits.soak_s


class Network:
    """A broker with one order, and consoles to which each message comes after a delay of their own."""

    def __init__(self, skews: list[float]) -> None:
        self.mono_s = 0.0
        self.retained = STATE
        self.claims = [Claim(console=f"{number:02x}" * 8) for number in range(len(skews))]
        self.skews = skews
        self.queues: list[list[tuple[float, State]]] = [[] for _ in skews]
        self.own = [STATE for _ in skews]
        self.sent_s = [-1e9 for _ in skews]
        self.stopped_until_s = [0.0 for _ in skews]

    def publish(self, state: State, delay_s: float) -> None:
        self.retained = state
        for queue in self.queues:
            last_s = queue[-1][0] if queue else 0.0
            queue.append((max(last_s, self.mono_s + delay_s), state))

    def turn(self, number: int, delay_s: float) -> None:
        if self.mono_s < self.stopped_until_s[number]:
            return
        claim, queue, now = self.claims[number], self.queues[number], NOW + self.mono_s + self.skews[number]
        while queue and queue[0][0] <= self.mono_s:
            _, state = queue.pop(0)
            if not claim.hears(state, self.mono_s):
                self.publish(claim.claims(self.own[number], now, self.mono_s), delay_s)
            else:
                self.own[number] = state
        is_due = self.mono_s - self.sent_s[number] >= RENEW_S
        if is_due and (claim.holds(self.mono_s) or claim.is_free(now, self.mono_s)):
            self.sent_s[number] = self.mono_s
            self.own[number] = claim.claims(self.own[number], now, self.mono_s)
            self.publish(self.own[number], delay_s)

    def acting(self) -> list[int]:
        return [
            number
            for number, claim in enumerate(self.claims)
            if self.mono_s >= self.stopped_until_s[number] and claim.may_act(self.mono_s)
        ]


@examples(150)
@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=3),
    st.lists(
        st.tuples(st.floats(0.1, 3), st.floats(0, 0.9), st.integers(0, 2), st.booleans()),
        min_size=20,
        max_size=150,
    ),
)
def test_no_two_consoles_ever_act_at_once(
    skews: list[float], history: list[tuple[float, float, int, bool]]
) -> None:
    network = Network(skews)
    for number, claim in enumerate(network.claims):
        claim.begins(0.0)
        claim.hears(STATE, 0.0)
        network.own[number] = STATE
    for seconds, delay_s, which, stops in history:
        network.mono_s += seconds
        if stops and which < len(skews):
            network.stopped_until_s[which] = network.mono_s + 45
        for number in range(len(skews)):
            network.turn(number, delay_s)
        assert len(network.acting()) <= 1


def test_of_several_consoles_one_does_act() -> None:
    network = Network([0.0, 50.0, -50.0])
    seen = set()
    for turn in range(60):
        network.mono_s += 1
        if turn == 30:
            network.stopped_until_s[network.acting()[0]] = 1e9
        for number in range(3):
            network.turn(number, 0.2)
        seen |= set(network.acting())
        if turn == 70:
            break
    for _ in range(60):
        network.mono_s += 1
        for number in range(3):
            network.turn(number, 0.2)
        seen |= set(network.acting())
    assert len(seen) == 2, "the second takes over from the first, which is gone"
