"""What HTTP costs: the first token over the OpenAI interface, beside that over the control socket which it speaks to.

The same daemon, the same body, in turn. The interface listens on a Unix socket of its own, so that no port is opened.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_agent.bench.line_child import BenchError
from edge_agent.private_broker import child_process, tail
from edge_agent.transport import control

_START_TIMEOUT_S = 60.0
_FIRST_CONTENT = b'"content":"'
_NO_CONTENT = b'"content":""'


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """A running `edge-agent serve`."""

    pid: int
    control_socket: Path
    socket: Path

    def over_control_ms(self, text: str, max_tokens: int) -> float:
        """Until the first text of an answer, asked for as the gateway does it."""
        started = time.perf_counter()
        first = 0.0
        events = control.call(
            self.control_socket, "chat", timeout_s=None, body=_body(text, max_tokens), surface="chat"
        )
        for event in events:
            if event["event"] == "delta":
                first = first or time.perf_counter()
        return _since(started, first)

    def over_http_ms(self, text: str, max_tokens: int) -> float:
        """Until the first text of an answer, with the connection that it takes."""
        started = time.perf_counter()
        first = 0.0
        with contextlib.closing(http.client.HTTPConnection("localhost")) as client:
            client.sock = socket.socket(socket.AF_UNIX)
            client.sock.connect(str(self.socket))
            client.request("POST", "/v1/chat/completions", _body(text, max_tokens))
            response = client.getresponse()
            for line in response:
                if _FIRST_CONTENT in line and _NO_CONTENT not in line:
                    first = first or time.perf_counter()
        return _since(started, first)


def installed() -> bool:
    """Whether the libraries of the extra `http` are here."""
    return all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn"))


@contextlib.contextmanager
def gateway(config: Path, folder: Path, environment: Mapping[str, str]) -> Iterator[Gateway]:
    """Runs one for the block.

    Args:
        config: the settings of the daemon, with the places in `folder` of both sockets.

    Raises:
        BenchError: it does not start.
    """
    log, place = folder / "gateway.log", folder / "http.sock"
    command = [sys.executable, "-m", "edge_agent", "--config", str(config), "serve"]
    with child_process(command, log, environment=environment) as process:
        limit_s = time.monotonic() + _START_TIMEOUT_S
        while not _accepts(place):
            if process.poll() is not None or time.monotonic() > limit_s:
                raise BenchError(f"the OpenAI interface did not start: {tail(log)}")
            time.sleep(0.02)
        yield Gateway(pid=process.pid, control_socket=folder / "control.sock", socket=place)


def _accepts(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(place)) == 0


def _body(text: str, max_tokens: int) -> str:
    messages = [{"role": "user", "content": text}]
    return json.dumps({"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True})


def _since(started: float, first: float) -> float:
    if not first:
        raise BenchError("an answer had no text")
    return (first - started) * 1000
