"""What a device tells Home Assistant, and when it tells it again."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_agent.device_status import StatusPublisher, home_assistant
from edge_agent.sd_notify import Notifier
from edge_agent.topics import Topics

TOPICS = Topics(prefix="edge", device_id="press-3", reply_prefixes=())


def report(version: int | None, wanted: int | None, *failed: int) -> dict[str, Any]:
    return {
        "version": version,
        "wanted": {"version": wanted, "via": "alias"},
        "quarantined": [{"version": each, "code": "gate_failed"} for each in failed],
    }


def update_of(version: int | None, wanted: int | None, *failed: int) -> dict[str, Any]:
    document = home_assistant.document(TOPICS, {"assistant": report(version, wanted, *failed)})
    found: dict[str, Any] = document["components"]["edge_agent_press-3_assistant_update"]
    return found


def asked_for(component: dict[str, Any]) -> int | None:
    payload = component.get("payload_install")
    return json.loads(payload)["models"]["assistant"]["version"] if payload else None


def test_each_id_is_in_home_assistants_alphabet_and_another_one_for_each_device() -> None:
    names = ["press-3", "press.3", "press_3", "press..3", "press.-3"]
    topics = {home_assistant.topic("homeassistant", name) for name in names}
    assert len(topics) == len(names)
    assert "homeassistant/device/edge_agent_press-3/config" in topics
    for topic in topics:
        assert (
            topic.removeprefix("homeassistant/device/")
            .removesuffix("/config")
            .replace("-", "")
            .replace("_", "")
            .isalnum()
        )


def test_the_button_asks_for_the_version_that_is_wanted() -> None:
    component = update_of(7, 8)
    assert (component["command_topic"], component["retain"]) == ("edge/v1/press-3/model/desired", True)
    assert asked_for(component) == 8


@pytest.mark.parametrize(
    ("version", "wanted", "failed", "asked"),
    [
        (7, 7, (), 7),
        (7, 8, (8,), 7),
        (7, None, (), 7),
        (None, 8, (), 8),
        (None, None, (), None),
        (None, 8, (8,), None),
    ],
)
def test_a_version_that_failed_here_is_no_update(
    version: int | None, wanted: int | None, failed: tuple[int, ...], asked: int | None
) -> None:
    component = update_of(version, wanted, *failed)
    assert asked_for(component) == asked
    assert ("command_topic" in component) == (asked is not None)


def test_each_entity_has_an_id_of_its_own_also_for_models_whose_names_differ_by_a_sign() -> None:
    document = home_assistant.document(TOPICS, {"a.b": report(1, 1), "a_b": report(1, 1)})
    ids = [component["unique_id"] for component in document["components"].values()]
    assert len(set(ids)) == len(ids) == 3 + 2 * 4
    assert document["device"]["identifiers"] == ["edge_agent_press-3"]


def test_it_is_told_again_when_another_version_is_wanted_and_not_for_less() -> None:
    reported = {"models": {"assistant": {**report(7, 7), "progress": None}}}
    status = SimpleNamespace(document=dict, reported=lambda document: reported, number=lambda document: None)
    sent: list[tuple[str, dict[str, Any]]] = []
    outlet = SimpleNamespace(
        set_retained=lambda topic, body: sent.append((topic, json.loads(body))), set_metrics=lambda body: None
    )
    publisher = StatusPublisher(
        cast(Any, status),
        topics=TOPICS,
        outlet=outlet,
        notifier=Notifier(None, None),
        metrics=dict,
        discovery_prefix="homeassistant",
    )
    topic = home_assistant.topic("homeassistant", "press-3")

    def told() -> list[dict[str, Any]]:
        publisher._discover(reported["models"])
        return [body for to, body in sent if to == topic]

    assert len(told()) == 1
    reported["models"]["assistant"]["progress"] = {"bytes": 1, "total_bytes": 2}
    assert len(told()) == 1
    reported["models"]["assistant"]["wanted"] = {"version": 8, "via": "alias"}
    assert len(told()) == 2
