"""No network: a device that has nothing but a loopback interface boots, answers, and calls nobody before READY."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.publishing import Published
from tests.acceptance.conftest import settings_for, wait_for_state
from tests.support import offline
from tests.support.mlflow_server import Server
from tests.support.mosquitto import running_broker
from tests.support.processes import Daemon, short_folder, wait_until

_ADDRESS = re.compile(r"sa_family=AF_INET6?,.*?port=htons\((\d+)\).*?\"([0-9a-f.:]+)\"")


class OfflineDaemon(Daemon):
    """A daemon in the network namespace of another process, with its calls to the network written down."""

    def __init__(self, folder: Path, config: dict[str, Any], *, beside: int) -> None:
        super().__init__(folder, config)
        self.beside = beside
        self.trace = folder / "strace.log"

    def _command(self, *arguments: str) -> list[str]:
        command = super()._command(*arguments)
        if "run" not in arguments:
            return command
        strace = shutil.which("strace")
        assert strace, "strace is not here; `./build.sh test` fetches it into .tools"
        calls = "trace=connect,sendto,sendmsg,sendmmsg"
        traced = [
            strace,
            "-D",
            "-f",
            "-qq",
            "-e",
            calls,
            "-e",
            "signal=none",
            "-o",
            str(self.trace),
            *command,
        ]
        return offline.inside(traced, of=self.beside)

    def addresses(self) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """(port, address) of every call to the network: before READY, and after it."""
        found: tuple[list[tuple[int, str]], list[tuple[int, str]]] = ([], [])
        ready = 0
        for line in self.trace.read_text(errors="replace").splitlines():
            if "sendto(" in line and '"READY=1' in line:
                ready = 1
            found[ready].extend((int(port), address) for port, address in _ADDRESS.findall(line))
        assert ready, "strace did not see READY"
        return found


@pytest.fixture
def device(mlflow_server: Server, published: Published) -> Iterator[OfflineDaemon]:
    """A device that has version 1 in its cache; its registry is out of reach, its broker is not."""
    with (
        short_folder() as folder,
        short_folder() as broker_folder,
        running_broker(broker_folder, offline=True) as broker,
    ):
        daemon = OfflineDaemon(
            folder, settings_for(broker, mlflow_server.uri, device="offline"), beside=broker.pid
        )
        try:
            pulled = daemon.cli("models", "pull", timeout_s=120)
            assert pulled.returncode == 0, pulled.stderr
            yield daemon
        finally:
            daemon.close()


def test_a_device_without_a_network_boots_and_answers_and_calls_nobody_before_ready(
    device: OfflineDaemon, mlflow_server: Server
) -> None:
    device.start()
    answer = device.cli("probe", "What is the capital of Spain?")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("The capital of Spain is Madrid.")
    wait_for_state(device, "ready")  # and the broker is connected
    wait_until(lambda: device.status()["registry"]["reachable"] is False, 60, "the registry's turn")
    device.stop()
    before, after = device.addresses()
    assert before == []
    broker, registry = device.config["mqtt"]["port"], mlflow_server.port
    assert set(after) == {(broker, "127.0.0.1"), (registry, "127.0.0.1")}
