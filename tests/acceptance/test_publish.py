"""`publish` as a command: from a folder to a device, with a registry and without one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.support.keys import make_keys
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon
from tests.support.sample_device import SAMPLE, settings_for


def steps_in(stderr: str) -> list[str]:
    """All that was said but for the advice, without bytes: there is nothing of MLflow's."""
    said = [line for line in stderr.splitlines() if not line.startswith("edge-agent: ")]
    return list(dict.fromkeys(re.sub(r" [\d.]+ of [\d.]+ [kM]?B$", "", line) for line in said))


def test_a_folder_with_an_empty_file_goes_to_a_registry_and_is_pulled(
    new_daemon: Callable[..., Daemon],
    broker: Broker,
    mlflow_server: Server,
    sample_model: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sample_model, folder)
    (folder / "x").touch()
    settings = settings_for(broker, mlflow_server.uri, device="empty-file", inference={"threads": 1})
    device = new_daemon({**settings, "models": {"assistant": {"uri": "models:/with-an-empty-file@prod"}}})
    how = ("--name", "with-an-empty-file", "--alias", "prod", "--registry", mlflow_server.uri, "--json")
    done = device.cli("publish", str(folder), *how, timeout_s=300)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert set(made) == {"name", "version", "digest", "run_id", "alias", "build"}
    assert steps_in(done.stderr) == [
        *("checking", "copying", "trying in a runner", "hashing", "uploading"),
        *("registering", "reading back", "moving the alias"),
    ]
    pulled = device.cli("models", "pull", "--json", timeout_s=120)
    assert pulled.returncode == 0, pulled.stderr
    assert json.loads(pulled.stdout)["digest"] == made["digest"]


def test_a_folder_goes_to_a_running_device_in_a_signed_file(
    new_daemon: Callable[..., Daemon], broker: Broker, sample_model: Path, tmp_path: Path
) -> None:
    keys = make_keys(tmp_path, "publisher")
    settings = settings_for(broker, "", device="from-file", inference={"threads": 1})
    device = new_daemon({**settings, "trust": {"public_keys": [str(keys.public)]}})
    device.start()

    file = tmp_path / "signed.tar"
    how = ("--sign-key", str(keys.private), "--blobs", str(tmp_path / "blobs"), "--json")
    done = device.cli("publish", str(sample_model), "--name", SAMPLE, "--to", str(file), *how, timeout_s=300)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert steps_in(done.stderr) == [
        *("checking", "copying", "trying in a runner", "hashing", "writing blobs", "writing the file"),
    ]
    assert set(made) == {"name", "version", "digest", "file", "bytes", "blobs", "build"}
    assert made["bytes"] == file.stat().st_size
    imported = device.cli("models", "import", str(file), "--json", timeout_s=120)
    assert imported.returncode == 0, imported.stderr
    document = json.loads(imported.stdout)
    assert (document["version"], document["state"]) == (made["version"], "active")
    probe = device.cli("probe", "--json", "What is the capital of Spain?", timeout_s=120)
    assert json.loads(probe.stdout)["answer"] == "The capital of Spain is Madrid."
    model = device.status()["models"][0]
    assert (model["version"], model["digest"]) == (made["version"], made["digest"])


def test_a_file_and_a_registry_do_not_go_together(
    new_daemon: Callable[..., Daemon], sample_model: Path
) -> None:
    device = new_daemon({})
    arguments = ("publish", str(sample_model), "--name", "x", "--to", "x.tar", "--alias", "prod")
    done = device.cli(*arguments, timeout_s=120)
    assert done.returncode == 2
    assert "--to asks no registry: leave out --registry and --alias" in done.stderr
