"""A registry that answers as a test scripts it: one loopback server, one answer for each path."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = Callable[[BaseHTTPRequestHandler], None]


class HostileRegistry:
    """Owns its threads and sockets.

    Args:
        tls: for a server that speaks https.

    Attributes:
        answers: by the beginning of a path; the longest that fits counts.
        requests: path and headers of every request, in order.
        peers: of every request over TLS, the common name in the client's certificate; empty for none.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, Mapping[str, str]]] = []
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.place = f"127.0.0.1:{self._server.server_address[1]}"
        self.uri = f"{'https' if tls else 'http'}://{self.place}"
        self.peers: list[str] = []
        if tls:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def version(self, name: str, *, source: str, version: str = "1") -> None:
        """Has one version, under every alias and number."""
        found = {"model_version": {"name": name, "version": version, "source": source, "run_id": ""}}
        self.answers["/api/2.0/mlflow/registered-models/get"] = as_json({"registered_model": {"name": name}})
        self.answers["/api/2.0/mlflow/registered-models/alias"] = as_json(found)
        self.answers["/api/2.0/mlflow/model-versions/get"] = as_json(found)
        self.answers["/api/2.0/mlflow/model-versions/get-download-uri"] = as_json({"artifact_uri": source})

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(30)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 30

            def do_GET(self) -> None:
                registry.requests.append((self.path, dict(self.headers)))
                if isinstance(self.connection, ssl.SSLSocket):
                    certificate: Any = self.connection.getpeercert() or {}
                    names = [value for part in certificate.get("subject", ()) for _, value in part]
                    registry.peers.append("".join(names))
                fitting = [path for path in registry.answers if self.path.startswith(path)]
                answer = registry.answers[max(fitting, key=len)] if fitting else status(404)
                with contextlib.suppress(ConnectionError):
                    answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        return Handler


def status(code: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def as_json(document: object) -> Answer:
    return status(200, {"Content-Type": "application/json"}, json.dumps(document).encode())


@contextlib.contextmanager
def hostile_registry(tls: ssl.SSLContext | None = None) -> Iterator[HostileRegistry]:
    registry = HostileRegistry(tls)
    try:
        yield registry
    finally:
        registry.close()


def few_requests(environment: pytest.MonkeyPatch, *, token: str = "") -> None:
    """What a sync sets for MLflow's client, and a token of the registry; all of it is put back afterwards."""
    for name in ("HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        environment.setenv(f"MLFLOW_{name}", "1")
    if token:
        environment.setenv("MLFLOW_TRACKING_TOKEN", token)
