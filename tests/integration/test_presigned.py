"""A store that is strict, behind a scripted registry: addresses that run out, If-Range, and who is told what."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from edge_agent.errors import TransportError
from edge_agent.package.reference import ModelRef
from edge_agent.sync.files import Package, PastTheEnd, RequestRefused
from edge_agent.sync.presigned import MAX_FAILURES
from edge_agent.sync.registry import Registry
from tests.support.hostile_registry import (
    Answer,
    HostileRegistry,
    as_json,
    few_requests,
    hostile_registry,
    status,
)
from tests.support.processes import free_port

TOKEN = "a-token-of-this-device"
CONTENT = bytes(range(256)) * 1_000
INFO = "/api/3.0/mlflow/server-info"
FILES = "/api/2.0/mlflow-artifacts/artifacts"
SIGNED = "/api/2.0/mlflow-artifacts/presigned"


class StrictStore:
    """Gives one object at addresses that live for one request, with ETag, Range and If-Range (RFC 9110, 13.1.5).

    Attributes:
        signed: number of addresses so far.
        late: of the next addresses, so many have run out when they are used.
    """

    def __init__(self, server: HostileRegistry) -> None:
        self.server = server
        self.content = CONTENT
        self.etag = '"v1"'
        self.signed = 0
        self.late = 0
        self._valid = set[str]()
        server.answers["/object"] = self._give

    def sign(self, request: BaseHTTPRequestHandler) -> None:
        self.signed += 1
        signature = f"signature={self.signed}"
        if self.late:
            self.late -= 1
        else:
            self._valid.add(signature)
        as_json({"url": f"{self.server.uri}/object?{signature}", "headers": {}, "file_size": 1})(request)

    def _give(self, request: BaseHTTPRequestHandler) -> None:
        signature = urlsplit(request.path).query
        if signature not in self._valid:
            return status(403, body=b"<Error><Code>AccessDenied</Code></Error>")(request)
        self._valid.remove(signature)
        headers = {"ETag": self.etag, "Content-Encoding": "gzip"}  # stored so: nothing is to be decoded
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if request.headers.get("If-Range", self.etag) != self.etag:
            start = 0
        if start >= len(self.content):
            return status(416)(request)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        return status(206 if start else 200, headers, self.content[start:])(request)


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    few_requests(monkeypatch, token=TOKEN)


@pytest.fixture
def registry() -> Iterator[HostileRegistry]:
    """One that hands the same object through itself, as MLflow does for S3: whole, without ETag."""
    with hostile_registry() as running:
        running.version("phi", source="mlflow-artifacts:/x")
        files = [
            {"path": "weights", "is_dir": False, "file_size": len(CONTENT)},
            {"path": "MLmodel", "is_dir": False, "file_size": 4},
        ]
        running.answers[FILES] = as_json({"files": files})
        running.answers[f"{FILES}/x/weights"] = status(200, body=b"through the registry")
        running.answers[f"{FILES}/x/MLmodel"] = status(200, body=b"here")
        running.answers[INFO] = as_json({"multipart_downloads_enabled": True})
        yield running


@pytest.fixture
def store(registry: HostileRegistry) -> Iterator[StrictStore]:
    with hostile_registry() as server:
        store = StrictStore(server)
        registry.answers[f"{SIGNED}/x/weights"] = store.sign
        yield store


def client_of(registry: HostileRegistry, *, timeout_s: float = 10) -> Registry:
    return Registry(registry.uri, timeout_s=timeout_s)


def package_of(client: Registry, tmp_path: Path) -> Package:
    package = client.package(client.resolve(ModelRef.parse("models:/phi@prod")), scratch=tmp_path / "scratch")
    package.listing()
    return package


@pytest.fixture
def package(registry: HostileRegistry, tmp_path: Path) -> Package:
    return package_of(client_of(registry), tmp_path)


def read(package: Package, *, offset: int = 0, etag: str = "", path: str = "weights") -> tuple[int, bytes]:
    with package.open(path, offset=offset, etag=etag) as stream:
        return stream.start, b"".join(stream.chunks)


def tries_until_handed_through(package: Package) -> int:
    for count in range(10):
        try:
            assert read(package) == (0, b"through the registry")
        except TransportError:
            continue
        return count
    raise AssertionError("never")


def test_an_object_is_read_from_the_middle_as_long_as_it_is_the_same(
    store: StrictStore, package: Package
) -> None:
    with package.open("weights") as stream:
        assert stream.etag == '"v1"'
    assert read(package, offset=1_000, etag='"v1"') == (1_000, CONTENT[1_000:])
    store.etag, store.content = '"v2"', CONTENT[::-1]
    assert read(package, offset=1_000, etag='"v1"') == (0, CONTENT[::-1])
    with pytest.raises(PastTheEnd):
        read(package, offset=len(CONTENT) + 1)


def test_each_request_has_an_address_of_its_own_and_one_that_ran_out_is_replaced(
    store: StrictStore, package: Package
) -> None:
    store.late = 1
    with pytest.raises(TransportError, match=r"artifact store http://[^/]* answered 403"):
        read(package)
    for offset in (0, 1, 2):
        assert read(package, offset=offset) == (offset, CONTENT[offset:])
    assert store.signed == 4
    store.late = MAX_FAILURES - 1  # what worked in between counts
    for _ in range(store.late):
        with pytest.raises(TransportError):
            read(package)
    assert read(package) == (0, CONTENT)


def test_the_registry_gets_the_credentials_and_the_store_gets_none(
    registry: HostileRegistry, store: StrictStore, package: Package
) -> None:
    read(package, offset=7, etag='"v1"')
    ((_, headers),) = store.server.requests
    harmless = {"host", "connection", "user-agent", "accept-encoding", "range", "if-range"}
    assert {name.lower() for name in headers} <= harmless
    assert all(TOKEN in str(headers) for _, headers in registry.requests)


def test_small_files_come_through_the_registry(
    registry: HostileRegistry, store: StrictStore, package: Package
) -> None:
    assert read(package, path="MLmodel") == (0, b"here")
    assert store.server.requests == []
    assert not [path for path, _ in registry.requests if path.startswith((INFO, SIGNED))]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answers: answers.pop(INFO),
        lambda answers: answers.update({INFO: as_json({"multipart_downloads_enabled": False})}),
        lambda answers: answers.update({INFO: as_json([])}),
        lambda answers: answers.update({INFO: status(200, body=b"<html>")}),
        lambda answers: answers.update({INFO: status(401)}),
        lambda answers: answers.update({SIGNED + "/x/weights": status(403)}),
        lambda answers: answers.update({SIGNED + "/x/weights": status(501)}),
        lambda answers: answers.update({SIGNED + "/x/weights": as_json({"url": 1})}),
        lambda answers: answers.update({SIGNED + "/x/weights": as_json({"url": "ftp://host/x"})}),
        lambda answers: answers.update({SIGNED + "/x/weights": as_json({"url": "http://[x"})}),
        lambda answers: answers.update({SIGNED + "/x/weights": as_json({"url": "http://x:port/"})}),
        lambda answers: answers.update(
            {SIGNED + "/x/weights": as_json({"url": "http://127.0.0.1/", "headers": {"X-Key": "1"}})}
        ),
    ],
)
def test_a_server_that_signs_no_usable_address_hands_the_file_through(
    registry: HostileRegistry,
    store: StrictStore,
    package: Package,
    spoil: Callable[[dict[str, Answer]], None],
) -> None:
    spoil(registry.answers)
    assert read(package, offset=5, etag='"v1"') == (0, b"through the registry")
    assert store.server.requests == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}/object", "http://no-such-host.invalid:{}/object"])
def test_a_store_out_of_reach_is_tried_a_few_times_and_given_up(
    registry: HostileRegistry, package: Package, url: str
) -> None:
    registry.answers[f"{SIGNED}/x/weights"] = as_json({"url": url.format(free_port()), "headers": {}})
    assert tries_until_handed_through(package) == MAX_FAILURES - 1
    asked = len(registry.requests)
    assert read(package) == (0, b"through the registry")
    assert len(registry.requests) == asked + 1, "no address is asked for any more"


def test_a_server_that_fails_to_sign_is_given_up_too(registry: HostileRegistry, package: Package) -> None:
    registry.answers[f"{SIGNED}/x/weights"] = status(500)
    assert tries_until_handed_through(package) == MAX_FAILURES - 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_store_that_is_overloaded_is_not_given_up(store: StrictStore, package: Package, code: int) -> None:
    store.server.answers["/object"] = status(code)
    for _ in range(2 * MAX_FAILURES):
        with pytest.raises(TransportError, match=f"artifact store .* answered {code}"):
            read(package)


def test_a_remote_registry_signs_no_way_to_an_address_of_this_device(
    registry: HostileRegistry, store: StrictStore, tmp_path: Path
) -> None:
    client = client_of(registry)
    client.session._may_go_near = False  # as for a registry that is not on this device
    package = package_of(client, tmp_path)
    assert read(package) == (0, b"through the registry")
    assert store.server.requests == []


def test_a_store_that_stalls_is_left_in_time(
    store: StrictStore, registry: HostileRegistry, tmp_path: Path
) -> None:
    def stall(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(CONTENT)))
        request.end_headers()
        request.wfile.write(CONTENT[:10])
        request.wfile.flush()
        store.server.closing.wait(30)

    store.server.answers["/object"] = stall
    package = package_of(client_of(registry, timeout_s=5), tmp_path)
    with (
        package.open("weights") as stream,
        pytest.raises(TransportError, match=r"artifact store .* broke off"),
    ):
        assert next(stream.chunks) == CONTENT[:10]
        next(stream.chunks)


def test_what_an_address_signs_is_in_no_error(registry: HostileRegistry, package: Package) -> None:
    secret = f"http://127.0.0.1:{free_port()}/object?X-Amz-Signature=secret"
    registry.answers[f"{SIGNED}/x/weights"] = as_json({"url": secret, "headers": {}})
    with pytest.raises(TransportError) as caught:
        read(package)
    assert "secret" not in json.dumps([caught.value.message, caught.value.remedy])


def test_a_file_that_neither_has_is_refused(registry: HostileRegistry, package: Package) -> None:
    registry.answers[f"{SIGNED}/x/weights"] = registry.answers[f"{FILES}/x/weights"] = status(404)
    with pytest.raises(RequestRefused, match="404"):
        read(package)
