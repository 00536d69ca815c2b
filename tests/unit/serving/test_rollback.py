"""When the active version fails: at boot, by its bytes, by crashes, and what takes its place."""

from __future__ import annotations

import pytest

from edge_agent.errors import CannotRun, LoadFailed, MemoryShort
from edge_agent.package import trust
from edge_agent.package.trust import TrustDecision
from edge_agent.serving.seat import Serving
from edge_agent.serving.verdicts import CRASH_WINDOW_S, GateFailed
from tests.support.packages import WEIGHTS
from tests.support.scripted_runner import Life, Script, ScriptedHost
from tests.unit.serving.conftest import NewLife, damage


def boot(life: Life, *, failing: int, script: Script) -> None:
    """A daemon that starts while a version has stopped working."""
    life.host.script(failing, script)
    life.restart()
    life.host.events.clear()


BAD_GRAPH = Script(load_error=LoadFailed("bad graph"))


# --- Boot ----------------------------------------------------------------------------------------------


def test_a_model_is_settled_at_boot_once_it_is_loaded(life: Life) -> None:
    life.serve(1)
    life.restart()
    lifecycle = life.lifecycle
    assert (lifecycle.serving, lifecycle.settled(), lifecycle.wanted_now()) == (Serving.LOADING, False, True)
    assert life.ask() == 1
    assert (lifecycle.serving, lifecycle.settled(), lifecycle.wanted_now()) == (Serving.READY, True, False)


def test_a_model_that_is_loaded_on_demand_only_is_settled_at_once(new_life: NewLife) -> None:
    life = new_life(preload=False)
    life.serve(1)
    life.restart()
    lifecycle = life.lifecycle
    assert (lifecycle.serving, lifecycle.settled(), lifecycle.wanted_now()) == (Serving.IDLE, True, False)
    assert lifecycle.available
    assert life.ask() == 1


def test_a_model_without_any_version_is_settled_and_not_available(life: Life) -> None:
    lifecycle = life.lifecycle
    assert (lifecycle.serving, lifecycle.settled(), lifecycle.available) == (Serving.ABSENT, True, False)


def test_a_load_that_failed_once_is_tried_again_after_a_second(life: Life, host: ScriptedHost) -> None:
    life.serve(1, 2)
    boot(life, failing=2, script=BAD_GRAPH)
    assert life.ask() is None
    assert (life.lifecycle.serving, life.lifecycle.reason) == (Serving.LOADING, "bad graph")
    host.now_s += 0.9
    assert life.ask() is None
    assert host.events.count("load 2") == 1, "it is too early"
    host.script(2, Script())
    host.now_s += 0.2
    assert (life.ask(), life.active, life.quarantined) == (2, 2, {})


def test_a_version_that_fails_to_load_twice_gives_way_to_the_previous_one(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1, 2)
    boot(life, failing=2, script=BAD_GRAPH)
    life.ask()
    host.now_s += 1.1
    life.ask()
    assert (life.active, life.previous, life.quarantined) == (1, None, {2: "bad graph"})
    assert life.lifecycle.serving is Serving.LOADING
    assert life.lifecycle.reason == "rolled back from version 2: bad graph"
    assert life.ask() == 1, "at once: nothing counts against this version"
    assert (life.lifecycle.serving, life.lifecycle.reason) == (Serving.READY, "")


def test_a_version_that_loads_again_starts_with_a_clean_slate(life: Life, host: ScriptedHost) -> None:
    life.serve(1, 2)
    boot(life, failing=2, script=BAD_GRAPH)
    life.ask()
    host.now_s += 1.1
    host.script(2, Script())
    assert life.ask() == 2
    life.lifecycle.give_up_memory()
    host.script(2, BAD_GRAPH)
    assert life.ask() is None
    assert (life.active, life.lifecycle.serving) == (2, Serving.LOADING), "it is the first failure again"


def test_the_only_version_fails_for_good_and_is_still_tried_now_and_then(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    boot(life, failing=1, script=BAD_GRAPH)
    life.ask()
    assert life.lifecycle.available
    host.now_s += 1.1
    life.ask()
    lifecycle = life.lifecycle
    assert (lifecycle.serving, lifecycle.settled(), lifecycle.available) == (Serving.FAILED, True, False)
    assert (life.active, life.quarantined, lifecycle.reason) == (1, {}, "bad graph")
    assert not lifecycle.runs_its_own
    host.now_s += 1.9
    life.ask()
    assert host.events.count("load 1") == 2, "the wait doubles"
    host.script(1, Script())
    host.now_s += 0.2
    assert (life.ask(), lifecycle.serving) == (1, Serving.READY)


def test_damaged_bytes_at_boot_are_set_aside_and_the_previous_version_answers(life: Life) -> None:
    life.serve(1, 2)
    life.restart()
    damage(life, 2)
    assert life.ask() is None
    assert (life.active, life.previous, life.quarantined) == (1, 2, {}), "it may come back"
    weights = next(file for file in life.records[2].files if file.path == WEIGHTS)
    assert not life.store.has_blob(weights), "the next sync fetches it"
    assert [file for file in life.records[2].files if not life.store.has_blob(file)] == [weights]
    assert life.ask() == 1


def test_damaged_bytes_of_the_only_version_fail_at_once(life: Life) -> None:
    life.serve(1)
    life.restart()
    damage(life, 1)
    assert life.ask() is None
    assert (life.active, life.lifecycle.serving) == (1, Serving.FAILED)
    assert WEIGHTS in life.lifecycle.reason


def test_a_version_that_was_repaired_is_loaded_without_waiting(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    boot(life, failing=1, script=BAD_GRAPH)
    life.ask()
    host.script(1, Script())
    assert life.ask() is None
    life.lifecycle.reload()
    assert life.ask() == 1


def test_short_memory_is_no_reason_to_step_back(life: Life, host: ScriptedHost) -> None:
    life.serve(1, 2)
    boot(life, failing=2, script=Script(load_error=MemoryShort("950 bytes")))
    for _ in range(4):
        life.ask()
        host.now_s += 60.0
    assert (life.active, life.quarantined, life.lifecycle.serving) == (2, {}, Serving.FAILED)


def test_what_this_host_lacks_since_the_last_boot_steps_back_without_quarantine(life: Life) -> None:
    life.serve(1, 2)
    boot(life, failing=2, script=Script(load_error=CannotRun("the library is gone")))
    life.ask()
    assert (life.active, life.previous, life.quarantined) == (1, 2, {})


def test_code_that_the_settings_no_longer_allow_steps_back_without_quarantine(life: Life) -> None:
    life.serve(1)
    unsigned = TrustDecision(
        rule=trust.Rule.UNSIGNED_CODE_ALLOWED, signed_by="", unsigned_code=True, reason="a setting"
    )
    life.commit(2, decision=unsigned)
    life.store.change_state("assistant", lambda state: state.switched(life.key(2)))
    life.restart()
    life.host.events.clear()
    assert life.ask() is None
    assert (life.active, life.previous, life.quarantined) == (1, 2, {})
    assert life.host.events == [], "no runner was started"


def test_a_pin_goes_with_the_version_that_gives_way(life: Life) -> None:
    life.serve(1, 2)
    life.lifecycle.pin(life.key(2))
    boot(life, failing=2, script=Script(load_error=CannotRun("the library is gone")))
    life.ask()
    assert life.store.state().model("assistant").pinned is None


# --- The fallback --------------------------------------------------------------------------------------


def test_the_fallback_takes_over_where_no_version_went_before(life: Life) -> None:
    life.commit(5, fallback=True)
    life.serve(1)
    boot(life, failing=1, script=Script(load_error=CannotRun("the library is gone")))
    life.ask()
    assert (life.active, life.ask()) == (5, 5)
    assert life.lifecycle.instead == "fallback other version 5 runs: the library is gone"
    assert (life.previous, life.quarantined) == (1, {})


@pytest.mark.parametrize("quarantined", [False, True])
def test_a_previous_version_is_taken_before_the_fallback_unless_it_is_in_quarantine(
    life: Life, *, quarantined: bool
) -> None:
    life.commit(5, fallback=True)
    life.serve(1, 2)
    if quarantined:
        life.lifecycle.set_aside(life.key(1), GateFailed("wrong answers"))
    boot(life, failing=2, script=Script(load_error=CannotRun("the library is gone")))
    life.ask()
    assert life.active == (5 if quarantined else 1)
    assert bool(life.lifecycle.instead) is quarantined


def test_the_newest_fallback_that_is_not_in_quarantine_is_taken(life: Life) -> None:
    for version in (5, 6, 7):
        life.commit(version, fallback=True)
    life.serve(1)
    life.lifecycle.set_aside(life.key(7), GateFailed("wrong answers"))
    boot(life, failing=1, script=Script(load_error=CannotRun("the library is gone")))
    life.ask()
    assert life.active == 6


# --- Crashes -------------------------------------------------------------------------------------------


def test_crashes_on_three_different_prompts_roll_back_and_quarantine(life: Life) -> None:
    life.serve(1, 2)
    life.crash("a")
    life.crash("b")
    assert (life.active, life.ask()) == (2, 2)
    life.crash("c")
    reason = "its runner failed on 3 different prompts within 10 minutes"
    assert (life.active, life.quarantined) == (1, {2: reason})
    assert life.lifecycle.reason == f"rolled back from version 2: {reason}"
    assert life.ask() == 1


def test_one_poison_prompt_does_not_roll_back_however_often_it_comes(life: Life) -> None:
    life.serve(1, 2)
    for _ in range(5):
        life.crash("poison")
        assert life.lifecycle.reason == "the runner died and is started again"
    assert (life.active, life.quarantined, life.ask()) == (2, {}, 2)


def test_a_poison_prompt_is_not_counted_with_those_that_ran_beside_it(life: Life) -> None:
    life.serve(1, 2)
    for neighbour in "abcd":
        life.crash("poison", neighbour)
    assert life.active == 2


def test_crashes_that_are_too_long_ago_do_not_count(life: Life, host: ScriptedHost) -> None:
    life.serve(1, 2)
    life.crash("a")
    life.crash("b")
    host.now_s += CRASH_WINDOW_S + 1.0
    life.crash("c")
    assert life.active == 2
    life.crash("d")
    host.now_s += CRASH_WINDOW_S - 1.0
    life.crash("e")
    assert life.active == 1


def test_crashes_of_a_version_are_not_held_against_the_next_one(life: Life) -> None:
    life.serve(1)
    life.crash("a")
    life.crash("b")
    life.serve(2)
    life.crash("c")
    assert (life.active, life.quarantined) == (2, {})


def test_the_version_that_a_rollback_brought_back_starts_with_a_clean_slate(life: Life) -> None:
    life.commit(5, fallback=True)
    life.serve(1, 2)
    for prompt in "abc":
        life.crash(prompt)
    assert life.active == 1
    life.crash("d")
    life.crash("e")
    assert life.active == 1
    life.crash("f")
    assert life.active == 5


def test_the_only_version_goes_on_after_any_number_of_crashes(life: Life) -> None:
    life.serve(1)
    for prompt in "abcd":
        life.crash(prompt)
    assert (life.active, life.quarantined, life.ask()) == (1, {}, 1)


def test_a_runner_that_died_while_nobody_used_it_is_replaced_at_once_and_counts_for_nothing(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1, 2)
    for _ in range(4):
        life.newest_runner(2).crash()
        assert life.lifecycle.wanted_now()
        assert life.ask() == 2
        host.now_s += CRASH_WINDOW_S + 1
    assert (life.active, life.quarantined) == (2, {})
    assert life.lifecycle.runner_deaths == 4


def test_a_runner_that_dies_again_and_again_while_nobody_uses_it_is_replaced_with_pauses(
    life: Life, host: ScriptedHost
) -> None:
    """As where the kernel takes its memory back: each load hashes all weights, and ends in the same."""
    life.serve(1)
    for _ in range(600):
        if life.ask():
            life.newest_runner(1).crash()
        host.now_s += 1
    assert life.ask() is None
    assert 10 < life.lifecycle.runner_deaths < 30
    assert (life.lifecycle.serving, life.quarantined) == (Serving.LOADING, {})


@pytest.mark.usefixtures("stuck_damage")
def test_two_versions_whose_damage_stays_take_no_turns_without_a_pause(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1, 2)
    life.restart()
    damage(life, 1)
    damage(life, 2)
    actives = []
    for _ in range(30):
        assert life.ask() is None
        actives.append(life.active)
        host.now_s += 1.0
    assert actives == [1] * 30, "2 gave way to 1, which has nothing to give way to"
    assert (life.lifecycle.serving, life.quarantined) == (Serving.FAILED, {})


@pytest.mark.usefixtures("stuck_damage")
def test_damage_that_cannot_be_set_aside_gives_way_all_the_same(life: Life) -> None:
    life.serve(1, 2)
    life.restart()
    damage(life, 2)
    assert life.ask() is None
    assert (life.active, life.previous, life.quarantined) == (1, 2, {})
    assert life.ask() == 1


def test_a_runner_that_died_is_replaced_when_all_its_prompts_were_given_back(life: Life) -> None:
    life.serve(1)
    with life.lifecycle.lease() as first:
        with life.lifecycle.lease() as second:
            assert first is not None
            assert second is not None
            assert first.runner is second.runner
            life.newest_runner(1).crash()
            assert life.ask() is None
        assert life.ask() is None, "a prompt is still out"
    assert life.ask() == 1
    assert life.host.events.count("load 1") == 2
    assert life.lifecycle.runner_deaths == 1, "it died once, however many prompts had it"
