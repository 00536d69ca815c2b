"""A bad network on loopback: a TCP proxy that cuts connections, refuses new ones, and slows them down.

Owns its sockets in one thread; the methods may come from any other one, and return when the thread has done
what they say. It does not know what flows through it.

    commands → accept → read from each end → write to the other, as much as the rate allows
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

_TURN_S = 1.0
_SLOW_TURN_S = 0.01
_PIECE_BYTES = 16_384
_MAX_BUFFERED_BYTES = 65_536
_CONNECT_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 10.0


@dataclass(eq=False)
class _Direction:
    """From one socket to another, with what was read and not yet written."""

    source: socket.socket
    sink: socket.socket
    held: bytearray = field(default_factory=bytearray)
    ended: bool = False
    """The source will send no more."""
    allowance_bytes: float = 0.0


class Proxy:
    """Listens on a port of its own and connects each client to `host`:`port`.

    Attributes:
        port: where clients connect; it stays the same, also while new connections are refused.
        slowed_bytes: how many bytes have passed at a limited rate.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._links: list[tuple[_Direction, _Direction]] = []
        self._rate_bytes_per_s: float | None = None
        self._moved_s = time.monotonic()
        self._closing = False
        self.slowed_bytes = 0
        # Never listens: it keeps the port for this proxy while the listener is gone.
        self._keeper = self._bound_socket(0)
        self.host = "127.0.0.1"
        self.port: int = self._keeper.getsockname()[1]
        self._listener: socket.socket | None = self._listening_socket()
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    # --- From any thread -------------------------------------------------------------------------------

    def connections(self) -> int:
        """How many clients are connected through it now."""
        return self._ask(lambda: len(self._links))

    def cut(self, *, refuse: bool = False) -> int:
        """Resets every connection on both sides, with all that was under way; gives their number.

        Args:
            refuse: new ones are refused from the same moment on.
        """
        return self._ask(lambda: self._cut(refuse))

    def refuse(self) -> None:
        """New connections are refused; those that are there stay."""
        self._ask(self._refuse)

    def slow(self, bytes_per_s: float) -> None:
        """At most this many bytes in a second, for each direction of each connection."""
        self._ask(lambda: self._limit(bytes_per_s))

    def restore(self) -> None:
        """Full speed, and new connections are taken."""
        self._ask(self._restore)

    def close(self) -> None:
        if self._thread.is_alive():
            self._ask(self._close)
        self._thread.join(_ANSWER_TIMEOUT_S)

    def _ask(self, command: Callable[[], T]) -> T:
        """Has the proxy's thread do something; gives what came of it."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(command())
            except Exception as error:  # noqa: BLE001 - it belongs to who asked
                result.set_exception(error)

        self._commands.put(run)
        self._wake_write.send(b"\0")
        return result.result(_ANSWER_TIMEOUT_S)

    # --- The proxy's thread: commands ------------------------------------------------------------------

    def _cut(self, refuse: bool) -> int:
        if refuse:
            self._refuse()
        count = len(self._links)
        for link in self._links:
            _reset(link)
        self._links.clear()
        return count

    def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()  # what waits in its backlog is reset
            self._listener = None

    def _limit(self, bytes_per_s: float | None) -> None:
        self._rate_bytes_per_s = bytes_per_s
        for direction in self._directions():
            direction.allowance_bytes = 0.0

    def _restore(self) -> None:
        self._limit(None)
        if self._listener is None:
            self._listener = self._listening_socket()

    def _close(self) -> None:
        self._closing = True
        self._cut(refuse=True)

    # --- The proxy's thread: one turn ------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            self._turn()
        for end in (self._keeper, self._wake_read, self._wake_write):
            end.close()

    def _turn(self) -> None:
        directions = list(self._directions())
        reading = [d.source for d in directions if not d.ended and len(d.held) < _MAX_BUFFERED_BYTES]
        slow = self._rate_bytes_per_s is not None
        held = [d for d in directions if d.held]
        writing = [] if slow else [d.sink for d in held]
        listening = [self._listener] if self._listener is not None else []
        readable, _, _ = select.select(
            [self._wake_read, *listening, *reading],
            writing,
            [],
            _SLOW_TURN_S if slow and held else _TURN_S,
        )
        if self._listener is not None and self._listener in readable:
            self._accept(self._listener)
        for link in list(self._links):
            try:
                self._pump(link, readable)
            except OSError:
                self._drop(link)
        self._moved_s = time.monotonic()
        if self._wake_read in readable:  # last: a command may close any of the sockets above
            self._wake_read.recv(1)
            self._commands.get_nowait()()

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(self._target, timeout=_CONNECT_TIMEOUT_S)
        except OSError:
            _reset_socket(client)
            return
        for end in (client, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._links.append((_Direction(client, server), _Direction(server, client)))

    def _pump(self, link: tuple[_Direction, _Direction], readable: list[socket.socket]) -> None:
        for direction in link:
            if direction.source in readable:
                with contextlib.suppress(BlockingIOError):
                    piece = direction.source.recv(_PIECE_BYTES)
                    direction.held += piece
                    direction.ended = not piece
            self._write(direction)
        if any(direction.ended and not direction.held for direction in link):
            for direction in link:
                direction.sink.close()  # an orderly end of one side is one of both: MQTT has no half-closed state
            self._links.remove(link)

    def _write(self, direction: _Direction) -> None:
        allowed = len(direction.held)
        if self._rate_bytes_per_s is not None:
            passed_s = time.monotonic() - self._moved_s
            most = max(1.0, self._rate_bytes_per_s * 0.1)  # what was not used is not saved up
            direction.allowance_bytes = min(
                most, direction.allowance_bytes + passed_s * self._rate_bytes_per_s
            )
            allowed = min(allowed, int(direction.allowance_bytes))
        if not allowed:
            return
        with contextlib.suppress(BlockingIOError):
            written = direction.sink.send(direction.held[:allowed])
            del direction.held[:written]
            if self._rate_bytes_per_s is not None:
                direction.allowance_bytes -= written
                self.slowed_bytes += written

    def _drop(self, link: tuple[_Direction, _Direction]) -> None:
        _reset(link)
        self._links.remove(link)

    def _directions(self) -> Iterator[_Direction]:
        for link in self._links:
            yield from link

    # --- Sockets ---------------------------------------------------------------------------------------

    def _listening_socket(self) -> socket.socket:
        listener = self._bound_socket(self.port)
        listener.listen(16)
        return listener

    @staticmethod
    def _bound_socket(port: int) -> socket.socket:
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(("127.0.0.1", port))
        return bound


def _reset(link: tuple[_Direction, _Direction]) -> None:
    for direction in link:
        _reset_socket(direction.source)


def _reset_socket(end: socket.socket) -> None:
    """Closes with RST instead of FIN, and drops what was not yet sent."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


@contextlib.contextmanager
def running_proxy(host: str, port: int) -> Iterator[Proxy]:
    """A proxy to `host`:`port`; all its connections end with the block."""
    proxy = Proxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()
