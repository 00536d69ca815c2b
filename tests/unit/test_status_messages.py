"""The status as messages: when there is one, and its number."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_agent.device_status import PROGRESS_INTERVAL_S, STATUS_INTERVAL_S, DeviceStatus, StatusPublisher
from edge_agent.sd_notify import Notifier
from edge_agent.serving.seat import Serving
from edge_agent.settings import Settings
from edge_agent.topics import Topics


def test_a_status_message_has_the_number_after_that_of_the_one_before() -> None:
    status = DeviceStatus(
        Settings(),
        store=cast(Any, None),
        journal=cast(Any, SimpleNamespace(trouble=None, depth=lambda: 0)),
        lifecycles={},
        updates=cast(Any, None),
        desired=cast(Any, SimpleNamespace(problem="")),
        rebuilt="",
        tokens_per_s=lambda _: None,
    )
    sent: list[dict[str, Any]] = []
    outlet = SimpleNamespace(
        set_retained=lambda topic, body: (
            sent.append(json.loads(body)) if topic == "edge/v1/dev/status" else None
        ),
        set_metrics=lambda body: None,
    )
    publisher = StatusPublisher(
        status,
        topics=Topics(prefix="edge", device_id="dev", reply_prefixes=()),
        outlet=outlet,
        notifier=Notifier(None, None),
        metrics=dict,
    )
    goes_on = []
    for now_s in (1.0, 1.2, 1.4):  # nothing changes: one message
        goes_on.append(publisher.step(now_s))
        status.document()
    status.ready = True
    goes_on += [publisher.step(1.6), publisher.step(1.6 + STATUS_INTERVAL_S)]
    assert goes_on == [True, False, False, True, False], "a change, and nothing else"
    assert [(each["state"], each["seq"]) for each in sent] == [
        ("starting", 1),
        ("degraded", 2),
        ("degraded", 3),
    ]
    assert status.document()["seq"] == 3, "a command sees the last message's"


@pytest.mark.parametrize(
    ("document", "progress", "goes_on"),
    [
        ({}, None, False),
        ({"queue_depth": 1}, None, True),
        ({"models": [{"state": Serving.LOADING}]}, None, True),
        ({"models": [{"state": Serving.IDLE}]}, None, False),
        ({}, {"bytes": 1}, True),
    ],
)
def test_something_goes_on_while_a_prompt_waits_a_model_loads_or_a_fetch_progresses(
    document: dict[str, Any], progress: object, goes_on: bool
) -> None:
    whole = {"state": "ready", "queue_depth": 0, "models": [], **document}
    whole["models"] = [{"tokens_per_s": None, **model} for model in whole["models"]]
    model = {"progress": progress, "attempt": None}
    status = SimpleNamespace(
        document=lambda: dict(whole),
        number=lambda document: None,
        headline=str,
        reported=lambda _: {"models": {"a": model}},
    )
    publisher = StatusPublisher(
        cast(Any, status),
        topics=Topics(prefix="edge", device_id="dev", reply_prefixes=()),
        outlet=cast(Any, SimpleNamespace(set_retained=lambda *_: None, set_metrics=lambda _: None)),
        notifier=Notifier(None, None),
        metrics=dict,
    )
    publisher.step(1.0)
    assert publisher.step(1.2) is goes_on


def test_golden_prompts_are_reported_at_intervals_and_a_new_step_at_once() -> None:
    attempt: dict[str, Any] = {"step": "gate", "golden": None}
    model = {"progress": None, "attempt": attempt}
    status = SimpleNamespace(
        document=dict, number=lambda document: None, headline=str, reported=lambda _: {"models": {"a": model}}
    )
    sent: list[Any] = []
    outlet = SimpleNamespace(
        set_retained=lambda topic, body: (
            sent.append(json.loads(body)["models"]["a"]["attempt"]) if topic.endswith("reported") else None
        ),
        set_metrics=lambda body: None,
    )
    publisher = StatusPublisher(
        cast(Any, status),
        topics=Topics(prefix="edge", device_id="dev", reply_prefixes=()),
        outlet=outlet,
        notifier=Notifier(None, None),
        metrics=dict,
    )
    for prompt in range(1, 6):
        publisher._report(prompt * PROGRESS_INTERVAL_S / 4, {})
        attempt["golden"] = {"asking": prompt, "of": 5}
    assert [each["golden"] and each["golden"]["asking"] for each in sent] == [None, 1]
    publisher._report(2 * PROGRESS_INTERVAL_S, {})
    attempt |= {"step": "activate", "golden": None}
    publisher._report(2 * PROGRESS_INTERVAL_S, {})
    assert [each["step"] for each in sent] == ["gate", "gate", "gate", "activate"]
