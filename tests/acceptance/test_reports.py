"""What a device reports of its versions over MQTT, and what it answers about one that it does not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.support.client import Client
from tests.support.lookers import look, without_socket
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon
from tests.support.sample_device import settings_for
from tests.support.versions import FollowingDevice, bad_release, expect_lisbon

Model = dict[str, Any]


def reported(client: Client, device: str, wanted: Callable[[Model], bool], what: str) -> Model:
    """What `model/reported` of a device says, once that is as wanted."""

    def of(payload: bytes) -> Model:
        return dict(json.loads(payload)["models"]["assistant"])

    topic = f"edge/v1/{device}/model/reported"
    message = client.wait(lambda m: m.topic == topic and wanted(of(m.payload)))
    assert message, what
    return of(message.payload)


def step(model: Model) -> tuple[int, str, str | None] | None:
    tried = model["attempt"]
    return (tried["version"], tried["step"], tried["code"]) if tried else None


def plan(device: FollowingDevice, number: str, **question: Any) -> dict[str, Any]:
    client = device.client
    topic = f"{client.replies}/{number}"
    document = {"id": number, "reply_to": topic, "model": "assistant", **question}
    client.publish(f"{client.root}/ctl/plan", json.dumps(document))
    answer = client.wait(lambda m: m.topic == topic).json
    assert answer.pop("id") == number
    return answer


def register_again(registry: MlflowClient, name: str) -> int:
    """The same package once more, under a new number and the alias; nothing is uploaded."""
    first = registry.get_model_version(name, "1")
    again = registry.create_model_version(name, first.source, first.run_id, tags=first.tags)
    registry.set_registered_model_alias(name, "prod", again.version)
    return int(again.version)


def test_a_version_for_others_is_held_and_a_plan_says_what_it_would_take(
    follow: Callable[..., FollowingDevice], mlflow_server: Server
) -> None:
    device = follow()
    took_s = device.model()["attempt"]["took_s"]
    assert list(took_s) == ["fetch", "verify", "gate", "activate"]
    assert min(took_s.values()) >= 0 and took_s["gate"] > 0
    device.client.subscribe(f"{device.client.root}/model/reported")
    registry = MlflowClient(mlflow_server.uri, mlflow_server.uri)
    second = register_again(registry, device.name)
    registry.set_model_version_tag(device.name, str(second), "edge_agent.rollout", "0")
    check_held(device, second)
    check_hold_is_seen(device, f"version {second} is rolled out to 0 % of the devices")
    asked = plan(device, "later", version=second)
    assert (asked["missing_bytes"], asked["fits"], asked["code"]) == (0, True, None), "all blobs are here"
    assert plan(device, "none", version=99)["code"] == "unknown_reference"
    assert plan(device, "wrong", version="1")["code"] == "bad_request"
    assert plan(device, "who", version=1, model="nobody")["code"] == "unknown_model"
    assert [each["version"] for each in device.do("list")] == [1], "nothing was brought"


def check_hold_is_seen(device: FollowingDevice, said: str) -> None:
    """Wherever somebody looks, with the daemon and without; and the version that runs says how it came."""
    looks = (("status",), ("models", "list"), ("models", "show", "assistant"))
    files = (device.daemon.config_file, without_socket(device.daemon))
    by_root, _ = look(*(["--config", str(file), *command] for file in files for command in looks))
    assert [seen.out.count(said) for seen in by_root] == [1] * len(by_root), by_root
    assert device.model()["held"]["code"] == "not_in_rollout"


@pytest.mark.long
def test_a_walk_from_an_alias_to_quarantine_and_around_a_rollout(
    follow: Callable[..., FollowingDevice],
    new_daemon: Callable[..., Daemon],
    mlflow_server: Server,
    broker: Broker,
    sample_model: Path,
    swapped_model: Path,
    short_dir: Path,
) -> None:
    device = follow(trust={"allow_unsigned_code": True})
    client, name = device.client, device.name
    client.subscribe("edge/v1/+/model/reported")
    client.subscribe(f"{client.root}/status")
    first = reported(client, name, lambda m: step(m) == (1, "active", None), "version 1")
    assert (first["wanted"], first["previous"], first["quarantined"]) == (
        {"version": 1, "via": "alias"},
        None,
        [],
    )
    assert first["gate"]["load_ms"] > 0 and first["gate"]["tokens_per_s"] > 0
    assert first["gate"]["golden"]["passed"] == first["gate"]["golden"]["of"]

    walk_into_quarantine(device, sample_model, short_dir)
    here = plan(device, "here", version=1)
    assert (here["missing_bytes"], here["fits"], here["code"], here["would_start_at"]) == (
        0,
        True,
        None,
        None,
    )
    assert here["free_bytes"] > 0
    assert plan(device, "bad", version=2)["code"] == "quarantined"
    registry = MlflowClient(mlflow_server.uri, mlflow_server.uri)
    third = device.publish(swapped_model)
    registry.set_model_version_tag(name, str(third), "edge_agent.rollout", "0")
    check_held(device, third)
    asked = plan(device, "later", version=third)
    assert asked["missing_bytes"] > 1_000_000
    assert (asked["fits"], asked["code"]) == (True, None), "by its number, it would be taken"
    assert [each["version"] for each in device.do("list")] == [1, 2], "nothing was fetched for a plan"

    registry.set_model_version_tag(name, str(third), "edge_agent.rollout_from", "1")
    newcomer = f"{name}-new"
    settings = settings_for(broker, mlflow_server.uri, device=newcomer, inference={"threads": 1})
    settings["models"] = {"assistant": {"uri": f"models:/{name}@prod"}}
    daemon = new_daemon(settings)
    daemon.start()
    model = reported(
        client, newcomer, lambda m: m["version"] == 1 and (step(m) or ("", ""))[1] == "held", "a stand-in"
    )
    assert step(model) == (third, "held", "not_in_rollout")
    assert model["wanted"] == {"version": third, "via": "alias"}
    assert "WARNING" not in "".join(line for line in daemon.log.splitlines() if "rolled out" in line)


def walk_into_quarantine(device: FollowingDevice, sample_model: Path, folder: Path) -> None:
    """A version that its golden prompts refuse."""
    client, name = device.client, device.name
    bad_release(device, sample_model, expect_lisbon, folder)
    device.sync()
    failed = reported(client, name, lambda m: step(m) == (2, "gate", "gate_failed"), "version 2 fails")
    assert failed["quarantined"] == [{"version": 2, "code": "gate_failed"}]
    assert (failed["version"], failed["wanted"]) == (1, {"version": 2, "via": "alias"})
    assert "Lisbon" in failed["reason"]
    steps = [
        step(json.loads(m.payload)["models"]["assistant"])
        for m in client.messages
        if m.topic == f"{client.root}/model/reported"
    ]
    # Which step the device was at when it looked depends on its speed.
    assert [each for each in steps if each and (each[0], each[2]) == (2, None)], "it was seen on its way"
    status = client.wait(
        lambda m: m.topic == f"{client.root}/status" and b'"quarantined"' in m.payload, timeout_s=60
    ).json
    assert status["state"] == "degraded"
    assert "quarantined" in [trouble["code"] for trouble in status["troubles"]]
    assert set(status["walls"]) == {"landlock", "seccomp"}
    device.daemon.restart()
    model = device.model()
    assert step(model) == (2, "gate", "gate_failed"), "a restart forgets no failure"
    assert (model["wanted"], model["gate"]) == ({"version": 2, "via": "alias"}, failed["gate"])


def check_held(device: FollowingDevice, version: int) -> None:
    """A version that is for others first: nothing is wrong."""
    warned = device.daemon.log.count("WARNING")
    told = device.do("pull", "assistant")
    assert (told["state"], told["code"], told["version"]) == ("held", "not_in_rollout", version)
    model = reported(
        device.client, device.name, lambda m: step(m) == (version, "held", "not_in_rollout"), "it is held"
    )
    assert (model["version"], model["link"], model["wanted"]["version"]) == (1, None, version)
    assert device.daemon.log.count("WARNING") == warned
