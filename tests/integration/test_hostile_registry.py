"""A registry that means harm: where requests go, what they carry, and how much an answer may be."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from edge_agent.errors import EdgeAgentError, ManifestError, PolicyError, TransportError, VerificationError
from edge_agent.host.clock import CLOCK, Clock
from edge_agent.package.reference import ModelRef, ModelVersion
from edge_agent.sync import http_session
from edge_agent.sync.bring import synchronise
from edge_agent.sync.files import RequestRefused
from edge_agent.sync.protocol import RegistryJob, SyncJob
from edge_agent.sync.registry import Registry
from tests.support.clock import ScriptedClock
from tests.support.device import Device
from tests.support.hostile_registry import HostileRegistry, as_json, few_requests, hostile_registry, status
from tests.support.mlflow_server import Server

pytestmark = pytest.mark.attack

TOKEN = "a-token-of-this-device"
NAME = "phi"
FILES = "/api/2.0/mlflow-artifacts/artifacts"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    few_requests(monkeypatch, token=TOKEN)


@pytest.fixture
def registry() -> Iterator[HostileRegistry]:
    with hostile_registry() as running:
        yield running


@pytest.fixture
def other() -> Iterator[HostileRegistry]:
    with hostile_registry() as running:
        yield running


def asked(
    registry: HostileRegistry,
    tmp_path: Path,
    *,
    timeout_s: float = 20,
    gap_s: float = 0.0,
    clock: Clock = CLOCK,
) -> bytes:
    """What a sync does first: the version, the listing, and one file."""
    client = Registry(registry.uri, timeout_s=timeout_s, gap_s=gap_s, clock=clock)
    version = client.resolve(device_ref())
    package = client.package(version, scratch=tmp_path / "scratch")
    package.listing()
    with package.open("MLmodel") as stream:
        return b"".join(stream.chunks)


def device_ref() -> ModelRef:
    return ModelRef.parse(f"models:/{NAME}@prod")


def has_package(registry: HostileRegistry) -> None:
    registry.answers[FILES] = as_json({"files": [{"path": "MLmodel", "is_dir": False, "file_size": 4}]})
    registry.answers[f"{FILES}/x/MLmodel"] = status(200, body=b"here")


def has_package_at(other: HostileRegistry, registry: HostileRegistry) -> None:
    """The registry's package has its file elsewhere, by a redirect."""
    registry.version(NAME, source="mlflow-artifacts:/x")
    has_package(registry)
    registry.answers[f"{FILES}/x/MLmodel"] = status(302, {"Location": f"{other.uri}/file"})
    other.answers["/file"] = status(200, body=b"there")


def secrets(registry: HostileRegistry) -> list[str]:
    return [path for path, headers in registry.requests if TOKEN in str(headers)]


def test_the_registry_itself_gets_the_token(registry: HostileRegistry, tmp_path: Path) -> None:
    registry.version(NAME, source="mlflow-artifacts:/x")
    has_package(registry)
    assert asked(registry, tmp_path) == b"here"
    assert len(secrets(registry)) == len(registry.requests) > 3


@pytest.mark.parametrize(
    "form", ["mlflow-artifacts://{}/x", "http://{}/api/2.0/mlflow-artifacts/artifacts/x"]
)
def test_a_source_elsewhere_is_fetched_without_credentials(
    registry: HostileRegistry, other: HostileRegistry, tmp_path: Path, form: str
) -> None:
    registry.version(NAME, source=form.format(other.place))
    has_package(other)
    assert asked(registry, tmp_path) == b"here"
    assert len(other.requests) == 2
    assert secrets(other) == []


def test_a_redirect_of_a_file_is_followed_without_credentials(
    registry: HostileRegistry, other: HostileRegistry, tmp_path: Path
) -> None:
    has_package_at(other, registry)
    assert asked(registry, tmp_path) == b"there"
    assert secrets(other) == []


def test_a_redirect_of_an_answer_to_another_place_is_refused(
    registry: HostileRegistry, other: HostileRegistry, tmp_path: Path
) -> None:
    registry.answers["/"] = status(302, {"Location": f"{other.uri}/"})
    with pytest.raises(TransportError, match=r"redirects to http.*registry\.uri"):
        asked(registry, tmp_path)
    assert other.requests == []


def test_a_redirect_that_never_ends_is_given_up(registry: HostileRegistry, tmp_path: Path) -> None:
    registry.answers["/"] = status(302, {"Location": "/again"})
    with pytest.raises(TransportError, match="redirects more than"):
        asked(registry, tmp_path)


@pytest.mark.parametrize("source", ["ftp://h/x", "FTP://h/x", "sftp://h/x", "hdfs://h/x", "dbfs:/x"])
def test_a_store_without_limits_is_refused_at_once(
    registry: HostileRegistry, tmp_path: Path, source: str
) -> None:
    registry.version(NAME, source=source)
    with pytest.raises(PolicyError, match="store of the kind"):
        asked(registry, tmp_path)


def test_names_that_lead_to_each_other_are_given_up(registry: HostileRegistry, tmp_path: Path) -> None:
    registry.version(NAME, source=f"models:/{NAME}/1")
    with pytest.raises(PolicyError, match="one name after the other"):
        asked(registry, tmp_path)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/", "http://[::1]:1/", "http://localhost:1/", "http://169.254.169.254/",
            "http://[::ffff:127.0.0.1]:1/", "http://0.0.0.0:1/"]
)  # fmt: skip
def test_a_remote_registry_leads_to_no_address_of_this_device(url: str) -> None:
    session = http_session.RegistrySession("http://registry.example:5000", timeout_s=5, clock=CLOCK)
    with pytest.raises(PolicyError, match="an address of this device"):
        session.get(url, stream=True)


def test_a_name_is_held_to_the_address_that_it_means(
    other: HostileRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = other.place.split(":")[1]
    monkeypatch.setattr(
        "urllib3.util.connection.socket.getaddrinfo",
        lambda *args: [(2, 1, 6, "", ("127.0.0.1", int(port)))],
    )
    session = http_session.RegistrySession("http://registry.example:5000", timeout_s=5, clock=CLOCK)
    with pytest.raises(PolicyError, match=r"'127\.0\.0\.1', an address of this device"):
        session.get(f"http://harmless.example:{port}/", stream=True)
    assert other.requests == []


# --- Bounds --------------------------------------------------------------------------------------------


def test_requests_to_the_registry_keep_their_gap_and_those_to_a_store_do_not_wait(
    registry: HostileRegistry, other: HostileRegistry, tmp_path: Path
) -> None:
    has_package_at(other, registry)
    time = ScriptedClock()
    assert asked(registry, tmp_path, gap_s=1.0, clock=time.clock) == b"there"
    assert time.slept == [1.0] * (len(registry.requests) - 1)
    assert len(registry.requests) > 3


def test_a_sync_keeps_the_gap_of_its_job(registry: HostileRegistry, tmp_path: Path) -> None:
    registry.version(NAME, source="mlflow-artifacts:/x")
    registry.answers["/api/2.0/mlflow/model-versions/get-download-uri"] = status(500)
    time = ScriptedClock()
    job = SyncJob(
        state_dir=str(tmp_path),
        registry=RegistryJob(uri=registry.uri, gap_s=1.0),
        name="assistant",
        ref=str(device_ref()),
    )
    with pytest.raises(TransportError):
        synchronise(job, lambda event: None, clock=time.clock)
    assert time.slept == [1.0] * (len(registry.requests) - 1) != []


def test_a_listing_that_is_compressed_is_refused_unread(registry: HostileRegistry, tmp_path: Path) -> None:
    registry.version(NAME, source="mlflow-artifacts:/x")
    bomb = gzip.compress(bytes(64 << 20))
    registry.answers[FILES] = status(200, {"Content-Encoding": "gzip"}, bomb)
    with pytest.raises(TransportError, match="another encoding"):
        asked(registry, tmp_path)


def test_a_listing_without_end_is_cut_while_it_comes(registry: HostileRegistry, tmp_path: Path) -> None:
    sent = 0

    def endless(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(200)
        request.end_headers()
        while not registry.closing.is_set():
            request.wfile.write(b" " * 65_536)
            sent += 65_536

    registry.version(NAME, source="mlflow-artifacts:/x")
    registry.answers[FILES] = endless
    with pytest.raises(TransportError, match="more than"):
        asked(registry, tmp_path)
    assert sent < 64 << 20


def test_headers_without_end_are_given_up(registry: HostileRegistry, tmp_path: Path) -> None:
    def endless(request: BaseHTTPRequestHandler) -> None:
        while not registry.closing.is_set():
            request.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

    registry.answers["/"] = endless
    with pytest.raises(TransportError, match="cannot be reached"):
        asked(registry, tmp_path)


@pytest.mark.parametrize("body", [False, True])
def test_a_byte_now_and_then_does_not_keep_a_sync_waiting(
    registry: HostileRegistry, tmp_path: Path, body: bool
) -> None:
    def slow(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if body else b"X-Slow: "))
        while not registry.closing.wait(0.2):
            request.wfile.write(b"x")

    registry.answers["/"] = slow
    with pytest.raises(TransportError):
        asked(registry, tmp_path, timeout_s=1)


INFINITE = [{"path": "MLmodel", "is_dir": False, "file_size": float("inf")}]


@pytest.mark.parametrize(
    "files",
    [[{"path": 1}], [{}], ["x"], 7, [{"path": "MLmodel", "is_dir": False, "file_size": -1}], INFINITE],
)
def test_a_listing_of_another_shape_breaks_a_rule(
    registry: HostileRegistry, tmp_path: Path, files: object
) -> None:
    registry.version(NAME, source="mlflow-artifacts:/x")
    registry.answers[FILES] = as_json({"files": files})
    with pytest.raises(ManifestError):
        asked(registry, tmp_path)


def test_a_file_that_is_listed_without_a_size_is_an_empty_one_or_none(
    registry: HostileRegistry, tmp_path: Path
) -> None:
    """MLflow leaves a size of 0 out. Nothing that comes under a listing without one gets into the cache."""
    device = Device(registry.uri, tmp_path)
    device.model = NAME
    registry.version(NAME, source="mlflow-artifacts:/x")
    has_package(registry)
    registry.answers[FILES] = as_json({"files": [{"path": "MLmodel", "is_dir": False}]})
    with pytest.raises(VerificationError, match="more than the promised 0 bytes"):
        device.sync()
    assert device.has_nothing_final()


@pytest.mark.parametrize("version", ["0", "-1", "1" * 19, "１", "1.0", "Infinity"])
def test_a_number_that_no_version_has_is_refused_before_anything_is_fetched(
    registry: HostileRegistry, tmp_path: Path, version: str
) -> None:
    registry.version(NAME, source="mlflow-artifacts:/x", version=version)
    with pytest.raises(ManifestError, match="no version number"):
        asked(registry, tmp_path)
    assert not [path for path, _ in registry.requests if path.startswith(FILES)]


def test_another_store_that_refuses_is_not_the_registry(
    registry: HostileRegistry, other: HostileRegistry, tmp_path: Path
) -> None:
    registry.version(NAME, source=f"mlflow-artifacts://{other.place}/x")
    has_package(other)
    other.answers[f"{FILES}/x/MLmodel"] = status(401)
    with pytest.raises(RequestRefused, match="401"):
        asked(registry, tmp_path)


def test_mlflow_makes_its_requests_through_the_session(mlflow_server: Server) -> None:
    mlflow_server.start()
    session = http_session.RegistrySession("http://registry.example", timeout_s=5, clock=CLOCK)
    client = Registry(mlflow_server.uri, timeout_s=5)
    client.session = session
    with pytest.raises(EdgeAgentError, match="an address of this device"):
        client.located(ModelVersion(name=NAME, version=1, run_id="", source="", tags={}))
