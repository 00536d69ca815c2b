"""The OpenAI interface for tests: as a process before a real daemon, or in a thread before a scripted one."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import queue
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_agent import settings as settings_module
from edge_agent.errors import EdgeAgentError
from edge_agent.gateway.app import make_app
from edge_agent.gateway.doors import Door, open_doors
from edge_agent.gateway.guard import Guard
from edge_agent.gateway.refusals import CannotListen
from edge_agent.gateway.server import Server
from edge_agent.settings import Settings
from edge_agent.transport.control import Call, ClientGone, ControlServer
from tests.support.processes import Child, accepts, free_port, serving, short_folder, to_toml, wait_until

QUESTION = "What is the capital of Spain?"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}]}


@dataclass(frozen=True, kw_only=True)
class Response:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Of a refusal, in OpenAI's shape."""
        document = self.json
        assert set(document) == {"error"}, document
        assert set(document["error"]) == {"message", "type", "param", "code"}
        found: dict[str, Any] = document["error"]
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of a stream, which has to end as OpenAI's do."""
        assert self.headers["content-type"].startswith("text/event-stream"), self.body
        *lines, end = self.body.decode().split("\n\n")
        assert end == ""
        assert all(line.startswith("data: ") for line in lines)
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


@dataclass(kw_only=True)
class Interface:
    """How a client reaches one."""

    port: int
    socket_path: Path
    headers: dict[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None

    def connection(self, *, unix: bool = False) -> http.client.HTTPConnection:
        if unix:
            return _UnixConnection(self.socket_path)
        if self.tls:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(
        self, method: str, path: str, body: Any = None, *, unix: bool = False, **headers: str
    ) -> Response:
        """
        Args:
            body: what JSON has, or bytes as they are.
            headers: `content_type` for Content-Type, and so on.
        """
        connection = self.connection(unix=unix)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, {**self.headers, **given})
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Response(status=response.status, headers=named, body=response.read())
        finally:
            connection.close()

    def chat(self, body: Any = None, **more: Any) -> Response:
        return self.request("POST", "/v1/chat/completions", CHAT if body is None else body, **more)

    def raw(self) -> socket.socket:
        """A TCP connection that speaks no HTTP by itself."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.settimeout(60)
        return connection


@dataclass(kw_only=True)
class Gateway(Interface):
    """`edge-agent serve` as a process."""

    child: Child


def gateway_settings(control_socket: Path, folder: Path, **http: Any) -> dict[str, Any]:
    """The settings of a gateway beside a daemon; the top-level keys of `http` may also be sections."""
    return {
        "state_dir": str(folder / "state"),
        "control_socket": str(control_socket),
        "http": {"listen": f"127.0.0.1:{free_port()}", "socket": str(folder / "http.sock"), **http},
    }


@contextlib.contextmanager
def running_gateway(control_socket: Path, folder: Path, **http: Any) -> Iterator[Gateway]:
    """One before a daemon, from when it accepts connections."""
    config = gateway_settings(control_socket, folder, **http)
    file = folder / "http.toml"
    file.write_text(to_toml(config))
    port = int(config["http"]["listen"].rpartition(":")[2])
    command = [sys.executable, "-m", "edge_agent", "--config", str(file), "serve"]
    with serving(command, folder / "http.log", ready=lambda: accepts(port), what="the gateway") as child:
        yield Gateway(port=port, socket_path=Path(config["http"]["socket"]), child=child)


# --- Scripted -------------------------------------------------------------------------------------------


class ScriptedDaemon:
    """A control socket behind which a test answers.

    Attributes:
        asked: every request, as it came.
        script: what to send for a `chat`; by itself an answer in two pieces.
        status: what `status` says.
        recent: what `recent` says.
        gone: one item for each call whose client has left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[dict[str, Any]] = []
        self.script: Callable[[Call], None] = answer
        self.status: dict[str, Any] = {"state": "ready", "models": [{"name": "assistant"}, {"name": "b"}]}
        self.recent: dict[str, Any] = {"device_id": "dev", "started_at": 1_790_000_000, "prompts": []}
        self.gone: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._server = ControlServer(
            path,
            {
                "chat": self._chat,
                "status": self._status,
                "metrics": lambda call: call.send("done", metrics={"queue_depth": 3}),
                "recent": lambda call: call.send("done", recent=self.recent),
            },
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()

    def _chat(self, call: Call) -> None:
        self.asked.append(dict(call.request))
        try:
            self.script(call)
        except ClientGone:
            self.gone.put("chat")
            raise

    def _status(self, call: Call) -> None:
        call.send("done", status=self.status)

    def close(self) -> None:
        self._server.close()
        self._thread.join(60)


def accept(call: Call) -> None:
    body = json.loads(call.request["body"])
    usage = (body.get("stream_options") or {}).get("include_usage", False)
    call.send(
        "accepted",
        id="abc",
        model="assistant",
        created=1_790_000_000,
        stream=body.get("stream", False),
        include_usage=usage,
    )


def done(call: Call, text: str = "Madrid.", **choice: Any) -> None:
    message = {"role": "assistant", "content": text}
    answer = {
        "id": "abc",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "assistant",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "cached_tokens": 1},
        "timings": {"queue_ms": 0.1, "first_token_ms": 1.0, "total_ms": 2.0, "tokens_per_s": 3.0},
    }
    call.send("done", answer=answer, version="3", flavor="onnx")


def say(call: Call, *texts: str) -> None:
    for text in texts:
        call.send("delta", text=text, delta={"content": text})


def answer(call: Call) -> None:
    accept(call)
    if json.loads(call.request["body"]).get("stream"):
        say(call, "Mad", "rid.")
    done(call)


def fail(error: EdgeAgentError) -> Callable[[Call], None]:
    def script(call: Call) -> None:
        raise error

    return script


def until_client_leaves(call: Call) -> None:
    """Accepts, and says nothing until its client has left."""
    accept(call)

    def left() -> bool:
        call.check()
        return False

    wait_until(left, 60, "the client to leave")


class ServedHere(Interface):
    """The gateway in a thread of this process, without walls."""

    def __init__(
        self, control_socket: Path, folder: Path, *, idle_s: float | None = None, **http: Any
    ) -> None:
        self.settings, doors = _opened(control_socket, folder, **http)
        address = self.settings.http.address
        assert address is not None
        super().__init__(port=address.port, socket_path=Path(self.settings.http.socket))
        app = make_app(self.settings)
        self.server = Server(
            [(door, Guard(app, hosts=door.hosts, token=door.token)) for door in doors], idle_s=idle_s
        )
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))
        self._thread.start()
        wait_until(lambda: self.server.started, 60, "the gateway")

    def close(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)
        self.wait_end()

    def wait_end(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def _opened(control_socket: Path, folder: Path, **http: Any) -> tuple[Settings, list[Door]]:
    """The settings of a gateway, and its listening sockets."""

    def load() -> Settings:
        file = folder / "http.toml"
        file.write_text(to_toml(gateway_settings(control_socket, folder, **http)))
        return settings_module.load(file)

    settings = load()
    try:
        return settings, open_doors(settings)
    except CannotListen:  # somebody else has taken the port meanwhile
        settings = load()
        return settings, open_doors(settings)


@contextlib.contextmanager
def served_here() -> Iterator[tuple[ScriptedDaemon, ServedHere]]:
    """A scripted daemon, and the gateway before it."""
    with short_folder() as folder:
        daemon = ScriptedDaemon(folder / "c.sock")
        served = ServedHere(daemon.path, folder)
        yield daemon, served
        served.close()
        daemon.close()
