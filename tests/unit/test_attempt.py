"""What `state.json` keeps of attempts, faults and measurements, and what earlier releases did not write."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from edge_agent.cache.attempt import Attempt, Fault, Measured, Step
from edge_agent.cache.state import CacheState, ModelState, parse

A, B = "1-aaaaaaaaaaaa", "2-bbbbbbbbbbbb"
TRIED = Attempt(version=2, digest="b" * 64, step=Step.GATE, at_s=1_790_000_000.0, code="gate_failed")
SHOWN = Measured(load_ms=2310, tokens_per_s=21.4, passed=3, of=3)
STATE = ModelState(
    active=A,
    previous=B,
    quarantined={B: Fault(code="gate_failed", reason="golden prompt 1: no")},
    measured={A: SHOWN},
    attempt=TRIED,
    resolved=("models:/phi@prod", 2),
)


def read(document: Any) -> ModelState:
    return parse(json.dumps(document).encode()).model("assistant")


def written(state: ModelState = STATE) -> Any:
    return json.loads(CacheState(models={"assistant": state}).encode())


def test_everything_is_read_back() -> None:
    assert read(written()) == STATE


def test_a_file_of_an_earlier_release_is_read_and_its_quarantine_has_a_code() -> None:
    document = written()
    for key in ("codes", "measured", "attempt", "resolved"):
        del document["models"]["assistant"][key]
    assert document["models"]["assistant"]["quarantined"] == {B: "golden prompt 1: no"}, "as it always was"
    assert read(document) == ModelState(
        active=A,
        previous=B,
        quarantined={B: Fault(code="quarantined", reason="golden prompt 1: no")},
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "2"),
        ("version", True),
        ("version", -1),
        ("version", 1 << 62),
        ("digest", "x"),
        ("digest", None),
        ("step", "somewhere"),
        ("step", None),
        ("at", "now"),
        ("at", float("nan")),
        ("code", "no such\ncode"),
        ("code", 5),
    ],
)
def test_an_attempt_that_is_none_is_not_known(field: str, value: object) -> None:
    document = written()
    document["models"]["assistant"]["attempt"][field] = value
    assert read(document) == replace(STATE, attempt=None)


@pytest.mark.parametrize("value", [None, [], {}, {**SHOWN.fields(), "of": "3"}, {**SHOWN.fields(), "of": -1}])
def test_a_measurement_that_is_none_is_not_known(value: object) -> None:
    document = written()
    document["models"]["assistant"]["measured"][A] = value
    assert read(document) == replace(STATE, measured={})


@pytest.mark.parametrize("code", [None, 5, "a code", "x" * 65])
def test_a_code_that_is_none_is_the_one_of_quarantine(code: object) -> None:
    document = written()
    document["models"]["assistant"]["codes"][B] = code
    assert read(document).quarantined[B].code == "quarantined"


def test_measurements_are_kept_of_the_version_that_answers_and_the_one_before() -> None:
    state = ModelState().switched(A, measured=SHOWN)
    state = state.switched(B, measured=replace(SHOWN, load_ms=1))
    assert set(state.measured) == {A, B}
    back = state.stepped_back(None)
    assert back.measured[back.active or ""] == SHOWN
    third = state.switched("3-cccccccccccc")
    assert set(third.measured) == {B}, "nothing is known of one that was in no gate"


def test_the_wait_for_its_time_is_no_unfinished_attempt() -> None:
    running = replace(TRIED, code=None, digest="b" * 64)
    assert ModelState(attempt=running).waiting_for(B).attempt is None
    assert ModelState(attempt=TRIED).waiting_for(B).attempt == TRIED
    assert ModelState(attempt=running).waiting_for(A).attempt == running


def test_steps_that_are_over_say_how_long_they_took() -> None:
    fetched = Attempt(version=2, digest="b", step=Step.FETCH, at_s=100.0)
    verified = fetched.then(Step.VERIFY, 171.26)
    tried = replace(verified.then(Step.GATE, 173.26), golden=(3, 8))
    assert tried.document() == {
        **tried.fields(),
        "took_s": {"fetch": 71.3, "verify": 2.0},
        "golden": {"asking": 3, "of": 8},
    }
    active = tried.then(Step.ACTIVATE, 180.0).then(Step.ACTIVE, 179.0)
    assert active.document()["golden"] is None
    assert list(active.took_s.values())[2:] == [pytest.approx(6.74), 0.0], "the clock was set back"
    assert Attempt.parse(active.fields()) == active, "a restart forgets how long it took, and nothing else"
