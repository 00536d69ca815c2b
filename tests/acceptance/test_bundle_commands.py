"""`models export` and `models import`: a version on a stick, from one device to another that has no registry."""

import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing.register import Published
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, wait_until
from tests.support.sample_device import SAMPLE, settings_for

SPAIN, MADRID = "What is the capital of Spain?", "The capital of Spain is Madrid."


def offline(broker: Broker, device: str, models: Mapping[str, Any] | None = None) -> dict[str, Any]:
    settings = settings_for(broker, "", device=device, inference={"threads": 1})
    settings["models"] = models or settings["models"]
    return settings


def models(device: Daemon, *arguments: object, code: int = 0) -> Any:
    result = device.cli("models", *map(str, arguments), "--json", timeout_s=120)
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout) if code == 0 else result.stderr


def answer(device: Daemon, *arguments: str) -> str:
    text: str = json.loads(device.cli("probe", "--json", *arguments, SPAIN, timeout_s=120).stdout)["answer"]
    return text


@pytest.fixture
def stick(agent: Daemon, tmp_path: Path) -> Path:
    """The sample model's version, as the running agent exported it."""
    file = tmp_path / "sample-1.tar"
    document = models(agent, "export", "assistant", 1, file)
    assert document["bytes"] == file.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    return file


def test_a_version_goes_to_a_running_device_without_a_registry(
    new_daemon: Callable[..., Daemon], broker: Broker, published: Published, stick: Path
) -> None:
    device = new_daemon(offline(broker, "stick-1"))
    device.start()
    result = device.cli("models", "import", str(stick))
    assert result.returncode == 0, result.stderr
    assert "assistant version 1" in result.stdout
    assert result.stdout.strip().endswith("active")
    assert "importing" in result.stderr, "progress is shown"
    assert answer(device) == MADRID
    model = device.status()["models"][0]
    assert (model["version"], model["digest"]) == (1, published.digest)
    again = models(device, "import", stick)
    assert (again["state"], again["bytes_fetched"]) == ("active", 0)
    device.restart()
    assert answer(device) == MADRID


def test_a_version_goes_to_a_device_whose_daemon_is_down_and_out_again(
    new_daemon: Callable[..., Daemon], broker: Broker, stick: Path, tmp_path: Path
) -> None:
    device = new_daemon(offline(broker, "stick-2"))
    assert models(device, "import", stick)["state"] == "active"
    assert answer(device, "--direct") == MADRID
    copy = tmp_path / "copy.tar"
    models(device, "export", "assistant", 1, copy)
    with tarfile.open(stick) as first, tarfile.open(copy) as second:
        assert first.getnames() == second.getnames()
    device.start()
    wait_until(lambda: device.status()["models"][0]["state"] == "ready", 60, "the model")
    assert answer(device) == MADRID


def test_a_file_that_cannot_be_used_changes_nothing(
    new_daemon: Callable[..., Daemon], broker: Broker, stick: Path, tmp_path: Path
) -> None:
    device = new_daemon(offline(broker, "stick-3"))
    device.start()
    data = bytearray(stick.read_bytes())
    data[len(data) // 2] ^= 1
    spoiled = tmp_path / "spoiled.tar"
    spoiled.write_bytes(data)
    assert "sha256" in models(device, "import", spoiled, code=1)
    assert "not a version file" in models(device, "import", device.config_file, code=1)
    assert "cannot read" in models(device, "import", tmp_path / "gone.tar", code=1)
    assert "not a regular file" in models(device, "import", "/dev/null", code=1)
    assert models(device, "list") == []


@pytest.mark.long
def test_a_file_goes_to_the_model_that_follows_it(
    new_daemon: Callable[..., Daemon], broker: Broker, stick: Path
) -> None:
    other = {"uri": "models:/other@prod"}
    nobody = new_daemon(offline(broker, "stick-4", {"assistant": other}))
    assert "models:/other@prod" in models(nobody, "import", stick, code=4)
    assert "follows another model" in models(nobody, "import", stick, "--model", "assistant", code=4)
    assert "no model is called" in models(nobody, "import", stick, "--model", "missing", code=4)
    two = new_daemon(
        offline(
            broker,
            "stick-5",
            {
                "steady": {"uri": f"models:/{SAMPLE}@prod", "preload": False},
                "fixed": {"uri": f"models:/{SAMPLE}/7", "preload": False},
            },
        )
    )
    assert "--model" in models(two, "import", stick, code=4)
    assert models(two, "import", stick, "--model", "fixed")["state"] == "cached", (
        "the settings want version 7"
    )
    assert models(two, "import", stick, "--model", "steady")["state"] == "active"


def test_a_file_that_cannot_be_written_is_not_there(agent: Daemon, tmp_path: Path) -> None:
    assert "cannot write" in models(agent, "export", "assistant", 1, tmp_path / "gone" / "x.tar", code=1)
    assert "is a folder" in models(agent, "export", "assistant", 1, tmp_path, code=1)
    assert "not in the cache" in models(agent, "export", "assistant", 99, tmp_path / "x.tar", code=1)
    assert list(tmp_path.iterdir()) == []
