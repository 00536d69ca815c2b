"""What a daemon measures, at each of its outlets: MQTT, the control socket, a file for node_exporter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.transport import control
from tests.support.client import Client, Message, chat, connected
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, free_port, short_folder, wait_until
from tests.support.sample_device import copy_cache, settings_for, wait_for_state

SPAIN = "What is the capital of Spain?"
DEVICE = "measured"
DOCS = Path(__file__).parents[2] / "docs" / "mqtt.md"
BY_NAME = {"answered", "refused", "counters", "models", "answers", "check_failures"}
"""Objects whose keys are names, of models, codes and events: each has what there is."""


@pytest.fixture(scope="module")
def listener(broker: Broker) -> Iterator[Client]:
    """Is there before the device, and so hears its first metrics."""
    with connected(broker, device=DEVICE) as client:
        for topic in ("status", "metrics"):
            client.subscribe(f"{client.root}/{topic}")
        yield client


@pytest.fixture(scope="module")
def device(agent: Daemon, broker: Broker, listener: Client) -> Iterator[Daemon]:
    """One with the sample model, and a registry that is out of reach."""
    with short_folder() as folder:
        copy_cache(agent, folder / "state")
        daemon = Daemon(folder, settings_for(broker, f"http://127.0.0.1:{free_port()}", device=DEVICE))
        try:
            daemon.start()
            wait_for_state(daemon, "ready")
            yield daemon
        finally:
            daemon.close()


def measured(device: Daemon) -> dict[str, Any]:
    *_, last = control.call(device.control_socket, "metrics", timeout_s=60)
    document: dict[str, Any] = last["metrics"]
    return document


def of_assistant(device: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = measured(device)["models"]["assistant"]
    return found


def is_same(example: Any, real: Any, at: str = "") -> None:
    """A document has exactly what the example has; under a name, each entry is like the example's first one."""
    where = at.rpartition(".")[2]
    if isinstance(example, dict):
        assert isinstance(real, dict), at
        if where in BY_NAME:
            (model, *_) = example.values()
            for name, item in real.items():
                is_same(model, item, f"{at}.{name}")
            return
        assert list(example) == list(real), at
        for key, item in example.items():
            is_same(item, real[key], f"{at}.{key}")
    elif isinstance(example, list):
        same = example == real if ".bounds." in at else len(example) == len(real)
        assert same, at
    elif example is not None and real is not None:
        numbers = (int, float)
        assert type(example) is type(real) or (isinstance(example, numbers) and isinstance(real, numbers)), at


def test_the_document_over_mqtt_is_the_one_of_the_control_socket_and_of_the_docs(
    device: Daemon, listener: Client
) -> None:
    over_mqtt = listener.wait_on(f"{listener.root}/metrics")
    assert len(over_mqtt.payload) < 100 << 10
    section = DOCS.read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    example = json.loads(re.findall(r"```json\n(.*?)```", section, re.S)[0])
    for real in (over_mqtt.json, measured(device)):
        is_same(example, real)


def test_prompts_are_counted_and_measured_however_they_end(device: Daemon, listener: Client) -> None:
    before = of_assistant(device)
    assert listener.ask(chat(SPAIN)).status == 200
    assert listener.ask(chat(SPAIN)).status == 200
    assert listener.ask(chat(SPAIN, model="another")).status == 404
    assert device.cli("probe", SPAIN, "--model", "nobody").returncode == 4
    answer = listener.ask(chat(SPAIN, max_tokens=100_000))
    assert answer.status == 413
    document = measured(device)
    now = document["models"]["assistant"]
    assert now["answers"]["ok"] == before["answers"]["ok"] + 2
    assert now["answers"]["prompt_too_long"] == 1
    assert document["refused"]["unknown_model"] == 2, "over MQTT and over the control socket"
    assert document["answered"]["assistant"] == sum(now["answers"].values())
    for key in ("first_token_s", "request_s", "queue_s", "input_tokens", "output_tokens", "per_token_s"):
        assert now[key]["count"] == before[key]["count"] + 2, key
        assert now[key]["sum"] > before[key]["sum"] or key == "queue_s"
    assert now["request_s"]["sum"] >= now["first_token_s"]["sum"]
    assert now["cached_tokens"] > before["cached_tokens"], "the second prompt is the first one"
    assert (now["version"], now["state"]) == (1, "ready")
    assert min(now["memory_bytes"], document["memory_bytes"]) > 10_000_000
    assert document["cache"]["bytes"] > 100_000
    assert document["broker"]["connected"] is True


def test_the_last_prompts_are_known_by_what_they_took_and_not_by_what_they_say(
    device: Daemon, listener: Client
) -> None:
    asked = listener.ask(chat(SPAIN))
    assert listener.ask(chat(SPAIN, max_tokens=100_000)).status == 413
    *_, last = control.call(device.control_socket, "recent", timeout_s=60)
    recent = last["recent"]
    assert (recent["device_id"], recent["started_at"]) == (DEVICE, measured(device)["started_at"])
    whole, refused = recent["prompts"][-2:]
    assert (whole.pop("model"), whole.pop("code")) == ("assistant", "ok")
    answer = asked.json
    times, usage = answer["timings"], answer["usage"]
    assert whole.pop("at") >= answer["created"]
    for key in ("prompt_tokens", "completion_tokens", "cached_tokens"):
        assert whole.pop(key) == usage[key], key
    for key in ("queue_ms", "first_token_ms", "total_ms", "tokens_per_s"):
        assert whole.pop(key) == pytest.approx(times[key], rel=0.2, abs=1), key
    assert whole == {}, "not a word, and nobody's name"
    assert (refused["code"], set(refused)) == ("prompt_too_long", {"at", "model", "code"})


def test_a_runner_that_dies_and_a_check_that_fails_are_counted_and_nothing_is_forgotten(
    device: Daemon, listener: Client
) -> None:
    before = of_assistant(device)
    (runner,) = device.runners()
    runner.kill()
    wait_until(lambda: of_assistant(device)["runner_deaths"] > before["runner_deaths"], 60, "its death")
    wait_until(lambda: of_assistant(device)["state"] == "ready", 60, "another runner")
    assert listener.ask(chat(SPAIN)).status == 200
    assert device.cli("models", "pull").returncode == 1
    now = of_assistant(device)
    assert now["runner_deaths"] == before["runner_deaths"] + 1
    assert now["answers"]["ok"] == before["answers"]["ok"] + 1
    assert now["check_failures"]["registry_unreachable"] >= 1
    assert measured(device)["registry"]["reachable"] is False


def test_status_messages_are_numbered_one_after_the_other(device: Daemon, listener: Client) -> None:
    def of_status() -> list[Message]:
        topic = f"{listener.root}/status"
        return [each for each in listener.messages if each.topic == topic and "seq" in each.json]

    def troubled() -> bool:
        codes = [trouble["code"] for trouble in of_status()[-1].json["troubles"]]
        return "desired_invalid" in codes

    wait_until(of_status, 60, "the first status")
    desired = f"{listener.root}/model/desired"
    listener.publish(desired, b"nothing that a device understands")
    wait_until(troubled, 60, "the trouble")
    listener.publish(desired, b"")
    wait_until(lambda: not troubled(), 60, "its end")
    numbers = [each.json["seq"] for each in of_status()]
    assert len(numbers) >= 3
    assert numbers == sorted(set(numbers))
    assert numbers[-1] < 30, "looks at the status, five a second, do not count"


def test_the_command_writes_them_for_node_exporter_also_with_the_daemon_down(
    device: Daemon, tmp_path: Path
) -> None:
    file = tmp_path / "edge-agent.prom"
    written = device.cli("metrics", "--textfile", str(file))
    assert (written.returncode, written.stdout, written.stderr) == (0, "", "")
    text = file.read_text()
    assert 'edge_agent_answers_total{gen_ai_request_model="assistant",code="ok",status="200"}' in text
    assert "\nedge_agent_up 1.0\n" in text
    assert json.loads(device.cli("metrics", "--json").stdout)["models"].keys() == {"assistant"}
    refused = device.cli("metrics", "--textfile", str(tmp_path / "nowhere" / "x.prom"))
    assert (refused.returncode, "cannot be written" in refused.stderr) == (1, True)
    assert device.cli("metrics", "--json", "--textfile", str(file)).returncode == 2
    device.stop()
    down = device.cli("metrics", "--textfile", str(file))
    assert (down.returncode, "no daemon answers" in down.stderr) == (3, True)
    assert "start it with" in down.stderr
    assert file.read_text().splitlines()[-1] == "edge_agent_up 0.0"
