"""A registry that answers and lets nobody in: told from one that is out of reach, and never asked twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.doctor import registry as registry_check
from edge_agent.doctor.finding import Level
from edge_agent.errors import RegistryRefused, TransportError
from edge_agent.settings import Settings
from edge_agent.settings.model import ModelSettings
from edge_agent.settings.registry import RegistrySettings
from edge_agent.sync.process import run_sync
from tests.support.device import Device
from tests.support.http_faults import FaultyProxy, HttpFault, Plan, faulty_proxy
from tests.support.mlflow_server import Server
from tests.support.packages import WEIGHTS
from tests.support.processes import free_port

OF_MLFLOW = json.dumps({"error_code": "PERMISSION_DENIED", "message": "Permission denied"}).encode()
OF_A_GATEWAY = b'{"message": "Unauthorized"}'
LISTING = "mlflow-artifacts/artifacts"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A server that lets nobody in; behind it there is nothing."""
    calm(monkeypatch)
    with faulty_proxy("127.0.0.1", free_port()) as proxy:
        proxy.authorization = "Bearer of another device"
        yield proxy


def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "1")  # a sync sets them; they are put back afterwards


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("body", [OF_MLFLOW, b"", b"<html>No.</html>", OF_A_GATEWAY])
def test_a_registry_that_answers_401_or_403_refuses_whatever_its_words(
    guard: FaultyProxy, tmp_path: Path, status: int, body: bytes
) -> None:
    guard.refusal = (status, body)
    device = Device(guard.uri, tmp_path)
    with pytest.raises(RegistryRefused, match=r"refuses this device.*mlflow-tracking-token") as caught:
        device.sync()
    assert guard.refused == 1, "asked once"
    assert ("Unauthorized" in caught.value.message) == (body == OF_A_GATEWAY)
    assert device.has_nothing_final()


def test_a_gateway_with_another_answer_in_words_of_its_own_does_not_refuse(
    guard: FaultyProxy, tmp_path: Path
) -> None:
    guard.refusal = (451, b'{"message": "not in this country"}')
    with pytest.raises(TransportError, match="behind something else that answered"):
        Device(guard.uri, tmp_path).sync()


def test_the_error_keeps_its_class_over_the_processes_border(guard: FaultyProxy, tmp_path: Path) -> None:
    with pytest.raises(RegistryRefused, match="refuses this device"):
        run_sync(Device(guard.uri, tmp_path).job(), timeout_s=300)


def test_doctor_says_that_it_refuses(guard: FaultyProxy, tmp_path: Path) -> None:
    settings = Settings(
        device_id="dev",
        state_dir=tmp_path / "state",
        control_socket=tmp_path / "c.sock",
        registry=RegistrySettings(uri=guard.uri),
        models={name: ModelSettings(uri=f"models:/{name}@prod") for name in ("one", "two")},
    )
    (finding,) = registry_check.check(settings)
    assert (finding.check, finding.level, finding.code) == ("registry.reach", Level.FAIL, "registry_refused")
    assert guard.refused == 2, "one may be allowed where the other is not"


@pytest.mark.parametrize("file", [WEIGHTS.split("/")[-1], LISTING])
def test_artifacts_that_are_refused_are_not_asked_for_again(
    mlflow_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    calm(monkeypatch)
    mlflow_server.start()
    device = Device(mlflow_server.uri, tmp_path)
    device.publish()
    with faulty_proxy(mlflow_server.host, mlflow_server.port) as proxy:
        proxy.use(Plan(fault=HttpFault.FORBIDDEN, file=file))
        with pytest.raises(RegistryRefused, match="refuses this device"):
            device.sync(device.job(uri=proxy.uri))
        assert proxy.answers == 1
        proxy.use(Plan(fault=HttpFault.NONE, file=file))
        assert device.sync(device.job(uri=proxy.uri)).new
