"""What happens next in a rollout: hundreds of devices, in milliseconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.fleet.rollout import rules
from edge_agent.fleet.rollout.plan import Limits, RolloutRefused
from edge_agent.fleet.rollout.rules import GRACE_S, step
from edge_agent.fleet.rollout.standing import Seen, Standing
from edge_agent.fleet.rollout.state import MAX_BYTES, MAX_SUSPECTS, OVER, Phase, State, parse
from tests.support.generated_messages import examples
from tests.support.scripted_rollout import LIMITS, NEW, plan_of

HUNDREDS = [f"device-{number}" for number in range(300)]
PLAN = plan_of(HUNDREDS, canaries=["device-1", "device-2"])
START = 1_790_000_000.0


def begun(limits: Limits = LIMITS, **changes: Any) -> State:
    state = State(id="ab" * 8, plan=replace(PLAN, limits=limits), at=START, since=START)
    return replace(state, phase=Phase.OFFERING, **changes)


def fleet(
    state: State, standing: Standing = Standing.TAKEN, desired: int | None = NEW, **odd: Seen
) -> list[Seen]:
    """All devices of the waves so far stand so, the others wait for their wave; but for the odd ones."""
    seen = []
    for device_id in HUNDREDS:
        wave = PLAN.wave_of(device_id)
        inside = wave <= state.wave
        seen.append(
            Seen(
                device_id=device_id,
                wave=wave,
                standing=standing if inside else Standing.PENDING,
                desired=desired if inside else None,
                released=desired is None,
            )
        )
    return [
        replace(odd[key], device_id=each.device_id, wave=each.wave)
        if (key := each.device_id.replace("-", "_")) in odd
        else each
        for each in seen
    ]


def odd(standing: Standing = Standing.TAKEN, **fields: Any) -> Seen:
    return Seen(device_id="", wave=0, standing=standing, **{"desired": NEW, **fields})


def settled(state: State, seen: list[Seen], now: float) -> State:
    """Steps at one moment, until nothing changes any more."""
    for _ in range(10):
        following, _ = step(state, seen, now)
        if not rules.is_news(state, following):
            return following
        state = following
    raise AssertionError("it does not settle")


def test_the_canaries_are_told_first_and_nobody_else() -> None:
    state, actions = step(begun(), fleet(begun(), Standing.PENDING, desired=None), START)
    assert state.phase is Phase.OFFERING
    assert set(actions.offer) == {"device-1", "device-2"}


def test_a_phase_begins_before_it_is_acted_on() -> None:
    state, actions = step(replace(begun(), phase=Phase.PLANNED), fleet(begun(), desired=None), START)
    assert (state.phase, actions) == (Phase.OFFERING, rules.NOTHING)


def test_a_wave_that_has_the_version_is_watched_and_then_the_next_is_offered() -> None:
    state = settled(begun(), fleet(begun()), START)
    assert (state.phase, state.soak_until) == (Phase.SOAKING, START + 100)
    assert settled(state, fleet(state), START + 99.9).phase is Phase.SOAKING
    state, actions = step(state, fleet(state), START + 100)
    assert (state.phase, state.wave, actions) == (Phase.OFFERING, 1, rules.NOTHING)
    _, actions = step(state, fleet(replace(state, wave=0)), START + 100)
    assert len(actions.offer) == 13
    assert all(PLAN.wave_of(device_id) == 1 for device_id in actions.offer)


def test_after_the_last_wave_the_alias_moves_and_then_all_are_released() -> None:
    state = begun(wave=len(PLAN.waves) - 1)
    state = settled(state, fleet(state), START)
    state, _ = step(state, fleet(state), START + 100)
    assert state.phase is Phase.FINISHING
    state, actions = step(state, fleet(state), START + 101)
    assert actions == rules.Actions(move_alias=True)
    state, actions = step(rules.alias_moved(state), fleet(state), START + 102)
    assert set(actions.clear) == set(HUNDREDS)
    assert not actions.move_alias
    state, actions = step(state, fleet(state, desired=None), START + 103)
    assert (state.phase, actions) == (Phase.DONE, rules.NOTHING)


@pytest.mark.parametrize(
    "standing", [Standing.UNREACHABLE, Standing.HELD, Standing.CANNOT_RUN, Standing.PINNED]
)
def test_what_says_nothing_of_the_version_is_listed_and_holds_up_no_wave(standing: Standing) -> None:
    seen = fleet(begun(), device_1=odd(standing, code="why"))
    state = settled(begun(), seen, START)
    assert state.phase is Phase.SOAKING
    assert [(each.device, each.standing, each.code) for each in state.listed] == [
        ("device-1", str(standing), "why")
    ]
    assert settled(state, seen, START + 100).wave == 1


def test_a_wave_in_which_nobody_has_taken_it_proves_nothing() -> None:
    seen = fleet(begun(), Standing.UNREACHABLE)
    assert settled(begun(), seen, START + 1e6).phase is Phase.OFFERING


def test_a_device_that_is_still_fetching_holds_its_wave_up() -> None:
    seen = fleet(begun(), device_2=odd(Standing.PENDING))
    assert settled(begun(), seen, START + 1e6).phase is Phase.OFFERING


def test_a_device_that_the_broker_has_lost_holds_its_wave_up_until_somebody_resumes() -> None:
    state = settled(begun(), fleet(begun()), START)
    seen = fleet(state, device_2=odd(Standing.UNREACHABLE, known=False))
    state = settled(state, seen, START + 1e5)
    assert state.phase is Phase.SOAKING
    state = rules.resume(rules.pause(state, START + 1e5), seen, START + 1e5)
    assert settled(state, seen, START + 1e5).wave == 1


def test_one_failure_over_the_limit_halts_and_nobody_more_is_told() -> None:
    seen = fleet(begun(), device_2=odd(Standing.FAILED, code="gate_failed"))
    state, actions = step(begun(), seen, START)
    assert (state.phase, actions) == (Phase.HALTED, rules.NOTHING)
    assert "device-2 (gate_failed)" in state.reason
    assert step(state, seen, START + 1e6) == (state, rules.NOTHING)


def test_failures_up_to_the_limit_are_listed_and_the_waves_go_on() -> None:
    state = begun(replace(LIMITS, max_failed=1))
    seen = fleet(state, device_2=odd(Standing.FAILED, code="load_failed"))
    state = settled(state, seen, START)
    assert state.phase is Phase.SOAKING
    assert state.counts[Standing.FAILED] == 1
    two = fleet(state, device_1=odd(Standing.FAILED), device_2=odd(Standing.FAILED))
    assert settled(state, two, START + 1).phase is Phase.HALTED


@pytest.mark.parametrize("trouble", ["offline", "degraded", "slow"])
def test_a_trouble_that_lasts_halts_and_one_that_passes_does_not(trouble: str) -> None:
    state = settled(begun(), fleet(begun()), START)
    bad = fleet(state, device_1=odd(trouble=trouble, speed=0.5))
    state = settled(state, bad, START + 1)
    assert settled(state, fleet(state), START + 2).suspects == {}
    assert settled(state, bad, START + GRACE_S).phase is Phase.SOAKING
    halted = settled(state, bad, START + 1 + GRACE_S)
    assert halted.phase is Phase.HALTED
    assert f"device-1 ({trouble}" in halted.reason


def test_no_wave_is_passed_while_a_device_is_in_trouble() -> None:
    state = settled(begun(), fleet(begun()), START)
    bad = fleet(state, device_1=odd(trouble="offline"))
    state = settled(state, bad, START + 99)
    assert settled(state, bad, START + 101).phase is Phase.SOAKING
    assert settled(state, fleet(state), START + 102).wave == 1


def test_a_device_that_comes_back_without_answering_stays_a_suspect() -> None:
    state = settled(begun(), fleet(begun()), START)
    state = settled(state, fleet(state, device_1=odd(trouble="offline")), START + 1)
    loading = fleet(state, device_1=odd(Standing.PENDING))
    assert settled(state, loading, START + 2 + GRACE_S).phase is Phase.HALTED


def test_more_devices_in_trouble_than_a_state_can_hold_halt_at_once() -> None:
    state = begun(wave=len(PLAN.waves) - 1)
    everybody = fleet(state)
    many = [replace(each, trouble="offline") for each in everybody[: MAX_SUSPECTS + 1]]
    state = settled(state, many + everybody[len(many) :], START)
    assert state.phase is Phase.HALTED
    assert len(state.encode()) < MAX_BYTES


def test_an_operator_resumes_in_spite_of_what_has_failed_and_of_nothing_more() -> None:
    seen = fleet(begun(), device_2=odd(Standing.FAILED, code="gate_failed"))
    state = rules.resume(settled(begun(), seen, START), seen, START + 50)
    assert (state.phase, set(state.excused)) == (Phase.OFFERING, {"device-2"})
    state = settled(state, seen, START + 50)
    assert (state.phase, state.soak_until) == (Phase.SOAKING, START + 150)
    both = fleet(state, device_1=odd(Standing.FAILED), device_2=odd(Standing.FAILED))
    assert settled(state, both, START + 60).phase is Phase.HALTED


def test_what_was_left_of_the_soak_is_left_after_a_pause() -> None:
    state = settled(begun(), fleet(begun()), START)
    paused = rules.pause(state, START + 40)
    assert step(paused, fleet(paused), START + 5_000) == (paused, rules.NOTHING)
    state = rules.resume(paused, fleet(paused), START + 5_000)
    assert (state.phase, state.soak_until) == (Phase.SOAKING, START + 5_060)


def test_an_abort_releases_all_that_were_told_and_ends() -> None:
    state = rules.abort(settled(begun(), fleet(begun()), START), START)
    state, actions = step(state, fleet(state), START)
    assert (state.phase, set(actions.clear)) == (Phase.ABORTING, {"device-1", "device-2"})
    state, actions = step(state, fleet(state, desired=None), START)
    assert (state.phase, actions) == (Phase.ABORTED, rules.NOTHING)
    assert rules.abort(state, START) is state


@pytest.mark.parametrize("phase", [Phase.FINISHING, Phase.DONE])
def test_once_the_alias_may_have_moved_nothing_is_aborted_or_paused(phase: Phase) -> None:
    state = replace(begun(), phase=phase)
    for command in (rules.abort, rules.pause):
        with pytest.raises(RolloutRefused, match=str(phase)):
            command(state, START)


def test_what_is_over_is_not_resumed() -> None:
    with pytest.raises(RolloutRefused, match="aborted"):
        rules.resume(replace(begun(), phase=Phase.ABORTED), [], START)


# --- Generated histories ------------------------------------------------------------------------------

SMALL = [f"d{number}" for number in range(10)]
SMALL_PLAN = plan_of(SMALL, canaries=["d0"], percents=(30, 100), limits=replace(LIMITS, max_failed=1))
STANDINGS = st.sampled_from(
    [Standing.TAKEN] * 4
    + [Standing.PENDING, Standing.FAILED, Standing.UNREACHABLE, Standing.HELD, Standing.CANNOT_RUN]
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(SMALL), STANDINGS, st.sampled_from(["", "", "", "offline", "slow"])), max_size=4
)
COMMANDS = st.sampled_from(["", "", "", "", "", "pause", "resume", "abort"])
HISTORY = st.lists(st.tuples(CHANGES, COMMANDS, st.floats(0, 120)), max_size=40)


class Model:
    """A fleet that obeys nothing but a generated history, and does every action at once."""

    def __init__(self) -> None:
        self.now = START
        self.state = State(id="ab" * 8, plan=SMALL_PLAN, at=START, since=START)
        self.seen = {
            each: Seen(device_id=each, wave=SMALL_PLAN.wave_of(each), standing=Standing.PENDING)
            for each in SMALL
        }
        self.offered: set[str] = set()
        self.alias_moved = False

    def change(self, changes: list[tuple[str, Standing, str]]) -> None:
        for device_id, standing, trouble in changes:
            trouble = trouble if standing is Standing.TAKEN else ""
            if device_id in self.offered:
                self.seen[device_id] = replace(self.seen[device_id], standing=standing, trouble=trouble)

    def command(self, word: str) -> None:
        try:
            if word == "resume":
                self.state = rules.resume(self.state, list(self.seen.values()), self.now)
            elif word:
                self.state = getattr(rules, word)(self.state, self.now)
        except RolloutRefused:
            pass

    def step(self) -> None:
        seen = list(self.seen.values())
        before = self.state
        state, actions = step(before, seen, self.now)
        assert step(before, seen, self.now) == (state, actions), "a step repeated changes something"
        assert parse(state.encode()) == state, "another console would read something else"
        if rules.is_news(before, state):
            assert actions == rules.NOTHING, "acted before it was published"
        if before.phase in (Phase.HALTED, Phase.PAUSED) or before.phase in OVER:
            assert (state, actions) == (before, rules.NOTHING)
        self.check_halt(before, state)
        self.state = state
        self.act(actions)

    def check_halt(self, before: State, state: State) -> None:
        """Nothing goes on over a halt condition."""
        counting = [
            each
            for each in self.seen.values()
            if each.wave <= before.wave and each.device_id not in before.excused
        ]
        too_many = sum(each.standing is Standing.FAILED for each in counting) > 1
        lasting = any(self.now - since >= GRACE_S for since in before.suspects.values())
        still = any(each.trouble and each.device_id in before.suspects for each in counting)
        if before.phase in (Phase.OFFERING, Phase.SOAKING) and (too_many or (lasting and still)):
            troubled = [each for each in counting if each.trouble]
            if too_many or any(
                self.now - before.suspects.get(each.device_id, self.now) >= GRACE_S for each in troubled
            ):
                assert state.phase is Phase.HALTED

    def act(self, actions: rules.Actions) -> None:
        for device_id in actions.offer:
            assert self.seen[device_id].wave <= self.state.wave, "offered outside the waves so far"
            self.offered.add(device_id)
            self.seen[device_id] = replace(self.seen[device_id], desired=NEW, released=False)
        if actions.move_alias:
            assert self.state.phase is Phase.FINISHING
            assert self.state.wave == len(SMALL_PLAN.waves) - 1
            self.alias_moved = True
            self.state = rules.alias_moved(self.state)
        for device_id in actions.clear:
            assert self.alias_moved or self.state.phase is Phase.ABORTING
            self.seen[device_id] = replace(self.seen[device_id], desired=None, released=True)
        if self.state.phase is Phase.DONE:
            assert self.alias_moved
        if self.state.phase in OVER:
            assert not any(each.desired for each in self.seen.values())
        if self.state.phase is Phase.ABORTED:
            assert not self.alias_moved


@examples(200)
@given(HISTORY)
def test_whatever_happens_the_rules_hold(history: list[tuple[Any, str, float]]) -> None:
    model = Model()
    for changes, command, seconds in history:
        model.now += seconds
        model.change(changes)
        model.command(command)
        for _ in range(3):
            model.step()


def test_a_history_in_which_nothing_happens_ends_with_the_alias() -> None:
    """The generated histories reach the end at all."""
    model = Model()
    for _ in range(40):
        model.now += 60
        model.change([(each, Standing.TAKEN, "") for each in SMALL])
        model.step()
    assert (model.state.phase, model.alias_moved, model.offered) == (Phase.DONE, True, set(SMALL))
