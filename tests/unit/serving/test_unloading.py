"""When a runner has to go: nobody asks, another model needs the memory, its files change, the agent stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.errors import SyncStopped
from edge_agent.serving.seat import Serving
from tests.support.processes import wait_until
from tests.support.scripted_runner import (
    RESIDENT_BYTES,
    InBackground,
    Life,
    Script,
    ScriptedHost,
    budget_of,
)
from tests.unit.serving.conftest import NewLife

ROOM_FOR_ONE = RESIDENT_BYTES * 3 // 2


# --- Nobody asks ---------------------------------------------------------------------------------------


def test_a_runner_that_nobody_uses_is_unloaded_and_comes_back(new_life: NewLife, host: ScriptedHost) -> None:
    life = new_life(idle_unload_s=60)
    life.serve(1)
    host.now_s += 30.0
    assert life.ask() == 1
    host.now_s += 59.0
    life.lifecycle.unload_when_idle()
    assert (life.lifecycle.serving, host.running()) == (Serving.READY, [1]), "since the last prompt"
    host.now_s += 1.0
    life.lifecycle.unload_when_idle()
    assert (life.lifecycle.serving, host.running()) == (Serving.IDLE, [])
    assert (life.lifecycle.available, life.lifecycle.wanted_now(), life.lifecycle.flavor) == (
        True,
        False,
        None,
    )
    assert (life.ask(), life.lifecycle.flavor) == (1, "onnxruntime-genai")


def test_a_runner_is_not_idle_while_a_prompt_runs(new_life: NewLife, host: ScriptedHost) -> None:
    life = new_life(idle_unload_s=60)
    life.serve(1)
    with life.lifecycle.lease():
        host.now_s += 1_000.0
        life.lifecycle.unload_when_idle()
    assert (host.running(), life.lifecycle.serving) == ([1], Serving.READY)
    host.now_s += 59.0
    life.lifecycle.unload_when_idle()
    assert host.running() == [1]


def test_a_model_that_is_loaded_on_demand_rests_after_its_runner_died(
    new_life: NewLife, host: ScriptedHost
) -> None:
    """Nobody loads it before the next prompt: it would be "starting" until then, and unfit for a balancer."""
    life = new_life(preload=False)
    life.serve(1)
    life.crash("a prompt")
    assert (life.lifecycle.serving, life.lifecycle.settled(), life.lifecycle.available) == (
        Serving.IDLE,
        True,
        True,
    )
    assert life.ask() == 1
    life.lifecycle.reload()
    assert (life.lifecycle.serving, life.ask()) == (Serving.IDLE, 1)
    for _ in range(9):  # nothing goes round: each prompt loads it at once
        life.newest_runner(1).crash()
        host.now_s += 300.0
        assert life.ask() == 1


def test_without_a_limit_nothing_is_idle(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    host.now_s += 1e9
    life.lifecycle.unload_when_idle()
    assert host.running() == [1]


# --- Another model needs the memory --------------------------------------------------------------------


def test_memory_that_a_prompt_uses_is_given_up_after_it(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    with life.lifecycle.lease():
        assert not life.lifecycle.give_up_memory()
        assert host.running() == [1]
        assert life.ask() is None, "no other prompt starts meanwhile"
    assert (host.running(), life.lifecycle.serving) == ([], Serving.IDLE)
    assert not life.lifecycle.give_up_memory(), "there is nothing left"
    assert life.ask() == 1


def test_models_take_turns_where_memory_holds_one(
    new_life: NewLife, host: ScriptedHost, tmp_path: Path
) -> None:
    shared = budget_of(host, tmp_path)
    first, second = (new_life(name=name, budget=shared) for name in ("first", "second"))
    first.serve(1)
    host.memory_bytes = ROOM_FOR_ONE
    second.serve(2)
    assert (first.lifecycle.serving, second.lifecycle.serving) == (Serving.IDLE, Serving.READY)
    assert host.running() == [2]
    assert (first.ask(), host.running(), second.lifecycle.serving) == (1, [1], Serving.IDLE)
    assert (second.ask(), host.running()) == (2, [2])


def test_a_load_waits_for_the_prompt_of_another_model(
    new_life: NewLife, host: ScriptedHost, tmp_path: Path
) -> None:
    shared = budget_of(host, tmp_path, waits=True)
    first, second = (new_life(name=name, budget=shared) for name in ("first", "second"))
    first.serve(1)
    second.commit(2)
    host.memory_bytes = ROOM_FOR_ONE
    with first.lifecycle.lease():
        adoption = InBackground(lambda: second.adopt(2))
        wait_until(lambda: first.ask() is None, what="the runner to be asked for")
        assert (host.running(), adoption.ended) == ([1], False)
    adoption.result()
    assert host.events == ["load 1", "try 1", "stop 1", "load 2", "try 2"]


def test_a_load_that_waited_too_long_goes_on_with_a_warning(
    new_life: NewLife, host: ScriptedHost, tmp_path: Path
) -> None:
    shared = budget_of(host, tmp_path)  # a minute passes at once
    first, second = (new_life(name=name, budget=shared) for name in ("first", "second"))
    first.serve(1)
    host.memory_bytes = ROOM_FOR_ONE
    with first.lifecycle.lease():
        second.serve(2)
        assert host.running() == [1, 2]
    assert "of memory are needed" in str(second.lifecycle.status()["reason"])


def test_a_runner_that_is_being_loaded_counts_as_memory_of_its_model(life: Life, host: ScriptedHost) -> None:
    host.script(1, Script(load_waits=True))
    life.commit(1)
    adoption = InBackground(lambda: life.adopt(1))
    host.wait_for("load 1")
    assert life.lifecycle.resident_bytes() == RESIDENT_BYTES
    host.let_load(1)
    adoption.result()
    assert life.lifecycle.resident_bytes() == RESIDENT_BYTES
    life.lifecycle.give_up_memory()
    assert life.lifecycle.resident_bytes() == 0


# --- Its files change, or the agent stops --------------------------------------------------------------


def test_a_reload_waits_for_the_prompt_that_runs(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    with life.lifecycle.lease():
        reload = InBackground(life.lifecycle.reload)
        wait_until(lambda: life.ask() is None, what="the reload to let no prompt in")
        assert (host.running(), reload.ended) == ([1], False)
    reload.result()
    assert (host.running(), life.lifecycle.serving) == ([], Serving.LOADING)
    assert life.ask() == 1
    assert host.events == ["load 1", "try 1", "stop 1", "load 1"]


def test_a_closed_model_loads_nothing_any_more(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    life.lifecycle.close()
    assert (host.running(), life.ask()) == ([], None)
    life.commit(2)
    with pytest.raises(SyncStopped, match="stopping"):
        life.adopt(2)
    assert (host.running(), life.active, life.quarantined) == ([], 1, {})


def test_closing_ends_a_load_that_a_prompt_waits_for(life: Life, host: ScriptedHost) -> None:
    life.serve(1)
    life.restart()
    host.events.clear()
    host.script(1, Script(load_waits=True))
    prompt = InBackground(life.ask)
    host.wait_for("load 1")
    life.lifecycle.close()
    assert prompt.result() is None
    assert host.events == ["load 1", "kill 1"]
    assert (life.active, life.quarantined) == (1, {})


def test_a_waiting_thread_hears_of_a_version_that_came(life: Life) -> None:
    life.commit(1)
    life.adopt(1)
    waiting = InBackground(lambda: life.lifecycle.wait_for_change(3600.0))

    def heard() -> bool:
        life.lifecycle.give_up_memory()
        life.ask()  # loads it again; the first times may come before the wait
        return waiting.ended

    wait_until(heard)
    waiting.result()


# --- What a load is given, and what is learned of it ---------------------------------------------------


def test_a_runner_is_given_what_the_settings_say(new_life: NewLife, host: ScriptedHost) -> None:
    life = new_life(context_tokens=512, max_tokens=32, repetition_penalty=1.1)
    life.serve(1)
    request = life.newest_runner(1).request
    assert request is not None
    assert (request.context_tokens, request.max_tokens, request.threads) == (512, 32, 1)
    assert request.repetition_penalty == 1.1
    assert request.folder == str(life.store.folder(life.records[1]))
    with life.lifecycle.lease() as lease:
        assert lease is not None
        assert (lease.flavor, lease.version) == ("onnxruntime-genai", 1)


def test_a_runner_that_claims_more_prompts_at_once_gets_no_more_than_the_settings_say(
    new_life: NewLife, host: ScriptedHost
) -> None:
    host.script(1, Script(parallel=10**9))
    life = new_life()
    life.serve(1)
    with life.lifecycle.lease() as lease:
        assert lease is not None
        assert lease.parallel == life.loading.parallel


def test_a_new_version_is_measured_once_with_each_number_of_threads(
    new_life: NewLife, host: ScriptedHost
) -> None:
    life = new_life(measurable=(4, 2))
    host.script(1, Script(rates={4: 10.0, 2: 20.0}))
    life.serve(1)
    threads = [runner.request.threads for runner in host.runners if runner.request]
    assert threads == [4, 2]
    assert host.events == ["load 1", "stop 1", "load 1", "try 1"], "memory holds it once"
    life.restart()
    assert life.ask() == 1
    assert host.runners[-1].request is not None
    assert (len(host.runners), host.runners[-1].request.threads) == (3, 2)


def test_the_fastest_is_loaded_again_when_it_was_not_the_last(new_life: NewLife, host: ScriptedHost) -> None:
    life = new_life(measurable=(4, 2))
    host.script(1, Script(rates={4: 20.0, 2: 10.0}))
    life.serve(1)
    threads = [runner.request.threads for runner in host.runners if runner.request]
    assert (threads, host.running()) == ([4, 2, 4], [1])


def test_a_peak_is_written_down_when_it_has_grown(life: Life, host: ScriptedHost) -> None:
    host.script(1, Script(peak_bytes=1_000))
    life.serve(1)
    peaks = []
    for peak_bytes in (1_000, 1_040, 1_060):
        host.scripts[1].peak_bytes = peak_bytes
        life.ask()
        folder = life.store.folder(life.records[1])
        peaks.append(
            life.loading.budget.expected_bytes(life.records[1], folder, life.loading.settings.context_tokens)
        )
    assert peaks == [1_000, 1_000, 1_060], "a write is not free on a flash card"
