"""A rollout over three real devices: a bad version is halted and brought back, a good one is continued elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from edge_agent.publishing import publish_folder
from edge_agent.topics import FleetTopics
from tests.support.client import Client, Message, connected
from tests.support.fleet_operator import MODEL, Operator
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.packages import publish_broken
from tests.support.processes import Daemon, short_folder, wait_until
from tests.support.sample_device import settings_for, wait_for_state
from tests.support.versions import expect_lisbon

PREFIX = "rollouts"
REGISTERED = "rolled"
GOOD, BAD = 2, 3
SWAPPED = Path(__file__).parents[1] / "models" / "swapped"
WAVES = ("--waves", "30%,100%", "--soak", "2s", "--min-speed", "0")


class Devices:
    """Three devices that follow one alias, an operator, and somebody who looks on."""

    def __init__(self, daemons: list[Daemon], operator: Operator, client: Client, server: Server) -> None:
        self.daemons = {str(daemon.config["device_id"]): daemon for daemon in daemons}
        self.operator = operator
        self.client = client
        self.mlflow = MlflowClient(server.uri, server.uri)

    def versions(self) -> dict[str, int]:
        return {name: daemon.status()["models"][0]["version"] for name, daemon in self.daemons.items()}

    def wait_for_version(self, version: int) -> None:
        wait_until(lambda: set(self.versions().values()) == {version}, 120, f"version {version} everywhere")

    def another(self) -> int:
        """One more good version, under no alias."""
        return publish_folder(SWAPPED, name=REGISTERED, registry_uri=str(self.mlflow.tracking_uri)).version

    def alias(self) -> int:
        return int(self.mlflow.get_model_version_by_alias(REGISTERED, "prod").version)

    def first(self, version: int) -> str:
        """The device whose place comes first."""
        return min(
            self.daemons, key=lambda each: hashlib.sha256(f"{each}\n{MODEL}\n{version}".encode()).hexdigest()
        )

    def desired(self, device_id: str) -> list[object]:
        """What has been published for a device, the oldest first."""
        topic = f"{PREFIX}/v1/{device_id}/model/desired"
        bodies = [message.payload for message in self.client.messages if message.topic == topic]
        return [json.loads(body)["models"][MODEL] for body in bodies]


@pytest.fixture(scope="module")
def devices(broker: Broker, mlflow_server: Server, sample_model: Path) -> Iterator[Devices]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(short_folder())
        publish_folder(sample_model, name=REGISTERED, registry_uri=mlflow_server.uri, alias="prod")
        publish_folder(SWAPPED, name=REGISTERED, registry_uri=mlflow_server.uri)
        publish_broken(
            sample_model,
            expect_lisbon,
            folder / "bad",
            registry_uri=mlflow_server.uri,
            name=REGISTERED,
            alias=None,
        )
        client = stack.enter_context(connected(broker, device="onlooker"))
        client.subscribe(f"{PREFIX}/v1/+/model/desired")
        daemons = []
        for name in ("press-1", "press-2", "press-3"):
            settings = settings_for(broker, mlflow_server.uri, device=name, mqtt={"prefix": PREFIX})
            settings["models"] = {MODEL: {"uri": f"models:/{REGISTERED}@prod"}}
            place = folder / name
            place.mkdir()
            daemon = Daemon(place, settings)
            stack.callback(daemon.close)
            daemon.start(ready=False)
            daemons.append(daemon)
        for daemon in daemons:
            wait_for_state(daemon, "ready")
        operator = Operator(folder, broker, mlflow_server.uri, prefix=PREFIX)
        yield Devices(daemons, operator, client, mlflow_server)


@pytest.mark.long
def test_a_bad_version_is_halted_and_brought_back_and_a_good_one_reaches_all(devices: Devices) -> None:
    operator, first = devices.operator, devices.first(BAD)
    halted = operator.rollout(MODEL, str(BAD), *WAVES)
    assert (halted.returncode, first in halted.stderr, "gate_failed" in halted.stderr) == (1, True, True), (
        halted
    )
    status = operator.status()
    assert {key: status[key] for key in ("name", "version", "state", "wave", "waves")} == {
        "name": MODEL,
        "version": BAD,
        "state": "halted",
        "wave": 1,
        "waves": 2,
    }
    assert (status["taken"], status["failed"], status["pending"]) == (0, 1, 0)
    again = operator.rollout(MODEL, str(BAD), *WAVES)
    assert (again.returncode, "rollout resume assistant" in again.stderr) == (1, True), again
    aborted = operator.rollout("abort", MODEL)
    assert aborted.returncode == 0, aborted
    assert operator.status()["state"] == "aborted"
    wait_until(lambda: len(devices.desired(first)) >= 2, 60, "what the onlooker is told")
    assert devices.desired(first) == [{"version": BAD}, None]
    assert all(devices.desired(name) == [] for name in devices.daemons if name != first)
    assert (set(devices.versions().values()), devices.alias()) == ({1}, 1)

    done = operator.rollout(MODEL, str(GOOD), *WAVES, "--json")
    assert done.returncode == 0, done
    assert json.loads(done.stdout).items() >= {"state": "done", "taken": 3, "failed": 0}.items()
    assert (set(devices.versions().values()), devices.alias()) == ({GOOD}, GOOD)
    wait_until(
        lambda: all(devices.desired(name)[-1:] == [None] for name in devices.daemons),
        60,
        "what the onlooker is told",
    )


@pytest.mark.long
def test_a_rollout_is_paused_left_and_aborted_from_other_consoles(devices: Devices) -> None:
    operator, version = devices.operator, devices.another()
    before = devices.alias()
    with operator.running(
        MODEL, str(version), "--waves", "30%,100%", "--soak", "600s", "--min-speed", "0"
    ) as console:
        operator.wait_for(state="soaking", wave=1, taken=1)
        paused = operator.rollout("pause", MODEL)
        assert paused.returncode == 0, paused
        assert operator.status()["console"] is not None, "the first console goes on holding it"
        console.process.send_signal(signal.SIGINT)
        assert console.process.wait(30) == 130
        assert "rollout resume assistant" in console.log_text()
    assert list(devices.versions().values()).count(version) == 1
    assert operator.status()["state"] == "paused"
    aborted = operator.rollout("abort", MODEL)
    assert aborted.returncode == 0, aborted
    devices.wait_for_version(before)
    refused = operator.rollout(MODEL, str(before), *WAVES)
    assert (refused.returncode, f"names version {before} already" in refused.stderr) == (1, True), refused


@pytest.mark.long
def test_a_console_that_is_killed_is_continued_from_another(devices: Devices) -> None:
    operator, version = devices.operator, devices.another()
    topic = FleetTopics(prefix=PREFIX).rollout(MODEL)

    def soaks(message: Message) -> bool:
        if message.topic != topic:
            return False
        state = message.json
        return (state["plan"]["version"], state["wave"], state["state"]) == (version, 0, "soaking")

    devices.client.subscribe(topic)
    with operator.running(MODEL, str(version), *WAVES[:2], "--soak", "5s", "--min-speed", "0") as console:
        devices.client.wait(soaks, timeout_s=240)  # to ask a command would take much of the five seconds
        console.kill()
    done = operator.rollout("resume", MODEL)
    assert done.returncode == 0, done
    assert (set(devices.versions().values()), devices.alias()) == ({version}, version)
