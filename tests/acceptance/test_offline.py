"""No network: a device that has nothing but a loopback interface boots, answers, and calls nobody before READY."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.publishing.register import Published
from tests.support import namespaces
from tests.support.mlflow_server import Server
from tests.support.mosquitto import Broker, running_broker
from tests.support.processes import Daemon, short_folder, wait_until
from tests.support.sample_device import settings_for, wait_for_state

_ADDRESS = re.compile(r"sa_family=AF_INET6?,.*?port=htons\((\d+)\).*?\"([0-9a-f.:]+)\"")


@pytest.fixture
def offline_broker() -> Iterator[Broker]:
    """A broker in a network namespace of its own: nobody outside of it can connect."""
    with short_folder() as folder, running_broker(folder, offline=True) as broker:
        yield broker


def traced(folder: Path) -> list[str]:
    """What writes every call to the network into `folder/strace.log`."""
    strace = shutil.which("strace")
    assert strace, "strace is not here; `./build.sh test` fetches it into .tools"
    calls = ["-e", "trace=connect,sendto,sendmsg,sendmmsg", "-e", "signal=none"]
    return [strace, "-D", "-f", "-qq", *calls, "-o", str(folder / "strace.log")]


def addresses(log: Path) -> tuple[set[tuple[int, str]], set[tuple[int, str]]]:
    """(port, address) of every call to the network: before READY, and after it."""
    found: tuple[set[tuple[int, str]], set[tuple[int, str]]] = (set(), set())
    ready = 0
    for line in log.read_text(errors="replace").splitlines():
        if "sendto(" in line and '"READY=1' in line:
            ready = 1
        found[ready].update((int(port), address) for port, address in _ADDRESS.findall(line))
    assert ready, "strace did not see READY"
    return found


def test_a_device_without_a_network_boots_and_answers_and_calls_no_registry_before_ready(
    new_daemon: Callable[..., Daemon],
    offline_broker: Broker,
    mlflow_server: Server,
    published: Published,
    short_dir: Path,
) -> None:
    device = new_daemon(
        settings_for(
            offline_broker,
            mlflow_server.uri,
            device="offline",
            inference={"threads": 1},
            registry={"poll_interval_s": 2},
        ),
        folder=short_dir,
        before=namespaces.offline(traced(short_dir), beside=offline_broker.pid),
    )
    pulled = device.cli("models", "pull", timeout_s=120)  # while it still has a network
    assert pulled.returncode == 0, pulled.stderr
    device.start()
    answer = device.cli("probe", "What is the capital of Spain?")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("The capital of Spain is Madrid.")
    wait_for_state(device, "ready")  # and the broker is connected
    wait_until(lambda: device.status()["registry"]["reachable"] is False, 60, "the registry's turn")
    device.stop()
    log = short_dir / "strace.log"
    # strace stands beside the daemon, and writes its last lines when that one has ended.
    asked = f"htons({mlflow_server.port})"
    wait_until(
        lambda: asked in log.read_text(errors="replace"), 60, "the call to the registry in strace's log"
    )
    before, after = addresses(log)
    assert before <= {(offline_broker.port, "127.0.0.1")}, "and the broker only if the load is slow"
    assert after == {(offline_broker.port, "127.0.0.1"), (mlflow_server.port, "127.0.0.1")}
