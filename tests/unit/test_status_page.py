"""What `status` prints for people: nothing is idle that is not, nothing is lost, and what stands can be seen."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.console import Console

from edge_agent import terminal
from edge_agent.cli import operation, status_page
from edge_agent.doctor import service
from edge_agent.settings import Settings
from tests.support.scripted_status import NOW, WEIGHTS, attempt, document, model

TOOK = {"fetch": 71.4, "verify": 2.0}
BYTES = {"bytes": WEIGHTS * 3 // 5, "total_bytes": WEIGHTS, "bytes_per_s": 5_100_000.0, "eta_s": 156.9}


def lines(status: dict[str, Any], columns: int = 80) -> list[str]:
    console = Console(width=columns, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(terminal._drawn(status_page.page(status, now=NOW), columns))
    return [line.rstrip() for line in captured.get().splitlines()]


def one_text(status: dict[str, Any], columns: int = 80) -> str:
    """All words, wherever the lines end."""
    return re.sub(r"\s+", " ", " ".join(lines(status, columns)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"attempt": attempt("fetch"), "progress": BYTES},
            "version 7: fetching 1.2 GB of 2.0 GB (60 %), 5.1 MB/s, 2 min 37 s left, for 12 s",
        ),
        ({"attempt": attempt("fetch")}, "version 7: fetching, for 12 s"),
        (
            {"attempt": attempt("verify", took_s={"fetch": 71.4})},
            "version 7: verifying, for 12 s; fetched in 1 min 11 s",
        ),
        (
            {"attempt": attempt("gate", took_s=TOOK)},
            "version 7: loading, for 12 s; fetched in 1 min 11 s; verified in 2.0 s",
        ),
        (
            {"attempt": attempt("gate", took_s=TOOK, golden={"asking": 3, "of": 8})},
            "version 7: trying, golden prompt 3 of 8, for 12 s; fetched in 1 min 11 s; verified in 2.0 s",
        ),
        (
            {"attempt": attempt("activate", took_s={"gate": 31})},
            "version 7: waiting for the running prompts to end, for 12 s; tried in 31 s",
        ),
        (
            {"attempt": attempt("active", took_s={**TOOK, "gate": 31, "activate": 0.2})},
            "; fetched in 1 min 11 s; verified in 2.0 s; tried in 31 s; taken over in 0.2 s",
        ),
        ({"attempt": attempt("gate", code="gate_failed")}, "version 7 failed at gate, "),
        ({"attempt": None, "progress": BYTES}, "fetching 1.2 GB of 2.0 GB"),
    ],
)
def test_each_step_of_an_update_is_said_with_its_time(fields: dict[str, Any], said: str) -> None:
    found = one_text(document(model(**fields)))
    assert said in found
    assert "update " in found


@pytest.mark.parametrize(
    ("tried", "said"),
    [
        (attempt("fetch"), ""),  # its bytes are shown
        (attempt("verify"), "assistant version 7: verifying"),
        (attempt("gate"), "assistant version 7: loading"),
        (
            attempt("gate", golden={"asking": 3, "of": 8}),
            "assistant version 7: trying, golden prompt 3 of 8",
        ),
        (attempt("activate"), "assistant version 7: waiting for the running prompts to end"),
        (attempt("active"), ""),
        (attempt("gate", code="gate_failed"), ""),
        (None, ""),
    ],
)
def test_a_pull_says_each_step_after_the_bytes_once(tried: Any, said: str) -> None:
    status = document(model(attempt=tried), model(name="b", attempt=None))
    assert operation.steps_in(status, "assistant") == operation.steps_in(status, None) == said
    assert operation.steps_in(status, "b") == ""


@pytest.mark.parametrize("tried", [None, attempt("active"), attempt("held", code="link_held")])
def test_where_no_version_comes_there_is_no_line_of_one(tried: Any) -> None:
    assert "update" not in one_text(document(model(attempt=tried)))


def test_what_a_daemon_of_the_first_release_says_can_be_shown() -> None:
    """It runs on after an upgrade, until somebody restarts it."""
    entry: dict[str, Any] = {
        "name": "assistant",
        "uri": "models:/phi3-mini@prod",
        "version": "3",
        "digest": "d" * 64,
        "flavor": "onnx",
        "state": "ready",
        "reason": "",
        "tokens_per_s": 5.0,
        "previous": None,
        "candidate": None,
        "pinned": None,
        "quarantined": [],
        "update_problem": "",
        "progress": None,
    }
    status = {
        "state": "degraded",
        "time": NOW,
        "boot_id": "b",
        "seq": 1,
        "agent_version": "0.1.0",
        "queue_depth": 0,
        "models": [entry],
        "troubles": ["trust.allow_unsigned_code is on"],
        "cache": {"bytes": 1, "quota_bytes": 2, "free_bytes": 3},
        "registry": {"uri": "http://mlflow.example", "reachable": True, "last_check": NOW - 60},
        "broker": {"host": "localhost", "port": 1883, "connected": True, "problem": "", "answers_refused": 0},
    }
    said = one_text(status)
    assert "edge-agent 0.1.0, queue 0" in said and "reachable, last asked" in said
    assert "look at trust.allow_unsigned_code is on" in said
    first, *_ = service.check_daemon(Settings(), service.DaemonStatus(document=status))
    assert "trust.allow_unsigned_code is on" in first.message


@pytest.mark.parametrize(
    ("registry", "said"),
    [
        ({"last_check": None, "reachable": None}, "not asked yet"),
        ({"last_check": None, "reachable": None, "asking": True}, "being asked now, not asked yet"),
        ({}, "reachable, last asked 2026-"),
        ({"reachable": False, "problem": "registry_unreachable"}, "out of reach, last asked 2026-"),
        ({"problem": "registry_refused"}, "refuses this device, last asked 2026-"),
        ({"asking": True}, "being asked now, reachable, last asked 2026-"),
    ],
)
def test_the_registry_says_what_it_was_when_it_was_asked(registry: dict[str, Any], said: str) -> None:
    assert f"http://mlflow.example:5000 {said}" in one_text(document(registry=registry))


PINNED = {"pinned": "6-aaaaaaaaaaaa", "wanted": {"version": 6, "via": "pin"}}
DESIRED = {"wanted": {"version": 7, "via": "desired"}}
HELD = {
    "held": {
        "version": 7,
        "code": "link_held",
        "reason": "version 7 is held until 22:00 by link.windows, 1200 bytes are missing",
        "held_until": NOW,
    },
    "update_problem": "version 7 is held until 22:00 by link.windows, 1200 bytes are missing",
}
ROLLOUT = {
    "held": {
        "version": 7,
        "code": "not_in_rollout",
        "reason": "version 7 is rolled out to 5 % of the devices, not yet to this one",
        "held_until": None,
    }
}
STANDING = [
    (PINNED, "pinned to 6-aaaaaaaaaaaa; `edge-agent models unpin assistant` lets it follow"),
    (DESIRED, "model/desired asks for version 7"),
    (HELD, "version 7 is held until 22:00 by link.windows"),
    (ROLLOUT, "version 7 is rolled out to 5 % of the devices"),
    ({"wanted": {"version": 7, "via": "import"}}, "a version file brought version 7"),
]


@pytest.mark.parametrize(("fields", "said"), STANDING)
def test_a_pin_a_desired_state_a_hold_and_a_rollout_are_seen_once(fields: dict[str, Any], said: str) -> None:
    assert one_text(document(model(**fields))).count(said) == 1


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_is_lost_and_a_reason_stands_below_its_row(columns: int) -> None:
    reason = " ".join(f"word{number}" for number in range(60)) + " " + "x" * 200
    long = model(
        name="a-model-with-a-long-name",
        uri="models:/a-registered-model-with-a-very-long-name@production-canary",
        reason=reason,
        **{key: value for key, value in HELD.items() if key == "held"},
    )
    trouble = {"code": "quarantined", "text": "trouble " * 40}
    status = document(long, model(name="other"), troubles=[trouble])
    found = lines(status, columns)
    assert max(map(len, found)) <= columns
    squeezed = "".join("".join(found).split())
    for text in (long["name"], long["uri"], long["flavor"], reason, trouble["text"]):
        pieces = text.split() if text is not long["uri"] else []
        assert all(piece in squeezed for piece in pieces)
    head = next(number for number, line in enumerate(found) if line.startswith("MODEL"))
    assert "REASON" not in found[head]
    below = next(number for number, line in enumerate(found) if line.startswith("  reason"))
    assert below > head and found[below].startswith("  reason  word0 word1")
    assert found[below + 1].startswith("          word"), "it goes on below itself"
    other = next(number for number, line in enumerate(found) if line.startswith("other"))
    assert other > below, "and above the next model"
    columns_of = [found[number].index("ready") for number in (head + 1, other)]
    assert len(set(columns_of)) == 1, "the rows stay one table"


def test_a_page_without_models_has_the_device() -> None:
    status = {**document(), "models": []}
    assert lines(status)[0] == "state     ready   (edge-agent 1.0.0, queue 0)"
    assert not any(line.startswith("MODEL") for line in lines(status))
