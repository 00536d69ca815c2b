"""A stop of the agent during a load or a trial: no word against the version, no failed attempt, and the next start goes
on with it."""

from __future__ import annotations

import hashlib
import logging

import pytest

from edge_agent.cache import verify
from edge_agent.cache.state import ModelState
from edge_agent.errors import AgentStopping, SyncStopped
from edge_agent.serving.verdicts import MAX_TRIES
from tests.support.committed import fault
from tests.support.processes import wait_until
from tests.support.scripted_runner import InBackground, Life, Script, ScriptedHost
from tests.unit.serving.conftest import NewLife

LOAD, GATE = Script(load_waits=True), Script(gate_waits=True)


def state_of(life: Life) -> ModelState:
    return life.store.state().model(life.name)


def stop_in(life: Life, host: ScriptedHost, version: int, at: str, script: Script, **options: bool) -> None:
    """The trial of a version is ended by the agent's stop; `at` is the runner's event at which that comes."""
    host.script(version, script)
    host.events.clear()
    trial = InBackground(lambda: life.adopt(version, **options))
    host.wait_for(f"{at} {version}")
    life.lifecycle.close()
    with pytest.raises(AgentStopping, match="the agent is stopping"):
        trial.result()
    host.script(version, Script())


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("at", "script"), [("load", LOAD), ("try", GATE)])
@pytest.mark.parametrize("serving", [True, False])
def test_a_stop_during_a_trial_is_held_against_nobody(
    life: Life, host: ScriptedHost, caplog: pytest.LogCaptureFixture, at: str, script: Script, serving: bool
) -> None:
    if serving:
        life.serve(1)
    life.commit(2)
    before = state_of(life)
    for _ in range(MAX_TRIES + 1):  # one more than a candidate is tried whose agents die
        stop_in(life, host, 2, at, script)
        after = state_of(life)
        assert (after.candidate, after.candidate_tries) == (life.key(2), 0)
        assert (after.active, after.quarantined, after.attempt) == (before.active, {}, None)
        life.restart()
    assert complaints(caplog) == []
    assert life.lifecycle.untried() == life.key(2), "the next start tries it"
    life.adopt(2)
    assert life.active == 2


def test_stops_do_not_hide_that_agents_died_of_a_candidate(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    life.commit(2)
    life.store.change_state(life.name, lambda state: state.trying(life.key(2)))  # and died
    life.restart()
    stop_in(life, host, 2, "load", LOAD)
    assert state_of(life).candidate_tries == 1


def test_what_an_operator_asked_for_is_not_asked_for_by_the_next_start(
    life: Life, host: ScriptedHost
) -> None:
    life.serve(1)
    life.commit(2)
    stop_in(life, host, 2, "load", LOAD, force=True)
    assert state_of(life).candidate is None


def test_a_fallback_is_not_tried_as_if_it_were_the_models_own(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    life.commit(2, fallback=True)
    stop_in(life, host, 2, "load", LOAD)
    assert state_of(life).candidate is None


def test_a_version_in_quarantine_is_no_candidate_after_a_stop() -> None:
    state = ModelState(active="1-" + "0" * 12).trying("2-" + "0" * 12)
    assert state.candidate is not None
    refused = state.refused(state.candidate, fault("wrong answers")).trying(state.candidate)
    assert refused.interrupted(state.candidate).candidate is None
    assert state.interrupted("3-" + "0" * 12) == state, "it is another one's trial"


def test_a_stop_ends_the_reading_of_a_large_file(
    life: Life, host: ScriptedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.serve(1)
    life.commit(2)
    key, sha256 = life.key(2), hashlib.sha256
    read: list[bytes] = []
    closing: list[InBackground] = []

    class Closing:
        """Closes the model once the first byte has been read."""

        def __init__(self, *data: bytes) -> None:
            self._digest = sha256(*data)

        def update(self, data: bytes) -> None:
            read.append(data)
            self._digest.update(data)
            closing.append(InBackground(life.lifecycle.close))
            wait_until(lambda: host.running() == [], 10, "the close")

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    monkeypatch.setattr(verify, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(hashlib, "sha256", Closing)
    with pytest.raises(SyncStopped):
        life.lifecycle.adopt(key)
    closing[0].result()
    assert ([len(data) for data in read], state_of(life).candidate_tries) == ([1], 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, SyncStopped])
def test_an_interrupted_command_counts_as_no_agent_that_died(
    new_life: NewLife, host: ScriptedHost, error: type[BaseException]
) -> None:
    life = new_life()
    life.serve(1)
    life.commit(2)

    def interrupt() -> None:
        raise error("it was told to end")

    with pytest.raises(error):
        life.adopt(2, before_exchange=interrupt)
    assert (state_of(life).candidate_tries, life.active) == (0, 1)
    assert host.running() == [1]


def test_the_active_version_that_a_stop_keeps_from_loading_has_not_failed(
    life: Life, host: ScriptedHost, caplog: pytest.LogCaptureFixture
) -> None:
    life.serve(1, 2)
    life.restart()
    host.script(2, LOAD)
    host.events.clear()
    prompt = InBackground(life.ask)
    host.wait_for("load 2")
    life.lifecycle.close()
    assert prompt.result() is None
    assert (complaints(caplog), life.active, life.quarantined) == ([], 2, {})
