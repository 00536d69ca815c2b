"""A web server that gives blobs by their digest, well or badly, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.certificates import Pair

_PIECE_BYTES = 65_536


@dataclass(kw_only=True)
class Manners:
    """How blobs are given.

    Attributes:
        ranges: False: every answer is the whole blob.
        dies_after: bytes of its first answer after which the server is gone for good; negative for never.
        flips: the position of a byte that is another one; negative for none.
        piece_bytes, pause_s: for slow ones: so long before each piece.
        status: of every answer, without a body; 0 for what it has.
        headers: added to each answer.
        longer: bytes that follow the blob, without a word of them in the headers.
    """

    ranges: bool = True
    dies_after: int = -1
    flips: int = -1
    piece_bytes: int = _PIECE_BYTES
    pause_s: float = 0.0
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    longer: int = 0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request.

    Attributes:
        headers: with names in lower case.
    """

    path: str
    headers: Mapping[str, str]


class BlobServer:
    """Serves `folder`, whose `sha256/` has the blobs, at `url`."""

    def __init__(self, folder: Path, *, tls: Pair | None = None) -> None:
        self.folder = folder
        self.manners = Manners()
        self.asked: list[Asked] = []
        self.sent_bytes = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}/"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.certificate, tls.key)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def die(self) -> None:
        """From an answer's thread: nobody listens any more."""
        self._server.socket.close()


@contextlib.contextmanager
def blob_server(folder: Path, *, tls: Pair | None = None) -> Iterator[BlobServer]:
    (folder / "sha256").mkdir(parents=True, exist_ok=True)
    server = BlobServer(folder, tls=tls)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(10)


def _handler(server: BlobServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_GET(self) -> None:
            server.asked.append(
                Asked(path=self.path, headers={name.lower(): text for name, text in self.headers.items()})
            )
            manners = server.manners
            blob = server.folder / self.path.lstrip("/")
            if manners.status or not blob.is_file():
                self._answer(manners.status or 404, {"Content-Length": "0"})
                return
            self._give(blob.read_bytes(), manners)

        def _give(self, content: bytes, manners: Manners) -> None:
            if manners.flips >= 0:
                at = manners.flips
                content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
            asked, start = self.headers.get("Range", ""), 0
            if asked and manners.ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
            body = content[start:] + bytes(manners.longer)
            length = (
                {"Transfer-Encoding": "chunked"} if manners.longer else {"Content-Length": str(len(body))}
            )
            if start:
                length["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206 if start else 200, length)
            for position in range(0, len(body), manners.piece_bytes):
                if 0 <= manners.dies_after <= position:
                    server.die()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                piece = body[position : position + manners.piece_bytes]
                time.sleep(manners.pause_s)
                with contextlib.suppress(OSError):
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if manners.longer else piece)
                server.sent_bytes += len(piece)
            if manners.longer:
                self.wfile.write(b"0\r\n\r\n")

        def _answer(self, status: int, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, text in {**headers, **server.manners.headers}.items():
                self.send_header(name, text)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    return Handler
