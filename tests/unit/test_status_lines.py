"""What `status` and doctor say of a model that answers, though something is wrong with its next version."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_agent import terminal
from edge_agent.device_status import DeviceStatus
from edge_agent.doctor import service
from edge_agent.settings import Settings
from edge_agent.updates.waiting import Waiting

WAITING = Waiting(
    version=7,
    digest="d",
    missing_bytes=5,
    until_s=1_800_000_000.4,
    at_s=1_790_000_000.6,
    code="link_held",
    reason="held until 22:00",
)


def model(**fields: Any) -> dict[str, Any]:
    return {"name": "assistant", "state": "ready", "reason": "", "update_problem": "", **fields}


@pytest.mark.parametrize(
    ("reason", "problem", "said"),
    [
        ("", "", ""),
        ("its context is smaller", "", "its context is smaller"),
        ("", "registered anew", "registered anew"),
        ("its context is smaller", "registered anew", "its context is smaller; registered anew"),
        ("registered anew", "registered anew", "registered anew"),
    ],
)
def test_a_reason_does_not_hide_why_no_other_version_comes(reason: str, problem: str, said: str) -> None:
    assert terminal.reason_of(model(reason=reason, update_problem=problem)) == said


def test_doctor_names_the_problem_of_a_model_that_answers() -> None:
    document = {"models": [model(reason="its context is smaller", update_problem="registered anew"), model()]}
    assert list(service._model_troubles(document)) == [
        "model assistant is ready: its context is smaller; registered anew"
    ]
    waiting = model(update_problem="held until 22:00", link={"missing_bytes": 5, "held_until": 1})
    assert list(service._model_troubles({"models": [waiting]})) == [], "nothing is wrong"
    (absent,) = service._model_troubles({"models": [model(state="absent")]})
    assert absent == "model assistant is absent: no version is in the cache"


@pytest.mark.parametrize(
    ("waiting", "problem", "reason"),
    [
        (None, "", ""),
        (None, "timed out", "timed out"),
        (WAITING, "", "held until 22:00"),
        (WAITING, "timed out", "held until 22:00; timed out"),
        (
            WAITING,
            "no library; and its fallback: held until 22:00",
            "no library; and its fallback: held until 22:00",
        ),
    ],
)
def test_what_is_reported_of_a_version_that_waits(waiting: Waiting | None, problem: str, reason: str) -> None:
    updates = SimpleNamespace(
        waiting_of=lambda name: waiting, problems={"assistant": problem}, progress_of=lambda name: None
    )
    status = DeviceStatus(
        Settings(),
        store=cast(Any, None),
        journal=cast(Any, None),
        lifecycles={},
        updates=cast(Any, updates),
        desired=cast(Any, SimpleNamespace(problem="")),
        rebuilt="",
        tokens_per_s=lambda name: None,
    )
    document = model(uri="models:/phi@prod", version=6, digest="c", flavor=None)
    reported = status.reported({"models": [document]})["models"]["assistant"]
    assert reported["reason"] == reason
    if waiting is None:
        assert (reported["attempt"], reported["link"]) == (None, None)
        return
    assert reported["link"] == {"missing_bytes": 5, "held_until": 1_800_000_000}
    assert reported["attempt"] == {
        "version": 7,
        "digest": "d",
        "step": "held",
        "code": "link_held",
        "at": 1_790_000_000,
    }
