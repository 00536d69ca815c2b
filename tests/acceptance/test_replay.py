"""A registry's writer registers an old signed package anew; a device that trusts the signer does not take it.

In short, and without a daemon: tests/integration/test_replay.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tests.support.client import connected
from tests.support.keys import make_keys
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon
from tests.support.sample_device import settings_for
from tests.support.versions import KATHMANDU, MADRID, FollowingDevice

NAME = "replayed"


@pytest.mark.long
def test_an_old_signed_package_under_a_new_number_is_refused_until_an_operator_takes_it(
    new_daemon: Callable[..., Daemon],
    broker: Broker,
    mlflow_server: Server,
    sample_model: Path,
    swapped_model: Path,
    short_dir: Path,
) -> None:
    key = make_keys(short_dir, "publisher")
    settings = settings_for(broker, mlflow_server.uri, device=NAME, inference={"threads": 1})
    settings |= {
        "models": {"assistant": {"uri": f"models:/{NAME}@prod"}},
        "trust": {"public_keys": [str(key.public)]},
    }
    daemon = new_daemon(settings)
    registry = MlflowClient(tracking_uri=mlflow_server.uri, registry_uri=mlflow_server.uri)
    with connected(broker, device=NAME) as client:
        device = FollowingDevice(daemon, client, mlflow_server, NAME)
        device.publish(sample_model, sign_key=key.private)
        daemon.start()
        device.wait_model(lambda m: m["state"] == "ready" and m["version"] == 1, "version 1")
        device.publish(swapped_model, sign_key=key.private)
        device.sync()
        device.wait_model(lambda m: m["state"] == "ready" and m["version"] == 2, "version 2")

        old = registry.get_model_version(NAME, "1")
        again = registry.create_model_version(NAME, old.source, run_id=old.run_id, tags=old.tags)
        assert again.version == "3"
        registry.set_registered_model_alias(NAME, "prod", "3")
        device.sync()
        device.wait_model(lambda m: "registered anew" in m["update_problem"], "the refusal")
        assert device.ask_whom() == (KATHMANDU, "2")
        assert "--allow-older" in device.do("pull", "assistant", code=1)
        doctor = daemon.cli("doctor", timeout_s=120)
        assert "an old package was registered anew" in doctor.stdout

        registry.set_registered_model_alias(NAME, "prod", "1")
        device.do("pull", "assistant")
        assert device.ask_whom() == (MADRID, "1"), "the way back is open"

        registry.set_registered_model_alias(NAME, "prod", "3")
        pulled: dict[str, Any] = device.do("pull", "assistant", "--allow-older")
        assert (pulled["version"], pulled["bytes_fetched"]) == (3, 0)
        assert device.ask_whom() == (MADRID, "3")
        assert daemon.cli("models", "pull", "--allow-older").returncode == 2, "it needs a name"
