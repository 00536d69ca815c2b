"""What `status` and doctor say of a model that answers, though something is wrong with its next version."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_agent import terminal
from edge_agent.cache.attempt import Attempt, Fault, Measured, Step
from edge_agent.cache.state import ModelState
from edge_agent.device_status import DeviceStatus
from edge_agent.doctor import models as models_check
from edge_agent.doctor import service
from edge_agent.doctor.finding import Level
from edge_agent.host import landlock, seccomp
from edge_agent.serving.seat import Serving
from edge_agent.settings import Settings
from edge_agent.updates.check import Outlook
from edge_agent.updates.choice import Wanted
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
    waiting = model(update_problem="held until 22:00", attempt={"step": "held"})
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
    outlook = Outlook(
        wanted=Wanted(version=7, via="alias"),
        attempt=waiting.attempt if waiting else None,
        waiting=waiting,
        progress=None,
    )
    updates = SimpleNamespace(outlook=lambda name: outlook, problems={"assistant": problem})
    status = DeviceStatus(
        Settings(),
        store=cast(Any, None),
        journal=cast(Any, None),
        lifecycles=cast(Any, {"assistant": SimpleNamespace(state=ModelState())}),
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
        "took_s": {},
        "golden": None,
    }


# --- As data -------------------------------------------------------------------------------------------


def status_with(state: ModelState, outlook: Outlook, **lifecycle: Any) -> DeviceStatus:
    """Of a device that runs one model."""
    nothing = {"serving": Serving.READY, "instead": "", "system_refused": "", "unconfined": ""}
    life = SimpleNamespace(state=state, name="assistant", status=lambda: model(), **{**nothing, **lifecycle})
    return DeviceStatus(
        Settings(),
        store=cast(Any, None),
        journal=cast(Any, SimpleNamespace(trouble=None, depth=lambda: 0)),
        lifecycles=cast(Any, {"assistant": life}),
        updates=cast(Any, SimpleNamespace(outlook=lambda name: outlook, problems={})),
        desired=cast(Any, SimpleNamespace(problem="")),
        rebuilt="",
        tokens_per_s=lambda name: None,
    )


def test_versions_and_what_they_showed_are_reported_by_their_numbers() -> None:
    state = ModelState(
        active="7-aaaaaaaaaaaa",
        previous="6-bbbbbbbbbbbb",
        quarantined={"8-cccccccccccc": Fault(code="gate_failed", reason="golden prompt 1: no")},
        measured={"7-aaaaaaaaaaaa": Measured(load_ms=2310, tokens_per_s=21.4, passed=3, of=3)},
    )
    tried = Attempt(version=8, digest="c", step=Step.GATE, at_s=1_790_000_000.6, code="gate_failed")
    outlook = Outlook(wanted=Wanted(version=8, via="alias"), attempt=tried, waiting=None, progress=None)
    status = status_with(state, outlook)
    document = status.document()
    fields = {"uri": "", "version": 7, "digest": "", "flavor": None}
    reported = status.reported({"models": [{**document["models"][0], **fields}]})["models"]["assistant"]
    assert {key: reported[key] for key in ("wanted", "attempt", "previous", "quarantined", "gate")} == {
        "wanted": {"version": 8, "via": "alias"},
        "attempt": {
            "version": 8,
            "digest": "c",
            "step": "gate",
            "code": "gate_failed",
            "at": 1_790_000_000,
            "took_s": {},
            "golden": None,
        },
        "previous": 6,
        "quarantined": [{"version": 8, "code": "gate_failed"}],
        "gate": {"load_ms": 2310, "tokens_per_s": 21.4, "golden": {"passed": 3, "of": 3}},
    }
    said = "model assistant: version 8-cccccccccccc is in quarantine: golden prompt 1: no"
    assert document["troubles"] == [{"code": "quarantined", "text": said}]
    assert document["walls"] == {"landlock": landlock.abi(), "seccomp": seccomp.is_available()}


def test_a_version_that_is_not_for_this_device_yet_makes_it_look_worse_only_where_it_has_none() -> None:
    waiting = replace(WAITING, code="not_in_rollout", until_s=None, missing_bytes=None)
    outlook = Outlook(
        wanted=Wanted(version=7, via="alias"), attempt=waiting.attempt, waiting=waiting, progress=None
    )
    for serving, state in ((Serving.READY, "ready"), (Serving.ABSENT, "degraded")):
        status = status_with(ModelState(), outlook, serving=serving)
        status.ready = True
        document = status.document()
        assert (document["state"], document["troubles"]) == (state, [])
    fields = {"uri": "", "version": 6, "digest": "", "flavor": None}
    reported = status.reported({"models": [model(**fields)]})["models"]["assistant"]
    assert (reported["link"], reported["attempt"]["step"]) == (None, "held"), "[link] has no part in it"


def test_doctor_says_what_keeps_a_model_at_its_version_and_that_nothing_is_wrong() -> None:
    pinned = model(version=6, pinned="6-aaaaaaaaaaaa", wanted={"version": 6, "via": "pin"})
    held = model(version=6, held={"version": 7, "reason": "version 7 is held until 22:00"})
    found = [
        list(models_check._check_versions(Settings(), {"models": [each]}))
        for each in (pinned, held, model(version=None))
    ]
    assert [(each.check, each.level, each.message) for (each,) in found] == [
        (
            "models.version",
            Level.OK,
            "assistant: version 6; pinned to 6-aaaaaaaaaaaa; `edge-agent models unpin assistant` lets it follow "
            "its reference again",
        ),
        ("models.version", Level.OK, "assistant: version 6; version 7 is held until 22:00"),
        ("models.version", Level.OK, "assistant: no version yet"),
    ]
