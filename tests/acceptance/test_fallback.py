"""A model whose own version cannot run here is served by its fallback, and takes over when one can."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing import publish_folder
from tests.support.client import chat, connected
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.packages import publish_broken
from tests.support.processes import Daemon, wait_until
from tests.support.sample_device import settings_for, wait_for_state
from tests.support.versions import KATHMANDU, MADRID, SPAIN, FollowingDevice, bad_release

OWN, FALLBACK = "own", "own-fallback"


def replace_text(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.unlink()  # it is a hard link to the sample's
    file.write_text(text.replace(old, new))


def unknown_architecture(folder: Path) -> None:
    replace_text(folder / "artifacts" / "onnx" / "genai_config.json", '"type": "phi3"', '"type": "nonsense"')


def half_a_graph(folder: Path) -> None:
    file = folder / "artifacts" / "onnx" / "model.onnx"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: len(data) // 2])


def wrong_answers(folder: Path) -> None:
    entry = {"edge_agent.golden": [{"prompt": f"<|user|>{SPAIN}<|end|><|assistant|>", "expect": "Lisbon"}]}
    replace_text(folder / "MLmodel", "mlflow_version:", f"metadata: {json.dumps(entry)}\nmlflow_version:")


class Device(FollowingDevice):
    """Its model has a fallback that says Kathmandu."""

    def wait_for_reason(self, *parts: str) -> dict[str, Any]:
        self.sync()
        return self.wait_model(
            lambda model: all(part in model["reason"] for part in parts), f"{parts}", timeout_s=180
        )

    def in_cache(self) -> set[str]:
        """Registered name and version of all that was fetched."""
        versions = (self.daemon.state_dir / "models" / "versions" / "assistant").glob("*.json")
        records = [json.loads(file.read_text()) for file in versions]
        return {f"{record['manifest']['name']} {record['version']}" for record in records}


@pytest.fixture
def device(
    new_daemon: Callable[..., Daemon],
    broker: Broker,
    mlflow_server: Server,
    sample_model: Path,
    swapped_model: Path,
    short_dir: Path,
) -> Iterator[Device]:
    publish_folder(swapped_model, name=FALLBACK, registry_uri=mlflow_server.uri, alias="prod")
    settings = settings_for(broker, mlflow_server.uri, device="fallback")
    settings["models"] = {"assistant": {"uri": f"models:/{OWN}@prod", "fallback": f"models:/{FALLBACK}@prod"}}
    daemon = new_daemon(settings)
    with connected(broker, device="fallback") as client:
        made = Device(daemon, client, mlflow_server, OWN)
        bad_release(made, sample_model, unknown_architecture, short_dir / "first")
        daemon.start()
        yield made


def test_the_fallback_answers_until_a_version_runs(device: Device, sample_model: Path) -> None:
    wait_for_state(device.daemon, "degraded", 180)
    model = device.wait_for_reason("own-fallback version 1 runs", "Unsupported model_type", "nonsense")
    assert (model["state"], model["version"], model["uri"]) == ("ready", 1, "models:/own@prod")
    assert device.ask_whom() == (KATHMANDU, "1")
    assert device.in_cache() == {"own-fallback 1"}, "a version that cannot run here was fetched"

    assert device.publish(sample_model) == 2
    pulled = json.loads(device.daemon.cli("models", "pull", "assistant", "--json", timeout_s=120).stdout)
    assert (pulled["version"], pulled["instead"]) == (2, "")
    assert device.ask_whom() == (MADRID, "2")
    assert device.model()["reason"] == ""


@pytest.mark.long
def test_each_way_to_fail_leaves_the_fallback_answering_until_a_version_runs(
    device: Device, sample_model: Path, short_dir: Path
) -> None:
    wait_for_state(device.daemon, "degraded", 180)
    model = device.wait_for_reason("own-fallback version 1 runs", "Unsupported model_type", "nonsense")
    assert (model["state"], model["version"], model["uri"]) == ("ready", 1, "models:/own@prod")
    assert device.ask_whom() == (KATHMANDU, "1")
    assert device.in_cache() == {"own-fallback 1"}, "a version that cannot run here was fetched"

    assert bad_release(device, sample_model, half_a_graph, short_dir / "half") == 2
    model = device.wait_for_reason("own-fallback version 1 runs", "does not load")
    assert [key.split("-")[0] for key in model["quarantined"]] == ["2"]
    assert device.ask_whom() == (KATHMANDU, "1")

    assert bad_release(device, sample_model, wrong_answers, short_dir / "wrong") == 3
    model = device.wait_for_reason("own-fallback version 1 runs", "Lisbon")
    assert sorted(key.split("-")[0] for key in model["quarantined"]) == ["2", "3"]
    assert device.ask_whom() == (KATHMANDU, "1")
    doctor = json.loads(device.daemon.cli("doctor", "--json").stdout)
    found = [entry for entry in doctor["findings"] if entry["check"] == "models.fallback"]
    assert [(entry["level"], "Lisbon" in entry["message"]) for entry in found] == [("warn", True)]

    device.daemon.restart()
    assert device.ask_whom() == (KATHMANDU, "1")
    assert "Lisbon" in device.model()["reason"], "a restart forgets why"

    assert device.publish(sample_model) == 4
    pulled = device.daemon.cli("models", "pull", "assistant", "--json", timeout_s=120)
    document = json.loads(pulled.stdout)
    assert (document["version"], document["instead"]) == (4, "")
    assert device.ask_whom() == (MADRID, "4")
    model = device.model()
    assert model["reason"] == ""
    assert model["previous"].startswith("1-")

    rolled = json.loads(device.daemon.cli("models", "rollback", "assistant", "--json").stdout)
    assert rolled["reason"].startswith("fallback own-fallback version 1 runs: it was chosen on this device")
    assert device.ask_whom() == (KATHMANDU, "1")


@pytest.mark.long
def test_a_fallback_that_cannot_run_either_is_named_with_the_first_reason(
    device: Device, swapped_model: Path, mlflow_server: Server, short_dir: Path
) -> None:
    wait_for_state(device.daemon, "degraded", 180)
    device.daemon.stop()
    publish_broken(
        swapped_model,
        half_a_graph,
        short_dir / "fallback",
        registry_uri=mlflow_server.uri,
        name="no-fallback",
        alias="prod",
    )
    device.daemon.config["models"]["assistant"]["fallback"] = "models:/no-fallback@prod"
    device.daemon.config["state_dir"] = str(short_dir / "new")
    device.daemon.start()
    wait_until(lambda: "and its fallback" in device.model()["update_problem"], 180, "both reasons")
    problem = device.model()["update_problem"]
    assert "Unsupported model_type" in problem
    assert "model does not load" in problem
    assert device.client.ask(chat(SPAIN)).status == 503
