"""The whole agent: a registry with the sample model, a broker, the daemon as a process."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_agent import settings as settings_module
from edge_agent.publishing import publish_folder
from edge_agent.publishing.register import Published
from edge_agent.settings import Settings
from tests.support.certificates import Authority
from tests.support.client import Client, connected
from tests.support.documented_broker import documented_broker
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker
from tests.support.processes import Daemon, running_daemon, short_folder, wait_until
from tests.support.sample_device import SAMPLE, settings_for, wait_for_state
from tests.support.versions import FollowingDevice


@pytest.fixture(scope="session")
def published(mlflow_server: Server, sample_model: Path) -> Published:
    """The sample model in the registry, as `models:/sample@prod`."""
    return publish_folder(sample_model, name=SAMPLE, registry_uri=mlflow_server.uri, alias="prod")


@pytest.fixture(scope="session")
def agent(broker: Broker, mlflow_server: Server, published: Published) -> Iterator[Daemon]:
    """One daemon that has pulled the sample model and answers. Tests that break it start their own."""
    with running_daemon(settings_for(broker, mlflow_server.uri)) as daemon:
        wait_for_state(daemon, "ready")
        yield daemon


@pytest.fixture(scope="module")
def documented() -> Iterator[tuple[Broker, Authority]]:
    """The broker that docs/broker.md describes, and the authority of its certificates."""
    with documented_broker() as made:
        yield made


@pytest.fixture
def client(broker: Broker, agent: Daemon) -> Iterator[Client]:
    with connected(broker) as running:
        yield running


@pytest.fixture
def old_client(broker: Broker, agent: Daemon) -> Iterator[Client]:
    """A client that speaks MQTT 3.1.1."""
    with connected(broker, version5=False) as running:
        yield running


@pytest.fixture(scope="session")
def pulled(mlflow_server: Server, published: Published, broker: Broker) -> Iterator[Settings]:
    """Settings of a device whose cache has the sample model, and that no daemon works in. Tests leave it so."""
    with short_folder() as folder:
        device = Daemon(folder, settings_for(broker, mlflow_server.uri))
        try:
            result = device.cli("models", "pull", timeout_s=120)
            assert result.returncode == 0, result.stderr
            yield settings_module.load(device.config_file)
        finally:
            device.close()


@pytest.fixture
def follow(
    new_daemon: Callable[..., Daemon],
    broker: Broker,
    mlflow_server: Server,
    sample_model: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Callable[..., FollowingDevice]]:
    """Makes a device that runs version 1, the sample model, of a registered model of its own.

    `follow(before=…, trust={…})`: what comes before the daemon's command, and more settings.
    """
    name = f"m{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"
    with contextlib.ExitStack() as stack:

        def make(*, before: Sequence[str] = (), **more: Any) -> FollowingDevice:
            publish_folder(sample_model, name=name, registry_uri=mlflow_server.uri, alias="prod")
            # Measuring how many threads are best would load each new version several times.
            more["inference"] = {"threads": 1, **more.get("inference", {})}
            settings = settings_for(broker, mlflow_server.uri, device=name, **more)
            settings["models"] = {"assistant": {"uri": f"models:/{name}@prod"}}
            daemon = new_daemon(settings, before=before)
            daemon.start()
            client = stack.enter_context(connected(broker, device=name))
            device = FollowingDevice(daemon, client, mlflow_server, name)
            device.wait_model(lambda m: m["state"] == "ready", "version 1")
            wait_until(lambda: daemon.status()["broker"]["connected"], 60, "the broker")
            return device

        yield make
