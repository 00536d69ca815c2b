"""What a dispatcher does with prompts: a real journal, scripted partners, and a clock that the test moves."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.chat.prompt import State
from edge_agent.errors import ModelFailed, PromptTooLong, RunnerError
from edge_agent.runner.protocol import Refused
from edge_agent.topics import ANONYMOUS
from tests.support.dispatching import MODEL, Desk
from tests.support.processes import wait_until


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.close()


def state_of(desk: Desk, row: int) -> tuple[State, int]:
    """A prompt's state and attempts."""
    prompt = desk.journal.prompt(row)
    assert prompt
    return prompt.state, prompt.attempts


def digest(document: dict[str, str]) -> bytes:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()


# --- Answers -------------------------------------------------------------------------------------------


def test_a_prompt_is_answered_and_its_outlet_told(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.clock.advance(0.5)
    desk.runner.finish(name, "Mad", "rid", tokens=3)
    desk.dispatcher.step()
    document, properties = desk.answer(1)
    assert properties == {"status": "200", "model": MODEL, "version": "7"}
    assert document["id"] == "r1"
    assert document["choices"][0]["message"]["content"] == "Madrid"
    assert document["usage"]["completion_tokens"] == 3
    assert document["timings"]["total_ms"] == 500.0
    assert desk.outlet.rows == [1]
    assert desk.outlet.chunks == [], "nobody asked for a stream"
    assert desk.counted == {"ok": 1}
    assert desk.host.leases == 0, "the runner is given back"


def test_a_runner_is_told_whose_a_prompt_is_and_not_by_name(desk: Desk) -> None:
    desk.start("r1")
    (started,) = desk.runner.started
    assert started.owner == f"owner of {ANONYMOUS}"


def test_a_runner_gets_the_settings_defaults_and_the_time_that_is_left(desk: Desk) -> None:
    desk.accept("r1", deadline_s=60.0)
    desk.clock.advance(12.0)
    desk.dispatcher.step()
    (started,) = desk.runner.started
    assert started.document == {"temperature": 0.5, "prompt": "r1"}
    assert started.timeout_s == pytest.approx(48.0)
    assert started.name == "r1.1.1", "unique for each row and attempt"


def test_a_system_prompt_of_the_settings_that_the_model_refuses_is_not_the_clients_fault(desk: Desk) -> None:
    system, user = {"role": "system", "content": "Sing."}, {"role": "user", "content": "Hi"}
    desk.system, desk.host.system_refused = "Be brief.", "the model refuses the settings' system prompt"
    row = desk.accept("r1", messages=[user])
    desk.dispatcher.step()
    document, properties = desk.answer(row)
    assert (properties["status"], document["error"]["code"]) == ("500", "model_failed")
    assert document["error"]["message"] == desk.host.system_refused
    assert desk.runner.started == []
    assert desk.host.leases == 0
    desk.accept("r2", messages=[system, user])
    desk.dispatcher.step()
    desk.runner.finish("r2.2.1")
    desk.dispatcher.step()
    desk.accept("r3")
    desk.dispatcher.step()
    assert [started.name for started in desk.runner.started] == ["r2.2.1", "r3.3.1"], "those did not get it"


def test_an_answer_is_told_only_after_it_was_committed(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.runner.finish(name, "x")
    with desk.journal_locked():
        desk.dispatcher.notify()
        desk.dispatcher.step()
        assert desk.outlet.rows == []
        assert desk.host.leases == 1, "the version stays while its answer is not settled"


def test_calls_of_tools_are_in_the_answer_and_in_a_chunk_once_they_are_complete(desk: Desk) -> None:
    (name,) = desk.start("r1", stream=True)
    desk.runner.call(name, "switch", '{"on": ', "true}")
    desk.runner.call(name, "wait", "{}", index=1)
    desk.runner.finish(name, finish_reason="tool_calls")
    desk.dispatcher.step()
    document, _ = desk.answer(1)
    (choice,) = document["choices"]
    first, second = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert [first["function"], second["function"]] == [
        {"name": "switch", "arguments": '{"on": true}'},
        {"name": "wait", "arguments": "{}"},
    ]
    assert first["type"] == "function"
    called, last = desk.outlet.chunks
    assert called["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **first}, {"index": 1, **second}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in (called, last)] == [None, "tool_calls"]
    assert "tool_calls" not in last["choices"][0]["delta"]


def test_calls_have_the_same_ids_when_their_prompt_runs_again_and_others_in_other_answers(desk: Desk) -> None:
    desk.host.parallel = 2
    one, two = desk.start("r1", "r2", stream=True)
    for index in range(2):
        desk.runner.call(one, "switch", "{}", index=index)
    desk.dispatcher.step()
    (before,) = [run.tool_calls for run in desk.dispatcher._running() if run.name == one]
    desk.runner.die(two)
    desk.dispatcher.step()
    desk.dispatcher.step()
    three = desk.start("r3")[-1]
    for name in (one, three):
        desk.runner.call(name, "switch", "{}")
        desk.runner.finish(name, "Wait.", finish_reason="tool_calls")
    desk.dispatcher.step()
    again, others = (desk.answer(row)[0]["choices"][0]["message"] for row in (1, 3))
    assert again == {"role": "assistant", "content": "Wait.", "tool_calls": before[:1]}
    every = [call["id"] for call in (*before, *others["tool_calls"])]
    assert len(set(every)) == 3


def test_chunks_come_at_most_twenty_a_second_and_carry_all_the_text(desk: Desk) -> None:
    (name,) = desk.start("r1", stream=True)
    for text in ("a", "b", "c", "d"):
        desk.runner.say(name, text)
        desk.dispatcher.step()
        desk.clock.advance(0.02)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in desk.outlet.chunks] == ["a", "bcd"]
    desk.runner.finish(name, "e")
    desk.dispatcher.step()
    parts = [(chunk["seq"], chunk["choices"][0]) for chunk in desk.outlet.chunks]
    assert [seq for seq, _ in parts] == [0, 1, 2]
    assert [choice["finish_reason"] for _, choice in parts] == [None, None, "stop"]
    assert "".join(choice["delta"]["content"] for _, choice in parts) == "abcde" == desk.text(1)


def test_a_refusal_of_the_runner_is_the_answer_with_its_code(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.runner.frames.append(Refused(id=name, code="prompt_too_long", message="200 tokens, 128 fit"))
    desk.dispatcher.step()
    document, properties = desk.answer(1)
    assert document["error"] == {"status": 413, "code": "prompt_too_long", "message": "200 tokens, 128 fit"}
    assert properties == {"status": "413", "model": MODEL, "version": "7"}
    assert desk.host.leases == 0


def test_a_whole_answer_is_measured_and_one_of_an_error_only_counted(desk: Desk) -> None:
    desk.accept("r1")
    desk.clock.advance(0.25)
    desk.dispatcher.step()
    name = desk.runner.started[0].name
    desk.clock.advance(0.5)
    desk.runner.say(name, "Mad")
    desk.dispatcher.step()
    desk.clock.advance(1.0)
    desk.runner.finish(name, "rid", tokens=5)
    desk.dispatcher.step()
    (refused,) = desk.start("r2")
    desk.runner.frames.append(Refused(id=refused, code="prompt_too_long", message="200 tokens, 128 fit"))
    desk.dispatcher.step()
    measured = desk.measured
    assert desk.counted == {"ok": 1, "prompt_too_long": 1}
    sums = {key: measured[key]["sum"] for key in ("queue_s", "first_token_s", "request_s", "per_token_s")}
    assert sums == {"queue_s": 0.25, "first_token_s": 0.75, "request_s": 1.75, "per_token_s": 0.25}
    assert (measured["input_tokens"]["sum"], measured["output_tokens"]["sum"]) == (3, 5)
    assert measured["request_s"]["count"] == 1, "the times of an error are no answer's"


def test_a_refusal_with_a_code_of_no_error_is_500(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.runner.frames.append(Refused(id=name, code="surprise", message="x"))
    desk.dispatcher.step()
    assert desk.answer(1)[0]["error"]["code"] == ModelFailed.code
    assert desk.counted == {"ok": 0, "model_failed": 1}, "what a runner says is no label"


def test_a_prompt_that_cannot_be_handed_over_gets_the_reason(desk: Desk) -> None:
    def refuse(name: str) -> None:
        raise PromptTooLong("it fits into no frame")

    desk.runner.on_start = refuse
    desk.accept("r1")
    desk.dispatcher.step()
    assert desk.status(1) == 413
    assert desk.outlet.rows == [1]


def test_a_late_frame_of_a_prompt_that_nobody_knows_is_passed_over(desk: Desk) -> None:
    (name,) = desk.start("r2")
    desk.runner.finish("r1.9.1", "of another life")
    desk.runner.finish(name, "x")
    desk.dispatcher.step()
    assert desk.text(1) == "x"
    assert desk.outlet.rows == [1]


def test_a_frame_after_the_end_changes_nothing(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.runner.finish(name, "first")
    desk.runner.finish(name, "second")
    desk.dispatcher.step()
    assert desk.text(1) == "first"
    assert desk.outlet.rows == [1]
    assert desk.counted == {"ok": 1}


# --- Several at once -----------------------------------------------------------------------------------


def test_prompts_run_side_by_side_as_far_as_the_runner_has_room(desk: Desk) -> None:
    desk.host.parallel = 2
    for request_id in ("r1", "r2", "r3"):
        desk.accept(request_id)
    desk.dispatcher.step()
    assert [started.name for started in desk.runner.started] == ["r1.1.1", "r2.2.1"]
    assert desk.host.leases == 2
    desk.runner.finish("r2.2.1", "two")
    desk.dispatcher.step()
    desk.dispatcher.step()
    assert [started.name for started in desk.runner.started] == ["r1.1.1", "r2.2.1", "r3.3.1"]
    assert state_of(desk, 1) == (State.RUNNING, 1)
    assert desk.text(2) == "two"


def test_a_prompt_that_comes_while_another_runs_starts_beside_it(desk: Desk) -> None:
    desk.host.parallel = 2
    desk.start("r1")
    desk.dispatcher.step()
    assert desk.start("r2") == ["r2.2.1"]


def test_the_texts_of_prompts_that_run_side_by_side_are_kept_apart(desk: Desk) -> None:
    desk.host.parallel = 2
    one, two = desk.start("r1", "r2")
    desk.runner.say(one, "a")
    desk.runner.say(two, "b")
    desk.runner.finish(one, "a")
    desk.runner.finish(two, "b")
    desk.dispatcher.step()
    assert (desk.text(1), desk.text(2)) == ("aa", "bb")


def test_the_time_for_one_prompt_is_a_moving_average_over_those_that_run(desk: Desk) -> None:
    desk.host.parallel = 2
    one, two = desk.start("r1", "r2")
    assert desk.dispatcher.service_s == 2.0
    desk.clock.advance(8.0)
    desk.runner.finish(one, "x")
    desk.dispatcher.step()
    assert desk.dispatcher.service_s == pytest.approx(2.0 + 0.2 * (8.0 / 2 - 2.0)), "two shared the time"
    desk.runner.finish(two, "x")
    desk.dispatcher.step()
    assert desk.dispatcher.service_s == pytest.approx(2.4 + 0.2 * (8.0 - 2.4))


def test_the_speed_is_the_last_one_that_could_be_measured(desk: Desk) -> None:
    (name,) = desk.start("r1")
    speeds = [desk.dispatcher.tokens_per_s]
    desk.runner.say(name, "x")
    desk.dispatcher.step()
    desk.clock.advance(2.0)
    desk.runner.finish(name, "y", tokens=21)
    desk.dispatcher.step()
    speeds.append(desk.dispatcher.tokens_per_s)
    (name,) = desk.start("r2")
    desk.runner.finish(name, "x", tokens=1)
    desk.dispatcher.step()
    speeds.append(desk.dispatcher.tokens_per_s)
    assert speeds == [None, 10.0, 10.0]


# --- Cancelled, or too late ----------------------------------------------------------------------------


def test_a_prompt_that_was_cancelled_in_the_queue_never_runs(desk: Desk) -> None:
    row = desk.accept("r1")
    desk.end(row, 499)
    desk.dispatcher.step()
    assert desk.runner.started == []
    assert desk.status(row) == 499
    assert desk.outlet.rows == [], "who cancelled it told the outlet"


def test_a_prompt_that_was_cancelled_while_it_ran_is_stopped_and_what_it_says_is_void(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (name,) = desk.start("r1", stream=True)
    desk.end(1, 499)
    assert desk.runner.cancelled == [name]
    desk.runner.finish(name, "void")
    desk.dispatcher.step()
    assert desk.status(1) == 499
    assert desk.outlet.chunks == []
    assert desk.outlet.rows == []
    assert desk.counted == {"ok": 0}
    assert desk.host.leases == 0
    (line,) = [each for each in caplog.messages if each.startswith("prompt abandoned ")]
    assert "code=" not in line, "whoever cancelled it has said why, and counts it"


def test_a_cancelled_prompt_keeps_its_runner_until_the_runner_has_ended_it(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.end(1, 499)
    desk.accept("r2")
    desk.dispatcher.step()
    assert [started.name for started in desk.runner.started] == [name], "the runner has room for one"
    desk.runner.frames.append(Refused(id=name, code="cancelled", message="cancelled"))
    desk.dispatcher.step()
    desk.dispatcher.step()
    assert [started.name for started in desk.runner.started] == [name, "r2.2.1"]


def test_only_the_prompt_that_was_cancelled_is_stopped(desk: Desk) -> None:
    desk.host.parallel = 2
    one, two = desk.start("r1", "r2")
    desk.end(2, 499)
    assert desk.runner.cancelled == [two]
    desk.runner.finish(one, "x")
    desk.dispatcher.step()
    assert desk.text(1) == "x"


def test_a_cancel_between_the_claim_and_the_start_stops_the_prompt(desk: Desk) -> None:
    """Whoever cancels finds no run to stop, or a runner that does not have the prompt yet."""
    desk.runner.on_start = lambda name: desk.end(1, 499)
    (name,) = desk.start("r1", stream=True)
    assert name in desk.runner.cancelled
    desk.runner.finish(name, "void")
    desk.dispatcher.step()
    assert desk.status(1) == 499
    assert desk.outlet.chunks == []
    assert desk.outlet.rows == []


def test_a_cancel_that_nobody_told_the_run_of_is_seen_in_the_journal(desk: Desk) -> None:
    def answer_only(name: str) -> None:
        desk.dispatcher.abandon = lambda row: None  # type: ignore[method-assign]
        desk.end(1, 499)

    desk.runner.on_start = answer_only
    (name,) = desk.start("r1", stream=True)
    assert desk.runner.cancelled == [name]
    desk.runner.say(name, "void")
    desk.dispatcher.step()
    assert desk.outlet.chunks == []


def test_a_prompt_whose_deadline_passed_in_the_queue_gets_408_and_never_runs(desk: Desk) -> None:
    row = desk.accept("r1", deadline_s=5.0)
    desk.clock.advance(5.0)
    desk.dispatcher.step()
    assert desk.runner.started == []
    assert desk.status(row) == 408
    assert desk.outlet.rows == [row]
    assert desk.host.leases == 0


def test_a_prompt_whose_deadline_passes_while_it_runs_is_stopped(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.clock.advance(60.0)
    (overdue,) = desk.journal.overdue(desk.clock())
    desk.end(overdue.row, 408)
    assert desk.runner.cancelled == [name]
    desk.runner.finish(name, "too late")
    desk.dispatcher.step()
    assert desk.status(1) == 408
    assert desk.outlet.rows == []


def test_a_deadline_that_the_runner_keeps_itself_is_408(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.runner.frames.append(Refused(id=name, code="deadline_exceeded", message="too late"))
    desk.dispatcher.step()
    assert desk.status(1) == 408


# --- A runner that dies --------------------------------------------------------------------------------


def test_when_a_runner_dies_the_prompt_whose_turn_it_was_gets_500_and_the_others_run_again(
    desk: Desk,
) -> None:
    desk.host.parallel = 3
    one, two, three = desk.start("r1", "r2", "r3")
    desk.runner.die(two)
    desk.dispatcher.step()
    assert desk.answer(2)[0]["error"]["code"] == "model_failed"
    assert desk.answer(2)[1] == {"status": "500", "model": MODEL, "version": "7"}
    assert state_of(desk, 1) == state_of(desk, 3) == (State.QUEUED, 0), "no attempt of theirs is counted"
    assert desk.outlet.rows == [2]
    assert desk.host.leases == 0, "the dead runner is given back"
    desk.dispatcher.step()
    again = [started.name for started in desk.runner.started[3:]]
    assert again == [one, three]
    desk.runner.finish(one, "x")
    desk.runner.finish(three, "y")
    desk.dispatcher.step()
    assert (desk.text(1), desk.text(3)) == ("x", "y")


def test_a_prompt_that_runs_again_is_answered_with_the_text_of_its_second_run_only(desk: Desk) -> None:
    desk.host.parallel = 2
    one, two = desk.start("r1", "r2")
    desk.runner.say(one, "of the first run")
    desk.runner.die(two)
    desk.dispatcher.step()
    desk.dispatcher.step()
    desk.runner.finish(one, "second")
    desk.dispatcher.step()
    assert desk.text(1) == "second"


def test_what_may_have_killed_a_runner_is_handed_to_the_lease_as_digests(desk: Desk) -> None:
    desk.host.parallel = 3
    _, two, three = desk.start("r1", "r2", "r3")
    desk.runner.die(two, three)
    desk.dispatcher.step()
    assert desk.host.crashes == [frozenset([digest({"prompt": "r2"}), digest({"prompt": "r3"})])]
    assert (desk.status(1), desk.status(2), desk.status(3)) == (None, 500, 500)


@pytest.mark.parametrize("suspects", [(), ("r9.9.1",)], ids=["none", "a stranger"])
def test_when_nobody_knows_whose_turn_it_was_all_are_suspects(desk: Desk, suspects: tuple[str, ...]) -> None:
    desk.host.parallel = 2
    desk.start("r1", "r2")
    desk.runner.die(*suspects)
    desk.dispatcher.step()
    assert (desk.status(1), desk.status(2)) == (500, 500)
    assert desk.host.crashes == [frozenset([digest({"prompt": "r1"}), digest({"prompt": "r2"})])]


def test_what_a_runner_said_before_its_death_counts(desk: Desk) -> None:
    desk.host.parallel = 2
    one, two = desk.start("r1", "r2")
    desk.runner.finish(one, "whole")
    desk.runner.die(two)
    desk.dispatcher.step()
    assert desk.text(1) == "whole"
    assert desk.status(2) == 500
    assert desk.host.crashes == [frozenset([digest({"prompt": "r2"})])]


def test_what_was_put_back_starts_again_beside_an_answer_that_waits_for_the_journal(desk: Desk) -> None:
    desk.host.parallel = 4
    one, two, three = desk.start("r1", "r2", "r3")
    desk.runner.finish(one, "x")
    with desk.journal_locked():
        desk.dispatcher.step()
    desk.runner.die(three)
    desk.dispatcher.step()
    desk.dispatcher.step()
    assert [started.name for started in desk.runner.started] == [one, two, three, two]
    assert desk.status(1) is None, "it still waits"


def test_a_runner_that_is_dead_at_the_start_costs_the_prompt_only_after_its_death_was_heard(
    desk: Desk,
) -> None:
    def broken(name: str) -> None:
        raise RunnerError("its socket is closed")

    desk.runner.on_start = broken
    desk.accept("r1")
    desk.runner.die("r1.1.1")
    desk.dispatcher.step()
    assert desk.status(1) == 500
    assert len(desk.host.crashes) == 1


# --- Waiting, loading, stopping ------------------------------------------------------------------------


def test_without_a_runner_a_prompt_waits_in_the_queue(desk: Desk) -> None:
    desk.host.runner = None
    row = desk.accept("r1")
    desk.dispatcher.step()
    desk.dispatcher.step()
    assert desk.host.waits == 2, "it waits for a runner, not for a prompt"
    assert state_of(desk, row) == (State.QUEUED, 0)
    desk.host.runner = desk.runner
    desk.dispatcher.step()
    assert state_of(desk, row) == (State.RUNNING, 1)


def test_with_nothing_to_do_the_model_may_be_unloaded_and_no_runner_is_asked_for(desk: Desk) -> None:
    asked = []
    desk.host.on_lease = lambda: asked.append(1)
    desk.dispatcher.notify()
    desk.dispatcher.step()
    assert (asked, desk.host.unloads) == ([], 1)


def test_a_model_that_is_wanted_now_is_loaded_without_a_prompt(desk: Desk) -> None:
    asked = []
    desk.host.wanted, desk.host.on_lease = True, lambda: asked.append(1)
    desk.dispatcher.notify()
    desk.dispatcher.step()
    assert asked == [1]
    assert desk.host.leases == 0
    assert desk.runner.started == []


def test_a_prompt_is_left_in_the_queue_when_the_stop_comes_while_its_model_loads(desk: Desk) -> None:
    desk.host.on_lease = lambda: desk.dispatcher.drain(0.0)
    row = desk.accept("r1")
    desk.dispatcher.step()
    assert state_of(desk, row) == (State.QUEUED, 0)
    assert desk.runner.started == []
    assert desk.host.leases == 0


def test_after_a_stop_nothing_more_is_claimed_and_what_runs_is_answered(desk: Desk) -> None:
    desk.host.parallel = 2
    (name,) = desk.start("r1")
    desk.dispatcher.stop_claiming()
    waiting = desk.accept("r2")
    desk.runner.finish(name, "x")
    desk.dispatcher.step()
    assert desk.text(1) == "x"
    assert state_of(desk, waiting) == (State.QUEUED, 0)


def test_a_prompt_whose_runner_ends_with_the_agent_goes_back_into_the_queue(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.dispatcher.stop_claiming()
    desk.runner.die(name)
    desk.dispatcher.step()
    assert state_of(desk, 1) == (State.QUEUED, 0)
    assert desk.host.crashes == []
    assert desk.outlet.rows == []


def test_draining_puts_back_what_does_not_end_in_time_and_its_late_answer_is_void(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.dispatcher.drain(0.0)
    assert desk.runner.cancelled == [name]
    assert state_of(desk, 1) == (State.QUEUED, 0)
    desk.runner.finish(name, "late")
    desk.dispatcher.step()
    assert state_of(desk, 1) == (State.QUEUED, 0)
    assert desk.outlet.rows == []


def test_draining_waits_for_what_runs(desk: Desk) -> None:
    (name,) = desk.start("r1")
    drain = threading.Thread(target=desk.dispatcher.drain, args=(3600.0,), daemon=True)
    drain.start()
    wait_until(desk.dispatcher._stopping.is_set, 60, "the drain to begin")
    drain.join(0.1)
    assert drain.is_alive()
    desk.runner.finish(name, "in time")
    desk.dispatcher.step()
    drain.join(60)
    assert not drain.is_alive()
    assert desk.text(1) == "in time"
    assert desk.runner.cancelled == []


def test_draining_with_nothing_running_ends_at_once_and_ends_the_thread(desk: Desk) -> None:
    thread = threading.Thread(target=desk.dispatcher.run, daemon=True)
    thread.start()
    desk.dispatcher.drain(3600.0)
    thread.join(10)
    assert not thread.is_alive()


def test_the_thread_does_not_end_before_what_runs_has_ended(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.dispatcher.stop_claiming()
    desk.runner.finish(name, "whole")
    desk.dispatcher.run()
    assert desk.text(1) == "whole"


# --- What nobody foresaw -------------------------------------------------------------------------------


def test_a_journal_that_cannot_be_written_costs_no_prompt_at_the_claim(desk: Desk) -> None:
    row = desk.accept("r1")
    desk.host.wanted = True
    with desk.journal_locked():
        desk.dispatcher.step()
        assert desk.runner.started == []
        assert desk.host.leases == 0
    desk.dispatcher.step()
    assert state_of(desk, row) == (State.RUNNING, 1)


def test_an_answer_that_the_journal_cannot_take_is_kept_and_settled_later(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.runner.finish(name, "kept")
    with desk.journal_locked():
        desk.dispatcher.notify()
        desk.dispatcher.step()
    desk.clock.advance(0.5)
    desk.dispatcher.notify()
    desk.dispatcher.step()
    assert desk.status(1) is None, "the journal is not asked again at once"
    desk.clock.advance(0.5)
    desk.dispatcher.step()
    assert desk.text(1) == "kept"
    assert desk.outlet.rows == [1]
    assert desk.host.leases == 0


def test_while_one_answer_waits_for_the_journal_the_others_go_on(desk: Desk) -> None:
    desk.host.parallel = 2
    one, two = desk.start("r1", "r2")
    desk.runner.finish(one, "x")
    with desk.journal_locked():
        desk.dispatcher.step()
        desk.runner.say(two, "y")
        desk.dispatcher.step()
    desk.clock.advance(1.0)
    desk.runner.finish(two, "z")
    desk.dispatcher.step()
    assert (desk.text(1), desk.text(2)) == ("x", "yz")


def test_an_agent_that_stops_does_not_wait_for_a_journal_that_cannot_be_written(desk: Desk) -> None:
    (name,) = desk.start("r1")
    desk.runner.finish(name, "lost")
    desk.dispatcher.stop_claiming()
    with desk.journal_locked():
        desk.dispatcher.step()
    assert state_of(desk, 1) == (State.RUNNING, 1), "it counts as a death, and runs again"
    assert desk.host.leases == 0


def test_what_nobody_foresaw_at_the_start_costs_its_own_prompt_only(desk: Desk) -> None:
    def fail(name: str) -> None:
        if name.startswith("r2"):
            raise ValueError("nobody foresaw this")

    desk.host.parallel = 3
    desk.runner.on_start = fail
    for request_id in ("r1", "r2", "r3"):
        desk.accept(request_id)
    desk.dispatcher.step()
    assert desk.answer(2)[0]["error"]["message"] == "the agent failed on this prompt"
    assert "r2.2.1" in desk.runner.cancelled
    desk.runner.finish("r1.1.1", "x")
    desk.runner.finish("r3.3.1", "y")
    desk.dispatcher.step()
    assert (desk.text(1), desk.text(3)) == ("x", "y")


def test_what_nobody_foresaw_at_a_frame_costs_its_own_prompt_only(desk: Desk) -> None:
    def fail(document: dict[str, object]) -> None:
        if document["id"] == "r1":
            raise ValueError("nobody foresaw this")

    desk.host.parallel = 2
    desk.outlet.on_chunk = fail
    one, two = desk.start("r1", "r2", stream=True)
    desk.runner.say(one, "a")
    desk.runner.finish(two, "b")
    desk.dispatcher.step()
    assert desk.status(1) == 500
    assert desk.runner.cancelled == [one]
    assert desk.text(2) == "b"
    assert desk.outlet.rows == [1, 2]


def test_a_runner_whose_descriptor_was_closed_is_left_to_its_owner(desk: Desk) -> None:
    (name,) = desk.start("r1")
    closed = os.dup(0)
    os.close(closed)
    desk.runner.fileno = lambda: closed  # type: ignore[method-assign]
    desk.dispatcher.step()
    desk.runner.finish(name, "x")
    desk.dispatcher.step()
    assert desk.text(1) == "x"
