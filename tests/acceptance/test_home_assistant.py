"""A device in Home Assistant: its message under that program's own schemas, and the button."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing.register import Published
from tests.support.client import Client, connected
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, running_daemon, wait_until
from tests.support.sample_device import settings_for, wait_for_state

pytestmark = pytest.mark.look

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".tools" / "home-assistant" / "bin" / "python"
DEVICE = "press.3"
TOPIC = "homeassistant/device/edge_agent_press_3_87c8d161/config"


@pytest.fixture(scope="module")
def device(broker: Broker, mlflow_server: Server, published: Published) -> Iterator[Daemon]:
    config = settings_for(broker, mlflow_server.uri, device=DEVICE, homeassistant={"discovery": True})
    with running_daemon(config) as daemon:
        wait_for_state(daemon, "ready")
        yield daemon


@pytest.fixture(scope="module")
def client(broker: Broker, device: Daemon) -> Iterator[Client]:
    with connected(broker, device=DEVICE) as running:
        for topic in (TOPIC, f"{running.root}/status", f"{running.root}/model/reported"):
            running.subscribe(topic)
        status, reported = f"{running.root}/status", f"{running.root}/model/reported"
        running.wait(
            lambda message: message.topic == status and message.json["state"] == "ready", timeout_s=60
        )
        running.wait(  # comes after the status
            lambda message: message.topic == reported and message.json["models"]["assistant"]["version"] == 1,
            timeout_s=60,
        )
        yield running


def newest(client: Client, topic: str) -> bytes:
    """The last body that came on a topic."""
    client.wait(lambda message: message.topic == topic, timeout_s=60)
    return next(message.payload for message in reversed(client.messages) if message.topic == topic)


def test_home_assistant_takes_it_and_shows_what_the_device_says(client: Client) -> None:
    document = json.loads(newest(client, TOPIC))
    topics = {component["state_topic"] for component in document["components"].values()}
    given = {"document": document, "bodies": {topic: newest(client, topic).decode() for topic in topics}}
    done = subprocess.run(
        [str(PYTHON), "-P", str(ROOT / "tests/support/home_assistant.py")],
        input=json.dumps(given), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout)
    own = "edge_agent_press_3_87c8d161"
    assert seen["available"] == ["online", "offline"]
    entities = seen["entities"]
    assert entities[f"{own}_state"] == "ready"
    assert entities[f"{own}_assistant_version"] == "1"
    assert entities[f"{own}_assistant_update"]["installed_version"] == "1"
    assert entities[f"{own}_assistant_update"]["latest_version"] == "1"
    print(f"\nhomeassistant {seen['version']}: {len(entities)} entities")


def test_the_button_is_obeyed(client: Client) -> None:
    document = json.loads(newest(client, TOPIC))
    update = document["components"]["edge_agent_press_3_87c8d161_assistant_update"]
    assert update["retain"] is True
    client.publish(update["command_topic"], update["payload_install"].encode(), retain=True)
    reported = f"edge/v1/{DEVICE}/model/reported"

    def wanted() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(newest(client, reported))["models"]["assistant"]["wanted"]
        return found

    wait_until(lambda: wanted() == {"version": 1, "via": "desired"}, 60, "the desired version")
