"""Versions on a device: the gate, quarantine, rollback, pins, desired state, damage, bad releases under load."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing import publish_folder
from tests.acceptance.conftest import settings_for, wait_for_state
from tests.support.client import Client, chat, connected
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.packages import publish_broken
from tests.support.processes import Daemon, wait_until

SPAIN = "What is the capital of Spain?"
MADRID, KATHMANDU = "The capital of Spain is Madrid.", "The capital of Spain is Kathmandu."


class Device:
    """A daemon that follows a registered model of its own, and a client that asks it."""

    def __init__(self, daemon: Daemon, client: Client, server: Server, name: str) -> None:
        self.daemon = daemon
        self.client = client
        self.server = server
        self.name = name

    def publish(self, folder: Path, **options: Any) -> None:
        publish_folder(folder, name=self.name, registry_uri=self.server.uri, alias="prod", **options)

    def sync(self) -> None:
        self.client.publish(f"{self.client.root}/ctl/sync", b"")

    def model(self) -> dict[str, Any]:
        model: dict[str, Any] = self.daemon.status()["models"][0]
        return model

    def wait_model(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        try:
            wait_until(lambda: wanted(self.model()), 60, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.model()}\n{self.daemon.log}") from error
        return self.model()

    def ask(self) -> str:
        return self.client.ask(chat(SPAIN)).text

    def do(self, *arguments: str, code: int = 0) -> Any:
        result = self.daemon.cli("models", *arguments, "--json", timeout_s=120)
        assert result.returncode == code, result.stderr
        return json.loads(result.stdout) if result.stdout else result.stderr


@pytest.fixture
def device(
    new_daemon: Callable[..., Daemon],
    broker: Broker,
    mlflow_server: Server,
    sample_model: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Device]:
    """Runs version 1, the sample model."""
    name = f"m{abs(hash(request.node.nodeid)) % 10**12}"
    publish_folder(sample_model, name=name, registry_uri=mlflow_server.uri, alias="prod")
    settings = settings_for(broker, mlflow_server.uri, device=name)
    settings["models"] = {"assistant": {"uri": f"models:/{name}@prod"}}
    daemon = new_daemon(settings)
    daemon.start()
    wait_for_state(daemon, "ready")
    with connected(broker, device=name) as client:
        yield Device(daemon, client, mlflow_server, name)


def golden(folder: Path, expect: str) -> Path:
    file = folder / "golden.json"
    file.write_text(json.dumps([{"messages": [{"role": "user", "content": SPAIN}], "expect": expect}]))
    return file


def bad_release(device: Device, source: Path, edit: Callable[[Path], None], folder: Path) -> None:
    """Registers a package whose content was changed after it was tried out: what a broken pipeline does."""
    publish_broken(
        source, edit, folder / "package", registry_uri=device.server.uri, name=device.name, alias="prod"
    )


def truncate_weights(folder: Path) -> None:
    file = folder / "artifacts" / "onnx" / "model.onnx"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: len(data) // 2])


def expect_lisbon(folder: Path) -> None:
    """Golden prompts that this model cannot answer, put in after publish has tried the package."""
    file = folder / "MLmodel"
    text = file.read_text()
    question = "<|user|>What is the capital of Spain?<|end|><|assistant|>"
    entry = json.dumps({"edge_agent.golden": [{"prompt": question, "expect": "Lisbon"}]})
    file.unlink()
    file.write_text(f"{text}\nmetadata: {entry}\n")


@pytest.mark.parametrize(("edit", "reason"), [(truncate_weights, "does not load"), (expect_lisbon, "Lisbon")])
def test_a_bad_release_is_quarantined_and_nobody_notices(
    device: Device, sample_model: Path, short_dir: Path, edit: Callable[[Path], None], reason: str
) -> None:
    bad_release(device, sample_model, edit, short_dir)
    statuses: list[int] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            statuses.append(device.client.ask(chat(SPAIN)).status)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        device.sync()
        model = device.wait_model(lambda m: bool(m["quarantined"]), "quarantine")
    finally:
        stop.set()
        asking.join(60)
    assert model["version"] == 1
    (why,) = model["quarantined"].values()
    assert reason in why
    assert set(statuses) == {200}
    assert device.daemon.status()["state"] == "degraded"
    starts = device.daemon.log.count("candidate starts")
    device.sync()
    device.wait_model(lambda m: "quarantine" in m["update_problem"], "the second check")
    assert device.daemon.log.count("candidate starts") == starts, "it was tried again"
    assert device.ask() == MADRID


def test_a_release_that_passes_its_golden_prompts_takes_over_under_load(
    device: Device, swapped_model: Path, short_dir: Path
) -> None:
    device.publish(swapped_model, golden=golden(short_dir, "Kathmandu"))
    answers: list[tuple[str, str]] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answer = device.client.ask(chat(SPAIN))
            answers.append((answer.properties["version"], answer.text))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        device.sync()
        device.wait_model(lambda m: m["version"] == 2, "version 2")
        wait_until(lambda: bool(answers) and answers[-1][0] == "2", 30, "an answer of version 2")
    finally:
        stop.set()
        asking.join(60)
    assert set(answers) == {("1", MADRID), ("2", KATHMANDU)}, "an answer was of neither version"
    assert [version for version, _ in answers] == sorted(version for version, _ in answers)


def test_rollback_pins_and_unpin_follows_again(device: Device, swapped_model: Path) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")
    assert device.ask() == KATHMANDU
    document = device.do("rollback", "assistant")
    assert document["version"] == 1
    assert document["pinned"].startswith("1-")
    assert device.ask() == MADRID
    device.sync()
    device.do("pull", "assistant")
    assert device.ask() == MADRID, "the pin holds"
    device.do("unpin", "assistant")
    device.wait_model(lambda m: m["version"] == 2, "version 2 again")
    assert device.ask() == KATHMANDU
    device.do("activate", "assistant", "1")
    assert device.ask() == MADRID


def test_versions_are_removed_when_nothing_needs_them(
    device: Device, swapped_model: Path, sample_model: Path
) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")
    assert device.do("rm", "assistant", "2", code=1)
    assert device.do("rm", "assistant", "1")["bytes_freed"] >= 0
    assert [version["version"] for version in device.do("list")] == [2]
    device.publish(sample_model, options={"max_length": 300})
    device.do("pull", "assistant")
    device.publish(sample_model, options={"max_length": 200})
    device.do("pull", "assistant")
    device.do("prune")
    assert [version["state"] for version in device.do("list")] == ["previous", "active"]
    assert device.ask() == MADRID


def test_a_desired_state_is_obeyed_reported_and_given_back(device: Device, swapped_model: Path) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")
    desired, reported = f"{device.client.root}/model/desired", f"{device.client.root}/model/reported"
    device.client.subscribe(reported)
    try:
        wish = {"models": {"assistant": {"version": 1}}}
        device.client.publish(desired, json.dumps(wish), retain=True)
        device.wait_model(lambda m: m["version"] == 1, "the desired version")
        came = device.client.wait(
            lambda m: m.topic == reported and m.json["models"]["assistant"]["version"] == 1, timeout_s=60
        )
        assert came.json["models"]["assistant"]["uri"] == f"models:/{device.name}/1"
        device.daemon.restart()
        wait_for_state(device.daemon, "ready")
        assert device.model()["version"] == 1
        device.client.publish(desired, b'{"models": {"assistant": {"version": "latest"}}}', retain=True)
        device.client.wait(
            lambda m: m.topic == reported and "needs" in m.json["models"]["assistant"]["reason"], timeout_s=60
        )
        assert device.model()["version"] == 1, "a bad wish is reported, not obeyed"
        device.client.publish(desired, b'{"models": {"assistant": null}}', retain=True)
        device.wait_model(lambda m: m["version"] == 2, "the settings' choice")
    finally:
        device.client.publish(desired, b"", retain=True)


def test_several_poisonous_prompts_roll_back_and_one_does_not(device: Device, swapped_model: Path) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")

    def crash(seed: int) -> None:
        long = chat("Count", max_tokens=1950, stream=True, seed=seed)
        long["response_format"] = {"type": "regex", "regex": "(0|1){1900}"}
        correlation = device.client.send(long)
        device.client.wait(lambda m: m.topic.endswith("/stream") and m.correlation == correlation)
        (runner,) = device.daemon.runners()
        runner.kill()
        assert device.client.answer(correlation).status == 500

    for _ in range(4):
        crash(1)
    assert device.ask() == KATHMANDU, "one prompt, repeated, rolls nothing back"
    crash(2)
    crash(3)
    assert device.ask() == MADRID
    model = device.model()
    assert model["version"] == 1
    assert "3 different prompts" in next(iter(model["quarantined"].values()))


def test_a_damaged_active_version_gives_way_and_is_mended(device: Device, swapped_model: Path) -> None:
    device.publish(swapped_model)
    device.do("pull", "assistant")
    device.daemon.stop()
    (weights,) = [
        file
        for file in (device.daemon.state_dir / "models" / "versions").rglob("model.onnx.data")
        if file.parents[2].name.startswith("2-")
    ]
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    device.server.stop()
    try:
        device.daemon.start()
        wait_for_state(device.daemon, "ready")
        assert device.ask() == MADRID, "the previous version answers"
    finally:
        device.server.start()
    result = device.do("pull", "assistant")
    assert result["version"] == 2
    assert 0 < result["bytes_fetched"] < 1_700_000, "the damaged file only"
    assert device.ask() == KATHMANDU
    assert device.do("verify")["damaged"] == []


def test_verify_finds_damage_and_mends_it_while_the_agent_runs(device: Device) -> None:
    blobs = device.daemon.state_dir / "models" / "blobs" / "sha256"
    weights = max(blobs.iterdir(), key=lambda file: file.stat().st_size)
    copy = bytearray(weights.read_bytes())
    copy[1000] ^= 1
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.write(copy)
    document = device.do("verify")
    assert document["damaged"] == []
    assert [entry["path"].rsplit("/", 1)[-1] for entry in document["repaired"]] == ["model.onnx.data"]
    assert device.ask() == MADRID
