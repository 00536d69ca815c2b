"""A device's life: offline restarts, updates, runners that die, what the daemon's process is made of."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.publishing import publish_folder
from edge_agent.publishing.register import Published
from tests.support.client import chat, connected
from tests.support.mlflow_server import Server, running_mlflow_server
from tests.support.mosquitto import Broker, running_broker
from tests.support.processes import Daemon, alive, short_folder, wait_until
from tests.support.sample_device import SAMPLE, settings_for, wait_for_state

SPAIN = "What is the capital of Spain?"
MADRID = "The capital of Spain is Madrid."
HEAVY = re.compile(r"/(mlflow|numpy|pandas|onnxruntime|onnxruntime_genai|torch)[/.-]")


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A registry that these tests may stop."""
    with short_folder() as folder, running_mlflow_server(folder) as server:
        yield server


def test_the_daemons_process_has_no_model_library_in_it(agent: Daemon) -> None:
    maps = Path(f"/proc/{agent.pid}/maps").read_text()
    assert HEAVY.search(maps) is None
    runner = agent.runners()[0]
    assert HEAVY.search(Path(f"/proc/{runner.pid}/maps").read_text()), "the pattern finds it where it is"


def test_the_runner_has_no_secrets_and_no_reports_home(agent: Daemon) -> None:
    runner = agent.runners()[0]
    environment = runner.environ()
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not {name for name in environment if name.startswith(("EDGE_AGENT_", "MLFLOW_TRACKING_", "AWS_"))}


def test_a_runner_that_dies_costs_its_prompt_and_nothing_else(agent: Daemon, broker: Broker) -> None:
    with connected(broker) as client:
        long = chat(
            "Count", max_tokens=1950, stream=True, response_format={"type": "regex", "regex": "(0|1){1900}"}
        )
        (runner,) = agent.runners()
        running = client.send(long)
        client.wait(lambda m: m.topic == f"{client.replies}/stream" and m.correlation == running)
        runner.suspend()  # what comes now has no turn any more
        accepted = agent.log.count("prompt accepted")
        waiting = client.send(chat(SPAIN))
        wait_until(lambda: agent.log.count("prompt accepted") > accepted, 60, "the second prompt")
        runner.kill()
        failed = client.answer(running)
        assert (failed.status, failed.json["error"]["code"]) == (500, "model_failed")
        assert client.answer(waiting).text == MADRID
    assert [child.pid for child in agent.runners()] != [runner.pid]


def test_with_the_registry_gone_a_restart_changes_nothing(
    new_daemon: Callable[..., Daemon], broker: Broker, own_server: Server, sample_model: Path
) -> None:
    publish_folder(sample_model, name=SAMPLE, registry_uri=own_server.uri, alias="prod")
    device = new_daemon(settings_for(broker, own_server.uri, device="offline"))
    device.start()
    wait_for_state(device, "ready")
    own_server.stop()
    try:
        device.restart()
        wait_for_state(device, "ready")
        with connected(broker, device="offline") as client:
            assert client.ask(chat(SPAIN)).text == MADRID
            client.publish("edge/v1/offline/ctl/sync", b"")
        assert device.cli("probe", SPAIN).stdout.startswith(MADRID)
        wait_until(lambda: device.status()["registry"]["reachable"] is False, 60, "the registry to be missed")
        assert device.status()["state"] == "ready", "a registry out of reach is a normal day"
        assert device.cli("models", "pull", timeout_s=120).returncode == 1
    finally:
        own_server.start()


def test_moving_the_alias_changes_the_answer_and_nothing_else_has_to(
    new_daemon: Callable[..., Daemon],
    broker: Broker,
    own_server: Server,
    sample_model: Path,
    swapped_model: Path,
) -> None:
    publish_folder(sample_model, name="moving", registry_uri=own_server.uri, alias="prod")
    settings = settings_for(broker, own_server.uri, device="moving")
    settings["models"] = {"assistant": {"uri": "models:/moving@prod"}}
    device = new_daemon(settings)
    device.start()
    wait_for_state(device, "ready")
    with connected(broker, device="moving") as client:
        assert client.ask(chat(SPAIN)).text == MADRID
        publish_folder(swapped_model, name="moving", registry_uri=own_server.uri, alias="prod")
        client.publish("edge/v1/moving/ctl/sync", b"")
        wait_until(lambda: device.status()["models"][0]["version"] == 2, 60, "version 2")
        answer = client.ask(chat(SPAIN))
        assert answer.text == "The capital of Spain is Kathmandu."
        assert answer.properties["version"] == "2"
    (runner,) = device.runners()
    assert device.status()["models"][0]["previous"] is not None
    assert runner.is_running()


def test_sigterm_is_an_orderly_end_and_sigkill_leaves_the_will(
    new_daemon: Callable[..., Daemon], published: Published, mlflow_server: Server, broker: Broker
) -> None:
    device = new_daemon(settings_for(broker, mlflow_server.uri, device="mortal"))
    device.start()
    wait_for_state(device, "ready")
    with connected(broker, device="mortal") as client:
        client.subscribe("edge/v1/mortal/status")
        ready = client.wait_on("edge/v1/mortal/status").json
        (runner,) = device.runners()
        assert device.stop() == 0
        offline = client.wait(lambda m: m.topic.endswith("/status") and m.json["state"] == "offline").json
        assert offline["boot_id"] == ready["boot_id"]
        wait_until(lambda: not alive(runner.pid), 60, "the runner's end")

        client.messages.clear()
        device.start()
        wait_for_state(device, "ready")
        (runner,) = device.runners()
        device.kill()
        will = client.wait(lambda m: m.topic.endswith("/status") and m.json["state"] == "offline").json
        assert will["boot_id"] != ready["boot_id"]
        wait_until(lambda: not alive(runner.pid), 60, "the orphaned runner's end")


def test_ready_needs_neither_broker_nor_registry(new_daemon: Callable[..., Daemon]) -> None:
    device = new_daemon(
        {
            "registry": {"uri": "http://127.0.0.1:9"},
            "models": {"assistant": {"uri": "models:/sample@prod"}},
            "mqtt": {"host": "127.0.0.1", "port": 9},
        }
    )
    device.start()
    status = device.status()
    assert status["broker"]["connected"] is False
    assert status["models"][0]["state"] == "absent"
    refused = device.cli("probe", "Hello")
    assert refused.returncode == 4
    assert device.stop() == 0


def test_the_watchdog_is_fed(new_daemon: Callable[..., Daemon]) -> None:
    device = new_daemon({}, watchdog_s=2)
    device.start()
    device.notify.clear()
    wait_until(
        lambda: sum("WATCHDOG=1" in message for message in device.notify.messages) >= 2,
        60,
        "two signs of life",
    )


def test_the_agent_finds_its_broker_again(
    new_daemon: Callable[..., Daemon], published: Published, mlflow_server: Server
) -> None:
    with short_folder() as folder, running_broker(folder, persistence=True) as broker:
        device = new_daemon(settings_for(broker, mlflow_server.uri, device="again"))
        device.start()
        wait_for_state(device, "ready")
        broker.restart()
        wait_for_state(device, "ready")
        with connected(broker, device="again") as client:
            assert client.ask(chat(SPAIN)).text == MADRID
