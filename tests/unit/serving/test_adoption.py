"""From a candidate to the active version: what is tried, what is refused, and what prompts get meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from edge_agent.cache.marks import mark_of
from edge_agent.cache.state import MAX_QUARANTINED, ModelState
from edge_agent.errors import (
    ActivationHeld,
    CannotRun,
    EdgeAgentError,
    LoadFailed,
    MemoryShort,
    PolicyError,
    Quarantined,
    RunnerCrashed,
    RunnerError,
    StoreError,
    SyncStopped,
    VerificationError,
)
from edge_agent.package import trust
from edge_agent.package.trust import TrustDecision
from edge_agent.serving.seat import Serving
from edge_agent.serving.verdicts import MAX_TRIES, GateFailed
from tests.support.committed import fault
from tests.support.packages import WEIGHTS
from tests.support.processes import wait_until
from tests.support.scripted_runner import RESIDENT_BYTES, InBackground, Life, Script, ScriptedHost
from tests.unit.serving.conftest import NewLife, damage

ROOM_FOR_ONE = RESIDENT_BYTES * 3 // 2


def refusal(life: Life, version: int, **options: Any) -> EdgeAgentError:
    with pytest.raises(EdgeAgentError) as caught:
        life.adopt(version, **options)
    return caught.value


# --- The system prompt of the settings -----------------------------------------------------------------


def test_a_candidate_that_refuses_the_system_prompt_of_the_settings_does_not_answer(
    new_life: NewLife, host: ScriptedHost
) -> None:
    life = new_life(system="Be brief.")
    life.serve(1)
    host.script(2, Script(system_refused="the chat template refuses the messages"))
    life.commit(2)
    error = refusal(life, 2)
    assert (type(error), life.active, life.ask()) == (GateFailed, 1, 1)
    assert "refuses the system prompt of this device's settings: the chat template" in life.quarantined[2]
    assert "models.assistant.system" in error.remedy
    assert host.events[2:] == ["load 2", "kill 2"], "no golden prompt was asked"
    assert [runner.request.system for runner in host.runners if runner.request] == ["Be brief."] * 2


def test_an_active_version_that_refuses_a_new_system_prompt_says_so_and_stays(
    new_life: NewLife, host: ScriptedHost
) -> None:
    life = new_life(system="Be brief.")
    life.serve(1)
    assert life.lifecycle.system_refused == ""
    host.script(1, Script(system_refused="no such role"))
    life.restart()
    with life.lifecycle.lease() as lease:
        assert lease is not None
        assert lease.system_refused.endswith("settings: no such role")
        assert life.lifecycle.system_refused == lease.system_refused
    assert life.lifecycle.give_up_memory()
    assert life.lifecycle.system_refused.endswith("settings: no such role"), "the next prompt will meet it"
    assert (life.active, life.quarantined) == (1, {})


def test_a_system_prompt_that_the_context_does_not_hold_is_the_devices_fault(
    new_life: NewLife, host: ScriptedHost
) -> None:
    life = new_life(system="Be brief.")
    host.script(1, Script(system_refused="it is too long", system_too_long=True))
    host.script(2, Script(system_refused="it is too long", system_too_long=True))
    life.commit(1)
    error = refusal(life, 1)
    assert "it is too long" in error.message, "with all the memory it wanted, the version is the fault"
    host.memory_bytes = RESIDENT_BYTES // 2
    life.serve(2)
    assert (life.active, 2 in life.quarantined) == (2, False)
    assert life.lifecycle.system_refused.endswith("it is too long")


def test_a_package_for_prompts_need_not_take_the_system_prompt(new_life: NewLife, host: ScriptedHost) -> None:
    life = new_life(system="Be brief.")
    host.script(1, Script(signature="prompt", system_refused="no such role"))
    life.serve(1)
    assert (life.active, life.quarantined) == (1, {})


# --- A version that passes -----------------------------------------------------------------------------


def test_the_first_version_becomes_active_and_answers(life: Life) -> None:
    assert (life.lifecycle.serving, life.ask()) == (Serving.ABSENT, None)
    assert life.lifecycle.reason == "no version is in the cache"
    life.serve(1)
    assert (life.active, life.lifecycle.serving, life.lifecycle.reason) == (1, Serving.READY, "")
    assert life.ask() == 1
    assert life.host.events == ["load 1", "try 1"], "the runner that passed is the one that answers"


def test_prompts_wait_while_the_first_version_is_loaded(life: Life, host: ScriptedHost) -> None:
    host.script(1, Script(load_waits=True))
    life.commit(1)
    adoption = InBackground(lambda: life.adopt(1))
    host.wait_for("load 1")
    assert life.ask() is None
    assert (life.lifecycle.serving, life.lifecycle.available) == (Serving.LOADING, True)
    assert life.lifecycle.reason == "version 1 is being loaded"
    host.let_load(1)
    adoption.result()
    assert life.ask() == 1


def test_an_update_runs_beside_the_active_version_until_it_has_passed(life: Life) -> None:
    life.serve(1, 2)
    assert (life.active, life.previous, life.ask()) == (2, 1, 2)
    assert life.host.events == ["load 1", "try 1", "load 2", "try 2", "stop 1"]
    assert life.store.state().model("assistant").candidate is None


def test_only_a_version_that_passed_raises_the_mark_of_its_key(life: Life) -> None:
    key = "5e" * 32
    signed = TrustDecision(
        rule=trust.Rule.SHIPPED_WRAPPER, signed_by=key, unsigned_code=False, reason="a test"
    )
    life.commit(1, decision=signed)
    life.adopt(1)
    assert mark_of(life.store, key=key, name="phi").version == 1
    life.host.script(2, Script(golden_failures=["wrong"]))
    life.commit(2, decision=signed)
    refusal(life, 2)
    assert mark_of(life.store, key=key, name="phi").version == 1
    life.store.marks_file.unlink()
    life.adopt(1)
    assert life.store.marks_file.exists(), "each look at the registry makes good for what was lost"


def test_a_mark_that_cannot_be_written_keeps_no_version_from_answering(life: Life) -> None:
    life.store.marks_file.mkdir()
    signed = TrustDecision(
        rule=trust.Rule.SHIPPED_WRAPPER, signed_by="5e" * 32, unsigned_code=False, reason="a test"
    )
    life.commit(1, decision=signed)
    life.adopt(1)
    assert (life.active, life.ask()) == (1, 1)


def test_the_records_of_versions_that_passed_say_that_they_served(life: Life) -> None:
    life.serve(1)
    life.host.script(2, Script(golden_failures=["wrong"]))
    life.commit(2)
    refusal(life, 2)
    assert [record.served for record in life.store.versions()] == [True, False]


def test_adopting_the_active_version_again_starts_no_runner(life: Life) -> None:
    life.serve(1)
    life.adopt(1)
    assert life.host.events == ["load 1", "try 1"]


def test_the_active_version_is_tried_again_after_it_has_failed(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    life.restart()
    host.script(1, Script(load_error=CannotRun("no library")))
    assert (life.ask(), life.lifecycle.serving) == (None, Serving.FAILED)
    host.script(1, Script())
    life.adopt(1)
    assert (life.lifecycle.serving, life.ask()) == (Serving.READY, 1)


def test_what_falls_short_of_the_settings_is_reported_and_the_version_is_adopted(new_life: NewLife) -> None:
    life = new_life(min_tokens_per_s=50.0, memory_limit_bytes=1 << 20)
    life.serve(1)
    assert life.active == 1
    reason = str(life.lifecycle.status()["reason"])
    assert "10.0 tokens/s, 50 are wanted" in reason
    assert f"{RESIDENT_BYTES} bytes of memory, {1 << 20} are allowed" in reason
    life.host.script(2, Script(tokens_per_s=60.0, resident_bytes=1))
    life.serve(2)
    assert life.lifecycle.status()["reason"] == "", "the report is of the last candidate"


# --- A version that fails ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (Script(golden_failures=["golden prompt 1: 'Rome' does not match 'Madrid'"]), GateFailed),
        (Script(load_error=LoadFailed("model does not load: bad graph")), LoadFailed),
        (Script(gate_error=RunnerCrashed("runner died (signal 11)")), RunnerCrashed),
    ],
)
def test_a_candidate_that_fails_by_itself_is_quarantined_and_the_active_version_goes_on(
    life: Life, script: Script, expected: type[EdgeAgentError]
) -> None:
    life.serve(1)
    life.host.script(2, script)
    life.commit(2)
    error = refusal(life, 2)
    assert type(error) is expected
    assert life.quarantined == {2: str(error)}
    assert (life.active, life.ask()) == (1, 1)
    assert life.lifecycle.serving is Serving.READY
    assert "stop 1" not in life.host.events
    assert life.host.running() == [1]


def test_a_first_version_that_fails_leaves_nothing_and_is_not_quarantined(life: Life) -> None:
    life.host.script(1, Script(golden_failures=["golden prompt 1: wrong"]))
    life.commit(1)
    refusal(life, 1)
    assert (life.active, life.quarantined) == (None, {})
    assert (life.lifecycle.serving, life.lifecycle.reason) == (
        Serving.ABSENT,
        "version 1 failed: golden prompt 1: wrong",
    )
    assert life.ask() is None
    assert life.lifecycle.reason == "version 1 failed: golden prompt 1: wrong", "a prompt does not hide why"


def test_a_quarantined_version_is_not_tried_again_unless_an_operator_forces_it(life: Life) -> None:
    life.serve(1)
    life.host.script(2, Script(golden_failures=["wrong"]))
    life.commit(2)
    refusal(life, 2)
    life.host.events.clear()
    error = refusal(life, 2, asked_for=True)
    assert isinstance(error, Quarantined)
    assert "wrong" in str(error)
    assert life.host.events == []
    life.host.script(2, Script())
    life.adopt(2, force=True)
    assert (life.active, life.quarantined) == (2, {})


def test_quarantine_is_bounded_and_a_removed_version_is_forgotten(life: Life) -> None:
    life.serve(1)
    for version in range(2, MAX_QUARANTINED + 4):
        life.lifecycle.set_aside(f"{version}-{'a' * 12}", GateFailed("wrong answers"))
    assert list(life.quarantined) == list(range(4, MAX_QUARANTINED + 4)), "the oldest went"
    life.lifecycle.forget(f"7-{'a' * 12}")
    assert 7 not in life.quarantined
    life.lifecycle.set_aside(f"8-{'a' * 12}", GateFailed("another reason"))
    assert life.quarantined[8] == "wrong answers", "the first reason stays"


def test_a_candidate_that_took_too_long_is_not_quarantined(life: Life) -> None:
    life.serve(1)
    life.host.script(2, Script(gate_error=RunnerError("model was not through the gate within 300 s")))
    life.commit(2)
    refusal(life, 2)
    assert (life.active, life.quarantined) == (1, {})


def test_a_candidate_that_was_tried_too_often_is_refused_without_another_try(life: Life) -> None:
    life.serve(1)
    life.host.script(2, Script(gate_error=RunnerError("killed from outside")))
    life.commit(2)
    for _ in range(MAX_TRIES):
        assert type(refusal(life, 2)) is RunnerError
        life.restart()
    assert life.host.events.count("try 2") == MAX_TRIES
    assert isinstance(refusal(life, 2), GateFailed)
    assert life.host.events.count("try 2") == MAX_TRIES
    assert list(life.quarantined) == [2]


def test_an_operator_may_try_a_candidate_once_more_than_allowed(life: Life) -> None:
    life.serve(1)
    life.commit(2)
    for _ in range(MAX_TRIES + 1):
        life.store.change_state("assistant", lambda state: state.trying(life.key(2)))
    life.restart()
    life.adopt(2, force=True)
    assert life.active == 2


def test_a_damaged_candidate_is_not_loaded_and_not_quarantined(life: Life) -> None:
    life.serve(1)
    life.commit(2)
    damage(life, 2)
    assert isinstance(refusal(life, 2), VerificationError)
    assert "load 2" not in life.host.events
    assert (life.active, life.quarantined, life.host.running()) == (1, {}, [1])


@pytest.mark.parametrize("served", [True, False])
def test_a_damaged_candidate_is_fetched_again_however_often_it_was_tried(life: Life, served: bool) -> None:
    """Size and link of the damaged file are right: a check of the registry finds it here, and whole."""
    if served:
        life.serve(1)
    life.commit(2)
    damage(life, 2)
    weights = next(file for file in life.records[2].files if file.path == WEIGHTS)
    for _ in range(MAX_TRIES + 2):
        assert isinstance(refusal(life, 2), VerificationError)
        assert not life.store.has_blob(weights), "so the next sync fetches it"
    assert life.quarantined == {}


@pytest.mark.usefixtures("stuck_damage")
def test_a_damaged_candidate_that_stays_damaged_is_not_tried_for_ever(life: Life) -> None:
    """Each try may stop the active version, and hashes everything."""
    life.serve(1)
    life.commit(2)
    damage(life, 2)
    for _ in range(MAX_TRIES):
        assert isinstance(refusal(life, 2), VerificationError)
    assert isinstance(refusal(life, 2), GateFailed)
    assert list(life.quarantined) == [2]


def test_code_that_trust_no_longer_allows_starts_no_runner(life: Life) -> None:
    unsigned = TrustDecision(
        rule=trust.Rule.UNSIGNED_CODE_ALLOWED, signed_by="", unsigned_code=True, reason="allow_unsigned_code"
    )
    life.serve(1)
    life.commit(2, decision=unsigned)
    assert isinstance(refusal(life, 2), PolicyError)
    assert len(life.host.runners) == 1
    assert list(life.quarantined) == [2]


def test_a_version_that_is_not_in_the_cache_is_refused_and_nothing_is_written(life: Life) -> None:
    life.serve(1)
    with pytest.raises(StoreError, match="not in the cache"):
        life.lifecycle.adopt(f"9-{'a' * 12}")
    assert life.store.state().model("assistant").candidate is None


# --- It is not time --------------------------------------------------------------------------------------


def too_early() -> None:
    raise ActivationHeld("the machine is in use")


def test_a_candidate_that_may_not_take_over_goes_and_is_not_held_against_the_version(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    life.commit(2)
    for _ in range(MAX_TRIES + 2):
        assert isinstance(refusal(life, 2, before_exchange=too_early), ActivationHeld)
        assert host.events[-1] == "stop 2"
        life.lifecycle.put_off(life.key(2))
    assert (life.active, life.ask(), life.quarantined) == (1, 1, {})
    assert life.lifecycle.untried() == life.key(2)
    life.restart()
    assert life.lifecycle.untried() == life.key(2), "it waits over a restart"
    life.lifecycle.put_off(None)
    assert life.lifecycle.untried() is None


@pytest.mark.parametrize("memory_bytes", [ROOM_FOR_ONE, None], ids=["memory holds one", "there is no other"])
def test_where_nothing_answers_meanwhile_a_candidate_that_passed_takes_over(
    life: Life, host: ScriptedHost, memory_bytes: int | None
) -> None:
    if memory_bytes:
        host.memory_bytes = memory_bytes
        life.serve(1)
    life.commit(2)
    life.adopt(2, before_exchange=too_early)
    assert (life.active, life.ask()) == (2, 2)


# --- Memory holds one only -----------------------------------------------------------------------------


def test_the_active_version_stops_first_when_memory_holds_one(life: Life, host: ScriptedHost) -> None:
    host.memory_bytes = ROOM_FOR_ONE
    life.serve(1, 2)
    assert host.events == ["load 1", "try 1", "stop 1", "load 2", "try 2"]
    assert (life.active, life.ask()) == (2, 2)


def test_prompts_wait_while_versions_take_turns_in_memory(life: Life, host: ScriptedHost) -> None:
    host.memory_bytes = ROOM_FOR_ONE
    life.serve(1)
    host.script(2, Script(load_waits=True))
    life.commit(2)
    adoption = InBackground(lambda: life.adopt(2))
    host.wait_for("load 2")
    assert (life.ask(), life.lifecycle.serving, life.lifecycle.available) == (None, Serving.LOADING, True)
    assert host.events == ["load 1", "try 1", "stop 1", "load 2"], (
        "a prompt loads nothing beside the candidate"
    )
    host.let_load(2)
    adoption.result()
    assert life.ask() == 2


def test_the_old_version_comes_back_when_the_candidate_fails_in_its_place(
    life: Life, host: ScriptedHost
) -> None:
    host.memory_bytes = ROOM_FOR_ONE
    life.serve(1)
    host.script(2, Script(golden_failures=["wrong"]))
    life.commit(2)
    refusal(life, 2)
    assert (life.active, life.lifecycle.serving, life.lifecycle.wanted_now()) == (1, Serving.LOADING, True)
    assert life.ask() == 1
    assert host.events == ["load 1", "try 1", "stop 1", "load 2", "try 2", "kill 2", "load 1"]


def test_the_active_version_does_not_stop_for_weights_that_never_fit(life: Life, host: ScriptedHost) -> None:
    host.script(1, Script(resident_bytes=0))
    life.serve(1)
    life.commit(2)
    host.memory_bytes = life.records[2].total_bytes - 1
    assert isinstance(refusal(life, 2), MemoryShort)
    assert host.events == ["load 1", "try 1"]
    assert (life.ask(), life.quarantined) == (1, {})


# --- What this host lacks ------------------------------------------------------------------------------


def test_a_version_that_this_host_cannot_run_is_tried_again_on_another_host_or_on_demand(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    host.script(2, Script(load_error=CannotRun("no library", remedy="install it")))
    life.commit(2)
    first = refusal(life, 2)
    for _ in range(3):
        again = refusal(life, 2)
        assert (type(again), str(again)) == (CannotRun, str(first))
    assert host.events.count("load 2") == 1
    assert (life.quarantined, life.store.state().model("assistant").candidate) == ({}, None)
    refusal(life, 2, asked_for=True)
    assert host.events.count("load 2") == 2, "an operator wants to know"
    host.name = "this host, with another library"
    refusal(life, 2)
    assert host.events.count("load 2") == 3
    life.restart()
    refusal(life, 2)
    assert host.events.count("load 2") == 4, "a restart forgets"


def test_a_version_that_was_too_large_is_tried_again_when_there_is_more_memory(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    life.commit(2)
    host.script(1, Script(resident_bytes=0))
    host.memory_bytes = life.records[2].total_bytes * 9 // 10
    refusal(life, 2)
    host.memory_bytes = life.records[2].total_bytes * 95 // 100
    tries = life.store.state().model("assistant").candidate_tries
    assert isinstance(refusal(life, 2), MemoryShort)
    assert life.store.state().model("assistant").candidate_tries == tries
    host.memory_bytes = 1 << 40
    life.adopt(2)
    assert life.active == 2


def test_a_first_version_is_tried_at_each_poll_whatever_the_host_lacks(
    life: Life, host: ScriptedHost
) -> None:
    host.script(1, Script(load_error=CannotRun("no library")))
    life.commit(1)
    refusal(life, 1)
    refusal(life, 1)
    assert host.events.count("load 1") == 2, "nothing stops for it"


# --- Between two prompts -------------------------------------------------------------------------------


def test_the_exchange_waits_for_the_prompt_that_runs(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    life.commit(2)
    with life.lifecycle.lease() as lease:
        assert lease is not None
        adoption = InBackground(lambda: life.adopt(2))
        wait_until(lambda: life.ask() is None, what="the exchange to let no prompt in")
        assert host.events[-1] == "try 2"
        assert (life.active, lease.runner.alive, adoption.ended) == (1, True, False)
    adoption.result()
    assert (life.active, life.ask()) == (2, 2)
    assert host.events[-1] == "stop 1"


def test_a_prompt_may_start_while_the_candidate_is_tried(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    host.script(2, Script(load_waits=True))
    life.commit(2)
    adoption = InBackground(lambda: life.adopt(2))
    host.wait_for("load 2")
    assert life.ask() == 1
    host.let_load(2)
    adoption.result()
    assert life.ask() == 2


def test_a_version_whose_load_ends_after_another_was_adopted_is_stopped(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    life.commit(2)
    life.restart()
    host.script(1, Script(load_waits=True))
    prompt = InBackground(life.ask)
    wait_until(lambda: host.events.count("load 1") == 2)
    life.adopt(2)
    host.let_load(1)
    assert prompt.result() is None
    assert (host.running(), life.ask()) == ([2], 2)


def test_a_load_that_fails_after_another_version_was_adopted_counts_for_nothing(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    life.commit(2)
    life.restart()
    host.script(1, Script(load_waits=True, load_error=LoadFailed("bad graph")))
    prompt = InBackground(life.ask)
    wait_until(lambda: host.events.count("load 1") == 2)
    life.adopt(2)
    host.let_load(1)
    assert prompt.result() is None
    assert (life.lifecycle.serving, life.lifecycle.reason, life.ask()) == (Serving.READY, "", 2)
    life.lifecycle.give_up_memory()
    assert life.ask() == 2, "at once: the failure was another version's"


def test_closing_ends_a_candidate_that_is_being_loaded_and_holds_nothing_against_it(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    host.script(2, Script(load_waits=True, load_error=LoadFailed("killed")))
    life.commit(2)
    adoption = InBackground(lambda: life.adopt(2))
    host.wait_for("load 2")
    life.lifecycle.close()
    with pytest.raises(SyncStopped):
        adoption.result()
    assert (host.running(), life.quarantined, life.active) == ([], {}, 1)
    assert life.store.state().model("assistant").candidate_tries == 0


# --- By hand, and from disk ----------------------------------------------------------------------------


def test_a_rollback_by_hand_makes_the_previous_version_active_and_pins_it(life: Life) -> None:
    life.serve(1, 2)
    life.lifecycle.set_aside(life.key(1), GateFailed("it was wrong once"))
    assert life.lifecycle.go_back() == life.key(1)
    assert (life.active, life.previous, life.ask()) == (1, 2, 1)
    assert life.store.state().model("assistant").pinned == life.key(1)


@pytest.mark.parametrize("pinned", [None, 1])
def test_a_poll_that_waited_for_an_operator_does_not_undo_what_he_chose(
    life: Life, host: ScriptedHost, pinned: int | None
) -> None:
    life.serve(1)
    life.lifecycle.pin(life.key(pinned) if pinned else None)
    life.commit(2)
    host.script(2, Script(load_waits=True))
    operator = InBackground(lambda: life.lifecycle.activate(life.key(2)))
    host.wait_for("load 2")
    poll = InBackground(lambda: life.adopt(1))  # what it found before
    host.let_load(2)
    operator.result()
    poll.result()
    assert (life.active, life.ask()) == (2, 2)
    assert life.store.state().model("assistant").pinned == life.key(2)


def test_a_rollback_by_hand_that_does_not_pass_changes_nothing(life: Life) -> None:
    with pytest.raises(StoreError, match="no previous version"):
        life.lifecycle.go_back()
    life.serve(1, 2)
    life.host.script(1, Script(golden_failures=["wrong"]))
    with pytest.raises(GateFailed):
        life.lifecycle.go_back()
    state = life.store.state().model("assistant")
    assert (life.active, state.pinned, life.ask()) == (2, None, 2)


def test_a_pin_names_a_version_of_the_cache_until_it_is_taken_away(life: Life) -> None:
    life.serve(1)
    life.lifecycle.pin(life.key(1))
    life.restart()
    assert life.lifecycle.state.others()["pinned"] == life.key(1)
    with pytest.raises(StoreError, match="not in the cache"):
        life.lifecycle.pin(f"9-{'a' * 12}")
    assert life.lifecycle.state.pinned == life.key(1)
    life.lifecycle.pin(None)
    assert life.store.state().model("assistant").pinned is None


def test_a_candidate_of_an_earlier_daemon_is_untried(life: Life) -> None:
    life.serve(1)
    life.commit(2)
    life.store.change_state("assistant", lambda state: state.trying(life.key(2)))
    life.restart()
    assert life.lifecycle.untried() == life.key(2)


def test_the_newest_version_of_its_own_is_taken_when_nothing_is_active(life: Life) -> None:
    life.commit(1, 2, 3)
    life.commit(9, fallback=True)
    life.store.change_state("assistant", lambda _: ModelState(quarantined={life.key(3): fault("wrong")}))
    life.restart()
    assert life.lifecycle.untried() == life.key(2)


def test_nothing_is_untried_while_a_version_is_active(life: Life) -> None:
    life.serve(1)
    life.commit(2)
    assert life.lifecycle.untried() is None


# --- The fallback --------------------------------------------------------------------------------------


def test_a_fallback_says_why_it_runs_until_a_version_of_its_own_does(life: Life) -> None:
    life.commit(5, fallback=True)
    life.adopt(5, instead="version 1 needs a library")
    lifecycle = life.lifecycle
    assert lifecycle.instead == "fallback other version 5 runs: version 1 needs a library"
    assert (lifecycle.runs_its_own, lifecycle.status()["reason"]) == (False, lifecycle.instead)
    life.adopt(5, instead="version 2 needs a library")
    assert lifecycle.state.instead == "version 2 needs a library"
    assert life.host.events == ["load 5", "try 5"], "only the reason is another one"
    life.serve(6)
    assert (lifecycle.instead, lifecycle.runs_its_own) == ("", True)


def test_a_fallback_that_nobody_gave_a_reason_for_was_chosen_here(life: Life) -> None:
    life.serve(5, fallback=True)
    assert life.lifecycle.state.instead == "it was chosen on this device"
    assert life.lifecycle.cached_fallback() == life.store.record("assistant", life.key(5))
