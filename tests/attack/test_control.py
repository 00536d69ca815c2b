"""Lines with a wound at the control socket: each gets an event, and the next caller is answered."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from edge_agent.transport.control import Call, ControlServer, call
from tests.attack.wounds import encoded, torn, wounded
from tests.support.generated_messages import examples
from tests.support.processes import short_folder

pytestmark = pytest.mark.attack

PROBE: dict[str, Any] = {
    "op": "echo",
    "model": "assistant",
    "messages": [{"role": "user", "content": "Hello"}],
    "deadline_s": 5,
    "stream": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    def echo(call: Call) -> None:
        call.send("done", request=sorted(map(str, call.request)))

    with short_folder() as folder:
        path = folder / "control.sock"
        running = ControlServer(path, {"echo": echo})
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            yield path
        finally:
            running.close()
            thread.join(30)


def events(server: Path, data: bytes) -> list[dict[str, Any]]:
    """What comes back for these bytes, until the server closes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(server))
        with contextlib.suppress(OSError):  # it may have answered and closed
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                received += data
    return [json.loads(line) for line in received.splitlines()]


@examples(150)
@given(document=wounded(PROBE))
def test_a_request(server: Path, document: Any) -> None:
    (event,) = events(server, encoded(document) + b"\n")
    assert event["event"] in ("done", "error")
    assert answers(server)


@examples(150)
@given(line=torn(encoded(PROBE) + b"\n"))
def test_a_line(server: Path, line: bytes) -> None:
    assert all(event["event"] in ("done", "error") for event in events(server, line))
    assert answers(server)


def answers(server: Path) -> bool:
    return any(event["event"] == "done" for event in call(server, "echo", timeout_s=30))
