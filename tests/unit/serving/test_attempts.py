"""How far a version got, as the lifecycle notes it: from the gate on, and after a restart."""

from __future__ import annotations

import pytest

from edge_agent.cache.attempt import Attempt, Measured, Step
from edge_agent.errors import ActivationHeld, CannotRun, EdgeAgentError, LoadFailed, RunnerError
from tests.support.processes import wait_until
from tests.support.scripted_runner import InBackground, Life, Script, ScriptedHost

Seen = tuple[int, str, str | None]


def seen(life: Life) -> Seen | None:
    """(version, step, code)."""
    tried = life.lifecycle.state.attempt
    return (tried.version, str(tried.step), tried.code) if tried else None


def written(life: Life) -> Attempt | None:
    return life.store.state().model(life.name).attempt


def refuse(life: Life, version: int) -> None:
    life.commit(version)
    with pytest.raises(EdgeAgentError):
        life.adopt(version)


def test_a_version_that_answers_is_active_with_its_digest_and_what_its_gate_measured(
    life: Life, host: ScriptedHost
) -> None:
    assert seen(life) is None
    host.script(1, Script(golden=3, tokens_per_s=21.437))
    life.serve(1)
    assert seen(life) == (1, "active", None)
    tried, kept = life.lifecycle.state.attempt, written(life)
    assert tried and kept and tried.fields() == kept.fields()
    assert tried.digest == life.records[1].digest
    measured = life.lifecycle.state.measured[life.key(1)]
    assert measured == Measured(load_ms=1, tokens_per_s=21.44, passed=3, of=3)
    life.restart()
    assert seen(life) == (1, "active", None)
    assert life.lifecycle.state.measured == {life.key(1): measured}


def test_a_number_that_was_never_measured_is_bounded_and_read_back(life: Life, host: ScriptedHost) -> None:
    host.script(1, Script(tokens_per_s=1e300))
    life.serve(1)
    measured = life.lifecycle.state.measured
    assert measured[life.key(1)].tokens_per_s == 1e9
    life.restart()
    assert life.lifecycle.state.measured == measured


def test_a_version_is_in_the_gate_while_it_is_loaded(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    host.script(2, Script(load_waits=True))
    life.commit(2)
    adoption = InBackground(lambda: life.adopt(2))
    host.wait_for("load 2")
    assert seen(life) == (2, "gate", None)
    host.let_load(2)
    adoption.result()
    assert seen(life) == (2, "active", None)


def test_the_golden_prompt_that_is_asked_is_seen_while_it_is_and_never_written(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    host.script(2, Script(golden=3))
    life.commit(2)
    asked: list[tuple[int, int] | None] = []

    def before_exchange() -> None:
        tried, kept = life.lifecycle.state.attempt, written(life)
        assert tried and kept
        asked.extend((tried.golden, kept.golden))

    life.lifecycle.adopt(life.key(2), before_exchange=before_exchange)
    assert asked == [(3, 3), None]
    tried = life.lifecycle.state.attempt
    assert tried and tried.golden is None
    assert list(tried.took_s) == [Step.GATE, Step.ACTIVATE]


def test_a_version_waits_for_running_prompts_before_it_takes_over(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    life.commit(2)
    with life.lifecycle.lease():
        adoption = InBackground(lambda: life.adopt(2))
        host.wait_for("try 2")
        wait_until(lambda: seen(life) == (2, "activate", None), 20, "the wait for the prompt")
    adoption.result()
    assert seen(life) == (2, "active", None)


@pytest.mark.parametrize(
    ("script", "code", "in_quarantine"),
    [
        (Script(golden_failures=["wrong"]), "gate_failed", True),
        (Script(load_error=LoadFailed("bad graph")), "load_failed", True),
        (Script(load_error=CannotRun("no library")), "cannot_run", False),
        (Script(gate_error=RunnerError("it took too long")), "runner_failed", False),
    ],
)
def test_a_version_that_fails_in_the_gate_says_why_also_after_a_restart(
    life: Life, host: ScriptedHost, script: Script, code: str, in_quarantine: bool
) -> None:
    life.serve(1)
    host.script(2, script)
    refuse(life, 2)
    assert seen(life) == (2, "gate", code)
    assert set(life.lifecycle.state.measured) == {life.key(1)}
    faults = life.lifecycle.state.quarantined
    assert [fault.code for fault in faults.values()] == ([code] if in_quarantine else [])
    life.restart()
    assert seen(life) == (2, "gate", code)
    assert life.lifecycle.state.quarantined == faults


def test_the_active_version_that_is_wanted_again_ends_what_was_tried_before(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    host.script(2, Script(golden_failures=["wrong"]))
    refuse(life, 2)
    life.adopt(1)
    assert seen(life) == (1, "active", None)
    before = life.lifecycle.state.attempt
    life.adopt(1)
    assert life.lifecycle.state.attempt is before, "nothing new"


def test_a_version_that_crashes_once_it_is_active_failed_there(life: Life) -> None:
    life.serve(1, 2)
    for prompt in ("a", "b", "c"):
        life.crash(prompt)
    assert life.active == 1
    assert seen(life) == (2, "active", "runner_crashed")
    assert life.lifecycle.state.quarantined[life.key(2)].code == "runner_crashed"
    life.restart()
    assert seen(life) == (2, "active", "runner_crashed")


def test_an_active_version_that_does_not_load_says_so_until_it_does(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    life.restart()
    host.script(1, Script(load_error=LoadFailed("bad graph")))
    assert life.ask() is None
    assert seen(life) == (1, "active", "load_failed")
    host.script(1, Script())
    host.now_s += 100
    assert life.ask() == 1
    assert seen(life) == (1, "active", None)


def test_an_active_version_that_does_not_load_says_nothing_of_another_that_is_tried(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    host.script(2, Script(golden_failures=["wrong"]))
    refuse(life, 2)
    life.restart()
    host.script(1, Script(load_error=LoadFailed("bad graph")))
    assert life.ask() is None
    assert seen(life) == (2, "gate", "gate_failed")


def test_a_version_of_the_fallback_is_no_attempt(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    life.commit(5, fallback=True)
    life.adopt(5, instead="no library")
    assert seen(life) == (1, "active", None)
    life.adopt(5, instead="no library")
    assert seen(life) == (1, "active", None)


def test_a_version_that_may_not_take_over_yet_has_not_failed(life: Life) -> None:
    life.serve(1)
    life.commit(2)

    def too_early() -> None:
        raise ActivationHeld("the machine is in use")

    with pytest.raises(ActivationHeld):
        life.adopt(2, before_exchange=too_early)
    life.lifecycle.put_off(life.key(2))
    assert seen(life) is None, "its wait says more"


def test_an_attempt_that_the_daemon_did_not_end_is_forgotten_unless_it_goes_on(life: Life) -> None:
    life.serve(1)
    life.commit(2, 3)
    tried = Attempt(version=2, digest=life.records[2].digest, step=Step.GATE, at_s=1.0)
    life.store.change_state(life.name, lambda state: state.trying(life.key(2)).noting(tried))
    life.restart()
    assert seen(life) == (2, "gate", None), "it is tried again at once"
    life.store.change_state(life.name, lambda state: state.trying(life.key(3)).noting(tried))
    life.restart()
    assert seen(life) is None
    life.lifecycle.pin(None)
    assert written(life) is None
