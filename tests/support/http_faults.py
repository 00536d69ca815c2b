"""A bad proxy before a real MLflow server: it knows HTTP, and spoils the answers that carry one file.

Requests for anything else pass through unchanged. Each fault spoils the first `times` answers of the file, so
that a test can see both a registry that recovers and one that does not. With `authorization`, it is one that lets
nobody in who does not have that header.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PIECE_BYTES = 65_536
_TIMEOUT_S = 30.0
_STALL_LIMIT_S = 60.0
_TRICKLE_PAUSE_S = 0.2
_NOT_PASSED_ON = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")
)


class HttpFault(StrEnum):
    NONE = "none"
    TRUNCATE = "truncate"
    """The connection ends in good order, too early."""
    RESET = "reset"
    STALL = "stall"
    """No more bytes, and the connection stays."""
    TRICKLE = "trickle"
    """A byte now and then: each one comes in time."""
    LONGER = "longer"
    """Content-Length promises more than the file has."""
    SHORTER = "shorter"
    """Content-Length promises less, and so much comes."""
    FLIP = "flip"
    """One bit is another one."""
    IGNORE_RANGE = "ignore_range"
    """200 and the whole file, whatever was asked."""
    WRONG_RANGE = "wrong_range"
    """206 with other bytes than were asked for."""
    OTHER_ETAG = "other_etag"
    """206 with the bytes that were asked for, of what calls itself another file."""
    UNAVAILABLE = "unavailable"
    GONE = "gone"
    FORBIDDEN = "forbidden"
    SHORT_UPLOAD = "short_upload"
    """The last byte of an upload is lost on its way."""
    FLIP_UPLOAD = "flip_upload"
    """One bit of an upload is another one."""


_STATUSES: dict[HttpFault | None, int] = {
    HttpFault.UNAVAILABLE: 503,
    HttpFault.GONE: 404,
    HttpFault.FORBIDDEN: 403,
}


@dataclass
class Plan:
    """What to do to a file's answers.

    Attributes:
        file: the last part of its URL.
        after_bytes: body bytes that pass before the fault.
        times: how many answers are spoiled.
        cut_first: the first answer is cut after `after_bytes`, and the fault is for the following ones.
    """

    fault: HttpFault
    file: str
    after_bytes: int = 0
    times: int = 1_000
    cut_first: bool = False


class FaultyProxy:
    """Owns its threads and sockets.

    Attributes:
        uri: what clients use instead of the server's.
        plan: may be exchanged at any time.
        body_bytes: sent to clients for the plan's file.
        answers: number of answers for the plan's file.
        authorization: what every request must have in its Authorization header; None for no rule.
        refusal: status and body of the answer to one that has not.
        refused: number of those.
    """

    def __init__(self, host: str, port: int) -> None:
        self.plan = Plan(fault=HttpFault.NONE, file="")
        self.body_bytes = 0
        self.answers = 0
        self.ranges: list[str] = []
        self.authorization: str | None = None
        self.refusal = (401, b"You are not authenticated.")
        self.refused = 0
        self.released = threading.Event()
        self._etags = itertools.count()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(host, port))
        self._server.daemon_threads = False
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="http-faults")
        self._thread.start()

    def use(self, plan: Plan) -> None:
        self.plan, self.body_bytes, self.answers, self.ranges = plan, 0, 0, []

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_TIMEOUT_S)

    def _handler(self, host: str, port: int) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = _TIMEOUT_S

            def do_GET(self) -> None:
                proxy._pass_on(self, host, port)

            def do_HEAD(self) -> None:
                proxy._pass_on(self, host, port)

            def do_POST(self) -> None:
                proxy._pass_on(self, host, port)

            def do_PUT(self) -> None:
                proxy._pass_on(self, host, port)

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        return Handler

    def _pass_on(self, request: BaseHTTPRequestHandler, host: str, port: int) -> None:
        fault = self._fault(request)
        request.close_connection = True
        headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
        if fault is HttpFault.IGNORE_RANGE:
            headers.pop("Range", None)
        if fault is HttpFault.OTHER_ETAG:
            headers.pop("If-Range", None)
        body = self._uploaded(request, request.rfile.read(int(request.headers.get("Content-Length", 0))))
        if request.command == "PUT":
            headers["Content-Length"] = str(len(body))
        if self.authorization not in (None, request.headers.get("Authorization")):
            self._turn_away(request)
            return
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)) as upstream:
            upstream.request(request.command, request.path, body, headers)
            answer = upstream.getresponse()
            with contextlib.suppress(ConnectionError, TimeoutError):
                self._answer(request, answer, fault)

    def _uploaded(self, request: BaseHTTPRequestHandler, body: bytes) -> bytes:
        """What of an upload of the plan's file reaches the server."""
        if request.command != "PUT" or not self.plan.file or not request.path.endswith(self.plan.file):
            return body
        if self.plan.fault is HttpFault.SHORT_UPLOAD:
            return body[:-1]
        return bytes((body[0] ^ 1,)) + body[1:] if self.plan.fault is HttpFault.FLIP_UPLOAD else body

    def _turn_away(self, request: BaseHTTPRequestHandler) -> None:
        self.refused += 1
        status, body = self.refusal
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Connection", "close")
        request.end_headers()
        request.wfile.write(body)

    def _fault(self, request: BaseHTTPRequestHandler) -> HttpFault | None:
        """What to do to this answer; None for a file that the plan is not about."""
        if request.command != "GET":
            return None
        if not self.plan.file or not request.path.split("?")[0].endswith(self.plan.file):
            return None
        self.answers += 1
        self.ranges.append(request.headers.get("Range", ""))
        if self.plan.cut_first and self.answers == 1:
            return HttpFault.TRUNCATE
        return self.plan.fault if self.answers <= self.plan.times else HttpFault.NONE

    def _answer(
        self, request: BaseHTTPRequestHandler, answer: http.client.HTTPResponse, fault: HttpFault | None
    ) -> None:
        if fault in _STATUSES:
            request.send_response(_STATUSES[fault])
            request.send_header("Content-Length", "0")
            request.send_header("Connection", "close")
            request.end_headers()
            return
        length = int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
        request.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() in _NOT_PASSED_ON or (name.lower() == "etag" and fault is HttpFault.OTHER_ETAG):
                continue
            if name.lower() == "content-range" and fault is HttpFault.WRONG_RANGE:
                value = f"bytes 0-{value.split('-', 1)[1]}"
            request.send_header(name, value)
        if fault is HttpFault.OTHER_ETAG:
            request.send_header("ETag", f'"{next(self._etags)}"')
        if length is not None:
            promised = {HttpFault.LONGER: length + 100, HttpFault.SHORTER: max(0, length - 100)}
            length = promised.get(fault, length) if fault else length
            request.send_header("Content-Length", str(length))
        request.send_header("Connection", "close")
        request.end_headers()
        self._body(request, answer, fault, length)

    def _body(
        self,
        request: BaseHTTPRequestHandler,
        answer: http.client.HTTPResponse,
        fault: HttpFault | None,
        length: int | None,
    ) -> None:
        sent = 0
        limited = fault in (HttpFault.TRUNCATE, HttpFault.RESET, HttpFault.STALL, HttpFault.TRICKLE)
        limit = self.plan.after_bytes if limited else length
        while piece := answer.read(_PIECE_BYTES if limit is None else min(_PIECE_BYTES, limit - sent)):
            if fault is HttpFault.FLIP and sent == 0:
                piece = bytes((piece[0] ^ 1,)) + piece[1:]
            request.wfile.write(piece)
            sent += len(piece)
            if fault is not None:
                self.body_bytes += len(piece)
        if fault is HttpFault.RESET:
            request.wfile.flush()
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()
        if fault is HttpFault.STALL:
            self.released.wait(_STALL_LIMIT_S)
        while fault is HttpFault.TRICKLE and not self.released.wait(_TRICKLE_PAUSE_S):
            request.wfile.write(answer.read(1))


@contextlib.contextmanager
def faulty_proxy(host: str, port: int) -> Iterator[FaultyProxy]:
    """A proxy to `host`:`port` whose connections end with the block."""
    proxy = FaultyProxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()
