"""The documents that a rollout retains: what comes back is input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import EdgeAgentError
from edge_agent.fleet.rollout import desired
from edge_agent.fleet.rollout.before import MAX_PAGE_BYTES, PAGE_DEVICES, Page, pages_of, read_page
from edge_agent.fleet.rollout.plan import MAX_CANARIES
from edge_agent.fleet.rollout.request import Request, Verb
from edge_agent.fleet.rollout.standing import Before, Standing
from edge_agent.fleet.rollout.state import (
    MAX_BYTES,
    MAX_EXCUSED,
    MAX_LISTED,
    MAX_SUSPECTS,
    Answered,
    Lease,
    Listed,
    Phase,
    State,
    StateUnreadable,
    parse,
)
from tests.support.generated_messages import examples
from tests.support.scripted_rollout import NAME, plan_of

LONGEST = [f"{number:05d}".rjust(64, "d") for number in range(10_000)]
STATE = State(
    id="ab" * 8,
    plan=plan_of(LONGEST[:12], canaries=LONGEST[:2]),
    at=1_790_000_000.5,
    since=1_790_000_000.0,
    phase=Phase.SOAKING,
    soak_until=1_790_000_100.0,
    suspects={LONGEST[0]: 1_790_000_001.0},
    excused=frozenset(LONGEST[3:5]),
    counts={Standing.TAKEN: 2},
    listed=(Listed(device=LONGEST[0], standing="taken", code="offline"),),
    speed=0.97,
    lease=Lease(console="cd" * 8, expires_at=1_790_000_030.0),
    answered=Answered(request="ef" * 8, problem=""),
    seq=12,
)


def test_another_console_reads_the_same_state() -> None:
    assert parse(STATE.encode()) == STATE


def test_ten_thousand_devices_in_every_trouble_fit_into_one_packet() -> None:
    plan = plan_of(LONGEST, canaries=LONGEST[:MAX_CANARIES], percents=[*range(1, 19), 100])
    full = replace(
        STATE,
        plan=plan,
        suspects=dict.fromkeys(LONGEST[:MAX_SUSPECTS], 1_790_000_000.123456),
        excused=frozenset(LONGEST[:MAX_EXCUSED]),
        listed=tuple(
            Listed(device=each, standing="unreachable", code="c" * 40) for each in LONGEST[:MAX_LISTED]
        ),
    ).entered(Phase.SOAKING, 1.0, reason="r" * 5_000)
    assert len(full.encode()) < MAX_BYTES
    assert parse(full.encode()).plan == plan


def set_to(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_to("schema", value=2),
        set_to("id", value="../x"),
        set_to("state", value="resting"),
        set_to("wave", value=4),
        set_to("wave", value=True),
        set_to("since", value=float("nan")),
        set_to("soak_until", value=-1),
        set_to("suspects", value={"a/b": 1}),
        set_to("suspects", value={f"d{number}": 1 for number in range(MAX_SUSPECTS + 1)}),
        set_to("excused", value=["x"] * (MAX_EXCUSED + 1)),
        set_to("counts", value={"happy": 1}),
        set_to("reason", value=7),
        set_to("seq", value=-1),
        set_to("lease", value={"console": "me", "expires_at": 1}),
        set_to("plan", "version", value=0),
        set_to("plan", "name", value="a/b"),
        set_to("plan", "uri", value="models:/phi3-mini/7"),
        set_to("plan", "waves", value=[]),
        set_to("plan", "waves", 0, "upto", value="zz"),
        set_to("plan", "canaries", value=[7]),
        set_to("plan", "limits", "soak_s", value=1e12),
        set_to("plan", "limits", "min_speed", value=1.5),
        set_to("plan", value=None),
        set_to("state", value="halted"),
    ],
)
def test_a_state_of_another_form_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(STATE.encode())
    change(document)
    with pytest.raises(StateUnreadable):
        parse(json.dumps(document).encode())


@examples(100)
@given(st.binary(max_size=300) | st.just(b"[" * 100_000) | st.just(b'{"schema": 1}'))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    try:
        parse(body)
    except EdgeAgentError as error:
        assert isinstance(error, StateUnreadable)
    read_page(body)
    Request.parse(body)
    desired.version_in(body, NAME)
    desired.with_version(body, NAME, 7)


def test_control_characters_in_a_state_are_not_shown() -> None:
    document = json.loads(STATE.encode())
    document["reason"] = "\x1b[2Jgone"
    assert "\x1b" not in parse(json.dumps(document).encode()).reason


# --- Pages, requests, desired states ------------------------------------------------------------------


def test_what_was_known_of_ten_thousand_devices_comes_back_from_pages_that_fit() -> None:
    before = Before(
        version=10**17,
        state="degraded",
        tokens_per_s=123456.78,
        gate_tokens_per_s=98765.43,
        attempt_at=1.79e9,
    )
    pages = pages_of(dict.fromkeys(LONGEST, before), "ab" * 8)
    assert len(pages) == len(LONGEST) // PAGE_DEVICES
    assert max(len(page.encode()) for page in pages) < MAX_PAGE_BYTES
    assert [read_page(page.encode()) for page in pages] == pages


def test_of_a_page_what_cannot_be_read_is_left_out() -> None:
    entries = {
        "good": [6, "ready", 1.5, None, None],
        "a/b": [6, "ready", 1.5, None, None],
        "short": [6],
        "word": [6, "ready", "fast", None, None],
        "nan": [6, "ready", float("nan"), None, None],
    }
    page = read_page(json.dumps({"rollout": "ab" * 8, "devices": entries}).encode())
    assert page == Page(
        rollout="ab" * 8, devices={"good": Before(version=6, state="ready", tokens_per_s=1.5)}
    )


def test_a_request_is_one_of_three_words_about_one_rollout() -> None:
    request = Request(id="ab" * 8, rollout="cd" * 8, verb=Verb.ABORT)
    assert Request.parse(request.encode()) == request
    for body in (b"", b"{}", b'{"id": "abababab", "rollout": "cdcdcdcd", "do": "finish"}', b"x" * 2_000):
        assert Request.parse(body) is None


def test_a_desired_state_keeps_what_it_says_of_other_models() -> None:
    other = b'{"models": {"other": {"version": 3}, "assistant": {"uri": "models:/x@y"}}, "within_s": 9}'
    told = desired.with_version(other, NAME, 7, within_s=30)
    assert json.loads(told) == {"models": {"other": {"version": 3}, NAME: {"version": 7}}, "within_s": 30}
    assert (desired.version_in(told, NAME), desired.version_in(other, NAME)) == (7, None)
    released = desired.with_version(told, NAME, None)
    assert json.loads(released) == {"models": {"other": {"version": 3}, NAME: None}}
    assert desired.version_in(released, NAME) is None
